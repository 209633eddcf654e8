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

import json
import os
import re
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from config import Refusal, check_range, hf_name, is_hf, new_lines, run

# isort: split
import numpy as np
from tqdm import tqdm

from dataset import FORMAT
from folders import new_folder
from interop.any_tokenizer import load_tokenizer
from progress import STATE, Progress, has_parts, write_text
from readers import READERS, documents, file_kind, unpacked
from shards import SPLITS, id_type, name_shards
from sources import base_folder, find_files, is_pattern
from tokenizer import Tokenizer, check_vocab_size

FEW = 100  # documents: of fewer a random tenth would be a poor sample
CHUNK = 1 << 20  # characters that a thread encodes at a time
MB = 10**6

# Where a text may be cut: between anything and the white space after it, which GPT-2's split never puts into one word.
# With any other tokenizer only after a letter or a digit: to Qwen's, ".\n" is one word.
BREAK = re.compile(r"(?<=\S)[ \n]")
BREAK_FOREIGN = re.compile(r"(?<=[^\W_])[ \n]")


@dataclass
class Config:
    dataset: str = "toy"  # toy | tinystories | hf:NAME | a file, a folder or a pattern
    val_dataset: str = ""  # the same for the validation split; empty: the dataset's own or a share of it
    subset: str = ""  # of hf:NAME: its configuration, where it has several; also hf:NAME:SUBSET
    split: str = ""  # of hf:NAME: what is trained on; empty: train
    name: str = ""  # the result is data/NAME; empty: the dataset's own name
    tokenizer: str = "bpe"  # bpe | char | gpt2 | gpt2:FOLDER | hf:FOLDER_OR_NAME | FILE.json to reuse
    vocab_size: int = 4096  # bpe: at most so many tokens, end-of-text and the 256 bytes among them
    separator: str = "<|endoftext|>"  # of .txt and .md documents, \n a new line; empty: a file is one
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
        self.separator = new_lines(self.separator)
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
        if self.tokenizer == "bpe":  # else only learning, which comes last, would find out
            check_vocab_size(self.vocab_size)
        check_range(self, "above 0 and below 1", "val_fraction")
        check_range(self, "at least 1", "num_stories", "shard_mb")
        check_range(self, "at least 0 and at most 1024", "num_proc")
        check_range(self, "at least 0", "seed")


def dataset_name(dataset):
    """Returns "stories" for a/stories.txt, a/stories, a/stories/*.txt, hf:me/stories and hf:me/stories:S."""
    if is_hf(dataset):
        repo = hf_name(dataset).partition(":")[0]
        return repo.rstrip("/").rpartition("/")[2]
    if is_pattern(dataset):
        return Path(os.path.abspath(base_folder(dataset))).name
    path = Path(os.path.abspath(dataset))
    return unpacked(path).stem if file_kind(path) else path.name


# ---- from documents to tokens


class Piece(NamedTuple):
    """A document, or the part of it that a split has. A long one is cut into pieces: the first begins it, the last
    ends it.
    """

    split: str
    text: str
    add_eot: bool  # whether end-of-text follows
    begins: bool = True
    ends: bool = True


def count_documents(docs, exact):
    """Returns (documents, characters). White space around a document counts only with exact, where it is alone."""
    n = 0
    chars = 0
    with progress_bar("reading") as bar:
        for n, text in enumerate(docs, 1):
            chars += len(text.strip())
            bar.update(len(text))
    return (1, len(text)) if n == 1 and exact else (n, chars)


def split_documents(cfg, files, val_files, n, chars):
    """Yields all n documents, which hold chars characters, each as one Piece, or as two where the cut between the
    splits goes through it.
    """
    docs = documents(files, cfg, exact=n == 1)
    if val_files:
        for text in docs:
            yield Piece("train", text, add_eot=True)
        for text in documents(val_files, cfg):
            yield Piece("val", text, add_eot=True)
    elif n >= FEW:
        is_val = np.random.default_rng(cfg.seed).permutation(n) < round(cfg.val_fraction * n)
        for text, val in zip(docs, is_val.tolist()):
            yield Piece("val" if val else "train", text, add_eot=True)
    else:
        left = int(chars * (1 - cfg.val_fraction))  # characters of the training split that are to come
        for i, text in enumerate(docs, 1):
            head = text[:left]
            tail = text[left:]
            left -= len(head)
            if head:
                yield Piece("train", head, add_eot=i < n and not tail)
            if tail:
                yield Piece("val", tail, add_eot=i < n)


