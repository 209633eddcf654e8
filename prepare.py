"""Prepare a dataset: text -> data/NAME/{train.bin,val.bin,tokenizer.json,meta.json}, all of it or nothing.

    python prepare.py                                     # the toy stories (what train.py does by itself)
    python prepare.py --dataset=stories.txt --name=ts     # your own text: .txt .md .jsonl .parquet files or folders of them
    python prepare.py --dataset=tinystories               # roneneldan/TinyStories from the Hugging Face hub
    python prepare.py --dataset=hf:NAME --column=text     # any other hub dataset; hf:NAME:CONFIG where it has several
    python prepare.py --dataset=tinyshakespeare.txt --tokenizer=char --name=shakespeare_char     # nanoGPT's data
    python prepare.py --dataset=stories.txt --tokenizer=hf:gpt2                                  # for train.py --init_from=hf:gpt2

A .txt or .md file is cut into documents at the separator; a line of .jsonl and a row of .parquet hold one each. White space around
a document is dropped, and so is an empty document. Text is UTF-8; in .txt and .md files "\\r\\n" and "\\r" become "\\n", as Python's
open() has it and so nanoGPT. From 100 documents on, random ones are the validation split, and end-of-text follows every document.
With fewer, the last part of the text is the validation split (nanoGPT's cut), end-of-text stands between documents only, and a
document that is alone keeps its white space. Where prompts start with another token than end-of-text (Llama's <s>), so does each
document. bpe is learned from the training split; char takes the characters of both, as nanoGPT.

The text is read three times, with a vocabulary that is there already twice, and only the document at hand is held. *.bin is little-endian uint16, or uint32 past 65,536 tokens.
"""
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import toy_stories
from config import Refusal, hf_name, is_hf, run
from folders import new_folder
from interop.any_tokenizer import load_tokenizer
from tokenizer import Tokenizer

FORMAT = 1
FEW = 100  # documents; a random tenth of fewer is a poor sample
SPLITS = "train", "val"
CHUNK = 1 << 20  # characters that a thread encodes at a time
BREAK = re.compile(r"(?<=\S)[ \n]")             # where a text may be cut: no token of GPT-2's split runs into that from the left
BREAK_FOREIGN = re.compile(r"(?<=[^\W_])[ \n]")  # nor of any other after a letter or a digit; but to Qwen's, ".\n" is one word


@dataclass
class Config:
    dataset: str = "toy"              # toy | tinystories | hf:NAME | a .txt .md .jsonl .parquet file or a folder of them
    name: str = ""                    # the result is data/NAME; empty: the dataset's own name
    tokenizer: str = "bpe"            # bpe | char | gpt2 | gpt2:FOLDER with encoder.json, vocab.bpe | hf:FOLDER_OR_NAME | a tokenizer.json to reuse
    vocab_size: int = 4096            # bpe: at most so many tokens, end-of-text and the 256 bytes among them
    separator: str = "<|endoftext|>"  # between the documents of a .txt or .md file; empty: each file is one document
    column: str = "text"              # where .jsonl, .parquet and hub rows have their text
    val_fraction: float = 0.1         # of the documents, or of the text where they are fewer than 100
    num_stories: int = 30000          # toy
    num_proc: int = 0                 # threads that encode; 0: one a core
    seed: int = 1337                  # of the split, and of toy
    overwrite: bool = False           # replace data/NAME; the old one is kept beside it

    def __post_init__(self):
        if not hf_name(self.dataset):
            raise ValueError("dataset is empty: give a file, a folder, toy, tinystories or hf:NAME, such as hf:roneneldan/TinyStories")
        if not self.name:
            path, hub = Path(os.path.abspath(self.dataset)), hf_name(self.dataset)
            local = path.stem if path.suffix.lower() in READERS else path.name
            self.name = local if hub == self.dataset else hub.partition(":")[0].rpartition("/")[2]
        if not self.name.isprintable() or self.name[:1] in ("", ".") or set(self.name) & set('/\\:*?"<>|'):
            raise ValueError(f"name {self.name!r} cannot be a folder in data/: give another with --name=")
        if not (self.tokenizer in ("bpe", "char", "gpt2") or self.tokenizer.startswith("gpt2:") or is_hf(self.tokenizer)
                or self.tokenizer.endswith(".json")):
            raise ValueError(f"tokenizer must be bpe, char, gpt2, gpt2:FOLDER, hf:FOLDER_OR_NAME or a tokenizer.json, not {self.tokenizer!r}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        for key, least in ("num_stories", 1), ("num_proc", 0), ("seed", 0):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, not {getattr(self, key)}")
        if self.num_proc > 1024:
            raise ValueError(f"num_proc must be at most 1024, not {self.num_proc}")


