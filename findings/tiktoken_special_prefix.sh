#!/bin/sh
# tiktoken 0.14.0 beside tokenizers 0.23.3: special tokens of which one begins another, as <think and <think>, <unused1 and
# <unused10, or the runs of spaces and line breaks that the vocabularies of GPT-NeoX, Phi-2 and Gemma have.
# One would guess: the longest that fits is taken, as by the tokenizer of Hugging Face from which such a vocabulary comes; or
# the first in special_tokens, at least.
# What happens: tiktoken joins them to one pattern in which the first alternative wins, in the order of a hash table. Which
# that is follows from how they are spelled: some sets come out right, in others the shorter token and loose bytes
# are put in place of the longer, and the order in the dict may or may not change it. Nothing is refused, and decode()
# gives the text back, so that a round trip is silent on it. special_tokens' docstring tells of names and values alone.
# Output seen (the length of each token that the longest of them is cut into):
#   '<think', '<think>': tiktoken [6, 1], reversed [6, 1], tokenizers [7]
#   '<tool', '<tool_call>': tiktoken [11], reversed [11], tokenizers [11]
#   '<unused', '<unused1', '<unused10': tiktoken [8, 1], reversed [8, 1], tokenizers [9]
#   2 to 5 line breaks: tiktoken [2, 2, 1], reversed [4, 1], tokenizers [5]
#   2 to 8 spaces: tiktoken [5, 2, 1], reversed [5, 2, 1], tokenizers [8]
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tiktoken==0.14.0 tokenizers==0.23.3
cat > "$folder/run.py" <<'PYTHON'
import tiktoken
from tokenizers import AddedToken, Tokenizer, models

RANKS = {bytes([byte]): byte for byte in range(256)}
SETS = {
    "'<think', '<think>'": ["<think", "<think>"],
    "'<tool', '<tool_call>'": ["<tool", "<tool_call>"],
    "'<unused', '<unused1', '<unused10'": ["<unused", "<unused1", "<unused10"],
    "2 to 5 line breaks": ["\n" * count for count in range(2, 6)],
    "2 to 8 spaces": [" " * count for count in range(2, 9)],
}


def lengths(specials, text):
    """Returns the lengths of the tokens that tiktoken cuts a text into."""
    ids = {special: 256 + i for i, special in enumerate(specials)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=RANKS, special_tokens=ids)
    tokens = encoding.encode(text, allowed_special="all")
    assert encoding.decode(tokens) == text
    return [len(encoding.decode([token])) for token in tokens]


for name, specials in SETS.items():
    text = specials[-1]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([AddedToken(special, normalized=False) for special in specials])
    expected = [len(token) for token in tokenizer.encode(text).tokens]
    first, second = lengths(specials, text), lengths(specials[::-1], text)
    print(f"{name}: tiktoken {first}, reversed {second}, tokenizers {expected}")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
'<think', '<think>': tiktoken [6, 1], reversed [6, 1], tokenizers [7]
'<tool', '<tool_call>': tiktoken [11], reversed [11], tokenizers [11]
'<unused', '<unused1', '<unused10': tiktoken [8, 1], reversed [8, 1], tokenizers [9]
2 to 5 line breaks: tiktoken [2, 2, 1], reversed [4, 1], tokenizers [5]
2 to 8 spaces: tiktoken [5, 2, 1], reversed [5, 2, 1], tokenizers [8]
TEXT
cmp "$folder/seen" "$folder/expected"
