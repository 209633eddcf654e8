"""Tokenizers that are not ours (Llama's, SmolLM's, Qwen's ...), with the methods of Tokenizer.

    tokenizer = ForeignTokenizer({"tokenizer.json": text}, eot=2, bos=1)

They are run by Hugging Face's `tokenizers`. Checkpoints keep {"eot": id, "bos": id or null, "ends": ids,
"files": {name: text}}, with the folder's own texts, which go out as they came in. Checkpoints from before
2026-11-28 have {"eot", "bos", "tokenizer"} instead, where the last is a tokenizer.json without its
post_processor, and bos is eot where the folder has none: they keep that rule. As with ours, special tokens
are added only by id, and text that spells one is ordinary text, but for encode_special.

Llama's kind writes a space before a text (the text "a" is the token "▁a"), so that "a" at the start of a
text has other ids than "a" that follows more text. encode and decode are for whole texts, encode_more and
decode_more for texts that follow others.
"""

import hashlib
import json
import os
import re
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from interop.chat_template import ChatTemplate
from tokenizer import Tokenizer, mend
from vocabulary import CHAR_BYTE

LARGEST_VOCABULARY = 10**7
CHAT_TEMPLATE = "chat_template.jinja"
# the files of a folder that are about text; they are kept
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
    "generation_config.json",
)


@contextmanager
def library_errors(task):
    """Turns what the library raises into a ValueError that says which task it does not do.

    It has no exceptions of its own, and a panic of its Rust is a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"the tokenizers library does not {task} ({reason:.200})") from None


def make_library_tokenizer(data, encode_special_tokens=True):
    """Returns the tokenizers.Tokenizer of a parsed tokenizer.json. Raises ValueError.

    It neither cuts texts nor pads them. Text that spells a special token is text, unless encode_special_tokens
    is False.
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
    library_tokenizer.encode_special_tokens = encode_special_tokens
    return library_tokenizer


def encode_text(library_tokenizer, text, add_special_tokens=False):
    """Returns the ids of a text. Raises ValueError."""
    with library_errors(f"take the text {text[:20]!r}"):
        # a batch of one, as encode would hold the interpreter's lock
        [encoding] = library_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding.ids


def list_parts(component):
    """Returns the parts of a Sequence, nested ones too, or a list of the component itself."""
    if not isinstance(component, dict):
        return []
    for key in "normalizers", "pretokenizers", "decoders", "processors":
        if component.get("type") == "Sequence" and isinstance(component.get(key), list):
            return [part for inner in component[key] for part in list_parts(inner)]
    return [component]


def decoder_kinds(data):
    """Returns the types of the decoder's parts, a set. Raises ValueError where they do not say which bytes a token is,
    or where a text has other ids each time.
    """
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
    return kinds


def token_bytes(data, vocab, n):
    """Returns the bytes of each of n ids, which are written in GPT-2's byte characters or as Llama's pieces. Raises
    ValueError.
    """
    kinds = decoder_kinds(data)
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
    """Returns a parsed tokenizer.json without the parts that put a space before a text."""
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


def read_own(data):
    """Returns our Tokenizer for a tokenizer.json that it splits and merges alike, as one of GPT-2's kind; else None."""
    try:
        return Tokenizer.from_str(json.dumps(data))
    except ValueError:
        return None


