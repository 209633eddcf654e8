#!/bin/sh
# torch 2.13.0 (CPU): an operator of torch.library that can be differentiated, by torch.library.register_autograd, and by a
# torch.autograd.Function around the same operator; calls with gradients, of tensors so small that only the calls count.
# One would guess: the registered formula, which is a part of the operator and of the dispatcher, costs a call no more than a
# Function of Python around it.
# What happens: register_autograd builds such a Function, too, and adds to each call two to three times what one by hand adds.
# Small kernels (a norm on a GPU takes 15 us) are hidden behind that; what torch.compile needs is the fake kernel alone.
# Output seen (us a call, one thread; checked: register_autograd adds 1.5 times what the Function adds, or more):
#   operator 3.0, Function 8.4, registered 15.8; with the backward pass Function 40.6, registered 56.0
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.2.6
cat > "$folder/calls.py" <<'PYTHON'
import statistics
import time

import torch

torch.set_num_threads(1)
library = torch.library.Library("calls", "DEF")
for name in "registered", "plain":
    library.define(f"{name}(Tensor x, Tensor weight) -> Tensor")
    library.impl(name, torch.mul, "CPU")
registered = torch.ops.calls.registered.default
plain = torch.ops.calls.plain.default


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, gradient):
    x, weight = ctx.saved_tensors
    return gradient * weight, gradient * x


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        save(ctx, (x, weight), None)
        return plain(x, weight)

    backward = staticmethod(backward)


torch.library.register_autograd("calls::registered", backward, setup_context=save, lib=library)
x, weight = (torch.randn(2, 8, requires_grad=True) for _ in range(2))
ones = torch.ones(2, 8)
frozen = x.detach(), weight.detach()
assert torch.equal(registered(x, weight), Product.apply(x, weight))
forwards = {
    "operator": lambda: plain(*frozen),
    "Function": lambda: Product.apply(x, weight),
    "registered": lambda: registered(x, weight),
}


def both(forward):
    return lambda: torch.autograd.grad(forward(), (x, weight), ones)


def race(functions, calls=500):
    times = {name: [] for name in functions}
    for _ in range(15):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


forward = race(forwards)
whole = race({name: both(forwards[name]) for name in ("Function", "registered")})
print(", ".join(f"{name} {us:.1f}" for name, us in forward.items()), end="; with the backward pass ")
print(", ".join(f"{name} {us:.1f}" for name, us in whole.items()))
added = {name: forward[name] - forward["operator"] for name in ("Function", "registered")}
assert added["registered"] >= 1.5 * added["Function"], added
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/calls.py"
