"""Readers of files, given damaged ones: each reads them or refuses them in one line."""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import Table
from pyarrow.parquet import write_table
from scripts import call
from test_bad_input import onnx_folder
from test_checkpoint import make_run, stopped
from test_prepare import DOCS, write_jsonl, write_parquet, write_rows, write_txt

import bench
import checkpoint
import checkpoint_file
import dataset
import eval as evaluation
import export_onnx
import finetune_lora
import hf
import lora
import onnx_model
import prepare
import readers
import rows
import sample
import train
from config import Refusal, configure
from interop import hf_folder
from log import read_log
from messages import conversations
from model import ModelConfig, Transformer
from optim import load_optimizers
from tokenizer import Tokenizer

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


JUNK = [
    b"\x00" * 100,
    b"\xff\xfe",
    b'"',
    b"}",
    b"[" * 3000,
    b"null",
    b"-1",
    b"1e999",
    b"99999999999999999999",
    b"\xed\xa0\x80",
    b"NaN",
    b"{}",
]


def damaged(whole):
    """Draws bytes that were `whole`: cut, changed or doubled, or with junk in them."""
    place = st.integers(0, len(whole))
    junk = st.one_of(st.binary(max_size=8), st.sampled_from(JUNK))
    return st.one_of(
        st.builds(lambda i, j, junk: whole[:i] + junk + whole[j:], place, place, junk),
        st.builds(lambda i, n, junk: whole[:i] + junk + whole[i + n :], place, st.integers(0, 9), junk),
    )


def is_one_line(refusal):
    return str(refusal) and "\n" not in str(refusal)


