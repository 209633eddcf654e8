#!/bin/sh
# llama.cpp (xllamacpp 2026.10.11549), files written by gguf 0.19.0: two files that differ in general.name only.
# One would guess: the name is for people to read, and both give a text the same ids.
# What happens: where "phi3" or "phi-3" is in the name, in any case and in a llama as well, spaces and line breaks after
# special tokens are left out (but not after <unk>, <s> and <|endoftext|>). A vocabulary without </s> is then refused.
# Output seen: "tiny: a <|user|> Ġ b, tiny-phi3: a <|user|> b"
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 xllamacpp==2026.10.11549
cat > "$folder/run.py" <<'PYTHON'
import json
import os
import sys
import urllib.request

import gguf
import numpy as np
import xllamacpp

# GPT-2's characters of the 256 bytes
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
characters = [chr(code) for code in printable + list(range(256, 256 + 256 - len(printable)))]
TOKENS = ["</s>", "<unk>", "<s>", "<|endoftext|>", "<|user|>", *characters]
SIZE = 32


def write(path, name):
    """Writes a llama of one layer and no weights but zeros."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(SIZE)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token[0] == "<" and len(token) > 1 else 1 for token in TOKENS])
    writer.add_token_merges(["a a"])
    writer.add_eos_token_id(0)
    for tensor in ("token_embd", "output"):
        writer.add_tensor(f"{tensor}.weight", np.zeros((len(TOKENS), SIZE), np.float32))
    for tensor in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{tensor}.weight", np.zeros((SIZE, SIZE), np.float32))
    for tensor in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{tensor}.weight", np.ones(SIZE, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenize(server, text):
    headers = {"Content-Type": "application/json"}
    data = json.dumps({"content": text}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return " ".join(TOKENS[id] for id in json.load(answer)["tokens"])


servers, results = [], []
for name in ("tiny", "tiny-phi3"):
    params = xllamacpp.CommonParams()
    params.model.path = os.path.join(sys.argv[1], f"{name}.gguf")
    params.n_ctx = 256
    params.verbosity = 0
    write(params.model.path, name)
    servers.append(xllamacpp.Server(params))
    results.append(tokenize(servers[-1], "a<|user|> b"))
print("tiny: {}, tiny-phi3: {}".format(*results), flush=True)
os._exit(results != ["a <|user|> Ġ b", "a <|user|> b"])  # leaves the servers without waiting for them
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
