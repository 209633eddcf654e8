#!/bin/sh
# node-llama-cpp 3.22.1 (its prebuilt llama.cpp for Linux, x86-64), files written by gguf 0.19.0 (numpy 2.2.6): what a
# LlamaChatSession has the model read of the message "hi", by the chat template that stands in the file.
# (The system message of the session itself, which its documentation names, is taken out of the history first.)
# One would guess: the ids of the template's text, as llama.cpp's own server, transformers and this package's model.tokenize()
# make them of the whole of it, since the model was trained on those.
# What happens, without a word:
#   space: a message is encoded apart from the template around it. Where a space stands before it, as after "USER:", the
#   space is a token of its own and the word is the one without a space.
#   system: the template says something of its own where no system message is given, as SmolLM2's does. It is compared with
#   ChatML on conversations that all have a system message, found to be the same, and ChatML is used: that text is gone.
#   begin: and ChatML begins with bos, although add_bos_token is false in the file and the template has no bos. SmolLM2's bos is
#   <|im_start|>, so that there are two.
# JinjaTemplateChatWrapper, given to the session, does as the template says in the last two.
# Output seen:
#   space: JinjaTemplate reads 'Q' ':' 'Ġ' 'hi' 'Ċ' 'A' ':', the template has 'Q' ':' 'Ġhi' 'Ċ' 'A' ':'
# and of TURN, which is '<|im_start|>' 'user' 'Ċ' 'hi' '<|im_end|>' 'Ċ' '<|im_start|>' 'assistant' 'Ċ':
#   system: ChatML reads '<e>' TURN, the template has '<|im_start|>' 'system' 'Ċ' 'A' '<|im_end|>' 'Ċ' TURN
#   begin: ChatML reads '<|im_start|>' TURN, the template has TURN
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 numpy==2.2.6
cd "$folder"
npm install --silent --no-fund --no-audit --ignore-scripts --omit=optional node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1 > log 2>&1
cat > cases.json <<'JSON'
{
  "space": ["<e>", "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<e>{% else %}Q: {{ m.content }}\nA:{% endif %}{% endfor %}"],
  "system": ["<e>", "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nA<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"],
  "begin": ["<|im_start|>", "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"]
}
JSON
cat > write.py <<'PYTHON'
import json
import string

import gguf
import numpy as np

SIZE = 32
# a byte-level BPE of ASCII; each word is joined from its letters, left to right
WORDS = ["hi", "Ġhi", "user", "system", "assistant"]
SPECIAL = ["<e>", "<|im_start|>", "<|im_end|>"]
tokens = [*SPECIAL, "Ġ", "Ċ", *(c for c in string.printable if c.isprintable() and c != " ")]
merges = []
for word in WORDS:
    parts = ["Ġ", "hi"] if word == "Ġhi" else [*word]
    while len(parts) > 1:
        merges.append(f"{parts[0]} {parts[1]}")
        parts[:2] = [parts[0] + parts[1]]
        tokens += [parts[0]] if parts[0] not in tokens else []
for name, (bos, template) in json.load(open("cases.json")).items():
    writer = gguf.GGUFWriter(f"{name}.gguf", "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(SIZE)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(SPECIAL.index(bos))
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
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
json.dump(tokens, open("tokens.json", "w"))
PYTHON
venv/bin/python write.py
cat > run.mjs <<'JAVASCRIPT'
import fs from "fs";
import {Template} from "@huggingface/jinja";
import {getLlama, LlamaChatSession} from "node-llama-cpp";

const cases = JSON.parse(fs.readFileSync("cases.json"));
const tokens = JSON.parse(fs.readFileSync("tokens.json"));
const spell = ids => ids.map(id => `'${tokens[id]}'`).join(" ");
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const lines = [];
for (const [name, [, template]] of Object.entries(cases)) {
  const model = await llama.loadModel({modelPath: `${name}.gguf`});
  const context = await model.createContext({contextSize: 256});
  const contextSequence = context.getSequence();
  const session = new LlamaChatSession({contextSequence});
  session.setChatHistory([]); // without its own system message
  await session.prompt("hi", {maxTokens: 1, temperature: 0});
  const text = new Template(template).render({messages: [{role: "user", content: "hi"}], add_generation_prompt: true});
  const ids = model.tokenize(text, true);
  // one more may have been written
  const read = contextSequence.contextTokens;
  const last = read.lastIndexOf(ids.at(-1)) + 1;
  lines.push(`${name}: ${session.chatWrapper.wrapperName} reads ${spell(read.slice(0, last))}, the template has ${spell(ids)}`);
  console.log(lines.at(-1));
}
const turn = "'<|im_start|>' 'user' 'Ċ' 'hi' '<|im_end|>' 'Ċ' '<|im_start|>' 'assistant' 'Ċ'";
const expected = [
  "space: JinjaTemplate reads 'Q' ':' 'Ġ' 'hi' 'Ċ' 'A' ':', the template has 'Q' ':' 'Ġhi' 'Ċ' 'A' ':'",
  `system: ChatML reads '<e>' ${turn}, the template has '<|im_start|>' 'system' 'Ċ' 'A' '<|im_end|>' 'Ċ' ${turn}`,
  `begin: ChatML reads '<|im_start|>' ${turn}, the template has ${turn}`,
];
process.exit(lines.join() === expected.join() ? 0 : 1);
JAVASCRIPT
node run.mjs 2> log || { cat log; exit 1; }
