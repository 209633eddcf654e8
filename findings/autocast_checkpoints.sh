#!/bin/sh
# torch 2.13.0 (2.14.1 is the same): several checkpoints read into one model and evaluated under one torch.autocast; nothing is
# trained, all is under no_grad.
# One would guess: each forward pass computes with the weights that the model has; load_state_dict changes them in place. The
# advice in autocast's documentation, to put forward passes and loss inside and no more, is kept.
# What happens: autocast keeps the bfloat16 copy of each float32 weight that requires a gradient until the region ends, and does
# not look whether the weight has changed. All checkpoints get the first one's loss, to the bit. Norms and embeddings are
# not copied, and come from the right checkpoint: then the figures differ, and are of models that do not exist. An average of
# weights that is swapped in goes the same way. Right are: a region for each checkpoint, cache_enabled=False,
# torch.clear_autocast_cache(), or requires_grad_(False). The documentation of cache_enabled says "Whether the weight cache
# inside autocast should be enabled", and that is all.
# Output seen (mean square of the outputs; the figures may differ a little among processors):
#   one region: 1.1223 1.1223 1.1223
#   a region each: 1.1223 0.7625 0.7583
#   with a norm, one region: 0.0445 0.1467 0.0735
#   with a norm, a region each: 0.0445 0.1374 0.1393
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
cat > "$folder/run.py" <<'PYTHON'
import contextlib

import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(64, 16)


def network(norm):
    return nn.Sequential(nn.Linear(16, 16, bias=False), norm, nn.GELU(), nn.Linear(16, 16, bias=False))


def half_precision(**settings):
    return torch.autocast("cpu", torch.bfloat16, **settings)


@torch.no_grad()
def losses(model, checkpoints, around=contextlib.nullcontext, inside=contextlib.nullcontext):
    """Returns each checkpoint's loss; around() is entered once, inside() for each checkpoint."""
    results = []
    with around():
        for checkpoint in checkpoints:
            model.load_state_dict(checkpoint)
            with inside():
                results.append(model(x).float().square().mean().item())
    return results


def random_checkpoints(model):
    return [{name: torch.randn_like(weight) * 0.3 for name, weight in model.state_dict().items()} for _ in range(3)]


model = network(nn.Identity())
checkpoints = random_checkpoints(model)
exact = losses(model, checkpoints)
at_once = losses(model, checkpoints, around=half_precision)
each = losses(model, checkpoints, inside=half_precision)
uncached = losses(model, checkpoints, around=lambda: half_precision(cache_enabled=False))
model.requires_grad_(False)
frozen = losses(model, checkpoints, around=half_precision)
print("one region:", *(f"{loss:.4f}" for loss in at_once))
print("a region each:", *(f"{loss:.4f}" for loss in each))

with_norm = network(nn.LayerNorm(16))
checkpoints = random_checkpoints(with_norm)
mixed, right = (losses(with_norm, checkpoints, **where) for where in (dict(around=half_precision), dict(inside=half_precision)))
print("with a norm, one region:", *(f"{loss:.4f}" for loss in mixed))
print("with a norm, a region each:", *(f"{loss:.4f}" for loss in right))


def are_close(some, others):
    return all(abs(a - b) < 0.03 * b for a, b in zip(some, others))


are_right = are_close(each, exact) and each == uncached == frozen
is_stale = len(set(at_once)) == 1 and len(set(each)) == 3 and len(set(mixed)) == 3 and not are_close(mixed, right)
raise SystemExit(not are_right or not is_stale)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
