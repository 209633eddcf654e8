"""Reads what transformers and PEFT write, a folder or a NAME of the Hugging Face hub, as if it were a checkpoint of ours.

    ckpt = load("HuggingFaceTB/SmolLM2-135M")       # what checkpoint.load returns: this is how "hf:NAME" gets everywhere
    tokenizer = read_tokenizer(located("gpt2"))     # how prepare.py --tokenizer=hf:gpt2 does

Llama, Qwen3 and GPT-2, with weights from safetensors, in one file or several, or from a .bin that is read with weights_only=True: no code
runs. What our model does not have is refused by name (hf_layout.py). Everything here raises Refusal, in one line.
"""
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace

import torch

from config import Refusal
from interop import hf_layout
from interop.any_tokenizer import from_tokenizer_json
from model import ModelConfig

PADDING = 128, 0.02  # rows of an embedding beyond its tokenizer's ids: so many, or such a share, are taken for padding


def located(name, weights="model"):
    """The folder `name`, or that of the hub's NAME, downloaded into the hub's own cache; weights: what their files' names begin with."""
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or os.path.exists(name):
        raise Refusal(f"hf:{name}: there is no folder {name}, and that is no NAME of the Hugging Face hub either")
    try:
        from huggingface_hub import snapshot_download
        texts = ["config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"]
        if not weights:
            return snapshot_download(name, allow_patterns=texts)
        folder = snapshot_download(name, allow_patterns=[*texts, f"{weights}*.safetensors", f"{weights}*.safetensors.index.json"])
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            folder = snapshot_download(name, allow_patterns=[*texts, "pytorch_model*.bin", "pytorch_model*.bin.index.json"])
        if not any(file.endswith((".safetensors", ".bin")) for file in os.listdir(folder)):  # such as after prepare.py, now without a network
            raise FileNotFoundError(f"only {', '.join(sorted(os.listdir(folder)))} came or were there, no weights")
        return folder
    except ImportError as e:
        raise Refusal(f"hf:{name} is no folder here, and downloading it needs a library ({e}): pip install huggingface_hub")
    except Exception as e:  # its own, its HTTP library's, the system's: other ones in each version
        raise Refusal(f"hf:{name} is no folder here and could not be downloaded from the Hugging Face hub ({type(e).__name__}: {e})")


@contextmanager
def reading(path):
    """What goes wrong with the file `path` becomes a Refusal of one line."""
    try:
        yield
    except Refusal:
        raise
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror or e}")
    except ImportError as e:
        raise Refusal(f"reading {path} needs a library ({e}): pip install safetensors")
    except (KeyError, TypeError, AttributeError) as e:
        raise Refusal(f"{path} is not as transformers or PEFT write it ({e!r})")
    except Exception as e:  # ValueErrors of ours; and the libraries below raise whatever they stumble over
        raise Refusal(f"{path}: {e or type(e).__name__}")


def read_json(folder, name, default=None):
    """A JSON object of the folder; default, if there is one, where there is no such file."""
    path = os.path.join(folder, name)
    if default is not None and not os.path.exists(path):
        return default
    with reading(path):
        with open(path, encoding="utf-8") as f:
            try:
                data = json.load(f)
            except RecursionError:
                raise ValueError("it is nested too deeply")
        if not isinstance(data, dict):
            raise ValueError(f"it is not a JSON object but a {type(data).__name__}")
        return data


def read_tensors(folder, weights):
    """Every tensor of weights.safetensors, of the files in weights.safetensors.index.json, or of pytorch_model.bin alike."""
    for stem, suffix in (weights, ".safetensors"), ("pytorch_model", ".bin"):
        name, tensors = stem + suffix, {}
        if os.path.exists(os.path.join(folder, name)):
            files = [name]
        elif os.path.exists(os.path.join(folder, f"{name}.index.json")):
            where = read_json(folder, f"{name}.index.json").get("weight_map")
            if not isinstance(where, dict) or not all(isinstance(file, str) and file == os.path.basename(file) for file in where.values()):
                raise Refusal(f"{folder}/{name}.index.json: weight_map does not map tensors to files of its folder")
            files = sorted(set(where.values()))
        else:
            continue
        for file in files:
            path = os.path.join(folder, file)
            with reading(path):
                found = safetensors_of(path) if suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) and isinstance(key, str) for key, x in found.items()):
                    raise ValueError("it does not hold tensors by name")
                if twice := tensors.keys() & found.keys():
                    raise ValueError(f"tensor {min(twice)} is in another file too")
            tensors |= found
        return tensors
    raise Refusal(f"there is no {weights}.safetensors in {folder}")


