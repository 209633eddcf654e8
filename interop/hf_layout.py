"""Two layouts of one model: ours, and Hugging Face's Llama kinds or GPT-2; of adapters, PEFT's.

    data, tensors = to_hf(model.config, model.state_dict())     # config.json and its tensors
    keys, without = read_config(data)                           # ModelConfig's keys, and absent biases
    state = from_hf(data["model_type"], ModelConfig(**keys), tensors, without)

Dicts in, dicts out. What has no counterpart on the other side is a ValueError that names it: nothing is
ever ignored that would change a logit. Llama, Qwen2, Qwen3, Mistral, GPT-2 and, with experts, Mixtral
and Qwen3-MoE come in; Mistral without a window goes out as Llama, which it is then.
"""

import math
import re

import torch
import torch.nn as nn

from lora import LINEARS, LoRAConfig, inject
from rope_scaling import ROPE_SCALINGS, YARN_DEFAULTS, YARN_LEAST, read_rope_scaling, rope_base
from sizes import meta_model, model_sizes
from tensors import check_finite, check_tensor, count_stored_numbers

# What a kind cannot express otherwise: settings that must be so
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
# patterns of our biases that Qwen2 does not have: its q, k and v alone have some
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
    elif "sliding_attention" in types:
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
    return [
        "sliding_attention" if c.window_of(layer) else "full_attention" for layer in range(c.n_layer)
    ]


# ---- tensors

