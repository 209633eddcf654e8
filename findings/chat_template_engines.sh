#!/bin/sh
# transformers 5.24.0 (jinja2 3.1.6), @huggingface/jinja 0.5.11 (npm; transformers.js 4.3.2 renders with it) and llama.cpp
# (xllamacpp 2026.10.11549, its server's /apply-template): one chat template and one conversation.
# One would guess: the other two are there to give a model the prompt that it was trained on, so that each renders a template
# as transformers does, or refuses what it does not know.
# What happens: each has its own idea of plain Jinja, without a word.
#   A name that is set in one round of a loop is gone in the next one in Jinja. In both others it is still there, so that
#   what was meant for one message comes with the next as well.
#   lstrip('\n') takes all kinds of spaces in JavaScript, and so the indentation of an answer (Qwen3's template calls it
#   on answers); strip('*') takes no star there.
#   A dict that is printed, as in {{ tool }}, is nothing at all in llama.cpp: the model is told of no tool. A list is its items
#   there, one after the other. (transformers' page on templates says that quotes may differ, as they do in JavaScript, and
#   prefers filters to Python's methods; it is silent on the rest.)
# Output seen:
#   loop: transformers 'code?|\n    x = 1|*thanks*|', JavaScript and llama.cpp 'code?|\n    x = 1?|*thanks*?|'
#   lstrip: transformers and llama.cpp 'code|    x = 1|*thanks*|', JavaScript 'code|x = 1|*thanks*|'
#   strip: transformers and llama.cpp 'code|\n    x = 1|thanks|', JavaScript 'code|x = 1|*thanks*|'
#   dict: transformers "{'name': 'clock', 'zones': ['UTC']}", JavaScript '{"name": "clock", "zones": ["UTC"]}', llama.cpp ''
#   list: transformers "['UTC']", JavaScript '["UTC"]', llama.cpp 'UTC'
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 jinja2==3.1.6 gguf==0.19.0 xllamacpp==2026.10.11549 numpy==2.2.6
cd "$folder"
npm install --silent --no-fund --no-audit @huggingface/jinja@0.5.11 > log 2>&1
cat > cases.json <<'JSON'
{
  "messages": [
    {"role": "user", "content": "code"},
    {"role": "assistant", "content": "\n    x = 1"},
    {"role": "user", "content": "*thanks*"}
  ],
  "tool": {"name": "clock", "zones": ["UTC"]},
  "templates": {
    "loop": "{% for m in messages %}{% if loop.first %}{% set end = '?' %}{% endif %}{{ m.content }}{{ end }}|{% endfor %}",
    "lstrip": "{% for m in messages %}{{ m.content.lstrip('\\n') }}|{% endfor %}",
    "strip": "{% for m in messages %}{{ m.content.strip('*') }}|{% endfor %}",
    "dict": "{{ tool }}",
    "list": "{{ tool.zones }}"
  }
}
JSON
cat > web.mjs <<'JAVASCRIPT'
import fs from "fs";
import {Template} from "@huggingface/jinja";

const {messages, tool, templates} = JSON.parse(fs.readFileSync("cases.json"));
const texts = Object.entries(templates).map(([name, text]) => [name, new Template(text).render({messages, tool})]);
fs.writeFileSync("web.json", JSON.stringify(Object.fromEntries(texts)));
JAVASCRIPT
node web.mjs
cat > run.py <<'PYTHON'
import json
import os
import urllib.request

import gguf
import numpy as np
import xllamacpp
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SIZE = 32
cases = json.load(open("cases.json"))
web = json.load(open("web.json"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def write(path, template):
    """Writes a llama of one layer and no knowledge, whose tokens are bytes, and its chat template."""
    tokens = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
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
    writer.add_token_types([3] + [6] * 256)
    writer.add_eos_token_id(0)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), SIZE), np.float32))
    for tensor in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{tensor}.weight", np.zeros((SIZE, SIZE), np.float32))
    for tensor in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{tensor}.weight", np.ones(SIZE, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


servers, results = [], {}
for name, template in cases["templates"].items():
    params = xllamacpp.CommonParams()
    params.model.path = f"{name}.gguf"
    params.n_ctx = 256
    params.verbosity = 0
    params.use_jinja = True
    write(params.model.path, template)
    servers.append(xllamacpp.Server(params))
    values = {"tool": cases["tool"]}
    data = {"messages": cases["messages"], "chat_template_kwargs": values, "add_generation_prompt": False}
    headers = {"Content-Type": "application/json"}
    url = servers[-1].listening_address + "/apply-template"
    request = urllib.request.Request(url, json.dumps(data).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        local = json.load(answer)["prompt"]
    python = tokenizer.apply_chat_template(cases["messages"], chat_template=template, tokenize=False, **values)
    results[name] = python, web[name], local
    print("{}: transformers {!r}, JavaScript {!r}, llama.cpp {!r}".format(name, *results[name]), flush=True)
expected = {
    "loop": ("code?|\n    x = 1|*thanks*|", "code?|\n    x = 1?|*thanks*?|", "code?|\n    x = 1?|*thanks*?|"),
    "lstrip": ("code|    x = 1|*thanks*|", "code|x = 1|*thanks*|", "code|    x = 1|*thanks*|"),
    "strip": ("code|\n    x = 1|thanks|", "code|x = 1|*thanks*|", "code|\n    x = 1|thanks|"),
    "dict": ("{'name': 'clock', 'zones': ['UTC']}", '{"name": "clock", "zones": ["UTC"]}', ""),
    "list": ("['UTC']", '["UTC"]', "UTC"),
}
os._exit(results != expected)  # leaves the servers without waiting for them
PYTHON
venv/bin/python run.py 2> log || { cat log; exit 1; }
