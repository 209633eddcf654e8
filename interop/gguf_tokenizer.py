"""Two layouts of one tokenizer: ours, a tokenizer.json, and the metadata of a GGUF file.

    metadata = write_tokenizer(tokenizer)
    tokenizer = read_tokenizer(metadata)

How texts are split into words is in llama.cpp's code; a file has only a name for it. Here are the names of
GPT-2's, SmolLM's, Qwen2's and Llama 3's way; another way is a ValueError. A tokenizer of one token a
character becomes a BPE whose merges join the bytes of each character.

Llama 2's kind (SentencePiece) has scores in place of merges: any two pieces that are a token together are
joined, and the token of the highest score is made first.
"""

import json

from interop.any_tokenizer import from_files
from interop.foreign_tokenizer import CHAT_TEMPLATE, list_parts, token_text
from vocabulary import BPE, BYTE_LEVEL, CHAR_BYTE, bos_processor, byte_chars, dump_vocabulary

# llama.cpp's kinds of tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# GGUF has names for this many tokens that end a text
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = BYTE_LEVEL | {"use_regex": False}


def split_by(words):
    """Returns the pre_tokenizer that cuts a text into these words and writes them in byte characters."""
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


# by llama.cpp's names
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
    "qwen2": split_by(WORDS.replace("DIGITS", "")),
    "llama-bpe": split_by(WORDS.replace("DIGITS", "{1,3}")),
}
# those in which a word that is a token stays whole, and a text begins with bos unless the file says otherwise
WHOLE_WORDS = ("llama-bpe",)
COMPOSED = ("qwen2",)  # those whose own files normalize texts to NFC first; llama.cpp does not
NO_MERGE = "<none> <none>"  # for a list without merges, as llama.cpp wants one that is not empty

# SentencePiece's: a space is "▁", and what has no token is its bytes
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PREPEND = {"type": "Prepend", "prepend": "▁"}
ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
UNESCAPE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
PIECES = BPE | {"fuse_unk": True, "byte_fallback": True}


# ---- out


def write_tokenizer(tokenizer):
    """Returns the metadata of a tokenizer, its chat template left out. Raises ValueError."""
    data = json.loads(tokenizer.tokenizer_json())
    if tokenizer.kind == "char":
        words = {"model": "gpt2", "pre": "gpt-2", "merges": join_characters(tokenizer) or [NO_MERGE]}
        texts = {byte_chars(token): i for i, token in enumerate(tokenizer.tokens)}
    elif data["model"].get("byte_fallback"):
        words = write_pieces(data)
        texts = data["model"]["vocab"]
    else:
        merges = [" ".join(pair) for pair in list_merges(data)]
        words = {"model": "gpt2", "pre": find_pre_tokenizer(data), "merges": merges or [NO_MERGE]}
        texts = data["model"]["vocab"]
    tokens, types = list_tokens(tokenizer, texts, data)
    if words["model"] == "llama":
        words["scores"] = list_scores(data, tokens, types)
    settings = {
        **words,
        "tokens": tokens,
        "token_type": types,
        # always, as without one llama.cpp takes some id for bos, such as 11
        "bos_token_id": find_bos_token(tokenizer, tokens),
        "add_bos_token": tokenizer.first_id is not None,
        **write_ends(tokenizer),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in settings.items()}


def write_ends(tokenizer):
    ends = [tokenizer.eot, *(i for i in tokenizer.ends if i != tokenizer.eot)]
    if len(ends) > len(END_KEYS):
        raise ValueError(f"{len(ends)} tokens end a text, and a GGUF file names {len(END_KEYS)}")
    return dict(zip(END_KEYS, ends))


def find_bos_token(tokenizer, tokens):
    """Returns the id that a text starts with, or else the one that the folder calls bos, or else end-of-text."""
    if tokenizer.bos is not None:
        return tokenizer.bos
    name = token_text(tokenizer.settings.get("bos_token")) if tokenizer.files else None
    return tokens.index(name) if name in tokens else tokenizer.eot


def join_characters(tokenizer):
    """Returns merges that make each character's token from its bytes, and nothing else, as a byte that begins a
    character never continues one.
    """
    merges = {}
    for i, token in enumerate(tokenizer.tokens):
        chars = byte_chars(token)
        for n in range(1, len(chars) if i != tokenizer.eot else 0):
            merges[f"{chars[:n]} {chars[n]}"] = None
    return list(merges)


def list_merges(data):
    """Returns the merges of a tokenizer.json as pairs of texts, which are written in either of two ways."""
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in data["model"]["merges"]]


