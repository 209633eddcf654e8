#!/bin/sh
# safetensors 0.8.0 beside 0.7.0, with numpy 2.2.6, mlx 0.32.4 (CPU), transformers 5.24.0 and torch 2.13.0: safetensors.numpy and
# safetensors.mlx, save_file of arrays that are transposed or have every other column taken out, as in a conversion from a
# framework that keeps weights as inputs by outputs: {"w": w.T}.
# One would guess: what is read back is what was saved, as with 0.7.0 and before, or the array is refused, as safetensors.torch
# does ("You are trying to save a non contiguous tensor"). The docstring asks for arrays that are "contiguous and dense".
# What happens: 0.8.0 hands Rust the address of the array and its size (_flatten in safetensors/numpy.py: tensor.ctypes.data and
# nbytes, where 0.7.0 had tobytes()), and never looks at its strides. The file has the transposed shape with the bytes as they
# lay in memory, without a word. A square matrix is the one that was not transposed, any other is no matrix of the model, and
# every shape fits, so that from_pretrained takes the folder and reports nothing. np.ascontiguousarray, mx.contiguous or 0.7.0
# is right; so is mlx's own mx.save_safetensors. (Issue 825 of safetensors, open, has it for numpy's Fortran order.)
# Output seen (read back right, yes or no; then a Llama of random weights that is written to a folder in this way by numpy and
# read by from_pretrained: the difference of logits, as a share of their norm, which may differ among processors):
#   0.7.0, as it lies: numpy True, mlx True
#   0.7.0, transposed: numpy True, mlx True
#   0.7.0, square, transposed: numpy True, mlx True
#   0.7.0, every other column: numpy True, mlx True
#   0.7.0, transposed, contiguous: numpy True, mlx True
#   0.7.0, transposed, by mlx's own save_safetensors: True
#   0.8.0, as it lies: numpy True, mlx True
#   0.8.0, transposed: numpy False, mlx False
#   0.8.0, square, transposed: numpy False, mlx False
#   0.8.0, every other column: numpy False, mlx False
#   0.8.0, transposed, contiguous: numpy True, mlx True
#   0.8.0, transposed, by mlx's own save_safetensors: True
#   0.8.0, transposed, by safetensors.torch: refused True
#   folder, 0.7.0: logits off by 0.000, complaints of from_pretrained 0
#   folder, 0.8.0: logits off by 0.472, complaints of from_pretrained 0
#   folder, contiguous: logits off by 0.000, complaints of from_pretrained 0
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/old"
"$folder/old/bin/pip" install -q safetensors==0.7.0 numpy==2.2.6 "mlx[cpu]==0.32.4"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.2.6 "mlx[cpu]==0.32.4" transformers==5.24.0 torch==2.13.0
cat > "$folder/make.py" <<'PYTHON'
import sys

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
# Linears as Flax and others keep them: inputs by outputs.
turned = {name for name, w in weights.items() if name.endswith("proj.weight")}
np.savez(sys.argv[1] + "/weights.npz", **{k: w.T.copy() if k in turned else w for k, w in weights.items()})
for name in ("0.7.0", "0.8.0", "contiguous"):
    model.config.save_pretrained(f"{sys.argv[1]}/{name}")
ids = torch.arange(48).reshape(2, 24)
np.save(sys.argv[1] + "/logits.npy", model(ids).logits.detach().numpy())
PYTHON
cat > "$folder/write.py" <<'PYTHON'
import sys

import mlx.core as mx
import numpy as np
import safetensors
import safetensors.mlx
import safetensors.numpy

version, folder = safetensors.__version__, sys.argv[1]
w = np.arange(12, dtype=np.float32).reshape(3, 4)
m = mx.array(w)
cases = {
    "as it lies": (w, m),
    "transposed": (w.T, m.T),
    "square, transposed": (w[:, :3].copy().T, mx.contiguous(m[:, :3]).T),
    "every other column": (w[:, ::2], m[:, ::2]),
    "transposed, contiguous": (np.ascontiguousarray(w.T), mx.contiguous(m.T)),
}
is_as_seen = True
for name, arrays in cases.items():
    rights = []
    for library, array in zip((safetensors.numpy, safetensors.mlx), arrays):
        library.save_file({"w": array}, folder + "/w.safetensors")
        back = np.array(library.load_file(folder + "/w.safetensors")["w"])
        assert back.shape == array.shape
        rights.append(np.array_equal(back, np.array(array)))
        # A square matrix comes back as it was before it was transposed.
        is_as_seen &= version == "0.7.0" or "square" not in name or np.array_equal(back, np.array(array).T)
    print(f"{version}, {name}: numpy {rights[0]}, mlx {rights[1]}")
    is_as_seen &= rights == [version == "0.7.0" or "contiguous" in name or name == "as it lies"] * 2
mx.save_safetensors(folder + "/own.safetensors", {"w": m.T})
is_right = mx.array_equal(mx.load(folder + "/own.safetensors")["w"], m.T).item()
print(f"{version}, transposed, by mlx's own save_safetensors: {is_right}")
is_as_seen &= is_right

weights = dict(np.load(folder + "/weights.npz"))
turned = {k: w.T if k.endswith("proj.weight") else w for k, w in weights.items()}
safetensors.numpy.save_file(turned, f"{folder}/{version}/model.safetensors", metadata={"format": "pt"})
if version == "0.8.0":
    whole = {k: np.ascontiguousarray(w) for k, w in turned.items()}
    safetensors.numpy.save_file(whole, folder + "/contiguous/model.safetensors", metadata={"format": "pt"})
raise SystemExit(not is_as_seen)
PYTHON
cat > "$folder/read.py" <<'PYTHON'
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

try:
    save_file({"w": torch.ones(3, 4).T}, sys.argv[1] + "/w.safetensors")
    is_refused = False
except ValueError:
    is_refused = True
print(f"0.8.0, transposed, by safetensors.torch: refused {is_refused}")
ids = torch.arange(48).reshape(2, 24)
reference = torch.from_numpy(np.load(sys.argv[1] + "/logits.npy"))
is_as_seen = is_refused
for name in ("0.7.0", "0.8.0", "contiguous"):
    model, report = LlamaForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
    with torch.no_grad():
        share = ((model.eval()(ids).logits - reference).norm() / reference.norm()).item()
    complaints = sum(len(names) for names in report.values() if names)
    print(f"folder, {name}: logits off by {share:.3f}, complaints of from_pretrained {complaints}")
    is_as_seen &= complaints == 0 and (share > 0.3 if name == "0.8.0" else share < 1e-4)
raise SystemExit(not is_as_seen)
PYTHON
for step in venv/make old/write venv/write venv/read; do
    "$folder/${step%/*}/bin/python" "$folder/${step#*/}.py" "$folder" 2> "$folder/log" >> "$folder/seen" || {
        cat "$folder/seen" "$folder/log"
        exit 1
    }
done
cat "$folder/seen"
