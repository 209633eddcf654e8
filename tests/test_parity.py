"""The model against Hugging Face's: the same weights give the same logits, and each of four small mistakes would be seen."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import model as ours
import train
from config import configure
from model import ModelConfig, Transformer
from test_model import redraw

transformers = pytest.importorskip("transformers")

V, T = 97, 640  # positions past 512
SCALE = 1.3     # of the weights, for logits of standard deviation 1 or more


def preset(name, **more):
    cfg = configure(train.Config, [f"configs/{name}.toml"])
    keys = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{**keys, "vocab_size": V, "n_layer": 3, "n_head": 4, "n_kv_head": 4, "n_embd": 64, "n_inner": 0, "block_size": 1024, **more})


def llama_peer(model, rope_parameters=None):
    """LlamaForCausalLM, or Qwen3ForCausalLM where there is a qk_norm, with the same weights."""
    c = model.config
    kind = "Qwen3" if c.qk_norm else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.n_embd // c.n_head, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default", **(rope_parameters or {})})
    peer = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    names = {"wte": "embed_tokens", "blocks": "layers", "attn": "self_attn", "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    state = {"model." + ".".join(names.get(part, part) for part in key.split(".")): p for key, p in model.state_dict().items()}
    state["lm_head.weight"] = state.pop("model.head.weight")
    peer.load_state_dict(state)
    return peer


def gpt2_peer(model):
    """GPT2LMHeadModel with the same weights: its linears are stored transposed, q, k and v as one."""
    c, s = model.config, model.state_dict()
    config = transformers.GPT2Config(vocab_size=V, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                     layer_norm_epsilon=c.norm_eps, tie_word_embeddings=c.tie_embeddings)
    peer = transformers.GPT2LMHeadModel(config).eval()
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
    peer.load_state_dict(state)
    return peer


@torch.no_grad()
def difference(model, peer):
    """The largest difference of logits, in standard deviations of theirs."""
    idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    theirs = peer(idx).logits
    assert theirs.std() >= 1
    return ((model(idx)[0] - theirs).abs().max() / theirs.std()).item()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_llama_is_llama_and_with_qk_norm_qwen3(tie, n_kv_head, qk_norm):
    model = redraw(Transformer(preset("llama", tie_embeddings=tie, n_kv_head=n_kv_head, qk_norm=qk_norm)), SCALE)
    assert difference(model, llama_peer(model)) < 1e-4


@pytest.mark.parametrize("tie", [True, False])
def test_gpt2_is_gpt2(tie):
    model = redraw(Transformer(preset("gpt2", tie_embeddings=tie)), SCALE)
    assert difference(model, gpt2_peer(model)) < 1e-4


@pytest.mark.parametrize("ours, theirs", [
    ("linear:4", {"rope_type": "linear", "factor": 4.0}),
    ("llama3:8,1,4,256", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 256})])
def test_rope_scaling_is_theirs(ours, theirs):
    model = redraw(Transformer(preset("llama", rope_scaling=ours)), SCALE)
    assert difference(model, llama_peer(model, theirs)) < 1e-4
    assert difference(redraw(Transformer(preset("llama")), SCALE), llama_peer(model, theirs)) > 1e-2


def interleaved(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


@pytest.mark.parametrize("mistake", ["exact gelu", "eps", "bias", "interleaved"])
def test_a_mistake_would_be_seen(mistake, monkeypatch):
    model = redraw(Transformer(preset("llama" if mistake == "interleaved" else "gpt2")), SCALE)
    peer = (llama_peer if mistake == "interleaved" else gpt2_peer)(model)
    assert difference(model, peer) < 1e-4
    if mistake == "exact gelu":
        exact = F.gelu
        monkeypatch.setattr(ours.F, "gelu", lambda x, approximate: exact(x))
    if mistake == "eps":
        for norm in model.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                norm.eps *= 10
    if mistake == "bias":
        attn = model.blocks[1].attn
        attn.q_proj.bias, attn.v_proj.bias = attn.v_proj.bias, attn.q_proj.bias
    if mistake == "interleaved":
        monkeypatch.setattr(ours, "rotate", interleaved)
    assert difference(model, peer) > 1e-4


def test_rms_norm_eps_would_be_seen():
    model = redraw(Transformer(preset("llama")), SCALE)
    peer = llama_peer(model)
    for norm in model.modules():
        if isinstance(norm, ours.RMSNorm):
            norm.eps *= 10
    assert difference(model, peer) > 1e-4