def cut_long(pieces, cuts=BREAK):
    """Yields pieces, long ones cut where the pattern `cuts` matches."""
    for split, text, add_eot, *_ in pieces:
        start = 0
        while start < len(text):
            cut = cuts.search(text, start + CHUNK)
            stop = cut.start() if cut else len(text)
            is_last = stop == len(text)
            part = text[start:stop]
            yield Piece(split, part, add_eot and is_last, begins=start == 0, ends=is_last)
            start = stop


def progress_bar(desc, total=None):
    """Returns a progress bar of characters, to be seen where stderr is a terminal."""
    return tqdm(desc=desc, total=total, unit=" characters", unit_scale=True, disable=None, leave=False)


def with_progress(pieces, desc, total):
    """Yields the pieces, with a progress bar."""
    with progress_bar(desc, total) as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece.text))


def with_counts(pieces, stats):
    """Yields the pieces, and adds to stats[split] how many documents, characters and bytes they hold."""
    for piece in pieces:
        counts = stats[piece.split]
        counts["documents"] += int(piece.ends)
        counts["characters"] += len(piece.text)
        counts["bytes"] += len(piece.text.encode())
        yield piece


def chunks(pieces):
    """Yields lists of pieces with about CHUNK characters."""
    chunk = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece.text) + 100  # about what the tuple takes, which counts where texts are tiny
        if size >= CHUNK:
            yield chunk
            chunk = []
            size = 0
    yield chunk


def encode_chunk(chunk, tokenizer):
    """Returns {"train": ids, "val": ids} of a list of pieces, each a 1-D array."""
    ids = {split: [] for split in SPLITS}
    beginnings = [piece.text for piece in chunk if piece.begins]
    encoded = iter(tokenizer.encode_batch(beginnings, num_threads=1))  # the chunk has its own
    for piece in chunk:
        if piece.begins:
            ids[piece.split] += tokenizer.head + next(encoded)
        else:
            ids[piece.split] += tokenizer.encode_more(piece.text)
        if piece.add_eot:
            ids[piece.split].append(tokenizer.eot)
    dtype = id_type(tokenizer.vocab_size)
    return {split: np.array(ids[split], dtype) for split in SPLITS}


def in_threads(function, items, threads):
    """Yields each item and function(item), in order, and reads only a few items ahead: pool.map would read all.

    Threads, since tiktoken works without the interpreter's lock: 18 MB/s on 2 cores, where processes
    did 16 and start slower.
    """
    ahead = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            ahead.append((item, pool.submit(function, item)))
            if len(ahead) > 2 * threads:
                item, result = ahead.popleft()
                yield item, result.result()
        for item, result in ahead:
            yield item, result.result()


def encode(pieces, tokenizer, cfg, progress, chars=None):
    """Writes the ids of the pieces to files, but for those that progress already has. Returns what meta.json says of
    each split. chars: characters in all pieces, for the progress bar.
    """
    dtype = id_type(tokenizer.vocab_size)
    size = cfg.shard_mb * MB // dtype.itemsize
    stats = {split: {"documents": 0, "characters": 0, "bytes": 0} for split in SPLITS}
    todo = chunks(with_counts(pieces, stats))
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("encoding", chars))
        writers, done = progress.open_writers(size, dtype)
        for writer in writers.values():
            stack.enter_context(writer)
        for chunk in islice(todo, done):  # what a killed run encoded is only read
            bar.update(sum(len(piece.text) for piece in chunk))
        threads = cfg.num_proc or os.cpu_count() or 1
        for chunk, ids in in_threads(lambda chunk: encode_chunk(chunk, tokenizer), todo, threads):
            bar.update(sum(len(piece.text) for piece in chunk))
            done += 1
            ended = [writer.write(ids[split]) for split, writer in writers.items()]
            if any(ended):
                progress.note_files(writers, done)
        for split, writer in writers.items():
            files = writer.finish()
            tokens = sum(file["tokens"] for file in files)
            stats[split] = {"tokens": tokens, **stats[split], "files": files}
    return stats


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


def validation_part(cfg, n, chars, origin):
    """Returns which part of n documents, of chars characters, is the validation split, in words; split_documents cuts
    it so. Raises Refusal where it or the training split gets no text.
    """
    percent = f"{100 * cfg.val_fraction:g}%"
    if n < FEW:
        part = f"the last {percent} of the text"
        print(f"fewer than {FEW} documents ({n}): {part} is the validation split")
        total = chars
        unit = "characters"
        train = int(chars * (1 - cfg.val_fraction))
    else:
        part = f"{percent} of the documents"
        total = n
        unit = "documents"
        train = n - round(cfg.val_fraction * n)
    for split, share in (("train", train), ("val", total - train)):
        if share == 0:
            problem = f"{percent} for validation leave the {split} split none of its {total:,} {unit}"
            raise Refusal(f"{origin}: {problem}: give more text or another --val_fraction")
    return part


