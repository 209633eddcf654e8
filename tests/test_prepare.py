"""prepare.py: documents come out as they go in, splits are right, and no damaged dataset is accepted."""

import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import folders
import prepare
import readers
import shards
import sources
import toy_stories
from config import Refusal, describe
from dataset import load
from prepare import Config
from tokenizer import Tokenizer

SCRIPT = Path(prepare.__file__)
SEPARATOR = "<|endoftext|>"
WORDS = "the a cat dog sat ran. Lily said,".split()
WORDS += ['"naïve', "café", "日本語", "🙂", "42", "don't", "can't\n", "and\n\nbut", "", "", "x"]


def make_docs(n, seed=0):
    rng = random.Random(seed)
    docs = []
    for i in range(n):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(1, 60))]
        docs.append(f"{i} {' '.join(words)}.")
    return docs


DOCS = make_docs(150)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8", newline="")


def write_txt(path, docs, separator=SEPARATOR):
    write(path, f"\n{separator}\n".join(docs))


def write_rows(path, rows):
    """Writes rows as JSON, one a line."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_jsonl(path, docs):
    write_rows(path, rows(docs))


def write_parquet(path, docs):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows(docs))), path, row_group_size=40)


def write_csv(path, docs, column="text"):
    """Writes documents as in RFC 4180: each text in quotes, in which a quote is two."""
    lines = [f"id,{column}\r\n"]
    for i, text in enumerate(docs):
        quoted = text.replace('"', '""')
        lines.append(f'{i},"{quoted}"\r\n')
    write(path, "".join(lines))


def zstd(data, size=1000):
    """Returns data as Zstandard frames of one raw block each (RFC 8878, 3.1.1): nothing is compressed."""
    frames = []
    for i in range(0, len(data), size):
        block = data[i : i + size]
        head = b"\x28\xb5\x2f\xfd" + b"\x60" + (len(block) - 256 & 0xFFFF).to_bytes(2, "little")
        if len(block) < 256:
            head = b"\x28\xb5\x2f\xfd" + b"\x20" + len(block).to_bytes(1, "little")
        frames += [head, (len(block) << 3 | 1).to_bytes(3, "little"), block]
    return b"".join(frames)


def make(dataset="c.txt", name="d", vocab_size=400, **settings):
    """Prepares a dataset; returns its meta.json, its splits and its tokenizer."""
    return load(prepare.prepare(Config(dataset=dataset, name=name, vocab_size=vocab_size, **settings)))


def texts(ids, tokenizer):
    """Returns the documents in ids, each of which must be followed by end-of-text."""
    ends = np.flatnonzero(ids == tokenizer.eot)
    assert len(ends)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def all_texts(data, tokenizer):
    """Returns the documents of both splits, sorted."""
    return sorted(texts(data["train"], tokenizer) + texts(data["val"], tokenizer))


def files(folder):
    """Returns the names of the files in a folder, sorted."""
    return sorted(path.name for path in Path(folder).iterdir())


def bins(folder="data/d"):
    return [Path(folder, name).read_bytes() for name in ("train.bin", "val.bin", "tokenizer.json")]


def refusal(function, *args, **kwargs):
    """Returns the message of the Refusal that function raises."""
    with pytest.raises(Refusal) as e:
        function(*args, **kwargs)
    return str(e.value)


@contextlib.contextmanager
def file_size_limit(size):
    """No file may grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- what goes in comes out


def test_every_format_gives_back_the_documents_and_the_same_bytes():
    write_txt("txt.txt", DOCS)
    write_txt("md.md", DOCS)
    write_jsonl("jsonl.jsonl", DOCS)
    write_parquet("parquet.parquet", DOCS)
    write_txt("folder/a/1.txt", DOCS[:30])
    write_jsonl("folder/a/2.JSONL", DOCS[30:70])
    write_parquet("folder/b.parquet", DOCS[70:100])
    write_txt("folder/c/d/0.md", DOCS[100:])
    write("folder/a/1.xml", "not,read")
    write("json.json", json.dumps([{"text": text} for text in DOCS]))
    write("texts.json", json.dumps(DOCS))
    write_csv("csv.csv", DOCS)
    packed = []
    for path in sorted(Path().glob("*.*")):
        packed += [f"{path}.gz", f"{path}.ZST"]
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        Path(f"{path}.ZST").write_bytes(zstd(path.read_bytes()))
    plain = "txt.txt", "md.md", "jsonl.jsonl", "json.json", "texts.json", "csv.csv", "parquet.parquet"
    versions = set()
    for dataset in *plain, *packed, "folder":
        meta, data, tokenizer = make(dataset, name="", overwrite=True)
        assert meta["name"] == dataset.partition(".")[0]
        assert all_texts(data, tokenizer) == sorted(DOCS)
        for split, n in ("train", 135), ("val", 15):
            docs = texts(data[split], tokenizer)
            assert len(docs) == n
            assert docs == [doc for doc in DOCS if doc in set(docs)]  # in their order
            entry = meta["splits"][split]
            assert entry["documents"] == n
            assert entry["tokens"] == len(data[split])
            assert entry["bytes"] == sum(len(doc.encode()) for doc in docs)
            assert entry["characters"] == sum(len(doc) for doc in docs)
        versions.add(tuple(bins(f"data/{meta['name']}")))
    assert len(versions) == 1


def test_the_toy_stories():
    _, data, tokenizer = make("toy", name="", num_stories=120, seed=5)
    assert all_texts(data, tokenizer) == sorted(toy_stories.texts(120, 5))
    assert files("data/toy") == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    write_txt("c.txt", DOCS)
    vals = {}
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        _, data, tokenizer = make(name=name, seed=seed)
        vals[name] = texts(data["val"], tokenizer)
    assert bins("data/a") == bins("data/b")
    for val in vals["c"], DOCS[-15:], DOCS[:15]:
        assert vals["a"] != val


def test_bpe_is_learned_from_the_training_split_alone():
    write_txt("c.txt", DOCS)
    meta, data, tokenizer = make()
    file_sha256 = hashlib.sha256(Path("data/d/tokenizer.json").read_bytes()).hexdigest()
    assert meta["tokenizer"]["sha256"] == tokenizer.sha256 == file_sha256
    assert tokenizer.sha256 == Tokenizer.train(texts(data["train"], tokenizer), 400).sha256
    assert tokenizer.sha256 != Tokenizer.train(DOCS, 400).sha256


