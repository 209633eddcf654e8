#!/bin/sh
# torch 2.13.0: fully_shard on each block and on the model, then model.set_gradient_divide_factor(1.0) to sum gradients.
# One would guess: it holds for the blocks within, as set_requires_gradient_sync and the settings beside it do.
# What happens: it is the outermost group's alone; the blocks' gradients are still means, with no word of it.
# Output seen: "2 processes: outer weight 2 times the mean, inner weight 1 times"
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)))
for p in model.parameters():
    torch.nn.init.eye_(p)
blocks = [model[1], model]
for block in blocks:
    fully_shard(block)
    block.set_force_sum_reduction_for_comms(True)  # gloo's only kind
model.set_gradient_divide_factor(1.0)
model(torch.ones(1, 2)).sum().backward()  # each gradient is 1 in each process: so is the mean
outer, inner = (p.grad.full_tensor().mean().item() for p in model.parameters())
line = f"{dist.get_world_size()} processes: outer weight {outer:.0f} times the mean, inner weight {inner:.0f} times"
if dist.get_rank() == 0:
    print(line)
dist.destroy_process_group()
raise SystemExit(line != "2 processes: outer weight 2 times the mean, inner weight 1 times")
PYTHON
"$folder/venv/bin/torchrun" --standalone --nproc_per_node=2 "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
