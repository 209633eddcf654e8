"""The metadata of a GGUF file as our ModelConfig and back.

    metadata, tensors = write_config(model.config)      # tensors: those of RoPE, if any
    c = read_config(metadata, names, None)              # names: of the file's tensors; vocab_size is 0

What llama.cpp would compute otherwise is a ValueError that names it. Llama, Qwen3, GPT-2, Mixtral (an architecture
"llama" with experts) and Qwen3-MoE go both ways, Qwen2 comes in and goes out as a llama with biases.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from interop import known_logits
from interop.hf_config import format_number, read_context
from interop.hf_kinds import NEEDS, choose_kind
from model import ModelConfig
from rope_scaling import YARN_DEFAULTS, read_rope_scaling, rope_base, rope_frequencies, yarn_scale

# our kinds, by transformers' names, and what llama.cpp calls them
ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gpt2": "gpt2",
}
WITH_EXPERTS = ("mixtral", "qwen3_moe")
READ_ALONE = {"qwen2": "qwen2"}  # the architecture, and its kind
# our sizes, and their keys after "ARCHITECTURE."
SIZES = {
    "n_layer": "block_count",
    "block_size": "context_length",
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
}
FREQUENCIES = "rope_freqs.weight"  # the numbers by which llama3's scaling divides each frequency
OWN_SCALING = "tinylm.rope_scaling"  # llama3's numbers, which cannot be read off those divisors
# keys of an architecture that change nothing, or say the same as others
HARMLESS = {"vocab_size", "rope.scaling.finetuned", "rope.dimension_count", "attention.value_length"}


# ---- out


def write_config(c):
    """Returns (metadata, tensors of RoPE) of our config: all of the file but the model's own tensors and the tokenizer.

    Raises ValueError for what llama.cpp does not have or would compute otherwise.
    """
    if c.window >= c.block_size:  # it hides nothing in the context, past which llama.cpp does not go
        c = replace(c, window=0)
    kind = choose_kind(c)
    known_logits.check(kind)
    if any(c.window_of(layer) for layer in range(c.n_layer)):
        raise ValueError(
            f"window={c.window}: llama.cpp reads no windows in these kinds and would see the whole text"
        )
    if kind == "qwen3_moe" and not c.norm_topk_prob:
        raise ValueError(
            "norm_topk_prob=False: llama.cpp's qwen3moe makes the scores of experts sum to 1"
        )
    if kind == "qwen3_moe" and c.bias:
        raise ValueError("bias=True: llama.cpp's qwen3moe has no biases")
    architecture = ARCHITECTURES[kind]
    settings = write_sizes(kind, c)
    metadata = {"general.architecture": architecture}
    tensors = {}
    if c.pos == "rope":
        scaling, own_keys, tensors = write_rope(architecture, c)
        settings |= scaling
        metadata |= own_keys
    return metadata | {f"{architecture}.{key}": value for key, value in settings.items()}, tensors


def write_sizes(kind, c):
    """Returns the metadata of a model's sizes, without "ARCHITECTURE." in the keys."""
    settings = {name: getattr(c, key) for key, name in SIZES.items()}
    settings["vocab_size"] = c.vocab_size
    if kind == "gpt2":
        return settings | {"attention.layer_norm_epsilon": float(c.norm_eps)}
    settings |= {
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "attention.head_count_kv": c.n_kv_head,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
    }
    if c.mlp == "moe":
        settings |= {"expert_count": c.n_expert, "expert_used_count": c.n_expert_per_token}
    if kind == "qwen3_moe":
        settings["expert_feed_forward_length"] = c.n_inner
    return settings


