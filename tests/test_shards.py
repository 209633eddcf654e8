"""A split in several files is the same array, the same batches and the same run as in one."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import call
from test_prepare import DOCS, edit, files, in_an_empty_folder, make_docs, refusal, write_txt

import prepare
import shards
import train
from data import training_rows
from dataset import load
from log import read_log
from prepare import Config
from shards import Shards, check_file


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with one text prepared as data/one and, in files of at most 2,000 bytes, as data/many."""
    folder = tmp_path_factory.mktemp("pair")
    write_txt(folder / "c.txt", make_docs(400))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare.prepare(Config(dataset="c.txt", name="one", vocab_size=400))
        patch.setattr(prepare, "MB", 1000)
        prepare.prepare(Config(dataset="c.txt", name="many", vocab_size=400, shard_mb=2))
    return folder


@pytest.fixture
def many(pair):
    shutil.copytree(pair / "data/many", "data/many")
    return Path("data/many")


# ---- one array


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.integers(-30, 30) | st.none(),
    st.integers(-30, 30) | st.none(),
)
def test_shards_are_their_concatenation(sizes, start, stop):
    whole = np.arange(10, 10 + sum(sizes), dtype="<u2")
    ids = Shards(np.split(whole, np.cumsum(sizes)[:-1]))
    assert len(ids) == len(whole)
    assert ids[start:stop].tolist() == whole[start:stop].tolist()
    assert ids[start:stop].dtype == ids.dtype == whole.dtype
    assert [int(ids[i]) for i in range(-len(ids), len(ids))] == [*whole, *whole]
    assert ((ids == 12) == (whole == 12)).all()
    assert np.r_[ids, 7].tolist() == [*whole, 7]
    for i in len(ids), -len(ids) - 1:
        with pytest.raises(IndexError):
            ids[i]
    with pytest.raises(ValueError, match="step"):
        ids[::2]


def test_files_hold_the_ids_in_order_and_are_full_but_for_the_last(pair):
    one, ids, _ = load(pair / "data/one")
    many, shards, _ = load(pair / "data/many")
    for split in prepare.SPLITS:
        entries = many["splits"][split]["files"]
        names = [entry["file"] for entry in entries]
        assert names == [f"{split}_{i:05}.bin" for i in range(len(names))]
        paths = [pair / "data/many" / name for name in names]
        assert {path.stat().st_size for path in paths[:-1]} == {2000}
        assert b"".join(path.read_bytes() for path in paths) == ids[split].tobytes()
        assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == [
            entry["sha256"] for entry in entries
        ]
        assert np.asarray(shards[split]).tobytes() == ids[split].tobytes()
        # what does not depend on the files is one and the same
        one["splits"][split].pop("files")
        many["splits"][split].pop("files")
    assert len(shards["train"].parts) >= 7
    assert one | {"name": "many"} == many


def test_batches_are_the_same(pair):
    ids, shards = [load(pair / "data" / name)[1]["train"] for name in ("one", "many")]
    for seed, first in (1, 0), (1, 64), (2, 3):
        for T in 8, 1500:  # which lies in one file, and across two borders
            batches = [training_rows(data, T, seed, first, 64) for data in (ids, shards)]
            for key in "idx", "targets":
                assert batches[0][key].equal(batches[1][key])


def test_a_run_is_the_same_to_the_bit(pair):
    argv = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=32", "--max_iters=6"]
    argv += ["--eval_interval=3", "--log_interval=1", "--device=cpu", "--dtype=float32"]
    logs = []
    for name in "one", "many":
        out_dir = f"out/{name}"
        call(train, *argv, f"--dataset={name}", f"--out_dir={out_dir}", folder=pair)
        lines = read_log(pair / out_dir / "log.jsonl")
        logs.append([{key: line[key] for key in line.keys() - {"tokens_per_s"}} for line in lines])
    assert logs[0] == logs[1]
    assert sum("val_loss" in line for line in logs[0]) >= 2