# ---- reading documents

@contextmanager
def opened(path, newline=None):
    """A file of UTF-8 text, a byte-order mark dropped. Raises Refusal at a byte that is no UTF-8."""
    with open(path, encoding="utf-8-sig", newline=newline) as f:
        try:
            yield f
        except UnicodeDecodeError as e:
            offset = f.buffer.tell() - len(e.object) + e.start  # e.object ends where the file has been read to
            raise Refusal(f"{path} is not UTF-8: byte 0x{e.object[e.start]:02x} at offset {offset}; save it as UTF-8")


def split_text(chunks, separator):
    """What "".join(chunks).split(separator) gives, one by one; an empty separator never splits."""
    held, tail = [], ""
    for chunk in chunks:
        *done, tail = (tail + chunk).split(separator) if separator else [tail + chunk]
        for text in done:
            yield "".join(held) + text
            held = []
        keep = max(0, len(tail) - len(separator) + 1)  # what comes after it may be a separator's beginning
        held.append(tail[:keep])
        tail = tail[keep:]
    text = "".join([*held, tail])
    del held, tail  # this may be all there is, so it should not be there twice
    yield text


def read_text(path, cfg):
    with opened(path) as f:
        yield from split_text(iter(lambda: f.read(CHUNK), ""), cfg.separator)


def jsonl_rows(path):
    """(where, value) of each line that is not blank."""
    with opened(path, newline="\n") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise Refusal(f"{path} line {n} is not JSON ({e}); .jsonl has one object a line")
                yield f"{path} line {n}", row


def read_jsonl(path, cfg):
    return (field(row, cfg.column, where) for where, row in jsonl_rows(path))


