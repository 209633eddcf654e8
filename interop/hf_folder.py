"""Reads what transformers and PEFT write, a folder or a NAME of the Hugging Face hub, as a checkpoint.

    ckpt = load("HuggingFaceTB/SmolLM2-135M")         # what checkpoint_file.load returns for "hf:NAME"
    tokenizer = load_tokenizer("gpt2")                # as prepare.py --tokenizer=hf:gpt2 does

hf_config.py reads config.json, and names what ours does not have when it refuses it. Weights come from
safetensors, in one file or several, or from a .bin that is read with weights_only=True: no code runs.
"hf:FILE.gguf" is read here too, by gguf_file.py. Everything raises Refusal, in one line.
"""

import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace

import torch

from config import Refusal
from interop import gguf_file, hf_config, hf_layout, peft_layout
from interop.any_tokenizer import from_files
from interop.foreign_tokenizer import FILES, parse_json, read_settings, token_text
from interop.hf_keys import unknown_keys
from model import ModelConfig
from tensors import NotFinite

# rows of an embedding past its tokenizer's ids are taken for padding, up to so many or such a share of all rows
PADDING_ROWS = 128
PADDING_SHARE = 0.02
TEXTS = ["config.json", "adapter_config.json", *FILES]


def find_folder(name, weights="model"):
    """Returns the folder `name`, or that of the hub's NAME, downloaded into the hub's own cache.

    weights: the beginning of the names of files with weights, "" where these are not needed. Raises Refusal.
    """
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or os.path.exists(name):
        problem = f"there is no folder {name}, and that is no NAME of the Hugging Face hub either"
        raise Refusal(f"hf:{name}: {problem}")
    try:
        return download(name, weights)
    except ImportError as e:
        problem = f"downloading it needs a library ({e}): pip install huggingface_hub"
        raise Refusal(f"hf:{name} is no folder here, and {problem}")
    except Exception as e:  # the library's, its HTTP library's, the system's: each version has others
        problem = f"could not be downloaded from the Hugging Face hub ({type(e).__name__}: {e})"
        raise Refusal(f"hf:{name} is no folder here and {problem}")


def download(name, weights):
    from huggingface_hub import snapshot_download

    if not weights:
        return snapshot_download(name, allow_patterns=TEXTS)
    patterns = [f"{weights}*.safetensors", f"{weights}*.safetensors.index.json"]
    folder = snapshot_download(name, allow_patterns=[*TEXTS, *patterns])
    if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
        patterns = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]
        folder = snapshot_download(name, allow_patterns=[*TEXTS, *patterns])
    files = sorted(os.listdir(folder))
    # as where prepare.py fetched the tokenizer, and there is no network now
    if not any(file.endswith((".safetensors", ".bin")) for file in files):
        raise FileNotFoundError(f"only {', '.join(files)} came or were there, no weights")
    return folder


@contextmanager
def reading(path):
    """Turns what goes wrong with the file `path` into a Refusal of one line."""
    try:
        yield
    except Refusal:
        raise
    except NotFinite as e:
        raise Refusal(f"{path} is damaged: {e}", status=1)
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror or e}")
    except ImportError as e:
        raise Refusal(f"reading {path} needs a library ({e}): pip install safetensors")
    except (KeyError, TypeError, AttributeError) as e:
        raise Refusal(f"{path} is not as transformers or PEFT write it ({e!r})")
    except Exception as e:  # ValueErrors of ours; and the libraries raise whatever they stumble over
        raise Refusal(f"{path}: {e or type(e).__name__}")


def read_json(folder, name, default=None):
    """Returns a JSON object of the folder. Where there is no such file it returns default, unless that is None."""
    path = os.path.join(folder, name)
    if default is not None and not os.path.exists(path):
        return default
    with reading(path):
        with open(path, encoding="utf-8") as f:
            return parse_json(f.read())


# ---- tensors