@pytest.mark.parametrize("n", [15, 5000, 54321])
def test_one_document_is_cut_as_nanogpt_does(n):
    text = " \n\n" + "".join(random.Random(n).choices("abc \nZé日", k=n)) + "\u3000\n"
    write("c.txt", text)
    _, data, tokenizer = make(tokenizer="char")
    # nanoGPT's data/shakespeare_char/prepare.py, whose ids begin at 0 where our 0 is end-of-text
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    assert tokenizer.vocab_size == len(stoi) + 1
    for split, part in ("train", text[:cut]), ("val", text[cut:]):
        assert data[split].dtype == np.uint16
        assert (data[split] - 1).tolist() == [stoi[c] for c in part]


def test_a_few_documents_are_cut_by_characters_with_end_of_text_between_them():
    docs = make_docs(7)
    write_txt("c.txt", [f"  {d}\n" for d in docs])
    whole = "".join(docs)
    for fraction in 0.1, 0.5, 1 - len(docs[0]) / len(whole):
        meta, data, tokenizer = make(val_fraction=fraction, overwrite=True)
        ids = np.concatenate([data["train"], data["val"]])
        assert tokenizer.decode(ids.tolist()) == SEPARATOR.join(docs)
        assert (ids == tokenizer.eot).sum() == 6
        train, val = meta["splits"]["train"], meta["splits"]["val"]
        assert train["characters"] == int(len(whole) * (1 - fraction))
        assert train["bytes"] + val["bytes"] == len(whole.encode())


def test_from_100_documents_on_they_stay_whole(capsys):
    for n in 99, 100:
        write_txt("c.txt", DOCS[:n])
        _, data, tokenizer = make(name=f"n{n}")
        notice = "fewer than 100 documents (99): the last 10% of the text" in capsys.readouterr().out
        ends_whole = data["train"][-1] == tokenizer.eot
        assert notice == (n == 99)
        assert ends_whole == (n == 100)


def test_newlines_byte_order_marks_and_white_space_change_nothing():
    docs = [f"line {i}\nline\n\n  indented" for i in range(100)]
    write_txt("c.txt", docs)
    make(name="plain")
    text = f"\n\u3000{SEPARATOR}{SEPARATOR}\n".join(docs).replace("\n", "\r\n")
    write("c.txt", f"\ufeff{SEPARATOR} \n\t{text}\r\n ")
    make(name="odd")
    assert bins("data/plain") == bins("data/odd")
    lines = "\n".join(json.dumps({"text": text}) for text in [*docs, "", " \n", None])
    write("c.jsonl", lines.replace(": ", ":\r") + "\n\n")
    make("c.jsonl", name="json")
    assert bins("data/plain") == bins("data/json")


def test_another_separator_and_none():
    write_txt("c.txt", DOCS, "-- cut here --")
    _, data, tokenizer = make(separator="-- cut here --")
    assert all_texts(data, tokenizer) == sorted(DOCS)
    docs = [text + SEPARATOR for text in DOCS]
    for i, text in enumerate(docs):
        write(f"many/{i:03}.txt", text)
    _, data, tokenizer = make("many", separator="", overwrite=True)
    assert all_texts(data, tokenizer) == sorted(docs)
    assert (data["train"] == tokenizer.eot).sum() == 135  # text that spells end-of-text is text


def test_a_separator_may_be_an_empty_line():
    """As a shell gives it: \\n is a new line, as in train.py's and sample.py's start."""
    docs = [f"{i} is a number\nand this a line" for i in range(120)]
    write_txt("c.txt", docs, "\n\n")
    _, data, tokenizer = make(separator=r"\n\n")
    assert all_texts(data, tokenizer) == sorted(docs)


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab\n", max_size=30), st.lists(st.integers(0, 30), max_size=6), st.text("ab\n", max_size=3)
)
@example("a\n\n\n\nb", [2, 3], "\n\n")
def test_split_text_is_str_split(text, cuts, separator):
    cuts = [0, *sorted(cuts), len(text)]
    chunks = [text[i:j] for i, j in zip(cuts, cuts[1:])]
    documents = text.split(separator) if separator else [text]
    assert list(readers.split_text(chunks, separator)) == documents


