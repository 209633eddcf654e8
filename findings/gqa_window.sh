#!/bin/sh
# onnxruntime 1.23.2, 1.24.1 and 1.32.0 (onnx 1.23.2): com.microsoft's GroupQueryAttention with local_window_size, the attention of
# models with windows, on a processor.
# One would guess: a file means the same in both, as the operator's version is 1 in both, or the newer one refuses the older file.
# What happens: in 1.23.2 a window of 3 has four tokens, the one at hand and three before it; from 1.24.1 on it has three. A file
# that fits the one is another model in the other, without a word.
# Output seen (six tokens whose values are 0 to 5 and whose scores are equal, so that each output is the mean of what is seen):
#   1.23.2: 0.0 0.5 1.0 1.5 2.5 3.5
#   1.24.1: 0.0 0.5 1.0 2.0 3.0 4.0
#   1.32.0: 0.0 0.5 1.0 2.0 3.0 4.0
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/write.py" <<'PYTHON'
import sys

from onnx import TensorProto, helper

value = helper.make_tensor_value_info
node = helper.make_node(
    "GroupQueryAttention",
    ["q", "k", "v", "past_k", "past_v", "last", "total"],
    ["y", "present_k", "present_v"],
    domain="com.microsoft",
    num_heads=1,
    kv_num_heads=1,
    local_window_size=3,
)
states = [value(name, TensorProto.FLOAT, [1, "T", 16]) for name in "qkv"]
past = [value(f"past_{name}", TensorProto.FLOAT, [1, 1, "P", 16]) for name in "kv"]
counts = [value("last", TensorProto.INT32, [1]), value("total", TensorProto.INT32, [])]
outputs = [value(name, TensorProto.FLOAT, None) for name in ("y", "present_k", "present_v")]
graph = helper.make_graph([node], "window", states + past + counts, outputs)
opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
with open(sys.argv[1], "wb") as f:
    f.write(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())
PYTHON
cat > "$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
T = 6
zeros = np.zeros((1, T, 16), np.float32)
values = zeros + np.arange(T, dtype=np.float32)[None, :, None]
past = np.zeros((1, 1, 0, 16), np.float32)
feeds = {"q": zeros, "k": zeros, "v": values, "past_k": past, "past_v": past}
feeds |= {"last": np.array([T - 1], np.int32), "total": np.array(T, np.int32)}
y = session.run(["y"], feeds)[0][0, :, 0]
print(f"{onnxruntime.__version__}:", *(f"{number:.1f}" for number in y))
PYTHON
for version in 1.23.2 1.24.1 1.32.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q onnxruntime==$version numpy==2.2.6 onnx==1.23.2
    [ -f "$folder/window.onnx" ] || "$folder/$version/bin/python" "$folder/write.py" "$folder/window.onnx"
    "$folder/$version/bin/python" "$folder/run.py" "$folder/window.onnx"
done > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
1.23.2: 0.0 0.5 1.0 1.5 2.5 3.5
1.24.1: 0.0 0.5 1.0 2.0 3.0 4.0
1.32.0: 0.0 0.5 1.0 2.0 3.0 4.0
TEXT
cmp -s "$folder/seen" "$folder/expected"
