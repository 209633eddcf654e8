"""ONNX files against the model they come from: the same numbers at any batch, length and past."""

import contextlib
import copy
import io
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from scripts import call, printed, written
from test_model import build
from test_sample import complete
from test_train import SMALL

import checkpoint
import checkpoint_file
import dataset
import export_onnx
import onnx_cache
import onnx_graph
import onnx_integers
import onnx_model
import onnx_modules
import prepare
import quantize
import quantized
import sample
import train
from config import Refusal, configure
from data import prompt_ids
from generate import generate
from model import MLPS, NORMS, POSITIONS, ModelConfig, Transformer
from sizes import num_params
from tokenizer import Tokenizer

# Opset 18's, with nothing of onnxruntime's own; what a browser's runtime has too
PLAIN_OPS = set(
    """
    Add And Cast Concat Cos Div Equal Expand Gather GatherElements GatherND Gemm Greater
    Identity LayerNormalization Less LessOrEqual MatMul Mul Neg Not Pow Range ReduceMean ReduceSum Reshape
    ScatterElements Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile TopK Transpose
    Unsqueeze Where
    """.split()
)


class Lab(NamedTuple):
    folder: Path  # with data/toy, out/ckpt.pt, and what export_onnx.py makes of them in out/onnx
    model: Transformer
    tokenizer: Tokenizer
    output: str  # of export_onnx.py


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as output:
        prepare.prepare(
            configure(prepare.Config, ["--num_stories=300", "--vocab_size=300", "--num_proc=1"])
        )
        _, _, tokenizer = dataset.load("data/toy")
        model = build(vocab_size=tokenizer.vocab_size, n_kv_head=2, block_size=64)
        config = {"dataset": "toy", "start": "Once", "template": "Q: {prompt}"}
        run_state = checkpoint_file.RunState(1, 2.0, 2.0)
        checkpoint_file.save("out/ckpt.pt", model, tokenizer, config, run_state)
        export("--quantize=int8", "--eval_tokens=512", "--seconds=0")
    return Lab(folder, model, tokenizer, output.getvalue())


@pytest.fixture(scope="module")
def exported(lab):
    """The OnnxModel of the lab's model, in float32."""
    return onnx_model.load(str(lab.folder / "out/onnx"))[0]


@pytest.fixture
def folder_copy(lab, tmp_path):
    """A copy of the lab's out/onnx that a test may change."""
    folder = tmp_path / "onnx"
    shutil.copytree(lab.folder / "out/onnx", folder)
    return folder


def export(*argv):
    call(export_onnx, *argv)


def draw_ids(config, B, T, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def check_numbers(model, exported):
    """Against the model without a cache, which reads all of the text at once."""
    for B, T, P in itertools.product((1, 2, 5), (1, 2, 9), (0, 1, 7, 15)):
        ids = draw_ids(model.config, B, P + T, seed=P)
        past = exported.new_past(B, P + T)
        if P:
            exported.run(ids[:, :P], past)
        logits = torch.from_numpy(exported.run(ids[:, P:], past))
        torch.testing.assert_close(logits, model(ids)[0][:, P:], rtol=0, atol=1e-4)


@torch.no_grad()
def check_some_logits(model, exported):
    """In any order, and none."""
    ids = draw_ids(model.config, 3, 10)
    past = exported.new_past(3, 10)
    expected = model(ids)[0]
    for start, end, places in (0, 5, [4]), (5, 9, [3, 0, 3]), (9, 10, []):
        logits = torch.from_numpy(exported.run(ids[:, start:end], past, places))
        places = [start + place for place in places]
        torch.testing.assert_close(logits, expected[:, places], rtol=0, atol=1e-4)


def without_places(proto):
    """Makes a graph one of format 5, which returns the logits of all tokens."""
    graph = proto.graph
    [places] = [tensor for tensor in graph.input if tensor.name == "places"]
    graph.input.remove(places)
    for number in 0, 1:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(number), f"old.{number}"))
    nodes = [
        onnx.helper.make_node("Shape", ["ids"], ["old.shape"], start=1),
        onnx.helper.make_node("Squeeze", ["old.shape"], ["old.T"]),
        onnx.helper.make_node("Range", ["old.0", "old.T", "old.1"], ["places"]),
    ]
    for i, node in enumerate(nodes):
        graph.node.insert(i, node)
    graph.output[0].type.tensor_type.shape.dim[1].dim_param = "T"


def write_old(folder, path):
    """Makes the export in a folder, and the graph at path, of format 5."""
    change_config(folder, lambda config: config.update(format=5))
    proto = onnx.load(path)
    without_places(proto)
    onnx.save(proto, path)


