"""Two layouts of one model: ours, and Hugging Face's Llama, Qwen3 or GPT-2; of adapters, PEFT's.

    data, tensors = to_hf(model.config, model.state_dict())     # config.json and its tensors
    keys, without = read_config(data)                           # ModelConfig's keys, and absent biases
    state = from_hf(data["model_type"], ModelConfig(**keys), tensors, without)

Dicts in, dicts out. What has no counterpart on the other side is a ValueError that names it: nothing is
ever ignored that would change a logit.
"""

import math
import re

import torch

from lora import LINEARS, LoRAConfig, inject
from model import Transformer, model_sizes

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
    "qwen3": LLAMA_NEEDS | {"qk_norm": True, "bias": False},
    "gpt2": GPT2_NEEDS,
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}


def choose_kind(c):
    """Returns llama, qwen3 or gpt2. Raises ValueError for settings that have no counterpart."""
    if c.pos == "learned":
        kind = "gpt2"
        needs = GPT2_NEEDS | {"n_kv_head": c.n_head, "n_embd": c.n_head * c.head_dim}
    else:
        kind = "qwen3" if c.qk_norm else "llama"
        needs = NEEDS[kind]
    wrong = []
    for key, value in needs.items():
        if getattr(c, key) != value:
            wrong.append(f"{key}={getattr(c, key)} (it has {value})")
    if wrong:
        nearest = f"{CLASSES[kind]} comes nearest, but for {', '.join(wrong)}"
        raise ValueError(f"transformers has no counterpart: {nearest}")
    return kind


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
BUFFERS = r"\.rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(masked_)?bias$"
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def locate(kind, key):
    """Returns where our tensor `key` is in a model of this kind: (name, third, transposed).

    GPT-2 stores its linears transposed, and q, k and v as one: third is 0, 1 or 2 of the last axis of
    that tensor, None where the tensor is our whole one.
    """
    if key == "head.weight":
        return "lm_head.weight", None, False
    parts = key.split(".")
    if kind != "gpt2":
        return ".".join(["model", *(LLAMA_NAMES.get(part, part) for part in parts)]), None, False
    name = ".".join(["transformer", *(GPT2_NAMES.get(part, part) for part in parts)])
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
    return write_config(kind, c), tensors_to_hf(kind, state)


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


def count_stored_numbers(tensors):
    """Returns how many numbers the memory of tensors holds, which is no more than their file has.

    A tensor that repeats itself (stride 0) or is on the meta device has more elements than that.
    """
    counts = {}
    for x in tensors:
        if x.device.type == "cpu":
            storage = x.untyped_storage()
            counts[storage.data_ptr()] = storage.nbytes() // x.element_size()
    return sum(counts.values())


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
    with torch.device("meta"):
        meta_state = Transformer(c).state_dict()
    shapes = {name: tuple(x.shape) for name, x in tensors_to_hf(kind, meta_state).items()}
    tensors = {full_name(kind, name): x for name, x in tensors.items() if not re.search(BUFFERS, name)}
    if c.tie_embeddings:
        tie_head(kind, tensors)
    for key, x in meta_state.items():
        if any(re.search(pattern, key) for pattern in without):
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
    return state


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
        if x.dtype not in FLOATS:
            dtype = str(x.dtype).removeprefix("torch.")
            readable = "only float32, bfloat16, float16 and float64 are read"
            raise ValueError(f"tensor {name} is {dtype}: {readable}")


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
SIZES = {"llama": LLAMA_SIZES, "qwen3": LLAMA_SIZES, "gpt2": GPT2_SIZES}

