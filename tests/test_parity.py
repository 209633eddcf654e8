"""The model against Hugging Face's: the same weights give the same logits, and each of four small mistakes would be seen."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_model import redraw

import model as ours
import train
from config import configure
from hf import to_transformers
from model import ModelConfig, Transformer
from sample import generate

pytest.importorskip("transformers")

V, T = 97, 640  # positions past 512
SCALE = 1.3  # of the weights, for logits of standard deviation 1 or more


def preset(name, **more):
    cfg = configure(train.Config, [f"configs/{name}.toml"])
    keys = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(ModelConfig)}
    return ModelConfig(
        **{
            **keys,
            "vocab_size": V,
            "n_layer": 3,
            "n_head": 4,
            "n_kv_head": 4,
            "n_embd": 64,
            "head_dim": 0,
            "n_inner": 0,
            "block_size": 1024,
            **more,
        }
    )


@torch.no_grad()
def difference(model, peer):
    """The largest difference of logits, in standard deviations of theirs."""
    idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    reference = peer(idx).logits
    assert reference.std() >= 1
    return ((model(idx)[0] - reference).abs().max() / reference.std()).item()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_llama_is_llama_and_with_qk_norm_qwen3(tie, n_kv_head, qk_norm):
    model = redraw(
        Transformer(preset("llama", tie_embeddings=tie, n_kv_head=n_kv_head, qk_norm=qk_norm)), SCALE
    )
    assert difference(model, to_transformers(model)) < 1e-4


@pytest.mark.parametrize("tie", [True, False])
def test_gpt2_is_gpt2(tie):
    model = redraw(Transformer(preset("gpt2", tie_embeddings=tie)), SCALE)
    assert difference(model, to_transformers(model)) < 1e-4


@pytest.mark.parametrize("scaling", ["linear:4", "llama3:8,1,4,256"])
def test_rope_scaling_is_theirs(scaling):
    model = redraw(Transformer(preset("llama", rope_scaling=scaling)), SCALE)
    peer = to_transformers(model)
    assert difference(model, peer) < 1e-4
    assert difference(redraw(Transformer(preset("llama")), SCALE), peer) > 1e-2


def test_biases_and_an_inner_width_of_ones_own():
    for name in "llama", "gpt2":
        model = redraw(Transformer(preset(name, bias=True, n_inner=40)), SCALE)
        assert difference(model, to_transformers(model)) < 1e-4


@pytest.mark.parametrize(
    "name, more",
    [
        ("llama", {"n_kv_head": 2}),
        ("llama", {"qk_norm": True, "tie_embeddings": False}),
        ("llama", {"qk_norm": True, "head_dim": 24, "n_kv_head": 1}),
        ("gpt2", {}),
    ],
)
def test_greedy_text_is_theirs(name, more):
    model = redraw(Transformer(preset(name, **more)), SCALE).eval()
    prompt = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(1))
    reference = to_transformers(model).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=60,
        pad_token_id=0,
    )[:, 5:]
    *_, rows = generate(model, prompt.tolist(), 60, temperature=0)
    ours = torch.tensor([row.ids for row in rows])
    assert ours.unique().numel() > 10 and torch.equal(ours, reference)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("llama", {"norm_position": "post"}),
        ("llama", {"pos": "alibi"}),
        ("llama", {"pos": "none"}),
        ("llama", {"norm": "layernorm"}),
        ("llama", {"mlp": "gelu"}),
        ("gpt2", {"bias": False}),
        ("gpt2", {"n_kv_head": 2}),
        ("gpt2", {"head_dim": 8, "n_embd": 64}),
        ("gpt2", {"head_dim": 7, "n_embd": 30}),
        ("gpt2", {"qk_norm": True}),
        ("gpt2", {"mlp": "swiglu"}),
        ("llama", {"qk_norm": True, "bias": True}),
    ],
)
def test_what_has_no_counterpart_is_named(name, wrong):
    (key, value), *_ = reversed(wrong.items())
    with pytest.raises(ValueError, match=f"{key}={value}"):
        to_transformers(Transformer(preset(name, **wrong)))


def test_rope_tables_are_float32_in_a_bfloat16_peer():
    """Rounded to bfloat16, a frequency would be off by up to 0.2%, and an angle by that times its position."""
    peer = to_transformers(Transformer(preset("llama")).bfloat16())
    assert (
        peer.lm_head.weight.dtype == torch.bfloat16
        and peer.model.rotary_emb.inv_freq.dtype == torch.float32
    )
    torch.testing.assert_close(peer.model.rotary_emb.inv_freq, ours.rope_frequencies(preset("llama")))


def interleaved(x, cos, sin):
    a, b, cos, sin = x[..., ::2], x[..., 1::2], cos.chunk(2, -1)[0], sin.chunk(2, -1)[1]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


@pytest.mark.parametrize("mistake", ["exact gelu", "eps", "bias", "interleaved"])
def test_a_mistake_would_be_seen(mistake, monkeypatch):
    model = redraw(Transformer(preset("llama" if mistake == "interleaved" else "gpt2")), SCALE)
    peer = to_transformers(model)
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
    peer = to_transformers(model)
    for norm in model.modules():
        if isinstance(norm, ours.RMSNorm):
            norm.eps *= 10
    assert difference(model, peer) > 1e-4
