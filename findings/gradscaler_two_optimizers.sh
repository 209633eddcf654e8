#!/bin/sh
# torch 2.13.0: a GradScaler, two optimizers and one clip_grad_norm_ over both.
# One would guess: where a gradient is nan the step is skipped, so that no weight becomes nan.
# What happens: the scaler decides for each optimizer by its own gradients, as they were in unscale_. The norm over
# both is nan, clipping multiplies all gradients by nan, and the optimizer whose gradients were finite steps with them.
# Output seen: "scale halved True, first weight unchanged True, second weight nan True"
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import torch

first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
optimizers = [torch.optim.SGD([p], lr=0.1) for p in (first, second)]
scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
scaler.scale((first * torch.tensor([float("nan"), 1.0])).sum() + second.sum()).backward()
for optimizer in optimizers:
    scaler.unscale_(optimizer)
torch.nn.utils.clip_grad_norm_([first, second], 1.0)
for optimizer in optimizers:
    scaler.step(optimizer)
scaler.update()
seen = (scaler.get_scale() == 2.0, first.tolist() == [1.0, 1.0], bool(second.isnan().all()))
print("scale halved {}, first weight unchanged {}, second weight nan {}".format(*seen))
raise SystemExit(seen != (True, True, True))
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