def check_file(path, model):
    """Opset 18 and plain operators in one file of the parameters' size, without a trace of its maker."""
    proto = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    assert not proto.functions
    ops = {node.op_type for node in proto.graph.node}
    assert ops <= PLAIN_OPS, ops - PLAIN_OPS
    for weight in proto.graph.initializer:
        assert weight.data_location == onnx.TensorProto.DEFAULT
        assert not weight.external_data

    data = path.read_bytes()
    home = os.path.expanduser("~") + "/"
    repository = str(Path(export_onnx.__file__).parent)
    for trace in ".py", "site-packages", "stack_trace", home, repository:
        assert trace.encode() not in data, trace
    experts = {prop.key: prop.value for prop in proto.metadata_props}.get("experts", "")
    assert experts.startswith("dense") == (model.config.mlp == "moe")
    params = num_params(model)
    assert 0 < len(data) - 4 * params <= max(100_000, 0.04 * params)

    # each block's two sums are in its products
    products_with_sum = [
        node for node in proto.graph.node if node.op_type == "Gemm" and len(node.input) == 3
    ]
    if not model.config.bias:
        assert len(products_with_sum) == 2 * model.config.n_layer
    tables = [weight for weight in proto.graph.initializer if model.config.vocab_size in weight.dims]
    assert len(tables) == (1 if model.config.tie_embeddings else 2)


@torch.no_grad()
def int8_error(model, int8):
    """How far int8 is from the model, as a share; it reads 7 tokens, then 9 with those as the past."""
    ids = draw_ids(model.config, 2, 16)
    past = int8.new_past(2, 16)
    parts = [torch.from_numpy(int8.run(part, past)) for part in ids.split((7, 9), dim=1)]
    reference = model(ids)[0]
    return (torch.cat(parts, 1) - reference).norm() / reference.norm()


# -----------------------------------------------------------------------------------------------------
# The file and its folder


@torch.no_grad()
def test_next_logits_are_a_transformers_from_an_empty_cache_on(lab, exported):
    ids = draw_ids(lab.model.config, B=2, T=10)
    cache = exported.new_cache(2, 10)
    for first, last in ((0, 9), (9, 10)):
        logits = exported.next_logits(ids[:, first:last], cache)
        torch.testing.assert_close(logits, lab.model.next_logits(ids[:, :last]), rtol=0, atol=1e-4)


def test_any_batch_length_and_past(lab, exported):
    check_numbers(lab.model, exported)


def test_logits_of_some_tokens_alone(lab, exported):
    check_some_logits(lab.model, exported)


def test_of_a_prompt_one_tokens_logits_are_computed(lab, exported, monkeypatch):
    """And of several as well: a head is most of a small model's work, and 1,000 tokens' logits are 200 MB."""

    def read(self, session, idx, places, logits):
        asked.append((places.tolist(), logits.shape))
        return past_read(self, session, idx, places, logits)

    asked = []
    past_read = onnx_cache.Past.read
    monkeypatch.setattr(onnx_cache.Past, "read", read)
    complete(generate(exported, [[1, 2, 3], [4, 5, 6], [7]], 2, temperature=0))
    V = lab.model.config.vocab_size
    assert asked == [([0], (1, 1, V)), ([2], (2, 1, V)), ([0], (1, 1, V)), ([0], (2, 1, V))]


def test_a_graph_of_an_older_format_is_read(lab, folder_copy):
    write_old(folder_copy, folder_copy / "model.onnx")
    exported, _, _ = onnx_model.load(str(folder_copy))
    assert exported.session.get_outputs()[0].shape[1] == "T"
    check_numbers(lab.model, exported)
    check_some_logits(lab.model, exported)
    prompts = [[1, 2, 3], [4], [5, 6]]
    reference = complete(generate(lab.model, prompts, 20, temperature=0))
    assert complete(generate(exported, prompts, 20, temperature=0)) == reference


def test_the_folder_is_whole_and_says_what_it_is(lab):
    folder = lab.folder / "out/onnx"
    files = ["config.json", "model.onnx", "model_int8.onnx", "tokenizer.json"]
    assert sorted(os.listdir(folder)) == files
    assert sorted(os.listdir(lab.folder / "out")) == ["ckpt.pt", "onnx"]  # nothing half written
    check_file(folder / "model.onnx", lab.model)
    config = json.loads((folder / "config.json").read_text())
    reference = {
        "format": 6,
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
        "text_rule": "stripped",  # as the checkpoint has none
    }
    assert {key: config[key] for key in reference} == reference
    assert config["model"]["n_embd"] == 32
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == lab.tokenizer.to_str()
    assert "greedy text: 200 tokens, all equal" in lab.output
    assert "int8" in lab.output.splitlines()[-2]
    assert f"sample.py --onnx={Path('out/onnx')}" in lab.output