@settings(max_examples=300, deadline=None)
@given(st.text(" \n\t\r\x1c\x85\xa0\u2028\u3000ab1,'sé日", max_size=60), st.integers(1, 20))
@example("a  b", 1)
@example("aaaa\n\n\nbbb \n bb", 2)
def test_pieces_encode_as_the_whole(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CHUNK", size)
        pieces = list(prepare.cut_long([prepare.Piece("val", text, True)]))
    assert bool(pieces) == bool(text)
    ids = [i for piece in pieces for i in TOKENIZER.encode(piece.text)]
    assert ids == TOKENIZER.encode(text)
    # closed and counted at the last piece alone, encoded as a beginning at the first
    last = len(pieces) - 1
    assert [piece[2:] for piece in pieces] == [(i == last, i == 0, i == last) for i in range(last + 1)]


TOKENIZER = Tokenizer.train([" \n\n  a\u3000\u3000 b  'sa's 11,, \r\n\r\n é日  日"] * 2 + DOCS, 600)


def test_threads_and_chunks_change_nothing(monkeypatch):
    write_txt("c.txt", DOCS)
    write("one.txt", "\n".join(DOCS) * 3)
    make(name="plain", num_proc=1)
    make("one.txt", name="one", num_proc=1)
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    make(name="small", num_proc=4)
    make("one.txt", name="pieces", num_proc=4)
    assert bins("data/plain") == bins("data/small")
    assert bins("data/one") == bins("data/pieces")


def test_more_than_65536_tokens_take_uint32():
    text = "".join(map(chr, range(0x20000, 0x20000 + 70000)))
    write("c.txt", text)
    meta, data, tokenizer = make(tokenizer="char")
    assert tokenizer.vocab_size == 70001
    assert meta["dtype"] == "uint32"
    assert data["val"].dtype == np.uint32
    ids = np.concatenate([data["train"], data["val"]])
    assert tokenizer.decode(ids.tolist()) == text
    assert shards.id_type(65536).name == "uint16"
    assert shards.id_type(65537).name == "uint32"


def test_a_tokenizer_can_be_reused():
    write_txt("c.txt", DOCS)
    _, _, tokenizer = make(name="a")
    write_txt("other.txt", make_docs(120, seed=1))
    meta, _, reused = make("other.txt", name="b", tokenizer="data/a/tokenizer.json")
    assert meta["tokenizer"]["sha256"] == reused.sha256 == tokenizer.sha256
    # the same in GPT-2's two files
    model = json.loads(tokenizer.to_str())["model"]
    write("gpt2/encoder.json", json.dumps(model["vocab"]))
    write("gpt2/vocab.bpe", "\n".join(["#version: 0.2", *model["merges"]]) + "\n")
    _, _, reused = make("other.txt", name="c", tokenizer="gpt2:gpt2")
    assert reused.sha256 == tokenizer.sha256


def test_a_dataset_is_named_after_its_source_and_stays_in_data():
    for dataset, name in (
        ("toy", "toy"),
        ("tinystories", "tinystories"),
        ("a/b.txt", "b"),
        ("a/b.c.jsonl", "b.c"),
        ("a/b", "b"),
        ("a/b/", "b"),
        ("a/b/*.txt", "b"),
        ("a/b/**/c?/*.txt", "b"),
        ("hf:me/thing", "thing"),
        ("hf:me/thing:small", "thing"),
        ("hf:thing", "thing"),
    ):
        assert Config(dataset=dataset).name == name
    assert Config(dataset="x", name="y").name == "y"
    for name in "..", ".", ".x", "a/b", "a\\b", "../x", "/x", "c:x", "a\nb", "a\0b":
        with pytest.raises(ValueError, match="name"):
            Config(name=name)


def test_main_prints_the_sizes_of_both_splits(capsys):
    write_txt("c.txt", DOCS)
    prepare.main(Config(dataset="c.txt", name="d", vocab_size=300))
    meta = json.loads(Path("data/d/meta.json").read_text(encoding="utf-8"))
    out = capsys.readouterr().out
    for entry in meta["splits"].values():
        documents, tokens, size = entry["documents"], entry["tokens"], entry["bytes"]
        ratio = f"{size / tokens:.3f} bytes a token"
        assert f"{documents} documents, {tokens:,} tokens, {size:,} bytes, {ratio}" in out
    assert re.search(r"vocabulary of 300 \(bpe\), [\d.]+ s, [\d.]+ MB/s\n$", out)


# ---- a folder's own splits

PEER_NAMES = [
    "train.txt",
    "train-00000-of-00002.txt",
    "my_train_file.txt",
    "training.txt",
    "train2.txt",
    "validation-00000-of-00001.txt",
    "a.valid.txt",
    "val.txt",
    "dev 1.txt",
    "test.txt",
    "x-testing.txt",
    "eval_9.txt",
    "evaluation.txt",
    "trained.txt",
    "tests.txt",
    "devel.txt",
    "story.txt",
    "latest.txt",
    "README.md",
    ".train.txt",
]
PEER_FOLDERS = [
    "train",
    "a/my-dev",
    "valid_1/b",
    "test/deep/er",
    ".git/train",
    "__MACOSX/train",
    "tests/training",
]


def splits_of_datasets(folder):
    """Returns {split: paths} as the library datasets finds them."""
    peer = pytest.importorskip("datasets.data_files")
    patterns = peer.get_data_patterns(str(folder))
    found = peer.DataFilesDict.from_patterns(patterns, str(folder))
    return {split: {Path(file) for file in files} for split, files in found.items()}


def test_each_name_is_in_the_split_that_datasets_puts_it_in():
    names = [name for name in PEER_NAMES if name not in ("README.md", ".train.txt")]
    for i, name in enumerate(names):
        folder = Path(f"{i}").resolve()
        write(folder / name, "x")
        [(split, _)] = splits_of_datasets(folder).items()
        ours = sources.named_split(Path(name))
        assert {"": "train", "val": "validation"}.get(ours, ours) == split, name


@pytest.mark.parametrize("seed", range(12))
def test_folders_are_split_as_datasets_splits_them(seed):
    rng = random.Random(seed)
    folder = Path("f").resolve()
    if seed % 2:  # the files' names say it
        names = ["train.txt", *rng.sample(PEER_NAMES, 9)]
        names += [f"sub/{name}" for name in rng.sample(PEER_NAMES, 4)]
    else:  # the folders' names do
        names = ["train/0.txt"]
        for part in PEER_FOLDERS:
            names += [f"{part}/{i}.txt" for i in range(rng.randrange(3))]
    for name in names:
        write(folder / name, "x")
    peer = splits_of_datasets(folder)
    ours = sources.named_splits(folder.rglob("*"), folder)
    for split, full_name in ("train", "train"), ("val", "validation"), ("test", "test"):
        assert set(ours[split]) == peer.get(full_name, set())


def test_where_datasets_is_of_no_help():
    assert sources.named_split(Path("Test/A.TXT")) == "test"
    assert sources.named_split(Path("train_dev.txt")) == "val"  # in both splits for datasets
    assert sources.named_split(Path("train-test-split/train/a.txt")) == "train"
    assert sources.named_split(Path("train/test.txt")) == "train"
    for name in "story.txt", "val.txt", "README.md":  # datasets would have no training data
        write(f"a/{name}", "x")
    splits = sources.named_splits(Path("a").rglob("*"), Path("a"))
    names = {split: [path.name for path in paths] for split, paths in splits.items()}
    assert names == {
        "train": ["story.txt"],
        "val": ["val.txt"],
        "test": [],
        "": [],
        "card": ["README.md"],
    }
    write("b/README.md", "a text")
    assert sources.named_splits(Path("b").rglob("*"), Path("b"))["train"] == [Path("b/README.md")]


def origins(meta):
    """Returns {split: source} of a meta.json."""
    return {split: entry["source"] for split, entry in meta["splits"].items()}


def test_a_cloned_dataset(capsys):
    write("wiki/README.md", "the card")
    write("wiki/dataset_infos.json", "{}")
    write("wiki/.git/x.txt", "hidden")
    write("wiki/notes.txt", "in no split")
    for i in range(12):
        write_parquet(f"wiki/data/train-{i:05}-of-00012.parquet", DOCS[i * 10 : i * 10 + 10])
    write_jsonl("wiki/data/validation-00000-of-00001.jsonl", DOCS[120:130])
    write_jsonl("wiki/data/test-00000-of-00001.jsonl", DOCS[130:])
    meta, data, tokenizer = make("wiki")
    assert texts(data["train"], tokenizer) == DOCS[:120]
    assert texts(data["val"], tokenizer) == DOCS[120:130]
    assert tokenizer.sha256 == Tokenizer.train(DOCS[:120], 400).sha256
    names = ", ".join(f"data/train-{i:05}-of-00012.parquet" for i in range(10))
    train = f"12 files: {names} and 2 more"
    val = "1 file: data/validation-00000-of-00001.jsonl"
    left_out = "4 files: data/test-00000-of-00001.jsonl, notes.txt, README.md, dataset_infos.json"
    lines = f"wiki: train, {train}\nwiki: val, {val}\nwiki: left out, {left_out}\n"
    assert capsys.readouterr().out == lines
    assert origins(meta) == {"train": f"wiki, {train}", "val": f"wiki, {val}"}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_pattern_is_the_folder_of_what_it_matches(suffix, capsys):
    for folder in "all", "some":
        for i in range(5):
            path = Path(f"{folder}/{i}/part-{i:03}{suffix}")
            docs = DOCS[i * 30 : i * 30 + 30]
            if suffix == ".parquet":
                write_parquet(path, docs)
                continue
            write_jsonl(path, docs)
            if suffix == ".jsonl.gz":
                path.write_bytes(gzip.compress(path.read_bytes()))
            elif suffix == ".jsonl.zst":
                path.write_bytes(zstd(path.read_bytes()))
    write("some/0/notes.xml", "not read")
    write("some/0/other.txt", "not matched")
    make("all", name="folder")
    capsys.readouterr()
    for matching in "*/part-*", "**/*", "**/**/*", "[0-4]/part-00?":
        pattern = f"some/{matching}{suffix}"
        meta, _, _ = make(pattern, name="", overwrite=True)
        assert meta["name"] == "some"
        names = ", ".join(f"{i}/part-{i:03}{suffix}" for i in range(5))
        assert f"{pattern}: train and val, 5 files: {names}\n" in capsys.readouterr().out
        assert origins(meta)["train"] == f"{pattern}, 5 files: {names}; the rest"
        assert bins("data/some") == bins("data/folder")


def test_the_splits_of_a_pattern():
    write_parquet("f/train-00000.parquet", DOCS[:60])
    write_parquet("f/train-00001.parquet", DOCS[60:120])
    write_parquet("f/validation-00000.parquet", DOCS[120:130])
    write_parquet("f/test-00000.parquet", DOCS[130:])
    _, data, tokenizer = make("f/*.parquet", name="d")
    assert texts(data["train"], tokenizer) == DOCS[:120]
    assert texts(data["val"], tokenizer) == DOCS[120:130]
    _, data, tokenizer = make("f/train-*.parquet", name="e", val_dataset="f/t*-00000.parquet")
    assert texts(data["train"], tokenizer) == DOCS[:120]
    assert texts(data["val"], tokenizer) == DOCS[130:]  # there is a test split, and no validation split
    message = (
        "f/test*: no file to train on, only 1 file: test-00000.parquet; name a file or a folder in it"
    )
    assert refusal(make, "f/test*", name="g") == message
    assert refusal(make, "f/*.jsonl", name="g") == "f/*.jsonl matches no file"
    write("f/a.xml", "x")
    assert "f/*.xml: no file here ends in .txt" in refusal(make, "f/*.xml", name="g")
    write_txt("odd[1].txt", DOCS)  # a name that is there is no pattern
    _, data, tokenizer = make("odd[1].txt", name="")
    assert all_texts(data, tokenizer) == sorted(DOCS)
    write_txt("odd[1]/a.txt", DOCS[:120])  # nor is that of a folder before one
    write_txt("odd1/a.txt", DOCS[120:])
    meta, data, tokenizer = make("odd[1]/*.txt", name="h")
    assert all_texts(data, tokenizer) == sorted(DOCS[:120])
    assert origins(meta)["train"].startswith("odd[1]/*.txt, 1 file: a.txt; ")


def test_val_dataset_is_the_validation_split(capsys, hub):
    for i, part in enumerate(("train", "dev", "test")):
        write_txt(f"own/{part}.txt", DOCS[i * 20 : i * 20 + 20])
    write_txt("tested/test.txt", DOCS[60:70])
    write_txt("tested/train.txt", DOCS[70:80])
    write_txt("plain/a.txt", DOCS[80:90])
    write_csv("val.csv", DOCS[90:100])
    hub.splits = {"train": rows(DOCS[:3]), "validation": rows(DOCS[100:110]), "test": rows(DOCS[:4])}
    cases = [
        ("own", DOCS[20:40], "own, 1 file: dev.txt"),
        ("tested", DOCS[60:70], "tested, 1 file: test.txt"),
        ("plain", DOCS[80:90], "plain, 1 file: a.txt"),
        ("val.csv", DOCS[90:100], "val.csv"),
        ("hf:me/thing", DOCS[100:110], "hf:me/thing, split validation"),
    ]
    for val_dataset, docs, source in cases:
        meta, data, tokenizer = make("own", name="d", val_dataset=val_dataset, overwrite=True)
        assert texts(data["train"], tokenizer) == DOCS[:20]
        assert texts(data["val"], tokenizer) == docs
        assert meta["splits"]["val"]["source"] == source
        assert meta["val_source"] == val_dataset
    out = capsys.readouterr().out
    assert "own: left out, 2 files: dev.txt, test.txt" in out
    assert "tested: val, 1 file: test.txt" in out
    assert files("data/d") == sorted(path.name for path in Path("data/d").glob("*.*"))
    hub.splits = {"test": rows(DOCS[:4])}
    _, data, tokenizer = make("own", name="tested", val_dataset="hf:me/thing")
    assert texts(data["val"], tokenizer) == DOCS[:4]
    hub.splits = {"other": rows(DOCS[:4])}
    message = "me/thing has no split validation or test or train, only: other"
    assert refusal(make, "own", name="e", val_dataset="hf:me/thing") == message
    message = "no file or folder nowhere; a dataset of the Hugging Face hub is --val_dataset=hf:NAME"
    assert message in refusal(make, "own", name="e", val_dataset="nowhere")
    write("empty.txt", " ")
    assert refusal(make, "own", name="e", val_dataset="empty.txt") == "empty.txt: there is no text in it"


def test_where_the_split_is_a_share_meta_says_which():
    write_txt("c.txt", DOCS)
    write_txt("few/a.txt", DOCS[:9])
    meta, _, _ = make()
    assert origins(meta) == {"train": "c.txt; the rest", "val": "c.txt; 10% of the documents"}
    meta, _, _ = make("few", name="e", val_fraction=0.25)
    few = "few, 1 file: a.txt"
    assert origins(meta) == {"train": f"{few}; the rest", "val": f"{few}; the last 25% of the text"}


def test_a_folder_without_a_text_to_train_on():
    write("f/val.txt", "a")
    write("f/b/test.txt", "a")
    message = "f: no file to train on, only 2 files: val.txt, b/test.txt; name a file or a folder in it"
    assert refusal(make, "f") == message
    write("f/none/a.xml", "a")
    assert "f/none: no file here ends in .txt" in refusal(make, "f/none")


# ---- .json, .csv, .gz, .zst and rows that are wrong


def test_what_csv_holds():
    long = 'x, "y"\nnext line ' * 20_000  # beyond the csv module's own limit of 131,072
    write_csv("c.csv", ["  a\r\nb ", long, "", "é日"], "story")
    rows = list(readers.csv_rows("c.csv"))
    assert rows[1] == ("c.csv row 2", {"id": "1", "story": long})
    cfg = Config(dataset="c.csv", column="story")
    assert list(readers.documents(["c.csv"], cfg)) == ["a\r\nb", long.strip(), "é日"]
    write("c.csv", "\ufeff\n\nid,text\n\n1,one\n\n2,two")
    assert list(readers.documents(["c.csv"], Config(dataset="c.csv"))) == ["one", "two"]


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("c.csv", "id,text\n1,a\n2,Hello, world\n", "c.csv row 2 has 3 columns where the header has 2"),
        ("c.csv", "id,text\n1\n", "c.csv row 1 has 1 columns where the header has 2"),
        ("c.csv", 'id,text\n1,a\n2,"b\n3,c\n', "c.csv row 2 is not CSV (unexpected end of data)"),
        ("c.csv", 'id,text\n1,"a"b\n', "c.csv row 1 is not CSV ("),
        (
            "c.csv",
            "id,words\n1,a\n",
            "c.csv has no column 'text'; prepare.py --column= chooses from: id, words",
        ),
        ("c.csv", "", "c.csv: there is no text in it"),
        ("c.json", '{"text": "a"}', "c.json is not an array of rows but a dict"),
        ("c.json", '{"text": "a"}\n{"text": "b"}\n', "; one row a line is .jsonl"),
        ("c.json", '["a", 5]', "c.json row 2 has no column 'text'"),
        ("c.json", '["a", "\\ud83d"]', "c.json row 2 is not text but '\\ud83d'"),
        ("c.json", '[{"text": "a"}, {"text": 5}]', "c.json row 2: column 'text' is not text but 5"),
        ("c.json", "[", "c.json is not JSON ("),
    ],
)
def test_rows_that_are_wrong_are_named(file, text, message):
    write(file, text)
    assert message in refusal(make, file)
    Path(f"{file}.gz").write_bytes(gzip.compress(text.encode()))
    assert message.replace(file, f"{file}.gz") in refusal(make, f"{file}.gz")