def read_tensors(folder, weights):
    """Returns every tensor of WEIGHTS.safetensors, or else of pytorch_model.bin, in one file or in shards."""
    for stem, suffix in (weights, ".safetensors"), ("pytorch_model", ".bin"):
        files = list_files(folder, stem + suffix)
        if files is None:
            continue
        tensors = {}
        for file in files:
            path = os.path.join(folder, file)
            with reading(path):
                file_tensors = load_tensors(path, suffix)
                if twice := tensors.keys() & file_tensors.keys():
                    raise ValueError(f"tensor {min(twice)} is in another file too")
            tensors |= file_tensors
        return tensors
    raise Refusal(f"there is no {weights}.safetensors in {folder}")


def list_files(folder, name):
    """Returns `name`, or the files that `name`.index.json lists; None where there is neither."""
    if os.path.exists(os.path.join(folder, name)):
        return [name]
    index = f"{name}.index.json"
    if not os.path.exists(os.path.join(folder, index)):
        return None
    weight_map = read_json(folder, index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and file == os.path.basename(file) for file in files):
        raise Refusal(f"{folder}/{index}: weight_map does not map tensors to files of its folder")
    return sorted(set(files))


def load_tensors(path, suffix):
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict):
        raise ValueError("it does not hold tensors by name")
    for name, x in tensors.items():
        if not isinstance(name, str) or not isinstance(x, torch.Tensor):
            raise ValueError("it does not hold tensors by name")
    return tensors


# ---- tokenizer


def token_id(data, text):
    """Returns the id of a token's text in a parsed tokenizer.json, or None."""
    added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
    vocab = data["model"].get("vocab")
    return added.get(text, vocab.get(text) if isinstance(vocab, dict) else None)


def find_eot(folder, data, settings):
    eos = token_text(settings.get("eos_token"))
    eot = token_id(data, eos) if isinstance(eos, str) else None
    if eot is None:
        ids = read_json(folder, "config.json", {}).get("eos_token_id")
        eot = ids[0] if isinstance(ids, list) and ids else ids
    if eot is None:
        names = "eos_token in tokenizer_config.json or special_tokens_map.json"
        raise ValueError(f"neither {names} nor eos_token_id in config.json says which token ends a text")
    return eot


def read_tokenizer(folder):
    """Returns the Tokenizer or ForeignTokenizer of the folder.

    tokenizer_config.json, special_tokens_map.json or else config.json names its end of text. Raises Refusal.
    """
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        call = "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise Refusal(f"there is no tokenizer.json in {folder}; transformers writes one: {call}")
    data = read_json(folder, "tokenizer.json")
    settings = read_settings(lambda name: read_json(folder, name, {}))
    files = {name: text for name in FILES if (text := read_text(folder, name)) is not None}
    with reading(path):
        eot = find_eot(folder, data, settings)
        tokenizer = from_files(files, data, eot, end_ids(folder))
        compare_starts(folder, settings, tokenizer)
        return tokenizer


def compare_starts(folder, settings, tokenizer):
    """Prints where a text starts with another token than tokenizer_config.json says.

    Raises ValueError where it starts with a space and should not, or the other way round.
    """
    add_bos = settings.get("add_bos_token")
    if add_bos is not None and tokenizer.kind != "char" and add_bos != (tokenizer.bos is not None):
        print(
            f"hf:{folder}: add_bos_token is {add_bos!r:.60}, but as in transformers 5 the "
            "post_processor of tokenizer.json decides what a text starts with"
        )
    space = settings.get("add_prefix_space")
    if space is not None and space != bool(tokenizer.prefix):
        number = "a" if tokenizer.prefix else "no"
        setting = f"add_prefix_space in tokenizer_config.json is {space!r:.60}"
        raise ValueError(f"{setting}, but here {number} space is put before a text")


def load_tokenizer(name):
    """Returns the tokenizer of the folder, the hub's NAME or FILE.gguf. Raises Refusal."""
    if gguf_file.is_gguf(name):
        with reading(name):
            return gguf_file.read_tokenizer(name)
    return read_tokenizer(find_folder(name, weights=""))