LLAMA_NAMES = {
    "wte": "embed_tokens",
    "blocks": "layers",
    "attn": "self_attn",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
GPT2_NAMES = {
    "add_pos": "wpe",
    "blocks": "h",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "norm": "ln_f",
    "q_proj": "c_attn",
    "k_proj": "c_attn",
    "v_proj": "c_attn",
    "o_proj": "c_proj",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
}
QWEN3_MOE_NAMES = LLAMA_NAMES | {"router": "gate"}
MIXTRAL_NAMES = QWEN3_MOE_NAMES | {
    "mlp": "block_sparse_moe",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}
NAMES = dict.fromkeys(CLASSES, LLAMA_NAMES) | {
    "gpt2": GPT2_NAMES,
    "mixtral": MIXTRAL_NAMES,
    "qwen3_moe": QWEN3_MOE_NAMES,
}
BUFFERS = r"\.rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(masked_)?bias$"


def locate(kind, key):
    """Returns where our tensor `key` is in a model of this kind: (name, third, transposed).

    GPT-2 stores its linears transposed, and q, k and v as one: third is 0, 1 or 2 of the last axis of
    that tensor, None where the tensor is our whole one.
    """
    if key == "head.weight":
        return "lm_head.weight", None, False
    parts = key.split(".")
    names = [NAMES[kind].get(part, part) for part in parts]
    if kind != "gpt2":
        return ".".join(["model", *names]), None, False
    name = ".".join(["transformer", *names])
    module, parameter = parts[-2:]
    if not module.endswith("_proj"):
        return name, None, False
    third = "qkv".index(module[0]) if module[0] in "qkv" else None
    return name, third, parameter == "weight"


def to_hf(c, state):
    """Returns (config.json as a dict, without token ids; the tensors) of our config and state dict.

    Raises ValueError.
    """
    kind = choose_kind(c)
    if kind == "llama" and has_qwen2_biases(c, state):
        kind = "qwen2"
        state = {key: x for key, x in state.items() if not is_absent(key, QWEN2_WITHOUT)}
    return write_config(kind, c), tensors_to_hf(kind, split_experts(state))


def has_qwen2_biases(c, state):
    """Whether there are biases in q, k and v alone, and heads as wide as Qwen2's were before 4.48."""
    if not c.bias or c.n_embd != c.n_head * c.head_dim:
        return False
    biases = [key for key in state if key.endswith("_proj.bias")]
    used = [key for key in biases if state[key].any()]
    return bool(used) and not any(is_absent(key, QWEN2_WITHOUT) for key in used)


def is_absent(key, without):
    return any(re.search(pattern, key) for pattern in without)


def split_experts(state):
    """Returns a state dict with a matrix an expert, "blocks.0.mlp.experts.3.up_proj.weight", as Hugging
    Face's files have them, where ours has one tensor of all, "blocks.0.mlp.up_proj.weight".
    """
    matrices = {}
    for key, x in state.items():
        if x.dim() < 3:
            matrices[key] = x
            continue
        mlp, projection, parameter = key.rsplit(".", 2)
        for expert, matrix in enumerate(x):
            matrices[f"{mlp}.experts.{expert}.{projection}.{parameter}"] = matrix
    return matrices


def join_experts(matrices):
    """Returns our state dict of what split_experts returns."""
    state = {}
    for key, x in matrices.items():
        joined = re.sub(r"\.experts\.\d+\.", ".", key)
        if joined == key:
            state[key] = x
        else:
            state.setdefault(joined, []).append(x)
    return {key: torch.stack(x) if isinstance(x, list) else x for key, x in state.items()}


def tensors_to_hf(kind, state):
    tensors = {}
    for key, x in state.items():
        name, third, transposed = locate(kind, key)
        if transposed:
            x = x.T
        if third:  # q, 0, comes first, then k, then v
            x = torch.cat([tensors[name], x], dim=-1)
        tensors[name] = x
    return tensors


def from_hf(kind, c, tensors, without):
    """Returns our state dict, float32, from the tensors of a Hugging Face model.

    `without` has patterns of our tensors that may be absent, and are zero then: biases that only half of
    the Linears have. Raises ValueError for tensors that are missing, misshapen or have no place.
    """
    if not c.tie_embeddings and "lm_head.weight" not in tensors:
        problem = 'there is no lm_head.weight, and config.json does not have "tie_word_embeddings": true'
        advice = "write that there if the head is the embedding; if not, the model was not saved whole"
        raise ValueError(f"{problem}; {advice}")
    # before anything of that size is made
    if model_sizes(c).matrices > count_stored_numbers(tensors.values()):
        raise ValueError("the tensors have fewer numbers than config.json needs")
    meta_state = split_experts(meta_model(c).state_dict())
    shapes = {name: tuple(x.shape) for name, x in tensors_to_hf(kind, meta_state).items()}
    tensors = {full_name(kind, name): x for name, x in tensors.items() if not re.search(BUFFERS, name)}
    if c.tie_embeddings:
        tie_head(kind, tensors)
    for key, x in meta_state.items():
        if is_absent(key, without):
            tensors.setdefault(locate(kind, key)[0], torch.zeros(x.shape, device="cpu"))
    check_tensors(tensors, shapes)
    state = {}
    for key in meta_state:
        name, third, transposed = locate(kind, key)
        x = tensors[name]
        if third is not None:
            x = x.chunk(3, dim=-1)[third]
        if transposed:
            x = x.T
        state[key] = x.float().contiguous()
    if c.tie_embeddings:
        state["head.weight"] = state["wte.weight"]
    return join_experts(state)


def full_name(kind, name):
    """Returns a tensor's name with the "transformer." that GPT-2's files on the hub leave out."""
    if kind == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name


def tie_head(kind, tensors):
    embedding = tensors.get(locate(kind, "wte.weight")[0])
    if embedding is None:
        return
    head = tensors.setdefault("lm_head.weight", embedding)
    if not torch.equal(head, embedding):
        setting = "where config.json has tie_word_embeddings"
        raise ValueError(f"lm_head.weight is not the embedding, {setting}")


def check_tensors(tensors, shapes):
    missing = shapes.keys() - tensors.keys()
    extra = tensors.keys() - shapes.keys()
    for names, problem in (missing, "is missing"), (extra, "has no place in this model"):
        if names:
            rest = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"tensor {min(names)} {problem}{rest}")
    for name, x in tensors.items():
        shape = tuple(x.shape)
        if shape != shapes[name]:
            raise ValueError(f"tensor {name} is {shape} and not {shapes[name]}, as config.json has it")
        check_tensor(name, x)
    check_finite(tensors)


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
# names that a kind's config class takes for its own
ALIASES = dict.fromkeys(CLASSES, {}) | {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
}