def test_a_parquet_refusal_names_the_row():
    write_parquet("c.parquet", DOCS)
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = pa.array([b"a"] * 130 + [b"\xff"] + [b"b"], pa.binary())
    pq.write_table(pa.table({"text": texts}), "c.parquet")
    assert refusal(make, "c.parquet").startswith("c.parquet row 1: column 'text' is not text but b'a'")
    rows = list(readers.parquet_rows("c.parquet"))
    assert rows[130] == ("c.parquet row 131", {"text": b"\xff"})


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_packed_file_that_is_cut_off_or_damaged_is_refused(pack):
    suffix = ".gz" if pack is gzip.compress else ".zst"
    plain = "".join(json.dumps({"text": text}) + "\n" for text in DOCS).encode()
    packed = pack(plain)
    for name, data in {
        "cut": packed[:-1],
        "half": packed[: len(packed) // 2],
        "head": packed[:3],
        "plain": plain,
        "more": packed + b"more",
    }.items():
        Path(f"{name}.jsonl{suffix}").write_bytes(data)
        assert f"cannot read {name}.jsonl{suffix}: " in refusal(make, f"{name}.jsonl{suffix}")
    Path(f"twice.jsonl{suffix}").write_bytes(packed + packed)
    assert len(list(readers.documents([f"twice.jsonl{suffix}"], Config()))) == 300
    Path(f"bad.txt{suffix}").write_bytes(pack(b"caf\xe9 " * 10))
    place = "byte 0xe9 at offset 3;" if suffix == ".gz" else "byte 0xe9;"
    assert f"bad.txt{suffix} is not UTF-8: {place}" in refusal(make, f"bad.txt{suffix}")


# ---- next to nothing


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
@pytest.mark.parametrize(
    "docs, fraction, message",
    [
        (
            ["a"],
            0.1,
            "c.txt: 10% for validation leave the train split none of its 1 characters: give more",
        ),
        (
            ["ab cd ef gh"],
            0.001,
            "c.txt; the last 0.1% of the text: the val split has 1 tokens and needs 2: give",
        ),
        (DOCS[:100], 0.001, "c.txt: 0.1% for validation leave the val split none of its 100 documents"),
        (
            DOCS[:100],
            0.999,
            "c.txt: 99.9% for validation leave the train split none of its 100 documents",
        ),
    ],
)
def test_a_text_that_leaves_next_to_nothing(tokenizer, docs, fraction, message):
    write_txt("c.txt", docs)
    assert message in refusal(make, tokenizer=tokenizer, val_fraction=fraction)
    assert files("data") == []


def test_next_to_nothing_in_a_split_of_its_own():
    write_txt("f/train.txt", DOCS)
    write("f/val.txt", " \n")
    assert refusal(make, "f") == "f, 1 file: val.txt: there is no text in it"
    write("f/val.txt", "a")
    meta, _, _ = make("f")
    assert meta["splits"]["val"]["tokens"] == 2  # the letter and end-of-text


def test_the_progress_bar_covers_learning_and_encoding():
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    write("c.txt", "".join(random.Random(0).choices("ACGT", k=50_000)))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # tqdm has no room for a bar in the 0 that it starts with
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--dataset=c.txt", "--vocab_size=400"], stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # of Linux, at the end
        while data := os.read(ours, 10_000):
            shown += data
    os.close(ours)
    assert process.wait() == 0
    for bar in b"learning words: ", b"learning merges: ", b"encoding: ":
        assert bar in shown


# ---- memory


def test_reading_holds_one_document(monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 1 << 16)
    docs = ["x" * 99] * 30_000
    write_txt("c.txt", docs)
    write_jsonl("c.jsonl", docs)
    for file in "c.txt", "c.jsonl":
        tracemalloc.start()
        n = sum(1 for _ in readers.documents([Path(file)], Config(dataset=file)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert n == 30_000
        assert peak < 1e6, file  # the files have 3 MB


def test_reading_parquet_holds_no_group_of_rows():
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    docs = [random.Random(i).randbytes(5000).hex() for i in range(3000)]  # 30 MB that cannot be packed
    pq.write_table(pa.table({"text": docs}), "c.parquet", use_dictionary=False)
    assert pq.read_metadata("c.parquet").num_row_groups == 1
    before = pa.total_allocated_bytes()
    most = 0
    for i, text in enumerate(readers.documents([Path("c.parquet")], Config())):
        assert text == docs[i]
        most = max(most, pa.total_allocated_bytes() - before)
    assert i == 2999
    assert most < 20e6


def test_encoding_reads_only_so_far_ahead(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    num_read = num_encoded = most_ahead = 0

    def pieces():
        nonlocal num_read, most_ahead
        for _ in range(2000):
            num_read += 1
            most_ahead = max(most_ahead, num_read - num_encoded)
            yield prepare.Piece("train", "x" * 100, True)

    def encode_batch(texts, num_threads):
        nonlocal num_encoded
        num_encoded += len(texts)
        return [[1]] * len(texts)

    tokenizer = SimpleNamespace(vocab_size=2, eot=0, head=[], encode_batch=encode_batch)
    cfg = Config(num_proc=1)
    splits = prepare.encode(pieces(), tokenizer, cfg, prepare.Progress(tmp_path, "d", {}))
    assert splits["train"]["tokens"] == 4000
    assert most_ahead <= 40


# ---- nothing half done is accepted

DAMAGE = {
    "meta.json": [
        lambda p: p.unlink(),
        lambda p: p.write_text("{"),
        lambda p: p.write_text("[]"),
        lambda p: p.write_text("{}"),
        lambda p: p.write_text("7"),
        lambda p: p.write_bytes(b"\xff"),
        lambda p: p.write_text("[" * 100000),
        lambda p: edit(p, format=3),
        lambda p: edit(p, dtype="uint32"),
        lambda p: edit(p, vocab_size="many"),
        lambda p: edit(p, splits=[]),
        lambda p: edit(p, splits={"train": {}, "val": {}}),
        lambda p: edit(p, tokenizer=None),
        *(
            lambda p, key=key, number=number: edit_val(p, key, number)
            for key, number in [
                ("tokens", 0),
                ("tokens", 1),
                ("tokens", -7),
                ("documents", 0),
                ("characters", 0),
                ("bytes", 0),
                ("bytes", -1),
                ("bytes", 1.5),
                ("bytes", float("inf")),
                ("bytes", True),
                ("bytes", "7"),
                ("bytes", None),
            ]
        ),
    ],
    "tokenizer.json": [lambda p: p.unlink(), lambda p: p.write_text("{}"), lambda p: TOKENIZER.save(p)],
    "train.bin": [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-2]),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(p.read_bytes() + b"\0\0"),
        lambda p: p.write_bytes(b"\1" + p.read_bytes()[1:]),
        lambda p: large_id(p),
        lambda p: wrong_numbers_of_tokens(p),
    ],
    "val.bin": [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\1"),
        lambda p: p.write_bytes(p.read_bytes()[:-2]),
    ],
}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_val(path, key, number):
    splits = json.loads(path.read_text())["splits"]
    edit(path, splits=splits | {"val": splits["val"] | {key: number}})


def large_id(path):
    """Writes an id past the vocabulary, and a meta.json that agrees with it."""
    ids = np.fromfile(path, "<u2")
    ids[7] = 400
    path.write_bytes(ids.tobytes())
    meta_path = path.with_name("meta.json")
    splits = json.loads(meta_path.read_text())["splits"]
    splits["train"]["files"][0]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    edit(meta_path, splits=splits)


def wrong_numbers_of_tokens(path):
    """Writes a meta.json with the right sums of the files but other numbers of tokens."""
    splits = {}
    for split in prepare.SPLITS:
        data = path.with_name(f"{split}.bin").read_bytes()
        splits[split] = {
            "tokens": 7,
            "documents": 1,
            "characters": 7,
            "bytes": 7,
            "files": [{"file": f"{split}.bin", "tokens": 7, "sha256": hashlib.sha256(data).hexdigest()}],
        }
    edit(path.with_name("meta.json"), splits=splits)


@pytest.mark.parametrize(
    "file, case", [(file, i) for file, cases in DAMAGE.items() for i in range(len(cases))]
)
def test_damage_is_refused_by_name(file, case, prepared):
    assert load(prepared)
    DAMAGE[file][case](prepared / file)
    message = refusal(load, prepared)
    assert message.startswith(f"{prepared / file}: ")
    assert "--overwrite" in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    write_txt(folder / "c.txt", DOCS)
    with contextlib.chdir(folder):
        make()
    return folder / "data" / "d"


@pytest.fixture
def prepared(original, tmp_path):
    (tmp_path / "copy").mkdir()
    for path in original.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "copy"


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import prepare, tokenizer, os, pathlib
def deadly(function, calls=[0]):
    def called(*args):
        calls[0] += 1
        if calls[0] == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return called
{target} = deadly({target})
prepare.prepare(prepare.Config(dataset="c.txt", name="d", vocab_size=300, overwrite={overwrite}))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    "target, call, overwrite",
    [
        ("tokenizer.Tokenizer.encode", 70, False),
        ("os.fsync", 2, False),
        ("tokenizer.Tokenizer.to_str", 1, False),
        ("os.fsync", 4, False),
        ("pathlib.Path.rename", 1, False),
        ("os.fsync", 4, True),
        ("pathlib.Path.rename", 2, True),
    ],
)
def test_a_killed_run_leaves_nothing_under_the_name(target, call, overwrite):
    write_txt("c.txt", DOCS)
    if overwrite:
        make()
        before = bins()
    code = KILL.format(root=str(SCRIPT.parent), target=target, call=call, overwrite=overwrite)
    result = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert any(".d.tmp-" in name for name in files("data"))
    if overwrite:
        # between the two renames the older dataset has its other name
        [older] = [path for path in Path("data").iterdir() if not path.name.startswith(".")]
        assert bins(older) == before
        assert load(older)
    else:
        assert not Path("data/d").exists()
        assert "there is no dataset data/d" in refusal(load, "data/d")
        assert make()  # the remains are not in the way
        assert files("data") == ["d"]  # nor do they stay


def test_the_next_run_sweeps_what_dead_processes_left_and_nothing_else():
    write_txt("c.txt", DOCS)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    living = os.getppid()
    machine = folders.machine()
    swept = [
        f".d.tmp-{ended.pid}-3",
        f".d.tmp-{machine}-{ended.pid}-1234567890123456789",
        f".d.tmp-{machine}-{os.getpid()}-1",  # of a killed process of this number, as in a container
    ]
    left = [
        f".d.tmp-{machine}-{living}-1",
        f".d.tmp-{living}-1",
        f".d.tmp-{machine}-{os.getpid()}-{time.time_ns()}",  # of another thread
        f".d.tmp-0badcafe-{ended.pid}-1",  # of another machine on a shared disk
        f".dd.tmp-{ended.pid}-1",  # of other names
        f".d.x.tmp-{ended.pid}-1",
        f".d.tmp-{ended.pid}-1.tmp-{ended.pid}-1",
        f".d.tmp-{ended.pid}",
        f".d.tmp-me-{ended.pid}-1",
        f"d.tmp-{ended.pid}-1",
    ]
    for name in swept + left:
        write(f"data/{name}/train.bin", "half a split")
    make()
    assert files("data") == sorted([*left, "d"])
    for name in swept:
        write(f"data/{name}/train.bin", "half a split")
    make("toy", name="d[1]", num_stories=120)  # a name is no pattern
    make(overwrite=True)
    names = [name for name in files("data") if ".old-" not in name]
    assert names == sorted([*left, "d", "d[1]"])


def test_processes_alive_and_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert folders.is_alive(os.getpid())
    assert folders.is_alive(process.pid)
    process.communicate(b"\n")
    assert not folders.is_alive(process.pid)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
def test_a_killed_process_is_dead_before_its_parent_asks():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    os.kill(process.pid, 0)
    assert not folders.is_alive(process.pid)
    process.wait()
    process.stdin.close()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError]
)
def test_a_failed_run_cleans_up(monkeypatch, error):
    write_txt("c.txt", DOCS)
    texts_encoded = []

    def fail_late(self, text):
        texts_encoded.append(text)
        if len(texts_encoded) == 70:
            raise error
        return [1]

    monkeypatch.setattr(Tokenizer, "encode", fail_late)
    with pytest.raises(Refusal if isinstance(error, OSError) else error) as e:
        make()
    assert files("data") == []
    if isinstance(error, OSError):
        assert e.value.status == 1
        assert "No space left" in str(e.value)


