"""prepare.py goes on where it was killed, to the same bytes, and takes over nothing that is of something else."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import files, make_docs, write_txt

import prepare
import progress
import readers
import sources
from dataset import load
from prepare import Config
from tokenizer import Tokenizer

ROOT = Path(prepare.__file__).parent
DOCS = make_docs(800)
slow = pytest.mark.slow
SIZES = {"CHUNK": 2000, "MB": 1000}  # many chunks, and files of 3,000 bytes
SETTINGS = {
    "dataset": "c.txt",
    "name": "d",
    "vocab_size": 300,
    "shard_mb": 3,
    "num_proc": 2,
    "val_fraction": 0.01,
}

RUN = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import pathlib, time, prepare, shards, tokenizer
for name, size in {SIZES!r}.items():
    setattr(prepare, name, size)
def deadly(function, at, calls=[0]):
    def called(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return called
FAULT
prepare.prepare(prepare.Config(**VALUES))
"""

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, size in SIZES.items():
        monkeypatch.setattr(prepare, name, size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a run that nobody killed, {name: bytes}."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, size in SIZES.items():
            patch.setattr(prepare, name, size)
        write_txt("c.txt", DOCS)
        prepare.prepare(Config(**SETTINGS))
    files = contents(folder / "data/d")
    assert len(files) >= 20
    assert "val.bin" in files
    return files


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def start(fault="", **settings):
    """Starts prepare.py in a process of its own, after the Python code that fault is."""
    code = RUN.replace("FAULT", fault).replace("VALUES", repr(SETTINGS | settings))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **streams)


def killed(target, at, **settings):
    """Runs prepare.py until the call number `at` of target, where it is killed."""
    process = start(f"{target} = deadly({target}, {at})", **settings)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def left():
    """Returns the folder that a killed run left."""
    [folder] = Path("data").iterdir()
    return folder


def run_again(monkeypatch, capsys, **settings):
    """Returns (what prepare.py prints, how many chunks it encodes)."""
    encoded = []
    encode_chunk = prepare.encode_chunk
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode_chunk", lambda *args: encoded.append(1) or encode_chunk(*args))
        capsys.readouterr()
        prepare.prepare(Config(**SETTINGS | settings))
    return capsys.readouterr().out, len(encoded)


@pytest.mark.parametrize(
    "target, at, goes_on",
    [
        pytest.param("prepare.Progress.note", 1, False, marks=slow),
        pytest.param("prepare.Progress.note", 3, True, marks=slow),  # before the counts
        pytest.param("os.replace", 3, True, marks=slow),  # while they are noted
        ("tokenizer.Tokenizer.train", 1, True),
        pytest.param("prepare.Progress.note_tokenizer", 1, True, marks=slow),
        ("prepare.encode_chunk", 5, True),
        pytest.param("shards.ShardWriter.end_file", 1, True, marks=slow),
        ("shards.ShardWriter.end_file", 9, True),
        pytest.param("prepare.Progress.note_files", 7, True, marks=slow),
        pytest.param("os.replace", 11, True, marks=slow),
        pytest.param("prepare.name_shards", 1, True, marks=slow),
        ("pathlib.Path.unlink", 1, True),
        ("pathlib.Path.rename", -1, False),  # of the whole folder: nothing says any more what it is of
    ],
)
def test_a_killed_run_is_gone_on_with(target, at, goes_on, whole, monkeypatch, capsys):
    write_txt("c.txt", DOCS)
    if at < 0:  # the last
        at = 1 + sum(name.endswith(".bin") for name in whole)
    killed(target, at)
    state = progress.read_state(left())
    out, encoded = run_again(monkeypatch, capsys, num_proc=1)
    assert ("going on with what a killed run left of data/d\n" in out) == goes_on
    assert contents("data/d") == whole
    assert files("data") == ["d"]
    assert load("data/d")
    assert encoded == num_chunks() - state.get("chunks", 0)


def num_chunks():
    cfg = Config(**SETTINGS)
    paths = [Path("c.txt")]
    docs = list(readers.documents(paths, cfg))
    pieces = prepare.split_documents(cfg, paths, [], len(docs), sum(map(len, docs)))
    return sum(1 for _ in prepare.chunks(prepare.cut_long(pieces)))


