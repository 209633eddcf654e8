"""What one changes in model.py is what all scripts compute, or what they refuse in one line."""

import copy
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from scripts import call
from test_model import V, build, tokens
from test_train import SMALL

import benches.decode as bench_decode
import export_onnx
import hf
import model as lab_model
import onnx_graph
import onnx_integers
import onnx_model
import onnx_modules
import prepare
import quantize
import quantized
import train
from config import Refusal
from device import resolve
from interop import gguf_layout, hf_layout, known_logits, peft_layout
from interop.hf_kinds import choose_kind
from lenses import likelihood
from lora import LoRAConfig, inject
from model import Transformer
from products import Linear
from score import batch_nats

CPU = resolve("cpu", "float32", "false")


def capped(self, x):
    """Gemma 2's: no logit is above 0.5."""
    return 0.5 * (self.head(x) / 0.5).tanh()


@torch.no_grad()
def test_logits_that_are_capped_are_so_wherever_they_are_used(monkeypatch):
    model = build().eval()
    idx = tokens()
    plain = model(idx)[0]
    monkeypatch.setattr(Transformer, "logits", capped)
    logits, loss = model(idx[:, :-1], idx[:, 1:], reduction="none")
    assert plain.abs().max() > 1
    torch.testing.assert_close(logits, 0.5 * (plain[:, :-1] / 0.5).tanh())
    torch.testing.assert_close(model.next_logits(idx), model(idx)[0][:, -1])
    rows = idx.tolist()
    nats = batch_nats(model, rows, [5] * len(rows), CPU)
    torch.testing.assert_close(torch.tensor(nats).float(), loss[:, -5:].sum(1))
    written = bench_decode.generate_uncached(model, rows, 6)
    assert written == bench_decode.generate_cached(model, rows, 6)


@pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_capped_logits_are_exported_and_the_head_keeps_its_bits(tie, monkeypatch, tmp_path):
    monkeypatch.setattr(Transformer, "logits", capped)
    model = build(tie=tie, block_size=64, n_layer=1).eval()
    proto = onnx_graph.export(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    _, share = export_onnx.parity(model, onnx_model.open_session(str(path), model.config))
    assert share < export_onnx.MAX_DIFFERENCE
    onnx_integers.quantize(proto, bits=4)
    path.write_bytes(proto.SerializeToString())
    integers = onnx_model.open_session(str(path), model.config)
    assert torch.isfinite(export_onnx.run_onnx(integers, tokens(), 0)[0]).all()
    *_, head = [node for node in proto.graph.node if node.op_type == "MatMulNBits"]
    [bits] = [attribute.i for attribute in head.attribute if attribute.name == "bits"]
    assert bits == 8


def test_an_activation_that_one_has_changed_is_exported(monkeypatch):
    joined = onnx_modules.Graph(build()).model.blocks[0].mlp
    assert type(joined) is onnx_modules.JoinedSwiGLU
    monkeypatch.setattr("model.SwiGLU.forward", relu_squared)
    own = onnx_modules.Graph(build()).model.blocks[0].mlp
    x = torch.linspace(-2, 2, 64).view(2, 32).sin()
    assert own(x).shape == joined(x).shape and not torch.allclose(own(x), joined(x), rtol=0.01)
    torch.testing.assert_close(own(x), relu_squared(build().blocks[0].mlp, x))


def test_a_chunked_loss_is_of_the_logits_that_the_model_has(monkeypatch):
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 3 * V)
    for edited in capped, lambda self, x: self.head(x) / 8, lambda self, x: F.pad(self.head(x), (1, -1)):
        monkeypatch.setattr(Transformer, "logits", edited)
        model = build().eval()
        plain = model(tokens(), tokens())[1]
        model.chunked_loss = True
        torch.testing.assert_close(model(tokens(), tokens())[1], plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", known_logits.LOGITS)
def test_known_logits_are_those_of_transformers(kind):
    pytest.importorskip("transformers")
    small = known_logits.known_model(kind).float()
    assert choose_kind(small.config) == kind
    peer = hf.to_transformers(small)
    logits = peer(torch.tensor(known_logits.IDS)).logits[0, -1]
    known = torch.tensor(known_logits.LOGITS[kind])
    torch.testing.assert_close(logits[: len(known)], known, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", known_logits.LOGITS)
def test_known_logits_depend_on_no_default_of_model_py(kind, monkeypatch):
    """Each is in config.json, so that another one is no other formula."""
    known = known_logits.known_model(kind).config
    others = {"rope_theta": 500.0, "n_expert_per_token": 1, "window": 3, "window_pattern": "SL"}
    others |= {"rope_scaling": "linear:2", "dropout": 0.1}
    values = [others.get(f.name, not f.default if f.type is bool else f.default) for f in fields(known)]
    monkeypatch.setattr(type(known).__init__, "__defaults__", tuple(values))
    assert known_logits.known_model(kind).config == replace(known, dropout=0.1)
    known_logits.check(kind)


def relu_squared(self, x):
    return self.down_proj(F.relu(self.gate_proj(x)).square() * self.up_proj(x))


def parallel(self, x, context):
    y = self.norm1(x)
    return x + self.attn(y, context) + self.mlp(self.norm2(x))


def without_gain(self, x):
    return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def exact_gelu(self, x):
    return self.down_proj(F.gelu(self.up_proj(x)))


def scaled_sdpa(*args, **settings):
    return F.scaled_dot_product_attention(*args, **settings, scale=0.1)


EDITS = {
    "activation": ("SwiGLU.forward", relu_squared, "llama"),
    "gelu": ("GELU.forward", exact_gelu, "gpt2"),
    "layout": ("PreNorm.forward", parallel, "llama gpt2 mixtral"),
    "norm": ("RMSNorm.forward", without_gain, "llama qwen3_moe"),
    "logits": ("Transformer.logits", capped, "llama gpt2"),
    "rotation": ("rotate", lambda x, cos, sin: x * cos, "qwen3"),
    "attention": (
        "F",
        type("Torch", (), vars(F) | {"scaled_dot_product_attention": scaled_sdpa}),
        "mistral",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_model_is_not_written_for_those_who_compute_the_old_one(edit, monkeypatch):
    name, value, kinds = EDITS[edit]
    configs = [known_logits.known_model(kind).config for kind in kinds.split()]
    monkeypatch.setattr(f"model.{name}", value)
    for c in configs:
        state = lab_model.Transformer(c).state_dict()
        for write, tensors in (
            (hf_layout.to_hf, (state,)),
            (gguf_layout.to_gguf, (state,)),
            (peft_layout.to_peft, (LoRAConfig(), {})),
        ):
            if write is gguf_layout.to_gguf and c.window:
                continue
            with pytest.raises(ValueError, match="model.py was changed"):
                write(c, *tensors)


def up_squashed(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x).tanh())


def norm_of_one_more(self, x):
    """Gemma's."""
    return lab_model.rms_norm(x, 1 + self.weight, self.eps)


FOLDED = {
    "activation": ("SwiGLU.forward", up_squashed, ["mlp.down_proj"]),
    "layout": (
        "PreNorm.forward",
        lambda self, x, context: x + both(self, x, context),
        ["mlp.gate_proj"],
    ),
    "norm": ("RMSNorm.forward", norm_of_one_more, ["attn.q_proj", "mlp.gate_proj"]),
}


def both(self, x, context):
    """GPT-J's, after one norm."""
    y = self.norm1(x)
    return self.attn(y, context) + self.mlp(y)


@torch.no_grad()
@pytest.mark.parametrize("edit", [None, *FOLDED])
def test_awq_folds_no_scale_through_what_one_has_changed(edit, monkeypatch, capsys):
    """In 8 bits a model computes nearly what it did."""
    if edit:
        name, value, _ = FOLDED[edit]
        monkeypatch.setattr(f"model.{name}", value)
    whole = build(qk_norm=False).eval()
    whole.wte.weight *= torch.linspace(0.1, 3, whole.config.n_embd)  # so that scales are no 1
    cfg = quantize.Config(to="nowhere", method="awq")
    rounded = copy.deepcopy(whole)
    quantize.quantize_model(rounded, cfg, tokens(4))
    for table in "wte", "head":
        getattr(rounded, table).weight.copy_(getattr(whole, table).weight)
    expected, logits = whole(tokens(4))[0], rounded(tokens(4))[0]
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert ("no scale for" in capsys.readouterr().out) == (edit is not None)


@torch.no_grad()
def test_awq_computes_a_block_no_more_often_for_more_experts():
    calls = {2: [], 8: []}
    for n_expert in calls:
        model = build(mlp="moe", n_expert=n_expert).eval()
        model.blocks[0].register_forward_hook(lambda *_, n=n_expert: calls[n].append(n))
        quantize.quantize_model(model, quantize.Config(to="nowhere", method="awq"), tokens(4))
    assert len(calls[2]) == len(calls[8])


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["blocks.0.mlp.up_proj", "head", "wte"])
def test_a_matrix_of_ones_own_class_is_neither_made_integers_nor_merged(name):
    model = build()
    module = model.get_submodule(name)
    own = Doubled if name != "wte" else type("Scaled", (torch.nn.Embedding,), {})
    module.__class__ = own
    with pytest.raises(ValueError, match=f"{name} is a {own.__name__}"):
        quantized.install(model, quantized.Quantization(8, 0, "rtn"))
    if name.startswith("blocks"):
        with pytest.raises(ValueError, match="does more than multiply"):
            inject(model, LoRAConfig(rank=2))
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_is_told_from_ones_own_without_its_numbers(bias):
    """Memory is counted on models whose weights are whatever was there."""
    model = build(bias=bias)
    for p in model.parameters():
        p.data.fill_(torch.nan)
    inject(copy.deepcopy(model), LoRAConfig(rank=2, target="all"))
    for p in model.parameters():
        p.data.zero_()
    model.blocks[0].mlp.up_proj.__class__ = Doubled
    with pytest.raises(ValueError, match="does more than multiply"):
        inject(model, LoRAConfig(rank=2, target="all"))
