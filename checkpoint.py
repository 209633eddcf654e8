"""Checkpoints: one file with everything a reader needs. Atomic to write, safe to read.

    out/NAME/ckpt.pt        the last step, what --init_from=resume goes on from
    out/NAME/ckpt_best.pt   the best validation loss, what sample.py reads
    out/NAME/adapter.pt, adapter_best.pt   LoRA adapters in their place, useless without the base that they name
    hf:FOLDER_OR_NAME       what transformers wrote, read as a checkpoint (hf_folder.py)

The file holds tensors and plain types alone and is read with weights_only=True: an untrusted one runs no code.
"""
import contextlib
import dataclasses
import hashlib
import os
import warnings

import torch

import lora
from config import Refusal, hf_name, is_hf
from interop import hf_folder, hf_layout
from interop.any_tokenizer import load_tokenizer
from model import ModelConfig, Transformer, num_weights

FORMAT = 1
RUN_KEYS = {"format": int, "config": dict, "step": int, "best_val_loss": float, "val_loss": float, "losses": list, "optimizers": list}
KEYS = RUN_KEYS | {"model": dict, "model_config": dict, "tokenizer": str, "tokenizer_sha256": str}
ADAPTER_KEYS = RUN_KEYS | {"adapters": dict, "base": str, "base_sha256": str}


def save(path, model, tokenizer, config, *run, **more):
    """Writes the checkpoint under a temporary name, then renames it: path is the old file or the new one, always whole.

    model may be wrapped by torch.compile; config is a dict of plain types; what comes after it is write_run's. Raises Refusal where the
    disk does not take it.
    """
    write_run(path, {"model": unwrap(model).state_dict(), "model_config": dataclasses.asdict(unwrap(model).config),
                     "tokenizer": tokenizer.to_str(), "tokenizer_sha256": tokenizer.sha256}, config, *run, **more)


def save_adapters(path, model, base, base_sha256, config, *run, **more):
    """Writes the model's adapters alone, with where their base was and its fingerprint."""
    write_run(path, {"adapters": lora.state_dict(unwrap(model)), "base": base, "base_sha256": base_sha256}, config, *run, **more)


