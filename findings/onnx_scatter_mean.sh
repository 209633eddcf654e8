#!/bin/sh
# torch 2.13.0 (onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0): torch.onnx.export(dynamo=True) of scatter_reduce, which puts
# the vectors of tokens together to one for each word, segment or expert.
# One would guess: the file computes what the model does, or the exporter refuses what ONNX has no operator for, as it does
# with index_reduce: ScatterElements knows add, mul, max and min, and no mean.
# What happens: "mean" becomes a ScatterElements that reduces nothing: the last vector of each word takes the place of the mean.
# The export succeeds without a word. "sum", divided by counts, is right.
# Output seen (six tokens 1 to 6, in words of two, three and one):
#   sum: torch [3.0, 12.0, 6.0], onnxruntime [3.0, 12.0, 6.0]
#   amax: torch [2.0, 5.0, 6.0], onnxruntime [2.0, 5.0, 6.0]
#   mean: torch [1.5, 4.0, 6.0], onnxruntime [2.0, 5.0, 6.0]
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > "$folder/run.py" <<'PYTHON'
import onnxruntime
import torch

tokens = torch.arange(1.0, 7.0).view(6, 1)
words = torch.tensor([0, 0, 1, 1, 1, 2])


class Words(torch.nn.Module):
    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def forward(self, tokens, words):
        empty = torch.zeros(3, tokens.shape[1])
        return empty.scatter_reduce(0, words[:, None], tokens, self.reduce, include_self=False)


is_as_seen = True
for reduce in ("sum", "amax", "mean"):
    model = Words(reduce)
    program = torch.onnx.export(model, (tokens, words), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (read,) = session.run(None, {"tokens": tokens.numpy(), "words": words.numpy()})
    wanted, read = model(tokens, words).flatten().tolist(), read.flatten().tolist()
    print(f"{reduce}: torch {wanted}, onnxruntime {read}")
    is_as_seen &= read == ([2.0, 5.0, 6.0] if reduce == "mean" else wanted)
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/err" > "$folder/seen" || {
    cat "$folder/seen" "$folder/err"
    exit 1
}
grep -E '^(sum|amax|mean):' "$folder/seen"
