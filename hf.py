"""Our models as Hugging Face folders, for transformers, vLLM and TRL, or as GGUF; our adapters as PEFT's.

    python hf.py --out_dir=out/demo --to=out/demo-hf      # AutoModelForCausalLM, AutoTokenizer open that
    python hf.py --out_dir=out/demo --to=out/demo.gguf    # llama.cpp, Ollama and LM Studio run that
    python hf.py --out_dir=out/demo --adapter=out/lora --to=out/peft     # a LoRA adapter, for peft
    python hf.py --out_dir=out/demo --adapter=hf:out/peft --to=out/lora  # PEFT's, for sample.py

A whole model comes in without this script: "hf:FOLDER_OR_NAME" or "hf:FILE.gguf" stands wherever a checkpoint
does, as in train.py --init_from=hf:gpt2 or sample.py --out_dir=hf:out/demo-hf. A model becomes a LlamaForCausalLM,
with qk_norm a Qwen3ForCausalLM, with biases in q, k and v alone (Qwen2's) a Qwen2ForCausalLM, with
experts a MixtralForCausalLM or with qk_norm a Qwen3MoeForCausalLM, or a GPT2LMHeadModel; what has no
counterpart is refused.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from config import Refusal, check_choice, hf_name, is_hf, run

# isort: split
import checkpoint
import checkpoint_file
from data import text_rule
from folders import new_folder
from interop import gguf_file, hf_folder, hf_layout, peft_layout
from interop.chat_template import noted_jinja
from interop.foreign_tokenizer import CHAT_TEMPLATE
from vocabulary import bos_processor


@dataclass
class Config:
    out_dir: str = "out"  # a model's folder, a checkpoint file or hf:FOLDER_OR_NAME; an adapter's base
    adapter: str = ""  # an adapter's folder, written instead; hf:FOLDER_OR_NAME is PEFT's, made ours
    block_size: int = 0  # another context than the model's, as in sample.py; 0 = its own
    rope_scaling: str = ""  # another one than the model's, as in sample.py; "" = its own
    to: str = ""  # the folder or the FILE.gguf to write
    bits: int = 32  # of a number in FILE.gguf: 32 | 16 | 8 | 4
    overwrite: bool = False  # move a folder or a file that is in the way aside

    def __post_init__(self):
        if not Path(self.to).name:
            raise ValueError(f"--to=FOLDER says where to write, not {self.to!r}")
        if self.adapter and (self.block_size or self.rope_scaling):
            raise ValueError("an adapter has no positions: leave out block_size and rope_scaling")
        if self.adapter and gguf_file.is_gguf(self.to):
            advice = "finetune_lora.py --merge makes a whole model of it and its base"
            raise ValueError(f"an adapter is not written as GGUF: {advice}")
        check_choice(self, "bits", gguf_file.BITS)
        if self.bits != 32 and not gguf_file.is_gguf(self.to):
            raise ValueError(f"--bits={self.bits} is for --to=FILE.gguf; a folder has float32")


def to_transformers(model):
    """Returns the transformers model that computes what `model` does, on its device and in its dtype.

    It is in eval mode. Raises ValueError for settings that have no counterpart, ImportError without
    transformers.
    """
    config, state = hf_layout.to_hf(model.config, model.state_dict())
    from transformers import AutoConfig, AutoModelForCausalLM

    del config["torch_dtype"], config["dtype"]
    hf_config = AutoConfig.for_model(**config)
    weight = model.wte.weight
    # .to(dtype) would round RoPE's frequencies too
    hf_model = AutoModelForCausalLM.from_config(hf_config, dtype=weight.dtype)
    if model.config.mlp == "moe":  # only from_pretrained joins the matrices of experts
        hf_model = type(hf_model).from_pretrained(
            None, config=hf_config, state_dict=state, dtype=weight.dtype
        )
    else:
        hf_model.load_state_dict(state)
    return hf_model.to(weight.device).eval()


def write_json(path, data):
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path, tensors, **notes):
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise Refusal("writing tensors needs a library: pip install safetensors")
    tensors = {name: x.detach().contiguous().clone() for name, x in tensors.items()}
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, {"format": "pt"} | notes)
        path.chmod(mode)  # safetensors 0.8 leaves a file that its owner alone may read
    except Exception as e:  # SafetensorError where the disk is full
        raise Refusal(f"cannot write {path.name}: {e}", status=1)


def write_model(folder, model, tokenizer, template, text_rule):
    """Fills the folder with what AutoModelForCausalLM and AutoTokenizer read. Raises ValueError.

    template, text_rule: those that the model was fine-tuned with. A tokenizer of our own gets the template as a chat
    template; files that came with a foreign one stay as they came.
    """
    config, tensors = hf_layout.to_hf(model.config, model.state_dict())
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
        # GPT-2's as on the hub: mlx-lm reads no others
        tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    write_tensors(folder / "model.safetensors", tensors)
    ends = list(tokenizer.ends) if len(tokenizer.ends) > 1 else tokenizer.eot
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": ends}
    write_json(folder / "config.json", config | ids)
    write_json(folder / "generation_config.json", ids | {"pad_token_id": tokenizer.eot})
    if tokenizer.files:
        tokenizer.save_files(folder)  # as they came in, a generation_config.json too
    if not (folder / "tokenizer_config.json").exists():
        write_tokenizer(folder, tokenizer, model.config.block_size)
    if "{prompt}" in template and not tokenizer.files:
        text = noted_jinja(tokenizer, template, text_rule)
        (folder / CHAT_TEMPLATE).write_bytes(text.encode())


def write_tokenizer(folder, tokenizer, block_size):
    """Writes the tokenizer.json and tokenizer_config.json of a tokenizer that has none."""
    eot = tokenizer.tokens[tokenizer.eot].decode()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eot,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    data = json.loads(tokenizer.tokenizer_json()) | {"post_processor": None}
    add_bos = tokenizer.first_id is not None
    if tokenizer.bos is not None:
        bos = tokenizer.tokens[tokenizer.bos].decode()
        settings |= {"bos_token": bos, "add_bos_token": add_bos}
        data["post_processor"] = bos_processor(bos, tokenizer.bos) if add_bos else None
    write_json(folder / "tokenizer.json", data)
    write_json(folder / "tokenizer_config.json", settings)


def write_peft_adapter(folder, base, model, tokenizer, adapter):
    """Fills the folder with what PEFT reads, of our loaded adapter. Raises ValueError."""
    lora_config = checkpoint.lora_config(adapter)
    config, tensors = peft_layout.to_peft(model.config, lora_config, adapter["adapters"])
    notes = {
        "base_sha256": adapter["base_sha256"],
        "template": str(adapter["config"].get("template", "")),
        "text_rule": text_rule(adapter["config"]),
    }
    write_tensors(folder / "adapter_model.safetensors", tensors, **notes)
    config["base_model_name_or_path"] = hf_name(base) if is_hf(base) else None
    write_json(folder / "adapter_config.json", config)
    if tokenizer.files:  # a chat template and the tokens that end a text, as PEFT's own have them
        tokenizer.save_files(folder)


def write_own_adapter(folder, name, ckpt, model):
    """Fills the folder with our adapter made of PEFT's, `name`, for the checkpoint. Raises ValueError."""
    settings, tensors, peft_base, notes = hf_folder.load_adapter(hf_name(name), model.config)
    settings["base_dataset"] = ckpt.dataset
    settings["template"] = notes.get("template", ckpt.template)
    settings["text_rule"] = text_rule(notes) if "template" in notes else ckpt.text_rule
    sha256 = notes.get("base_sha256") or checkpoint_file.fingerprint(ckpt.state)
    ckpt.adapter_path = name
    ckpt.adapter = {"config": settings, "adapters": tensors, "base": peft_base, "base_sha256": sha256}
    ckpt.restore_adapters(model)
    path = str(folder / "adapter.pt")
    checkpoint_file.save_adapters(path, model, ckpt.path, sha256, settings, checkpoint_file.RunState())
    if "base_sha256" not in notes:
        print(
            f"{name} was trained over {peft_base}, as it says; whether that is {ckpt.path} is not known"
        )