def test_an_earlier_export_is_kept(lab, monkeypatch):
    monkeypatch.chdir(lab.folder)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(Refusal, match="--overwrite moves it aside"):
        export()
    with pytest.raises(Refusal, match="data/none"):
        export("--quantize=int8", "--dataset=none", "--overwrite")
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_a_file_of_another_export_is_refused(folder_copy):
    onnx_model.load(str(folder_copy))
    proto = onnx.load(folder_copy / "model.onnx")
    proto.metadata_props[0].value = "another's"
    (folder_copy / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(Refusal, match="is another model"):
        onnx_model.load(str(folder_copy))


def test_another_models_numbers_are_refused(lab, exported):
    largest, largest_share = export_onnx.parity(lab.model, exported)
    assert 0 < largest_share <= largest < 2e-5
    other = build(vocab_size=300, n_kv_head=2, block_size=64)
    other.blocks[1].attn.k_norm.weight.data[3] *= 1.01
    with pytest.raises(Refusal, match="more than rounding") as e:
        export_onnx.check(other, exported, [0], 9)
    assert e.value.status == 1
    other.head.weight.data.fill_(torch.nan)
    assert export_onnx.parity(other, exported) == (np.inf, np.inf)


def test_a_deep_models_rounding_is_measured_against_float64(lab, exported, monkeypatch, capsys):
    monkeypatch.setattr(export_onnx, "MAX_DIFFERENCE", 1e-9)  # so that this model counts as a deep one
    export_onnx.check(lab.model, exported, [0], 9)
    assert "PyTorch differs from itself in float64 by" in capsys.readouterr().out
    other = build(vocab_size=300, n_kv_head=2, block_size=64)
    other.blocks[1].attn.k_norm.weight.data[3] *= 1 + 1e-4
    with pytest.raises(Refusal, match="more than rounding"):
        export_onnx.check(other, exported, [0], 9)


@pytest.mark.slow
def test_a_model_is_exported_stretched_and_is_another_than_its_own(lab, exported, tmp_path):
    with contextlib.chdir(lab.folder):
        argv = ["--block_size=128", "--rope_scaling=yarn:2,64"]
        export(*argv, f"--to={tmp_path}/far", "--seconds=0")
    ckpt = checkpoint.open_checkpoint(str(lab.folder / "out"))
    ckpt.stretch("yarn:2,64", 128)
    model, _ = ckpt.restore()
    far, _, config = onnx_model.load(f"{tmp_path}/far")
    assert far.config == model.config
    prompts = [draw_ids(model.config, 1, n, seed=n)[0].tolist() for n in (3, 9)]
    texts = complete(generate(model, prompts, 110, temperature=0))
    assert complete(generate(far, prompts, 110, temperature=0)) == texts
    own = json.loads((lab.folder / "out/onnx/config.json").read_text())
    assert config["fingerprint"] != own["fingerprint"]


def test_a_setting_that_came_later_has_its_default(lab, folder_copy):
    change_config(folder_copy, lambda config: config["model"].pop("head_dim"))
    assert onnx_model.load(str(folder_copy))[0].config == lab.model.config


def test_a_model_beyond_protobufs_limit_is_refused_at_once():
    cfg = ModelConfig(n_layer=12, n_head=16, n_embd=2048, vocab_size=1024)
    with torch.device("meta"), pytest.raises(Refusal, match="2 GB, and this model has 2.4"):
        onnx_graph.export(Transformer(cfg))


def test_an_onnxruntime_that_is_too_old_is_named(lab, monkeypatch):
    # as it was in 1.20, for what counts here
    monkeypatch.setattr(onnxruntime.capi.onnxruntime_pybind11_state, "OrtValueVector", object)
    message = f"onnxruntime {onnxruntime.__version__} is too old: pip install --upgrade onnxruntime"
    with pytest.raises(Refusal, match=message):
        onnx_model.load(str(lab.folder / "out/onnx"))


# -----------------------------------------------------------------------------------------------------
# Text and loss


def test_generate_gives_the_models_text(lab, exported):
    model = lab.model
    prompts = [draw_ids(model.config, 1, n, seed=n)[0].tolist() for n in (3, 9, 3, 1)]
    greedy = complete(generate(model, prompts, 40, temperature=0))
    first_row = greedy[0][1]
    stop = [first_row[7]]  # ends a row, or several, before the others
    for batch in prompts, prompts[:1], [prompts[0]] * 3:
        for n, settings in (
            (70, {"temperature": 0}),
            (70, {"temperature": 0, "stop": stop}),
            (70, {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 5}),
            (70, {"temperature": 0, "repetition_penalty": 1.5}),
            (90, {"temperature": 0, "past_end": "recompute"}),
        ):
            reference = complete(generate(model, batch, n, **settings))
            assert complete(generate(exported, batch, n, **settings)) == reference, settings
    assert complete(generate(exported, prompts, 40, temperature=0)) == greedy


@pytest.mark.parametrize(
    "settings",
    [
        "--start=Once --num_samples=2 --max_new_tokens=30",
        "--raw --temperature=0",
        "--start=FILE:prompts --seed=3 --top_k=5",
        "--start=\\nOnce\\n --temperature=0",
    ],
)
def test_sample_writes_the_same_text(lab, settings, capsys, monkeypatch):
    monkeypatch.chdir(lab.folder)
    Path("prompts").write_text("A dog<|endoftext|>The old owl and the cat")
    texts = []
    for model in "--onnx=out/onnx", "--onnx=out/onnx/model.onnx", "--onnx=no --device=cpu":
        call(sample, *model.split(), *settings.split())
        _path, *lines, _speed = capsys.readouterr().out.splitlines()
        texts.append(lines)
    assert texts[0] == texts[1] == texts[2]
    assert len("".join(texts[0])) > 250


@pytest.mark.parametrize(
    "rule, shown", [(None, "Q: Why?"), ("stripped", "Q: Why?"), ("as it stands", "Q:  Why? ")]
)
def test_a_prompt_is_taken_by_the_rule_of_the_export(rule, shown, folder_copy, capsys):
    """An export from before the rule was kept has none."""
    change_config(folder_copy, lambda config: config.pop("text_rule"))
    if rule:
        change_config(folder_copy, lambda config: config.update(text_rule=rule))
    keys = [f"--onnx={folder_copy}", "--start= Why? ", "--max_new_tokens=1"]
    call(sample, *keys)
    assert capsys.readouterr().out.split("-" * 80)[1].startswith(f"\n{shown}")


def test_a_start_that_came_with_the_model_names_no_file(folder_copy, capsys, monkeypatch):
    change_config(folder_copy, lambda config: config.update(start="FILE:secret"))
    monkeypatch.chdir(folder_copy.parent)
    Path("secret").write_text("A secret")
    call(sample, "--onnx=onnx", "--raw", "--max_new_tokens=1")
    output = capsys.readouterr().out
    assert "FILE:secret" in output
    assert "A secret" not in output


def test_an_empty_start_is_a_new_document_and_a_missing_one_the_models_own(lab, capsys, monkeypatch):
    monkeypatch.chdir(lab.folder)
    keys = ["--raw", "--temperature=0", "--max_new_tokens=9"]
    for start, given in ("", ["--start="]), ("Once", []):
        prompt = prompt_ids(lab.tokenizer, start)
        stop = lab.tokenizer.ends
        [ids], _ = complete(generate(lab.model, [prompt], 9, temperature=0, stop=stop))
        text = start + lab.tokenizer.decode(ids)
        assert written(printed(capsys, sample, *keys, *given)) == f"\n{text}\n"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_models(lab, exported, reduction):
    ids = draw_ids(lab.model.config, 3, 20)
    targets = ids.roll(-1, 1).masked_fill(ids % 3 == 0, -100)
    loss = exported(ids, targets, reduction=reduction)[1]
    reference = lab.model(ids, targets, reduction=reduction)[1].detach()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)


