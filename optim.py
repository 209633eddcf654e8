"""Optimizers and the learning rate: which parameter learns by which rule, how fast, and when."""
import math
from collections import defaultdict

import torch


def make_optimizers(model, cfg, compute):
    """[AdamW], or [AdamW, Muon] with Muon on the matrices inside blocks. By role: matrices, embeddings and the head decay,
    vectors do not. Frozen parameters are in no group; every other one is in exactly one, and this is checked.
    compute: where they compute, and in which dtype Muon multiplies (see muon_dtype)."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in params.items() if p.dim() == 2 and ".blocks." in f".{name}"]
    outer = [p for name, p in params.items() if p.dim() == 2 and ".blocks." not in f".{name}"]
    vectors = [p for p in params.values() if p.dim() < 2]
    assert sorted(map(id, hidden + outer + vectors)) == sorted(map(id, params.values())), "a parameter not in exactly one group"
    use_muon = cfg.optimizer == "muon" and hidden
    scale = cfg.embd_lr_scale if use_muon else 1.0
    groups = [{"params": outer if use_muon else hidden + outer, "weight_decay": cfg.weight_decay, "lr_scale": scale},
              {"params": vectors, "weight_decay": 0.0, "lr_scale": scale}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                              fused=compute.device.type in ("cuda", "cpu"))
    if not use_muon:
        return [adamw]
    return [adamw, Muon([{"params": hidden, "lr_scale": 1.0}], dtype=muon_dtype(compute), lr=cfg.learning_rate,
                        momentum=cfg.momentum, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")]


def muon_dtype(compute):
    """The dtype of Muon's products: the run's, but float32 for float16, in which a small singular value would vanish."""
    return torch.float32 if compute.dtype == torch.float16 else compute.dtype


def get_lr(step, cfg):
    """The learning rate of a step (the first is 0): linear warm-up, which reaches learning_rate at warmup_iters, then down to
    min_lr at lr_decay_iters, along a cosine (Loshchilov & Hutter 2017) or constant first and then in a straight line."""
    end = cfg.lr_decay_iters or cfg.max_iters
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= end:
        return cfg.min_lr
    if cfg.schedule == "cosine":
        part = 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup_iters) / (end - cfg.warmup_iters)))
    else:
        part = min(1, (end - step) / (cfg.decay_frac * (end - cfg.warmup_iters)))
    return part * cfg.learning_rate + (1 - part) * cfg.min_lr


class Muon(torch.optim.Muon):
    """Momentum whose update is orthogonalised, for the matrices between embedding and head (Jordan et al. 2024).

    torch.optim.Muon with another step: matrices of one shape go through Newton-Schulz together, in the run's own dtype. torch's own always uses bfloat16, one matrix at a time; a CPU without bfloat16 instructions
    then takes 25 times as long. In bfloat16 the two give the same weights (tests/test_optim.py).
    """

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
