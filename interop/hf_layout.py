"""Two layouts of one model: ours, and Hugging Face's Llama, Qwen3 or GPT-2, with LoRA adapters as PEFT has them. Dicts in, dicts out.

    data, tensors = to_hf(model.config, model.state_dict())      # config.json and its tensors
    keys, without = read_config(data)                            # ModelConfig's keys, and the biases that are not there
    state = from_hf(data["model_type"], ModelConfig(**keys), tensors, without)

What has no counterpart on the other side is a ValueError that names it: nothing is ever ignored that would change a logit.
"""
import math
import re

import torch

from lora import LINEARS, LoRAConfig, inject
from model import Transformer, num_weights

# What a kind cannot express otherwise: settings that must be so
LLAMA = {"norm": "rmsnorm", "norm_position": "pre", "pos": "rope", "mlp": "swiglu", "qk_norm": False}
NEEDS = {"llama": LLAMA, "qwen3": LLAMA | {"qk_norm": True, "bias": False},
         "gpt2": {"norm": "layernorm", "norm_position": "pre", "pos": "learned", "mlp": "gelu", "bias": True, "qk_norm": False}}
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}


def kind_of(c):
    """llama, qwen3 or gpt2. Raises ValueError for settings that have no counterpart."""
    kind = "gpt2" if c.pos == "learned" else "qwen3" if c.qk_norm else "llama"
    needs = NEEDS[kind] | ({"n_kv_head": c.n_head, "n_embd": c.n_head * c.head_dim} if kind == "gpt2" else {})
    wrong = [f"{key}={getattr(c, key)} (it has {value})" for key, value in needs.items() if getattr(c, key) != value]
    if wrong:
        raise ValueError(f"transformers has no counterpart: {CLASSES[kind]} comes nearest, but for {', '.join(wrong)}")
    return kind


# ---------------------------------------------------------------------------------------------------------------------
# Tensors

