"""Prepares a dataset: text -> data/NAME/{train.bin,val.bin,tokenizer.json,meta.json}, all or nothing.

    python prepare.py                                  # the toy stories (what train.py does by itself)
    python prepare.py --dataset=stories.txt --name=ts  # your own text, see below
    python prepare.py --dataset='texts/*.jsonl.zst'    # many files by a pattern, in quotes; ** is any folder
    python prepare.py --dataset=tinystories            # roneneldan/TinyStories from the Hugging Face hub
    python prepare.py --dataset=hf:NAME --subset=S --split=train  # another one there, or of a folder
    python prepare.py --dataset=tinyshakespeare.txt --tokenizer=char --name=shakespeare_char  # nanoGPT's
    python prepare.py --dataset=stories.txt --tokenizer=hf:gpt2  # for train.py --init_from=hf:gpt2

Your own text is a .txt, .md, .json, .jsonl, .csv or .parquet file, each also packed as .gz or .zst, a
folder of them, or a pattern that matches some. A .txt or .md file is cut into documents at the
separator; a row of the others holds one each: a line of .jsonl, an item of the array in .json, which may
be a mere text. White space around a document is dropped, and so is an empty document. Text is UTF-8; in
.txt and .md files "\\r\\n" and "\\r" become "\\n", as Python's open() has it and so nanoGPT.

The splits of a folder or a pattern are known as in the library datasets, by a word in the name of a file
or a folder in it: train or training; val, valid, validation or dev for the validation split; test,
testing, eval or evaluation, which is left out. Files without such a word are left out where others are
named train, else they are trained on. Left out, too, are README.md beside data, and hidden files.
--val_dataset= names another validation split, with all that --dataset= takes; where it has splits, its
validation, else its test, else its training split.

Where there is none, from 100 documents on, random ones are the validation split, and end-of-text follows
every document. With fewer, the last part of the text is the validation split (nanoGPT's cut), end-of-text
stands between documents only, and a document that is alone keeps its white space. Where prompts start
with another token than end-of-text (Llama's <s>), so does each document.

bpe is learned from the training split; char takes the characters of both, as nanoGPT. gpt2 is GPT-2's
own, gpt2:FOLDER one like it, of encoder.json and vocab.bpe. The text is read three times, with a
vocabulary that is there already twice, and only the document at hand is held (of .json and of packed
.parquet the file). A dataset of the hub is streamed once, to packed files beside data/NAME that are removed
at the end: room for a third of the text or so, and for the ids, is needed on the disk.

A split of more than --shard_mb is train_00000.bin, train_00001.bin and so on (shards.py). The same command
goes on where a run was killed or interrupted: it keeps the files that are finished, the vocabulary and
what is fetched as a whole, and begins anew where the settings or the text have changed.
"""

import csv
import glob
import gzip
import io
import json
import os
import re
import shutil
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from config import Refusal, hf_name, is_hf, run

# isort: split
import numpy as np
from tqdm import tqdm

import toy_stories
from folders import new_folder, sync, write_atomic
from interop.any_tokenizer import load_tokenizer
from shards import (
    SPLITS,
    ShardWriter,
    check_entries,
    check_file,
    id_type,
    name_shards,
    open_shards,
    strangers,
)
from tokenizer import Tokenizer

FORMAT = 2
FORMATS = (1, FORMAT)  # that load reads; 1 had one file a split
FEW = 100  # documents; a random tenth of fewer is a poor sample
FILES_SHOWN = 10
CHUNK = 1 << 20  # characters that a thread encodes at a time
MB = 10**6
STATE = "state.json"
PACKINGS = (".gz", ".zst")  # what may follow the suffix of each kind of file

# Where a text may be cut: before white space, as no token of GPT-2's split runs into it from the left.
# With any other tokenizer only after a letter or a digit: to Qwen's, ".\n" is one word.
BREAK = re.compile(r"(?<=\S)[ \n]")
BREAK_FOREIGN = re.compile(r"(?<=[^\W_])[ \n]")

