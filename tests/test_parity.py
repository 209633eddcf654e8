"""The model against Hugging Face's: the same weights give the same logits, small mistakes do not."""

import dataclasses
import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from test_model import redraw

import model as lab_model
import rope_scaling
import train
from config import configure
from generate import generate
from hf import to_transformers
from model import ModelConfig, Transformer

pytest.importorskip("transformers")

V, T = 97, 640  # positions past 512
SCALE = 1.3  # of the weights, for logits of standard deviation 1 or more


def preset(name, **changes):
    """The ModelConfig of a file of configs/, in small."""
    cfg = configure(train.Config, [f"configs/{name}.toml"])
    settings = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(ModelConfig)}
    small = {
        "vocab_size": V,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 4,
        "n_embd": 64,
        "head_dim": 0,
        "n_inner": 0,
        "block_size": 1024,
        "norm_eps": 1e-3,  # a share of what is normed: a norm with another one would be seen
    }
    return ModelConfig(**(settings | small | changes))


def build_preset(name, **changes):
    """A model of a preset with weights that show each mistake."""
    return redraw(Transformer(preset(name, **changes)), SCALE).eval()


@torch.no_grad()
def difference(model, peer):
    """The largest difference of logits, in standard deviations of the peer's."""
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    reference = peer(ids).logits
    assert reference.std() >= 1
    return ((model(ids)[0] - reference).abs().max() / reference.std()).item()


def check_parity(model):
    assert difference(model, to_transformers(model)) < 1e-4


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_llama_is_llama_and_with_qk_norm_qwen3(tie, n_kv_head, qk_norm):
    check_parity(build_preset("llama", tie_embeddings=tie, n_kv_head=n_kv_head, qk_norm=qk_norm))


EXPERTS = {"mlp": "moe", "n_expert": 5, "n_inner": 40}


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_head": 2},
        {"tie_embeddings": False, "n_expert_per_token": 4},
        {"qk_norm": True},
        {"qk_norm": True, "norm_topk_prob": False, "n_expert_per_token": 3, "head_dim": 24},
        {"qk_norm": True, "bias": True},
    ],
)
def test_experts_are_mixtral_and_with_qk_norm_qwen3_moe(changes):
    """The logits, and every weight's gradient."""
    model = build_preset("llama", **(EXPERTS | changes))
    peer = to_transformers(model)
    assert type(peer).__name__.startswith("Qwen3Moe" if model.config.qk_norm else "Mixtral")
    assert difference(model, peer) < 1e-4
    ids = torch.randint(V, (2, 100), generator=torch.Generator().manual_seed(1))
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    peer(ids, labels=ids).loss.backward()
    for ours, theirs in zip(model.blocks, peer.model.layers):
        moe = theirs.mlp
        gate_up = torch.cat((ours.mlp.gate_proj.weight.grad, ours.mlp.up_proj.weight.grad), 1)
        pairs = [
            (gate_up, moe.experts.gate_up_proj.grad),
            (ours.mlp.down_proj.weight.grad, moe.experts.down_proj.grad),
            (ours.mlp.router.weight.grad, moe.gate.weight.grad),
            (ours.attn.q_proj.weight.grad, theirs.self_attn.q_proj.weight.grad),
            (ours.norm2.weight.grad, theirs.post_attention_layernorm.weight.grad),
        ]
        for gradient, expected in pairs:
            assert expected.std() > 0
            assert (gradient - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_in_bfloat16_scores_have_the_dtype_of_transformers(qk_norm):
    if qk_norm and importlib.metadata.version("transformers").startswith("5.0."):
        pytest.skip("transformers 5.0 left Qwen3-MoE's in float32")
    moe = build_preset("llama", **EXPERTS, qk_norm=qk_norm).bfloat16().blocks[0].mlp
    peer = to_transformers(build_preset("llama", **EXPERTS, qk_norm=qk_norm)).bfloat16()
    _, scores = moe.route(torch.ones(1, 3, 64, dtype=torch.bfloat16))
    _, expected, _ = peer.model.layers[0].mlp.gate(torch.ones(1, 3, 64, dtype=torch.bfloat16))
    assert scores.dtype == expected.dtype


@pytest.mark.parametrize("tie", [True, False])
def test_gpt2_is_gpt2(tie):
    check_parity(build_preset("gpt2", tie_embeddings=tie))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_biases_and_a_custom_inner_width(name):
    check_parity(build_preset(name, bias=True, n_inner=40))


@pytest.mark.parametrize(
    "scaling",
    [
        "linear:4",
        "llama3:8,1,4,256",
        "ntk:4",
        "yarn:4,256",
        "yarn:8,128,16,2",
        "yarn:2,512,32,1,1.5",
    ],
)
def test_rope_scaling_is_that_of_transformers(scaling):
    model = build_preset("llama", rope_scaling=scaling)
    peer = to_transformers(model)
    assert difference(model, peer) < 1e-4
    assert difference(build_preset("llama"), peer) > 1e-2


@pytest.mark.parametrize("factor, original", [(8, 128), (256, 4), (1, 1024), (2.5, 4096)])
@pytest.mark.parametrize("more", [{}, {"beta_fast": 16.0, "beta_slow": 3.0, "attention_factor": 1.25}])
@pytest.mark.parametrize("head_dim, theta", [(16, 1e4), (64, 1e6), (2, 50.0)])
def test_yarn_is_that_of_modeling_rope_utils(factor, original, more, head_dim, theta):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"factor": factor, "original_max_position_embeddings": original} | more
    peer = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=int(factor * original),
        rope_parameters={"rope_type": "yarn", "rope_theta": theta} | settings,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](peer)
    text = ",".join(map(str, settings.values()))
    c = preset("llama", head_dim=head_dim, rope_theta=theta, rope_scaling=f"yarn:{text}")
    torch.testing.assert_close(rope_scaling.rope_frequencies(c), frequencies, rtol=1e-6, atol=0)
    assert rope_scaling.rope_scale(c) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("llama", {"n_kv_head": 2}),
        ("llama", {"rope_scaling": "yarn:16,64"}),
        ("llama", {"qk_norm": True, "tie_embeddings": False}),
        ("llama", {"qk_norm": True, "head_dim": 24, "n_kv_head": 1}),
        ("llama", EXPERTS),
        ("llama", EXPERTS | {"qk_norm": True}),
        ("gpt2", {}),
    ],
)
def test_greedy_text_is_that_of_transformers(name, changes):
    model = build_preset(name, **changes)
    prompt = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(1))
    reference = to_transformers(model).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=60,
        pad_token_id=0,
    )
    *_, rows = generate(model, prompt.tolist(), 60, temperature=0)
    ids = torch.tensor([row.ids for row in rows])
    assert ids.unique().numel() > 10
    assert torch.equal(ids, reference[:, 5:])


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"norm_position": "post"}, "norm_position=post"),
        ("llama", {"pos": "alibi"}, "pos=alibi"),
        ("llama", {"pos": "none"}, "pos=none"),
        ("llama", {"norm": "layernorm"}, "norm=layernorm"),
        ("llama", {"mlp": "gelu"}, "mlp=gelu"),
        ("llama", {"qk_norm": True, "bias": True}, "bias=True"),
        ("llama", {"mlp": "moe", "norm_topk_prob": False}, "norm_topk_prob=False"),
        ("llama", {"mlp": "moe", "bias": True}, "Mixtral.* bias=True"),
        ("gpt2", {"bias": False}, "bias=False"),
        ("gpt2", {"n_kv_head": 2}, "n_kv_head=2"),
        ("gpt2", {"head_dim": 8, "n_embd": 64}, "n_embd=64"),
        ("gpt2", {"head_dim": 7, "n_embd": 30}, "n_embd=30"),
        ("gpt2", {"qk_norm": True}, "qk_norm=True"),
        ("gpt2", {"mlp": "swiglu"}, "mlp=swiglu"),
    ],
)
def test_a_setting_without_a_counterpart_is_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(Transformer(preset(name, **changes)))