LLAMA_NAMES = {"wte": "embed_tokens", "blocks": "layers", "attn": "self_attn", "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
GPT2_NAMES = {"add_pos": "wpe", "blocks": "h", "norm1": "ln_1", "norm2": "ln_2", "norm": "ln_f", "q_proj": "c_attn", "k_proj": "c_attn",
              "v_proj": "c_attn", "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj"}


def place(kind, key):
    """(their name of our tensor `key`, which third of its last axis it is or None, whether it is transposed there).
    GPT-2 stores its linears transposed, q, k and v as one."""
    if key == "head.weight":
        return "lm_head.weight", None, False
    names, prefix = (GPT2_NAMES, "transformer") if kind == "gpt2" else (LLAMA_NAMES, "model")
    parts = key.split(".")
    theirs = ".".join([prefix, *(names.get(part, part) for part in parts)])
    linear = kind == "gpt2" and parts[-2].endswith("_proj")
    return theirs, "qkv".index(parts[-2][0]) if linear and parts[-2][0] in "qkv" else None, linear and parts[-1] == "weight"


def to_hf(c, state):
    """(config.json as a dict, without token ids; their tensors) of our config and state dict. Raises ValueError."""
    kind = kind_of(c)
    return write_config(kind, c), tensors_to_hf(kind, state)


def tensors_to_hf(kind, state):
    theirs = {}
    for key, x in state.items():
        name, third, transposed = place(kind, key)
        x = x.T if transposed else x
        theirs[name] = x if not third else torch.cat([theirs[name], x], dim=-1)  # q comes first, then k, then v
    return theirs


def held(tensors):
    """How many numbers are in their memory: a tensor that repeats itself (stride 0), or is on the meta device, has more than its file."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.element_size() for x in tensors if x.device.type == "cpu"}.values())


def from_hf(kind, c, theirs, without):
    """Our state dict from their tensors, float32. Missing, extra and misshapen ones are a ValueError; `without`: patterns of our
    tensors that they need not have, which are zero then (biases that only half of their Linears have)."""
    if num_weights(c) > held(theirs.values()):  # before anything of that size is made
        hint = "" if c.tie_embeddings or "lm_head.weight" in theirs else ": there is no lm_head.weight, and no tie_word_embeddings in config.json"
        raise ValueError(f"the tensors have fewer numbers than config.json needs{hint}")
    with torch.device("meta"):
        own = Transformer(c).state_dict()
    expected = {name: tuple(x.shape) for name, x in tensors_to_hf(kind, own).items()}
    theirs = {name if kind != "gpt2" or name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": x
              for name, x in theirs.items() if not re.search(r"\.rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(masked_)?bias$", name)}  # buffers
    embedding = theirs.get(place(kind, "wte.weight")[0])
    if c.tie_embeddings and embedding is not None:
        if not torch.equal(theirs.setdefault("lm_head.weight", embedding), embedding):
            raise ValueError("lm_head.weight is not the embedding, where config.json has tie_word_embeddings")
    for key, x in own.items():
        if any(re.search(pattern, key) for pattern in without):
            theirs.setdefault(place(kind, key)[0], torch.zeros(x.shape, device="cpu"))
    for names, what in (expected.keys() - theirs.keys(), "is missing"), (theirs.keys() - expected.keys(), "has no place in this model"):
        if names:
            raise ValueError(f"tensor {min(names)} {what}" + (f", and {len(names) - 1} more" if len(names) > 1 else ""))
    for name, x in theirs.items():
        if tuple(x.shape) != expected[name]:
            raise ValueError(f"tensor {name} is {tuple(x.shape)} and not {expected[name]}, as config.json has it")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"tensor {name} is {str(x.dtype).removeprefix('torch.')}: only float32, bfloat16, float16 and float64 are read")
    state = {}
    for key in own:
        name, third, transposed = place(kind, key)
        x = theirs[name] if third is None else theirs[name].chunk(3, dim=-1)[third]
        state[key] = (x.T if transposed else x).float().contiguous()
    if c.tie_embeddings:
        state["head.weight"] = state["wte.weight"]
    return state


# ---------------------------------------------------------------------------------------------------------------------
# config.json

SIZES = {"llama": {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size", "n_inner": "intermediate_size",
                   "block_size": "max_position_embeddings", "vocab_size": "vocab_size"},
         "gpt2": {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_inner": "n_inner", "block_size": "n_positions", "vocab_size": "vocab_size"}}
SIZES["qwen3"] = SIZES["llama"]
# keys that may have one value only; any other would compute something that our model does not
COMMON = {"is_causal": True, "add_cross_attention": False, "is_encoder_decoder": False, "tie_encoder_decoder": False, "use_bfloat16": False}
FIXED = {"llama": COMMON | {"hidden_act": "silu", "attention_dropout": 0, "pretraining_tp": 1, "rope_interleaved": False, "partial_rotary_factor": 1},
         "gpt2": COMMON | {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}}
FIXED["qwen3"] = COMMON | {"hidden_act": "silu", "attention_dropout": 0, "partial_rotary_factor": 1}
READ = {"llama": {"num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling",
                  "rope_parameters"},
        "gpt2": {"layer_norm_epsilon", "tie_word_embeddings", "resid_pdrop", "embd_pdrop", "attn_pdrop"}}
READ["qwen3"] = READ["llama"] - {"mlp_bias"} | {"layer_types", "use_sliding_window", "sliding_window"}
# what changes no logit: about training, other heads, generation and the program that wrote the file
HARMLESS = set("""model_type architectures _name_or_path name_or_path torch_dtype dtype transformers_version use_cache initializer_range bos_token_id
    eos_token_id pad_token_id sep_token_id decoder_start_token_id id2label label2id num_labels _num_labels problem_type finetuning_task
    chunk_size_feed_forward return_dict use_return_dict output_past output_attentions output_hidden_states torchscript is_decoder is_llama_config
    task_specific_params n_ctx n_special predict_special_tokens tokenizer_class max_sequence_length max_window_layers summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout transformers.js_config gradient_checkpointing reorder_and_upcast_attn
    unsloth_fixed unsloth_version tf_legacy_loss _attn_implementation_autoset _flash_attn_2_enabled
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences return_dict_in_generate
    output_scores remove_invalid_values""".split())


def number(data, key, default=None, kind=(int, float)):
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r:.60}, where a number was expected" if key in data else f"{key} is missing")
    return value


def flag(data, key, default=False):
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r:.60}, where true or false was expected")
    return value


def read_config(data):
    """ModelConfig's keys from a config.json, and patterns of the biases that it does without."""
    kind = data.get("model_type")
    if kind not in tuple(CLASSES):
        raise ValueError(f"model_type is {kind!r:.60}; only {', '.join(CLASSES)} are read here")
    known = HARMLESS | READ[kind] | FIXED[kind].keys() | set(SIZES[kind].values())
    for key, value in data.items():
        if key not in known and value not in (None, {}, [], ""):
            raise ValueError(f"{key!r:.60} is {value!r:.60}, which is not known here for {kind}")
        if key in FIXED[kind] and value is not None and (value != FIXED[kind][key] or isinstance(value, bool) != isinstance(FIXED[kind][key], bool)):
            raise ValueError(f"{key} is {value!r:.60}; here it can only be {FIXED[kind][key]!r}")
    sizes = {ours: number(data, theirs, kind=int) for ours, theirs in SIZES[kind].items() if data.get(theirs) is not None or theirs != "n_inner"}
    if min(sizes["n_layer"], sizes["n_head"], sizes["n_embd"]) < 1 or sizes["n_layer"] > 10 ** 7:
        raise ValueError(f"its sizes cannot be: {sizes}")
    if kind == "gpt2":
        rates = [number(data, key, 0.1) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")]
        if len(set(rates)) > 1:
            raise ValueError(f"embd_pdrop, attn_pdrop and resid_pdrop are {rates}; here there is one dropout")
        return sizes | NEEDS[kind] | {"norm_eps": float(number(data, "layer_norm_epsilon", 1e-5)), "tie_embeddings": flag(data, "tie_word_embeddings", True),
                                      "dropout": float(rates[0])}, ()
    if kind == "qwen3" or data.get("head_dim") is not None:
        sizes["head_dim"] = number(data, "head_dim", 128, kind=int)  # Qwen3Config's default
        if sizes["head_dim"] < 1:
            raise ValueError(f"head_dim is {sizes['head_dim']}")
    if kind == "qwen3" and data.get("use_sliding_window", data.get("sliding_window") is not None):
        raise ValueError(f"sliding_window is {data.get('sliding_window')!r:.60}: there are no sliding windows here")
    if data.get("layer_types") not in (None, ["full_attention"] * sizes["n_layer"]):
        raise ValueError(f"layer_types is {data['layer_types']!r:.60}; here it is full_attention in each of the {sizes['n_layer']} layers")
    theta, scaling = read_rope(data)
    attention, mlp = flag(data, "attention_bias"), flag(data, "mlp_bias")
    kv_heads = {} if data.get("num_key_value_heads") is None else {"n_kv_head": number(data, "num_key_value_heads", kind=int)}
    return sizes | NEEDS[kind] | kv_heads | {
        "norm_eps": float(number(data, "rms_norm_eps", 1e-6)), "tie_embeddings": flag(data, "tie_word_embeddings"), "bias": attention or mlp,
        "rope_theta": float(theta), "rope_scaling": scaling}, [rf"\.{part}\..*bias$" for part, has in (("attn", attention), ("mlp", mlp)) if not has]


SCALINGS = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def read_rope(data):
    """(rope_theta, rope_scaling) from transformers' keys, those of version 4 (two) or 5 (rope_parameters)."""
    old, new = found = [data.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(params, dict) for params in found):
        raise ValueError(f"rope_scaling is {old!r:.60} and rope_parameters {new!r:.60}, where objects were expected")
    if old and new and old != new:
        raise ValueError(f"rope_scaling is {old!r:.60} and rope_parameters {new!r:.60}, of which only one can be meant")
    params = dict(new or old)
    theta = number(params | data, "rope_theta", 10000.0)
    if params.pop("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta is {theta} beside another one in rope_parameters")
    kind, kind4 = params.pop("rope_type", None), params.pop("type", None)
    kind = kind or kind4 or "default"
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_type is {kind!r:.60}; only {', '.join(SCALINGS)} are read here")
    for key, value in params.items():
        if key not in SCALINGS[kind] and value is not None and not (key == "partial_rotary_factor" and value == 1):
            raise ValueError(f"{key} is {value!r:.60} in the rope settings, which rope_type {kind} does not have here")
    numbers = [number(params, key) for key in SCALINGS[kind]]
    return theta, f"{kind}:{','.join(f'{n:g}' if float(f'{n:g}') == n else repr(n) for n in numbers)}" if numbers else "none"


def write_config(kind, c):
    """Their config.json for ours. RoPE's keys are version 4's, which version 5, vLLM and llama.cpp read too; n_ctx is for llama.cpp."""
    data = {"architectures": [CLASSES[kind]], "model_type": kind, "dtype": "float32", "torch_dtype": "float32", "tie_word_embeddings": c.tie_embeddings,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | {theirs: getattr(c, ours) for ours, theirs in SIZES[kind].items()}
    if kind == "gpt2":
        return data | FIXED[kind] | {"n_ctx": c.block_size, "layer_norm_epsilon": c.norm_eps, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "resid_pdrop": c.dropout}
    name, _, numbers = c.rope_scaling.partition(":")
    scaling = {key: int(float(n)) if key.startswith("original") else float(n) for key, n in zip(SCALINGS.get(name, ()), numbers.split(","))}
    return data | {"num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "rms_norm_eps": c.norm_eps, "hidden_act": "silu",
                   "attention_bias": c.bias, "attention_dropout": 0.0, "rope_theta": c.rope_theta,
                   "rope_scaling": {"rope_type": name, **scaling} if scaling else None} | ({"mlp_bias": c.bias} if kind == "llama" else {})


# ---------------------------------------------------------------------------------------------------------------------
# LoRA: PEFT's A (rank, in) and B (out, rank) are ours, but over their modules

def to_peft(c, lora, adapters):
    """(adapter_config.json, tensors) of our adapters. GPT-2's q, k and v are one module there, so that theirs get one adapter whose
    rank is the sum of their ranks: A stacked, B block by block."""
    kind, modules = kind_of(c), {}
    for key in adapters:
        if key.endswith(".A"):
            name, third, _ = place(kind, key[:-1] + "weight")
            modules.setdefault(name.removesuffix(".weight"), []).append((third, adapters[key], adapters[key[:-1] + "B"]))
    tensors, ranks = {}, {}
    for module, parts in modules.items():
        A, B = torch.cat([A for _, A, _ in parts]), parts[0][2]
        if parts[0][0] is not None:
            B = torch.zeros(3, c.n_embd, len(A))
            for n, (third, _, own) in enumerate(parts):
                B[third, :, n * lora.rank:(n + 1) * lora.rank] = own
            B = B.flatten(0, 1)
        tensors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
        ranks[re.sub(r".*\.\d+\.", "", module)] = len(A)
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.lora_dropout, "bias": "none",
            "target_modules": sorted(ranks), "fan_in_fan_out": kind == "gpt2", "inference_mode": True, "use_rslora": False, "use_dora": False,
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != lora.rank},
            "alpha_pattern": {name: lora.alpha * rank / lora.rank for name, rank in ranks.items() if rank != lora.rank}}, tensors


# what says nothing of what an adapter computes once it is trained
PEFT_HARMLESS = set("""auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules exclude_modules layers_pattern megatron_core
    fan_in_fan_out runtime_config qalora_group_size lora_dropout r lora_alpha rank_pattern alpha_pattern use_rslora ensure_weight_tying""".split())
PEFT_FIXED = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}


