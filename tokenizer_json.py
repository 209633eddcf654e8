"""The text of tokenizer.json: the layout of Hugging Face's tokenizers, which transformers and transformers.js read too.

A vocabulary is (kind, tokens, eot, merges): kind "bpe" or "char", tokens the bytes of each id, eot the id of <|endoftext|>,
merges as the source has them, [left, right] in byte characters each, not checked; None where the ids imply them.
Whatever else is not as it should be is a ValueError of one sentence.
"""
import json
from pathlib import Path

import tiktoken

EOT = "<|endoftext|>"

# In JSON, GPT-2 writes a byte as one visible character: its own in Latin-1, or one from U+0100 on where that is not
# visible. This dict runs by code point, as the ids do; ids in byte order would break ties between merges differently.
BYTE_CHAR = {b: chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "}
BYTE_CHAR |= {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(BYTE_CHAR)))}
CHAR_BYTE = {c: b for b, c in BYTE_CHAR.items()}

# What stands beside the vocabulary. WordLevel demands an unk_token; as no vocabulary has this one, an unknown character is
# an error there as it is here (a BPE model would drop it without a word).
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BPE = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
       "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
EACH_CHAR = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
LAYOUT = {"bpe": {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": BPE},
          "char": {"pre_tokenizer": EACH_CHAR, "decoder": {"type": "Fuse"},
                   "model": {"type": "WordLevel", "unk_token": "<unk>"}}}


def byte_chars(token):
    return "".join(BYTE_CHAR[b] for b in token)


def starting_with(token, i):
    """The post_processor that puts one token, of id i, before each text."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}}}


def dumps(kind, tokens, eot, merges):
    """The text of a vocabulary, with merges as pairs of ids: always the same for the same one, and loads gives it back."""
    texts = [byte_chars(t) if kind == "bpe" else t.decode() for t in tokens]
    model = {**LAYOUT[kind]["model"], "vocab": {text: i for i, text in enumerate(texts)}}
    if kind == "bpe":
        model["merges"] = [f"{texts[left]} {texts[right]}" for left, right in merges]
    added = {"id": eot, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [added], "normalizer": None,
                       "post_processor": None, **LAYOUT[kind], "model": model}, ensure_ascii=False, indent=1)


def loads(text):
    """The vocabulary in the text of a tokenizer.json, ours or a foreign one with GPT-2's split.

    ValueError: not JSON, another model, normalizer, split or post-processor, added tokens beside <|endoftext|>, ids with
    holes or twice, tokens or merges that are not text.
    """
    try:
        data = json.loads(text)
        model, added = data["model"], {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        settings = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the text is not JSON ({e})") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the JSON is no tokenizer.json: model or added_tokens is missing or malformed") from None
    char, pre, post = settings.get("type") == "WordLevel", data.get("pre_tokenizer"), data.get("post_processor")
    changed = any(settings.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    for key, found, readable in (
            ("model", settings, char or settings.get("type") == "BPE" and not changed),
            ("normalizer", data.get("normalizer"), data.get("normalizer") is None),
            ("pre_tokenizer", pre, pre == EACH_CHAR if char else isinstance(pre, dict)
                and {"use_regex": True, **pre, "trim_offsets": True} == BYTE_LEVEL),  # offsets are not ids
            ("post_processor", post, post is None or isinstance(post, dict) and not post.get("special_tokens")
                and post.get("type") in ("ByteLevel", "TemplateProcessing")),  # templates may add tokens
            ("added_tokens", list(added), list(added) == [EOT])):
        if not readable:
            raise ValueError(f"its {key} is {json.dumps(found):.120}, which is not read here (Hugging Face's tokenizers may)")
    vocab, merges = model.get("vocab"), model.get("merges")
    return vocabulary({**vocab, **added} if isinstance(vocab, dict) else {}, merges if isinstance(merges, list) else [], char)


def gpt2(folder=None):
    """GPT-2's vocabulary: encoder.json and vocab.bpe in folder, else tiktoken's cache or download.

    ValueError: no download, or files that do not hold a byte-level BPE. OSError: files that are not there.
    """
    if folder is None:
        try:
            found = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:
            raise ValueError(f"GPT-2's vocabulary could not be downloaded ({type(e).__name__}): "
                             "name a folder that holds its encoder.json and vocab.bpe") from None
        vocab = {byte_chars(t): found.encode_single_token(t) for t in found.token_byte_values()}
        return vocabulary(vocab | {EOT: found.eot_token})
    vocab = json.loads(Path(folder, "encoder.json").read_text(encoding="utf-8"))
    return vocabulary(vocab, Path(folder, "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:])  # after "#version: 0.2"


def vocabulary(vocab, merges=None, char=False):
    """From vocab: token text -> id, and merges: "left right" or [left, right] each."""
    if not isinstance(vocab, dict) or EOT not in vocab:
        raise ValueError(f"there is no vocabulary with {EOT}, which separates documents")
    if any(type(i) is not int for i in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"the ids of the {len(vocab)} tokens are not 0 to {len(vocab) - 1}, each used once")
    texts, eot = sorted(vocab, key=vocab.get), vocab[EOT]
    for i, text in enumerate(texts):
        if i != eot and not (len(text) == 1 and not "\ud800" <= text <= "\udfff" if char else CHAR_BYTE.keys() >= set(text)):
            kind = "one character" if char else "written in GPT-2's byte characters"
            raise ValueError(f"token {i} ({text!r:.60}) is not {kind}")
    tokens = [text.encode() if char else bytes(CHAR_BYTE[c] for c in text) for text in texts]
    merges = None if char or merges is None else [m.split(" ") if isinstance(m, str) else m for m in merges]
    return "char" if char else "bpe", tokens, eot, merges
