#!/bin/sh
# torch 2.13.0 (2.14.1 is the same): torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, or get_state_dict, before
# the first step: to save a checkpoint of step 0, or the templates that dcp.load fills where a checkpoint is there.
# One would guess: a function whose page says "Return the combined state_dict for optimizers" reads and changes nothing.
# What happens: an optimizer without a state is made to take a step, with gradients of zero at a rate of 0, and keeps what that
# leaves behind. Adam and AdamW count it: bias is corrected as in step 2, and the first true step is 0.744 of what it is
# without the reading; the checkpoint of step 0 says step 1. SGD's momentum with dampening begins at 0 instead of at the first
# gradient. (Plain SGD has nothing to keep, and the optimizer's own state_dict() changes nothing.) A state that is loaded over
# it is right; a run that finds nothing to load, and begins, is not the run that never looked.
# Output seen (the change of a weight in the first steps, the gradient being 1, as a share of the change without the reading):
#   AdamW: step 1 0.744, step 2 0.858, step 3 0.910, step 20 1.010; the checkpoint of step 0 says step 1
#   SGD, momentum 0.9, dampening 0.5: step 1 0.500, step 2 0.679, step 3 0.770, step 20 0.985
#   SGD: step 1 1.000, step 2 1.000, step 3 1.000, step 20 1.000
#   AdamW, by its own state_dict(): step 1 1.000, step 2 1.000, step 3 1.000, step 20 1.000
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
cat > "$folder/run.py" <<'PYTHON'
import copy

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def changes(make, read):
    """Returns the change of a weight in each of 20 steps with a gradient of 1, and what read() returned before them."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = make(model.parameters())
    state = copy.deepcopy(read(model, optimizer))
    results = []
    for _ in range(20):
        before = model.weight.item()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(model.weight.item() - before)
    return results, state


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def dampened(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5)


def plain(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def nothing(model, optimizer):
    return None


def own(model, optimizer):
    return optimizer.state_dict()


def shares(make, read):
    expected, _ = changes(make, nothing)
    seen, state = changes(make, read)
    return [a / b for a, b in zip(seen, expected)], state


def in_words(shares):
    return ", ".join(f"step {n} {shares[n - 1]:.3f}" for n in (1, 2, 3, 20))


by_adamw, state = shares(adamw, get_optimizer_state_dict)
step = state["state"]["weight"]["step"].item()
by_dampened, _ = shares(dampened, get_optimizer_state_dict)
by_plain, _ = shares(plain, get_optimizer_state_dict)
by_own, _ = shares(adamw, own)
print(f"AdamW: {in_words(by_adamw)}; the checkpoint of step 0 says step {step:.0f}")
print(f"SGD, momentum 0.9, dampening 0.5: {in_words(by_dampened)}")
print(f"SGD: {in_words(by_plain)}")
print(f"AdamW, by its own state_dict(): {in_words(by_own)}")
is_as_seen = step == 1 and abs(by_adamw[0] - 0.744) < 1e-3 and abs(by_dampened[0] - 0.5) < 1e-3
is_as_seen &= all(abs(share - 1) < 1e-6 for share in (*by_plain, *by_own))
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