# -----------------------------------------------------------------------------------------------------
# The past


@pytest.mark.parametrize("room, past_length, length", [(99, 0, 65), (99, 60, 5), (8, 0, 9), (8, 8, 1)])
def test_more_tokens_than_fit_are_refused(lab, exported, room, past_length, length):
    """In words, and before onnxruntime stumbles over its shapes."""
    config = lab.model.config
    past = exported.new_past(1, room)
    if past_length:
        exported.run(draw_ids(config, 1, past_length), past)
    message = f"{past_length + length} tokens do not fit in {min(room, 64)}"
    with pytest.raises(ValueError, match=message):
        exported.run(draw_ids(config, 1, length), past)


def test_a_past_whose_call_failed_is_as_it_was(lab, exported):
    config = lab.model.config
    ids = draw_ids(config, 1, 12)
    reference = exported.run(ids, exported.new_past(1, 12))
    past = exported.new_past(1, 12)
    exported.run(ids[:, :5], past)
    for part, n_logits in (ids[:, 5:7], 9), (ids, 12):  # nor is memory written beyond the past's end
        logits = np.empty((1, n_logits, config.vocab_size), np.float32)
        with pytest.raises(Exception, match="shape"):
            past.read(exported.session, part.numpy(), np.arange(part.size(1)), logits)
    np.testing.assert_allclose(exported.run(ids[:, 5:], past), reference[:, 5:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("B", [1, 3])
def test_a_past_that_grows_in_its_place_is_the_one_of_fresh_arrays(lab, exported, B):
    """As other users of the file call it: outputs are inputs of the next call, in new memory."""
    config = lab.model.config
    ids = draw_ids(config, B, 40)
    past = exported.new_past(B, 40)
    empty = np.zeros((0, B, config.n_kv_head, config.head_dim), np.float32)
    fresh = dict.fromkeys(onnx_cache.cache_names(config, "past"), empty)
    for part in ids.split((9, 1, 1, 20, 1, 8), dim=1):
        inputs = {"ids": part.numpy(), "places": np.arange(part.size(1)), **fresh}
        logits, *present = exported.session.run(None, inputs)
        fresh = dict(zip(fresh, present))
        np.testing.assert_array_equal(exported.run(part, past), logits)
        for array, reference in zip(past.arrays, present):
            np.testing.assert_array_equal(array[: len(reference)], reference)


def test_sample_takes_the_graph_of_the_same_weights(lab, monkeypatch, tmp_path, capsys):
    """Without being told, and never another model's, nor where PyTorch alone does what is asked for."""
    shutil.copytree(lab.folder / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)

    def text(*argv):
        call(sample, "--max_new_tokens=20", *argv)
        message, _, text = capsys.readouterr().out.partition("\n")
        return "onnxruntime" in message, text.rpartition("\n")[0].rpartition("\n")[0]

    assert text() == (True, text("--onnx=no")[1])
    for format in 3, 5:  # the former is none that is read
        change_config(tmp_path / "out/onnx", lambda config: config.update(format=format))
        assert text()[0] == (format == 5)
    with monkeypatch.context() as edit:  # of model.py, since the file was written
        edit.setattr(Transformer, "logits", lambda self, x: self.head(x).tanh())
        line = "out/onnx computes what model.py did before it was changed, and is left out\n"
        own, old = text("--onnx=no")[1], text("--onnx=out/onnx")[1]
        assert text() == (False, line + own) and own != old
    for argv in ["--onnx=no"], ["--num_samples=2"], ["--dtype=bfloat16"], ["--draft=ngram"]:
        assert not text(*argv)[0], argv
    own = text("--onnx=no")[1]
    whole = (tmp_path / "out/onnx/model.onnx").read_bytes()
    (tmp_path / "out/onnx/model.onnx").write_bytes(whole[:5000])
    is_onnx, damaged = text()
    assert not is_onnx and damaged.startswith("out/onnx/model.onnx is damaged or not a model")
    assert damaged.endswith(f", and is left out\n{own}")
    (tmp_path / "out/onnx/model.onnx").write_bytes(whole)
    assert text()[0]
    ckpt = checkpoint_file.load("out/ckpt.pt")
    ckpt["model"]["norm.weight"] *= 2
    torch.save(ckpt, "out/ckpt.pt")
    assert not text()[0]
    shutil.copytree(lab.folder / "out", "other")
    (tmp_path / "other/onnx/config.json").write_text("{")
    assert not text("--out_dir=other")[0]
    ckpt["model_config"]["norm"] = "gone"  # a class that model.py had when it was trained
    torch.save(ckpt, "out/ckpt.pt")
    with pytest.raises(Refusal, match="of a model that model.py has no longer: norm must be one of"):
        text()


@pytest.mark.slow
def test_sample_takes_the_graph_where_a_token_has_a_quarter_of_the_experts(
    lab, monkeypatch, tmp_path, capsys
):
    """In the graph each expert computes each token, which is quicker up to there."""
    monkeypatch.chdir(lab.folder)
    for n_expert, expected in (4, True), (5, False):
        folder = tmp_path / str(n_expert)
        shape = {"n_layer": 1, "mlp": "moe", "n_expert": n_expert, "n_expert_per_token": 1}
        model = build(vocab_size=lab.tokenizer.vocab_size, **shape)
        run_state = checkpoint_file.RunState(1, 2.0, 2.0)
        checkpoint_file.save(
            str(folder / "ckpt.pt"), model, lab.tokenizer, {"dataset": "toy"}, run_state
        )
        export(f"--out_dir={folder}", "--seconds=0")
        capsys.readouterr()
        call(sample, f"--out_dir={folder}", "--max_new_tokens=5")
        message = capsys.readouterr().out.splitlines()[0]
        assert ("onnxruntime" in message) == expected


# -----------------------------------------------------------------------------------------------------
# int8


def test_plain_int8_is_a_quarter_and_near(lab, tmp_path):
    folder = lab.folder / "out/onnx"
    float32_file = onnx.load(folder / "model.onnx")
    path = tmp_path / "model_plain_int8.onnx"
    int8_file = copy.deepcopy(float32_file)
    onnx_integers.quantize(int8_file, plain=True)
    path.write_bytes(int8_file.SerializeToString())
    onnx.checker.check_model(int8_file, full_check=True)
    ops = {node.op_type for node in int8_file.graph.node}
    assert ops <= PLAIN_OPS | {"DynamicQuantizeLinear", "MatMulInteger"}

    float32_weights, int8_weights = (
        {x.name: onnx.numpy_helper.to_array(x) for x in file.graph.initializer}
        for file in (float32_file, int8_file)
    )
    float32_bytes = sum(x.nbytes for x in float32_weights.values())
    int8_bytes = sum(x.nbytes for x in int8_weights.values())
    # the scales are an eighth of the integers at width 32
    assert int8_bytes < 0.31 * float32_bytes

    matrices = [
        name for name, x in float32_weights.items() if x.ndim == 2 and f"{name}.q" in int8_weights
    ]
    assert len(matrices) == 1 + 2 * 4
    assert not set(matrices) & int8_weights.keys()
    for name in matrices:  # each number is one of 129 steps, the nearest
        q = int8_weights[f"{name}.q"]
        scale = int8_weights[f"{name}.scale"][:, None]
        assert q.dtype == np.int8
        assert (np.abs(q.astype(int)).max(1) == 64).all()
        assert (np.abs(q * scale - float32_weights[name]) <= 0.501 * scale).all()

    # one table for the embedding and the head
    [table] = [name for name, x in int8_weights.items() if 300 in x.shape and x.dtype == np.int8]
    users = {node.op_type for node in int8_file.graph.node if table in node.input}
    assert users == {"Gather", "Transpose"}

    plain_error = int8_error(lab.model, onnx_model.open_session(str(path), lab.model.config))
    error = int8_error(lab.model, onnx_model.load(str(folder / "model_int8.onnx"))[0])
    assert 1e-4 < error < plain_error < 0.1
    assert "groups of 8 bits" in lab.output
    assert "validation loss: float32" in lab.output


@pytest.mark.slow
def test_the_next_way_is_tried_where_one_loses_too_much(lab, monkeypatch, tmp_path, capsys):
    ways = [way._replace(most=-1) for way in export_onnx.WAYS["int4"]]  # neither is good enough
    monkeypatch.setitem(export_onnx.WAYS, "int4", ways)
    monkeypatch.chdir(lab.folder)
    with pytest.raises(Refusal, match="is written without it"):
        export("--quantize=int4", "--seconds=0", "--eval_tokens=512", f"--to={tmp_path}/onnx")
    output = capsys.readouterr().out
    assert output.index("head in 4 bits\n") < output.index("head in 8 bits\n")
    assert not (tmp_path / "onnx/model_int4.onnx").exists()


def rounded_groups(weight, bits, size=0):
    """Each number to the nearest of its group's: in 8 bits of 64 numbers, of 255 as far below 0 as above; in 4 of
    32, of 16 between the lowest and the highest, 0 among them.
    """
    size = size or 8 * bits
    groups = F.pad(weight, (0, -weight.size(1) % size)).view(len(weight), -1, size)
    if bits == 8:
        scale = groups.abs().amax(-1, True) / 127
        numbers = (groups / scale.clamp(min=1e-30)).round() * scale
    else:
        lowest, highest = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
        scale = (highest - lowest) / 15
        zero = (-lowest / scale).round()
        numbers = ((groups / scale + zero).round().clamp(0, 15) - zero) * scale
    return numbers.flatten(1)[:, : weight.size(1)]


def rounded_model(model, bits, table_bits, size=0, expert_size=0):
    """A copy with the numbers that integers stand for, of groups of these sizes: bits in matrices, None where they are
    such numbers already, and table_bits in the embedding and the head.
    """
    rounded = copy.deepcopy(model)
    for table in {rounded.wte.weight, rounded.head.weight}:
        table.data = rounded_groups(table.data, table_bits)
    for linear in quantized.linears(rounded).values() if bits else ():
        weight = linear.weight.data
        rows = weight.flatten(0, -2)  # of all experts
        linear.weight.data = rounded_groups(
            rows, bits, expert_size if weight.dim() == 3 else size
        ).view_as(weight)
    return rounded


def test_an_onnxruntime_without_their_look_up_is_refused(monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    with pytest.raises(ValueError, match="int8 needs onnxruntime 1.23, and this is 1.22.1"):
        export_onnx.Config(quantize="int8")
    export_onnx.Config(quantize="plain_int8")
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(ValueError, match="int4 needs onnxruntime 1.27, and this is 1.26.0"):
        export_onnx.Config(quantize="int4")
    export_onnx.Config(quantize="int8")


ROUNDED = [
    (bits, settings, False, 0)
    for bits in [(4, 4), (4, 8), (8, 8)]
    for settings in ({}, {"bias": True, "tie": False, "n_kv_head": 2, "n_inner": 72, "n_embd": 40})
]


@pytest.mark.parametrize(
    "both_bits, settings, is_quantized, group_size",
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ROUNDED[:5]),
        *ROUNDED[5:],
        pytest.param((4, 4), {}, True, 0, marks=pytest.mark.slow),
        pytest.param((4, 4), {"mlp": "moe", "n_expert": 2}, True, 64, marks=pytest.mark.slow),
        ((4, 4), {}, True, 64),
        ((4, 8), {"n_inner": 72}, False, 128),
    ],
)
def test_integers_are_the_model_with_rounded_weights_and_keep_what_was_quantized(
    both_bits, settings, is_quantized, group_size, monkeypatch, tmp_path
):
    bits, table_bits = both_bits
    monkeypatch.setattr(onnx_integers, "STATES", 1)  # float32: what is left is the weights' error
    model = build(**({"block_size": 64, "n_layer": 1, "n_embd": 64, "n_inner": 64} | settings))
    if is_quantized:  # by GPTQ, which leaves many groups without their lowest or highest number
        tuning = quantize.Config(to="nowhere", method="gptq", bits=4, group_size=64)
        codes, _ = quantize.quantize_model(copy.deepcopy(model), tuning, draw_ids(model.config, 4, 64))
        model = quantized.quantized(model, quantized.Quantization(4, 64, "gptq"), codes)
        model = quantized.dequantized(model.float())
    proto = onnx_graph.export(model)
    onnx_integers.quantize(proto, bits, table_bits, group_size=group_size)
    path = tmp_path / "integers.onnx"
    path.write_bytes(proto.SerializeToString())
    assert sum(node.op_type == "MatMulNBits" for node in proto.graph.node) == 5
    integers = onnx_model.open_session(str(path), model.config)

    rounded = rounded_model(model, None if is_quantized else bits, table_bits, group_size)
    assert int8_error(rounded, integers) < 1e-4
    assert is_quantized or int8_error(model, integers) > (1e-2 if bits == 4 else 1e-3)


def test_groups_of_one_sign_are_rounded_as_closely_as_others():
    """Each number to its nearest step of a fifteenth of the range from 0."""
    sizes = np.random.default_rng(0).uniform(0.5, 1, (4, 64)).astype(np.float32)
    weight = (
        sizes
        * np.array([[1], [-1], [0], [1]])
        * np.where(np.arange(64) % 5 > 0, 1, [[1], [1], [1], [-1]])
    )
    arrays = {}
    onnx_integers.add_groups(arrays, "w", weight, 4, 32)
    q, zeros = (
        np.stack([x & 15, x >> 4], -1).reshape(4, 2, -1) for x in (arrays["w.q"], arrays["w.zero"])
    )
    scales = arrays["w.scale"][..., None]
    error = np.abs((q.astype(int) - zeros) * scales - weight.reshape(4, 2, 32))
    assert (error <= 0.501 * scales).all()
    groups = weight.reshape(4, 2, 32)
    width = np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)
    np.testing.assert_allclose(scales[..., 0], width / 15, rtol=1e-6, atol=1e-29)


