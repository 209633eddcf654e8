#!/bin/sh
# @huggingface/transformers 4.3.2 (npm, in node; files written by onnx 1.23.2): generate() of a model whose folder says in
# generation_config.json how to sample, or that is told so in the call.
# One would guess: the text is sampled as transformers in Python samples it from that folder. GenerationConfig documents top_p,
# typical_p, epsilon_cutoff and eta_cutoff, and the package exports a TopPLogitsWarper; min_p, which is not documented, would be
# refused, as Python refuses a setting that it does not know.
# What happens: only temperature and top_k are used. top_p and the others are dropped without a word, from the file and from
# the call: with one seed the tokens are the same as without them, and what top_p was to cut off is written (of 50 tokens, as
# top_k is 50 unless set). TopPLogitsWarper handed over as logits_processor is no way out: it has no body, and fails. A
# LogitsProcessor of one's own is used.
# Output seen (1,000 tokens of probabilities 0.4, 0.3, 0.15, 0.08, 0.04, 0.02, 0.007, 0.003; which of them were drawn):
#   nothing: 0 1 2 3 4 5 6 7
#   top_p 0.5 in generation_config.json: 0 1 2 3 4 5 6 7, the same tokens
#   {"top_p":0.5}: 0 1 2 3 4 5 6 7, the same tokens
#   {"min_p":0.5}: 0 1 2 3 4 5 6 7, the same tokens
#   {"typical_p":0.2}: 0 1 2 3 4 5 6 7, the same tokens
#   {"epsilon_cutoff":0.1}: 0 1 2 3 4 5 6 7, the same tokens
#   {"eta_cutoff":0.1}: 0 1 2 3 4 5 6 7, the same tokens
#   {"top_k":2}: 0 1
#   TopPLogitsWarper(0.5): `_call` should be implemented in a subclass
#   a LogitsProcessor of one's own: 0 1
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 numpy==2.2.6
cd "$folder"
npm install --silent --no-fund --no-audit --ignore-scripts @huggingface/transformers@4.3.2 > log 2>&1
cat > write.py <<'PYTHON'
import json
import os

import numpy as np
import onnx
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

chances = np.array([0.4, 0.3, 0.15, 0.08, 0.04, 0.02, 0.007, 0.003])
table = onnx.numpy_helper.from_array(np.log(np.tile(chances, (8, 1))).astype(np.float32), "table")
node = make_node("Gather", ["table", "input_ids"], ["logits"])
ids = make_tensor_value_info("input_ids", 7, ["batch_size", "length"])
logits = make_tensor_value_info("logits", 1, ["batch_size", "length", 8])
model = make_model(make_graph([node], "g", [ids], [logits], [table]), opset_imports=[make_opsetid("", 18)], ir_version=9)
sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 8}
config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": None, "eos_token_id": None} | sizes
for name, sampling in {"plain": {}, "told": {"top_p": 0.5}}.items():
    os.makedirs(f"{name}/onnx")
    onnx.save(model, f"{name}/onnx/model.onnx")
    json.dump(config, open(f"{name}/config.json", "w"))
    json.dump({"do_sample": True} | sampling, open(f"{name}/generation_config.json", "w"))
PYTHON
venv/bin/python write.py
cat > run.mjs <<'JAVASCRIPT'
import {
    AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, Tensor, TopPLogitsWarper, env, random,
} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "./";
const plain = await AutoModelForCausalLM.from_pretrained("plain", {dtype: "fp32"});
const told = await AutoModelForCausalLM.from_pretrained("told", {dtype: "fp32"});

async function write(model, settings) {
    random.seed(0);
    const input_ids = new Tensor("int64", new BigInt64Array(1), [1, 1]);
    const rows = await model.generate({input_ids, max_new_tokens: 1000, ...settings});
    return rows.tolist()[0].slice(1).map(Number);
}

// The two likeliest are what top_p = 0.5 leaves of these probabilities.
class Likeliest extends LogitsProcessor {
    _call(ids, logits) {
        logits.data.fill(-Infinity, 2);
        return logits;
    }
}

function listOf(processor) {
    const list = new LogitsProcessorList();
    list.push(processor);
    return list;
}

const lines = [], plainTokens = await write(plain, {});
const drawn = tokens => [...new Set(tokens)].sort().join(" ");
function report(name, tokens) {
    const isSame = tokens.join() === plainTokens.join();
    lines.push(`${name}: ${drawn(tokens)}${isSame ? ", the same tokens" : ""}`);
}

lines.push(`nothing: ${drawn(plainTokens)}`);
report("top_p 0.5 in generation_config.json", await write(told, {}));
const calls = [{top_p: 0.5}, {min_p: 0.5}, {typical_p: 0.2}, {epsilon_cutoff: 0.1}, {eta_cutoff: 0.1}, {top_k: 2}];
for (const settings of calls) report(JSON.stringify(settings), await write(plain, settings));
try {
    report("TopPLogitsWarper(0.5)", await write(plain, {logits_processor: listOf(new TopPLogitsWarper(0.5))}));
} catch (error) {
    lines.push(`TopPLogitsWarper(0.5): ${error.message}`);
}
report("a LogitsProcessor of one's own", await write(plain, {logits_processor: listOf(new Likeliest())}));
console.log(lines.join("\n"));

const all = "0 1 2 3 4 5 6 7", same = `${all}, the same tokens`;
const expected = [all, same, same, same, same, same, same, "0 1", "`_call` should be implemented in a subclass", "0 1"];
process.exit(lines.some((line, i) => !line.endsWith(`: ${expected[i]}`)) ? 1 : 0);
JAVASCRIPT
node run.mjs 2> log || { cat log; exit 1; }