def list_tokens(tokenizer, texts, data):
    """Returns (text, kind) of each id, as two lists. Raises ValueError."""
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    is_bytes = data["model"].get("byte_fallback")
    for text, i in texts.items():
        tokens[i], types[i] = text, BYTE if is_bytes and text in BYTE_TOKENS else NORMAL
    for token in data.get("added_tokens") or []:
        for key in "lstrip", "rstrip", "single_word":
            if token.get(key):
                raise ValueError(f"its token {token['content']!r:.60} has {key}, which GGUF cannot say")
        i = token["id"]
        tokens[i], types[i] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    types[tokenizer.eot] = CONTROL
    unknown = data["model"].get("unk_token")
    if is_bytes and unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    if len(set(tokens)) < len(tokens):
        repeated = next(text for text in tokens if tokens.count(text) > 1)
        raise ValueError(f"its token {repeated!r:.60} is there twice")
    return tokens, types


def write_pieces(data):
    """Returns the metadata of Llama 2's kind. Raises ValueError for a tokenizer.json that says more."""
    parts = list_parts(data.get("normalizer"))
    if data.get("pre_tokenizer") or parts not in ([ESCAPE], [PREPEND, ESCAPE]):
        shown = json.dumps(data.get("pre_tokenizer") or data.get("normalizer"))
        raise ValueError(
            f"its tokenizer has {shown:.120}; llama.cpp puts one space before each text, or none"
        )
    if missing := [text for text in BYTE_TOKENS if text not in data["model"]["vocab"]]:
        raise ValueError(f"its tokenizer has no {missing[0]}, and llama.cpp wants a token for each byte")
    return {"model": "llama", "add_space_prefix": PREPEND in parts}


def list_scores(data, tokens, types):
    """Returns the score of each token: what is merged first has the highest.

    Raises ValueError where llama.cpp, which joins whatever is a token together, would join other pieces
    than the merges.
    """
    ranks = {}
    merges = list_merges(data)
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    order = [ranks[left + right] for left, right in merges]
    known = {tuple(pair) for pair in merges}
    vocab = set(tokens)
    for text, kind in zip(tokens, types):
        halves = [(text[:n], text[n:]) for n in range(1, len(text) if kind == NORMAL else 0)]
        for pair in halves:
            if pair not in known and all(len(half) == 1 or half in vocab for half in pair):
                problem = f"has no merge of {pair[0]!r:.60} and {pair[1]!r:.60}"
                raise ValueError(f"its tokenizer {problem}, which llama.cpp would join")
    if order != sorted(order):
        raise ValueError(
            "its merges are not in the order of the tokens that they make: GGUF has one each"
        )
    return [-float(ranks.get(text, 0)) for text in tokens]


def find_pre_tokenizer(data):
    """Returns llama.cpp's name of how a tokenizer.json cuts a text into words. Raises ValueError."""
    model = data["model"]
    parts = [normal_form(part) for part in list_parts(data.get("pre_tokenizer"))]
    names = [
        name
        for name, known in PRE_TOKENIZERS.items()
        if [normal_form(part) for part in list_parts(known)] == parts
    ]
    if model.get("type") != "BPE" or not names:
        kind = data.get("pre_tokenizer") if model.get("type") == "BPE" else model.get("type")
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(
            f"its tokenizer is {json.dumps(kind):.120}; llama.cpp's own are written here, {known}"
        )
    [name] = names
    normalizers = [part.get("type") for part in list_parts(data.get("normalizer"))]
    if normalizers not in ([], ["NFC"] if name in COMPOSED else []):
        raise ValueError(
            f"its normalizer is {json.dumps(data['normalizer']):.120}, which GGUF cannot say"
        )
    for key in "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback":
        if model.get(key):
            raise ValueError(f"its tokenizer has {key} {model[key]!r:.60}, which GGUF cannot say")
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS):
        setting = f"ignore_merges is {bool(model.get('ignore_merges'))} in its tokenizer"
        raise ValueError(f"{setting}, and in llama.cpp's {name} it is not")
    return name


def normal_form(part):
    """Returns a part of a pre_tokenizer without what changes no id."""
    if part.get("type") == "ByteLevel":
        return {"use_regex": True, "add_prefix_space": True, **part, "trim_offsets": True}
    if part.get("type") == "Split":
        return part | {"behavior": str(part.get("behavior")).lower()}
    return part


# ---- in


