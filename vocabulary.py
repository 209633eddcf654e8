"""The vocabulary of a tokenizer as tokenizer.json, the layout of Hugging Face's tokenizers.

A vocabulary is (kind, tokens, eot, pairs): kind "bpe" or "char"; tokens, the bytes of each id; eot,
the id of <|endoftext|>; pairs, the merges as the source has them, each [left, right] in byte characters and
not checked, or None where the ids imply them.
"""

import json
from pathlib import Path

import tiktoken

EOT = "<|endoftext|>"

# In JSON, GPT-2 writes a byte as one visible character: its own in Latin-1, or one from U+0100 on
# where that is not visible. This dict is in the order of these code points, as the ids are; in the order of
# bytes, ties between merges would be broken in another way.
BYTE_CHAR = {b: chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "}
BYTE_CHAR |= {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(BYTE_CHAR)))}
CHAR_BYTE = {c: b for b, c in BYTE_CHAR.items()}

# What stands beside the vocabulary in tokenizer.json. WordLevel demands an unk_token. No vocabulary has
# this one, so that an unknown character is an error there as it is here; a BPE model would drop it without
# a word.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
WORD_LEVEL = {"type": "WordLevel", "unk_token": "<unk>"}
EACH_CHAR = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
LAYOUT = {
    "bpe": {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": BPE},
    "char": {"pre_tokenizer": EACH_CHAR, "decoder": {"type": "Fuse"}, "model": WORD_LEVEL},
}


def byte_chars(token):
    """Returns the bytes of a token as GPT-2 writes them."""
    return "".join(BYTE_CHAR[b] for b in token)


def bos_processor(token, i):
    """Returns the post_processor that puts one token, of id i, before each text."""
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


def dump_vocabulary(kind, tokens, eot, merges):
    """Returns the text of tokenizer.json, always the same for a vocabulary. merges: pairs of ids."""
    texts = [byte_chars(token) if kind == "bpe" else token.decode() for token in tokens]
    model = {**LAYOUT[kind]["model"], "vocab": {text: i for i, text in enumerate(texts)}}
    if kind == "bpe":
        model["merges"] = [f"{texts[left]} {texts[right]}" for left, right in merges]
    end = {
        "id": eot,
        "content": EOT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "post_processor": None,
        **LAYOUT[kind],
        "model": model,
    }
    return json.dumps(data, ensure_ascii=False, indent=1)


def is_plain_bpe(settings):
    changes = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    return settings.get("type") == "BPE" and not any(settings.get(key) for key in changes)


def is_gpt2_split(pre_tokenizer):
    if not isinstance(pre_tokenizer, dict):
        return False
    # older files have no use_regex; trim_offsets changes offsets, not ids
    return {"use_regex": True, **pre_tokenizer, "trim_offsets": True} == BYTE_LEVEL


def adds_no_token(post_processor):
    if post_processor is None:
        return True
    if not isinstance(post_processor, dict) or post_processor.get("special_tokens"):
        return False
    return post_processor.get("type") in ("ByteLevel", "TemplateProcessing")


def parse_vocabulary(text):
    """Returns the vocabulary in the text of a tokenizer.json, ours or a foreign one with GPT-2's split.

    ValueError: not JSON, another model, normalizer, split or post-processor, added tokens beside
    <|endoftext|>, ids with holes or twice, tokens or merges that are not text.
    """
    try:
        data = json.loads(text)
        model = data["model"]
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        settings = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the text is not JSON ({e})") from None
    except (KeyError, TypeError, AttributeError):
        problem = "model or added_tokens is missing or malformed"
        raise ValueError(f"the JSON is no tokenizer.json: {problem}") from None
    is_char = settings.get("type") == "WordLevel"
    normalizer = data.get("normalizer")
    pre_tokenizer = data.get("pre_tokenizer")
    post_processor = data.get("post_processor")
    splits_alike = pre_tokenizer == EACH_CHAR if is_char else is_gpt2_split(pre_tokenizer)
    checks = [
        ("model", settings, is_char or is_plain_bpe(settings)),
        ("normalizer", normalizer, normalizer is None),
        ("pre_tokenizer", pre_tokenizer, splits_alike),
        ("post_processor", post_processor, adds_no_token(post_processor)),
        ("added_tokens", list(added), list(added) == [EOT]),
    ]
    for key, value, is_readable in checks:
        if not is_readable:
            shown = f"its {key} is {json.dumps(value):.120}"
            raise ValueError(f"{shown}, which is not read here (Hugging Face's tokenizers may)")
    vocab = model.get("vocab")
    merges = model.get("merges")
    vocab = {**vocab, **added} if isinstance(vocab, dict) else {}
    return check_vocabulary(vocab, merges if isinstance(merges, list) else [], is_char)


def read_gpt2_vocabulary(folder=None):
    """Returns GPT-2's vocabulary, from encoder.json and vocab.bpe in folder, else from tiktoken.

    ValueError: no download, or files that do not hold a byte-level BPE. OSError: files that are not
    there.
    """
    if folder is not None:
        vocab = json.loads(Path(folder, "encoder.json").read_text(encoding="utf-8"))
        lines = Path(folder, "vocab.bpe").read_text(encoding="utf-8").splitlines()
        return check_vocabulary(vocab, lines[1:])  # after "#version: 0.2"
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:
        problem = f"GPT-2's vocabulary could not be downloaded ({type(e).__name__})"
        raise ValueError(f"{problem}: name a folder that holds its encoder.json and vocab.bpe") from None
    tokens = encoding.token_byte_values()
    vocab = {byte_chars(token): encoding.encode_single_token(token) for token in tokens}
    return check_vocabulary(vocab | {EOT: encoding.eot_token})


def check_vocabulary(vocab, merges=None, is_char=False):
    """Returns the vocabulary of {token text: id} and merges, "left right" or [left, right] each.

    ValueError: ids with holes or twice, a token that is not text of its kind.
    """
    if not isinstance(vocab, dict) or EOT not in vocab:
        raise ValueError(f"there is no vocabulary with {EOT}, which separates documents")
    ids = list(vocab.values())
    if any(type(i) is not int for i in ids) or sorted(ids) != list(range(len(vocab))):
        last = len(vocab) - 1
        raise ValueError(f"the ids of the {len(vocab)} tokens are not 0 to {last}, each used once")
    eot = vocab[EOT]
    texts = sorted(vocab, key=vocab.get)
    for i, text in enumerate(texts):
        if i == eot:
            continue
        if is_char and (len(text) != 1 or "\ud800" <= text <= "\udfff"):
            raise ValueError(f"token {i} ({text!r:.60}) is not one character")
        if not is_char and set(text) - CHAR_BYTE.keys():
            raise ValueError(f"token {i} ({text!r:.60}) is not written in GPT-2's byte characters")
    if is_char:
        return "char", [text.encode() for text in texts], eot, None
    tokens = [bytes(CHAR_BYTE[c] for c in text) for text in texts]
    if merges is None:
        return "bpe", tokens, eot, None
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return "bpe", tokens, eot, pairs
