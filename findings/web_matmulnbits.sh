#!/bin/sh
# onnxruntime 1.32.0 and onnxruntime-web 1.30.0 (npm; its wasm provider in node): one token times a matrix of 1024 x 4096, as
# float32 MatMul and as MatMulNBits of 8 and of 4 bits (groups of 32, accuracy_level 4), one thread each.
# One would guess: what has a quarter or an eighth of the bytes is faster in a page, too, or as fast at the worst.
# What happens: natively MatMulNBits is several times faster than float32; in wasm the same file is ten times slower.
# Output seen (us, on a busy machine; checked: faster by 1.5 natively, slower by 1.5 in wasm):
#   native: float32 520, 8 bits 199, 4 bits 154
#   wasm: float32 971, 8 bits 13433, 4 bits 13326
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.2.6
cd "$folder"
npm install --silent --no-fund --no-audit onnxruntime-web@1.30.0 > log 2>&1
cat > native.py <<'PYTHON'
import json
import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

IN, OUT, GROUP = 1024, 4096, 32
random = np.random.default_rng(0)


def write(name, node, arrays):
    ends = [make_tensor_value_info(end, 1, [1, size]) for end, size in (("x", IN), ("y", OUT))]
    tensors = [onnx.numpy_helper.from_array(array, key) for key, array in arrays.items()]
    opsets = [make_opsetid("", 18), make_opsetid("com.microsoft", 1)]
    model = make_model(make_graph([node], "g", ends[:1], ends[1:], tensors), opset_imports=opsets, ir_version=10)
    onnx.save(model, name)


write("float32.onnx", make_node("MatMul", ["x", "w"], ["y"]), {"w": random.random((IN, OUT), np.float32)})
for bits in 8, 4:
    arrays = {
        "q": random.integers(0, 256, (OUT, IN // GROUP, GROUP * bits // 8), np.uint8),
        "scale": random.random((OUT, IN // GROUP), np.float32),
    }
    sizes = {"K": IN, "N": OUT, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
    node = make_node("MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", **sizes)
    write(f"{bits} bits.onnx", node, arrays)

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
x = {"x": random.random((1, IN), np.float32)}
names = "float32", "8 bits", "4 bits"
sessions = {name: onnxruntime.InferenceSession(f"{name}.onnx", options) for name in names}
times = {name: [] for name in names}
for _ in range(30):
    for name, session in sessions.items():
        start = time.perf_counter()
        session.run(None, x)
        times[name].append(time.perf_counter() - start)
medians = {name: 1e6 * statistics.median(rounds) for name, rounds in times.items()}
print("native:", ", ".join(f"{name} {time:.0f}" for name, time in medians.items()))
json.dump(medians, open("native.json", "w"))
PYTHON
venv/bin/python native.py
cat > web.mjs <<'JAVASCRIPT'
import fs from "fs";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1;
const names = ["float32", "8 bits", "4 bits"];
const x = new ort.Tensor("float32", new Float32Array(1024).fill(0.5), [1, 1024]);
const sessions = {}, times = {}, medians = {};
for (const name of names) {
    sessions[name] = await ort.InferenceSession.create(fs.readFileSync(`${name}.onnx`), {executionProviders: ["wasm"]});
    times[name] = [];
}
for (let round = 0; round < 30; round++)
    for (const name of names) {
        const start = performance.now();
        await sessions[name].run({x});
        times[name].push(1000 * (performance.now() - start));
    }
for (const name of names) medians[name] = times[name].sort((a, b) => a - b)[15];
console.log("wasm: " + names.map(name => `${name} ${medians[name].toFixed(0)}`).join(", "));
const native = JSON.parse(fs.readFileSync("native.json"));
const isAsSeen = ["8 bits", "4 bits"].every(
    name => native.float32 > 1.5 * native[name] && medians[name] > 1.5 * medians.float32);
process.exit(isAsSeen ? 0 : 1);
JAVASCRIPT
node web.mjs 2> log || { cat log; exit 1; }
