"""The ONNX graph with onnxruntime's own attention, which integers are written in, against the model."""

import contextlib
import copy
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from scripts import call
from test_export_onnx import (
    check_numbers,
    check_some_logits,
    draw_ids,
    export,
    int8_error,
    rounded_model,
    without_places,
)
from test_model import build
from test_sample import complete

import checkpoint_file
import dataset
import export_onnx
import onnx_cache
import onnx_graph
import onnx_integers
import onnx_model
import onnx_modules
import prepare
import quantized
import sample
from config import Refusal, configure
from generate import generate
from model import RoPE

WIDE = {"n_embd": 64, "block_size": 64}  # heads of 16 numbers, which the node turns


def open_graph(proto, model, folder):
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return onnx_model.open_session(str(path), model.config)


def has_own_attention(proto):
    return any(node.op_type == "GroupQueryAttention" for node in proto.graph.node)


@pytest.fixture(scope="module")
def model():
    return build(n_kv_head=2, **WIDE)


@pytest.fixture(scope="module")
def fused(model, tmp_path_factory):
    """The OnnxModel of the model."""
    return open_graph(onnx_graph.export(model, fused=True), model, tmp_path_factory.mktemp("fused"))


@pytest.fixture
def unwritten(monkeypatch):
    """Memory that nothing was written to holds nan, so that whoever reads it is seen."""
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))


def test_any_batch_length_and_past(model, fused, unwritten):
    check_numbers(model, fused)


def test_rows_of_other_lengths_end_and_leave(model, fused, unwritten):
    """As generate() drops rows that have ended, and reads prompts of one length together."""
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9], [1]]
    reference = complete(generate(model, prompts, 30, temperature=0, stop=range(0, 61, 7)))
    assert len({len(ids) for ids in reference[0]}) > 1
    assert complete(generate(fused, prompts, 30, temperature=0, stop=range(0, 61, 7))) == reference


@torch.no_grad()
def test_a_past_keeps_the_rows_that_it_is_told_to(model, fused, unwritten):
    ids = draw_ids(model.config, 4, 11)
    past = fused.new_past(4, 11)
    fused.run(ids[:, :7], past)
    rows = [3, 1, 3]
    past.keep(rows)
    expected = model(ids[rows])[0]
    for start, end in (7, 9), (9, 10), (10, 11):
        logits = torch.from_numpy(fused.run(ids[rows, start:end], past))
        torch.testing.assert_close(logits, expected[:, start:end], rtol=0, atol=1e-4)


@pytest.mark.parametrize("B", [1, 3])
def test_a_past_in_its_place_is_the_one_of_fresh_arrays(model, fused, B):
    """As other users of the file call it, the page too: outputs are inputs of the next call, in new memory."""
    c = model.config
    ids = draw_ids(c, B, 20)
    past = fused.new_past(B, 20)
    empty = np.zeros((B, c.n_kv_head, 0, c.head_dim), np.float32)
    fresh = dict.fromkeys(onnx_cache.cache_names(c, "past"), empty)
    total = 0
    for part in ids.split((9, 1, 1, 1, 8) if B == 1 else (9, *[1] * 11), dim=1):
        total += part.size(1)
        counts = {"places": np.arange(part.size(1)), "total": np.array(total, np.int32)}
        logits, *present = fused.session.run(None, {"ids": part.numpy(), **counts, **fresh})
        fresh = dict(zip(fresh, present))
        np.testing.assert_array_equal(fused.run(part, past), logits)
        for array, reference in zip(past.arrays, present):
            np.testing.assert_array_equal(array[:, :, :total], reference)


def test_logits_of_some_tokens_alone(model, fused, unwritten):
    check_some_logits(model, fused)


def test_a_graph_of_an_older_format_is_read(model, fused, unwritten, tmp_path):
    proto = onnx.load(fused.path)
    without_places(proto)
    older = open_graph(proto, model, tmp_path)
    check_numbers(model, older)
    check_some_logits(model, older)
    prompts = [[1, 2, 3], [4], [5, 6]]
    reference = complete(generate(fused, prompts, 20, temperature=0))
    assert complete(generate(older, prompts, 20, temperature=0)) == reference


def test_more_tokens_than_fit_are_refused(model, fused):
    past = fused.new_past(1, 8)
    fused.run(draw_ids(model.config, 1, 8), past)
    with pytest.raises(ValueError, match="9 tokens do not fit in 8"):
        fused.run(draw_ids(model.config, 1, 1), past)