def test_rope_tables_are_float32_in_a_bfloat16_peer():
    """In bfloat16 a frequency would be off by up to 0.2%, and an angle by that times its position."""
    peer = to_transformers(Transformer(preset("llama")).bfloat16())
    frequencies = peer.model.rotary_emb.inv_freq
    assert peer.lm_head.weight.dtype == torch.bfloat16
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, rope_scaling.rope_frequencies(preset("llama")))


# -----------------------------------------------------------------------------------------------------
# Mistakes that would be seen


def interleaved(x, cos, sin):
    """RoPE of neighbours, as in GPT-J, in the place of model.rotate."""
    a, b = x[..., ::2], x[..., 1::2]
    cos = cos.chunk(2, -1)[0]
    sin = sin.chunk(2, -1)[1]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def use_exact_gelu(model, monkeypatch):
    gelu = F.gelu
    monkeypatch.setattr(lab_model.F, "gelu", lambda x, approximate: gelu(x))


def use_larger_eps(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | lab_model.RMSNorm):
            module.eps *= 10


def swap_biases(model, monkeypatch):
    attn = model.blocks[1].attn
    attn.q_proj.bias, attn.v_proj.bias = attn.v_proj.bias, attn.q_proj.bias


def interleave_rope(model, monkeypatch):
    monkeypatch.setattr(lab_model, "rotate", interleaved)


@pytest.mark.parametrize(
    "name, make_mistake",
    [
        ("gpt2", use_exact_gelu),
        ("gpt2", use_larger_eps),
        ("gpt2", swap_biases),
        ("llama", use_larger_eps),
        ("llama", interleave_rope),
    ],
)
def test_a_mistake_would_be_seen(name, make_mistake, monkeypatch):
    model = build_preset(name)
    peer = to_transformers(model)
    assert difference(model, peer) < 1e-4
    make_mistake(model, monkeypatch)
    assert difference(model, peer) > 1e-4
