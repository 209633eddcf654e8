"""The texts in files of several kinds, one by one; of those with rows also the rows.

    documents([Path("a.jsonl.zst"), Path("b.parquet")], cfg)

cfg is prepare.py's Config, whose docstring says what is read and how.
"""

import csv
import gzip
import io
import json
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from config import Refusal

CHUNK = 1 << 20  # characters that are read at a time
PACKINGS = (".gz", ".zst")  # what may follow the suffix of each kind of file


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
    """Opens a file to read its bytes, unpacked from .gz and .zst. Raises Refusal, also inside the with."""
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


def find_pyarrow(path):
    """Returns the library pyarrow, to read a file with. Raises Refusal."""
    try:
        import pyarrow
    except ImportError as e:  # also where numpy is too old for it, which pip does not prevent
        raise Refusal(f"reading {path} needs pyarrow ({e}): pip install -r requirements.txt")
    return pyarrow


def open_zstd(path):
    """Opens a .zst file to read the bytes inside; one that is cut off is an OSError.

    By pyarrow, which is needed for .parquet anyway; the package zstandard takes a cut for the end.
    """
    return find_pyarrow(path).input_stream(str(path), compression="zstd")


@contextmanager
def opened(path, newline=None):
    """Opens a file of text without its byte-order mark. Raises Refusal where it is not UTF-8."""
    with opened_bytes(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline=newline) as f:
        try:
            yield f
        except UnicodeDecodeError as e:
            place = f"byte 0x{e.object[e.start]:02x}"
            if binary.seekable():
                # e.object is what was read last: it ends where the file is now
                place += f" at offset {binary.tell() - len(e.object) + e.start}"
            raise Refusal(f"{path} is not UTF-8: {place}; save it as UTF-8")


def split_text(chunks, separator):
    """Yields what "".join(chunks).split(separator) has, one by one; an empty separator never splits."""
    # the part that has not ended yet is "".join(head) + tail; a separator may begin in its tail alone
    head = []
    tail = ""
    for chunk in chunks:
        *parts, tail = (tail + chunk).split(separator) if separator else [tail + chunk]
        for part in parts:
            yield "".join(head) + part
            head = []
        safe = max(0, len(tail) - len(separator) + 1)  # the rest may be the beginning of a separator
        head.append(tail[:safe])
        tail = tail[safe:]
    text = "".join([*head, tail])
    del head, tail  # text may be a whole file, which memory should not hold twice
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
        rows = filter(None, csv.reader(f, strict=True))  # a blank line is no row, nor a header
        try:
            header = next(rows, [])
            if column and header:
                field(dict.fromkeys(header), column, path)
            for n, values in enumerate(rows, 1):
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
            source = io.BytesIO(f.read())  # .parquet is not read from front to back
    yield from open_parquet_rows(source, path, column)


def open_parquet_rows(source, path, column):
    """Does what parquet_rows does, for a source that is a path or an open file; messages call it path."""
    pyarrow = find_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    n = 0
    try:
        # piece by piece: pre_buffer would hold a whole group of rows, which may be the whole file
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


def documents(files, cfg, exact=False):
    """Yields the documents of all files in order; exact: with the white space around them."""
    for path in files:
        read = READERS[file_kind(path)]
        for text in read(path, cfg):
            if text and not text.isspace():
                yield text if exact else text.strip()


def column_texts(rows, column):
    for place, row in rows:
        yield field(row, column, place)


def field(row, column, place, advice="prepare.py --column= chooses from"):
    """Returns row[column], "" for None.

    Raises Refusal where there is no such column, with `advice` before the columns that there are, or where
    it holds no text.
    """
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise Refusal(f"{place} has no column {column!r}; {advice}: none, as it is a {kind}")
    if column not in row:
        columns = ", ".join(map(str, row))
        raise Refusal(f"{place} has no column {column!r}; {advice}: {columns}")
    return check_text("" if row[column] is None else row[column], f"{place}: column {column!r}")


def check_text(text, place):
    """Returns the text. Raises Refusal where it is no str, or has half of a surrogate pair in it."""
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise Refusal(f"{place} is not text but {text!r:.60}")
    return text
