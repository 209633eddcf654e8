"""Hugging Face's config.json as our ModelConfig and back; hf_kinds.py has the kinds of models, hf_keys.py their keys.

    keys, without = read_config(data)           # ModelConfig's keys, and absent biases
    data = write_config(choose_kind(config), config)

What has no counterpart on the other side is a ValueError that names it: nothing is ever ignored that would
change a logit.
"""

import math
import re

from interop.hf_keys import DEFAULT_THETAS, DEFAULTS, FIXED, SIZES, check_keys, rename_aliases
from interop.hf_kinds import (
    CLASSES,
    FULL,
    GPT2_NEEDS,
    KIND_REASONS,
    MIXED,
    NEEDS,
    QWEN2_WITHOUT,
    SLIDING,
    layer_types,
)
from rope_scaling import ROPE_SCALINGS, YARN_DEFAULTS, YARN_LEAST, read_rope_scaling, rope_base

MOST_LAYERS = 10**7


def read_number(data, key, default=None, kind=(int, float)):
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
        if key not in data:
            raise ValueError(f"{key} is missing")
        raise ValueError(f"{key} is {value!r:.60}, where a number was expected")
    return value


def read_flag(data, key, default=False):
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r:.60}, where true or false was expected")
    return value


def read_config(data):
    """Returns (ModelConfig's keys, patterns of the biases that are absent) of a parsed config.json.

    Raises ValueError.
    """
    kind = data.get("model_type")
    if kind not in tuple(CLASSES):
        reasons = [reason for words, reason in KIND_REASONS.items() if re.search(words, str(kind))]
        problem = ": ".join([f"model_type is {kind!r:.60}", *reasons[:1]])
        raise ValueError(f"{problem}; only {', '.join(CLASSES)} are read here")
    check_keys(kind, data)
    data = DEFAULTS[kind] | data
    data = rename_aliases(kind, data)
    sizes = read_sizes(kind, data)
    if kind == "gpt2":
        return sizes | GPT2_NEEDS | read_gpt2_settings(data), []
    return read_llama_config(kind, data, sizes)


def read_sizes(kind, data):
    sizes = {}
    for key, hf_key in SIZES[kind].items():
        if hf_key == "n_inner" and data.get(hf_key) is None:
            continue  # GPT-2 has 4 n_embd then, and so have we
        sizes[key] = read_number(data, hf_key, kind=int)
    smallest = min(sizes["n_layer"], sizes["n_head"], sizes["n_embd"])
    if smallest < 1 or sizes["n_layer"] > MOST_LAYERS:
        raise ValueError(f"its sizes cannot be: {sizes}")
    return sizes


