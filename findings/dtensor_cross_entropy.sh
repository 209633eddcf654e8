#!/bin/sh
# torch 2.13.0: F.cross_entropy of logits that are a DTensor sharded by tokens, as a head gives them under sequence parallelism
# or a batch that is split over processes, with targets of -100 (a prompt, padding).
# One would guess: the loss of one process, whatever the placement; by its documentation DTensor is there to write a program "as
# if it's a single-device program with the same convergence property". Or at least a loss and gradients that belong together.
# What happens: each shard takes the mean over its own targets, and the loss is the mean of those, as if all had as many: another
# number, and nan where one shard has no target at all, as when it holds the prompt. The gradients are those of the true mean, so
# that training is right, while the log, the choice of a checkpoint and a check for nan go by the wrong number.
# reduction="sum" divided by the count, and logits replicated or sharded by vocabulary, are right. (With weight= it is the same:
# pytorch/pytorch issue 185167, which takes the loss without weights for right.)
# Output seen (2 processes, 4 tokens; the gradient's error is relative to one process's):
#   targets [0, 5, 2, 1]: one process 2.466, replicated 2.466, by vocabulary 2.466, by tokens 2.466, its gradient off by 0.000
#   targets [-100, 5, 2, 1]: one process 2.294, replicated 2.294, by vocabulary 2.294, by tokens 2.199, its gradient off by 0.000
#   targets [-100, -100, 2, 1]: one process 2.484, replicated 2.484, by vocabulary 2.484, by tokens nan, its gradient off by 0.000
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
cat > "$folder/run.py" <<'PYTHON'
import math
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
x = torch.randn(4, 6)
is_as_seen = True
for targets in ([0, 5, 2, 1], [-100, 5, 2, 1], [-100, -100, 2, 1]):
    y = torch.tensor(targets)
    one = x.clone().requires_grad_()
    loss = F.cross_entropy(one, y)
    loss.backward()
    losses = [loss.item()]
    for placement in (Replicate(), Shard(1), Shard(0)):
        sharded = distribute_tensor(x, mesh, [placement]).requires_grad_()
        loss = F.cross_entropy(sharded, distribute_tensor(y, mesh, [Replicate()]))
        loss.backward()
        losses.append(loss.full_tensor().item())
    error = ((sharded.grad.full_tensor() - one.grad).norm() / one.grad.norm()).item()
    line = "one process {:.3f}, replicated {:.3f}, by vocabulary {:.3f}, by tokens {:.3f}".format(*losses)
    if dist.get_rank() == 0:
        print(f"targets {targets}: {line}, its gradient off by {error:.3f}")
    is_right = max(abs(loss - losses[0]) for loss in losses[1:3]) < 1e-5 and error < 1e-5
    counts = [sum(target >= 0 for target in half) for half in (targets[:2], targets[2:])]
    if 0 in counts:
        is_other = math.isnan(losses[3])
    else:
        is_other = (abs(losses[3] - losses[0]) > 0.01) == (counts[0] != counts[1])
    is_as_seen &= is_right and is_other
dist.barrier()
sys.stdout.flush()
os._exit(not is_as_seen)  # at a plain exit threads of gloo may still run, and end the process by a signal
PYTHON
"$folder/venv/bin/torchrun" --standalone --nproc_per_node=2 "$folder/run.py" 2> "$folder/err" > "$folder/seen" || {
    cat "$folder/seen" "$folder/err"
    exit 1
}
grep '^targets' "$folder/seen"