def test_an_existing_dataset_is_refused_or_moved_aside(capsys):
    write_txt("c.txt", DOCS)
    make()
    before = bins()
    assert "--overwrite" in refusal(make, vocab_size=300)
    assert bins() == before
    for n in 300, 350:
        make(vocab_size=n, overwrite=True)
    out = capsys.readouterr().out
    newest, oldest, older = sorted(Path("data").iterdir())
    assert newest.name == "d"
    for path in oldest, older:
        assert path.name.startswith("d.old-")
        assert str(path) in out
    assert bins(oldest) == before
    sizes = [load(path)[2].vocab_size for path in (oldest, older, newest)]
    assert sizes == [400, 300, 350]


def test_another_run_that_was_faster_is_not_overwritten(monkeypatch):
    write_txt("c.txt", DOCS)
    build = prepare.build

    def build_and_be_late(cfg, tmp):
        build(cfg, tmp)
        write("data/d/meta.json", "of the faster run")

    monkeypatch.setattr(prepare, "build", build_and_be_late)
    assert "another process has written data/d meanwhile: --overwrite prepares it anew" in refusal(make)
    assert files("data") == ["d"]
    assert files("data/d") == ["meta.json"]


def test_a_failed_overwrite_leaves_the_older_dataset():
    write_txt("c.txt", DOCS)
    make()
    before = bins()
    write("c.txt", " ")
    assert "no text" in refusal(make, overwrite=True)
    assert bins() == before
    assert files("data") == ["d"]


