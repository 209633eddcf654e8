#!/bin/sh
# llama.cpp (xllamacpp 2026.10.11549), files written by gguf 0.19.0: a model that writes a, b, X, c, a, b, X, c, ... for
# sure, where X is one ordinary token (type 1), and eos_token_id is another token that is never written.
# One would guess: the text goes on to n_predict, whatever X is spelled like; eos_token_id alone ends it.
# What happens: where X is spelled like the end of a text or turn in some known model, the text ends at it, is said to have
# ended at "eos", and X is left out; with ignore_eos X is never written at all. A token with another purpose, as one between
# fields or documents, needs a spelling of its own.
# Output seen:
#   <|sep|>: limit, 'b<|sep|>cab<|sep|>ca'
#   <|end|>: eos, 'b'
#   <|endoftext|>: eos, 'b'
#   <|im_end|>: eos, 'b'
#   [EOS]: eos, 'b'
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

SIZE = 32


def write(path, spelling):
    """Writes a llama of one layer that does nothing, so that the last token alone decides on the next."""
    tokens = ["</s>", "a", "b", spelling, "c"]
    embedding = np.eye(len(tokens), SIZE, dtype=np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(SIZE)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3, 1, 1, 1, 1])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_tensor("token_embd.weight", embedding)
    # row i is the embedding of the token before token i; </s> follows on none
    head = 9 * embedding[[0, 4, 1, 2, 3]]
    head[0] = 0
    writer.add_tensor("output.weight", head)
    for tensor in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{tensor}.weight", np.zeros((SIZE, SIZE), np.float32))
    for tensor in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{tensor}.weight", np.ones(SIZE, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


servers, results = [], {}
for spelling in ("<|sep|>", "<|end|>", "<|endoftext|>", "<|im_end|>", "[EOS]"):
    params = xllamacpp.CommonParams()
    params.model.path = os.path.join(sys.argv[1], f"{len(servers)}.gguf")
    params.n_ctx = 256
    params.verbosity = 0
    write(params.model.path, spelling)
    servers.append(xllamacpp.Server(params))
    data = json.dumps({"prompt": "a", "temperature": 0, "n_predict": 8}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(servers[-1].listening_address + "/completion", data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        result = json.load(answer)
    results[spelling] = result["stop_type"], result["content"]
    print("{}: {}, {!r}".format(spelling, *results[spelling]), flush=True)
expected = dict.fromkeys(results, ("eos", "b")) | {"<|sep|>": ("limit", "b<|sep|>cab<|sep|>ca")}
os._exit(results != expected)  # leaves the servers without waiting for them
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
