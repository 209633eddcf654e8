#!/bin/sh
# torch 2.13.0 (2.14.1 is the same): a second phase of training that keeps AdamW's moments: load_state_dict, a new learning rate
# in param_groups, a new scheduler.
# One would guess: a new scheduler starts from the rate that the optimizer has; its documentation says "When last_epoch=-1, sets
# initial lr as lr", and -1 is the default.
# What happens: the first phase's scheduler left "initial_lr" in the groups, and state_dict saved it. The new scheduler takes that
# for its base where it finds it. LambdaLR (so transformers' get_cosine_schedule_with_warmup as well), SequentialLR and
# CosineAnnealingWarmRestarts compute from the base: they write the old rate over the new one, without a word. LinearLR,
# CosineAnnealingLR and ReduceLROnPlateau go on from the rate as it is. So does a second scheduler on one optimizer in one
# process. Deleting "initial_lr" from the groups, or setting it as well, helps.
# Output seen (the first phase at 1e-3, the second asked for 1e-5; rates before the second's first step and half-way):
#   LambdaLR: 0.001, 0.001
#   SequentialLR: 0.0001, 0.001
#   CosineAnnealingWarmRestarts: 0.001, 0.0005
#   LinearLR: 1e-05, 5e-06
#   CosineAnnealingLR: 1e-05, 5e-06
#   ReduceLROnPlateau: 1e-05, 1e-05
#   LambdaLR without initial_lr: 1e-05, 1e-05
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LambdaLR, LinearLR
from torch.optim.lr_scheduler import ReduceLROnPlateau, SequentialLR

weight = torch.nn.Parameter(torch.ones(2))


def step(optimizer, scheduler, *metrics):
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step(*metrics)


first = torch.optim.AdamW([weight], lr=1e-3)
scheduler = CosineAnnealingLR(first, T_max=10)
for _ in range(10):
    step(first, scheduler)
saved = first.state_dict()


def second(make, without_initial=False):
    """Returns the rates of a second phase at its start and half-way, by the scheduler that make() builds."""
    optimizer = torch.optim.AdamW([weight], lr=1e-5)
    optimizer.load_state_dict(saved)
    [group] = optimizer.param_groups
    group["lr"] = 1e-5
    if without_initial:
        del group["initial_lr"]
    scheduler = make(optimizer)
    rates = [group["lr"]]
    for _ in range(5):
        step(optimizer, scheduler, *([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return (*rates, group["lr"])


def warm_up_first(optimizer):
    parts = [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, T_max=10)]
    return SequentialLR(optimizer, parts, milestones=[5])


def constant(optimizer):
    return LambdaLR(optimizer, lambda n: 1.0)


seen = {
    "LambdaLR": second(constant),
    "SequentialLR": second(warm_up_first),
    "CosineAnnealingWarmRestarts": second(lambda optimizer: CosineAnnealingWarmRestarts(optimizer, T_0=10)),
    "LinearLR": second(lambda optimizer: LinearLR(optimizer, 1.0, 0.0, total_iters=10)),
    "CosineAnnealingLR": second(lambda optimizer: CosineAnnealingLR(optimizer, T_max=10)),
    "ReduceLROnPlateau": second(ReduceLROnPlateau),
    "LambdaLR without initial_lr": second(constant, without_initial=True),
}
lines = [f"{kind}: {start:.4g}, {middle:.4g}" for kind, (start, middle) in seen.items()]
print("\n".join(lines))
expected = [
    "LambdaLR: 0.001, 0.001",
    "SequentialLR: 0.0001, 0.001",
    "CosineAnnealingWarmRestarts: 0.001, 0.0005",
    "LinearLR: 1e-05, 5e-06",
    "CosineAnnealingLR: 1e-05, 5e-06",
    "ReduceLROnPlateau: 1e-05, 1e-05",
    "LambdaLR without initial_lr: 1e-05, 1e-05",
]
has_promise = "When last_epoch=-1, sets initial lr as lr." in LambdaLR.__doc__
raise SystemExit(lines != expected or not has_promise)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