def write_run(path, what, config, step, val_loss, best_val_loss, losses=(), optimizers=(), scaler=None):
    ckpt = what | {"format": FORMAT, "config": config, "step": step, "val_loss": float(val_loss), "best_val_loss": float(best_val_loss),
                   "losses": list(losses), "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict() if scaler else {}}
    write_atomic(path, lambda f: torch.save(ckpt, f))


def write_atomic(path, write):
    """Calls write(file) on a file beside path, then puts it in path's place; on disk when this returns. Raises Refusal."""
    folder, tmp = os.path.dirname(path) or ".", f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        if os.name == "posix":  # the new name is an entry of the folder, which is written on its own
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except (OSError, RuntimeError) as e:
        why = e.strerror if isinstance(e, OSError) else f"is the disk full? ({str(e).splitlines()[0]})"  # torch.save says RuntimeError then
        raise Refusal(f"cannot write {path}: {why}; what was there before is as it was", status=1)
    finally:
        with contextlib.suppress(OSError):
            os.remove(tmp)


def unwrap(model):
    """The Transformer inside torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def find(out_dir, prefer="ckpt_best.pt"):
    """The file meant by out_dir: itself when it is one, else the preferred one in it, else the last: ckpt.pt or adapter.pt. hf:NAME stays."""
    last, folder, hub = prefer.replace("_best", ""), hf_name(out_dir), is_hf(out_dir)
    onnx, theirs, peft = (os.path.isfile(os.path.join(folder, file)) for file in ("model.onnx", "config.json", "adapter_config.json"))
    if os.path.isfile(out_dir) or hub and last != "adapter.pt" and (theirs or not peft):
        return out_dir
    for name in prefer, last:
        if os.path.isfile(os.path.join(out_dir, name)):
            return os.path.join(out_dir, name)
    if onnx:
        raise Refusal(f"{folder} holds an ONNX model, which sample.py --onnx={folder} reads")
    if last == "adapter.pt" and theirs and not peft:
        raise Refusal(f"{folder} holds a whole model, not an adapter: sample.py --out_dir=hf:{folder} reads it")
    if peft or hub:
        raise Refusal(f"hf:{folder} is not read as it is: python hf.py --out_dir=BASE --adapter=hf:{folder} --to=FOLDER makes an adapter of ours of it")
    if theirs:
        raise Refusal(f"{out_dir} holds no checkpoint of ours; what transformers wrote there is read as hf:{out_dir}, to sample, evaluate or start from")
    if last == "adapter.pt":
        raise Refusal(f"there is no adapter in {out_dir}; python finetune_lora.py --out_dir={out_dir} makes one")
    if os.path.isfile(os.path.join(out_dir, "adapter.pt")):
        raise Refusal(f"{out_dir} holds an adapter: sample.py --adapter={out_dir} reads it, finetune_lora.py --merge --out_dir={out_dir} "
                      "makes a checkpoint of it and its base")
    hint = "" if os.path.exists(out_dir) else f" (a folder or a name of the Hugging Face hub is hf:{out_dir})"
    raise Refusal(f"there is no checkpoint in {out_dir}; python train.py --out_dir={out_dir} makes one{hint}")


def load(path, keys=KEYS):
    """The checkpoint, or with ADAPTER_KEYS the adapters' file, as a dict, on the CPU. Raises Refusal, one line, for a file that is
    none of ours or not whole."""
    if is_hf(path):
        return hf_folder.load(hf_name(path))
    try:
        f = open(path, "rb")
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")
    try:
        with f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle's protocol; it is refused or fine
            ckpt = torch.load(f, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler raises whatever it stumbles over: OSError, IndexError, AssertionError, KeyError ...
        raise Refusal(f"{path} is not a checkpoint that is safe to read: it is damaged, foreign, or holds code")
    if not isinstance(ckpt, dict) or "format" not in ckpt:
        raise Refusal(f"{path} is not a TinyLM checkpoint")
    if ckpt["format"] != FORMAT:
        raise Refusal(f"{path} has checkpoint format {ckpt['format']!r}; this version reads format {FORMAT}")
    if "adapters" in ckpt and keys is KEYS:
        raise Refusal(f"{path} is an adapter, not a checkpoint: sample.py --adapter={path} reads it")
    if "model" in ckpt and keys is ADAPTER_KEYS:
        raise Refusal(f"{path} is a whole checkpoint, not an adapter: sample.py --out_dir={path} reads it")
    for key, kind in keys.items():
        if not isinstance(ckpt.get(key), kind):
            raise Refusal(f"{path} is damaged: {key} is missing or not a {kind.__name__}")
    return ckpt


def restore(ckpt, path, device="cpu"):
    """(model, tokenizer) from a loaded checkpoint: the model in eval mode, float32, on device."""
    try:
        tokenizer = load_tokenizer(ckpt["tokenizer"])
        config = ModelConfig(**ckpt["model_config"])
        if tokenizer.sha256 != ckpt["tokenizer_sha256"] or tokenizer.vocab_size != config.vocab_size:
            raise ValueError("its tokenizer is not the one it was trained with")
        if num_weights(config) > hf_layout.count_stored_numbers(ckpt["model"].values()):  # before memory is taken for them
            raise ValueError("its weights are fewer than its model_config needs")
        model = Transformer(config)
        model.load_state_dict(ckpt["model"])
    except (ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise Refusal(f"{path} is damaged: {str(e).splitlines()[0]}")
    return model.to(device).eval(), tokenizer


def fingerprint(ckpt):
    """sha256 of what a checkpoint computes: architecture, tokenizer and weights, however it was trained. Of one that restore takes."""
    said, c = dict(ckpt["model_config"]), ModelConfig(**ckpt["model_config"])
    if c.head_dim * c.n_head == c.n_embd:
        said.pop("head_dim", None)  # adapters are older than this setting, and their bases did not change
    digest = hashlib.sha256(repr((sorted(said.items()), ckpt["tokenizer_sha256"])).encode())
    for name, w in sorted(ckpt["model"].items()):
        digest.update(f"{name} {w.dtype} {tuple(w.shape)}".encode())
        digest.update(w.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def dataset_of(ckpt):
    """The name of the data that a model learned to write from: a fine-tuned one's is its base's. "" where none is known."""
    return str(ckpt["config"].get("base_dataset", ckpt["config"].get("dataset", "")))


def base_of(adapter, path):
    """The file that adapters were trained over. Raises Refusal where there is none any more."""
    if not os.path.isfile(adapter["base"]) and not is_hf(adapter["base"]):
        raise Refusal(f"{path} belongs over {adapter['base']}, which is not there: name it with --out_dir (sample.py) or --init_from (--merge); to go on with its training, put it back")
    return adapter["base"]


def lora_config(adapter):
    return lora.LoRAConfig(**{f.name: adapter["config"][f.name] for f in dataclasses.fields(lora.LoRAConfig)})


def restore_adapters(adapter, path, ckpt, base, model):
    """Puts loaded adapters over the model of the checkpoint they belong to. Raises Refusal over any other."""
    if adapter["base_sha256"] != fingerprint(ckpt):
        raise Refusal(f"{path} was trained over another base than {base}: over {adapter['base']} as it was then (sha256 {adapter['base_sha256'][:12]})")
    try:
        lora.inject(model, lora_config(adapter))
        lora.load_state_dict(model, adapter["adapters"])
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, ArithmeticError) as e:
        raise Refusal(f"{path} is damaged: {e!r}")