# keys that may have one value only; any other would compute something that our model does not
COMMON_FIXED = {
    "is_causal": True,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
}
QWEN3_FIXED = {
    **COMMON_FIXED,
    "hidden_act": "silu",
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
}
LLAMA_FIXED = {
    **QWEN3_FIXED,
    "pretraining_tp": 1,
    "rope_interleaved": False,
}
GPT2_FIXED = {
    **COMMON_FIXED,
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
FIXED = {"llama": LLAMA_FIXED, "qwen3": QWEN3_FIXED, "gpt2": GPT2_FIXED}

# keys that are read one by one
LLAMA_READ = set(
    """num_key_value_heads head_dim rms_norm_eps tie_word_embeddings attention_bias mlp_bias rope_theta
    rope_scaling rope_parameters""".split()
)
QWEN3_READ = LLAMA_READ - {"mlp_bias"} | {"layer_types", "use_sliding_window", "sliding_window"}
GPT2_READ = {"layer_norm_epsilon", "tie_word_embeddings", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
READ = {"llama": LLAMA_READ, "qwen3": QWEN3_READ, "gpt2": GPT2_READ}

# what changes no logit: about training, other heads, generation and the program that wrote the file
HARMLESS = set(
    """model_type architectures _name_or_path name_or_path torch_dtype dtype transformers_version
    use_cache initializer_range bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id id2label label2id num_labels _num_labels problem_type finetuning_task
    chunk_size_feed_forward return_dict use_return_dict output_past output_attentions
    output_hidden_states torchscript is_decoder is_llama_config task_specific_params n_ctx n_special
    predict_special_tokens tokenizer_class max_sequence_length max_window_layers summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    transformers.js_config gradient_checkpointing reorder_and_upcast_attn unsloth_fixed
    unsloth_version tf_legacy_loss _attn_implementation_autoset _flash_attn_2_enabled max_length
    min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences return_dict_in_generate output_scores
    remove_invalid_values""".split()
)
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
        raise ValueError(f"model_type is {kind!r:.60}; only {', '.join(CLASSES)} are read here")
    check_keys(kind, data)
    sizes = read_sizes(kind, data)
    if kind == "gpt2":
        return sizes | GPT2_NEEDS | read_gpt2_settings(data), []
    return read_llama_config(kind, data, sizes)


def check_keys(kind, data):
    fixed = FIXED[kind]
    known = HARMLESS | READ[kind] | fixed.keys() | set(SIZES[kind].values())
    for key, value in data.items():
        if key not in known and value not in (None, {}, [], ""):
            raise ValueError(f"{key!r:.60} is {value!r:.60}, which is not known here for {kind}")
        if key not in fixed or value is None:
            continue
        # to Python, True == 1
        if value != fixed[key] or isinstance(value, bool) != isinstance(fixed[key], bool):
            raise ValueError(f"{key} is {value!r:.60}; here it can only be {fixed[key]!r}")


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
    keys = sizes | NEEDS[kind]
    if kind == "qwen3" or data.get("head_dim") is not None:
        keys["head_dim"] = read_number(data, "head_dim", 128, kind=int)  # Qwen3Config's default
        if keys["head_dim"] < 1:
            raise ValueError(f"head_dim is {keys['head_dim']}")
    check_attention(kind, data, keys["n_layer"])
    theta, scaling = read_rope(data)
    attention_bias = read_flag(data, "attention_bias")
    mlp_bias = read_flag(data, "mlp_bias")
    if data.get("num_key_value_heads") is not None:
        keys["n_kv_head"] = read_number(data, "num_key_value_heads", kind=int)
    keys["norm_eps"] = float(read_number(data, "rms_norm_eps", 1e-6))
    keys["tie_embeddings"] = read_flag(data, "tie_word_embeddings")
    keys["bias"] = attention_bias or mlp_bias
    keys["rope_theta"] = float(theta)
    keys["rope_scaling"] = scaling
    without = []
    if not attention_bias:
        without.append(r"\.attn\..*bias$")
    if not mlp_bias:
        without.append(r"\.mlp\..*bias$")
    return keys, without


def check_attention(kind, data, n_layer):
    window = data.get("sliding_window")
    if kind == "qwen3" and data.get("use_sliding_window", window is not None):
        raise ValueError(f"sliding_window is {window!r:.60}: there are no sliding windows here")
    layer_types = data.get("layer_types")
    if layer_types not in (None, ["full_attention"] * n_layer):
        expected = f"here it is full_attention in each of the {n_layer} layers"
        raise ValueError(f"layer_types is {layer_types!r:.60}; {expected}")


SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(data):
    """Returns (rope_theta, rope_scaling) from transformers' keys. Raises ValueError.

    Version 4 of transformers has rope_theta and rope_scaling, version 5 rope_parameters.
    """
    params = read_rope_params(data)
    theta = read_number(params | data, "rope_theta", 10000.0)
    if params.pop("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta is {theta} beside another one in rope_parameters")
    rope_type = params.pop("rope_type", None)
    old_type = params.pop("type", None)
    kind = rope_type or old_type or "default"
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_type is {kind!r:.60}; only {', '.join(SCALINGS)} are read here")
    for key, value in params.items():
        if key in SCALINGS[kind] or value is None or key == "partial_rotary_factor" and value == 1:
            continue
        setting = f"{key} is {value!r:.60} in the rope settings"
        raise ValueError(f"{setting}, which rope_type {kind} does not have here")
    numbers = [read_number(params, key) for key in SCALINGS[kind]]
    if not numbers:
        return theta, "none"
    return theta, f"{kind}:{','.join(format_number(n) for n in numbers)}"


def read_rope_params(data):
    old = data.get("rope_scaling") or {}
    new = data.get("rope_parameters") or {}
    shown = f"rope_scaling is {old!r:.60} and rope_parameters {new!r:.60}"
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise ValueError(f"{shown}, where objects were expected")
    if old and new and old != new:
        raise ValueError(f"{shown}, of which only one can be meant")
    return dict(new or old)


def format_number(n):
    """Returns the shortest text that is exactly this number."""
    short = f"{n:g}"
    return short if float(short) == n else repr(n)


def write_config(kind, c):
    """Returns config.json as a dict for our config.

    RoPE's keys are version 4's, which version 5, vLLM and llama.cpp read too; n_ctx is for llama.cpp.
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
        return data | GPT2_FIXED | write_gpt2_settings(c)
    data |= {
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "attention_bias": c.bias,
        "attention_dropout": 0.0,
        "rope_theta": c.rope_theta,
        "rope_scaling": write_rope_scaling(c.rope_scaling),
    }
    if kind == "llama":
        data["mlp_bias"] = c.bias
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
    """Returns transformers' rope_scaling for ours, as "linear:4"; None for "none"."""
    rope_type, _, numbers = text.partition(":")
    if rope_type not in SCALINGS or not SCALINGS[rope_type]:
        return None
    scaling = {"rope_type": rope_type}
    for key, number in zip(SCALINGS[rope_type], numbers.split(",")):
        number = float(number)
        scaling[key] = int(number) if key.startswith("original") else number
    return scaling


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
    scale = alpha / (rank**0.5 if data.get("use_rslora") else rank)
    return tensors[name_A].float(), tensors[name_B].float(), scale


def from_peft(c, data, tensors):
    """Returns (LoRAConfig's keys, our adapters) of an adapter_config.json and its tensors.

    c is the config of the base. Ours have one rank and one alpha: a smaller rank is filled up with
    zeros, another scale goes into B. Raises ValueError.
    """
    kind = choose_kind(c)
    check_peft_config(data)
    with torch.device("meta"):
        model = Transformer(c)
    modules = model.named_modules()
    linears = {name: module for name, module in modules if name.rpartition(".")[2] in LINEARS}
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
