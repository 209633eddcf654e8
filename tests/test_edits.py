"""What one changes in model.py is what all scripts compute, or what they refuse in one line."""

import pytest
import torch
import torch.nn.functional as F
from scripts import call
from test_model import build, tokens
from test_train import SMALL

import bench_decode
import export_onnx
import onnx_graph
import onnx_integers
import onnx_model
import prepare
import train
from config import Refusal
from device import resolve
from lenses import likelihood
from model import HAS_CHUNKED_LOSS, Transformer
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


@pytest.mark.parametrize("tie", [True, False])
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


@pytest.mark.skipif(not HAS_CHUNKED_LOSS, reason="this torch has no linear_cross_entropy")
def test_a_chunked_loss_is_not_taken_where_logits_are_more_than_a_product(monkeypatch, tmp_path):
    model = build().eval()
    monkeypatch.setattr(likelihood, "LOGITS", 999)
    likelihood.fit_batch(model)
    assert model.chunked_loss
    for edited in capped, lambda self, x: self.head(x) / 8, lambda self, x: F.pad(self.head(x), (1, -1)):
        monkeypatch.setattr(Transformer, "logits", edited)
        likelihood.fit_batch(model)
        assert not model.chunked_loss
    call(prepare, "--num_stories=400", "--num_proc=1", folder=tmp_path)
    with pytest.raises(Refusal, match="logits.. does more: --loss=plain"):
        call(train, *SMALL, "--loss=chunked", folder=tmp_path)
