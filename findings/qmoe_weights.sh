#!/bin/sh
# onnxruntime 1.32.0 (onnx 1.23.2): com.microsoft's MoE and QMoE, a mixture of experts in float32 and in integers, on a processor,
# both with normalize_routing_weights=0, which is also the default.
# One would guess: an expert's output counts by its probability among all experts, in both, as in Qwen3-MoE or OLMoE with
# norm_topk_prob=false; QMoE is MoE with rounded weights.
# What happens: MoE does that. In QMoE the weights of the chosen experts sum to 1, whatever the attribute says.
# Output seen (probabilities 0.5, 0.3 and 0.2, of which two are taken; expert i multiplies by i + 1: 0.5 x 1 + 0.3 x 2 = 1.1,
# which divided by 0.8 is 1.375):
#   MoE 0: 1.100
#   MoE 1: 1.375
#   QMoE 0: 1.375
#   QMoE 1: 1.375
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 numpy==2.2.6 onnx==1.23.2
cat > "$folder/run.py" <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

WIDTH = 16
unit = np.eye(WIDTH, dtype=np.float32)
first = np.stack([unit] * 3)
second = np.stack([unit * (i + 1) for i in range(3)])


def codes(weights):
    """Integers of 4 bits, of which 8 means 0, two in a byte."""
    integers = (weights + 8).astype(np.uint8)
    return integers[..., ::2] | integers[..., 1::2] << 4


def run(op, normalize):
    scales = np.ones((3, WIDTH, 1), np.float32)
    weights = {"first": first, "second": second}
    inputs = ["x", "logits", "first", "", "second"]
    settings = {}
    if op == "QMoE":
        weights = {"first": codes(first), "second": codes(second), "scales": scales}
        inputs = ["x", "logits", "first", "scales", "", "second", "scales"]
        settings = {"expert_weight_bits": 4, "block_size": WIDTH, "weights_prepacked": 0}
    node = helper.make_node(
        op,
        inputs,
        ["y"],
        domain="com.microsoft",
        k=2,
        activation_type="relu",
        normalize_routing_weights=normalize,
        **settings,
    )
    graph = helper.make_graph(
        [node],
        "experts",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    [y] = session.run(None, {"x": np.ones((1, WIDTH), np.float32), "logits": logits})
    return y[0, 0]


for op in "MoE", "QMoE":
    for normalize in 0, 1:
        print(f"{op} {normalize}: {run(op, normalize):.3f}")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'TEXT'
MoE 0: 1.100
MoE 1: 1.375
QMoE 0: 1.375
QMoE 1: 1.375
TEXT
cmp -s "$folder/seen" "$folder/expected"
