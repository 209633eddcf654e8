"""Hugging Face's kinds of models, and their config.json as our ModelConfig and back.

    keys, without = read_config(data)           # ModelConfig's keys, and absent biases
    data = write_config(choose_kind(config), config)

What has no counterpart on the other side is a ValueError that names it: nothing is ever ignored that would
change a logit. Llama, Qwen2, Qwen3, Mistral, GPT-2 and, with experts, Mixtral and Qwen3-MoE come in; Mistral
without a window goes out as Llama, which it is then.
"""

import math
import re

from rope_scaling import ROPE_SCALINGS, YARN_DEFAULTS, YARN_LEAST, read_rope_scaling, rope_base

# The settings that a model of a kind must have, as the kind has no others
LLAMA_NEEDS = {
    "norm": "rmsnorm",
    "norm_position": "pre",
    "pos": "rope",
    "mlp": "swiglu",
    "qk_norm": False,
}
GPT2_NEEDS = {
    "norm": "layernorm",
    "norm_position": "pre",
    "pos": "learned",
    "mlp": "gelu",
    "bias": True,
    "qk_norm": False,
}
NEEDS = {
    "llama": LLAMA_NEEDS,
    "qwen2": LLAMA_NEEDS,
    "qwen3": LLAMA_NEEDS | {"qk_norm": True, "bias": False},
    "mistral": LLAMA_NEEDS | {"bias": False},
    "mixtral": LLAMA_NEEDS | {"mlp": "moe", "norm_topk_prob": True, "bias": False},
    "qwen3_moe": LLAMA_NEEDS | {"mlp": "moe", "qk_norm": True},
    "gpt2": GPT2_NEEDS,
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# kinds of a layer's attention, by transformers' names, and the kinds of models whose layers may differ
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = ("qwen2", "qwen3")
# patterns of the biases of ours that Qwen2 lacks: it has some in q, k and v alone
QWEN2_WITHOUT = [r"\.o_proj\.bias$", r"\.mlp\..*bias$"]


def choose_kind(c):
    """Returns llama, qwen3, mistral, mixtral, qwen3_moe or gpt2. Raises ValueError for settings that have
    no counterpart.
    """
    types = set(layer_types(c))
    kind = "llama"
    if c.pos == "learned":
        kind = "gpt2"
    elif c.mlp == "moe":
        kind = "qwen3_moe" if c.qk_norm else "mixtral"
    elif c.qk_norm:
        kind = "qwen3"
    elif SLIDING in types:
        kind = "mistral"
    needs = NEEDS[kind]
    if kind == "gpt2":
        needs = needs | {"n_kv_head": c.n_head, "n_embd": c.n_head * c.head_dim, "window": 0}
    if kind != "qwen3" and len(types) == 2:
        needs = needs | {"window_pattern": "S"}
    wrong = []
    for key, value in needs.items():
        if getattr(c, key) != value:
            wrong.append(f"{key}={getattr(c, key)} (it has {value})")
    if wrong:
        nearest = f"{CLASSES[kind]} comes nearest, but for {', '.join(wrong)}"
        raise ValueError(f"transformers has no counterpart: {nearest}")
    return kind


def layer_types(c):
    """Returns the kind of attention of each layer, by transformers' names."""
    return [SLIDING if c.window_of(layer) else FULL for layer in range(c.n_layer)]


# ---- config.json

LLAMA_SIZES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
GPT2_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_inner": "n_inner",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
MIXTRAL_SIZES = LLAMA_SIZES | {
    "n_expert": "num_local_experts",
    "n_expert_per_token": "num_experts_per_tok",
}
# version 4 of transformers has n_expert under this name, and version 5 under Mixtral's
QWEN3_MOE_SIZES = MIXTRAL_SIZES | {"n_inner": "moe_intermediate_size", "n_expert": "num_experts"}
SIZES = dict.fromkeys(CLASSES, LLAMA_SIZES) | {
    "mixtral": MIXTRAL_SIZES,
    "qwen3_moe": QWEN3_MOE_SIZES,
    "gpt2": GPT2_SIZES,
}
# other names that a kind's config class takes for its own
ALIASES = dict.fromkeys(CLASSES, {}) | {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
}

# what a missing key amounts to in a kind's config class, where that differs from the other kinds
QWEN_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
DEFAULTS = {
    "llama": {},
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | {"head_dim": 128},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    "gpt2": {},
}
DEFAULT_THETAS = {"mixtral": 1e6}  # of RoPE; 10,000 for all others

# keys that may have one value only; any other would compute something that our model does not
COMMON_FIXED = {
    "is_causal": True,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
}
ROPE_FIXED = {
    **COMMON_FIXED,
    "hidden_act": "silu",
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
    "use_mrope": False,
}
FIXED = {
    "llama": ROPE_FIXED | {"pretraining_tp": 1, "use_sliding_window": False},
    "qwen2": ROPE_FIXED | {"attention_bias": True, "mlp_bias": False},
    "qwen3": ROPE_FIXED | {"mlp_bias": False},
    "mistral": ROPE_FIXED | {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    "mixtral": ROPE_FIXED | {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    # the last two: each layer has experts
    "qwen3_moe": ROPE_FIXED | {"mlp_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gpt2": {
        **COMMON_FIXED,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
}

# keys that are read one by one
ROPE_READ = set(
    """num_key_value_heads head_dim rms_norm_eps tie_word_embeddings rope_theta rope_scaling
    rope_parameters layer_types sliding_window""".split()
)
# about training alone
ROUTER_HARMLESS = {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
READ = {
    "llama": ROPE_READ | {"attention_bias", "mlp_bias"},
    "qwen2": ROPE_READ | {"use_sliding_window"},
    "qwen3": ROPE_READ | {"use_sliding_window", "attention_bias"},
    "mistral": ROPE_READ,
    "mixtral": ROPE_READ | ROUTER_HARMLESS,
    # intermediate_size is that of layers without experts: there are none
    "qwen3_moe": ROPE_READ
    | ROUTER_HARMLESS
    | {"use_sliding_window", "attention_bias", "norm_topk_prob", "intermediate_size"},
    "gpt2": {
        "layer_norm_epsilon",
        "tie_word_embeddings",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
    },
}

# keys that change no logit: they are about training, other heads, generation and the program that wrote the file
HARMLESS = set(
    """model_type architectures _name_or_path _model_name_or_path name_or_path torch_dtype dtype
    transformers_version unk_token_id
    use_cache initializer_range bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id id2label label2id num_labels _num_labels problem_type finetuning_task
    classifier_dropout hidden_dropout chunk_size_feed_forward return_dict use_return_dict output_past
    output_attentions output_hidden_states tie_last_hidden_states torchscript is_decoder is_llama_config
    task_specific_params n_ctx n_special predict_special_tokens tokenizer_class max_sequence_length
    model_max_length max_window_layers summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout summary_last_dropout transformers.js_config
    gradient_checkpointing reorder_and_upcast_attn neftune_noise_alpha unsloth_fixed unsloth_version
    tf_legacy_loss _attn_implementation attn_implementation _attn_implementation_autoset
    _flash_attn_2_enabled use_flash_attn max_length min_length max_new_tokens do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences return_dict_in_generate output_scores remove_invalid_values bad_words_ids
    suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty prefix generation_config""".split()
)

# Words in the names of other keys, and why a key with one is refused: transformers ignores most of them
# in these kinds, but the author of the model may have meant them.
WORDS = """act(?!ual) adapter alibi alpha attention attn bias cap(_|$|ping) causal clamp clip config(_|$)
    conv(?!er) cycle decoder drop emb encoder eps(_|$|ilon) feed_forward ffn gat(e|ing)(_|$) glu
    groups head hidden hybrid kv latent layer limit linear logit loop (^|_)lora mamba mlp mult mup
    norm parallel pos(_|i|$) qk query rank ratio(?!n) recurr rel_ residual rope rot(ary|at) scal
    shar sink skip softmax sparse ssm state tie_ topk yarn"""
REASONS = {
    "auto_map": "its author's own code computes it, which is not run here",
    "quant|compress": "weights of fewer bits are not read here",
    "expert|moe|router": "there are no experts here, but of Mixtral and Qwen3-MoE",
    "window|chunk": "such windows are not here",
    "no_rope|nope": "layers without positions among others are not here",
    "|".join(WORDS.split()): "it may change what is computed; take it out of config.json if it does not",
}
KIND_REASONS = {
    "moe|gpt_oss|deepseek|dbrx|jamba": "it has experts of another kind than Mixtral's and Qwen3-MoE's",
    "smollm3": "one layer in four has no positions",
    "gemma": "its norms multiply by 1 + weight and its embedding is scaled",
    "phi3": "its q, k and v are one tensor",
    "phi": "it rotates only a part of each head, and attention and MLP stand side by side",
    "cohere|olmo2": "its blocks have another order",
    "mamba|rwkv": "it has no attention",
}
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


def unknown_keys(data):
    """Returns the keys of a config.json that neither this file nor the kind's config class knows.

    read_config refuses those with a certain word in their names (REASONS), and passes over the others.
    """
    kind = data["model_type"]
    known = HARMLESS | READ[kind] | FIXED[kind].keys() | set(SIZES[kind].values()) | ALIASES[kind].keys()
    return [key for key, value in data.items() if key not in known and value not in (None, {}, [], "")]


def check_keys(kind, data):
    for key in unknown_keys(data):
        for words, reason in REASONS.items():
            if re.search(words, key.lower()):
                problem = f"{key!r:.60} is {data[key]!r:.60}, which is not known here for {kind}"
                raise ValueError(f"{problem}: {reason}")
    for key, expected in FIXED[kind].items():
        value = data.get(key)
        if value is None:
            continue
        # for Python True == 1, but here they are two values
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            raise ValueError(f"{key} is {value!r:.60}; here it can only be {expected!r}")


def rename_aliases(kind, data):
    """Returns config.json with a kind's own names. Raises ValueError where both have a value."""
    data = dict(data)
    for alias, key in ALIASES[kind].items():
        value = data.pop(alias, None)
        if value is not None and data.setdefault(key, value) != value:
            raise ValueError(f"{alias} is {value!r:.60} beside {key} {data[key]!r:.60}")
    return data


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
    keys["norm_eps"] = float(read_number(data, "rms_norm_eps", 1e-6))
    keys["tie_embeddings"] = read_flag(data, "tie_word_embeddings")
    keys["rope_theta"] = float(theta)
    keys["rope_scaling"] = scaling
    if kind == "qwen3_moe":
        keys["norm_topk_prob"] = read_flag(data, "norm_topk_prob")
    if kind == "qwen2":
        return keys | {"bias": True}, QWEN2_WITHOUT
    attention_bias = read_flag(data, "attention_bias")
    mlp_bias = read_flag(data, "mlp_bias")
    keys["bias"] = attention_bias or mlp_bias
    without = []
    if not attention_bias:
        without.append(r"\.attn\..*bias$")
    if not mlp_bias:
        without.append(r"\.mlp\..*bias$")
    return keys, without


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
    has_none = kind == "llama" or FULL in types and not may_mix
    if window > context or window == context and has_none:
        return {}
    if has_none or window < 1:
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
