"""The file of a checkpoint: how it is written and read. Atomic to write, safe to read.

It holds tensors and plain types alone and is read with weights_only=True: an untrusted one runs no code.
checkpoint.py says which file a name means.
"""

import dataclasses
import hashlib
import math
import sys
import warnings
from dataclasses import dataclass, field

import torch

import lora
import quantized
from config import Refusal, hf_name, is_hf, is_out_of_memory
from folders import write_atomic
from interop import hf_folder
from interop.any_tokenizer import load_tokenizer
from interop.gguf_file import is_gguf
from memory import check_memory
from model import ModelConfig, Transformer
from sharding import gathered, is_sharded
from sizes import Undrawn, model_sizes
from tensors import FLOATS, INTEGERS, check_tensors, count_stored_numbers, find_not_finite

FORMAT = 1
QUANTIZED = 2  # the format of a model of integers, which older versions and other programs refuse


# -----------------------------------------------------------------------------------------------------
# Writing


@dataclass
class RunState:
    """How far a training run is: what a checkpoint holds beside the weights."""

    step: int = 0
    val_loss: float = math.inf
    best_val_loss: float = math.inf
    losses: list = field(default_factory=list)  # of the steps since the last line of the log
    optimizers: list = field(default_factory=list)  # empty where nothing goes on from the checkpoint
    scaler: object = None  # the loss scaler of float16, or None

    def to_dict(self):
        """Returns the plain types and tensors that a file holds."""
        return {
            "step": self.step,
            "val_loss": float(self.val_loss),
            "best_val_loss": float(self.best_val_loss),
            "losses": list(self.losses),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict() if self.scaler else {},
        }


# what a file must hold, and of which type
RUN_KEYS = {"format": int, "config": dict} | {f.name: f.type for f in dataclasses.fields(RunState)}
RUN_KEYS["scaler"] = dict
KEYS = RUN_KEYS | {"model": dict, "model_config": dict, "tokenizer": str, "tokenizer_sha256": str}
ADAPTER_KEYS = RUN_KEYS | {"adapters": dict, "base": str, "base_sha256": str}


def save(path, model, tokenizer, config, state):
    """Writes a checkpoint. At any moment the file is the old one or the new one, and whole.

    model may be wrapped by torch.compile; config is a dict of plain types, state a RunState. Raises
    Refusal where the disk does not take it.
    """
    model = unwrap(model)
    weights = {
        "model": model.state_dict(),
        "model_config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer.to_str(),
        "tokenizer_sha256": tokenizer.sha256,
    }
    if model.quantization:
        weights |= {"format": QUANTIZED, "quantization": dataclasses.asdict(model.quantization)}
    write_checkpoint(path, weights, config, state)


def save_adapters(path, model, base, base_sha256, config, state):
    """Writes the model's adapters alone, with where their base was and its fingerprint."""
    weights = {"adapters": lora.state_dict(unwrap(model)), "base": base, "base_sha256": base_sha256}
    write_checkpoint(path, weights, config, state)


def write_checkpoint(path, weights, config, state):
    """Writes what save and save_adapters put together. Where weights are in shards every process must call it; the
    first one writes, and holds all weights in its memory meanwhile.
    """
    content = {"format": FORMAT} | weights | {"config": config} | state.to_dict()
    key = "adapters" if "adapters" in weights else "model"
    if any(map(is_sharded, content[key].values())):
        is_main = torch.distributed.get_rank() == 0
        content = gathered(content, keep=is_main)
        if not is_main:
            return
    name = find_not_finite(content[key])
    if name is not None:
        problem = f"tensor {name} holds nan or infinity"
        raise Refusal(f"{path} is not written: {problem}; what was there is as it was", status=1)
    write_atomic(path, lambda f: torch.save(content, f))