@pytest.mark.slow
def test_a_router_is_not_rounded_and_experts_are():
    model = build(mlp="moe", block_size=64, n_layer=1, n_embd=64)
    exported = onnx_graph.export(model)
    fused = onnx_graph.export(model, fused=True)
    for graph, plain in (exported, False), (exported, True), (fused, False):
        proto = copy.deepcopy(graph)
        onnx_integers.quantize(proto, plain=plain)
        arrays = {x.name: onnx.numpy_helper.to_array(x) for x in proto.graph.initializer}
        [name] = [name for name in arrays if "router" in name]
        np.testing.assert_array_equal(arrays[name], model.blocks[0].mlp.router.weight.detach().numpy())
        mlp = name.removesuffix("router.weight")
        integers = {name for name in arrays if name.startswith(mlp) and name.endswith(".q")}
        suffix = "" if graph is fused else "_proj.weight"
        assert integers == {f"{mlp}both{suffix}.q", f"{mlp}down{suffix}.q"}


@pytest.mark.slow
def test_a_quantized_folder_keeps_its_groups(lab, monkeypatch, tmp_path, capsys):
    """In integers of as many bits; what it had not in groups, and other bits, get those of everybody."""
    monkeypatch.chdir(lab.folder)
    shape = {"n_embd": 128, "n_inner": 128, "n_layer": 1, "block_size": 64}
    model = build(vocab_size=lab.tokenizer.vocab_size, **shape)
    run_state = checkpoint_file.RunState(1, 2.0, 2.0)
    checkpoint_file.save(f"{tmp_path}/wide/ckpt.pt", model, lab.tokenizer, {"dataset": "toy"}, run_state)
    of_folder = [f"--out_dir={tmp_path}/wide", f"--to={tmp_path}/q", "--bits=4", "--group_size=128"]
    call(quantize, *of_folder)
    sizes = {}
    for kind in "int4", "int8":
        options = f"--quantize={kind}", "--seconds=0", "--eval_tokens=512", f"--to={tmp_path}/{kind}"
        export(f"--out_dir={tmp_path}/q", *options)
        assert "written out as float32" in capsys.readouterr().out
        nodes = onnx.load(tmp_path / kind / f"model_{kind}.onnx").graph.node
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        assert products[-1].output[0] == "logits"
        attributes = [{x.name: x.i for x in node.attribute} for node in products]
        sizes[kind] = [numbers["block_size"] for numbers in attributes]
    assert sizes == {"int4": [128] * 4 + [32], "int8": [64] * 5}