CONFIG = ModelConfig(vocab_size=300, n_layer=1, n_embd=8, n_head=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_files(folder)
    return folder


def make_files(folder):
    """Makes a good file for each of the READERS."""
    with contextlib.chdir(folder):
        write_txt("c.txt", DOCS)
        write_jsonl("c.jsonl", DOCS)
        write_parquet("c.parquet", DOCS)
        call(prepare, "--dataset=c.txt", "--name=d", "--vocab_size=300")
        tokenizer = Tokenizer.load("data/d/tokenizer.json")
        state = checkpoint_file.RunState(7, 2.5, 2.25)
        model = Transformer(CONFIG)
        checkpoint_file.save("ckpt.pt", model, tokenizer, {"seed": 1}, state)
        fingerprint = checkpoint_file.fingerprint(checkpoint_file.load("ckpt.pt"))
        lora.inject(model, lora.LoRAConfig(rank=1))
        tuning = asdict(finetune_lora.Config(rank=1))
        checkpoint_file.save_adapters("adapter.pt", model, "ckpt.pt", fingerprint, tuning, state)
        onnx_folder("o", onnx_model.describe(CONFIG, tokenizer, "", "", "whose"), tokenizer)
        pair = {"prompt": "a", "response": "b"}
        task = {"instruction": "a", "input": "", "output": "b"}
        chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        Path("r.json").write_text(json.dumps([pair, task, chat]))
        write_rows("r.jsonl", [pair, task, chat])
        write_table(Table.from_pylist([chat] * 3), "r.parquet")
        call(hf, "--out_dir=ckpt.pt", "--to=h")
        call(hf, "--adapter=adapter.pt", "--to=p")
        # a tokenizer that is not ours
        Path("f").mkdir()
        foreign = json.loads(tokenizer.to_str())
        foreign["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, foreign["pre_tokenizer"]],
        }
        Path("f/tokenizer.json").write_text(json.dumps(foreign))
        Path("f/tokenizer_config.json").write_text(
            '{"eos_token": "<|endoftext|>", "add_bos_token": false}'
        )
        # the tokenizer in GPT-2's two files
        bpe = json.loads(tokenizer.to_str())["model"]
        Path("encoder.json").write_text(json.dumps(bpe["vocab"]))
        Path("vocab.bpe").write_text("\n".join(["#version: 0.2", *bpe["merges"]]), encoding="utf-8")
        Path("c.toml").write_text('n_layer = 3\nlearning_rate = 1e-3\nout_dir = "out/x"\nbias = true\n')
        write_rows("log.jsonl", [{"step": i, "loss": 1.5} for i in range(5)])


def read_data(folder):
    _, data, tokenizer = dataset.load(folder / "data/d")
    assert all(int(ids.max()) < tokenizer.vocab_size for ids in data.values())


def read_checkpoint(folder):
    path = str(folder / "ckpt.pt")
    checkpoint_file.restore(checkpoint_file.load(path), path)


def read_adapter(folder):
    path, base = str(folder / "adapter.pt"), str(folder / "ckpt.pt")
    adapter, ckpt = checkpoint_file.load(path, checkpoint_file.ADAPTER_KEYS), checkpoint_file.load(base)
    checkpoint.Checkpoint(base, ckpt, path, adapter).restore_adapters(
        checkpoint_file.restore(ckpt, base)[0]
    )


def read_onnx(folder):
    model, tokenizer, _ = onnx_model.load(str(folder / "o"))
    assert model.config.vocab_size == tokenizer.vocab_size


def read_rows(suffix):
    return lambda folder: conversations(rows.read_rows(str(folder / f"r{suffix}")))


def read_documents(suffix):
    return lambda folder: list(
        readers.documents([folder / f"c{suffix}"], configure(prepare.Config, ["--dataset=toy"]))
    )


def load_tokenizer(folder):
    return Tokenizer.load(folder / "data/d/tokenizer.json")


def read_tokenizer(folder, load=load_tokenizer):
    try:
        tokenizer = load(folder)
    except ValueError as e:
        raise Refusal(e)
    assert tokenizer.decode(tokenizer.encode("a cat sat")) == "a cat sat"


def read_config(folder):
    configure(train.Config, [str(folder / "c.toml")])


def read_folder(folder):
    path = f"hf:{folder}/h"
    checkpoint_file.restore(checkpoint_file.load(path), path)


def read_peft(folder):
    hf_folder.load_adapter(str(folder / "p"), CONFIG)


def read_foreign(folder):
    hf_folder.read_tokenizer(str(folder / "f"))


READERS = {
    "h/config.json": read_folder,
    "h/model.safetensors": read_folder,
    "p/adapter_config.json": read_peft,
    "p/adapter_model.safetensors": read_peft,
    "f/tokenizer.json": read_foreign,
    "f/tokenizer_config.json": read_foreign,
    "data/d/meta.json": read_data,
    "data/d/train.bin": read_data,
    "data/d/tokenizer.json": read_tokenizer,
    "ckpt.pt": read_checkpoint,
    "adapter.pt": read_adapter,
    "o/config.json": read_onnx,
    "o/model.onnx": read_onnx,
    "r.json": read_rows(".json"),
    "r.jsonl": read_rows(".jsonl"),
    "r.parquet": read_rows(".parquet"),
    "encoder.json": lambda folder: read_tokenizer(folder, Tokenizer.gpt2),
    "vocab.bpe": lambda folder: read_tokenizer(folder, Tokenizer.gpt2),
    "c.txt": read_documents(".txt"),
    "c.jsonl": read_documents(".jsonl"),
    "c.parquet": read_documents(".parquet"),
    "c.toml": read_config,
    "log.jsonl": lambda folder: read_log(folder / "log.jsonl"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, good):
    whole = (good / name).read_bytes()
    READERS[name](good)

    @FUZZ
    @given(content=damaged(whole))
    def check(content):
        (good / name).write_bytes(content)
        try:
            READERS[name](good)
        except Refusal as e:
            assert is_one_line(e)
            assert len(str(e)) <= 500

    try:
        check()
    finally:
        (good / name).write_bytes(whole)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 99), st.integers(), st.floats(), st.text(max_size=3)
)
KEYS = st.sampled_from(["rope_type", "type", "factor", "rope_theta", "x"])
JSON = st.recursive(
    LEAVES,
    lambda values: st.one_of(st.lists(values, max_size=3), st.dictionaries(KEYS, values, max_size=3)),
    max_leaves=4,
)