def safetensors_of(path):
    from safetensors.torch import load_file
    return load_file(path)


def token_id(data, token):
    """The id of a token's text in a parsed tokenizer.json, or None."""
    added = {t["content"]: t["id"] for t in data.get("added_tokens") or []}
    vocab = data["model"].get("vocab")
    return added.get(token, vocab.get(token) if isinstance(vocab, dict) else None)


def read_tokenizer(folder):
    """Tokenizer, or ForeignTokenizer, of the folder; its end of text is the one that tokenizer_config.json or else config.json names."""
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        raise Refusal(f"there is no tokenizer.json in {folder}; transformers writes one: AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    data, settings = read_json(folder, "tokenizer.json"), read_json(folder, "tokenizer_config.json", {})
    with reading(os.path.join(folder, "tokenizer.json")):
        eos, bos = (t.get("content") if isinstance(t, dict) else t for t in (settings.get("eos_token"), settings.get("bos_token")))
        eot = token_id(data, eos) if isinstance(eos, str) else None
        if eot is None:
            ids = read_json(folder, "config.json", {}).get("eos_token_id")
            eot = ids[0] if isinstance(ids, list) and ids else ids
        if eot is None:
            raise ValueError("neither eos_token in tokenizer_config.json nor eos_token_id in config.json says which token ends a text")
        add_bos, space = settings.get("add_bos_token"), settings.get("add_prefix_space")
        tokenizer = from_tokenizer_json(data, eot, None if add_bos is None else token_id(data, bos) if add_bos else eot)
        if space is not None and space != bool(tokenizer.prefix):
            raise ValueError(f"add_prefix_space in tokenizer_config.json is {space!r:.60}, but here {'a' if tokenizer.prefix else 'no'} space is put before a text")
        return tokenizer


def end_ids(folder):
    """Every id that transformers' generate stops at."""
    found = [read_json(folder, name, {}).get("eos_token_id") for name in ("config.json", "generation_config.json")]
    return {i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}


def load(name):
    """The checkpoint that the folder or the hub's NAME amounts to: no step, no optimizer, config {}.

    Rows of the embedding that no token has (padding to a round number) are left out.
    """
    folder = located(name)
    path = os.path.join(folder, "config.json")
    data = read_json(folder, "config.json")
    with reading(path):
        keys, without = hf_layout.read_config(data)
        c = ModelConfig(**keys)
    tokenizer, tensors = read_tokenizer(folder), read_tensors(folder, "model")
    if more := end_ids(folder) & set(range(tokenizer.vocab_size)) - {tokenizer.eot}:
        names = ", ".join(repr(tokenizer.decode_more([i])) for i in sorted(more))
        print(f"hf:{name}: a text ends at {tokenizer.decode_more([tokenizer.eot])!r} alone here, in transformers at {names} too")
    with reading(folder):
        state = hf_layout.from_hf(data["model_type"], c, tensors, without)
        rows, V = c.vocab_size, tokenizer.vocab_size
        if not 0 <= rows - V <= max(PADDING[0], PADDING[1] * rows):
            raise ValueError(f"the model has {rows:,} tokens and its tokenizer {V:,}: they do not belong together")
        c = replace(c, vocab_size=V)
        state["wte.weight"] = state["wte.weight"][:V]
        state["head.weight"] = state["wte.weight"] if c.tie_embeddings else state["head.weight"][:V]
    return {"format": 1, "config": {}, "step": 0, "val_loss": math.inf, "best_val_loss": math.inf, "losses": [], "optimizers": [], "scaler": {},
            "model": state, "model_config": vars(c), "tokenizer": tokenizer.to_str(), "tokenizer_sha256": tokenizer.sha256}


def load_adapter(name, c):
    """(LoRAConfig's keys, adapters, the base's name, what hf.py noted) of a PEFT folder, for a base of config c."""
    folder = located(name, "adapter_model")
    with reading(folder):
        data = read_json(folder, "adapter_config.json")
        settings, tensors = hf_layout.from_peft(c, data, read_tensors(folder, "adapter_model"))
        return settings, tensors, f"{data.get('base_model_name_or_path')!r:.200}", notes(os.path.join(folder, "adapter_model.safetensors"))


def notes(path):
    """What hf.py notes in an adapter that it writes, base_sha256 and template, or nothing."""
    if not os.path.exists(path):
        return {}
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        return f.metadata() or {}
