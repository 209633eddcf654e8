"""Tokenizers that are not ours (Llama's, SmolLM's, Qwen's ...), run by Hugging Face's `tokenizers`, with the methods of Tokenizer.

    tokenizer = ForeignTokenizer(json, eot, bos)    # json: a parsed tokenizer.json

What is kept in checkpoints is {"eot": id, "bos": id, "tokenizer": the tokenizer.json, without the post_processor that bos stands for}.
As with ours, special tokens are added by id only, and text that spells one is ordinary text.

Llama's kind writes a space before a text (text "a" is the token "▁a"), so that "a" at the start of a text and "a" going on after another
are different ids. encode and decode are for whole texts; encode_more and decode_more for what goes on.
"""
import json
import re
from contextlib import contextmanager
from functools import cached_property

from tokenizer import CHAR_BYTE, Tokenizer, mend


class ForeignTokenizer(Tokenizer):
    """eot: the id that ends documents; bos: the one that prompts start with, eot itself where there is no other.

    ValueError: what `tokenizers` does not read, a kind whose tokens' bytes are not known here, ids outside. ImportError without it.
    """

    def __init__(self, data, eot, bos):
        self.data, self.kind = data, "foreign"
        self._whole = load(data)
        vocab = self._whole.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        if self.vocab_size > 10 ** 7:
            raise ValueError(f"its largest id is {self.vocab_size - 1}")
        for name, i in ("eot", eot), ("bos", bos):
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise ValueError(f"{name} is {i!r:.60}, which is no id of its {self.vocab_size} tokens")
        self.eot, self.bos = eot, bos
        self.tokens = token_bytes(data, vocab, self.vocab_size)
        self.prefix = len(self.decode_bytes(self.encode("a"))) - 1

    @cached_property
    def _more(self):
        return load(without_prefix(self.data)) if self.prefix else self._whole

    def to_str(self):
        return json.dumps({"eot": self.eot, "bos": self.bos, "tokenizer": self.data}, ensure_ascii=False)

    def tokenizer_json(self):
        return json.dumps(self.data, ensure_ascii=False, indent=1)

    def encode(self, text):
        """The ids of a whole text without special tokens, as tokenizer.json says (transformers' LlamaTokenizer leaves out the space that
        it puts before a text where there is one already)."""
        return ids_of(self._whole, mend(text))

    def encode_more(self, text):
        """The ids of a text that goes on where another ended."""
        return ids_of(self._more, mend(text))

    decode_more = Tokenizer.decode

    def decode(self, ids):
        """The text of a whole text's ids, U+FFFD for bytes that are no UTF-8. ValueError: an id outside the vocabulary."""
        text = self.decode_more(ids)
        return text[self.prefix:] if text[:self.prefix].isspace() else text


@contextmanager
def calling(what):
    """What the library raises, a ValueError: it has no exceptions of its own, and where its Rust panics, that is a BaseException."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise ValueError(f"the tokenizers library does not {what} ({str(e).splitlines()[0] if str(e) else type(e).__name__:.200})") from None


def ids_of(made, text, special=False):
    with calling(f"take the text {text[:20]!r}"):
        return made.encode(text, add_special_tokens=special).ids


def load(data):
    """tokenizers.Tokenizer, which takes special tokens for text, cuts nothing and fills nothing up. Raises ValueError."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("a tokenizer that is not of GPT-2's kind needs a library: pip install tokenizers") from None
    with calling("read it"):
        made = tokenizers.Tokenizer.from_str(json.dumps(data))
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    return made


def parts(component):
    """The parts of a Sequence, or the component alone, or nothing."""
    if not isinstance(component, dict):
        return []
    for key in "normalizers", "pretokenizers", "decoders", "processors":
        if component.get("type") == "Sequence" and isinstance(component.get(key), list):
            return [p for one in component[key] for p in parts(one)]
    return [component]


def token_bytes(data, vocab, n):
    """The bytes of each id: GPT-2's byte characters, or Llama's, where "▁" is a space and "<0x0A>" a byte. Raises ValueError."""
    kinds = {p.get("type") for p in parts(data.get("decoder"))}
    for p in parts(data.get("decoder")) + parts(data.get("pre_tokenizer")):
        if p.get("type") == "Metaspace" and p.get("replacement") != "▁":
            raise ValueError(f"its replacement for a space is {p.get('replacement')!r:.60}; only '▁' is read here")
    if data["model"].get("dropout"):
        raise ValueError(f"its model has dropout {data['model']['dropout']!r:.60}, so that a text has other ids each time")
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise ValueError(f"its decoder is {json.dumps(data.get('decoder')):.120}; the bytes of its tokens are not known here")
    added, tokens = {token["content"] for token in data.get("added_tokens") or []}, [b""] * n
    for text, i in vocab.items():
        if text not in added and "ByteLevel" in kinds and CHAR_BYTE.keys() >= set(text):
            tokens[i] = bytes(CHAR_BYTE[c] for c in text)
        elif text not in added and "ByteLevel" not in kinds:
            one = re.fullmatch("<0x([0-9A-F]{2})>", text)
            tokens[i] = bytes.fromhex(one[1]) if one and "ByteFallback" in kinds else text.replace("▁", " ").encode()
        else:
            tokens[i] = text.encode()
    return tokens


def without_prefix(data):
    """The tokenizer.json without what puts a space before a text."""
    def change(component):
        if not isinstance(component, dict):
            return component
        lists = {key: [change(p) for p in value if p.get("type") != "Prepend"] for key, value in component.items() if key in ("normalizers", "pretokenizers")}
        component = component | lists
        if component.get("type") == "Metaspace":
            component |= {"prepend_scheme": "never"}
            component.pop("add_prefix_space", None)
        if component.get("type") == "ByteLevel":
            component |= {"add_prefix_space": False}
        return None if component.get("type") == "Prepend" else component
    return data | {key: change(data.get(key)) for key in ("normalizer", "pre_tokenizer")}