class ForeignTokenizer(Tokenizer):
    """The tokenizer of a folder of Hugging Face's, run by ours where it is of GPT-2's kind, else by the library.

    files: {name: text} of those of FILES that the folder has. eot is the id that ends documents, bos the one
    that a text starts with, None for none; ends are all at which generation stops. Raises ValueError where
    `tokenizers` is not installed or does not read the file, where it is not known which bytes a token is, and
    for ids outside the vocabulary.
    """

    def __init__(self, files, eot, bos, ends=()):
        self.files = files
        self.data = parse_json(files["tokenizer.json"]) | {"post_processor": None}
        self.own = read_own(self.data)
        if self.own:
            self.kind = self.own.kind
            self.vocab_size = self.own.vocab_size
            self.tokens = self.own.tokens
        else:
            self.kind = "foreign"
            self._whole = make_library_tokenizer(self.data)
            vocab = self._whole.get_vocab(with_added_tokens=True)
            self.vocab_size = 1 + max(vocab.values(), default=-1)
            if self.vocab_size > LARGEST_VOCABULARY:
                raise ValueError(f"its largest id is {self.vocab_size - 1}")
            self.tokens = token_bytes(self.data, vocab, self.vocab_size)
        for name, i in ("eot", eot), ("bos", eot if bos is None else bos):
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise ValueError(f"{name} is {i!r:.60}, which is no id of its {self.vocab_size} tokens")
        self.eot = eot
        self.bos = bos
        self.ends = tuple(sorted({eot, *(i for i in ends if 0 <= i < self.vocab_size)}))
        # our own puts nothing before a text; and a vocabulary of characters may lack the "a" to try it with
        self.prefix = 0 if self.own else len(self.decode_bytes(self.encode("a"))) - 1

    @cached_property
    def _more(self):
        return make_library_tokenizer(without_prefix(self.data)) if self.prefix else self._whole

    @cached_property
    def _special(self):
        return make_library_tokenizer(self.data, encode_special_tokens=False)

    @cached_property
    def _special_more(self):
        if not self.prefix:
            return self._special
        return make_library_tokenizer(without_prefix(self.data), encode_special_tokens=False)

    def to_str(self):
        """Returns the text from which load_tokenizer makes this tokenizer again."""
        content = {"eot": self.eot, "bos": self.bos, "ends": self.ends, "files": self.files}
        return json.dumps(content, ensure_ascii=False)

    @cached_property
    def sha256(self):
        """A fingerprint, equal for tokenizers that give all documents equal ids."""
        if self.own and self.own.eot == self.eot and not self.head:
            return self.own.sha256
        # by the rule of checkpoints from before 2026-11-28
        bos = self.eot if self.bos is None else self.bos
        content = {"eot": self.eot, "bos": bos, "tokenizer": self.data}
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    def tokenizer_json(self):
        """Returns the text of tokenizer.json, as Hugging Face's libraries read it."""
        return self.files["tokenizer.json"]

    def save_files(self, folder):
        """Writes the files as they came in."""
        for name, text in self.files.items():
            with open(Path(folder, name), "w", encoding="utf-8", newline="") as f:
                f.write(text)

    def encode(self, text):
        """Returns the ids of a whole text without special tokens, as tokenizer.json has them.

        transformers' LlamaTokenizer leaves out the space before a text where there is one already.
        """
        if self.own:
            return self.own.encode(text)
        return encode_text(self._whole, mend(text))

    def encode_more(self, text):
        """Returns the ids of a text that goes on where another ended."""
        if self.own:
            return self.own.encode(text)
        return encode_text(self._more, mend(text))

    def encode_special(self, text):
        """Returns the ids of a text in which special tokens are written out, as a chat template writes them."""
        return encode_text(self._special, mend(text))

    def encode_special_more(self, text):
        """Returns the ids of such a text that goes on where another ended."""
        return encode_text(self._special_more, mend(text))

    def encode_batch(self, texts, num_threads=os.cpu_count()):
        """Encodes each of texts, on num_threads threads, or where the library encodes on its own threads: one a core,
        or as many as RAYON_NUM_THREADS says.
        """
        if self.own:
            return self.own.encode_batch(texts, num_threads)
        texts = [mend(text) for text in texts]
        with library_errors("take the texts"):
            encodings = self._whole.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    decode_more = Tokenizer.decode

    def decode(self, ids):
        """Returns the text of a whole text's ids, with U+FFFD for bytes that are no UTF-8.

        ValueError: an id outside the vocabulary.
        """
        text = self.decode_more(ids)
        return text[self.prefix :] if text[: self.prefix].isspace() else text

    @cached_property
    def settings(self):
        """What tokenizer_config.json and special_tokens_map.json say, a dict."""
        return read_settings(lambda name: parse_json(self.files.get(name, "{}")))

    @cached_property
    def generation(self):
        """What generation_config.json says, a dict."""
        return parse_json(self.files.get("generation_config.json", "{}"))

    @property
    def template_source(self):
        """The Jinja text of the folder's chat template, None where it has none."""
        source = self.files.get(CHAT_TEMPLATE) or self.settings.get("chat_template")
        if isinstance(source, list):  # several by name; the plain one is called default
            named = {entry.get("name"): entry.get("template") for entry in source}
            source = named.get("default")
        return source if isinstance(source, str) else None

    @cached_property
    def chat_template(self):
        """The folder's ChatTemplate, None where it has none. ValueError: one that cannot be read."""
        source = self.template_source
        if source is None:
            return None
        tokens = {}
        for key, token in self.settings.items():
            text = token_text(token)
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
        return ChatTemplate(source, tokens)


def parse_json(text):
    """Returns a JSON object. Raises ValueError."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"it is not a JSON object but a {type(data).__name__}")
    return data


def read_settings(read):
    """Returns the settings in tokenizer_config.json and special_tokens_map.json, as transformers reads them: where the
    first lists all added tokens, the second does not count. read(name) returns the dict in a file, {} without it.
    """
    settings, special_tokens = read("tokenizer_config.json"), read("special_tokens_map.json")
    return settings if "added_tokens_decoder" in settings else settings | special_tokens


def token_text(token):
    """Returns the text of a token as tokenizer_config.json has it: the text itself, or an object around it."""
    return token.get("content") if isinstance(token, dict) else token
