"""Our models as Hugging Face folders, for transformers, vLLM, llama.cpp and TRL; our LoRA adapters as PEFT's, and back.

    python hf.py --out_dir=out/demo --to=out/demo-hf                                      AutoModelForCausalLM and AutoTokenizer open that
    python hf.py --out_dir=out/demo --adapter=out/lora --to=out/lora-peft                 a LoRA adapter, to use with peft over the former
    python hf.py --out_dir=out/demo --adapter=hf:out/lora-peft --to=out/lora-again        an adapter of PEFT's, to use with sample.py

The other way, "hf:FOLDER_OR_NAME" stands wherever a checkpoint does: train.py --init_from=hf:gpt2, sample.py --out_dir=hf:out/demo-hf.
A model becomes a LlamaForCausalLM, with qk_norm a Qwen3ForCausalLM, or a GPT2LMHeadModel; what has no counterpart is refused.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import checkpoint
from config import Refusal, run
from folders import new_folder
from interop import hf_folder, hf_layout
from tokenizer import bos_processor


@dataclass
class Config:
    out_dir: str = "out"     # the folder of a trained model, a checkpoint file or hf:FOLDER_OR_NAME; with an adapter: its base
    adapter: str = ""        # the folder of a LoRA adapter, which is written instead of the model; hf:FOLDER_OR_NAME is PEFT's and becomes ours
    to: str = ""             # the folder to write
    overwrite: bool = False  # move a folder that is in the way aside

    def __post_init__(self):
        if not Path(self.to).name:
            raise ValueError(f"--to=FOLDER says where to write, not {self.to!r}")


def to_transformers(model):
    """The transformers model that computes what `model` does, in eval mode, on its device and in its dtype.

    Raises ValueError for settings that have no counterpart, ImportError without transformers.
    """
    config, state = hf_layout.to_hf(model.config, model.state_dict())
    from transformers import AutoConfig, AutoModelForCausalLM
    del config["torch_dtype"], config["dtype"]
    weight = model.wte.weight
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=weight.dtype)  # .to(dtype) would round RoPE's frequencies too
    peer.load_state_dict(state)
    return peer.to(weight.device).eval()


def write_json(path, data):
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path, tensors, **notes):
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise Refusal("writing tensors needs a library: pip install safetensors")
    try:
        save_file({name: x.detach().contiguous().clone() for name, x in tensors.items()}, path, {"format": "pt"} | notes)
    except Exception as e:  # SafetensorError where the disk is full
        raise Refusal(f"cannot write {path.name}: {e}", status=1)


def write_model(folder, model, tokenizer):
    """Fills the folder with what AutoModelForCausalLM and AutoTokenizer read. Raises ValueError."""
    c = model.config
    config, tensors = hf_layout.to_hf(c, model.state_dict())
    if c.tie_embeddings:
        del tensors["lm_head.weight"]
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot}
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config | ends)
    write_json(folder / "generation_config.json", ends | {"pad_token_id": tokenizer.eot})
    bos, eot = (tokenizer.tokens[i].decode() for i in (tokenizer.bos, tokenizer.eot))
    starts = tokenizer.kind != "char"  # as sample.prompt_ids has it
    data = json.loads(tokenizer.tokenizer_json()) | {"post_processor": bos_processor(bos, tokenizer.bos) if starts else None}
    write_json(folder / "tokenizer.json", data)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eot, "add_bos_token": starts,
                                                  "model_max_length": c.block_size, "clean_up_tokenization_spaces": False})


def write_adapter(folder, base, model, adapter):
    config, tensors = hf_layout.to_peft(model.config, checkpoint.lora_config(adapter), adapter["adapters"])
    write_tensors(folder / "adapter_model.safetensors", tensors, base_sha256=adapter["base_sha256"], template=str(adapter["config"].get("template", "")))
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": base[3:] if base.startswith("hf:") else None})


def main(cfg):
    to = Path(os.path.abspath(cfg.to))
    incoming = cfg.adapter.startswith("hf:")
    path = cfg.adapter and not incoming and checkpoint.find(cfg.adapter, "adapter_best.pt")
    adapter = checkpoint.load(path, checkpoint.ADAPTER_KEYS) if path else None
    base = checkpoint.base_of(adapter, path) if adapter and "out_dir" not in cfg.given else checkpoint.find(cfg.out_dir)
    with new_folder(to, cfg.overwrite, "--overwrite moves it aside", [p.removeprefix("hf:") for p in (base, cfg.adapter) if p]) as tmp:
        ckpt = checkpoint.load(base)
        model, tokenizer = checkpoint.restore(ckpt, base)
        try:
            if incoming:
                settings, tensors, its, notes = hf_folder.load_adapter(cfg.adapter[3:], model.config)
                settings |= {"base_dataset": checkpoint.dataset_of(ckpt), "template": notes.get("template", str(ckpt["config"].get("template", "")))}
                adapter = {"config": settings, "adapters": tensors, "base": its, "base_sha256": notes.get("base_sha256") or checkpoint.fingerprint(ckpt)}
                checkpoint.restore_adapters(adapter, cfg.adapter, ckpt, base, model)
                checkpoint.save_adapters(str(tmp / "adapter.pt"), model, base, adapter["base_sha256"], settings, 0, float("inf"), float("inf"))
                if "base_sha256" not in notes:
                    print(f"{cfg.adapter} was trained over {its}, as it says; whether that is {base} is not known")
            elif adapter:
                checkpoint.restore_adapters(adapter, path, ckpt, base, model)
                write_adapter(tmp, base, model, adapter)
            else:
                write_model(tmp, model, tokenizer)
        except ValueError as e:
            raise Refusal(f"{base}: {e}")
    for file in sorted(to.iterdir()):
        print(f"{cfg.to}/{file.name}: {file.stat().st_size:,} bytes")
    print(f"next: python sample.py --adapter={cfg.to}" if incoming else f"next: PeftModel.from_pretrained(base, {cfg.to!r})" if adapter
          else f"next: AutoModelForCausalLM.from_pretrained({cfg.to!r}), or python sample.py --out_dir=hf:{cfg.to}")


if __name__ == "__main__":
    run(main, Config)