def read_tokenizer(metadata):
    """Returns the tokenizer of a GGUF file's metadata: ours if it was ours, else a foreign one. Raises
    ValueError.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {model!r:.60}; only 'gpt2' and 'llama' are read here")
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise ValueError("add_eos_token is true: here no text ends before the model ends it")
    tokens = read_list(metadata, "tokens", str)
    types = read_list(metadata, "token_type", int)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"there are {len(set(tokens))} tokens and {len(types)} token types")
    bos, eot, *others = (read_id(metadata, key, tokens) for key in ("bos_token_id", *END_KEYS))
    if eot is None:
        raise ValueError("tokenizer.ggml.eos_token_id is missing: nothing says which token ends a text")
    others = [i for i in others if i is not None]
    if model == "llama":
        data = read_pieces(metadata, tokens, types)
    else:
        data = read_byte_level(metadata, tokens, types, eot)
    adds_bos = model == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    if metadata.get("tokenizer.ggml.add_bos_token", adds_bos):
        if bos is None:
            raise ValueError("add_bos_token is true, and tokenizer.ggml.bos_token_id is missing")
        data["post_processor"] = bos_processor(tokens[bos], bos)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[eot],
        "clean_up_tokenization_spaces": False,
    }
    if bos is not None:
        settings["bos_token"] = tokens[bos]
    files = make_files(data, settings, [eot, *others], metadata.get("tokenizer.chat_template"))
    return from_files(files, data, eot, others)


def make_files(data, settings, ends, template):
    """Returns the files that a folder of Hugging Face's would have, {name: text}, of their parsed content."""
    files = {
        "tokenizer.json": json.dumps(data, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False),
        "generation_config.json": json.dumps({"eos_token_id": ends}),
    }
    if isinstance(template, str):
        files[CHAT_TEMPLATE] = template
    return files


def read_list(metadata, key, kind):
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(x) is kind for x in values):
        raise ValueError(f"tokenizer.ggml.{key} is missing, or no list of {kind.__name__}")
    return values


def read_id(metadata, key, tokens):
    """Returns the id of a token with a purpose, None where no token has it. Raises ValueError."""
    i = metadata.get(f"tokenizer.ggml.{key}")
    if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
        raise ValueError(f"{key} is {i!r:.60}, which is no id of its {len(tokens)} tokens")
    return i


def make_tokenizer_json(tokens, types, **parts):
    """Returns a parsed tokenizer.json; parts are those that are not the same in all. Raises ValueError."""
    added = []
    for i, kind in enumerate(types):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": i, "content": tokens[i], **flags, "special": kind != USER_DEFINED})
    parts["model"]["vocab"] = {text: i for i, text in enumerate(tokens)}
    common = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    return {**common, "added_tokens": added, **parts}


def read_byte_level(metadata, tokens, types, eot):
    """Returns the parsed tokenizer.json of GPT-2's kind. Raises ValueError."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in tuple(PRE_TOKENIZERS):
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"tokenizer.ggml.pre is {pre!r:.60}; only {known} are read here")
    merges = [merge for merge in read_list(metadata, "merges", str) if merge != NO_MERGE]
    if chars := read_characters(tokens, types):
        return json.loads(dump_vocabulary("char", chars, eot, {}))
    return make_tokenizer_json(
        tokens,
        types,
        normalizer={"type": "NFC"} if pre in COMPOSED else None,
        pre_tokenizer=PRE_TOKENIZERS[pre],
        decoder=BYTE_LEVEL,
        model=BPE | {"ignore_merges": pre in WHOLE_WORDS, "merges": merges},
    )


def read_pieces(metadata, tokens, types):
    """Returns the parsed tokenizer.json of Llama 2's kind. Raises ValueError."""
    scores = read_list(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise ValueError(f"there are {len(tokens)} tokens and {len(scores)} scores")
    vocab = set(tokens)
    merges = []
    for i in sorted(range(len(tokens)), key=lambda i: (-scores[i], i)):
        text = tokens[i]
        for n in range(1, len(text) if types[i] == NORMAL else 0):
            if text[:n] in vocab and text[n:] in vocab:
                merges.append([text[:n], text[n:]])
    adds_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    unknown = next((text for text, kind in zip(tokens, types) if kind == UNKNOWN), None)
    decoders = [UNESCAPE, {"type": "ByteFallback"}, {"type": "Fuse"}, *([STRIP] if adds_space else [])]
    return make_tokenizer_json(
        tokens,
        types,
        normalizer={"type": "Sequence", "normalizers": [PREPEND, ESCAPE] if adds_space else [ESCAPE]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model=PIECES | {"unk_token": unknown, "merges": merges},
    )


def read_characters(tokens, types):
    """Returns the bytes of each token where all are one character each, else None."""
    chars = []
    for text, kind in zip(tokens, types):
        if kind == CONTROL:
            chars.append(text.encode())
            continue
        if not CHAR_BYTE.keys() >= set(text):
            return None
        token = bytes(CHAR_BYTE[c] for c in text)
        try:
            is_character = len(token.decode()) == 1
        except UnicodeDecodeError:  # a byte alone, as every BPE has them
            return None
        if not is_character:
            return None
        chars.append(token)
    return chars
