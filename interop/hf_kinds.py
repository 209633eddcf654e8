"""Hugging Face's kinds of models, and what a model of each must be.

    kind = choose_kind(model.config)     # "llama"
    CLASSES[kind]                        # "LlamaForCausalLM"

Llama, Qwen2, Qwen3, Mistral, GPT-2 and, with experts, Mixtral and Qwen3-MoE come in; Mistral without a window goes out
as Llama, which it is then.
"""

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
# words in the names of other kinds, and what is not here of them
KIND_REASONS = {
    "moe|gpt_oss|deepseek|dbrx|jamba": "it has experts of another kind than Mixtral's and Qwen3-MoE's",
    "smollm3": "one layer in four has no positions",
    "gemma": "its norms multiply by 1 + weight and its embedding is scaled",
    "phi3": "its q, k and v are one tensor",
    "phi": "it rotates only a part of each head, and attention and MLP stand side by side",
    "cohere|olmo2": "its blocks have another order",
    "mamba|rwkv": "it has no attention",
}


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
