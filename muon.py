"""Muon (Jordan et al. 2024): momentum whose update is orthogonalised, for the matrices between embedding and head.

torch.optim.Muon with another step: matrices of one shape go through Newton-Schulz together, in a dtype that the
device is fast in. torch's own always uses bfloat16, one matrix at a time; a CPU without bfloat16 instructions
then takes 25 times as long. In bfloat16 the two give the same weights (tests/test_muon.py).
"""
from collections import defaultdict

import torch


class Muon(torch.optim.Muon):
    def __init__(self, params, dtype=torch.float32, **kwargs):
        super().__init__(params, **kwargs)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for params in shapes.values():
                self.step_together(params, group)

    def step_together(self, params, group):
        grads = [p.grad for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
        updates = orthogonalize(torch.stack(updates).to(self.dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = params[0].shape
        scale = 0.2 * max(rows, columns) ** 0.5 if group["adjust_lr_fn"] == "match_rms_adamw" else max(1, rows / columns) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates.to(params[0].dtype)), alpha=-group["lr"] * scale)


def orthogonalize(G, coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7):
    """Each matrix of G (n, rows, columns) with its singular values moved to about 1 (0.7 to 1.2): a quintic Newton-Schulz
    iteration whose coefficients were chosen for steep ascent near 0, not for exactness."""
    a, b, c = coefficients
    X = G.mT if G.size(-2) > G.size(-1) else G  # the smaller side first: A below is (small, small)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if G.size(-2) > G.size(-1) else X