def parquet_rows(path, column=None):
    """(where, row) of each row, as a dict of its columns, or of that one alone."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Refusal(f"reading {path} needs pyarrow: pip install pyarrow")
    try:
        with ParquetFile(path) as f:
            if column:
                field(dict.fromkeys(f.schema_arrow.names), column, path)
            for batch in f.iter_batches(100, columns=column and [column]):
                for row in batch.to_pylist():
                    yield path, row
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        raise Refusal(f"cannot read {path} as parquet: {e}")


def read_parquet(path, cfg):
    return (field(row, cfg.column, where) for where, row in parquet_rows(path, cfg.column))


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}


def field(row, column, where, advice="prepare.py --column= chooses from"):
    """row[column], "" for None. Raises Refusal where there is no such column (naming those there are) or no text in it."""
    if not isinstance(row, dict) or column not in row:
        there = ", ".join(map(str, row)) if isinstance(row, dict) else f"none, as it is a {type(row).__name__}"
        raise Refusal(f"{where} has no column {column!r}; {advice}: {there}")
    text = "" if row[column] is None else row[column]
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):  # a number, half of a surrogate pair
        raise Refusal(f"{where}: column {column!r} is not text but {text!r:.60}")
    return text


def documents(files, cfg, exact=False):
    """The documents of all files in order; exact keeps the white space around them."""
    for path in files:
        for text in READERS[path.suffix.lower()](path, cfg):
            if text and not text.isspace():
                yield text if exact else text.strip()


# ---- where they come from

def corpus(cfg, tmp):
    """(training files, validation files); without the latter `split` decides. What is not a local file becomes one in tmp."""
    if cfg.dataset == "toy":
        return [spool((text for text, _ in toy_stories.stories(cfg.num_stories, cfg.seed)), tmp / "toy.jsonl", cfg)], []
    if cfg.dataset == "tinystories" or is_hf(cfg.dataset):
        return from_hub("roneneldan/TinyStories" if cfg.dataset == "tinystories" else hf_name(cfg.dataset), cfg, tmp)
    path = Path(cfg.dataset)
    if not path.exists():
        raise Refusal(f"there is no file or folder {path}; a dataset of the Hugging Face hub is --dataset=hf:NAME")
    found = sorted(path.rglob("*"), key=lambda p: p.parts) if path.is_dir() else [path]
    files = [p for p in found if p.suffix.lower() in READERS and p.is_file()]
    if not files:
        raise Refusal(f"{path}: no file here ends in {' '.join(READERS)}")
    return files, []


def spool(texts, path, cfg):
    with open(path, "w", encoding="utf-8") as f:
        for text in tqdm(texts, f"fetching {path.stem}", unit=" documents", disable=None, leave=False):
            f.write(json.dumps({cfg.column: text}) + "\n")
    return path


def from_hub(name, cfg, tmp):
    """Streams a hub dataset to disk, once. Its split "validation" is used where it has one."""
    with hub_splits(name) as splits:
        files = [spool((field(row, cfg.column, name) for row in splits[s]), tmp / f"{s}.jsonl", cfg)
                 for s in ("train", "validation") if s in splits]
    return files[:1], files[1:]


@contextmanager
def hub_splits(name):
    """The splits of a dataset on the Hugging Face hub, NAME or NAME:CONFIG, each an iterable of rows. Raises Refusal for what goes
    wrong inside the with, where they are read, too."""
    name, _, config = name.partition(":")
    try:
        import datasets
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError
        HfApi().dataset_info(name, timeout=10)  # one request; load_dataset without a network retries for 20 s
        splits = datasets.load_dataset(name, config or None, streaming=True)
        if "train" not in splits:
            raise Refusal(f"{name} on the Hugging Face hub has no split train, only: {', '.join(splits)}")
        yield splits
    except Refusal:
        raise
    except ImportError as e:
        raise Refusal(f"reading {name} from the Hugging Face hub needs its libraries ({e}): pip install datasets")
    except RepositoryNotFoundError:
        raise Refusal(f"the Hugging Face hub has no dataset {name}, or a private one: see https://huggingface.co/datasets")
    except Exception as e:  # the libraries below raise their own, other ones in each version
        raise Refusal(f"cannot read {name} from the Hugging Face hub ({type(e).__name__}: {e}); "
                      "without a network there are --dataset=FILE.txt, your own text, and --dataset=toy")


# ---- from documents to tokens. A row is (split, text, whether end-of-text follows, whether a document ends here).

def count(docs):
    """(documents, characters in them), white space around a document counting only if it is alone."""
    n = chars = whole = 0
    for n, text in watched(enumerate(docs, 1), "reading"):
        chars += len(text.strip())
        whole = len(text)
    return n, whole if n == 1 else chars


def split(cfg, files, val_files, n, chars):
    """Rows, one a document, of all n documents, which hold chars characters; one that the cut goes through is two."""
    docs = documents(files, cfg, exact=n == 1)
    if val_files:
        yield from (("train", text, True, True) for text in docs)
        yield from (("val", text, True, True) for text in documents(val_files, cfg))
    elif n >= FEW:
        is_val = np.random.default_rng(cfg.seed).permutation(n) < round(cfg.val_fraction * n)
        yield from ((SPLITS[val], text, True, True) for text, val in zip(docs, is_val.tolist()))
    else:
        left = int(chars * (1 - cfg.val_fraction))
        for i, text in enumerate(docs, 1):
            head, tail = text[:left], text[left:]
            left -= len(head)
            if head:
                yield "train", head, i < n and not tail, True
            if tail:
                yield "val", tail, i < n, True


def pieces(rows, cuts=BREAK):
    """The same rows, and whether a text begins here, with long texts in pieces, cut before white space where `cuts` has it."""
    for which, text, eot, last in rows:
        start = 0
        while start < len(text):
            cut = cuts.search(text, start + CHUNK)
            stop = cut.start() if cut else len(text)
            whole = stop == len(text)
            yield which, text[start:stop], eot and whole, last and whole, not start
            start = stop


def watched(rows, what, total=None):
    """The same rows, with a progress bar of characters where stderr is a terminal."""
    with tqdm(desc=what, total=total, unit=" characters", unit_scale=True, disable=None, leave=False) as bar:
        for row in rows:
            yield row
            bar.update(len(row[1]))


def chunks(rows):
    """Lists of rows with about CHUNK characters."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += len(row[1]) + 100  # what the tuple itself takes counts where texts are tiny
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    yield chunk


def id_type(vocab_size):
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def sync(f):
    f.flush()
    os.fsync(f.fileno())