@pytest.mark.parametrize(
    "name, read, more",
    [
        (
            "h/config.json",
            read_folder,
            ["head_dim", "rope_parameters", "rope_scaling", "layer_types", "sliding_window", "x"],
        ),
        ("p/adapter_config.json", read_peft, ["rank_pattern", "alpha_pattern", "use_rslora", "x"]),
    ],
)
def test_any_value_of_any_key_is_read_or_refused(name, read, more, good):
    whole = json.loads((good / name).read_text())

    @FUZZ
    @given(keys=st.dictionaries(st.sampled_from([*whole, *more]), JSON, min_size=1, max_size=3))
    def check(keys):
        (good / name).write_text(json.dumps(whole | keys))
        try:
            read(good)
        except Refusal as e:
            assert is_one_line(e)
            assert "Error(" not in str(e)

    try:
        check()
    finally:
        (good / name).write_text(json.dumps(whole))


def list_places(content, path=()):
    """Returns the keys that lead to each value inside nested dicts and lists."""
    places = [path] if path else []
    if isinstance(content, dict | list):
        keys = content.keys() if isinstance(content, dict) else range(len(content))
        for key in keys:
            places += list_places(content[key], (*path, key))
    return places


ODD = st.one_of(
    JSON,
    st.sampled_from([2**70, 10**400, b"x", (), {5: 5}, [None]]),
    st.builds(
        lambda shape, dtype, device: torch.ones(shape, dtype=dtype, device=device),
        st.sampled_from([(), (0,), (2,), (32, 32), (270, 32)]),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.complex64]),
        st.sampled_from(["cpu", "meta"]),
    ),
    st.sampled_from([torch.ones(1, 1).expand(270, 32), torch.ones(3).to_sparse(), torch.tensor(-5.0)]),
)


def test_any_value_in_any_place_of_a_checkpoint_is_read_or_refused(stopped, tmp_path):
    path, cfg = stopped
    changed_path = str(tmp_path / "ckpt.pt")
    whole = checkpoint_file.load(path)
    places = list_places(whole)

    @FUZZ
    @given(place=st.sampled_from(places), value=ODD, is_gone=st.booleans())
    def check(place, value, is_gone):
        changed = torch.load(path)
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        if is_gone:
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
        torch.save(changed, changed_path)
        _, optimizers, scaler = make_run(cfg)
        try:
            ckpt = checkpoint_file.load(changed_path)
            checkpoint_file.restore(ckpt, changed_path)
            load_optimizers(optimizers, scaler, ckpt, cfg)
            for optimizer in optimizers:
                optimizer.step()
        except Refusal as e:
            assert str(e) and "\n" not in str(e) and len(str(e)) <= 500

    check()


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_prompt_file_is_read_or_refused(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("p") / "prompt"
    path.write_bytes(content)
    with contextlib.suppress(Refusal):
        assert all(isinstance(text, str) for text in sample.read_start(f"FILE:{path}"))


VALUES = st.one_of(
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "",
            "true",
            "0",
            "-1",
            "1e400",
            "nan",
            "99999999999999999999",
            "layernorm",
            "rope",
            "linear:nan",
            "llama3:1,2,3",
            "FILE:",
            "hf:",
            "..",
            "\x00",
        ]
    ),
)


@pytest.mark.parametrize(
    "script", [prepare, train, sample, bench, evaluation, finetune_lora, export_onnx, hf]
)
def test_any_values_of_real_keys_give_a_config_or_one_line(script):
    names = [f.name for f in fields(script.Config)]

    @FUZZ
    @given(keys=st.dictionaries(st.sampled_from(names), VALUES, max_size=4))
    def check(keys):
        try:
            cfg = configure(script.Config, [f"--{key}={value}" for key, value in keys.items()])
        except Refusal as e:
            assert is_one_line(e)
            assert e.status == 2
        else:
            assert all(type(getattr(cfg, f.name)) is f.type for f in fields(cfg))

    check()


def test_the_network_is_off():
    """Here and in the processes that tests start; the tests before this one did without it."""
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    with pytest.raises(ConnectionRefusedError, match="network off"):
        exec(code)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "network off" in result.stderr