def test_a_vocabulary_and_counts_are_kept(whole, monkeypatch, capsys):
    write_txt("c.txt", DOCS)
    killed("shards.ShardWriter.end_file", 9)
    for name in "learn", "count_splits":
        monkeypatch.setattr(prepare, name, None)
    run_again(monkeypatch, capsys)
    assert contents("data/d") == whole


def test_stories_that_were_made_are_kept(monkeypatch, capsys):
    settings = {"dataset": "toy", "num_stories": 400}
    killed("shards.ShardWriter.end_file", 9, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(sources.toy_stories, "stories", None)
        out, _ = run_again(patch, capsys, **settings)
    assert "going on" in out
    prepare.prepare(Config(**SETTINGS | settings | {"name": "e"}))
    names = "train_00000.bin", "train_00009.bin", "val.bin", "tokenizer.json"
    assert [contents("data/d").get(name) for name in names] == [
        contents("data/e").get(name) for name in names
    ]
    assert files("data/d") == files("data/e")


def touch(path):
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


def append(path):
    stat = os.stat(path)
    with open(path, "a", encoding="utf-8") as f:
        f.write(" more.")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_is_done_is_of_the_files_that_are_there(tmp_path, capsys):
    """A source that is touched, a fetched file of another size, another vocabulary: none is gone on with."""
    source, folder = tmp_path / "c.txt", tmp_path / "d"
    source.write_text("A text.")
    folder.mkdir()
    fetched = folder / "dataset" / "toy.jsonl"
    vocabulary = Tokenizer.train(["abab"], 258)

    def again(change):
        """Returns what a run after a killed one goes on with, after a change."""
        done = progress.Progress(folder, "d", {"seed": 1})
        done.note_tokenizer(vocabulary)
        fetched.parent.mkdir(exist_ok=True)
        fetched.write_text("A text.")
        done.note_fetched("dataset", {"train": [fetched]})
        done.check_sources({"train": [source]})
        change()
        done = progress.Progress(folder, "d", {"seed": 1})
        kept = done.tokenizer(), done.fetched("dataset")
        done.check_sources({"train": [source]})
        return *kept, done.goes_on

    same, splits, goes_on = again(lambda: None)
    assert same.sha256 == vocabulary.sha256
    assert splits == {"train": [fetched]}
    assert goes_on
    assert not again(lambda: touch(source))[2]
    assert again(lambda: append(fetched))[1] == {}
    assert again(lambda: Tokenizer.train(["baba"], 258).save(folder / "tokenizer.json"))[0] is None
    capsys.readouterr()


@pytest.mark.parametrize(
    "change, settings, problem",
    [
        pytest.param(None, {"vocab_size": 310}, "is of another vocab_size", marks=slow),
        (None, {"seed": 5, "shard_mb": 4}, "is of another shard_mb and seed"),
        pytest.param(touch, {}, "is of other files, or they have changed", marks=slow),
        (append, {}, "is of other files, or they have changed"),
        pytest.param(None, {"val_dataset": "v.txt"}, "is of another val_dataset", marks=slow),
    ],
)
def test_what_is_of_something_else_is_begun_anew(change, settings, problem, monkeypatch, capsys):
    write_txt("c.txt", DOCS)
    write_txt("v.txt", DOCS[:40])
    killed("shards.ShardWriter.end_file", 9)
    if change:
        change("c.txt")
    out, encoded = run_again(monkeypatch, capsys, **settings)
    assert f"what a killed run left of data/d {problem}: all begins anew\n" in out
    assert encoded == num_chunks() or settings.get("val_dataset")
    prepare.prepare(Config(**SETTINGS | settings | {"name": "e"}))
    meta = json.loads(contents("data/e").pop("meta.json")) | {"name": "d"}
    assert contents("data/d") == contents("data/e") | {
        "meta.json": (json.dumps(meta, indent=1) + "\n").encode()
    }


@pytest.mark.parametrize(
    "name, cut",
    [
        ("train_00001.bin", False),
        pytest.param("train_00001.bin", True, marks=slow),
        pytest.param("train_00009.bin", False, marks=slow),  # which is not full
        pytest.param("val_00000.bin", True, marks=slow),
    ],
)
def test_what_is_damaged_is_encoded_anew(name, cut, whole, monkeypatch, capsys):
    write_txt("c.txt", DOCS)
    killed("shards.ShardWriter.end_file", 10)
    path = left() / name
    data = path.read_bytes()
    path.write_bytes(data[:100] if cut else data[:100] + bytes([data[100] ^ 1]) + data[101:])
    out, encoded = run_again(monkeypatch, capsys)
    assert "what a killed run encoded of data/d is damaged (" in out
    assert encoded == num_chunks()
    assert contents("data/d") == whole


def test_of_two_runs_after_a_killed_one_each_has_a_folder_of_its_own(whole):
    write_txt("c.txt", DOCS)
    killed("shards.ShardWriter.end_file", 9)
    processes = [start() for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1], outputs  # the slower one is refused: data/d is there
    assert sum("going on" in out for out, _ in outputs) <= 1
    assert contents("data/d") == whole
    assert files("data") == ["d"]


def test_a_killed_run_of_another_name_is_left_alone(whole, monkeypatch, capsys):
    write_txt("c.txt", DOCS)
    killed("shards.ShardWriter.end_file", 9, name="e")
    before = contents(left())
    out, _ = run_again(monkeypatch, capsys)
    assert "killed run" not in out
    assert contents("data/d") == whole
    [other] = Path("data").glob(".e.tmp-*")
    assert contents(other) == before


def test_a_run_that_is_interrupted_is_gone_on_with_too(whole, monkeypatch, capsys):
    write_txt("c.txt", DOCS)
    fault = """
def stop(self, end_file=shards.ShardWriter.end_file, calls=[]):
    calls.append(1)
    if len(calls) == 9:
        raise KeyboardInterrupt
    end_file(self)
shards.ShardWriter.end_file = stop
"""
    process = start(fault)
    out, _ = process.communicate()
    assert process.returncode != 0
    assert f"what is done stays in {left()}: the same command goes on with it\n" in out
    out, encoded = run_again(monkeypatch, capsys)
    assert "going on" in out
    assert encoded < num_chunks()
    assert contents("data/d") == whole
    assert files("data") == ["d"]


@pytest.mark.parametrize("place", ["tokenizer.Tokenizer.train", "prepare.encode"])
def test_what_was_fetched_or_learned_before_an_interruption_is_kept(place, monkeypatch, capsys):
    settings = {"dataset": "toy", "num_stories": 400}
    process = start(f"{place} = lambda *args: signal.raise_signal(signal.SIGINT)", **settings)
    out, _ = process.communicate()
    assert process.returncode != 0
    assert f"what is done stays in {left()}: the same command goes on with it\n" in out
    monkeypatch.setattr(sources.toy_stories, "stories", None)
    if place == "prepare.encode":
        monkeypatch.setattr(prepare, "learn", None)
    out, _ = run_again(monkeypatch, capsys, **settings)
    assert "going on" in out
    assert load("data/d")


def test_what_was_fetched_is_kept_where_another_file_is_wrong(monkeypatch, capsys):
    Path("v.json").write_text("[")
    settings = {"dataset": "toy", "num_stories": 400, "val_dataset": "v.json"}
    process = start(**settings)  # whose folder a living process would keep
    _, errors = process.communicate()
    assert "v.json is not JSON" in errors
    Path("v.json").write_text(json.dumps([{"text": text} for text in DOCS]))
    monkeypatch.setattr(sources.toy_stories, "stories", None)
    out, _ = run_again(monkeypatch, capsys, **settings)
    assert "going on" in out
    assert load("data/d")


@slow
@pytest.mark.parametrize("seed", range(2))
def test_one_kill_after_the_other(seed, whole):
    write_txt("c.txt", DOCS)
    rng = random.Random(seed)
    kills = 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        target = rng.choice(["os.fsync", "os.replace", "prepare.encode_chunk"])
        process = start(f"{target} = deadly({target}, {rng.randint(1, 40)})")
        errors = process.communicate()[1]
        code = process.returncode
        kills += code == -signal.SIGKILL
        assert len(files("data")) == 1
    assert code == 0, errors
    assert kills > 1
    assert contents("data/d") == whole
    assert files("data") == ["d"]
