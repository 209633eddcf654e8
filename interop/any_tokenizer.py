"""Reads a tokenizer of either kind: ours (tokenizer.py), or a foreign one (foreign_tokenizer.py)."""

import json

from interop.foreign_tokenizer import ForeignTokenizer, encode_text, list_parts, make_library_tokenizer
from tokenizer import EOT, Tokenizer, bos_processor


def load_tokenizer(text):
    """Returns the Tokenizer or ForeignTokenizer whose to_str wrote this text. Raises ValueError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and data.keys() == {"eot", "bos", "tokenizer"}:
        return ForeignTokenizer(data["tokenizer"], data["eot"], data["bos"])
    return Tokenizer.from_str(text)


def from_tokenizer_json(data, eot, bos=None):
    """Returns the tokenizer of a parsed tokenizer.json: ours if of GPT-2's kind, else a foreign one.

    eot and bos are ids. bos comes before each text; None stands for the one that the file's
    post_processor puts there, which is eot where it puts none. Raises ValueError.
    """
    if bos is None:
        bos = find_bos(data, eot)
    data = data | {"post_processor": None}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(data))
        if tokenizer.eot == eot == bos:
            return tokenizer
    except ValueError:
        pass
    return ForeignTokenizer(data, eot, bos)


def find_bos(data, eot):
    post_processor = data.get("post_processor")
    if post_processor in (None, bos_processor(EOT, eot)):
        return eot
    parts = list_parts(post_processor)
    if parts and all(part.get("type") == "ByteLevel" for part in parts):
        return eot  # which needs no library
    library_tokenizer = make_library_tokenizer(data)
    plain = encode_text(library_tokenizer, "a")
    ids = encode_text(library_tokenizer, "a", add_special_tokens=True)
    if ids[-len(plain) :] != plain or len(ids) > len(plain) + 1:
        limit = "here at most one token is put before a text"
        raise ValueError(f"its post_processor makes {ids} of {plain}; {limit}")
    return ids[0] if len(ids) > len(plain) else eot