def write_rope(architecture, c):
    """Returns (metadata without "ARCHITECTURE." in the keys, other metadata, tensors) of RoPE's settings.

    Raises ValueError for what llama.cpp computes otherwise: it has one pair of YaRN's betas, and llama3's
    scaling, a tensor there, is read for the architecture llama alone.
    """
    settings = {"rope.freq_base": float(rope_base(c)), "rope.dimension_count": c.head_dim}
    kind, numbers = read_rope_scaling(c.rope_scaling)
    if kind == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": numbers["factor"]}
    if kind == "yarn":
        settings |= write_yarn(c, numbers)
    if kind != "llama3":
        return settings, {}, {}
    if architecture != "llama":
        raise ValueError(
            f"rope_scaling={c.rope_scaling}: llama.cpp's {architecture} has no llama3 scaling"
        )
    plain = ModelConfig(**(vars(c) | {"rope_scaling": "none"}))
    divisors = rope_frequencies(plain) / rope_frequencies(c)
    return settings, {OWN_SCALING: c.rope_scaling}, {FREQUENCIES: divisors}


def write_yarn(c, numbers):
    for key, default in YARN_DEFAULTS.items():
        if numbers.get(key, default) != default:
            problem = f"{key} is {numbers[key]:g} and in llama.cpp always {default:g}"
            raise ValueError(f"rope_scaling={c.rope_scaling}: {problem}")
    settings = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": numbers["factor"],
        "rope.scaling.original_context_length": int(numbers["original_max_position_embeddings"]),
    }
    if "attention_factor" in numbers:
        # llama.cpp multiplies it by the usual one
        growth = numbers["attention_factor"] / yarn_scale(numbers["factor"])
        settings["rope.scaling.attn_factor"] = growth
    return settings


# ---- in


class Metadata:
    """The metadata of an architecture. Each key is noted when it is read: the ones left in the end are unknown."""

    def __init__(self, metadata):
        self.architecture = metadata.get("general.architecture")
        prefix = f"{self.architecture}."
        self.values = {
            key.removeprefix(prefix): x for key, x in metadata.items() if key.startswith(prefix)
        }
        self.known = set(HARMLESS)

    def number(self, key, kind=int, default=None):
        """Returns a number of this kind. Raises ValueError where there is none."""
        self.known.add(key)
        value = self.values.get(key, default)
        if value is None:
            raise ValueError(f"{self.architecture}.{key} is missing")
        if type(value) is not kind or kind is float and not math.isfinite(value):
            expected = "a whole number" if kind is int else "a finite number"
            raise ValueError(
                f"{self.architecture}.{key} is {value!r:.60}, where {expected} was expected"
            )
        return shortest(value) if kind is float else value

    def text(self, key, default):
        self.known.add(key)
        return self.values.get(key, default)

    def refuse_unknown(self):
        """Raises ValueError for a key that was not read: it may change what is computed."""
        for key, value in self.values.items():
            if key not in self.known:
                raise ValueError(f"{self.architecture}.{key} is {value!r:.60}, which is not known here")