def encode(rows, tokenizer, tmp, num_proc):
    """Writes tmp/train.bin and tmp/val.bin; returns what meta.json says of them.

    Threads, since tiktoken works without the interpreter's lock: 18 MB/s on 2 cores, where processes did 16 and start slower.
    """
    dtype, threads = id_type(tokenizer.vocab_size), num_proc or os.cpu_count() or 1
    made = {s: {"file": f"{s}.bin", "tokens": 0, "documents": 0, "characters": 0, "bytes": 0} for s in SPLITS}
    hashes = {s: hashlib.sha256() for s in SPLITS}

    def counted():
        for which, text, eot, last, first in rows:
            made[which]["documents"] += last
            made[which]["characters"] += len(text)
            made[which]["bytes"] += len(text.encode())
            yield which, text, eot, first

    def encode_chunk(chunk):
        ids = {s: [] for s in SPLITS}
        for which, text, eot, first in chunk:
            ids[which] += (tokenizer.head + tokenizer.encode(text) if first else tokenizer.encode_more(text)) + [tokenizer.eot] * eot
        return {s: np.array(ids[s], dtype) for s in SPLITS}

    with open(tmp / "train.bin", "wb") as train, open(tmp / "val.bin", "wb") as val, ThreadPoolExecutor(threads) as pool:
        todo = chunks(counted())
        while batch := list(islice(todo, 4 * threads)):  # pool.map would read all of todo at once
            for ids in pool.map(encode_chunk, batch):
                for s, f in zip(SPLITS, (train, val)):
                    f.write(ids[s])
                    hashes[s].update(ids[s])
                    made[s]["tokens"] += len(ids[s])
        sync(train)
        sync(val)
    return {s: made[s] | {"sha256": hashes[s].hexdigest()} for s in SPLITS}


# ---- the folder

def ready_made(cfg):
    """The tokenizer that cfg names; None for one that is made from the text."""
    try:
        if is_hf(cfg.tokenizer):
            from interop import hf_folder  # and torch with it, which nothing else here needs
            return hf_folder.read_tokenizer(hf_folder.find_folder(hf_name(cfg.tokenizer), weights=""))
        if cfg.tokenizer.endswith(".json"):
            return load_tokenizer(Path(cfg.tokenizer).read_text(encoding="utf-8"))
        if cfg.tokenizer.startswith("gpt2"):
            return Tokenizer.gpt2(cfg.tokenizer[5:] or None)
    except (OSError, ValueError) as e:
        theirs = "; a folder that transformers wrote is --tokenizer=hf:FOLDER" * (cfg.tokenizer.endswith(".json") and isinstance(e, ValueError))
        raise Refusal(f"--tokenizer={cfg.tokenizer}: {e}{theirs}")


def build(cfg, tmp):
    """Fills the folder tmp, meta.json last."""
    tokenizer = ready_made(cfg)
    files, val_files = corpus(cfg, tmp)
    n, chars = count(documents(files + val_files, cfg, exact=True))
    if not n:
        raise Refusal(f"{cfg.dataset}: there is no text in it")
    if n < FEW and not val_files:
        print(f"fewer than {FEW} documents ({n}): the last {100 * cfg.val_fraction:g}% of the text is the validation split")

    def rows(doing):
        return watched(pieces(split(cfg, files, val_files, n, chars), BREAK_FOREIGN if tokenizer and tokenizer.kind == "foreign" else BREAK), doing, chars)

    try:
        if cfg.tokenizer == "char":
            tokenizer = Tokenizer.char(text for _, text, *_ in rows("collecting characters"))
        elif cfg.tokenizer == "bpe":
            tokenizer = Tokenizer.train((text for s, text, *_ in rows("learning words") if s == "train"), cfg.vocab_size)
        splits = encode(rows("encoding"), tokenizer, tmp, cfg.num_proc)
    except ValueError as e:  # the tokenizer's, such as a character that it does not have
        raise Refusal(e)
    if sum(made["characters"] for made in splits.values()) != chars:
        raise Refusal(f"{cfg.dataset} changed while it was read; prepare it when it is complete", status=1)
    for s, made in splits.items():
        if made["tokens"] < 2:
            raise Refusal(f"the {s} split has {made['tokens']} tokens and needs 2: give more text or another --val_fraction")
    for spooled in tmp.glob("*.jsonl"):
        spooled.unlink()
    meta = {"format": FORMAT, "name": cfg.name, "source": cfg.dataset, "separator": cfg.separator, "column": cfg.column,
            "val_fraction": cfg.val_fraction, "seed": cfg.seed, "dtype": id_type(tokenizer.vocab_size).name,
            "vocab_size": tokenizer.vocab_size, "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
            "splits": splits}
    for name, text in ("tokenizer.json", tokenizer.to_str()), ("meta.json", json.dumps(meta, indent=1) + "\n"):
        with open(tmp / name, "wb") as f:
            f.write(text.encode())
            sync(f)