def from_peft(c, data, tensors):
    """(LoRAConfig's keys, our adapters) from an adapter_config.json and its tensors, for a base of config c. Ours have one rank and one
    alpha: a smaller rank is filled up with zeros, another scale goes into B."""
    kind, adapters, scales, used = kind_of(c), {}, {}, set()
    for key, value in data.items():
        if key in PEFT_FIXED:
            if not any(value is v or isinstance(v, str) and value == v for v in PEFT_FIXED[key]):
                raise ValueError(f"{key} is {value!r:.60}; only {PEFT_FIXED[key][0]!r} is read here")
        elif key not in PEFT_HARMLESS and value not in (None, False, {}, [], "", 0):
            raise ValueError(f"{key} is {value!r:.60}, which is not known here")
    patterns = {key: data.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    if "peft_type" not in data or not all(isinstance(p, dict) for p in patterns.values()):
        raise ValueError("adapter_config.json is not PEFT's")

    def setting(key, pattern, module):
        found = [p for p in patterns[pattern] if re.match(rf"(.*\.)?({p})$", module)]
        return number(patterns[pattern], found[0]) if found else number(data, key)

    with torch.device("meta"):
        model = Transformer(c)
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if name.rpartition(".")[2] in LINEARS}
    for ours, (n_out, n_in) in shapes.items():
        name, third, _ = place(kind, f"{ours}.weight")
        module = name.removesuffix(".weight")
        names = [f"base_model.model.{module}.lora_{part}.weight" for part in "AB"]
        if not any(n in tensors for n in names):
            continue
        used.update(names)
        rank, alpha = setting("r", "rank_pattern", module), setting("lora_alpha", "alpha_pattern", module)
        if rank < 1 or alpha <= 0:
            raise ValueError(f"r is {rank} and lora_alpha {alpha}; both must be above 0")
        for n, want in zip(names, ((rank, n_in), (n_out if third is None else 3 * n_out, rank))):
            if n not in tensors or tuple(tensors[n].shape) != want or not tensors[n].is_floating_point():
                raise ValueError(f"tensor {n} is missing" if n not in tensors else f"tensor {n} is {tuple(tensors[n].shape)} {tensors[n].dtype} and not {want}")
        A, B = (tensors[n].float() for n in names)
        adapters[f"{ours}.A"], adapters[f"{ours}.B"] = A, B if third is None else B.chunk(3)[third]
        scales[ours] = alpha / (rank ** 0.5 if data.get("use_rslora") else rank)
    if extra := sorted(tensors.keys() - used):
        raise ValueError(f"tensor {extra[0]} belongs to no Linear that takes an adapter here ({','.join(LINEARS)})")
    if not scales:
        raise ValueError("there is no adapter in it")
    target = [name for name in LINEARS if any(ours.endswith(f".{name}") for ours in scales)]
    if lacking := [ours for ours in shapes if ours.rpartition(".")[2] in target and ours not in scales]:
        raise ValueError(f"{lacking[0]} has no adapter where other layers have one; here all layers do")
    rank, scale = max(len(adapters[f"{ours}.A"]) for ours in scales), next(iter(scales.values()))
    for ours, own in scales.items():
        A, B = (adapters[f"{ours}.{part}"] for part in "AB")
        more = rank - len(A)
        adapters[f"{ours}.A"] = torch.cat([A, A.new_zeros(more, A.size(1))])
        adapters[f"{ours}.B"] = torch.cat([B if own == scale else B * (own / scale), B.new_zeros(len(B), more)], dim=1)
    settings = {"rank": rank, "alpha": float(scale * rank), "lora_dropout": float(number(data, "lora_dropout", 0.0)), "target": ",".join(target)}
    inject(model, LoRAConfig(**settings))  # a ValueError where that cannot be: nothing of it is kept
    return settings, adapters