def shortest(x):
    """Returns the number that was written as this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def read_config(metadata, names, divisors):
    """Returns our ModelConfig, vocab_size 0, of a file's metadata and the names of its tensors.

    divisors: the tensor FREQUENCIES, None where there is none. Raises ValueError.
    """
    data = Metadata(metadata)
    architecture = data.architecture
    n_expert = data.number("expert_count", default=0)
    kinds = {
        name: kind for kind, name in ARCHITECTURES.items() if (kind in WITH_EXPERTS) == (n_expert > 0)
    }
    kind = (kinds | READ_ALONE).get(architecture)
    if kind is None:
        known = ", ".join(sorted({*ARCHITECTURES.values(), *READ_ALONE}))
        raise ValueError(f"general.architecture is {architecture!r:.60}; only {known} are read here")
    keys = dict(NEEDS[kind])
    keys |= {key: data.number(name) for key, name in SIZES.items()}
    if min(keys["n_layer"], keys["n_embd"], keys["n_head"]) < 1:
        raise ValueError(f"its sizes cannot be: {keys}")
    keys["tie_embeddings"] = "output.weight" not in names
    if kind == "gpt2":
        keys["n_kv_head"] = data.number("attention.head_count_kv", default=keys["n_head"])
        keys["norm_eps"] = data.number("attention.layer_norm_epsilon", float)
    else:
        keys["bias"] = any(name.endswith(".bias") for name in names)
        keys |= read_llama_sizes(data, keys)
        keys |= read_rope(data, metadata.get(OWN_SCALING), keys, divisors)
    if n_expert:
        keys |= {"n_expert": n_expert, "n_expert_per_token": data.number("expert_used_count")}
        if kind == "qwen3_moe":
            keys |= {"n_inner": data.number("expert_feed_forward_length"), "norm_topk_prob": True}
    data.refuse_unknown()
    c = ModelConfig(**keys)
    choose_kind(c)  # a qwen3 with biases
    return c


def read_llama_sizes(data, keys):
    head_dim = data.number("attention.key_length", default=keys["n_embd"] // keys["n_head"])
    for key in "attention.value_length", "rope.dimension_count":
        if data.number(key, default=head_dim) != head_dim:
            raise ValueError(
                f"{data.architecture}.{key} is {data.values[key]} for heads of {head_dim}, which is not here"
            )
    return {
        "head_dim": head_dim,
        "n_kv_head": data.number("attention.head_count_kv", default=keys["n_head"]),
        "norm_eps": data.number("attention.layer_norm_rms_epsilon", float),
    }


def read_rope(data, own_scaling, keys, divisors):
    """Returns our rope_theta, rope_scaling and, with YaRN, the context. Raises ValueError."""
    settings = {"rope_theta": data.number("rope.freq_base", float, 10000.0), "rope_scaling": "none"}
    scaling = data.text("rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        factor = data.number("rope.scaling.factor", float)
        settings["rope_scaling"] = f"{scaling}:{format_number(factor)}"
    elif scaling != "none":
        raise ValueError(f"{data.architecture}.rope.scaling.type is {scaling!r:.60}, which is not here")
    if scaling == "yarn":
        original = data.number("rope.scaling.original_context_length", default=keys["block_size"])
        settings["rope_scaling"] += f",{original}"
        settings["block_size"] = read_context(keys["block_size"], settings["rope_scaling"])
        check_betas(data)
        growth = data.number("rope.scaling.attn_factor", float, 1.0)
        if growth != 1:
            betas = "{beta_fast:g},{beta_slow:g}".format(**YARN_DEFAULTS)
            attention_factor = format_number(shortest(growth * yarn_scale(factor)))
            settings["rope_scaling"] += f",{betas},{attention_factor}"
    if divisors is not None:
        if scaling != "none":
            raise ValueError(f"there is {FREQUENCIES} beside rope.scaling.type {scaling}")
        settings["rope_scaling"] = find_llama3(own_scaling, keys | settings, divisors, data.architecture)
    return settings


def check_betas(data):
    """Raises ValueError for YaRN's betas other than the defaults. llama.cpp's converter writes them where config.json
    has them, but in these architectures llama.cpp computes with the defaults whatever the file says.
    """
    for name, default in YARN_DEFAULTS.items():
        key = f"rope.scaling.yarn_{name}"
        if (beta := data.number(key, float, default)) != default:
            raise ValueError(
                f"{data.architecture}.{key} is {beta:g} and in llama.cpp always {default:g}"
            )


def find_llama3(own_scaling, keys, divisors, architecture):
    """Returns the rope_scaling that has these divisors of frequencies: the one that our own file names, or
    one with Llama 3's usual numbers. Raises ValueError where neither has them.
    """
    if architecture != "llama":
        raise ValueError(f"there is {FREQUENCIES}, which llama.cpp does not read for {architecture}")
    usual = f"llama3:{divisors.max().item():g},1,4,8192"
    for scaling in (own_scaling, usual):
        if not isinstance(scaling, str) or not scaling.startswith("llama3:"):
            continue
        stretched = ModelConfig(**(keys | {"rope_scaling": scaling}))
        plain = ModelConfig(**(keys | {"rope_scaling": "none"}))
        expected = rope_frequencies(plain) / rope_frequencies(stretched)
        if expected.shape == divisors.shape and torch.allclose(expected, divisors, rtol=1e-5):
            return scaling
    raise ValueError(f"{FREQUENCIES} divides frequencies otherwise than Llama 3's scaling does")
