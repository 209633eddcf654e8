#!/bin/sh
# transformers 5.24.0 (tokenizers 0.23.3) and sentencepiece 0.2.3: LlamaTokenizer, or AutoTokenizer that is told this
# class, on a tokenizer.model that sentencepiece has just learned by BPE with its own defaults (so no byte_fallback).
# One would guess: both give the same tokens, as with LlamaTokenizer of 4.57.1; or a letter that is not in the
# vocabulary becomes <unk> at least, as with LlamaTokenizerFast of 4.57.1 and as the docstring says of unk_token.
# What happens: of the file only pieces and merges are taken. Unknown letters are to be spelled in bytes that this file
# has not, and the BPE is given no unk_token: they get no token at all, and the ids of "Cat" read "at". The file's rules
# for spaces are left out as well: a line break, a space to sentencepiece, is such an unknown letter, and the
# words on both its sides become one. None of it is said.
# Output seen:
#   'the cat': sentencepiece ▁the ▁cat, transformers ▁the ▁cat
#   'the Cat': sentencepiece ▁the ▁ <unk> at, transformers ▁the ▁ at
#   'the\ncat': sentencepiece ▁the ▁cat, transformers ▁the c at
#   'the  cat': sentencepiece ▁the ▁cat, transformers ▁the ▁ ▁cat
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import sentencepiece
from transformers import AutoTokenizer, LlamaTokenizer

folder = sys.argv[1]
with open(os.path.join(folder, "text"), "w") as f:
    f.write("the cat sat on the mat\nthe dog ran under the tree\n" * 100)
sentencepiece.SentencePieceTrainer.train(
    input=os.path.join(folder, "text"),
    model_prefix=os.path.join(folder, "tokenizer"),
    model_type="bpe",
    vocab_size=40,
    minloglevel=2,
)
with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
    f.write('{"tokenizer_class": "LlamaTokenizer"}')
reference = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model"))
tokenizer = LlamaTokenizer.from_pretrained(folder)
same = AutoTokenizer.from_pretrained(folder)
results = []
for text in ("the cat", "the Cat", "the\ncat", "the  cat"):
    expected = reference.id_to_piece(reference.encode(text))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert same(text, add_special_tokens=False).input_ids == ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    results.append((expected, tokens))
    print(f"{text!r}: sentencepiece {' '.join(expected)}, transformers {' '.join(tokens)}")
assert tokenizer.unk_token == "<unk>" and tokenizer.unk_token_id == reference.unk_id()
seen = [("▁the ▁cat", "▁the ▁cat"), ("▁the ▁ <unk> at", "▁the ▁ at"), ("▁the ▁cat", "▁the c at")]
seen.append(("▁the ▁cat", "▁the ▁ ▁cat"))
raise SystemExit([(" ".join(a), " ".join(b)) for a, b in results] != seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
