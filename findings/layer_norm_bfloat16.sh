#!/bin/sh
# torch 2.13.0: the backward pass of F.layer_norm on a processor, with x in bfloat16 and gain and bias in float32.
# One would guess: mixed dtypes are there so that gain and bias get float32 gradients, right to about the rounding of
# the inputs; a sum over many rows only gets relatively better.
# What happens: the sums over the rows are kept in bfloat16, whatever the dtype of the gain. Each row that is added loses
# more the longer the sum is: with 2,048 rows the gradients are off by 4 to 6 per cent, with 16,384 by 10 to 16, on one
# thread (each thread has a sum of its own). x's gradient is right, and casting x to float32 first mends all.
# Output seen: "2048 rows: gain 0.055, bias 0.051, x 0.0017; 16384 rows: gain 0.148, bias 0.140, x 0.0017; through
# float32: gain 7.8e-07" (the last digits may differ among processors)
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)


def gradients(x, dy, dtype):
    """Of gain, bias and x, in float64; x and dy are read in dtype."""
    x = x.to(dtype, copy=True).requires_grad_()
    kind = torch.promote_types(dtype, torch.float32)
    gain = torch.ones(288, dtype=kind, requires_grad=True)
    bias = torch.zeros(288, dtype=kind, requires_grad=True)
    F.layer_norm(x, (288,), gain, bias).backward(dy.to(dtype))
    return [t.grad.double() for t in (gain, bias, x)]


def errors(rows, dtype):
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(rows, 288, generator=g).bfloat16() for _ in range(2))
    pairs = zip(gradients(x, dy, dtype), gradients(x, dy, torch.float64))
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


few, many = errors(2048, torch.bfloat16), errors(16384, torch.bfloat16)
through = errors(2048, torch.float32)
line = "gain {:.3f}, bias {:.3f}, x {:.4f}"
print("2048 rows: " + line.format(*few) + "; 16384 rows: " + line.format(*many) + f"; through float32: gain {through[0]:.1e}")
as_seen = 0.02 < few[0] < 0.1 and 0.02 < few[1] < 0.1 and min(many[:2]) > 0.08
as_seen = as_seen and max(few[2], many[2]) < 0.003 and through[0] < 1e-4
raise SystemExit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