# what a missing key amounts to, as in the kind's config class, where that is not what all of them have
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
    # experts in each layer
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
# about training
ROUTER_HARMLESS = {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
READ = {
    "llama": ROPE_READ | {"attention_bias", "mlp_bias"},
    "qwen2": ROPE_READ | {"use_sliding_window"},
    "qwen3": ROPE_READ | {"use_sliding_window", "attention_bias"},
    "mistral": ROPE_READ,
    "mixtral": ROPE_READ | ROUTER_HARMLESS,
    # intermediate_size is of layers without experts, of which there are none
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

# what changes no logit: about training, other heads, generation and the program that wrote the file
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
    """Returns the keys of a config.json that are known to nobody: neither here nor to its class.

    read_config passes over those that it does not refuse for a word in their names.
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
        # to Python, True == 1
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
            continue  # GPT-2's is 4 n_embd then, as ours
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


def read_windows(kind, data, sizes):
    """Returns our window and window_pattern, nothing where each layer sees the whole context. Raises
    ValueError.

    All layers of a Mistral and a Mixtral have the window. Qwen has one only with use_sliding_window, in
    the layers that layer_types names, without it those from max_window_layers on, Qwen3-MoE in all. In a
    Llama attention ignores sliding_window, but transformers' cache obeys it.
    """
    n_layer, context = sizes["n_layer"], sizes["block_size"]
    full, sliding = "full_attention", "sliding_attention"
    is_qwen = kind.startswith("qwen")
    is_used = not is_qwen or read_flag(data, "use_sliding_window")
    may_mix = kind in ("qwen2", "qwen3")
    types = data.get("layer_types")
    if types is None:
        first = 0 if is_used else n_layer
        if is_used and may_mix:
            first = read_number(data, "max_window_layers", kind=int)
        types = [full if layer < first else sliding for layer in range(n_layer)]
    elif not isinstance(types, list) or len(types) != n_layer or set(map(str, types)) - {full, sliding}:
        raise ValueError(
            f"layer_types is {types!r:.60}; here it is {full} or {sliding} for {n_layer} layers"
        )
    if sliding in types and not is_used:
        raise ValueError(f"layer_types is {types!r:.60} without use_sliding_window")
    if data.get("sliding_window") is None or may_mix and sliding not in types:
        return {}
    window = read_number(data, "sliding_window", kind=int)
    if window >= context:
        return {}
    if kind == "llama" or window < 1 or full in types and not may_mix:
        problem = f"sliding_window is {window} in a context of {context}: not here in a {CLASSES[kind]}"
        advice = f"with max_position_embeddings {window} in config.json there is none"
        raise ValueError(f"{problem}; {advice}" if window > 0 else problem)
    pattern = "".join("S" if name == sliding else "L" for name in types)
    lengths = range(1, n_layer + 1)
    period = next(n for n in lengths if (pattern[:n] * n_layer)[:n_layer] == pattern)
    return {"window": window, "window_pattern": pattern[:period]}


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
    """Returns config.json as a dict for our config.

    RoPE's settings stand there twice, as version 4 of transformers and mlx-lm read them and as version 5
    does; n_ctx is for llama.cpp.
    """
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
    theta = rope_base(c)
    scaling = write_rope_scaling(c.rope_scaling)
    data["max_position_embeddings"] = write_context(kind, c)
    data |= {
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
    types = layer_types(c)
    if kind in ("mistral", "mixtral"):
        data["sliding_window"] = c.window_of(0) or None
    elif "sliding_attention" in types:
        data |= {"use_sliding_window": True, "sliding_window": c.window}
        if kind == "qwen3":
            # transformers before 4.53 knows no layer_types, only how many full layers come first
            full_first = types.index("sliding_attention")
            data |= {"max_window_layers": full_first, "layer_types": types}
    return data


def write_gpt2_settings(c):
    return {
        "n_ctx": c.block_size,
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
    """Returns max_position_embeddings: with YaRN as a Llama or Qwen2 the context of pre-training.

    Of YaRN's settings, transformers up to 4.50 reads that one in place of
    original_max_position_embeddings; from 4.51 to 4.55 it takes the quotient of the two for the factor,
    and knows Qwen3. Later versions read what stands there. Raises ValueError where the context is
    not FACTOR times that of pre-training, as it has to be for the second, and to be read back.
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
    return c.block_size if kind == "qwen3" else int(original)


# ---- LoRA: PEFT's A (rank, in) and B (out, rank) are ours, but over the modules that Hugging Face has


def peft_names(module):
    """Returns the names of A and B of a module."""
    prefix = f"base_model.model.{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def to_peft(c, lora, adapters):
    """Returns (adapter_config.json as a dict, tensors) of our adapters. Raises ValueError.

    GPT-2's q, k and v are one module there, which gets one adapter whose rank is the sum of their ranks:
    A stacked, B block by block.
    """
    kind = choose_kind(c)
    modules = {}  # name -> [(third, A, B)] of our Linears in it
    for key, A in adapters.items():
        linear, _, part = key.rpartition(".")
        if A.dim() > 2:
            raise ValueError(
                f"{linear} has an adapter an expert, and PEFT's layout of those is not written here: "
                "finetune_lora.py --merge makes a whole model, which hf.py writes"
            )
        if part == "A":
            name, third, _ = locate(kind, f"{linear}.weight")
            module = name.removesuffix(".weight")
            modules.setdefault(module, []).append((third, A, adapters[f"{linear}.B"]))
    tensors = {}
    ranks = {}
    for module, parts in modules.items():
        A = torch.cat([A for _, A, _ in parts])
        third, _, B = parts[0]
        if third is not None:
            B = torch.zeros(3, c.n_embd, len(A))
            for n, (third, _, part_B) in enumerate(parts):
                B[third, :, n * lora.rank : (n + 1) * lora.rank] = part_B
            B = B.flatten(0, 1)
        name_A, name_B = peft_names(module)
        tensors[name_A] = A
        tensors[name_B] = B
        ranks[re.sub(r".*\.\d+\.", "", module)] = len(A)
    return write_peft_config(kind, lora, ranks), tensors


def write_peft_config(kind, lora, ranks):
    """Returns adapter_config.json as a dict, for modules of these ranks."""
    rank_pattern = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    alpha_pattern = {module: lora.alpha * rank / lora.rank for module, rank in rank_pattern.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": "none",
        "target_modules": sorted(ranks),
        "fan_in_fan_out": kind == "gpt2",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


# what says nothing of what an adapter computes once it is trained
PEFT_HARMLESS = set(
    """auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
    exclude_modules layers_pattern megatron_core fan_in_fan_out runtime_config qalora_group_size
    lora_dropout r lora_alpha rank_pattern alpha_pattern use_rslora ensure_weight_tying""".split()
)
PEFT_FIXED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}


def check_peft_config(data):
    for key, value in data.items():
        if key in PEFT_FIXED:
            check_peft_value(key, value)
        elif key not in PEFT_HARMLESS and value not in (None, False, {}, [], "", 0):
            raise ValueError(f"{key} is {value!r:.60}, which is not known here")
    patterns = [data.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if "peft_type" not in data or not all(isinstance(pattern, dict) for pattern in patterns):
        raise ValueError("adapter_config.json is not PEFT's")


def check_peft_value(key, value):
    allowed = PEFT_FIXED[key]
    is_text = isinstance(value, str) and value in allowed
    if not is_text and not any(value is constant for constant in allowed):  # 1 is not True
        raise ValueError(f"{key} is {value!r:.60}; only {allowed[0]!r} is read here")


def read_peft_number(data, key, pattern_key, module):
    """Returns a module's number: of the first pattern that fits it, else the common one of `key`."""
    patterns = data.get(pattern_key) or {}
    fitting = [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
    return read_number(patterns, fitting[0]) if fitting else read_number(data, key)


def read_peft_module(data, tensors, module, n_in, n_out):
    """Returns (A, B, what B A is multiplied by) of a module (n_out, n_in). Raises ValueError."""
    rank = read_peft_number(data, "r", "rank_pattern", module)
    alpha = read_peft_number(data, "lora_alpha", "alpha_pattern", module)
    if rank < 1 or alpha <= 0:
        raise ValueError(f"r is {rank} and lora_alpha {alpha}; both must be above 0")
    name_A, name_B = peft_names(module)
    for name, shape in (name_A, (rank, n_in)), (name_B, (n_out, rank)):
        x = tensors.get(name)
        if x is None:
            raise ValueError(f"tensor {name} is missing")
        if tuple(x.shape) != shape or not x.is_floating_point():
            raise ValueError(f"tensor {name} is {tuple(x.shape)} {x.dtype} and not {shape}")
        check_finite({name: x})
    scale = alpha / (rank**0.5 if data.get("use_rslora") else rank)
    return tensors[name_A].float(), tensors[name_B].float(), scale


def from_peft(c, data, tensors):
    """Returns (LoRAConfig's keys, our adapters) of an adapter_config.json and its tensors.

    c is the config of the base. Ours have one rank and one alpha: a smaller rank is filled up with
    zeros, another scale goes into B. Raises ValueError.
    """
    kind = choose_kind(c)
    check_peft_config(data)
    model = meta_model(c)
    modules = model.named_modules()
    linears = {
        name: module
        for name, module in modules
        if name.rpartition(".")[2] in LINEARS and isinstance(module, nn.Linear)
    }
    parts = {}  # our Linear's name -> (A, B, scale)
    names = set()
    for key, linear in linears.items():
        name, third, _ = locate(kind, f"{key}.weight")
        module = name.removesuffix(".weight")
        if tensors.keys().isdisjoint(peft_names(module)):
            continue
        names.update(peft_names(module))
        n_out, n_in = linear.weight.shape
        if third is None:
            parts[key] = read_peft_module(data, tensors, module, n_in, n_out)
        else:
            A, B, scale = read_peft_module(data, tensors, module, n_in, 3 * n_out)
            parts[key] = A, B.chunk(3)[third], scale
    if extra := sorted(tensors.keys() - names):
        place = f"no Linear that takes an adapter here ({','.join(LINEARS)})"
        raise ValueError(f"tensor {extra[0]} belongs to {place}")
    target = choose_target(linears, parts)
    settings, adapters = unify(parts)
    settings["lora_dropout"] = float(read_number(data, "lora_dropout", 0.0))
    settings["target"] = ",".join(target)
    inject(model, LoRAConfig(**settings))  # only for its ValueError, where that cannot be
    return settings, adapters


def choose_target(linears, parts):
    """Returns which of LINEARS have adapters. Raises ValueError where not all layers have the same."""
    if not parts:
        raise ValueError("there is no adapter in it")
    target = [name for name in LINEARS if any(key.endswith(f".{name}") for key in parts)]
    for key in linears:
        if key.rpartition(".")[2] in target and key not in parts:
            problem = "has no adapter where other layers have one; here all layers do"
            raise ValueError(f"{key} {problem}")
    return target


def unify(parts):
    """Returns (a dict of rank and alpha, our adapters), all of one rank and scale.

    parts is {Linear: (A, B, scale)}.
    """
    rank = max(len(A) for A, _, _ in parts.values())
    _, _, common_scale = next(iter(parts.values()))
    adapters = {}
    for key, (A, B, scale) in parts.items():
        if scale != common_scale:
            B = B * (scale / common_scale)
        rest = rank - len(A)
        adapters[f"{key}.A"] = torch.cat([A, A.new_zeros(rest, A.size(1))])
        adapters[f"{key}.B"] = torch.cat([B, B.new_zeros(len(B), rest)], dim=1)
    return {"rank": rank, "alpha": float(common_scale * rank)}, adapters
