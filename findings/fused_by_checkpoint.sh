#!/bin/sh
# torch 2.13.0: AdamW(fused=True) that loads the state of an AdamW(fused=False), then steps by a GradScaler.
# One would guess: load_state_dict brings moments and rates; whether the kernel is fused stays as it was asked for, or
# at least the scaler notices.
# What happens: the saved fused=False wins, but the flag by which a scaler hands found_inf to the optimizer was set when
# it was made and stays, and the plain step refuses found_inf with an AssertionError.
# Output seen: "fused after loading False, hands over found_inf True, step AssertionError"
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import torch

weight = torch.nn.Parameter(torch.ones(2))
plain = torch.optim.AdamW([weight], fused=False)
weight.sum().backward()
plain.step()
fused = torch.optim.AdamW([weight], fused=True)
fused.load_state_dict(plain.state_dict())
scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
scaler.scale(weight.sum()).backward()
scaler.unscale_(fused)
try:
    scaler.step(fused)
    outcome = "taken"
except AssertionError as e:
    outcome = type(e).__name__
seen = (fused.param_groups[0]["fused"], fused._step_supports_amp_scaling, outcome)
print("fused after loading {}, hands over found_inf {}, step {}".format(*seen))
raise SystemExit(seen != (False, True, "AssertionError"))
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
