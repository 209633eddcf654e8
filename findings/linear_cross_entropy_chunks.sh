#!/bin/sh
# torch 2.13.0: F.linear_cross_entropy with LinearCrossEntropyOptions(), which never has all logits in memory, for a bfloat16 head
# and bfloat16 inputs.
# One would guess: the loss of the same call without options, up to rounding. acc_dtype, "Dtype for internal accumulation", is
# float32 for bfloat16 by its documentation, and acc_policy is "accurate" on a processor.
# What happens: within a chunk the sums are in float32, but the loss of all chunks is added up in bfloat16. There are about as
# many chunks as the vocabulary is larger than the width, and each one's share is rounded on the way. With SmolLM2-135M's ratio
# the loss is off by tenths; with Gemma 3 270M's it stops at a power of two, where a share is less than half of what bfloat16 can
# tell apart: models of 8.4, 6.6 and 5.1 nats all have a loss of 4.00. No word of it. The gradient of the head is added up in
# bfloat16, too, and is off by several times as much as without options; that of the inputs is right. acc_dtype=torch.float32 and
# acc_policy="accurate" by name change nothing; "aspect_ratio:2", the default on a GPU, makes twice as many chunks. In float16
# the loss is added up in float32; reduction="none" and a mean in float32 is right as well.
# Output seen (1,024 tokens, 4,096 classes; "c" is how much of the right row is in the input, as in a model that has learned the
# more; figures may differ a little among processors):
#   SmolLM2-135M's ratio, c 0: loss 8.32, without options 8.38, with options 8.12, float32 by name 8.12, aspect_ratio:2 8.06,
#     none 8.32, float16 8.33
#   SmolLM2-135M's ratio, c 1: loss 6.37, without options 6.41, with options 6.12, float32 by name 6.12, aspect_ratio:2 6.75,
#     none 6.37, float16 6.37
#   SmolLM2-135M's ratio, c 2: loss 4.50, without options 4.50, with options 4.41, float32 by name 4.41, aspect_ratio:2 4.25,
#     none 4.50, float16 4.50
#   Gemma 3 270M's ratio, c 0: loss 8.38, without options 8.38, with options 8.00, float32 by name 8.00, aspect_ratio:2 4.00,
#     none 8.38, float16 8.38
#   Gemma 3 270M's ratio, c 1: loss 6.57, without options 6.53, with options 7.44, float32 by name 7.44, aspect_ratio:2 4.00,
#     none 6.57, float16 6.57
#   Gemma 3 270M's ratio, c 2: loss 5.13, without options 5.09, with options 5.03, float32 by name 5.03, aspect_ratio:2 4.00,
#     none 5.13, float16 5.13
#   gradient of the head off by 0.0023 without options, 0.0262 with them
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
cat > "$folder/run.py" <<'PYTHON'
import inspect

import torch
import torch.nn.functional as F
from torch.nn import LinearCrossEntropyOptions

accurate = LinearCrossEntropyOptions(acc_policy="accurate", acc_dtype=torch.float32)
twice = LinearCrossEntropyOptions(chunking_method="aspect_ratio:2")
targets = torch.randint(0, 4096, (1024,), generator=torch.Generator().manual_seed(0))


def make(width, c):
    """Returns inputs (1024, width) and a head (4096, width) in bfloat16; the loss falls as c grows."""
    generator = torch.Generator().manual_seed(1)
    head = F.normalize(torch.randn(4096, width, generator=generator), dim=1)
    x = torch.randn(1024, width, generator=generator) / width**0.5 + 2 * c * head[targets]
    return x.bfloat16(), head.bfloat16()


def share(gradient, reference):
    return ((gradient.float() - reference).norm() / reference.norm()).item()


is_as_seen = "Dtype for internal accumulation" in inspect.getsource(LinearCrossEntropyOptions)
for name, width in (("SmolLM2-135M", 48), ("Gemma 3 270M", 10)):
    for c in (0, 1, 2):
        x, head = make(width, c)
        true = F.cross_entropy(x.float() @ head.float().T, targets).item()
        plain = F.linear_cross_entropy(x, head, targets).item()
        ways = (LinearCrossEntropyOptions(), accurate, twice)
        chunked = [F.linear_cross_entropy(x, head, targets, options=options).item() for options in ways]
        none = F.linear_cross_entropy(x, head, targets, reduction="none", options=accurate).float().mean().item()
        half = F.linear_cross_entropy(x.half(), head.half(), targets, options=accurate).item()
        print(
            f"{name}'s ratio, c {c}: loss {true:.2f}, without options {plain:.2f}, with options {chunked[0]:.2f}, "
            f"float32 by name {chunked[1]:.2f}, aspect_ratio:2 {chunked[2]:.2f}, none {none:.2f}, float16 {half:.2f}"
        )
        is_as_seen &= abs(plain - true) < 0.07 and max(abs(none - true), abs(half - true)) < 0.01
        is_as_seen &= chunked[0] == chunked[1] and abs(chunked[2] - true) > 0.1
        if width == 10:
            is_as_seen &= chunked[2] == 4 and (c > 0 or chunked[0] == 8)

x, head = make(10, 1)
reference = head.float().requires_grad_()
F.cross_entropy(x.float() @ reference.T, targets).backward()
errors = []
for options in (None, accurate):
    own = head.clone().requires_grad_()
    F.linear_cross_entropy(x, own, targets, options=options).backward()
    errors.append(share(own.grad, reference.grad))
print("gradient of the head off by {:.4f} without options, {:.4f} with them".format(*errors))
is_as_seen &= errors[1] > 3 * errors[0]
raise SystemExit(not is_as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