def unwrap(model):
    """Returns the Transformer inside torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


# -----------------------------------------------------------------------------------------------------
# Reading


def load(path, keys=KEYS):
    """Returns the checkpoint, or with ADAPTER_KEYS the adapters' file, as a dict, on the CPU. Raises
    Refusal, one line, for a file that is none of ours or not whole.
    """
    if is_hf(path):
        return hf_folder.load(hf_name(path))
    ckpt = read_file(path)
    check_kind(ckpt, path, keys)
    is_quantized = ckpt["format"] == QUANTIZED
    if is_quantized:
        keys = keys | {"quantization": dict}
    for key, kind in keys.items():
        if not isinstance(ckpt.get(key), kind):
            raise damaged(path, f"{key} is missing or not a {kind.__name__}")
    try:
        check_numbers(ckpt)
        dtypes = (*FLOATS, *INTEGERS) if is_quantized else FLOATS
        check_tensors(ckpt["adapters" if "adapters" in keys else "model"], dtypes)
    except ValueError as e:
        raise damaged(path, e)
    return ckpt


def read_file(path):
    """Returns what torch.save wrote to a file, whatever that is. Runs no code. Raises Refusal."""
    try:
        f = open(path, "rb")
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")
    try:
        with f, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle's protocol; it is refused or fine
            return torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:  # the unpickler raises whatever it stumbles over
        if is_out_of_memory(e):
            raise too_large(path)
        if is_gguf(path):
            raise Refusal(f"{path} is no checkpoint of ours: a GGUF file is read as hf:{path}")
        raise Refusal(
            f"{path} is not a checkpoint that is safe to read: it is damaged, foreign, or holds code"
        )


def check_kind(ckpt, path, keys):
    """Raises Refusal where a loaded file is not a checkpoint, or with ADAPTER_KEYS not adapters, of a format that is
    read here.
    """
    if not isinstance(ckpt, dict) or "format" not in ckpt:
        raise Refusal(f"{path} is not a TinyLM checkpoint")
    if type(ckpt["format"]) is not int or ckpt["format"] not in (FORMAT, QUANTIZED):
        raise Refusal(
            f"{path} has checkpoint format {ckpt['format']!r:.60}; this version reads {FORMAT} and {QUANTIZED}"
        )
    if "adapters" in ckpt and keys is KEYS:
        raise Refusal(f"{path} is an adapter, not a checkpoint: sample.py --adapter={path} reads it")
    if "model" in ckpt and keys is ADAPTER_KEYS:
        raise Refusal(
            f"{path} is a whole checkpoint, not an adapter: sample.py --out_dir={path} reads it"
        )


def damaged(path, reason):
    """Returns the Refusal of a file of ours that is not as it was written; status 1, as the command was right."""
    return Refusal(f"{path} is damaged: {reason}", status=1)


def too_large(path):
    """Returns the Refusal of a file that does not fit in memory."""
    return Refusal(f"{path} takes more memory than there is", status=1)


def check_numbers(ckpt):
    """Raises ValueError for a step or losses that no run can have."""
    step = ckpt["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r:.60}")
    is_reward = ckpt["config"].get("task") == "reinforcement"  # its loss is a negative reward
    lowest = -sys.float_info.max if is_reward else 0
    for key in ("val_loss", "best_val_loss"):
        loss = ckpt[key]
        # infinite where nothing was evaluated yet, which can only be before the first step
        if not lowest <= loss < math.inf and not (loss == math.inf and step == 0):
            raise ValueError(f"{key} is {loss} at step {step}")
    for loss in ckpt["losses"]:
        if type(loss) is not float or not math.isfinite(loss):
            raise ValueError(f"losses has {loss!r:.60}, which is no finite number")


def settings_of(ckpt, path):
    """Returns the ModelConfig of a loaded checkpoint. Raises Refusal where model.py has no such model, as where a
    class of one's own is gone.
    """
    try:
        return ModelConfig(**ckpt["model_config"])
    except (ValueError, TypeError, OverflowError) as e:
        raise Refusal(f"{path} is damaged, or of a model that model.py has no longer: {e}", status=1)


def restore(ckpt, path, device="cpu"):
    """Returns (model, tokenizer) from a loaded checkpoint: the model in eval mode, float32, on device.
    Raises Refusal where its parts do not belong together, or memory does not hold it.
    """
    config = settings_of(ckpt, path)
    try:
        tokenizer = load_tokenizer(ckpt["tokenizer"])
        if tokenizer.sha256 != ckpt["tokenizer_sha256"] or tokenizer.vocab_size != config.vocab_size:
            raise ValueError("its tokenizer is not the one it was trained with")
        sizes = model_sizes(config)
        is_quantized = ckpt.get("format") == QUANTIZED
        # two integers of 4 bits are one number of the file
        most = count_stored_numbers(ckpt["model"].values()) * (2 if is_quantized else 1)
        if sizes.matrices > most:
            raise ValueError("its weights are fewer than its model_config needs")
        check_memory(torch.device("cpu"), sizes.bytes, f"{path} is for a larger machine")
        if is_quantized:
            model = make_quantized(config, ckpt)
        else:
            model = Transformer(config)
            model.load_state_dict(ckpt["model"])
    except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise too_large(path)
        raise damaged(path, " ".join(str(e).splitlines()[:2]))  # in the second line torch names a tensor
    return model.to(device).eval(), tokenizer


def make_quantized(config, ckpt):
    """Returns the model of integers in a loaded checkpoint. Raises ValueError, TypeError or RuntimeError."""
    with Undrawn():  # no weights but those of norms are ever written, so that the model takes no memory
        model = Transformer(config)
    quantized.install(model, quantized.Quantization(**ckpt["quantization"]))
    for name, x in model.state_dict().items():
        stored = ckpt["model"].get(name, x)
        if stored.is_floating_point() != x.is_floating_point():
            raise ValueError(f"tensor {name} is {stored.dtype}, where {x.dtype} was expected")
    model.load_state_dict(ckpt["model"])
    return model.float()


def fingerprint(ckpt):
    """Returns the sha256 of a checkpoint's architecture, tokenizer and weights: equal where two compute the
    same, however they were trained. restore must take the checkpoint.
    """
    c = ModelConfig(**ckpt["model_config"])
    # settings that came later are left out where they change nothing: older adapters still know their base
    idle = set()
    if c.head_dim * c.n_head == c.n_embd:
        idle |= {"head_dim"}
    if not c.window:
        idle |= {"window", "window_pattern"}
    if c.mlp != "moe":
        idle |= {"n_expert", "n_expert_per_token", "norm_topk_prob"}
    settings = sorted((key, value) for key, value in ckpt["model_config"].items() if key not in idle)
    digest = hashlib.sha256(repr((settings, ckpt["tokenizer_sha256"])).encode())
    for name, weight in sorted(ckpt["model"].items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