def test_a_text_that_changes_meanwhile_is_refused(monkeypatch):
    write_txt("c.txt", DOCS)
    train = Tokenizer.train

    def train_and_append(*args):
        tokenizer = train(*args)
        with open("c.txt", "a", encoding="utf-8") as f:
            f.write(" still downloading")
        return tokenizer

    monkeypatch.setattr(Tokenizer, "train", train_and_append)
    assert "changed while it was read" in refusal(make)


# ---- from a shell


def start(*argv, **env):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *argv],
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", "naïve ".encode() * 5000])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe6\x97", b"\xe6\x97 ", b"ok \xed\xa0\x80", b"\x80\xbf"])
def test_the_offset_of_a_bad_byte(before, bad):
    for size in [*range(20), 8189, 8190, 8191, 8192, 20000, 70001]:
        data = before + b"a" * size + bad
        Path("c.txt").write_bytes(data)
        with pytest.raises(UnicodeDecodeError) as e:
            data.decode("utf-8")
        message = refusal(list, readers.documents([Path("c.txt")], Config(dataset="c.txt")))
        assert f"byte 0x{data[e.value.start]:02x} at offset {e.value.start};" in message


def test_every_key_has_a_comment():
    lines = describe(prepare.__file__).split("keys:\n")[1].splitlines()
    assert len(lines) == len(fields(Config))
    for line in lines:
        assert re.fullmatch(r"  --\w+=.+?  +[^ ].*", line), line