def prepare(cfg):
    """Makes data/NAME and returns its path, or changes nothing. Raises Refusal."""
    folder = Path("data", cfg.name)
    with new_folder(folder, cfg.overwrite, "--overwrite prepares it anew (the old one is kept beside it), --name= another") as tmp:
        build(cfg, tmp)
    return folder.as_posix()


def load(folder):
    """(meta, {"train": ids, "val": ids}, tokenizer) of a prepared folder; ids are 1-D memmaps of uint16 or uint32.

    Every file is checked against meta.json. Raises Refusal.
    """
    folder, name = Path(folder), "meta.json"
    if folder.is_file():
        raise Refusal(f"{folder} is a file: python prepare.py --dataset={folder} --name={folder.stem} makes data/{folder.stem} of it")
    if not folder.exists():
        raise Refusal(f"there is no dataset {folder}: python prepare.py --dataset={'tinystories' if folder.name == 'tinystories' else f'FILE --name={folder.name}'} makes it")
    try:
        meta = json.loads((folder / name).read_text(encoding="utf-8"))
        splits = {s: (meta["splits"][s]["tokens"], meta["splits"][s]["sha256"]) for s in SPLITS}
        expected, dtype = (meta["vocab_size"], meta["tokenizer"]["sha256"]), id_type(meta["vocab_size"])
        if (meta["format"], meta["dtype"]) != (FORMAT, dtype.name):
            raise ValueError(f"format {meta['format']!r} with {meta['dtype']!r} is not {FORMAT} with {dtype.name}")
        name = "tokenizer.json"
        tokenizer = load_tokenizer((folder / name).read_bytes().decode("utf-8"))
        if (tokenizer.vocab_size, tokenizer.sha256) != expected:
            raise ValueError("not the tokenizer that the data was made with")
        data = {}
        for s, (tokens, sha256) in splits.items():
            name = f"{s}.bin"
            ids = data[s] = np.memmap(folder / name, dtype, mode="r")
            if len(ids) != tokens:
                raise ValueError(f"{len(ids)} tokens, where meta.json says {tokens}")
            digest, top = hashlib.sha256(), 0
            for i in range(0, len(ids), 1 << 24):
                digest.update(ids[i:i + (1 << 24)])
                top = max(top, ids[i:i + (1 << 24)].max())
            if digest.hexdigest() != sha256:
                raise ValueError("its sha256 is not the one in meta.json")
            if top >= tokenizer.vocab_size:
                raise ValueError(f"it holds id {top}, and the vocabulary ends at {tokenizer.vocab_size - 1}")
        return meta, data, tokenizer
    except FileNotFoundError:
        problem = "there is no such file"
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        problem = f"not written by prepare.py ({e!r})"
    except (OSError, ValueError) as e:
        problem = e
    raise Refusal(f"{folder / name}: {problem}; prepare it again: "
                  f"python prepare.py --dataset=... --name={folder.name} --overwrite")


def main(cfg):
    began = time.time()
    folder = prepare(cfg)
    seconds = time.time() - began
    meta = json.loads(Path(folder, "meta.json").read_text(encoding="utf-8"))
    for made in meta["splits"].values():
        print(f"{folder}/{made['file']}: {made['documents']:,} documents, {made['tokens']:,} tokens, {made['bytes']:,} bytes, "
              f"{made['bytes'] / made['tokens']:.3f} bytes a token")
    megabytes = sum(made["bytes"] for made in meta["splits"].values()) / 1e6
    print(f"vocabulary of {meta['vocab_size']:,} ({meta['tokenizer']['kind']}), {seconds:.1f} s, {megabytes / seconds:.1f} MB/s")


if __name__ == "__main__":
    run(main, Config)
