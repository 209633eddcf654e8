"""The ids of a dataset in files of bounded size: writing them, and reading them as one array.

    train.bin                               a split of one file, as nanoGPT has it
    train_00000.bin, train_00001.bin, ...   one of more files, each but the last as large as the first

A file is little-endian uint16, or uint32 past 65,536 tokens. A document may go on in the next file.
meta.json names the files of each split in order, with the tokens and the sha256 of each.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from folders import sync

SPLITS = ("train", "val")
HASH_CHUNK = 1 << 24  # ids that are checked at a time


def id_type(vocab_size):
    """Returns the dtype of token ids in *.bin."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def shard_name(split, i):
    return f"{split}_{i:05}.bin"


def shard_names(split, n):
    """Returns the names of the n files of a split."""
    return [f"{split}.bin"] if n == 1 else [shard_name(split, i) for i in range(n)]


class Shards:
    """Several 1-D arrays of one dtype as one: len, an id, a slice, == and what numpy makes of it.

    A slice that lies in one part is a view of it, one across a border is a copy. The whole is in memory only
    where somebody asks for it, as by ids[:] or np.asarray(ids).
    """

    def __init__(self, parts):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])  # of each part, and where the last one ends
        self.dtype = parts[0].dtype
        self.shape = (int(self.starts[-1]),)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        if not isinstance(key, slice):
            i = range(len(self))[key]  # a negative key counts from the end; IndexError beyond it
            part = np.searchsorted(self.starts, i, "right") - 1
            return self.parts[part][i - self.starts[part]]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError("ids in several files have no slices with a step")
        if start >= stop:
            return self.parts[0][:0]
        first, last = np.searchsorted(self.starts, [start, stop - 1], "right") - 1
        pieces = []
        for part, begin in zip(self.parts[first : last + 1], self.starts[first:]):
            pieces.append(part[max(start - begin, 0) : stop - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def __eq__(self, other):
        return np.concatenate([part == other for part in self.parts])

    __hash__ = None  # as an array's

    def __array__(self, dtype=None, copy=None):
        whole = np.concatenate(self.parts)
        return whole if dtype is None else whole.astype(dtype)


class ShardWriter:
    """Writes the ids of a split to a folder, in files of `size` ids; only the last one may have fewer.

    files: those written so far with their tokens and sha256, the unfinished one too. A writer that is given
    the files of an earlier one goes on from there, and cuts off what was written later. It raises ValueError
    or OSError where the files in the folder are others.
    """

    def __init__(self, folder, split, size, dtype, files=()):
        self.folder = folder
        self.split = split
        self.size = size
        self.dtype = dtype
        self.f = None
        self.whole = []  # the entries of the files that are finished
        self.tokens = 0  # in the unfinished one
        self.digest = hashlib.sha256()
        named = folder / f"{split}.bin"
        if files and named.exists():  # a run was killed after name_shards had renamed its only file
            named.rename(folder / shard_name(split, 0))
        for entry in files:
            path = folder / entry["file"]
            tokens = entry["tokens"]
            os.truncate(path, tokens * dtype.itemsize)
            digest, _ = check_file(path, dtype, tokens, entry["sha256"])
            if tokens == size:
                self.whole.append(entry)
            else:
                self.f = open(path, "ab")
                self.tokens = tokens
                self.digest = digest

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.f:
            self.f.close()

    @property
    def files(self):
        if not self.f:
            return self.whole
        name = shard_name(self.split, len(self.whole))
        return [*self.whole, {"file": name, "tokens": self.tokens, "sha256": self.digest.hexdigest()}]

    def write(self, ids):
        """Appends ids, a 1-D array of the writer's dtype. Returns whether that ended a file."""
        n_whole = len(self.whole)
        while len(ids):
            if not self.f:
                self.f = open(self.folder / shard_name(self.split, len(self.whole)), "wb")
                self.tokens = 0
                self.digest = hashlib.sha256()
            part = ids[: self.size - self.tokens]
            self.f.write(part)
            self.digest.update(part)
            self.tokens += len(part)
            ids = ids[len(part) :]
            if self.tokens == self.size:
                self.end_file()
        return len(self.whole) > n_whole

    def end_file(self):
        sync(self.f)
        self.f.close()
        self.whole = self.files
        self.f = None

    def sync(self):
        """Returns when the files are on disk."""
        if self.f:
            sync(self.f)

    def finish(self):
        """Ends the split. Returns its files for meta.json, by the names that name_shards gives them."""
        if self.f:
            self.end_file()
        names = shard_names(self.split, len(self.whole))
        return [entry | {"file": name} for entry, name in zip(self.whole, names)]


def name_shards(folder, splits):
    """Renames the files of ShardWriters to the names that finish returned: train_00000.bin is train.bin where it
    is the only one. splits: those of meta.json.
    """
    for split, entry in splits.items():
        for i, file in enumerate(entry["files"]):
            (folder / shard_name(split, i)).rename(folder / file["file"])


def check_file(path, dtype, tokens, sha256):
    """Returns (the hashlib object of a file's content, its highest id). Raises ValueError where the file has
    another number of tokens or another sha256, OSError where it cannot be read.
    """
    size = Path(path).stat().st_size
    if size != tokens * dtype.itemsize:
        there = f"{size // dtype.itemsize} tokens" if size % dtype.itemsize == 0 else f"{size} bytes"
        raise ValueError(f"{there}, where meta.json says {tokens} tokens of {dtype.itemsize} bytes")
    ids = np.memmap(path, dtype, mode="r")
    digest = hashlib.sha256()
    highest = 0
    for i in range(0, len(ids), HASH_CHUNK):
        chunk = ids[i : i + HASH_CHUNK]
        digest.update(chunk)
        highest = max(highest, int(chunk.max()))
    if digest.hexdigest() != sha256:
        raise ValueError("its sha256 is not the one in meta.json")
    return digest, highest
