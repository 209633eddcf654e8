"""Tokenizers that are not ours (Llama's, SmolLM's, Qwen's ...), with the methods of Tokenizer.

    tokenizer = ForeignTokenizer(data, eot, bos)    # data: a parsed tokenizer.json

They are run by Hugging Face's `tokenizers`. What is kept in checkpoints is {"eot": id, "bos": id,
"tokenizer": the tokenizer.json, without the post_processor that bos stands for}. As with ours, special
tokens are added by id only, and text that spells one is ordinary text.

Llama's kind writes a space before a text (text "a" is the token "▁a"), so that "a" at the start of a
text and "a" going on after another are different ids. encode and decode are for whole texts; encode_more
and decode_more for what goes on.
"""

import json
import re
from contextlib import contextmanager
from functools import cached_property

from tokenizer import CHAR_BYTE, Tokenizer, mend

LARGEST_VOCABULARY = 10**7


@contextmanager
def library_errors(task):
    """Turns what the library raises into a ValueError that says which task it does not do.

    It has no exceptions of its own, and where its Rust panics, that is a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"the tokenizers library does not {task} ({reason:.200})") from None


def make_library_tokenizer(data):
    """Returns the tokenizers.Tokenizer of a parsed tokenizer.json. Raises ValueError.

    It takes special tokens for text, cuts nothing and fills nothing up.
    """
    try:
        import tokenizers
    except ImportError:
        problem = "a tokenizer that is not of GPT-2's kind needs a library"
        raise ValueError(f"{problem}: pip install tokenizers") from None
    with library_errors("read it"):
        library_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    library_tokenizer.no_truncation()
    library_tokenizer.no_padding()
    library_tokenizer.encode_special_tokens = True
    return library_tokenizer


def encode_text(library_tokenizer, text, add_special_tokens=False):
    """Returns the ids of a text. Raises ValueError."""
    with library_errors(f"take the text {text[:20]!r}"):
        return library_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def list_parts(component):
    """Returns the parts of a Sequence, nested ones too, or a list of the component itself."""
    if not isinstance(component, dict):
        return []
    for key in "normalizers", "pretokenizers", "decoders", "processors":
        if component.get("type") == "Sequence" and isinstance(component.get(key), list):
            return [part for inner in component[key] for part in list_parts(inner)]
    return [component]


def token_bytes(data, vocab, n):
    """Returns the bytes of n ids: GPT-2's byte characters, or Llama's pieces. Raises ValueError."""
    decoder_parts = list_parts(data.get("decoder"))
    kinds = {part.get("type") for part in decoder_parts}
    for part in decoder_parts + list_parts(data.get("pre_tokenizer")):
        replacement = part.get("replacement")
        if part.get("type") == "Metaspace" and replacement != "▁":
            problem = f"its replacement for a space is {replacement!r:.60}"
            raise ValueError(f"{problem}; only '▁' is read here")
    if dropout := data["model"].get("dropout"):
        problem = "so that a text has other ids each time"
        raise ValueError(f"its model has dropout {dropout!r:.60}, {problem}")
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        decoder = json.dumps(data.get("decoder"))
        raise ValueError(f"its decoder is {decoder:.120}; the bytes of its tokens are not known here")
    added = {token["content"] for token in data.get("added_tokens") or []}
    tokens = [b""] * n
    for text, i in vocab.items():
        if text in added:
            tokens[i] = text.encode()
        elif "ByteLevel" not in kinds:
            tokens[i] = piece_bytes(text, "ByteFallback" in kinds)
        elif CHAR_BYTE.keys() >= set(text):
            tokens[i] = bytes(CHAR_BYTE[c] for c in text)
        else:
            tokens[i] = text.encode()
    return tokens


def piece_bytes(text, byte_fallback):
    """Returns a Llama token's bytes: "▁" is a space and, with byte_fallback, "<0x0A>" a byte."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
    if byte and byte_fallback:
        return bytes.fromhex(byte[1])
    return text.replace("▁", " ").encode()


def without_prefix(data):
    """Returns the tokenizer.json without what puts a space before a text."""
    return data | {key: drop_prefix(data.get(key)) for key in ("normalizer", "pre_tokenizer")}


def drop_prefix(component):
    if not isinstance(component, dict):
        return component
    kind = component.get("type")
    if kind == "Prepend":
        return None
    component = dict(component)
    for key in "normalizers", "pretokenizers":
        if key in component:
            parts = [part for part in component[key] if part.get("type") != "Prepend"]
            component[key] = [drop_prefix(part) for part in parts]
    if kind == "Metaspace":
        component["prepend_scheme"] = "never"
        component.pop("add_prefix_space", None)
    if kind == "ByteLevel":
        component["add_prefix_space"] = False
    return component


class ForeignTokenizer(Tokenizer):
    """A parsed tokenizer.json, `data`, run by the library.

    eot is the id that ends documents; bos the one that prompts start with, eot where there is no other.
    ValueError: what `tokenizers` does not read or its absence, a kind whose tokens' bytes are not known
    here, ids outside.
    """

    def __init__(self, data, eot, bos):
        self.data = data
        self.kind = "foreign"
        self._whole = make_library_tokenizer(data)
        vocab = self._whole.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"its largest id is {self.vocab_size - 1}")
        for name, i in ("eot", eot), ("bos", bos):
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise ValueError(f"{name} is {i!r:.60}, which is no id of its {self.vocab_size} tokens")
        self.eot = eot
        self.bos = bos
        self.tokens = token_bytes(data, vocab, self.vocab_size)
        self.prefix = len(self.decode_bytes(self.encode("a"))) - 1

    @cached_property
    def _more(self):
        return make_library_tokenizer(without_prefix(self.data)) if self.prefix else self._whole

    def to_str(self):
        """Returns the text that load_tokenizer makes this tokenizer of again."""
        content = {"eot": self.eot, "bos": self.bos, "tokenizer": self.data}
        return json.dumps(content, ensure_ascii=False)

    def tokenizer_json(self):
        """Returns the text of tokenizer.json, as Hugging Face's libraries read it."""
        return json.dumps(self.data, ensure_ascii=False, indent=1)

    def encode(self, text):
        """Returns the ids of a whole text without special tokens, as tokenizer.json has them.

        transformers' LlamaTokenizer leaves out the space before a text where there is one already.
        """
        return encode_text(self._whole, mend(text))

    def encode_more(self, text):
        """Returns the ids of a text that goes on where another ended."""
        return encode_text(self._more, mend(text))

    decode_more = Tokenizer.decode

    def decode(self, ids):
        """Returns the text of a whole text's ids, with U+FFFD for bytes that are no UTF-8.

        ValueError: an id outside the vocabulary.
        """
        text = self.decode_more(ids)
        return text[self.prefix :] if text[: self.prefix].isspace() else text
