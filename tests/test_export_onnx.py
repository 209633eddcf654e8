"""ONNX files against the model they come from: the same numbers at any batch, length and past, and nothing in them that should not be."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from test_model import build
from test_sample import complete
from test_train import SMALL

import checkpoint
import export_onnx
import onnx_model
import prepare
import sample
import train
from config import Refusal, configure
from model import MLPS, NORMS, POSITIONS, ModelConfig, Transformer, num_params
from sample import generate

# Opset 18's, with nothing of onnxruntime's own; what a browser's runtime has too
PLAIN = set(
    """Add And Cast Concat Cos Div Equal Expand Gather GatherElements GatherND Gemm Identity LayerNormalization Less LessOrEqual MatMul Mul Neg Not Pow Range
    ReduceMean Reshape Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where""".split()
)


def put(model, path):
    """The OnnxModel of a model, exported to path."""
    path.write_bytes(export_onnx.export(model).SerializeToString())
    return onnx_model.open_session(str(path), model.config)


def ids(c, B, T, seed=0):
    return torch.randint(c.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def same_numbers(model, there):
    """Against the model without a cache, which has one past, all of the text."""
    for B, T, P in itertools.product((1, 2, 5), (1, 2, 9), (0, 1, 7, 15)):
        idx = ids(model.config, B, P + T, seed=P)
        past = there.new_past(B, P + T)
        if P:
            there.run(idx[:, :P], past)
        computed = there.run(idx[:, P:], past)
        torch.testing.assert_close(torch.from_numpy(computed), model(idx)[0][:, P:], rtol=0, atol=1e-4)


def plain(path, model):
    """Opset 18 and plain operators, in one file, without a trace of where it was made; of the parameters' size."""
    proto, data = onnx.load(path, load_external_data=False), path.read_bytes()
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)] and not proto.functions
    assert {n.op_type for n in proto.graph.node} <= PLAIN, {n.op_type for n in proto.graph.node} - PLAIN
    assert all(
        x.data_location == onnx.TensorProto.DEFAULT and not x.external_data
        for x in proto.graph.initializer
    )
    for trace in (
        b".py",
        b"site-packages",
        os.path.expanduser("~").encode() + b"/",
        str(Path(export_onnx.__file__).parent).encode(),
        b"stack_trace",
    ):
        assert trace not in data, trace
    assert 0 < len(data) - 4 * num_params(model) <= max(100_000, 0.04 * num_params(model))
    residual = [n for n in proto.graph.node if n.op_type == "Gemm" and len(n.input) == 3]
    assert (
        model.config.bias or len(residual) == 2 * model.config.n_layer
    )  # each block's two sums are in its products
    tables = [x for x in proto.graph.initializer if model.config.vocab_size in x.dims]
    assert len(tables) == (1 if model.config.tie_embeddings else 2)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with data, a checkpoint, and what export_onnx.py makes of it in out/onnx; and the model, its tokenizer, what was said."""
    folder = tmp_path_factory.mktemp("lab")
    with contextlib.chdir(folder), contextlib.redirect_stdout(open("said", "w")) as f:
        prepare.prepare(
            configure(prepare.Config, ["--num_stories=300", "--vocab_size=300", "--num_proc=1"])
        )
        _, _, tokenizer = prepare.load("data/toy")
        model = build(vocab_size=tokenizer.vocab_size, n_kv_head=2, block_size=64)
        checkpoint.save(
            "out/ckpt.pt",
            model,
            tokenizer,
            {"dataset": "toy", "start": "Once", "template": "Q: {prompt}"},
            checkpoint.RunState(1, 2.0, 2.0),
        )
        export_onnx.main(
            configure(export_onnx.Config, ["--quantize=int8", "--eval_tokens=512", "--seconds=0"])
        )
        f.flush()
    return folder, model, tokenizer, (folder / "said").read_text()


@pytest.fixture(scope="module")
def there(lab):
    return onnx_model.load(str(lab[0] / "out/onnx"))[0]


def test_any_batch_length_and_past(lab, there):
    same_numbers(lab[1], there)


def test_the_folder_is_whole_and_says_what_it_is(lab):
    folder, model, tokenizer, printed = lab
    to = folder / "out/onnx"
    assert sorted(p.name for p in to.iterdir()) == [
        "config.json",
        "model.onnx",
        "model_int8.onnx",
        "tokenizer.json",
    ]
    assert [p.name for p in (folder / "out").iterdir() if p.name.startswith(".")] == []
    plain(to / "model.onnx", model)
    config = json.loads((to / "config.json").read_text())
    wanted = {
        "format": 4,
        "n_layer": 2,
        "n_kv_head": 2,
        "head_dim": 8,
        "block_size": 64,
        "vocab_size": 300,
        "eot": 0,
        "bos": 0,
        "tokenizer": "bpe",
        "start": "Once",
        "template": "Q: {prompt}",
    }
    assert {key: config[key] for key in wanted} == wanted and config["model"]["n_embd"] == 32
    assert (to / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.to_str()
    assert (
        "greedy text: 200 tokens, all equal" in printed
        and "int8" in printed.splitlines()[-2]
        and f"sample.py --onnx={Path('out/onnx')}" in printed
    )


def test_generate_does_not_notice_the_difference(lab, there):
    model = lab[1]
    prompts = [ids(model.config, 1, n, seed=n)[0].tolist() for n in (3, 9, 3, 1)]
    greedy = complete(generate(model, prompts, 40, temperature=0))
    stop = greedy[0][1][7]  # ends a row, or several, before the others
    for some in prompts, prompts[:1], [prompts[0]] * 3:
        for settings in (
            {"temperature": 0},
            {"temperature": 0, "stop": stop},
            {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 5},
            {"temperature": 0, "repetition_penalty": 1.5},
            {"temperature": 0, "past_end": "recompute"},
        ):
            n = 90 if "past_end" in settings else 70
            assert complete(generate(there, some, n, **settings)) == complete(
                generate(model, some, n, **settings)
            ), settings
    assert greedy == complete(generate(there, prompts, 40, temperature=0))


@pytest.mark.parametrize(
    "keys",
    [
        "--start=Once --num_samples=2 --max_new_tokens=30",
        "--raw --temperature=0",
        "--start=FILE:prompts --seed=3 --top_k=5",
    ],
)
def test_sample_writes_the_same_text(lab, keys, capsys, monkeypatch):
    monkeypatch.chdir(lab[0])
    Path("prompts").write_text("A dog<|endoftext|>The old owl and the cat")
    texts = []
    for model in "--onnx=out/onnx", "--onnx=out/onnx/model.onnx", "--device=cpu --dtype=float32":
        sample.main(configure(sample.Config, [*model.split(), *keys.split()]))
        texts.append(capsys.readouterr().out.splitlines()[1:-1])  # without the paths and the speed
    assert texts[0] == texts[1] == texts[2] and len("".join(texts[0])) > 250


def test_another_models_file_is_told_from_ours(lab, there, capsys):
    _, model, _, _ = lab
    worst, share = export_onnx.parity(model, there)
    assert 0 < share <= worst < 2e-5
    other = build(vocab_size=300, n_kv_head=2, block_size=64)
    other.blocks[1].attn.k_norm.weight.data[3] *= 1.01
    with pytest.raises(Refusal, match="more than rounding") as e:
        export_onnx.check(other, there, [0], 9)
    assert e.value.status == 1
    other.head.weight.data.fill_(torch.nan)
    assert export_onnx.parity(other, there) == (np.inf, np.inf)


def test_a_file_of_another_export_is_refused(lab, tmp_path):
    for name in "config.json", "tokenizer.json", "model.onnx":
        shutil.copy(lab[0] / "out/onnx" / name, tmp_path)
    onnx_model.load(str(tmp_path))
    proto = onnx.load(tmp_path / "model.onnx")
    proto.metadata_props[0].value = "another's"
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(Refusal, match="is another model"):
        onnx_model.load(str(tmp_path))


def test_int8_is_a_quarter_and_near(lab, there):
    folder, model, _, printed = lab
    files = [onnx.load(folder / f"out/onnx/{name}.onnx") for name in ("model", "model_int8")]
    onnx.checker.check_model(files[1], full_check=True)
    assert {n.op_type for n in files[1].graph.node} <= PLAIN | {"DynamicQuantizeLinear", "MatMulInteger"}
    full, small = ({x.name: onnx.numpy_helper.to_array(x) for x in f.graph.initializer} for f in files)
    assert sum(x.nbytes for x in small.values()) < 0.31 * sum(
        x.nbytes for x in full.values()
    )  # the scales are an eighth of the integers at width 32
    matrices = [name for name, x in full.items() if x.ndim == 2 and f"{name}.q" in small]
    assert len(matrices) == 1 + 2 * 4 and not set(matrices) & small.keys()
    for name in matrices:  # each number is one of 129 steps, the nearest
        q, scale = small[f"{name}.q"], small[f"{name}.scale"][:, None]
        assert (
            q.dtype == np.int8
            and np.abs(q.astype(int)).max() == 64
            and (np.abs(q.astype(int)).max(1) == 64).all()
        )
        assert (np.abs(q * scale - full[name]) <= 0.501 * scale).all()
    table = [name for name in small if 300 in small[name].shape and small[name].dtype == np.int8]
    users = {n.op_type for n in files[1].graph.node if set(table) & set(n.input)}
    assert len(table) == 1 and users == {"Gather", "Transpose"}  # one for the embedding and the head
    assert 1e-4 < apart(model, onnx_model.load(str(folder / "out/onnx/model_int8.onnx"))[0]) < 0.1
    assert "validation loss: float32" in printed


@torch.no_grad()
def apart(model, int8):
    """How far int8 is from the model, as a share; it reads 7 tokens, then 9 with those as the past."""
    idx, past = ids(model.config, 2, 16), int8.new_past(2, 16)
    computed = [torch.from_numpy(int8.run(part, past)) for part in idx.split((7, 9), dim=1)]
    want = model(idx)[0]
    return (torch.cat(computed, 1) - want).norm() / want.norm()


def test_int8_that_forgets_would_be_seen(lab):
    folder, model, _, _ = lab
    proto = onnx.load(folder / "out/onnx/model_int8.onnx")
    for n in proto.graph.node:
        if n.op_type == "Concat" and n.input[0].startswith("past_k"):
            n.input[0] = f"{n.input[0]}.gone"
    for x in reversed(proto.graph.input):
        if x.name.startswith("past_k"):
            proto.graph.node.insert(
                0, onnx.helper.make_node("Sub", [x.name, x.name], [f"{x.name}.gone"])
            )
    (folder / "forgets.onnx").write_bytes(proto.SerializeToString())
    assert apart(model, onnx_model.open_session(str(folder / "forgets.onnx"), model.config)) > 0.15


def test_the_loss_is_the_models(lab, there):
    idx = ids(lab[1].config, 3, 20)
    targets = idx.roll(-1, 1).masked_fill(idx % 3 == 0, -100)
    for reduction in "mean", "sum", "none":
        torch.testing.assert_close(
            there(idx, targets, reduction=reduction)[1],
            lab[1](idx, targets, reduction=reduction)[1].detach(),
            rtol=1e-5,
            atol=0,
        )


def test_what_is_there_is_kept(lab, monkeypatch):
    monkeypatch.chdir(lab[0])
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    with pytest.raises(Refusal, match="--overwrite moves it aside"):
        export_onnx.main(configure(export_onnx.Config, []))
    with pytest.raises(Refusal, match="data/none"):
        export_onnx.main(
            configure(export_onnx.Config, ["--quantize=int8", "--dataset=none", "--overwrite"])
        )
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before


def test_a_start_that_came_with_the_model_names_no_file(lab, tmp_path, capsys, monkeypatch):
    shutil.copytree(lab[0] / "out/onnx", tmp_path / "onnx")
    about = json.loads((tmp_path / "onnx/config.json").read_text())
    (tmp_path / "onnx/config.json").write_text(json.dumps(about | {"start": "FILE:secret"}))
    monkeypatch.chdir(tmp_path)
    Path("secret").write_text("A secret")
    sample.main(configure(sample.Config, ["--onnx=onnx", "--raw", "--max_new_tokens=1"]))
    assert "FILE:secret" in (printed := capsys.readouterr().out) and "A secret" not in printed


def test_what_protobuf_cannot_hold_is_said_at_once():
    with torch.device("meta"), pytest.raises(Refusal, match="2 GB, and this model has 2.4"):
        export_onnx.export(Transformer(ModelConfig(n_layer=12, n_head=16, n_embd=2048, vocab_size=1024)))


def test_what_does_not_fit_is_refused(lab, there):
    """In words, and before onnxruntime stumbles over its shapes."""
    for room, P, T in (99, 0, 65), (99, 60, 5), (8, 0, 9), (8, 8, 1):
        past = there.new_past(1, room)
        if P:
            there.run(ids(lab[1].config, 1, P), past)
        with pytest.raises(ValueError, match=f"{P + T} tokens do not fit in {min(room, 64)}"):
            there.run(ids(lab[1].config, 1, T), past)


def test_a_past_whose_call_failed_is_as_it_was(lab, there):
    c, idx = lab[1].config, ids(lab[1].config, 1, 12)
    past, whole = there.new_past(1, 12), there.run(idx, there.new_past(1, 12))
    there.run(idx[:, :5], past)
    with pytest.raises(Exception, match="shape"):
        past.read(there.session, idx[:, 5:7].numpy(), np.empty((1, 9, c.vocab_size), np.float32))
    with pytest.raises(Exception, match="shape"):  # nor is memory written beyond its end
        past.read(there.session, idx.numpy(), np.empty((*idx.shape, c.vocab_size), np.float32))
    np.testing.assert_allclose(there.run(idx[:, 5:], past), whole[:, 5:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("B", [1, 3])
def test_a_past_that_grows_in_its_place_is_the_one_of_fresh_arrays(lab, there, B):
    """As any other user of the file would call it: what came out goes in, none of it in the memory of another."""
    c = lab[1].config
    idx, fresh, past = (
        ids(c, B, 40),
        {
            name: np.zeros((0, B, c.n_kv_head, c.head_dim), np.float32)
            for name in onnx_model.names(c, "past")
        },
        there.new_past(B, 40),
    )
    for part in idx.split((9, 1, 1, 20, 1, 8), dim=1):
        logits, *present = there.session.run(None, {"ids": part.numpy(), **fresh})
        fresh = dict(zip(fresh, present))
        np.testing.assert_array_equal(there.run(part, past), logits)
        for a, b in zip(past.arrays, present):
            np.testing.assert_array_equal(a[: len(b)], b)


def test_an_onnxruntime_that_is_too_old_is_named(lab, monkeypatch):
    monkeypatch.setattr(
        onnxruntime.capi.onnxruntime_pybind11_state, "OrtValueVector", object
    )  # as it was in 1.20, for what counts here
    with pytest.raises(
        Refusal,
        match=f"onnxruntime {onnxruntime.__version__} is too old: pip install --upgrade onnxruntime",
    ):
        onnx_model.load(str(lab[0] / "out/onnx"))


def test_a_setting_that_came_later_has_its_default(lab, tmp_path):
    shutil.copytree(lab[0] / "out/onnx", tmp_path / "old")
    about = json.loads((tmp_path / "old/config.json").read_text())
    del about["model"]["head_dim"]
    (tmp_path / "old/config.json").write_text(json.dumps(about))
    assert onnx_model.load(str(tmp_path / "old"))[0].config == lab[1].config


SIDES = {
    "pos": list(POSITIONS),
    "norm": list(NORMS),
    "norm_position": ["pre", "post"],
    "mlp": list(MLPS),
    "n_kv_head": [1, 2, 4],
    "tie": [True, False],
    "qk_norm": [True, False],
    "bias": [True, False],
}
GRID = [
    dict(zip(SIDES, row))
    for row in [
        ("learned", "layernorm", "pre", "gelu", 1, True, True, True),
        ("learned", "rmsnorm", "post", "swiglu", 4, False, False, True),
        ("learned", "layernorm", "post", "gelu", 2, True, True, False),
        ("sinusoidal", "layernorm", "post", "swiglu", 2, False, True, True),
        ("sinusoidal", "layernorm", "pre", "swiglu", 4, True, False, False),
        ("sinusoidal", "rmsnorm", "pre", "gelu", 1, True, False, True),
        ("rope", "rmsnorm", "pre", "swiglu", 4, True, True, True),
        ("rope", "layernorm", "post", "gelu", 2, True, False, True),
        ("rope", "rmsnorm", "pre", "swiglu", 1, False, False, False),
        ("alibi", "rmsnorm", "post", "gelu", 1, True, False, False),
        ("alibi", "rmsnorm", "pre", "swiglu", 2, False, True, False),
        ("alibi", "layernorm", "post", "swiglu", 4, True, True, True),
        ("none", "layernorm", "pre", "gelu", 4, False, False, False),
        ("none", "rmsnorm", "post", "swiglu", 1, False, True, True),
        ("none", "layernorm", "post", "gelu", 2, True, True, True),
    ]
]


def test_the_grid_has_each_pair_of_settings():
    for (a, of_a), (b, of_b) in itertools.combinations(SIDES.items(), 2):
        assert {(row[a], row[b]) for row in GRID} == set(itertools.product(of_a, of_b))


@pytest.mark.slow
@pytest.mark.parametrize(
    "toggles",
    GRID
    + [
        dict(pos="rope", rope_scaling="llama3:8,1,4,16"),
        dict(n_layer=1, n_head=2, n_kv_head=2),
        dict(block_size=1024),
        dict(head_dim=12, n_kv_head=2),
        dict(head_dim=6, qk_norm=False),
        dict(n_embd=384),
    ],
)
def test_every_toggle(toggles, tmp_path):
    model = build(**toggles)
    there = put(model, tmp_path / "model.onnx")
    same_numbers(model, there)
    plain(tmp_path / "model.onnx", model)
    prompts = [[1, 2, 3], [4], [5, 6]]
    assert complete(generate(there, prompts, 20, temperature=0)) == complete(
        generate(model, prompts, 20, temperature=0)
    )
    proto = onnx.load(tmp_path / "model.onnx")
    export_onnx.quantize(proto)
    together = 2 + (model.config.mlp == "swiglu")  # k and v with q, up with gate
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert (
        sum(n.op_type == "MatMulInteger" for n in proto.graph.node)
        == linears - together * model.config.n_layer
    )
    (tmp_path / "model_int8.onnx").write_bytes(proto.SerializeToString())
    assert (
        1e-5
        < apart(model, onnx_model.open_session(str(tmp_path / "model_int8.onnx"), model.config))
        < 0.15
    )


@pytest.mark.slow
def test_int8_that_is_worse_is_not_kept(lab, monkeypatch, capsys):
    """A channel that is never on, with weights that are enormous: in float32 nothing, for int8 the end of all others."""
    monkeypatch.chdir(lab[0])
    train.main(
        configure(
            train.Config,
            [*SMALL, "--max_iters=60", "--no-tie_embeddings", "--out_dir=bad", "--block_size=64"],
        )
    )
    ckpt = checkpoint.load("bad/ckpt.pt")
    ckpt["model"]["norm.weight"][0], ckpt["model"]["head.weight"][:, 0] = 0, 1e4
    Path("bad/ckpt_best.pt").unlink()
    torch.save(ckpt, "bad/ckpt.pt")
    with pytest.raises(Refusal, match="% worse, more than 1%") as e:
        export_onnx.main(
            configure(
                export_onnx.Config,
                ["--out_dir=bad", "--quantize=int8", "--eval_tokens=512", "--seconds=0"],
            )
        )
    assert e.value.status == 1 and sorted(p.name for p in Path("bad/onnx").iterdir()) == [
        "config.json",
        "model.onnx",
        "tokenizer.json",
    ]
    export_onnx.main(configure(export_onnx.Config, ["--out_dir=bad", "--seconds=0", "--overwrite"]))
    assert (
        len(list(Path("bad").glob("onnx.old-*/model.onnx"))) == 1
        and Path("bad/onnx/model.onnx").exists()
    )
