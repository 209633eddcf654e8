"""Rows encoded once, into a folder of arrays that are mapped into memory.

finetune_lora.py makes data/.encoded/KEY/rows of a dataset at the first start, and opens it at each later
one. KEY is a hash of all that decides what is in it: the rows themselves, the tokenizer, the template,
the context and the split. Nothing else knows of the folder, and it can be removed at any time.

    ids.bin                 the ids of all examples in the order of the rows, one after the other
    is_learned.bin          whether each id is learned, a byte
    starts.bin              where each example starts among them, and where the last one ends
    learn.numbers.bin       which examples are learned, in the order of the split
    learn.packs.bin         which of those share a row of the context, one pack after the other
    learn.pack_starts.bin   where each pack starts among them, and where the last one ends
    val.*.bin               the same three for the examples that are held out
    meta.json               the hashes of these, and the lines about them that finetune_lora.py prints
"""

import hashlib
import json
import os
from array import array
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import readers
import shards
import sources
from config import Refusal, hf_name, is_hf
from folders import alone, new_folder
from messages import conversations, default_template, preferences
from prepare import in_threads
from rows import (
    BUILT_IN,
    LeftOut,
    check_template,
    encode_row,
    example,
    pack,
    read_both,
    side_line,
    side_names,
    split_numbers,
)

FORMAT = 3  # to be raised when the same rows become other arrays
FOLDER = Path("data", ".encoded")
CHUNK = 128  # rows that a thread encodes at a time
SIDES = ("learn", "val")


@dataclass
class Source:
    """What decides which examples there are."""

    cfg: object  # a finetune_lora.Config: dataset, val_dataset, val_fraction and seed
    tokenizer: object
    template: str  # empty: that of the rows' kind
    text_rule: str
    T: int  # tokens that an example may have
    conversations_per_row: int  # 1, or 2 of a preference

    def key(self):
        """Returns all of that as JSON would hold it. Raises Refusal for a dataset that cannot be read."""
        cfg = self.cfg
        return {
            "format": FORMAT,
            "dataset": [cfg.dataset, fingerprint(cfg.dataset, cfg.built_in)],
            "val_dataset": [cfg.val_dataset, fingerprint(cfg.val_dataset)],
            "val_fraction": cfg.val_fraction,
            "seed": cfg.seed,
            "tokenizer": hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest(),
            "template": self.template,
            "text_rule": self.text_rule,
            "T": self.T,
            "conversations_per_row": self.conversations_per_row,
        }


def fingerprint(dataset, built_in=""):
    """Returns a hash of a dataset's rows, for one on the hub its commit; "" for no dataset. Raises Refusal."""
    if not dataset:
        return ""
    if dataset == built_in:
        return hash_json(BUILT_IN[dataset].rows())
    if is_hf(dataset):
        name = hf_name(dataset).partition(":")[0]
        with sources.refusing_hub(name):
            from huggingface_hub import HfApi

            return HfApi().dataset_info(name, timeout=10).sha
    if readers.file_kind(dataset) not in readers.ROW_READERS:
        return ""  # read_rows() will refuse it
    try:
        return hash_file(dataset)
    except OSError as e:
        raise Refusal(f"cannot read {dataset}: {e.strerror}")


def hash_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_json(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -----------------------------------------------------------------------------------------------------
# What is read of the folder


class Ragged:
    """Arrays of different lengths in one array: ragged[n] is the n-th of them, a slice is a list of them."""

    def __init__(self, values, starts):
        self.values = values
        self.starts = starts  # of each array, and where the last one ends

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, n):
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(len(self)))]
        return self.values[self.starts[n] : self.starts[n + 1]]


class Examples:
    """Examples by their numbers: examples[n] is (idx, targets)."""

    def __init__(self, ids, is_learned, numbers):
        self.ids = ids  # Ragged
        self.is_learned = is_learned
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, n):
        number = self.numbers[n]
        return example(self.ids[number], self.is_learned[number])


class Side(NamedTuple):
    examples: Examples
    packs: Ragged  # of numbers of examples
    line: str  # about the rows


class Encoded(NamedTuple):
    learn: Side
    val: Side
    template: str
    length: int  # of a row of the context, in tokens: the longest pair fits in
    rows_sha256: str  # of what a resumed run must find unchanged


