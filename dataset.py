"""A prepared dataset, data/NAME, as whatever trains or evaluates opens it.

    meta, data, tokenizer = load("data/toy")

Every file in it is checked: prepare.py wrote it, for this dataset, and nothing has changed it since.
"""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from config import Refusal, is_hf
from interop.any_tokenizer import load_tokenizer
from shards import SPLITS, Shards, check_file, id_type, shard_names

ELSEWHERE = "data elsewhere"  # of a checkpoint that was trained on what is not here
FORMAT = 2
FORMATS = (1, FORMAT)  # that load reads; 1 had one file a split
SHARD = re.compile(rf"({'|'.join(SPLITS)})(_\d+)?\.bin")  # what looks like one of prepare.py's


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
        source = "tinystories" if folder.name == "tinystories" else f"FILE --name={folder.name}"
        raise Refusal(f"there is no dataset {folder}: python prepare.py --dataset={source} makes it")

    with refusing_damage(folder / "meta.json") as path:
        meta = json.loads(path.read_text(encoding="utf-8"))
        files = check_meta(meta)
        vocab_size, sha256 = meta["vocab_size"], meta["tokenizer"]["sha256"]
    with refusing_damage(folder / "tokenizer.json") as path:
        tokenizer = load_tokenizer(path.read_bytes().decode("utf-8"))
        if (tokenizer.vocab_size, tokenizer.sha256) != (vocab_size, sha256):
            raise ValueError("not the tokenizer that the data was made with")
    data = {split: open_split(folder, files[split], vocab_size) for split in SPLITS}
    names = [file["file"] for split in SPLITS for file in files[split]]
    for path in sorted(folder.iterdir()):
        if SHARD.fullmatch(path.name) and path.name not in names:
            problem = "meta.json names no such file: remove it if it is another dataset's"
            raise damaged(path, problem)
    return meta, data, tokenizer


def check_meta(meta):
    """Returns {split: its files, as check_entries has them} of a parsed meta.json. Raises ValueError, KeyError
    or TypeError where prepare.py would not write it so.
    """
    for split in SPLITS:
        for key, least in (("tokens", 2), ("documents", 1), ("characters", 1), ("bytes", 1)):
            number = meta["splits"][split][key]
            if type(number) is not int or number < least:
                raise ValueError(f"{key} of {split} is {number!r}, and at least {least} is needed")
    files = {split: check_entries(split, meta["splits"][split]) for split in SPLITS}
    dtype = id_type(meta["vocab_size"])
    if meta["format"] not in FORMATS or meta["dtype"] != dtype.name:
        form = f"format {meta['format']!r} with {meta['dtype']!r}"
        raise ValueError(f"{form} is not {FORMAT} with {dtype.name}")
    return files


def check_entries(split, entry):
    """Returns the files that meta.json names of a split, [{"file", "tokens", "sha256"}].

    Raises ValueError, KeyError or TypeError where prepare.py would not write it so.
    """
    if "files" not in entry:  # of format 1, which had one file
        entry = {"tokens": entry["tokens"], "files": [entry | {"file": f"{split}.bin"}]}
    files = entry["files"]
    names = shard_names(split, len(files))
    if [file["file"] for file in files] != names:
        raise ValueError(f"{split} should be in files named {', '.join(names)}")
    for file in files:
        if type(file["tokens"]) is not int or file["tokens"] < 1 or type(file["sha256"]) is not str:
            raise ValueError(
                f"{file['file']} has {file['tokens']!r} tokens and sha256 {file['sha256']!r}"
            )
    total = sum(file["tokens"] for file in files)
    if total != entry["tokens"]:
        raise ValueError(f"{split} has {entry['tokens']} tokens, and its files {total}")
    return files


def open_split(folder, files, vocab_size):
    """Returns the ids of a split, memory-mapped, after each of its files was checked. Raises Refusal."""
    dtype = id_type(vocab_size)
    for file in files:
        with refusing_damage(folder / file["file"]) as path:
            _, highest = check_file(path, dtype, file["tokens"], file["sha256"])
            if highest >= vocab_size:
                raise ValueError(f"it holds id {highest}, and the vocabulary ends at {vocab_size - 1}")
    parts = [np.memmap(folder / file["file"], dtype, mode="r") for file in files]
    return parts[0] if len(parts) == 1 else Shards(parts)


@contextmanager
def refusing_damage(path):
    """Turns what goes wrong inside the with into a Refusal, which says that the path is damaged. Gives the path."""
    try:
        yield path
        return
    except FileNotFoundError:
        problem = "there is no such file"
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        problem = f"not written by prepare.py ({e!r})"
    except (OSError, ValueError) as e:
        problem = e
    raise damaged(path, problem)


def damaged(path, problem):
    """Returns the Refusal of a file in a dataset that is not as prepare.py wrote it."""
    again = f"python prepare.py --dataset=... --name={path.parent.name} --overwrite"
    status = 2 if path.name == "meta.json" else 1  # without that, the folder is no dataset of ours
    return Refusal(f"{path}: {problem}; prepare it again: {again}", status)


# -----------------------------------------------------------------------------------------------------
# The data of a checkpoint


def data_folder(ckpt):
    """Returns the folder of a checkpoint's data, or ELSEWHERE."""
    if ckpt.dataset and not is_hf(ckpt.path):
        return os.path.join("data", ckpt.dataset)
    return ELSEWHERE


def load_data(folder, ckpt, load=load):
    """Returns what load does, of the data that a checkpoint was trained with. load may be one that remembers what it
    returned. Raises Refusal.
    """
    if folder == ELSEWHERE:
        raise Refusal("it was trained elsewhere, on what is not here")
    meta, data, tokenizer = load(folder)
    if tokenizer.sha256 != ckpt.state["tokenizer_sha256"]:
        change = "was prepared anew, with another tokenizer than"
        raise Refusal(f"{folder} {change} {ckpt.path} was trained with")
    return meta, data, tokenizer