@pytest.mark.slow
def test_int4_is_written_beside_the_model_and_sample_reads_it(lab, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(lab.folder)
    export("--quantize=int4", "--seconds=0", "--eval_tokens=512", f"--to={tmp_path}/onnx")
    assert "validation loss: float32" in capsys.readouterr().out
    path = tmp_path / "onnx/model_int4.onnx"
    assert path.stat().st_size < (lab.folder / "out/onnx/model_int8.onnx").stat().st_size
    assert int8_error(lab.model, onnx_model.load(str(path))[0]) < 0.5
    call(sample, f"--onnx={path}", "--num_samples=1", "--max_new_tokens=5")
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    onnx_model.load(str(lab.folder / "out/onnx/model_int8.onnx"))
    with pytest.raises(Refusal, match="model_int4.onnx needs onnxruntime 1.27, and this is 1.26.0"):
        onnx_model.load(str(path))


def test_int8_that_forgets_would_be_seen(lab, tmp_path):
    proto = onnx.load(lab.folder / "out/onnx/model_int8.onnx")
    for node in proto.graph.node:
        if node.op_type == "Concat" and node.input[0].startswith("past_k"):
            node.input[0] = f"{node.input[0]}.zero"
    for x in proto.graph.input:
        if x.name.startswith("past_k"):
            subtract = onnx.helper.make_node("Sub", [x.name, x.name], [f"{x.name}.zero"])
            proto.graph.node.insert(0, subtract)
    path = tmp_path / "forgets.onnx"
    path.write_bytes(proto.SerializeToString())
    int8 = onnx_model.open_session(str(path), lab.model.config)
    assert int8_error(lab.model, int8) > 0.15


@pytest.mark.slow
def test_int8_that_is_worse_is_not_kept(lab, monkeypatch, capsys):
    """A channel that is never on, with enormous weights: float32 is the same, int8 loses all others."""
    monkeypatch.chdir(lab.folder)
    settings = ["--max_iters=60", "--no-tie_embeddings", "--out_dir=bad", "--block_size=64"]
    call(train, *SMALL, *settings)
    ckpt = checkpoint_file.load("bad/ckpt.pt")
    ckpt["model"]["norm.weight"][0] = 0
    ckpt["model"]["head.weight"][:, 0] = 1e4
    torch.save(ckpt, "bad/ckpt.pt")
    Path("bad/ckpt_best.pt").unlink()
    with pytest.raises(Refusal, match="% worse, more than 1%") as e:
        export("--out_dir=bad", "--quantize=int8", "--eval_tokens=512", "--seconds=0")
    assert e.value.status == 1
    assert sorted(os.listdir("bad/onnx")) == ["config.json", "model.onnx", "tokenizer.json"]
    export("--out_dir=bad", "--seconds=0", "--overwrite")
    assert len(list(Path("bad").glob("onnx.old-*/model.onnx"))) == 1
    assert Path("bad/onnx/model.onnx").exists()


# -----------------------------------------------------------------------------------------------------
# Every setting

SETTINGS = {
    "pos": list(POSITIONS),
    "norm": list(NORMS),
    "norm_position": ["pre", "post"],
    "mlp": list(MLPS),
    "n_kv_head": [1, 2, 4],
    "tie": [True, False],
    "qk_norm": [True, False],
    "bias": [True, False],
}
# each pair of values of two settings is in a row
GRID = [
    ("learned", "layernorm", "pre", "gelu", 1, True, True, True),
    ("learned", "rmsnorm", "post", "swiglu", 4, False, False, True),
    ("learned", "layernorm", "post", "gelu", 2, True, True, False),
    ("sinusoidal", "layernorm", "post", "swiglu", 2, False, True, True),
    ("sinusoidal", "layernorm", "pre", "swiglu", 4, True, False, False),
    ("sinusoidal", "rmsnorm", "pre", "gelu", 1, True, False, True),
    ("rope", "rmsnorm", "pre", "swiglu", 4, True, True, True),
    ("rope", "layernorm", "post", "gelu", 2, True, False, True),
    ("learned", "layernorm", "pre", "moe", 1, True, True, True),
    ("sinusoidal", "rmsnorm", "post", "moe", 2, False, False, False),
    ("rope", "rmsnorm", "pre", "moe", 4, True, True, False),
    ("alibi", "layernorm", "post", "moe", 4, False, False, True),
    ("none", "rmsnorm", "pre", "moe", 2, True, False, False),
    ("rope", "rmsnorm", "pre", "swiglu", 1, False, False, False),
    ("alibi", "rmsnorm", "post", "gelu", 1, True, False, False),
    ("alibi", "rmsnorm", "pre", "swiglu", 2, False, True, False),
    ("alibi", "layernorm", "post", "swiglu", 4, True, True, True),
    ("none", "layernorm", "pre", "gelu", 4, False, False, False),
    ("none", "rmsnorm", "post", "swiglu", 1, False, True, True),
    ("none", "layernorm", "post", "gelu", 2, True, True, True),
]
BEYOND_THE_GRID = [
    {"pos": "rope", "rope_scaling": "llama3:8,1,4,16"},
    {"pos": "rope", "rope_scaling": "ntk:4"},
    {"pos": "rope", "rope_scaling": "yarn:3,8", "n_kv_head": 2},
    {"n_layer": 1, "n_head": 2, "n_kv_head": 2},
    {"block_size": 1024},
    {"head_dim": 12, "n_kv_head": 2},
    {"head_dim": 6, "qk_norm": False},
    {"n_embd": 384},
    {"window": 6, "n_kv_head": 2},
    {"window": 6, "window_pattern": "SL", "pos": "alibi"},
]


def test_the_grid_has_each_pair_of_settings():
    columns = list(zip(*GRID))
    for i, j in itertools.combinations(range(len(SETTINGS)), 2):
        a, b = list(SETTINGS.values())[i], list(SETTINGS.values())[j]
        assert set(zip(columns[i], columns[j])) == set(itertools.product(a, b))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [*(dict(zip(SETTINGS, row)) for row in GRID), *BEYOND_THE_GRID])