def write_gguf(cfg, ckpt):
    """Writes cfg.to, a GGUF file."""
    model, tokenizer = ckpt.restore()
    try:
        note = gguf_file.write(
            cfg.to, model, tokenizer, ckpt.template, cfg.bits, cfg.overwrite, ckpt.text_rule
        )
    except ValueError as e:
        raise Refusal(f"{ckpt.path}: {e}")
    print(f"{cfg.to}: {os.path.getsize(cfg.to):,} bytes, {note}")
    print(f"next: llama-cli -m {cfg.to}, or python sample.py --out_dir=hf:{cfg.to}")


def main(cfg):
    to = Path(os.path.abspath(cfg.to))
    own_adapter = "" if is_hf(cfg.adapter) else cfg.adapter
    ckpt = checkpoint.open_given(cfg, own_adapter)
    ckpt.stretch(cfg.rope_scaling, cfg.block_size)
    if gguf_file.is_gguf(cfg.to):
        write_gguf(cfg, ckpt)
        return
    sources = [hf_name(source) for source in (ckpt.path, cfg.adapter) if source]
    with new_folder(to, cfg.overwrite, "--overwrite moves it aside", sources) as tmp:
        model, tokenizer = ckpt.restore()
        try:
            if is_hf(cfg.adapter):
                write_own_adapter(tmp, cfg.adapter, ckpt, model)
            elif own_adapter:
                write_peft_adapter(tmp, ckpt.path, model, tokenizer, ckpt.adapter)
            else:
                write_model(tmp, model, tokenizer, ckpt.template, ckpt.text_rule)
        except ValueError as e:
            raise Refusal(f"{ckpt.path}: {e}")
    for file in sorted(to.iterdir()):
        print(f"{cfg.to}/{file.name}: {file.stat().st_size:,} bytes")
    if is_hf(cfg.adapter):
        print(f"next: python sample.py --adapter={cfg.to}")
    elif own_adapter:
        print(f"next: PeftModel.from_pretrained(base, {cfg.to!r})")
    else:
        if "{prompt}" in ckpt.template and tokenizer.files:
            print(
                f"not in it, as the tokenizer's files stay as they came: the template {ckpt.template!r}; a .gguf has it"
            )
        load = f"AutoModelForCausalLM.from_pretrained({cfg.to!r})"
        print(f"next: {load}, or python sample.py --out_dir=hf:{cfg.to}")


if __name__ == "__main__":
    run(main, Config)