def test_a_graph_of_another_shape_is_refused(fused, model, tmp_path):
    other = build(**WIDE)  # 4 heads of keys
    with pytest.raises(Refusal, match="is not the model that its config.json describes"):
        onnx_model.open_session(fused.path, other.config)
    wider = copy.copy(model.config)
    wider.n_layer = 3
    with pytest.raises(Refusal, match="is not the model that its config.json describes"):
        onnx_model.open_session(fused.path, wider)
    for change in (
        lambda shapes: shapes["total"].dim.add(dim_value=1),
        lambda shapes: shapes["places"].dim.add(dim_value=1),
        lambda shapes: shapes["logits"].dim[1].Clear(),
    ):
        proto = onnx.load(fused.path)
        tensors = *proto.graph.input, *proto.graph.output
        change({tensor.name: tensor.type.tensor_type.shape for tensor in tensors})
        with pytest.raises(Refusal, match="is not the model that its config.json describes"):
            open_graph(proto, model, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"pos": "alibi"},
        {"window": 6},
        {"head_dim": 8},
        {"head_dim": 24},
    ],
)
def test_what_the_node_cannot_compute_is_not_fused(settings):
    assert onnx_modules.can_fuse(build(**WIDE))
    assert not onnx_modules.can_fuse(build(**(WIDE | settings)))


def test_a_rotation_of_ones_own_is_not_fused(monkeypatch):
    def one_way(self, pos):
        cos, sin = turn(self, pos)
        return cos, sin.abs()

    turn = RoPE.forward
    model = build(**WIDE)
    monkeypatch.setattr(RoPE, "forward", one_way)
    assert not onnx_modules.can_fuse(model)


def test_a_file_of_2_gb_is_not_begun(monkeypatch, model):
    assert onnx_graph.is_fusible(model)
    monkeypatch.setattr(
        onnx_graph, "MAX_BYTES", 4 * sum(p.numel() for p in model.parameters()) + 64 * 16
    )
    assert not onnx_graph.is_fusible(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"qk_norm": False},
        {"n_kv_head": 1, "bias": True},
        {"pos": "learned", "norm": "layernorm", "norm_position": "post", "mlp": "gelu"},
        {"pos": "none", "tie": False},
        {"pos": "sinusoidal"},
        {"rope_scaling": "yarn:3,8", "n_kv_head": 2},
        {"rope_scaling": "llama3:8,1,4,16"},
        {"mlp": "moe"},
        {"mlp": "moe", "norm_topk_prob": False},
        {"head_dim": 32, "n_head": 2, "n_kv_head": 2},
    ],
)
def test_settings(settings, tmp_path, unwritten):
    model = build(**(WIDE | settings))
    fused = open_graph(onnx_graph.export(model, fused=True), model, tmp_path)
    check_numbers(model, fused)
    prompts = [[1, 2, 3], [4], [5, 6]]
    reference = complete(generate(model, prompts, 20, temperature=0))
    assert complete(generate(fused, prompts, 20, temperature=0)) == reference


@pytest.mark.slow
def test_the_shortest_context_that_is_traced(tmp_path):
    model = build(n_layer=1, n_embd=64, block_size=7)
    fused = open_graph(onnx_graph.export(model, fused=True), model, tmp_path)
    _, share = export_onnx.parity(model, fused)
    assert share < export_onnx.MAX_DIFFERENCE


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_integers_are_the_model_with_rounded_weights(bits, model, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_integers, "STATES", 1)  # float32: what is left is the weights' error
    proto = onnx_graph.export(model, fused=True)
    onnx_integers.quantize(proto, bits, bits)
    assert sum(node.op_type == "MatMulNBits" for node in proto.graph.node) == 4 * 2 + 1
    domains = [opset.domain for opset in proto.opset_import]
    assert len(domains) == len(set(domains)) == 2
    rounded = rounded_model(model, bits, bits)
    assert int8_error(rounded, open_graph(proto, model, tmp_path)) < 1e-4


@pytest.mark.parametrize("n_inner", [64, pytest.param(48, marks=pytest.mark.slow)])
def test_experts_are_one_node_and_their_integers_the_rounded_weights(n_inner, monkeypatch, tmp_path):
    """Groups are of 32 numbers, or of 16 where experts have 48 inputs."""
    monkeypatch.setattr(onnx_integers, "STATES", 1)  # float32
    model = build(mlp="moe", n_inner=n_inner, n_layer=1, **WIDE)
    proto = onnx_graph.export(model, fused=True)
    assert sum(node.op_type == "MoE" for node in proto.graph.node) == 1
    check_numbers(model, open_graph(proto, model, tmp_path))
    onnx_integers.quantize(proto, 4, 4)
    assert sum(node.op_type == "QMoE" for node in proto.graph.node) == 1
    rounded = rounded_model(model, 4, 4, expert_size=math.gcd(n_inner, 32))
    integers = open_graph(proto, model, tmp_path)
    assert int8_error(rounded, integers) < 1e-4
    assert int8_error(model, integers) > 1e-2