def test_every_setting(settings, tmp_path):
    model = build(**settings)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_graph.export(model).SerializeToString())
    exported = onnx_model.open_session(str(path), model.config)
    check_numbers(model, exported)
    check_file(path, model)
    prompts = [[1, 2, 3], [4], [5, 6]]
    reference = complete(generate(model, prompts, 20, temperature=0))
    assert complete(generate(exported, prompts, 20, temperature=0)) == reference

    int8_file = onnx.load(path)
    onnx_integers.quantize(int8_file, plain=True)
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    # in a block: k and v with q, up with gate; of experts two products are no Linears
    joined = {"gelu": 2, "swiglu": 3, "moe": 1}[model.config.mlp]
    products = sum(node.op_type == "MatMulInteger" for node in int8_file.graph.node)
    assert products == linears - joined * model.config.n_layer
    int8_path = tmp_path / "model_int8.onnx"
    int8_path.write_bytes(int8_file.SerializeToString())
    int8 = onnx_model.open_session(str(int8_path), model.config)
    # a token whose experts are others by rounding is far off
    assert 1e-5 < int8_error(model, int8) < (0.3 if model.config.mlp == "moe" else 0.15)


# -----------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.mark.slow
def test_ctrl_c_while_torch_traces_ends_it_after_that(monkeypatch):
    graph = onnx_modules.Graph.forward

    def interrupted(self, ids, places, past):
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append("begun")
        logits = graph(self, ids, places, past)
        calls.append("ended")
        return logits

    calls = []
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(onnx_modules.Graph, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        onnx_graph.trace(onnx_modules.Graph(build(block_size=16)))
    assert calls[:2] == ["begun", "ended"]
    assert signal.getsignal(signal.SIGINT) is handler
