"""Reads a tokenizer of either kind: ours (tokenizer.py), or a foreign one (foreign_tokenizer.py)."""

import json

from interop.chat_template import read_note
from interop.foreign_tokenizer import ForeignTokenizer, encode_text, list_parts, make_library_tokenizer
from tokenizer import Tokenizer
from vocabulary import EOT, bos_processor


def load_tokenizer(text):
    """Returns the Tokenizer or ForeignTokenizer whose to_str wrote this text. Raises ValueError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    keys = set(data) if isinstance(data, dict) else set()
    if keys == {"eot", "bos", "ends", "files"}:
        return ForeignTokenizer(data["files"], data["eot"], data["bos"], data["ends"])
    if keys == {"eot", "bos", "tokenizer"}:  # from before 2026-11-28
        files = {"tokenizer.json": json.dumps(data["tokenizer"], ensure_ascii=False, indent=1)}
        return ForeignTokenizer(files, data["eot"], data["bos"])
    return Tokenizer.from_str(text)


def from_files(files, data, eot, ends=()):
    """Returns the tokenizer of a folder's files, {name: text}: ours if hf.py wrote it and nobody gave it another chat
    template or another end since, else a foreign one. Raises ValueError.

    data: their parsed tokenizer.json, whose post_processor says what a text starts with, as in transformers 5.
    eot, ends: the id that ends documents, and all at which generation stops.
    """
    bos = find_bos(data, eot)
    tokenizer = ForeignTokenizer(files, eot, bos, ends)
    own = tokenizer.own
    if not own:
        return tokenizer
    own_bos = None if own.kind == "char" else eot
    if own.eot != eot or bos != own_bos or tokenizer.ends != (eot,):
        return tokenizer
    source = tokenizer.template_source
    if source is not None:
        own.tuning = read_note(own, source)
    return own if source is None or own.tuning else tokenizer


def find_bos(data, eot):
    """Returns the id that the post_processor puts before a text, or None. Raises ValueError."""
    post_processor = data.get("post_processor")
    if post_processor == bos_processor(EOT, eot):
        return eot  # our own processor; neither this case nor the next one needs the library
    parts = list_parts(post_processor)
    if post_processor is None or parts and all(part.get("type") == "ByteLevel" for part in parts):
        return None
    library_tokenizer = make_library_tokenizer(data)
    plain = encode_text(library_tokenizer, "a")
    ids = encode_text(library_tokenizer, "a", add_special_tokens=True)
    if ids[-len(plain) :] != plain or len(ids) > len(plain) + 1:
        limit = "here at most one token is put before a text"
        raise ValueError(f"its post_processor makes {ids} of {plain}; {limit}")
    return ids[0] if len(ids) > len(plain) else None