# ---- the hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: .splits are its dataset's, at a .commit; .error is raised on the first request."""
    api = SimpleNamespace(splits={}, commit="1", error=None, requests=[])

    class RepositoryNotFoundError(Exception):
        pass

    class HfApi:
        def dataset_info(self, name, timeout):
            api.requests.append(name)
            if api.error:
                raise api.error
            return SimpleNamespace(sha=api.commit)

    def load_dataset_builder(name, config):
        api.requests.append((name, config))
        return SimpleNamespace(name="generator", as_streaming_dataset=lambda: api.splits)

    api.missing = RepositoryNotFoundError
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset_builder=load_dataset_builder)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=HfApi))
    monkeypatch.setitem(
        sys.modules,
        "huggingface_hub.errors",
        SimpleNamespace(RepositoryNotFoundError=RepositoryNotFoundError),
    )
    return api


def rows(docs, column="text"):
    """Yields a row for each document, as the hub's datasets do."""
    return ({"id": i, column: text} for i, text in enumerate(docs))


def test_a_hub_dataset_and_its_own_validation_split(hub):
    hub.splits = {"train": rows(DOCS[:20]), "validation": rows(DOCS[20:25]), "test": rows(["not this"])}
    _, data, tokenizer = make("tinystories", name="")
    assert hub.requests == ["roneneldan/TinyStories", ("roneneldan/TinyStories", None)]
    assert texts(data["train"], tokenizer) == DOCS[:20]
    assert texts(data["val"], tokenizer) == DOCS[20:25]
    assert tokenizer.sha256 == Tokenizer.train(DOCS[:20], 400).sha256
    assert files("data/tinystories") == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_hub_dataset_without_one_is_split_like_a_file(hub):
    write_txt("c.txt", DOCS)
    make(name="file")
    hub.splits = {"train": rows(DOCS, "story")}
    make("hf:me/thing:small", name="hub", column="story")
    assert hub.requests == ["me/thing", ("me/thing", "small")]
    assert bins("data/file") == bins("data/hub")


README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train-*
  - split: validation
    path: small/dev-*