def learn(cfg, pieces, chars):
    """Returns the tokenizer that is made from the pieces. chars: as encode has it. Raises ValueError."""
    if cfg.tokenizer == "char":
        pieces = with_progress(pieces, "collecting characters", chars)
        return Tokenizer.char(piece.text for piece in pieces)
    pieces = with_progress(pieces, "learning words", chars)
    texts = (piece.text for piece in pieces if piece.split == "train")
    progress = partial(tqdm, desc="learning merges", unit=" merges", disable=None, leave=False)
    return Tokenizer.train(texts, cfg.vocab_size, progress)


def settings_of(cfg, tokenizer):
    """Returns the settings on which the result depends, beside the text. tokenizer: None if it is to be learned."""
    settings = asdict(cfg) | {"format": FORMAT, "chunk": CHUNK}
    for key in "name", "num_proc", "overwrite":
        del settings[key]
    if tokenizer:
        settings |= {"tokenizer": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    return settings


def build(cfg, tmp):
    """Fills the folder tmp, in which a killed run may have left a part. Raises Refusal."""
    tokenizer = choose_tokenizer(cfg)
    is_foreign = tokenizer is not None and tokenizer.kind == "foreign"
    cuts = BREAK_FOREIGN if is_foreign else BREAK
    progress = Progress(tmp, cfg.name, settings_of(cfg, tokenizer))
    files, origins = find_files(cfg, tmp, progress)
    progress.check_sources(files)
    counts = progress.done.get("counts") or count_splits(cfg, files)
    for split, (n, _) in counts.items():
        if n == 0:
            raise Refusal(f"{origins[split]}: there is no text in it")
    n, chars = map(sum, zip(*counts.values()))
    if not files["val"]:
        part = validation_part(cfg, n, chars, origins["train"])
        origins["val"] = f"{origins['train']}; {part}"
        origins["train"] += "; the rest"
    progress.note(counts=counts)

    def read_pieces():
        return cut_long(split_documents(cfg, files["train"], files["val"], n, chars), cuts)

    try:
        if not tokenizer:
            tokenizer = progress.tokenizer() or learn(cfg, read_pieces(), chars)
            progress.note_tokenizer(tokenizer)
        splits = encode(read_pieces(), tokenizer, cfg, progress, chars)
    except ValueError as e:  # the tokenizer's, such as a character that it does not have
        raise Refusal(e)

    if sum(stats["characters"] for stats in splits.values()) != chars:
        message = f"{cfg.dataset} changed while it was read; prepare it when it is complete"
        raise Refusal(message, status=1)
    for split, stats in splits.items():
        if stats["tokens"] < 2:
            problem = f"the {split} split has {stats['tokens']} tokens and needs 2"
            way = "" if files["val"] else " or another --val_fraction"
            raise Refusal(f"{origins[split]}: {problem}: give more text{way}")
        stats["source"] = origins[split]
    finish(cfg, tmp, tokenizer, splits)


def finish(cfg, tmp, tokenizer, splits):
    """Writes what a dataset has beside its ids, and removes what only going on with it would need.

    splits: what encode returned, each with its source.
    """
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


def prepare(cfg):
    """Makes data/NAME and returns its path, or changes nothing; goes on where a run was killed.

    Raises Refusal.
    """
    folder = Path("data", cfg.name)
    ways = "--overwrite prepares it anew (the old one is kept beside it), --name= another"
    with new_folder(folder, cfg.overwrite, ways, is_worth=has_parts) as tmp:
        build(cfg, tmp)
    return folder.as_posix()


def read_file(path):
    """Returns the documents of a file, as prepare.py cuts them, and whether the last one has an end.

    Raises Refusal for a file that is no text.
    """
    cfg = Config(dataset=path, name="text")
    if not os.path.isfile(path):
        raise Refusal(f"there is no file {path}")
    if not file_kind(path):
        endings = " ".join(READERS)
        raise Refusal(f"{path}: no text file by its name, which should end in {endings}")
    texts = list(documents([path], cfg))
    if not texts:
        raise Refusal(f"{path}: there is no text in it")
    return texts, len(texts) > 1


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