def array_types(vocab_size):
    """Returns the dtype of each array."""
    types = {"ids": shards.id_type(vocab_size), "is_learned": np.dtype("?"), "starts": np.dtype("<i8")}
    names = [f"{side}.{name}" for side in SIDES for name in ("numbers", "packs", "pack_starts")]
    return types | dict.fromkeys(names, np.dtype("<i8"))


def mapped(path, dtype):
    """Returns the array in a file. It may be written to, as torch expects, but the file does not change."""
    return np.memmap(path, dtype, mode="c").view(np.ndarray)


def open_encoded(folder, key, vocab_size):
    """Returns the Encoded of a folder. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    with open(folder / "meta.json", encoding="utf-8") as f:
        meta = json.load(f)
    if not isinstance(meta, dict) or meta.pop("sha256", None) != hash_json(meta):
        raise ValueError("meta.json is not as it was written")
    if meta["key"] != key:
        raise ValueError("it is of other rows")
    arrays = {}
    for name, dtype in array_types(vocab_size).items():
        path = folder / f"{name}.bin"
        if hash_file(path) != meta["files"][name]:
            raise ValueError(f"{path.name} is not as it was written")
        arrays[name] = mapped(path, dtype)
    ids = Ragged(arrays["ids"], arrays["starts"])
    is_learned = Ragged(arrays["is_learned"], arrays["starts"])
    sides = [
        Side(
            Examples(ids, is_learned, arrays[f"{side}.numbers"]),
            Ragged(arrays[f"{side}.packs"], arrays[f"{side}.pack_starts"]),
            meta["lines"][side],
        )
        for side in SIDES
    ]
    return Encoded(*sides, meta["template"], meta["length"], meta["rows_sha256"])


def find_encoded(source, is_main):
    """Returns the Encoded of a source; makes it where there is none, while other processes that need the same one
    wait. Raises Refusal.
    """
    key = source.key()
    folder = FOLDER / hash_json(key)[:16] / "rows"
    opened = partial(open_encoded, folder, key, source.tokenizer.vocab_size)
    with suppress(OSError, ValueError):
        return opened()
    waits = f"{folder.parent}: waiting for another process that encodes the same rows"
    with alone(folder.parent, waits=waits if is_main else ""):
        try:
            return opened()
        except FileNotFoundError as e:
            if folder.exists():
                print(f"{folder} is damaged ({Path(e.filename).name} is missing): it is made anew")
        except (OSError, ValueError) as e:
            print(f"{folder} is damaged ({e}): it is made anew")
        with new_folder(folder, overwrite=True, ways="") as tmp:
            make(source, key, tmp)
            if source.key() != key:
                raise Refusal(
                    f"{source.cfg.dataset} changed while it was read: start again when it is complete",
                    status=1,
                )
        return opened()


# -----------------------------------------------------------------------------------------------------
# How it is made


class Chunk(NamedTuple):
    """Some rows, encoded."""

    ids: np.ndarray  # of all examples, one after the other
    is_learned: np.ndarray
    lengths: list  # of the examples
    left_out: list  # LeftOut, or None for a row that has examples


def convert(rows, source):
    """Returns the Conversations of each (place, row), a tuple. Raises Refusal."""
    if source.conversations_per_row == 2:
        return preferences(rows)
    return [(conversation,) for conversation in conversations(rows, source.text_rule)]


def encode_chunk(rows, source, template, first):
    """Returns the Chunk of (place, row) pairs. first: the Conversations of the first of all rows.

    Raises Refusal, also where no template was given and a row's kind has another one than the first row's.
    """
    converted = convert(rows, source)
    if not source.template:
        default_template([*first, *chain.from_iterable(converted)])
    ids, is_learned, lengths, left_out = [], [], [], []
    for row in converted:
        encoded = encode_row(row, source.tokenizer, template, source.T)
        if isinstance(encoded, LeftOut):
            left_out.append(encoded)
            continue
        left_out.append(None)
        for some_ids, some_learned in encoded:
            ids += some_ids
            is_learned += some_learned
            lengths.append(len(some_ids))
    dtype = shards.id_type(source.tokenizer.vocab_size)
    return Chunk(np.array(ids, dtype), np.frombuffer(bytes(is_learned), bool), lengths, left_out)


def in_chunks(rows):
    """Yields lists of CHUNK rows."""
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def write_ids(datasets, encode, per_row, folder):
    """Writes ids.bin and is_learned.bin of the rows of two datasets. encode(rows) returns a Chunk with per_row
    examples a row.

    Returns four things: where each example starts, and where the last one ends; the number of the first example
    of each row, -1 where the row is left out; {number of a row: its LeftOut}; and how many rows each dataset
    has. Raises Refusal.
    """
    starts = array("q", [0])
    first_examples = array("q")
    left_out = {}
    n_rows = []
    with open(folder / "ids.bin", "wb") as ids, open(folder / "is_learned.bin", "wb") as is_learned:
        for rows in datasets:
            n_before = len(first_examples)
            bar = tqdm(rows, "encoding", unit=" rows", unit_scale=True, disable=None, leave=False)
            for _, chunk in in_threads(encode, in_chunks(bar), os.cpu_count() or 1):
                ids.write(chunk.ids)
                is_learned.write(chunk.is_learned)
                example_number = len(starts) - 1
                for row in chunk.left_out:
                    if row:
                        left_out[len(first_examples)] = row
                        first_examples.append(-1)
                    else:
                        first_examples.append(example_number)
                        example_number += per_row
                for length in chunk.lengths:
                    starts.append(starts[-1] + length)
            n_rows.append(len(first_examples) - n_before)
    return np.array(starts), np.array(first_examples), left_out, n_rows


def make(source, key, folder):
    """Writes the arrays of a source to a folder, meta.json last. Raises Refusal."""
    cfg, per_row = source.cfg, source.conversations_per_row
    rows, held_out = map(iter, read_both(cfg))
    first_row = list(islice(rows, 1))
    first = [*chain.from_iterable(convert(first_row, source))]
    template = source.template or default_template(first)
    check_template(template, source.tokenizer)
    encode = partial(encode_chunk, source=source, template=template, first=first)
    datasets = chain(first_row, rows), held_out
    starts, first_examples, left_out, n_rows = write_ids(datasets, encode, per_row, folder)

    arrays = {"starts": starts}
    lines = {}
    length = source.T
    for side, name, order in zip(SIDES, side_names(cfg), split_numbers(cfg, *n_rows)):
        side_left_out = [left_out[row] for row in order.tolist() if row in left_out]
        lines[side] = side_line(name, len(order), side_left_out, source.T)
        kept = first_examples[order]
        packed, length = pack_side(kept[kept >= 0], np.diff(starts) - 1, per_row, length)
        arrays |= {f"{side}.{part}": values for part, values in packed.items()}
    types = array_types(source.tokenizer.vocab_size)
    for name, values in arrays.items():
        # not by tofile(), which does not say when the disk has no room for the last bytes
        (folder / f"{name}.bin").write_bytes(values.astype(types[name]))

    meta = {
        "key": key,
        "template": template,
        "lines": lines,
        "length": length,
        "files": {name: hash_file(folder / f"{name}.bin") for name in types},
        "rows_sha256": hash_examples(folder, types, arrays, per_row),
    }
    text = json.dumps(meta | {"sha256": hash_json(meta)}, indent=1)
    (folder / "meta.json").write_text(text + "\n", encoding="utf-8")


def pack_side(first_examples, tokens, per_row, length):
    """Returns {name: array} of a side, and how many tokens a row of the context has: `length`, or as many as the
    longest row of the dataset needs.

    first_examples: the number of the first example of each row; tokens: how many each example has.
    """
    in_row = np.arange(per_row)
    numbers = (first_examples[:, None] + in_row).ravel()
    row_tokens = tokens[numbers].reshape(-1, per_row).sum(1)
    length = max(length, int(row_tokens.max()))
    packs = pack(row_tokens.tolist(), length)  # of rows
    members = np.array(list(chain.from_iterable(packs)))
    arrays = {
        "numbers": numbers,
        "packs": (members[:, None] * per_row + in_row).ravel(),
        "pack_starts": np.cumsum([0, *(per_row * len(rows) for rows in packs)]),
    }
    return arrays, length


def hash_examples(folder, types, arrays, per_row):
    """Returns the hash of what a resumed run must find unchanged: the examples to learn from and, for preferences,
    those held out too, as a run keeps what its reference gives both.
    """
    ids, is_learned = [
        Ragged(mapped(folder / f"{name}.bin", types[name]), arrays["starts"])
        for name in ("ids", "is_learned")
    ]
    digest = hashlib.sha256()
    for side in SIDES[:per_row]:
        examples = Examples(ids, is_learned, arrays[f"{side}.numbers"])
        for n in range(len(examples)):
            for values in examples[n]:
                digest.update(values)
    return digest.hexdigest()