# By these words the library `datasets` knows the splits of a folder (its data_files.py), and these files
# it leaves out. A name with words of two splits is one to hold out: what is held out is never trained on.
SPLIT_WORDS = {
    "test": ("test", "testing", "eval", "evaluation"),
    "val": ("val", "valid", "validation", "dev"),
    "train": ("train", "training"),
}
CARDS = ("readme.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
HELD_OUT = ("val", "test", "train")  # which split of --val_dataset is taken: the first that is there


@dataclass
class Config:
    dataset: str = "toy"  # toy | tinystories | hf:NAME | a file, a folder or a pattern
    val_dataset: str = ""  # the same for the validation split; empty: the dataset's own or a share of it
    subset: str = ""  # of hf:NAME: its configuration, where it has several; also hf:NAME:SUBSET
    split: str = ""  # of hf:NAME: what is trained on; empty: train
    name: str = ""  # the result is data/NAME; empty: the dataset's own name
    tokenizer: str = "bpe"  # bpe | char | gpt2 | gpt2:FOLDER | hf:FOLDER_OR_NAME | FILE.json to reuse
    vocab_size: int = 4096  # bpe: at most so many tokens, end-of-text and the 256 bytes among them
    separator: str = "<|endoftext|>"  # between documents of .txt and .md; empty: a file is one
    column: str = "text"  # where .json, .jsonl, .csv, .parquet and hub rows have their text
    val_fraction: float = 0.1  # of the documents, or of the text where they are fewer than 100
    num_stories: int = 30000  # toy
    num_proc: int = 0  # threads that encode; 0: one a core; the tokenizers library adds its own to them
    shard_mb: int = 200  # MB of a file at most, as llm.c's; a split that needs more is in several
    seed: int = 1337  # of the split, and of toy
    overwrite: bool = False  # replace data/NAME; the old one is kept beside it

    def __post_init__(self):
        if not hf_name(self.dataset):
            raise ValueError(
                "dataset is empty: give a file, a folder, toy, tinystories or hf:NAME, "
                "such as hf:roneneldan/TinyStories"
            )
        if self.val_dataset and not hf_name(self.val_dataset):
            raise ValueError("val_dataset is hf: without a NAME")
        if (self.subset or self.split) and not is_hf(self.dataset):
            raise ValueError(
                f"subset and split are of --dataset=hf:NAME, and dataset is {self.dataset!r}"
            )
        if self.subset and ":" in hf_name(self.dataset):
            raise ValueError(f"{self.dataset} names a subset already: leave out --subset={self.subset}")
        if "[" in self.split:
            whole = self.split.partition("[")[0]
            raise ValueError(
                f"split {self.split!r}: a part of one cannot be streamed, only all of {whole}"
            )
        if not self.name:
            self.name = dataset_name(self.dataset)
        name = self.name
        if not name or name.startswith(".") or not name.isprintable() or set(name) & set('/\\:*?"<>|'):
            raise ValueError(f"name {name!r} cannot be a folder in data/: give another with --name=")
        is_kind = self.tokenizer in ("bpe", "char", "gpt2")
        is_path = (
            self.tokenizer.startswith("gpt2:")
            or self.tokenizer.endswith(".json")
            or is_hf(self.tokenizer)
        )
        if not is_kind and not is_path:
            raise ValueError(
                "tokenizer must be bpe, char, gpt2, gpt2:FOLDER, hf:FOLDER_OR_NAME or a tokenizer.json, "
                f"not {self.tokenizer!r}"
            )
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        for key, least in (("num_stories", 1), ("num_proc", 0), ("shard_mb", 1), ("seed", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, not {getattr(self, key)}")
        if self.num_proc > 1024:
            raise ValueError(f"num_proc must be at most 1024, not {self.num_proc}")


def dataset_name(dataset):
    """Returns "stories" for a/stories.txt, a/stories, a/stories/*.txt, hf:me/stories and hf:me/stories:CONFIG."""
    if is_hf(dataset):
        repo = hf_name(dataset).partition(":")[0]
        return repo.rstrip("/").rpartition("/")[2]
    if is_pattern(dataset):
        return Path(os.path.abspath(base_folder(dataset))).name
    path = Path(os.path.abspath(dataset))
    return unpacked(path).stem if file_kind(path) else path.name


# ---- reading documents


def unpacked(path):
    """Returns the path without .gz or .zst."""
    path = Path(path)
    return path.with_suffix("") if path.suffix.lower() in PACKINGS else path


def file_kind(path):
    """Returns the suffix in READERS that a file's name ends in, before .gz or .zst; "" for any other."""
    suffix = unpacked(path).suffix.lower()
    return suffix if suffix in READERS else ""


@contextmanager
def opened_bytes(path):
    """Opens a file to read its bytes, of .gz and .zst those inside. Raises Refusal, also in the with."""
    packing = Path(path).suffix.lower()
    try:
        if packing == ".gz":
            f = gzip.open(path)
        elif packing == ".zst":
            f = open_zstd(path)
        else:
            f = open(path, "rb")
        with f:
            yield f
    except (OSError, EOFError, zlib.error) as e:
        raise Refusal(f"cannot read {path}: {getattr(e, 'strerror', None) or e}")


def open_zstd(path):
    """Opens a .zst file to read the bytes inside; one that is cut off is an OSError.

    pyarrow has that, which is there for .parquet; the package zstandard takes what is cut off for the end.
    """
    try:
        import pyarrow
    except ImportError:
        raise Refusal(f"reading {path} needs pyarrow: pip install pyarrow")
    return pyarrow.input_stream(str(path), compression="zstd")


@contextmanager
def opened(path, newline=None):
    """Opens a file of text without its byte-order mark. Raises Refusal where it is not UTF-8."""
    with opened_bytes(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline=newline) as f:
        try:
            yield f
        except UnicodeDecodeError as e:
            place = f"byte 0x{e.object[e.start]:02x}"
            if binary.seekable():
                # e.object ends where the file is read to
                place += f" at offset {binary.tell() - len(e.object) + e.start}"
            raise Refusal(f"{path} is not UTF-8: {place}; save it as UTF-8")


def split_text(chunks, separator):
    """Yields what "".join(chunks).split(separator) has, one by one; an empty separator never splits."""
    head = []  # the part at hand but for its tail, in strings that no separator reaches into
    tail = ""
    for chunk in chunks:
        *parts, tail = (tail + chunk).split(separator) if separator else [tail + chunk]
        for part in parts:
            yield "".join(head) + part
            head = []
        safe = max(0, len(tail) - len(separator) + 1)  # what comes after may be a separator's beginning
        head.append(tail[:safe])
        tail = tail[safe:]
    text = "".join([*head, tail])
    del head, tail  # this may be all there is, so it should not be there twice
    yield text


def read_text(path, cfg):
    with opened(path) as f:
        yield from split_text(iter(partial(f.read, CHUNK), ""), cfg.separator)


def jsonl_rows(path):
    """Yields (place, value) of each line that is not blank; place is for messages. Raises Refusal."""
    with opened(path, newline="\n") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            place = f"{path} line {n}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise Refusal(f"{place} is not JSON ({e}); .jsonl has one object a line")
            yield place, row


def read_jsonl(path, cfg):
    return column_texts(jsonl_rows(path), cfg.column)


def json_rows(path):
    """Returns (place, row) of the rows of a .json file. Raises Refusal."""
    with opened(path) as f:
        text = f.read()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        advice = "; one row a line is .jsonl" if "Extra data" in str(e) else ""
        raise Refusal(f"{path} is not JSON ({e}){advice}")
    if not isinstance(rows, list):
        raise Refusal(f"{path} is not an array of rows but a {type(rows).__name__}")
    return [(f"{path} row {n}", row) for n, row in enumerate(rows, 1)]


def read_json(path, cfg):
    for place, row in json_rows(path):
        yield check_text(row, place) if isinstance(row, str) else field(row, cfg.column, place)


def csv_rows(path, column=None):
    """Yields (place, row) of each row below the header, a dict of str; place is for messages.

    Raises Refusal, also where a column is given that is not there.
    """
    csv.field_size_limit(2**31 - 1)  # instead of 131,072 characters: a field is a document
    n = 0
    with opened(path, newline="") as f:
        rows = csv.reader(f, strict=True)
        try:
            header = next(rows, [])
            if column and header:
                field(dict.fromkeys(header), column, path)
            for values in rows:
                if not values:  # a blank line
                    continue
                n += 1
                place = f"{path} row {n}"
                if len(values) != len(header):
                    problem = f"{len(values)} columns where the header has {len(header)}"
                    raise Refusal(f'{place} has {problem}; a text with commas stands in "quotes"')
                yield place, dict(zip(header, values))
        except csv.Error as e:
            raise Refusal(f"{path} row {n + 1} is not CSV ({e})")


def read_csv(path, cfg):
    return column_texts(csv_rows(path, cfg.column), cfg.column)


def parquet_rows(path, column=None):
    """Yields (place, row) of each row, a dict of all columns or of one; place is for messages.

    Raises Refusal.
    """
    source = path
    if unpacked(path) != Path(path):
        with opened_bytes(path) as f:
            source = io.BytesIO(f.read())  # it is not read from front to back
    yield from open_parquet_rows(source, path, column)


def open_parquet_rows(source, path, column):
    """Does what parquet_rows does for a source, a path or an open file, that messages call path."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Refusal(f"reading {path} needs pyarrow: pip install pyarrow")
    n = 0
    try:
        # piece by piece: pre_buffer would hold a group of rows, which may be the whole file
        with ParquetFile(source, pre_buffer=False, buffer_size=1 << 20) as f:
            if column:  # refuse one that is not there, before pyarrow does
                field(dict.fromkeys(f.schema_arrow.names), column, path)
            for batch in f.iter_batches(100, columns=[column] if column else None):
                for row in batch.to_pylist():
                    n += 1
                    yield f"{path} row {n}", row
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        raise Refusal(f"cannot read {path} as parquet: {e}")


def read_parquet(path, cfg):
    return column_texts(parquet_rows(path, cfg.column), cfg.column)


READERS = {
    ".txt": read_text,
    ".md": read_text,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


ROW_READERS = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}


def column_texts(rows, column):
    for place, row in rows:
        yield field(row, column, place)


def field(row, column, place, advice="prepare.py --column= chooses from"):
    """Returns row[column], "" for None.

    Raises Refusal where there is no such column (naming those there are) or no text in it.
    """
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise Refusal(f"{place} has no column {column!r}; {advice}: none, as it is a {kind}")
    if column not in row:
        columns = ", ".join(map(str, row))
        raise Refusal(f"{place} has no column {column!r}; {advice}: {columns}")
    return check_text("" if row[column] is None else row[column], f"{place}: column {column!r}")


def check_text(text, place):
    """Returns text. Raises Refusal for a number, for half of a surrogate pair."""
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise Refusal(f"{place} is not text but {text!r:.60}")
    return text


def documents(files, cfg, exact=False):
    """Yields the documents of all files in order; exact keeps the white space around them."""
    for path in files:
        read = READERS[file_kind(path)]
        for text in read(path, cfg):
            if text and not text.isspace():
                yield text if exact else text.strip()


# ---- where documents come from


def find_files(cfg, tmp, progress):
    """Returns ({"train": files, "val": files}, {split: words that say where it comes from}).

    Without files for val split_documents decides. What is no local file becomes one in tmp. Prints what
    is read of a folder. Raises Refusal.
    """
    wanted = {"train": [cfg.split or "train"]}
    if not cfg.val_dataset and cfg.split != "validation":
        wanted["val"] = ["validation"]
    splits = find_splits("dataset", cfg, tmp, progress, wanted)
    files = {"train": splits.pop("train")}
    files["val"] = [] if cfg.val_dataset else splits.pop("val", [])
    origins = {}
    for split, paths in files.items():
        if paths:
            origins[split] = origin(cfg.dataset, paths)
            list_files(cfg.dataset, split if files["val"] or cfg.val_dataset else "train and val", paths)
    left_out = [path for paths in splits.values() for path in paths]
    list_files(cfg.dataset, "left out", left_out)
    if cfg.val_dataset:
        splits = find_splits("val_dataset", cfg, tmp, progress, {"val": ["validation", "test", "train"]})
        files["val"] = next(splits[split] for split in HELD_OUT if splits.get(split))
        origins["val"] = origin(cfg.val_dataset, files["val"])
        list_files(cfg.val_dataset, "val", files["val"])
    return files, origins


def find_splits(key, cfg, tmp, progress, wanted):
    """Returns {split: files} of the source that the key (dataset or val_dataset) names.

    wanted: {split: names on the hub}; of a hub dataset the first of them that is there is fetched. What is
    no local file becomes one in tmp. Raises Refusal.
    """
    dataset = getattr(cfg, key)
    if dataset in ("toy", "tinystories") or is_hf(dataset):
        splits = progress.fetched(key)
        if not splits:
            splits = fetch(dataset, cfg, tmp / key, wanted)
            progress.note_fetched(key, splits)
        return splits
    path = Path(dataset)
    if is_pattern(dataset):
        paths = [Path(match) for match in glob.iglob(dataset, recursive=True)]
        if not paths:
            raise Refusal(f"{dataset} matches no file")
        splits = named_splits(paths, base_folder(dataset))
    elif path.is_dir():
        splits = named_splits(path.rglob("*"), path)
    elif path.exists():
        splits = {"train": [path] if file_kind(path) else []}
    else:
        raise Refusal(
            f"there is no file or folder {path}; a dataset of the Hugging Face hub is --{key}=hf:NAME"
        )
    if not any(splits.values()):
        endings = f"{' '.join(READERS)}, also with {' '.join(PACKINGS)}"
        raise Refusal(f"{path}: no file here ends in {endings}")
    if key == "dataset" and not splits["train"]:
        names = file_names(dataset, [file for files in splits.values() for file in files])
        raise Refusal(f"{path}: no file to train on, only {names}; name a file or a folder in it")
    return splits


def is_pattern(dataset):
    """Returns whether a dataset is a pattern of file names, as a shell has them, and no path that is there."""
    return not set("*?[").isdisjoint(dataset) and not is_hf(dataset) and not os.path.exists(dataset)


def base_folder(dataset):
    """Returns the folder from which the files of a folder or a pattern are named: its part without *."""
    path = Path(dataset)
    while is_pattern(str(path)):
        path = path.parent
    return path


def named_splits(paths, folder):
    """Returns {split: files} of paths in a folder: train, val, test, "card" and "" for the others.

    As in `datasets`, files that are in no split are training data unless there are files named so, and
    what is hidden is not looked at.
    """
    splits = {"train": [], "val": [], "test": [], "": [], "card": []}
    for path in sorted(paths, key=lambda p: p.parts):
        name = path.relative_to(folder)
        is_hidden = name.name.startswith(".") or any(p.startswith((".", "__")) for p in name.parts[:-1])
        if is_hidden or not file_kind(path) or not path.is_file():
            continue
        split = "card" if name.name.lower() in CARDS else named_split(name)
        splits[split].append(path)
    if not splits["train"]:
        splits["train"], splits[""] = splits[""], []
    if not any(splits[split] for split in SPLITS + ("test",)):  # a README.md is all there is
        splits["train"], splits["card"] = splits["card"], []
    return splits


def named_split(path):
    """Returns "train", "val" or "test" where a relative path has a word for it, else "".

    The innermost folder with such a word counts, then the file's name.
    """
    *folders, name = path.parts
    for part in (*reversed(folders), name):
        words = re.split("[-._ 0-9]", part.lower())
        for split, names in SPLIT_WORDS.items():
            if not set(names).isdisjoint(words):
                return split
    return ""


def file_names(dataset, files):
    """Returns "2 files: a.txt, b/c.txt"; of more than ten the first ten and how many more there are."""
    folder = base_folder(dataset)
    names = [path.relative_to(folder).as_posix() for path in files[:FILES_SHOWN]]
    text = ", ".join(name if name.isprintable() else ascii(name) for name in names)
    rest = len(files) - len(names)
    more = f" and {rest:,} more" if rest else ""
    return f"{len(files):,} file{'' if len(files) == 1 else 's'}: {text}{more}"


def is_folder(dataset):
    return os.path.isdir(dataset) or is_pattern(dataset)


def list_files(dataset, title, files):
    """Prints which files of a folder or a pattern are of a split or left out; nothing of one file."""
    if files and is_folder(dataset) and base_folder(dataset) in files[0].parents:
        print(f"{dataset}: {title}, {file_names(dataset, files)}")


def origin(dataset, files):
    """Returns the words for meta.json that say where the files of a split come from."""
    if is_hf(dataset) or dataset == "tinystories":
        return f"{dataset}, split {unpacked(files[0]).stem}"
    if is_folder(dataset) and dataset != "toy":
        return f"{dataset}, {file_names(dataset, files)}"
    return dataset


def spool(texts, path, cfg):
    """Writes texts to a .jsonl or .jsonl.zst file as they arrive; returns its path."""
    desc = f"fetching {unpacked(path).stem}"
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as f:
        packed = pack_zstd(f) if path.suffix == ".zst" else nullcontext(f)
        with packed as lines:
            for text in tqdm(texts, desc, unit=" documents", disable=None, leave=False):
                lines.write(json.dumps({cfg.column: text}).encode() + b"\n")
    with open(path, "rb+") as f:  # pyarrow closes what it packs to
        sync(f)
    return path


def fetch(dataset, cfg, folder, wanted):
    """Writes the texts of a dataset that is no file to files in folder; returns {split: [file]}."""
    if dataset == "toy":
        texts = (text for text, _ in toy_stories.stories(cfg.num_stories, cfg.seed))
        return {"train": [spool(texts, folder / "toy.jsonl", cfg)]}
    name = "roneneldan/TinyStories" if dataset == "tinystories" else hf_name(dataset)
    if cfg.subset and dataset == cfg.dataset:
        name += f":{cfg.subset}"
    return fetch_from_hub(name, cfg, folder, wanted)


def fetch_from_hub(name, cfg, folder, wanted):
    """Streams splits of a hub dataset to packed files in folder, once; returns {split: [file]} as find_splits."""
    files = {}
    with hub_splits(name, wanted.get("train", ["train"])[0], cfg.column) as splits:
        for split, names in wanted.items():
            if full_name := next((name for name in names if name in splits), ""):
                texts = (field(row, cfg.column, name) for row in splits[full_name])
                files[split] = [spool(texts, folder / f"{full_name}.jsonl.zst", cfg)]
    return files


@contextmanager
def hub_splits(name, needed="train", column=None):
    """Gives the splits of NAME or NAME:CONFIG on the Hugging Face hub: {name: an iterable of rows}, which
    are read as one asks for them, and may be of one column only. NAME may be a folder as well.

    Raises Refusal where the split `needed` is missing, and for what goes wrong inside the with, where the
    rows are read.
    """
    name, _, config = name.partition(":")
    try:
        import datasets
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        if not os.path.isdir(name):
            HfApi().dataset_info(name, timeout=10)  # without a network load_dataset retries for 20 s
        splits = load_splits(name, config, column, datasets)
        if needed not in splits:
            raise Refusal(f"{name} has no split {needed}, only: {', '.join(splits)}")
        yield splits
    except Refusal:
        raise
    except ImportError as e:
        raise Refusal(
            f"reading {name} from the Hugging Face hub needs its libraries ({e}): pip install datasets"
        )
    except RepositoryNotFoundError:
        raise Refusal(
            f"the Hugging Face hub has no dataset {name}, or a private one: "
            "see https://huggingface.co/datasets"
        )
    except Exception as e:  # the libraries below raise their own, other ones in each version
        raise Refusal(
            f"cannot read {name} from the Hugging Face hub ({type(e).__name__}: {e}); "
            "without a network there are --dataset=FILE.txt, your own text, and --dataset=toy"
        )


def load_splits(name, config, column, datasets):
    """Returns {name: rows to stream} of a dataset. Raises Refusal for a config that is missing."""
    try:
        builder = datasets.load_dataset_builder(name, config or None)
    except ValueError:
        configs = datasets.get_dataset_config_names(name)
        if (config or "default") in configs:
            raise
        problem = f"no subset {config}" if config else "several subsets"
        raise Refusal(f"{name} has {problem}; --subset= chooses from: {', '.join(configs)}")
    if builder.name != "parquet":
        return builder.as_streaming_dataset()
    # of these the library would fetch every column, and hold a file of rows that it reads ahead
    files = builder.config.data_files
    return {split: hub_parquet_rows(paths, column) for split, paths in files.items()}


def hub_parquet_rows(paths, column):
    """Yields the rows of .parquet files on the hub, or of those in a folder, as they are read."""
    import fsspec  # which datasets opens files with

    for path in paths:
        with fsspec.open(path) as f:
            for _, row in open_parquet_rows(f, path, column):
                yield row


def pack_zstd(f):
    """Returns a stream that packs what is written to it into the file f, and closes f."""
    import pyarrow  # which datasets has, too

    return pyarrow.CompressedOutputStream(f, "zstd")


# ---- from documents to tokens
#
# A row is (split, text, whether end-of-text follows, whether a document ends here). A piece is a part
# of a row in the same form, and then whether the row's text begins here.


def count_documents(docs, exact):
    """Returns (documents, characters); white space around a document counts only if exact and alone."""
    n = 0
    chars = 0
    for n, text in with_progress(enumerate(docs, 1), "reading"):
        chars += len(text.strip())
    return (1, len(text)) if n == 1 and exact else (n, chars)


def split_documents(cfg, files, val_files, n, chars):
    """Yields the rows of all n documents, which hold chars characters.

    A document is one row, or two where the cut between the splits goes through it.
    """
    docs = documents(files, cfg, exact=n == 1)
    if val_files:
        for text in docs:
            yield "train", text, True, True
        for text in documents(val_files, cfg):
            yield "val", text, True, True
    elif n >= FEW:
        is_val = np.random.default_rng(cfg.seed).permutation(n) < round(cfg.val_fraction * n)
        for text, val in zip(docs, is_val.tolist()):
            yield "val" if val else "train", text, True, True
    else:
        left = int(chars * (1 - cfg.val_fraction))  # characters of the training split that are to come
        for i, text in enumerate(docs, 1):
            head = text[:left]
            tail = text[left:]
            left -= len(head)
            if head:
                yield "train", head, i < n and not tail, True
            if tail:
                yield "val", tail, i < n, True


def pieces(rows, cuts=BREAK):
    """Yields the pieces of rows: long texts are cut before white space where `cuts` has it."""
    for split, text, add_eot, doc_ends in rows:
        start = 0
        while start < len(text):
            cut = cuts.search(text, start + CHUNK)
            stop = cut.start() if cut else len(text)
            is_last = stop == len(text)
            part = text[start:stop]
            yield split, part, add_eot and is_last, doc_ends and is_last, start == 0
            start = stop


def progress_bar(desc, total=None):
    """Returns a progress bar of characters, to be seen where stderr is a terminal."""
    return tqdm(desc=desc, total=total, unit=" characters", unit_scale=True, disable=None, leave=False)


def with_progress(rows, desc, total=None):
    """Yields the rows, with a progress bar."""
    with progress_bar(desc, total) as bar:
        for row in rows:
            yield row
            bar.update(len(row[1]))


def with_counts(rows, stats):
    """Yields the pieces, and counts in stats[split] what they hold."""
    for row in rows:
        split, text, _, doc_ends, _ = row
        stats[split]["documents"] += int(doc_ends)
        stats[split]["characters"] += len(text)
        stats[split]["bytes"] += len(text.encode())
        yield row


def chunks(rows):
    """Yields lists of pieces with about CHUNK characters."""
    chunk = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row[1]) + 100  # what the tuple itself takes counts where texts are tiny
        if size >= CHUNK:
            yield chunk
            chunk = []
            size = 0
    yield chunk


def encode_chunk(chunk, tokenizer):
    """Returns {"train": ids, "val": ids} of a list of pieces, each a 1-D array."""
    ids = {split: [] for split in SPLITS}
    beginnings = [text for _, text, _, _, text_begins in chunk if text_begins]
    encoded = iter(tokenizer.encode_batch(beginnings, num_threads=1))  # the chunk has its own
    for split, text, add_eot, _, text_begins in chunk:
        if text_begins:
            ids[split] += tokenizer.head + next(encoded)
        else:
            ids[split] += tokenizer.encode_more(text)
        if add_eot:
            ids[split].append(tokenizer.eot)
    dtype = id_type(tokenizer.vocab_size)
    return {split: np.array(ids[split], dtype) for split in SPLITS}


def encode_in_threads(todo, tokenizer, threads):
    """Yields each chunk and encode_chunk of it, in order, and reads only so far ahead.

    Threads, since tiktoken works without the interpreter's lock: 18 MB/s on 2 cores, where processes
    did 16 and start slower.
    """
    ahead = deque()
    with ThreadPoolExecutor(threads) as pool:
        for chunk in todo:
            ahead.append((chunk, pool.submit(encode_chunk, chunk, tokenizer)))
            if len(ahead) > 2 * threads:
                chunk, ids = ahead.popleft()
                yield chunk, ids.result()
        for chunk, ids in ahead:
            yield chunk, ids.result()


def encode(rows, tokenizer, folder, cfg, progress, chars=None):
    """Writes the ids of the pieces, which have chars characters, to files in folder, those that progress
    does not have yet. Returns what meta.json says of each split.
    """
    dtype = id_type(tokenizer.vocab_size)
    size = cfg.shard_mb * MB // dtype.itemsize
    stats = {split: {"documents": 0, "characters": 0, "bytes": 0} for split in SPLITS}
    todo = chunks(with_counts(rows, stats))
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("encoding", chars))
        writers, done = progress.open_writers(size, dtype)
        for writer in writers.values():
            stack.enter_context(writer)
        for chunk in islice(todo, done):  # what a killed run encoded is only read
            bar.update(sum(len(text) for _, text, *_ in chunk))
        whole = sum(len(writer.whole) for writer in writers.values())
        for chunk, ids in encode_in_threads(todo, tokenizer, cfg.num_proc or os.cpu_count() or 1):
            bar.update(sum(len(text) for _, text, *_ in chunk))
            done += 1
            for split, writer in writers.items():
                writer.write(ids[split])
            if whole < (whole := sum(len(writer.whole) for writer in writers.values())):
                progress.note_files(writers, done)
        for split, writer in writers.items():
            files = writer.finish()
            tokens = sum(file["tokens"] for file in files)
            stats[split] = {"tokens": tokens, **stats[split], "files": files}
    return stats


# ---- what is done


class Progress:
    """What is done of a dataset, kept in state.json in its unfinished folder: the run after a killed one
    goes on from there, to the same result.

    done: "settings" and "sources", what the result depends on; "fetched", files of what is no file; "counts"
    of documents and characters; "tokenizer", the sha256 of one that was learned; "files" of ids and
    "chunks", how many were encoded into them.
    """

    def __init__(self, folder, cfg, tokenizer):
        self.folder = folder
        self.name = cfg.name
        self.done = read_state(folder)
        self.goes_on = bool(self.done)
        for path in list(folder.glob(f"{STATE}.*.tmp")):  # half written
            path.unlink()
        settings = asdict(cfg) | {"format": FORMAT, "chunk": CHUNK}
        for key in "name", "num_proc", "overwrite":
            del settings[key]
        if tokenizer:
            settings |= {"tokenizer": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
        older = self.done.get("settings", {})
        if changes := [key for key in settings if settings[key] != older.get(key)]:
            self.begin_anew(f"is of another {' and '.join(changes)}", [])
        elif self.goes_on:
            print(f"going on with what a killed run left of data/{self.name}")
        self.note(settings=settings)

    def note(self, **done):
        self.done |= done
        text = json.dumps(self.done, indent=1)
        write_atomic(self.folder / STATE, lambda f: f.write(text.encode()))

    def begin_anew(self, problem, keep):
        """Forgets all but the keys in keep, and says so."""
        if self.goes_on:
            print(f"what a killed run left of data/{self.name} {problem}: all begins anew")
        self.goes_on = False
        self.done = {key: self.done[key] for key in keep if key in self.done}
        for path in list(self.folder.iterdir()):
            if not path.is_dir():
                path.unlink()
            elif "fetched" not in keep:
                shutil.rmtree(path)

    def fetched(self, key):
        """Returns {split: [file]} of a source that is no file, {} where it is not fetched yet."""
        splits = {}
        for split, (name, size) in self.done.get("fetched", {}).get(key, {}).items():
            path = self.folder / key / name
            if not path.is_file() or path.stat().st_size != size:
                return {}
            splits[split] = [path]
        return splits

    def note_fetched(self, key, splits):
        files = {split: (path.name, path.stat().st_size) for split, [path] in splits.items()}
        self.note(fetched=self.done.get("fetched", {}) | {key: files})

    def check_sources(self, files):
        """Begins anew where the files are not those of the killed run, or have changed since."""
        sources = {}
        for split, paths in files.items():
            sources[split] = []
            for path in paths:
                stat = path.stat()
                name = path.name if self.folder in path.parents else str(path.absolute())
                sources[split].append([name, stat.st_size, stat.st_mtime_ns])
        if "sources" in self.done and sources != self.done["sources"]:
            self.begin_anew("is of other files, or they have changed", ["settings", "fetched"])
        self.note(sources=sources)

    def tokenizer(self):
        """Returns the tokenizer that the killed run learned, or None."""
        with suppress(OSError, ValueError):
            tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
            if tokenizer.sha256 == self.done.get("tokenizer"):
                return tokenizer

    def note_tokenizer(self, tokenizer):
        write_text(self.folder / "tokenizer.json", tokenizer.to_str())
        self.note(tokenizer=tokenizer.sha256)

    def open_writers(self, size, dtype):
        """Returns ({split: its ShardWriter}, how many chunks they have)."""
        try:
            files = self.done.get("files", {split: [] for split in SPLITS})
            return self.new_writers(size, dtype, files), self.done.get("chunks", 0)
        except (OSError, ValueError) as e:
            print(f"what a killed run encoded of data/{self.name} is damaged ({e}): it is encoded anew")
            self.done = {key: self.done[key] for key in self.done if key not in ("files", "chunks")}
            self.note()
            return self.new_writers(size, dtype, {split: [] for split in SPLITS}), 0

    def new_writers(self, size, dtype, files):
        return {split: ShardWriter(self.folder, split, size, dtype, files[split]) for split in SPLITS}

    def note_files(self, writers, chunks):
        for writer in writers.values():
            writer.sync()
        self.note(files={split: writer.files for split, writer in writers.items()}, chunks=chunks)


def read_state(folder):
    """Returns what state.json in a folder holds, {} where there is none."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def has_files(folder):
    """Returns whether there are finished files of ids in an unfinished folder."""
    return "files" in read_state(folder)


# ---- the folder


def choose_tokenizer(cfg):
    """Returns the tokenizer that cfg names; None for one that is made from the text. Raises Refusal."""
    try:
        if is_hf(cfg.tokenizer):
            from interop import hf_folder  # and torch with it, which nothing else here needs

            return hf_folder.load_tokenizer(hf_name(cfg.tokenizer))
        if cfg.tokenizer.endswith(".json"):
            return load_tokenizer(Path(cfg.tokenizer).read_text(encoding="utf-8"))
        if cfg.tokenizer.startswith("gpt2"):
            return Tokenizer.gpt2(cfg.tokenizer[5:] or None)
    except (OSError, ValueError) as e:
        hint = ""
        if cfg.tokenizer.endswith(".json") and isinstance(e, ValueError):
            hint = "; a folder that transformers wrote is --tokenizer=hf:FOLDER"
        raise Refusal(f"--tokenizer={cfg.tokenizer}: {e}{hint}")
    return None


def count_splits(cfg, files):
    """Returns {split: (documents, characters)} of the splits that have files."""
    counts = {
        "train": count_documents(documents(files["train"], cfg, exact=True), exact=not files["val"])
    }
    if files["val"]:
        counts["val"] = count_documents(documents(files["val"], cfg), exact=False)
    return counts


def check_counts(cfg, counts, origins):
    """Returns (documents, characters) of all files, with the shares of the splits put into origins.

    Raises Refusal where a split gets no text.
    """
    for split, (n, _) in counts.items():
        if n == 0:
            raise Refusal(f"{origins[split]}: there is no text in it")
    n, chars = map(sum, zip(*counts.values()))
    if "val" in counts:
        return n, chars

    percent = f"{100 * cfg.val_fraction:g}%"
    if n < FEW:
        train = int(chars * (1 - cfg.val_fraction))
        total = chars
        unit = "characters"
        part = f"the last {percent} of the text"
        print(f"fewer than {FEW} documents ({n}): {part} is the validation split")
    else:
        train = n - round(cfg.val_fraction * n)
        total = n
        unit = "documents"
        part = f"{percent} of the documents"
    for split, share in (("train", train), ("val", total - train)):
        if share == 0:
            problem = f"{percent} for validation leave the {split} split none of its {total:,} {unit}"
            raise Refusal(f"{origins['train']}: {problem}: {more_text(counts)}")
    origins["val"] = f"{origins['train']}; {part}"
    origins["train"] += "; the rest"
    return n, chars


def more_text(counts):
    return "give more text" if "val" in counts else "give more text or another --val_fraction"


def learn(cfg, rows, chars):
    """Returns the tokenizer that is made from the pieces, which have chars characters. Raises ValueError."""
    if cfg.tokenizer == "char":
        rows = with_progress(rows, "collecting characters", chars)
        return Tokenizer.char(text for _, text, *_ in rows)
    rows = with_progress(rows, "learning words", chars)
    texts = (text for split, text, *_ in rows if split == "train")
    progress = partial(tqdm, desc="learning merges", unit=" merges", disable=None, leave=False)
    return Tokenizer.train(texts, cfg.vocab_size, progress)


def build(cfg, tmp):
    """Fills the folder tmp, in which a killed run may have left a part. Raises Refusal."""
    tokenizer = choose_tokenizer(cfg)
    is_foreign = tokenizer is not None and tokenizer.kind == "foreign"
    cuts = BREAK_FOREIGN if is_foreign else BREAK
    progress = Progress(tmp, cfg, tokenizer)
    files, origins = find_files(cfg, tmp, progress)
    progress.check_sources(files)
    counts = progress.done.get("counts") or count_splits(cfg, files)
    n, chars = check_counts(cfg, counts, origins)
    progress.note(counts=counts)

    def read_pieces():
        return pieces(split_documents(cfg, files["train"], files["val"], n, chars), cuts)

    try:
        if not tokenizer:
            tokenizer = progress.tokenizer() or learn(cfg, read_pieces(), chars)
            progress.note_tokenizer(tokenizer)
        splits = encode(read_pieces(), tokenizer, tmp, cfg, progress, chars)
    except ValueError as e:  # the tokenizer's, such as a character that it does not have
        raise Refusal(e)

    if sum(stats["characters"] for stats in splits.values()) != chars:
        message = f"{cfg.dataset} changed while it was read; prepare it when it is complete"
        raise Refusal(message, status=1)
    for split, stats in splits.items():
        if stats["tokens"] < 2:
            problem = f"the {split} split has {stats['tokens']} tokens and needs 2"
            raise Refusal(f"{origins[split]}: {problem}: {more_text(counts)}")
        stats["source"] = origins[split]
    meta = {
        "format": FORMAT,
        "name": cfg.name,
        "source": cfg.dataset,
        "val_source": cfg.val_dataset,
        "separator": cfg.separator,
        "column": cfg.column,
        "val_fraction": cfg.val_fraction,
        "seed": cfg.seed,
        "dtype": id_type(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
        "splits": splits,
    }
    write_text(tmp / "tokenizer.json", tokenizer.to_str())
    write_text(tmp / "meta.json", json.dumps(meta, indent=1) + "\n")
    for key in ("dataset", "val_dataset"):
        shutil.rmtree(tmp / key, ignore_errors=True)
    name_shards(tmp, splits)
    (tmp / STATE).unlink()


def write_text(path, text):
    with open(path, "wb") as f:
        f.write(text.encode())
        sync(f)


def prepare(cfg):
    """Makes data/NAME and returns its path, or changes nothing; goes on where a run was killed.

    Raises Refusal.
    """
    folder = Path("data", cfg.name)
    ways = "--overwrite prepares it anew (the old one is kept beside it), --name= another"
    with new_folder(folder, cfg.overwrite, ways, is_worth=has_files) as tmp:
        build(cfg, tmp)
    return folder.as_posix()


# ---- loading it


def load(folder):
    """Returns (meta, {"train": ids, "val": ids}, tokenizer) of a prepared folder.

    ids are a memory-mapped 1-D array of uint16 or uint32: numpy's own, or Shards of several files. Every
    file is checked against meta.json. Raises Refusal.
    """
    folder = Path(folder)
    if folder.is_file():
        raise Refusal(
            f"{folder} is a file: python prepare.py --dataset={folder} --name={folder.stem} "
            f"makes data/{folder.stem} of it"
        )
    if not folder.exists():
        dataset = "tinystories" if folder.name == "tinystories" else f"FILE --name={folder.name}"
        raise Refusal(f"there is no dataset {folder}: python prepare.py --dataset={dataset} makes it")

    path = folder / "meta.json"
    with refusing_damage(path):
        meta = json.loads(path.read_text(encoding="utf-8"))
        for split in SPLITS:
            for key, least in (("tokens", 2), ("documents", 1), ("characters", 1), ("bytes", 1)):
                number = meta["splits"][split][key]
                if type(number) is not int or number < least:
                    raise ValueError(f"{key} of {split} is {number!r}, and at least {least} is needed")
        files = {split: check_entries(split, meta["splits"][split]) for split in SPLITS}
        vocab_size = meta["vocab_size"]
        tokenizer_sha256 = meta["tokenizer"]["sha256"]
        dtype = id_type(vocab_size)
        if meta["format"] not in FORMATS or meta["dtype"] != dtype.name:
            form = f"format {meta['format']!r} with {meta['dtype']!r}"
            raise ValueError(f"{form} is not {FORMAT} with {dtype.name}")

    path = folder / "tokenizer.json"
    with refusing_damage(path):
        tokenizer = load_tokenizer(path.read_bytes().decode("utf-8"))
        if (tokenizer.vocab_size, tokenizer.sha256) != (vocab_size, tokenizer_sha256):
            raise ValueError("not the tokenizer that the data was made with")

    data = {}
    for split in SPLITS:
        for file in files[split]:
            path = folder / file["file"]
            with refusing_damage(path):
                _, highest = check_file(path, dtype, file["tokens"], file["sha256"])
                if highest >= vocab_size:
                    raise ValueError(
                        f"it holds id {highest}, and the vocabulary ends at {vocab_size - 1}"
                    )
        data[split] = open_shards([folder / file["file"] for file in files[split]], dtype)
    names = [file["file"] for split in SPLITS for file in files[split]]
    for path in strangers(folder, names):
        with refusing_damage(path):
            raise ValueError("meta.json names no such file: remove it if it is another dataset's")
    return meta, data, tokenizer


@contextmanager
def refusing_damage(path):
    """Turns what goes wrong inside the with into a Refusal, which says that path is damaged."""
    try:
        yield
        return
    except FileNotFoundError:
        problem = "there is no such file"
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        problem = f"not written by prepare.py ({e!r})"
    except (OSError, ValueError) as e:
        problem = e
    again = f"python prepare.py --dataset=... --name={path.parent.name} --overwrite"
    raise Refusal(f"{path}: {problem}; prepare it again: {again}")


def main(cfg):
    began = time.time()
    folder = prepare(cfg)
    seconds = time.time() - began
    meta = json.loads(Path(folder, "meta.json").read_text(encoding="utf-8"))
    num_bytes = 0
    for stats in meta["splits"].values():
        num_bytes += stats["bytes"]
        first, *more = [file["file"] for file in stats["files"]]
        names = f"{first} to {more[-1]}" if more else first
        print(
            f"{folder}/{names}: {stats['documents']:,} documents, {stats['tokens']:,} tokens, "
            f"{stats['bytes']:,} bytes, {stats['bytes'] / stats['tokens']:.3f} bytes a token"
        )
    kind = meta["tokenizer"]["kind"]
    speed = num_bytes / 1e6 / seconds
    print(f"vocabulary of {meta['vocab_size']:,} ({kind}), {seconds:.1f} s, {speed:.1f} MB/s")


if __name__ == "__main__":
    run(main, Config)