def read_gpt2_settings(data):
    rates = [read_number(data, key, 0.1) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")]
    if len(set(rates)) > 1:
        names = "embd_pdrop, attn_pdrop and resid_pdrop"
        raise ValueError(f"{names} are {rates}; here there is one dropout")
    return {
        "norm_eps": float(read_number(data, "layer_norm_epsilon", 1e-5)),
        "tie_embeddings": read_flag(data, "tie_word_embeddings", True),
        "dropout": float(rates[0]),
    }


def read_llama_config(kind, data, sizes):
    theta, scaling = read_rope(data, DEFAULT_THETAS.get(kind, 10000.0))
    sizes["block_size"] = read_context(sizes["block_size"], scaling)
    keys = sizes | NEEDS[kind]
    if kind == "qwen3" or data.get("head_dim") is not None:
        keys["head_dim"] = read_number(data, "head_dim", kind=int)
        if keys["head_dim"] < 1:
            raise ValueError(f"head_dim is {keys['head_dim']}")
    keys |= read_windows(kind, data, sizes)
    if data.get("num_key_value_heads") is not None:
        keys["n_kv_head"] = read_number(data, "num_key_value_heads", kind=int)
    keys |= {
        "norm_eps": float(read_number(data, "rms_norm_eps", 1e-6)),
        "tie_embeddings": read_flag(data, "tie_word_embeddings"),
        "rope_theta": float(theta),
        "rope_scaling": scaling,
    }
    if kind == "qwen3_moe":
        keys["norm_topk_prob"] = read_flag(data, "norm_topk_prob")
    keys["bias"], without = read_biases(kind, data)
    return keys, without


def read_biases(kind, data):
    """Returns (whether Linears have biases, patterns of the biases that are absent all the same)."""
    if kind == "qwen2":
        return True, QWEN2_WITHOUT
    attention_bias = read_flag(data, "attention_bias")
    mlp_bias = read_flag(data, "mlp_bias")
    without = []
    if not attention_bias:
        without.append(r"\.attn\..*bias$")
    if not mlp_bias:
        without.append(r"\.mlp\..*bias$")
    return attention_bias or mlp_bias, without


def uses_window(kind, data):
    """Returns whether sliding_window counts: in a Qwen it does only with use_sliding_window."""
    return not kind.startswith("qwen") or read_flag(data, "use_sliding_window")


def read_windows(kind, data, sizes):
    """Returns our window and window_pattern, {} where each layer sees the whole context. Raises ValueError.

    A window as wide as the context hides nothing in it, but lets a text go on past it. In a Llama attention
    ignores sliding_window, but transformers' cache obeys it.
    """
    n_layer, context = sizes["n_layer"], sizes["block_size"]
    types = read_layer_types(kind, data, n_layer)
    may_mix = kind in MIXED
    if data.get("sliding_window") is None or not uses_window(kind, data):
        return {}
    if may_mix and SLIDING not in types:
        return {}
    window = read_number(data, "sliding_window", kind=int)
    can_have = kind != "llama" and (may_mix or FULL not in types)
    if window > context or window == context and not can_have:
        return {}
    if window < 1 or not can_have:
        problem = f"sliding_window is {window} in a context of {context}: not here in a {CLASSES[kind]}"
        advice = f"with max_position_embeddings {window} in config.json there is none"
        raise ValueError(f"{problem}; {advice}" if window > 0 else problem)
    pattern = "".join("S" if name == SLIDING else "L" for name in types)
    lengths = range(1, n_layer + 1)
    period = next(n for n in lengths if (pattern[:n] * n_layer)[:n_layer] == pattern)
    return {"window": window, "window_pattern": pattern[:period]}


def read_layer_types(kind, data, n_layer):
    """Returns FULL or SLIDING for each layer, from the key layer_types. Raises ValueError.

    Without that key all layers of a Mistral and a Mixtral have the window. A Qwen has one only with
    use_sliding_window: in the layers from max_window_layers on, a Qwen3-MoE in all.
    """
    is_used = uses_window(kind, data)
    types = data.get("layer_types")
    if types is None:
        first = 0 if is_used else n_layer
        if is_used and kind in MIXED:
            first = read_number(data, "max_window_layers", kind=int)
        return [FULL if layer < first else SLIDING for layer in range(n_layer)]
    if not isinstance(types, list) or len(types) != n_layer or set(map(str, types)) - {FULL, SLIDING}:
        raise ValueError(
            f"layer_types is {types!r:.60}; here it is {FULL} or {SLIDING} for {n_layer} layers"
        )
    if SLIDING in types and not is_used:
        raise ValueError(f"layer_types is {types!r:.60} without use_sliding_window")
    return types


def write_config(kind, c):
    """Returns config.json as a dict for our config."""
    data = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "torch_dtype": "float32",
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    data |= {hf_key: getattr(c, key) for key, hf_key in SIZES[kind].items()}
    if kind == "gpt2":
        return data | FIXED["gpt2"] | write_gpt2_settings(c)
    return data | write_llama_settings(kind, c) | write_windows(kind, c)


def write_llama_settings(kind, c):
    """Returns the settings of a kind with RoPE and RMSNorm, windows left out.

    RoPE's stand there twice, as version 4 of transformers and mlx-lm read them, and as version 5 does.
    """
    theta = rope_base(c)
    scaling = write_rope_scaling(c.rope_scaling)
    data = {
        "max_position_embeddings": write_context(kind, c),
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }
    if kind == "qwen3_moe":
        data |= {
            "num_local_experts": c.n_expert,
            "intermediate_size": c.n_inner,
            "norm_topk_prob": c.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if kind in ("llama", "qwen3", "qwen3_moe"):
        data["attention_bias"] = c.bias
    if kind == "llama":
        data["mlp_bias"] = c.bias
    return data


def write_windows(kind, c):
    """Returns the settings of windows."""
    types = layer_types(c)
    if kind in ("mistral", "mixtral"):
        return {"sliding_window": c.window_of(0) or None}
    if SLIDING not in types:
        return {}
    data = {"use_sliding_window": True, "sliding_window": c.window}
    if kind == "qwen3":
        # transformers before 4.53 knows no layer_types, only how many full layers come first
        data |= {"max_window_layers": types.index(SLIDING), "layer_types": types}
    return data


def write_gpt2_settings(c):
    return {
        "n_ctx": c.block_size,  # for llama.cpp
        "layer_norm_epsilon": c.norm_eps,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
    }


# ---- RoPE's settings

# kinds of rope_scaling by transformers' names; ntk has none, and is another rope_theta there
ROPE_TYPES = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}


def read_rope(data, default_theta=10000.0):
    """Returns (rope_theta, rope_scaling) from transformers' keys. Raises ValueError.

    Version 4 of transformers has rope_theta and rope_scaling, version 5 rope_parameters; both may be
    there if they agree.
    """
    scalings = []
    thetas = [read_number(data, "rope_theta")] if data.get("rope_theta") is not None else []
    for key in "rope_scaling", "rope_parameters":
        params = data.get(key) or {}
        if not isinstance(params, dict):
            raise ValueError(f"{key} is {params!r:.60}, where an object was expected")
        if params.get("rope_theta") is not None:
            thetas.append(read_number(params, "rope_theta"))
        if params:
            scalings.append(read_scaling(params))
    if len(set(scalings)) > 1:
        shown = f"rope_scaling is {scalings[0]} and rope_parameters {scalings[1]}"
        raise ValueError(f"{shown}, of which only one can be meant")
    if len(set(thetas)) > 1:
        raise ValueError(f"rope_theta is {' beside another one, '.join(map(str, thetas))}")
    return thetas[0] if thetas else default_theta, scalings[0] if scalings else "none"


def read_scaling(params):
    """Returns our rope_scaling, as "linear:4", of transformers' settings. Raises ValueError."""
    rope_type = params.get("rope_type") or params.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type is {rope_type!r:.60}; only {', '.join(ROPE_TYPES)} are read here")
    kind = ROPE_TYPES[rope_type]
    names = ROPE_SCALINGS[kind]
    harmless = {"partial_rotary_factor": 1}
    if kind == "yarn":
        harmless["truncate"] = True
        if params.get("attention_factor") is not None:
            harmless["mscale"] = yarn_mscale(params)
    for key, value in params.items():
        if key in ("rope_type", "type", "rope_theta", *names) or value is None:
            continue
        if key not in harmless or value != harmless[key]:
            setting = f"{key} is {value!r:.60} in the rope settings"
            raise ValueError(f"{setting}, which rope_type {rope_type} does not have here")
    if kind == "yarn":
        present = [i for i, name in enumerate(names) if params.get(name) is not None]
        names = names[: max([YARN_LEAST - 1, *present]) + 1]
        params = YARN_DEFAULTS | {key: value for key, value in params.items() if value is not None}
    numbers = [format_number(read_number(params, key)) for key in names]
    return f"{kind}:{','.join(numbers)}" if numbers else "none"


def read_context(block_size, scaling):
    """Returns the context that max_position_embeddings means: with YaRN it may be that of pre-training
    (write_context), and is FACTOR times as long then.
    """
    kind, numbers = read_rope_scaling(scaling)
    if kind != "yarn" or block_size != numbers["original_max_position_embeddings"]:
        return block_size
    return int(numbers["factor"] * block_size)


def write_rope_scaling(text):
    """Returns transformers' rope_scaling for ours, as "linear:4"; None for what is none there."""
    kind, numbers = read_rope_scaling(text)
    if kind not in ROPE_TYPES.values() or not numbers:
        return None
    scaling = {"rope_type": kind}
    for key, number in numbers.items():
        scaling[key] = int(number) if key.startswith("original") else number
    if "attention_factor" in scaling and (mscale := yarn_mscale(scaling)) is not None:
        scaling["mscale"] = mscale
    return scaling


def write_context(kind, c):
    """Returns max_position_embeddings. With YaRN that is the context of pre-training, but for a Qwen3, with experts
    too: transformers up to 4.50, which has no Qwen3, reads it in place of original_max_position_embeddings.

    From 4.51 to 4.55 transformers takes the quotient of the two for YaRN's factor; later versions read the factor
    itself. Raises ValueError where the context is not FACTOR times that of pre-training: it has to be for those
    versions, and to be read back.
    """
    name, numbers = read_rope_scaling(c.rope_scaling)
    if name != "yarn":
        return c.block_size
    original = numbers["original_max_position_embeddings"]
    stretched = numbers["factor"] * original
    if stretched != c.block_size:
        problem = f"block_size is {c.block_size}, and by rope_scaling={c.rope_scaling} {stretched:g}"
        advice = "with yarn they must be equal (--block_size, --rope_scaling)"
        raise ValueError(f"{problem}: {advice}")
    return c.block_size if kind.startswith("qwen3") else int(original)


def yarn_mscale(params):
    """Returns the mscale by which mlx-lm, which does not read attention_factor, computes the same.

    Beside an attention_factor, transformers does not read it. There is none for a factor of 1.
    """
    growth = 0.1 * math.log(max(1, read_number(params, "factor")))
    attention_factor = read_number(params, "attention_factor")
    return (attention_factor - 1) / growth if growth else None


def format_number(n):
    """Returns the shortest text that is exactly this number."""
    short = f"{n:g}"
    return short if float(short) == n else repr(n)
