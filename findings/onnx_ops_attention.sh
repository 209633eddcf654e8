#!/bin/sh
# torch 2.13.0 (2.14.1 is the same), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0: torch.onnx.ops.attention with a past and
# is_causal=True, a step of a model that keeps keys and values, in PyTorch and in the file that torch.onnx.export makes of it.
# One would guess: an operator that is in PyTorch to be exported as it stands computes there what the file computes, and a text
# that is read in pieces, each with the past of the one before, has the outputs of the text that is read at once.
# What happens: in PyTorch the mask begins at the first key of the past, so that the only token of a step sees the oldest token
# and nothing else. ONNX begins it after the past, in its own reference and in onnxruntime, and the file is right: what is
# tried or trained in PyTorch is another model than what is exported, without a word. (The docstring still has ONNX's first
# words, "the upper left causal bias"; ONNX 1.23's text is "bottom-right (offset-aware) alignment".) attn_mask in place of
# is_causal is right in both.
# Output seen (five tokens whose values are 1 to 5 and whose scores are equal, so that an output is the mean of what is seen):
#   is_causal, 5 at once: PyTorch 1.0 1.5 2.0 2.5 3.0, onnxruntime 1.0 1.5 2.0 2.5 3.0, onnx 1.0 1.5 2.0 2.5 3.0
#   is_causal, 2 and 3: PyTorch 1.0 1.5 1.0 1.5 2.0, onnxruntime 1.0 1.5 2.0 2.5 3.0, onnx 1.0 1.5 2.0 2.5 3.0
#   is_causal, one by one: PyTorch 1.0 1.0 1.0 1.0 1.0, onnxruntime 1.0 1.5 2.0 2.5 3.0, onnx 1.0 1.5 2.0 2.5 3.0
#   attn_mask, 2 and 3: PyTorch 1.0 1.5 2.0 2.5 3.0, onnxruntime 1.0 1.5 2.0 2.5 3.0, onnx 1.0 1.5 2.0 2.5 3.0
#   attn_mask, one by one: PyTorch 1.0 1.5 2.0 2.5 3.0, onnxruntime 1.0 1.5 2.0 2.5 3.0, onnx 1.0 1.5 2.0 2.5 3.0
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > "$folder/run.py" <<'PYTHON'
import numpy as np
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator


class Step(torch.nn.Module):
    def __init__(self, has_mask):
        super().__init__()
        self.has_mask = has_mask

    def forward(self, q, k, v, past_k, past_v):
        if self.has_mask:
            past, length = past_k.shape[2], q.shape[2]
            mask = torch.arange(past + length) <= torch.arange(length)[:, None] + past
            return torch.onnx.ops.attention(q, k, v, mask, past_k, past_v)[:3]
        return torch.onnx.ops.attention(q, k, v, past_key=past_k, past_value=past_v, is_causal=True)[:3]


def read(step, pieces):
    """Returns the outputs for five tokens that step reads in pieces of these lengths."""
    past_k = past_v = np.zeros((1, 1, 0, 4), np.float32)
    outputs, begin = [], 1
    for length in pieces:
        v = np.arange(begin, begin + length, dtype=np.float32)[None, None, :, None].repeat(4, axis=3)
        zeros = np.zeros_like(v)
        y, past_k, past_v = step(zeros, zeros, v, past_k, past_v)
        outputs += y[0, 0, :, 0].tolist()
        begin += length
    return outputs


def steps(model):
    """Returns the three that run one model: PyTorch, onnxruntime and the reference of onnx."""
    example = tuple(torch.zeros(1, 1, length, 4) for length in (2, 2, 2, 3, 3))
    shapes = tuple({2: torch.export.Dim.DYNAMIC} for _ in example)
    file = torch.onnx.export(model, example, dynamic_shapes=shapes, opset_version=23, verbose=False).model_proto
    assert "Attention" in [node.op_type for node in file.graph.node]
    names = [end.name for end in file.graph.input]
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    reference = ReferenceEvaluator(file)
    yield "PyTorch", lambda *arrays: [y.numpy() for y in model(*map(torch.from_numpy, arrays))]
    yield "onnxruntime", lambda *arrays: session.run(None, dict(zip(names, arrays)))
    yield "onnx", lambda *arrays: reference.run(None, dict(zip(names, arrays)))


causal = dict(steps(Step(has_mask=False).eval()))
masked = dict(steps(Step(has_mask=True).eval()))
right = [1, 1.5, 2, 2.5, 3]
cases = [
    ("is_causal, 5 at once", causal, [5], right),
    ("is_causal, 2 and 3", causal, [2, 3], [1, 1.5, 1, 1.5, 2]),
    ("is_causal, one by one", causal, 5 * [1], 5 * [1]),
    ("attn_mask, 2 and 3", masked, [2, 3], right),
    ("attn_mask, one by one", masked, 5 * [1], right),
]
is_wrong = False
for name, kinds, pieces, expected in cases:
    results = {kind: read(step, pieces) for kind, step in kinds.items()}
    texts = [f"{kind} {' '.join(f'{y:.1f}' for y in outputs)}" for kind, outputs in results.items()]
    print(f"{name}: {', '.join(texts)}")
    is_wrong |= not np.allclose(list(results.values()), [expected, right, right], atol=1e-4)
raise SystemExit(is_wrong)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