def test_experts_stay_dense_where_the_node_cannot_have_them(monkeypatch):
    def class_of_experts(**settings):
        model = build(mlp="moe", **WIDE, **settings)
        assert onnx_graph.is_fusible(model)
        return type(onnx_modules.FusedGraph(model).model.blocks[0].mlp)

    assert class_of_experts() is onnx_modules.FusedMoE
    assert class_of_experts(norm_topk_prob=False) is onnx_modules.DenseMoE
    assert class_of_experts(n_inner=24) is onnx_modules.DenseMoE
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.0")
    assert class_of_experts() is onnx_modules.DenseMoE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with data/toy and out/ckpt.pt, a model whose heads have 16 numbers."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        prepare.prepare(
            configure(prepare.Config, ["--num_stories=300", "--vocab_size=300", "--num_proc=1"])
        )
        _, _, tokenizer = dataset.load("data/toy")
        model = build(vocab_size=tokenizer.vocab_size, **WIDE)
        checkpoint_file.save(
            "out/ckpt.pt", model, tokenizer, {"dataset": "toy"}, checkpoint_file.RunState(1, 2.0, 2.0)
        )
    return folder


def test_integers_have_it_and_every_script_reads_them(run, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(run)
    export("--quantize=int8", "--eval_tokens=512", "--seconds=0", f"--to={tmp_path}/onnx")
    path = tmp_path / "onnx/model_int8.onnx"
    assert has_own_attention(onnx.load(path))
    assert not has_own_attention(onnx.load(tmp_path / "onnx/model.onnx"))
    assert sorted(item.name for item in path.parent.iterdir()) == [
        "config.json",
        "model.onnx",
        "model_int8.onnx",
        "tokenizer.json",
    ]
    capsys.readouterr()
    texts = []
    for num_samples in 1, 3:
        call(sample, f"--onnx={path}", f"--num_samples={num_samples}", "--max_new_tokens=9", "--seed=4")
        texts.append(capsys.readouterr().out.splitlines()[1:])
    assert len(texts[1]) > len(texts[0]) > 1


@pytest.mark.slow
def test_plain_integers_have_operators_of_onnx_alone(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    export("--quantize=plain_int8", "--eval_tokens=512", "--seconds=0", f"--to={tmp_path}/onnx")
    proto = onnx.load(tmp_path / "onnx/model_plain_int8.onnx")
    assert [opset.domain for opset in proto.opset_import] == [""]


def test_an_onnxruntime_that_refuses_it_is_no_end(model, monkeypatch, capsys, tmp_path):
    """Nor is a file left."""

    def refused(path, c):
        raise Refusal("no such operator")

    monkeypatch.setattr(export_onnx, "export", lambda model, fused: onnx.ModelProto())
    monkeypatch.setattr(onnx_model, "open_session", refused)
    assert export_onnx.fused_graph(model, tmp_path) is None
    assert "onnxruntime's own attention does not run here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_onnxruntime_that_computes_something_else_is_noticed(run, monkeypatch, capsys, tmp_path):
    """Integers then have the attention of model.onnx."""

    def backwards(model):
        return tuple(-table for table in tables(model))

    tables = onnx_modules.turned_tables
    monkeypatch.chdir(run)
    monkeypatch.setattr(onnx_graph, "can_fuse", lambda model: True)
    monkeypatch.setattr(onnx_modules, "turned_tables", backwards)
    export("--quantize=int8", "--eval_tokens=512", "--seconds=0", f"--to={tmp_path}/onnx")
    assert "onnxruntime's own attention differs by" in capsys.readouterr().out
    assert not has_own_attention(onnx.load(tmp_path / "onnx/model_int8.onnx"))
    assert not Path(tmp_path / "onnx/model_fused.onnx").exists()


def test_a_full_disk_is_not_taken_for_an_onnxruntime_that_refuses(model, monkeypatch, tmp_path):
    def cannot_write(proto, path):
        raise Refusal(f"cannot write {path}: no space is left", status=1)

    monkeypatch.setattr(export_onnx, "write_graph", cannot_write)
    with pytest.raises(Refusal, match="no space is left"):
        export_onnx.fused_graph(model, tmp_path)
