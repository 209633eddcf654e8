"""Reads a tokenizer of either kind: ours (tokenizer.py), or a foreign one (foreign_tokenizer.py)."""
import json

from interop.foreign_tokenizer import ForeignTokenizer, ids_of, load, parts
from tokenizer import EOT, Tokenizer, bos_processor


def load_tokenizer(text):
    """Tokenizer or ForeignTokenizer, by what the text holds. ValueError: neither."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.keys() != {"eot", "bos", "tokenizer"}:
        return Tokenizer.from_str(text)
    return ForeignTokenizer(data["tokenizer"], data["eot"], data["bos"])


def from_tokenizer_json(data, eot, bos=None):
    """The tokenizer of a parsed tokenizer.json: ours where it is of GPT-2's kind, else a foreign one. bos: the id before each text,
    None for the one that the file's post_processor puts there, which is eot where it puts none. ValueError: as below."""
    bos, data = first_id(data, eot) if bos is None else bos, data | {"post_processor": None}
    try:
        ours = Tokenizer.from_str(json.dumps(data))
        if ours.eot == eot == bos:
            return ours
    except ValueError:
        pass
    return ForeignTokenizer(data, eot, bos)


def first_id(data, eot):
    post = data.get("post_processor")
    if post in (None, bos_processor(EOT, eot)) or parts(post) and all(p.get("type") == "ByteLevel" for p in parts(post)):
        return eot  # without the library
    made = load(data)
    plain, whole = ids_of(made, "a"), ids_of(made, "a", True)
    if whole[-len(plain):] != plain or len(whole) > len(plain) + 1:
        raise ValueError(f"its post_processor makes {whole} of {plain}; here at most one token is put before a text")
    return whole[0] if len(whole) > len(plain) else eot