def test_a_file_that_is_checked_in_pieces_has_the_hash_and_the_highest_id_of_the_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "HASH_CHUNK", 7)
    ids = np.array([3, 900, *range(20)], "<u2")
    ids.tofile(tmp_path / "train.bin")
    sha256 = hashlib.sha256(ids.tobytes()).hexdigest()
    digest, highest = check_file(tmp_path / "train.bin", ids.dtype, len(ids), sha256)
    assert (digest.hexdigest(), highest) == (sha256, 900)


def test_a_size_below_one_is_refused():
    assert "shard_mb must be at least 1, not 0" in str(pytest.raises(ValueError, Config, shard_mb=0))


# ---- wrong files


def another(pair, name):
    """Puts the file of another dataset with as many tokens and the same tokenizer into data/many."""
    ids = np.fromfile(pair / "data/many" / name, "<u2")
    ids[::-1].tofile(f"data/many/{name}")


@pytest.mark.parametrize(
    "damage, file, problem",
    [
        (lambda pair: another(pair, "train_00002.bin"), "train_00002.bin", "its sha256 is not the one"),
        (
            lambda pair: os.remove("data/many/train_00003.bin"),
            "train_00003.bin",
            "there is no such file",
        ),
        (lambda pair: os.remove("data/many/val_00000.bin"), "val_00000.bin", "there is no such file"),
        (lambda pair: os.truncate("data/many/train_00001.bin", 1000), "train_00001.bin", "500 tokens"),
        (lambda pair: os.truncate("data/many/train_00001.bin", 1001), "train_00001.bin", "1001 bytes"),
        (
            lambda pair: shutil.copy("data/many/train_00000.bin", "data/many/train_01000.bin"),
            "train_01000.bin",
            "meta.json names no such file",
        ),
        (
            lambda pair: shutil.copy("data/many/train_00000.bin", "data/many/val.bin"),
            "val.bin",
            "meta.json names no such file",
        ),
        (
            lambda pair: shutil.copy(pair / "data/one/meta.json", "data/many"),
            "train.bin",
            "no such file",
        ),
        (lambda pair: os.remove("data/many/meta.json"), "meta.json", "there is no such file"),
    ],
)
def test_wrong_files_are_one_line(pair, many, damage, file, problem):
    assert load(many)
    damage(pair)
    message = refusal(load, many)
    assert message.startswith(f"data/many/{file}: ")
    assert problem in message
    assert "--overwrite" in message


def swap(entries):
    entries[1], entries[2] = entries[2], entries[1]


@pytest.mark.parametrize(
    "change, problem",
    [
        (swap, "train should be in files named train_00000.bin, train_00001.bin"),
        (
            lambda entries: entries.__delitem__(slice(1, None)),
            "train should be in files named train.bin",
        ),
        (lambda entries: entries.clear(), "and its files 0"),
        (lambda entries: entries[0].update(file="../many/train_00000.bin"), "should be in files named"),
        (lambda entries: entries[0].update(tokens=999), "and its files"),
        (lambda entries: entries[0].update(tokens="1000"), "train_00000.bin has '1000' tokens"),
        (lambda entries: entries[0].pop("sha256"), "sha256"),
    ],
)
def test_a_list_of_files_that_is_wrong(many, change, problem):
    splits = json.loads((many / "meta.json").read_text())["splits"]
    change(splits["train"]["files"])
    edit(many / "meta.json", splits=splits)
    message = refusal(load, many)
    assert message.startswith("data/many/meta.json: ")
    assert problem in message


def test_format_1_is_read(pair):
    shutil.copytree(pair / "data/one", "data/old")
    path = Path("data/old/meta.json")
    splits = json.loads(path.read_text())["splits"]
    for entry in splits.values():
        [file] = entry.pop("files")
        entry |= file
    edit(path, format=1, splits=splits)
    _, ids, _ = load(pair / "data/one")
    _, old, _ = load("data/old")
    for split in prepare.SPLITS:
        assert old[split].tobytes() == ids[split].tobytes()


def test_a_single_file_is_as_nanogpt_has_it():
    write_txt("c.txt", DOCS)
    prepare.prepare(Config(dataset="c.txt", name="d", vocab_size=400))
    assert files("data/d") == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    _, ids, _ = load("data/d")
    assert np.memmap("data/d/train.bin", dtype=np.uint16).tolist() == ids["train"].tolist()