def read_text(folder, name):
    """Returns the text of a file of the folder as it is, line ends too; None where there is none."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return None
    with reading(path), open(path, encoding="utf-8", newline="") as f:
        return f.read()


def end_ids(folder):
    """Returns each id that transformers' generate stops at, as a set: generation_config.json's, else config.json's."""
    for name in "generation_config.json", "config.json":
        ids = read_json(folder, name, {}).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        ids = {i for i in ids if type(i) is int}
        if ids:
            return ids
    return set()


# ---- models and adapters


def load(name):
    """Returns the folder, the hub's NAME or FILE.gguf as a checkpoint, with step 0 and an empty config.

    Rows of the embedding that belong to no token (padding to a round number) are left out. Raises Refusal.
    """
    if gguf_file.is_gguf(name):
        with reading(name):
            c, state, tokenizer = gguf_file.read(name)
        return make_checkpoint(c, state, tokenizer)
    folder = find_folder(name)
    data = read_json(folder, "config.json")
    with reading(os.path.join(folder, "config.json")):
        keys, without = hf_config.read_config(data)
        c = ModelConfig(**keys)
    report_unknown(name, data["model_type"], unknown_keys(data))
    tokenizer = read_tokenizer(folder)
    tensors = read_tensors(folder, "model")
    with reading(folder):
        state = hf_layout.from_hf(data["model_type"], c, tensors, without)
        c = leave_out_padding(c, state, tokenizer.vocab_size)
    return make_checkpoint(c, state, tokenizer)


def leave_out_padding(c, state, V):
    """Leaves out the rows of a state's embedding and head past V tokens. Returns the config c with V tokens.

    Raises ValueError where there are too few rows, or too many for padding.
    """
    rows = c.vocab_size
    if not 0 <= rows - V <= max(PADDING_ROWS, PADDING_SHARE * rows):
        sizes = f"the model has {rows:,} tokens and its tokenizer {V:,}"
        raise ValueError(f"{sizes}: they do not belong together")
    state["wte.weight"] = state["wte.weight"][:V]
    state["head.weight"] = state["wte.weight"] if c.tie_embeddings else state["head.weight"][:V]
    return replace(c, vocab_size=V)


def make_checkpoint(c, state, tokenizer):
    """Returns what checkpoint_file.load returns, for a model of whose training only tokenizer.tuning is known."""
    return {
        "format": 1,
        "config": dict(tokenizer.tuning),
        "step": 0,
        "val_loss": math.inf,
        "best_val_loss": math.inf,
        "losses": [],
        "optimizers": [],
        "scaler": {},
        "model": state,
        "model_config": vars(c),
        "tokenizer": tokenizer.to_str(),
        "tokenizer_sha256": tokenizer.sha256,
    }


def report_unknown(name, kind, keys):
    """Prints which keys of config.json were passed over, if there are any."""
    if keys:
        shown = ", ".join(f"{key!r:.60}" for key in keys[:5])
        rest = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        passed_over = f"passed over: transformers does not have that for {kind} either"
        print(f"hf:{name}: {shown}{rest} in config.json is {passed_over}")


def load_adapter(name, c):
    """Returns (LoRAConfig's keys, adapters, the base's name, hf.py's notes) of an adapter of PEFT's.

    c is the config of the base. Raises Refusal.
    """
    folder = find_folder(name, "adapter_model")
    with reading(folder):
        data = read_json(folder, "adapter_config.json")
        tensors = read_tensors(folder, "adapter_model")
        settings, adapters = peft_layout.from_peft(c, data, tensors)
        base = data.get("base_model_name_or_path")
        base = "a base without a name" if base is None else f"{base!r:.200}"
        return settings, adapters, base, read_notes(os.path.join(folder, "adapter_model.safetensors"))


def read_notes(path):
    """Returns what hf.py notes in an adapter that it writes, base_sha256, template and text_rule; {} for others."""
    if not os.path.exists(path):
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return f.metadata() or {}
