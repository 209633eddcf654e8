"""Our models as Hugging Face's classes, with the same weights.

    from hf import to_transformers
    peer = to_transformers(model)     # LlamaForCausalLM, with a qk_norm Qwen3ForCausalLM, or GPT2LMHeadModel

Dropout, which is for training, is left behind, and so are special tokens: they are the tokenizer's business.
"""
import torch

# What a class cannot express otherwise: settings that must be so
LLAMA = {"norm": "rmsnorm", "norm_position": "pre", "pos": "rope", "mlp": "swiglu"}
GPT2 = {"norm": "layernorm", "norm_position": "pre", "pos": "learned", "mlp": "gelu", "bias": True, "qk_norm": False}


def to_transformers(model):
    """The transformers model that computes what `model` does, in eval mode, on its device and in its dtype.

    Raises ValueError for settings that have no counterpart, ImportError without transformers.
    """
    c = model.config
    if c.pos == "learned":
        kind, needs = "GPT-2", GPT2 | {"n_kv_head": c.n_head}
    elif c.qk_norm:
        kind, needs = "Qwen3", LLAMA | {"bias": False}
    else:
        kind, needs = "Llama", LLAMA
    wrong = [f"{key}={getattr(c, key)} (it has {value})" for key, value in needs.items() if getattr(c, key) != value]
    if wrong:
        raise ValueError(f"transformers has no counterpart: {kind} comes nearest, but for {', '.join(wrong)}")
    config, state = gpt2(model) if kind == "GPT-2" else llama(model)
    from transformers import AutoModelForCausalLM
    weight = model.wte.weight
    peer = AutoModelForCausalLM.from_config(config, dtype=weight.dtype)  # .to(dtype) would round RoPE's frequencies too
    peer.load_state_dict(state)
    return peer.to(weight.device).eval()


def llama(model):
    """(config, state dict) of Llama or Qwen3: the same parts under other names."""
    import transformers
    c = model.config
    bias = {"attention_bias": c.bias} | ({} if c.qk_norm else {"mlp_bias": c.bias})
    config = (transformers.Qwen3Config if c.qk_norm else transformers.LlamaConfig)(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.n_embd // c.n_head, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, rope_parameters=rope_parameters(c), bos_token_id=None, eos_token_id=None, pad_token_id=None, **bias)
    names = {"wte": "embed_tokens", "blocks": "layers", "attn": "self_attn", "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    state = {"model." + ".".join(names.get(part, part) for part in key.split(".")): p for key, p in model.state_dict().items()}
    state["lm_head.weight"] = state.pop("model.head.weight")
    return config, state


def rope_parameters(c):
    """Theirs from our rope_theta and rope_scaling, whose form model.rope_frequencies has checked."""
    kind, _, numbers = c.rope_scaling.partition(":")
    names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    scaling = dict(zip(names, (float(n) for n in numbers.split(",") if n)))
    if kind == "llama3":  # the one that is a number of tokens
        scaling[names[3]] = int(scaling[names[3]])
    return {"rope_theta": c.rope_theta, "rope_type": kind if scaling else "default", **scaling}


def gpt2(model):
    """(config, state dict) of GPT-2: its linears are stored transposed, q, k and v as one."""
    import transformers
    c, s = model.config, model.state_dict()
    config = transformers.GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                     n_inner=c.n_inner, layer_norm_epsilon=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
                                     bos_token_id=None, eos_token_id=None, pad_token_id=None)
    state = {"transformer.wte.weight": s["wte.weight"], "transformer.wpe.weight": s["add_pos.weight"], "lm_head.weight": s["head.weight"],
             "transformer.ln_f.weight": s["norm.weight"], "transformer.ln_f.bias": s["norm.bias"]}
    for i in range(c.n_layer):
        for part in "weight", "bias":
            def get(name):
                x = s[f"blocks.{i}.{name}.{part}"]
                return x.T if x.dim() == 2 else x
            state.update({f"transformer.h.{i}.{theirs}.{part}": x for theirs, x in {
                "ln_1": get("norm1"), "ln_2": get("norm2"), "attn.c_proj": get("attn.o_proj"),
                "attn.c_attn": torch.cat([get(f"attn.{n}_proj") for n in "qkv"], dim=-1),
                "mlp.c_fc": get("mlp.up_proj"), "mlp.c_proj": get("mlp.down_proj")}.items()})
    return config, state