- config_name: large
  data_files:
  - split: train_sft
    path: large/*
---
"""


@pytest.fixture
def cloned():
    """A dataset as the hub has them, with two subsets, in a folder that the library itself streams."""
    pytest.importorskip("datasets")
    for i in range(3):
        write_parquet(f"me/thing/small/train-{i}.parquet", DOCS[i * 40 : i * 40 + 40])
    write_parquet("me/thing/small/dev-0.parquet", DOCS[120:130])
    write_parquet("me/thing/large/0.parquet", DOCS)
    write("me/thing/README.md", README)
    return "hf:me/thing"


def test_subsets_and_splits_are_streamed(cloned):
    meta, data, tokenizer = make(cloned, name="", subset="small")
    assert meta["name"] == "thing"
    assert texts(data["train"], tokenizer) == DOCS[:120]
    assert texts(data["val"], tokenizer) == DOCS[120:130]
    assert origins(meta)["val"] == "hf:me/thing, split validation"
    make(f"{cloned}:small", name="colon")
    assert bins("data/colon") == bins("data/thing")

    meta, _, _ = make(cloned, subset="large", split="train_sft", name="large")
    write_txt("c.txt", DOCS)
    make(name="file")
    assert bins("data/large") == bins("data/file")
    assert origins(meta)["train"] == "hf:me/thing, split train_sft; the rest"

    write_jsonl("me/lines/train.jsonl", DOCS)  # which the library reads itself
    make("hf:me/lines", name="lines")
    assert bins("data/lines") == bins("data/file")

    _, data, tokenizer = make(cloned, subset="small", split="validation", name="dev")
    ids = np.concatenate([data["train"], data["val"]])
    assert tokenizer.decode(ids.tolist()) == SEPARATOR.join(DOCS[120:130])
    _, data, tokenizer = make("c.txt", val_dataset=f"{cloned}:small", name="other_val")
    assert texts(data["val"], tokenizer) == DOCS[120:130]


def test_subsets_and_splits_that_are_wrong(cloned):
    choices = "--subset= chooses from: small, large"
    assert refusal(make, cloned, name="d") == f"me/thing has several subsets; {choices}"
    assert refusal(make, cloned, name="d", subset="x") == f"me/thing has no subset x; {choices}"
    message = "me/thing has no split train, only: train_sft"
    assert refusal(make, cloned, name="d", subset="large") == message
    message = "me/thing has no split x, only: train, validation"
    assert refusal(make, cloned, name="d", subset="small", split="x") == message
    for values, message in (
        (
            {"dataset": "c.txt", "subset": "a"},
            "subset and split are of --dataset=hf:NAME, and dataset is 'c.txt'",
        ),
        (
            {"dataset": "toy", "split": "a"},
            "subset and split are of --dataset=hf:NAME, and dataset is 'toy'",
        ),
        (
            {"dataset": "hf:a/b:c", "subset": "c"},
            "hf:a/b:c names a subset already: leave out --subset=c",
        ),
        (
            {"dataset": "hf:a/b", "split": "train[:1%]"},
            "split 'train[:1%]': a part of one cannot be streamed, only all of train",
        ),
    ):
        with pytest.raises(ValueError) as e:
            Config(**values)
        assert str(e.value) == message
    assert not Path("data").exists() or files("data") == []


def test_a_stream_is_read_once_and_packed(hub, monkeypatch):
    def once():
        yield from rows(DOCS)

    hub.splits = {"train": once()}  # a generator, which gives nothing the second time
    write_txt("c.txt", DOCS)
    make(name="file")
    sizes = []
    count = prepare.count_documents

    def count_after_looking(*args, **kwargs):
        sizes.append(
            [path.stat().st_size for path in Path("data").glob(".hub.tmp-*/dataset/train.jsonl.zst")]
        )
        return count(*args, **kwargs)

    monkeypatch.setattr(prepare, "count_documents", count_after_looking)
    make("hf:me/thing", name="hub")
    assert bins("data/file") == bins("data/hub")
    [[size]] = sizes
    assert size < sum(map(len, DOCS)) / 2


def test_mistakes_with_the_hub_are_refused(hub):
    hub.splits = {"test": rows(DOCS)}
    assert "no split train, only: test" in refusal(make, "hf:a/b")
    hub.splits = {"train": rows(DOCS)}
    assert "--column= chooses from: id, text" in refusal(make, "hf:a/b", column="story")
    hub.error = ImportError("no such module")
    assert "pip install datasets" in refusal(make, "hf:a/b")
    hub.error = hub.missing("404")
    assert "hub has no dataset a/b" in refusal(make, "hf:a/b")
    hub.error = RuntimeError("out\nof order")
    message = "cannot read a/b from the Hugging Face hub (RuntimeError: out of order); "
    # finetune_lora.py, whose rows are no text, says the same
    message += "without a network, --dataset=FILE takes one of your own"
    assert message in refusal(make, "hf:a/b")
    assert files("data") == []


def test_a_library_of_the_hub_that_does_not_fit_another_is_one_line(hub, monkeypatch):
    write("libraries/datasets.py", "raise AttributeError('module pyarrow has no attribute x')")
    monkeypatch.syspath_prepend("libraries")
    monkeypatch.delitem(sys.modules, "datasets")
    message = "cannot read a/b from the Hugging Face hub (AttributeError: module pyarrow has no"
    assert message in refusal(make, "hf:a/b")


@pytest.mark.parametrize("limit", [1000, "all but the last byte"])
def test_a_disk_that_is_full_while_a_stream_is_written_is_not_the_hubs_fault(limit, hub, tmp_path):
    if limit != 1000:  # it fails where the file is closed
        path = sources.spool(DOCS, tmp_path / "whole/train.jsonl.zst", Config())
        limit = path.stat().st_size - 1
    hub.splits = {"train": rows(DOCS)}
    with file_size_limit(limit), pytest.raises(Refusal) as e:
        make("hf:a/b")
    assert e.value.status == 1
    assert str(e.value).startswith("cannot write data/d: ")
    assert "hub" not in str(e.value)


class NotFound(BaseHTTPRequestHandler):
    """Answers as the hub does for a dataset that it does not have."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_no_network_and_no_such_dataset_are_told_apart_in_seconds():
    pytest.importorskip("datasets")
    server = HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {"HF_HUB_OFFLINE": "0", "HF_HOME": "hf", "no_proxy": "127.0.0.1"}
    advice = ("without a network, --dataset=FILE",)
    processes = [
        (start("--dataset=hf:me/thing", **online | env), messages)
        for env, messages in (
            ({"HF_HUB_OFFLINE": "1"}, ("cannot read me/thing", *advice)),
            ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ("cannot read me/thing", *advice)),
            (
                {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"},
                ("hub has no dataset me/thing",),
            ),
        )
    ]
    for process, messages in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        assert err.count("\n") == 1
        assert all(message in err for message in messages), err
        if advice[0] not in messages:
            assert not all(words in err for words in advice)
    server.shutdown()
    server.server_close()
