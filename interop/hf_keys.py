"""Which keys the config.json of each of Hugging Face's kinds may have, and what they amount to.

    check_keys("llama", data)            # ValueError for a key that may change a logit and has no counterpart here
    data = rename_aliases("gpt2", data)  # under the kind's own names
    unknown_keys(data)                   # those that are passed over

The tables are by kind: SIZES, ALIASES, DEFAULTS, FIXED and READ.
"""

import re

from interop.hf_kinds import CLASSES

# our names of sizes, and theirs
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


def unknown_keys(data):
    """Returns the keys of a config.json that neither this file nor the kind's config class knows.

    check_keys refuses those with a certain word in their names (REASONS); the others are passed over.
    """
    kind = data["model_type"]
    known = HARMLESS | READ[kind] | FIXED[kind].keys() | set(SIZES[kind].values()) | ALIASES[kind].keys()
    return [key for key, value in data.items() if key not in known and value not in (None, {}, [], "")]


def check_keys(kind, data):
    """Raises ValueError where a config.json has a key, or a value, that may change a logit and has no counterpart."""
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
