"""Optimizers and the learning rate: which parameter learns by which rule, how fast, and when."""

import math
from collections import defaultdict
from dataclasses import replace
from functools import partial

import torch
from torch.optim.adamw import adamw

from config import Refusal
from sharding import apply_to_whole, is_sharded, local, placed_like
from tensors import check_tensor, is_finite

# the keys that get_lr reads
SCHEDULE = (
    "max_iters",
    "learning_rate",
    "min_lr",
    "warmup_iters",
    "lr_decay_iters",
    "schedule",
    "decay_frac",
)


def make_optimizers(model, cfg, compute):
    """Returns [AdamW], or [AdamW, Muon] with Muon on the matrices inside blocks, each expert's by itself.

    Parameters of two or more dimensions decay, vectors and scalars do not. Frozen parameters are in no
    group; every other one is in exactly one. compute: the device, the dtype in which Muon multiplies (see
    muon_dtype), and whether to compile Muon, which is done on a GPU alone.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in parameters.items() if p.dim() >= 2 and ".blocks." in f".{name}"]
    outer = [p for name, p in parameters.items() if p.dim() >= 2 and ".blocks." not in f".{name}"]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    use_muon = cfg.optimizer == "muon" and len(hidden) > 0
    decayed = outer if use_muon else hidden + outer
    scale = cfg.embd_lr_scale if use_muon else 1.0
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay, "lr_scale": scale},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": scale},
    ]
    optimizers = [
        AdamW(
            [group for group in groups if group["params"]],
            lr=cfg.learning_rate,
            betas=(cfg.beta1, cfg.beta2),
            fused=compute.device.type in ("cuda", "cpu"),
        )
    ]
    if use_muon:
        muon = Muon(
            [{"params": hidden, "lr_scale": 1.0, "weight_decay": cfg.weight_decay}],
            lr=cfg.learning_rate,
            momentum=cfg.momentum,
            dtype=muon_dtype(compute),
            compile=compute.compile and compute.device.type == "cuda",
        )
        optimizers.append(muon)
    return optimizers


def make_scaler(compute):
    """Returns the loss scaler that float16 needs, for its small gradients; None for another dtype."""
    if compute.dtype == torch.float16:
        return torch.amp.GradScaler(compute.device.type)
    return None


def step_unless(optimizers, is_skipped):
    """Makes a step of each optimizer, or none where is_skipped, a bool tensor on the device, is true.

    On a GPU fused AdamW and Muon decide that on the device, so that nothing waits for it, at the price of a
    few more passes over the weights. For any other optimizer, as torch's own, the answer is read off the
    device, and so it is on a CPU, where that costs nothing.
    """
    for optimizer in optimizers:
        if getattr(optimizer, "can_skip", False) and not is_skipped.is_cpu:
            optimizer.step(is_skipped.float())
        elif not is_skipped:
            optimizer.step()


# settings of a group of parameters that the config may change when a run goes on
CHANGEABLE = {"lr", "lr_scale", "weight_decay", "betas", "momentum"}
# a, b, c of a x + b x^3 + c x^5, one for each of Muon's steps: those that bring singular values from 0.003 on nearest
# to 1 (Amsel et al. 2025, arXiv:2505.16932), of x / 1.02, as beyond 1 they would grow, and bfloat16 rounds 1 up
POLYNOMIALS = (
    (8.2193, -23.3375, 16.6266),
    (3.9641, -2.8377, 0.5158),
    (3.4368, -2.4752, 0.4762),
    (2.4413, -1.7285, 0.3957),
)
# Settings of torch's classes, whose state older checkpoints hold: ours have no others, so a saved group must agree
FIXED = {
    "amsgrad": False,
    "maximize": False,
    "nesterov": True,
    "ns_steps": 5,
    "ns_coefficients": (3.4445, -4.775, 2.0315),
    "adjust_lr_fn": "match_rms_adamw",
}


def load_optimizers(optimizers, scaler, ckpt, cfg):
    """Gives optimizers, and a loss scaler or None, the state in a loaded checkpoint. Their settings stay
    those of the config. Raises Refusal where the checkpoint is of another optimizer, or its state is not
    what these would have saved.
    """
    if len(optimizers) != len(ckpt["optimizers"]):
        raise Refusal(
            f"the checkpoint was trained with another optimizer than {cfg.optimizer}; leave optimizer out"
        )
    try:
        for optimizer, saved in zip(optimizers, ckpt["optimizers"]):
            if not isinstance(saved, dict):
                raise ValueError(f"it is a {type(saved).__name__}")
            groups = optimizer.state_dict()["param_groups"]
            check_groups(groups, saved["param_groups"])
            # a loss scaler may have skipped the first steps, which leaves no state
            if saved["state"] or ckpt["step"] > 0 and not ckpt["scaler"]:
                check_moments(optimizer, saved["state"], ckpt["step"])
            optimizer.load_state_dict(saved)
        if scaler and ckpt["scaler"]:
            check_scaler(scaler.state_dict(), ckpt["scaler"])
            scaler.load_state_dict(ckpt["scaler"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        reason = str(e) if type(e) is ValueError else repr(e)
        problem = f"the checkpoint's optimizer state is damaged: {reason}"
        raise Refusal(f"{problem}; its weights are whole, and a new run can start from them", status=1)


def check_groups(groups, saved_groups):
    """Raises ValueError where saved groups have other parameters or other settings than an optimizer's own
    groups. A setting that only one of them has, as of another release of torch, is not compared.
    """
    if len(groups) != len(saved_groups):
        raise ValueError(f"it has {len(saved_groups)} groups of parameters and not {len(groups)}")
    for group, saved in zip(groups, saved_groups):
        for key, value in (FIXED | group).items():
            # fused depends on the device, which may be another one now
            if key == "fused" or key not in saved and key != "params":
                continue
            is_other = key not in CHANGEABLE and saved[key] != value
            if type(saved[key]) is not type(value) or is_other:
                raise ValueError(f"{key} is {saved[key]!r:.60} and not {value!r:.60}")


def check_moments(optimizer, state, steps):
    """Raises ValueError where a saved state is not that of an optimizer after at most so many steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = vars(type(optimizer)).get("moments")
    if names is None:  # a class of torch's or of one's own: only the class knows what belongs there
        for i, moments in state.items():
            for name, x in moments.items():
                if isinstance(x, torch.Tensor):
                    check_finite(f"{name} of parameter {i}", x)
        return
    if state.keys() != set(range(len(params))):
        raise ValueError(f"it is not the state of {len(params)} parameters")
    storages = set()
    for i, p in enumerate(params):
        if state[i].keys() != names:
            shown = ", ".join(sorted(map(str, state[i]))) or "nothing"
            raise ValueError(f"parameter {i} has {shown:.60} and not {', '.join(sorted(names))}")
        for name, x in state[i].items():
            check_moment(name, f"{name} of parameter {i}", x, p, steps)
            # moments are changed in place: two in the same memory would change each other
            storage = x.untyped_storage().data_ptr()
            if storage in storages or not x.is_contiguous():
                raise ValueError(f"{name} of parameter {i} shares its memory")
            storages.add(storage)


def check_finite(title, x):
    """Raises ValueError where a number of x is not finite."""
    if not is_finite(x):
        raise ValueError(f"{title} holds nan or infinity")


def check_moment(name, title, x, p, steps):
    """Raises ValueError where x cannot be the moment `name` of a parameter p; title is its name in messages."""
    check_tensor(title, x)
    shape = () if name == "step" else p.shape
    if x.shape != shape or x.dtype != p.dtype:
        raise ValueError(f"{title} is {tuple(x.shape)} {x.dtype} and not {tuple(shape)} {p.dtype}")
    check_finite(title, x)
    if name == "exp_avg_sq" and x.min() < 0:
        raise ValueError(f"{title}, a mean of squares, is negative")
    if name == "step" and not (0 <= x.item() <= steps and x.item().is_integer()):
        raise ValueError(f"{title} is {x:g} after {steps} steps")


def check_scaler(state, saved):
    """Raises ValueError where a loss scaler's saved state cannot be that of one with this state."""
    if saved.keys() != state.keys():
        raise ValueError(f"the loss scaler has {', '.join(map(str, saved)):.60}")
    for key, value in state.items():
        is_good = type(saved[key]) is type(value) and saved[key] == value
        if key == "scale":
            is_good = type(saved[key]) is float and 0 < saved[key] < math.inf
        elif key == "_growth_tracker":
            is_good = type(saved[key]) is int and 0 <= saved[key] < state["growth_interval"]
        if not is_good:
            raise ValueError(f"the loss scaler's {key} is {saved[key]!r:.60}")


def muon_dtype(compute):
    """Returns the dtype of Muon's products: the run's, but float32 where that is float16, in which small singular
    values would vanish.
    """
    return torch.float32 if compute.dtype == torch.float16 else compute.dtype


def get_lr(step, cfg):
    """Returns the learning rate of a step (the first is 0).

    Linear warm-up, which reaches learning_rate at warmup_iters, then down to min_lr at lr_decay_iters,
    along a cosine (Loshchilov & Hutter 2017) or constant first and then in a straight line.
    """
    end = last_step(cfg)
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= end:
        return cfg.min_lr
    if cfg.schedule == "cosine":
        progress = (step - cfg.warmup_iters) / (end - cfg.warmup_iters)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        height = min(1, (end - step) / (cfg.decay_frac * (end - cfg.warmup_iters)))
    return height * cfg.learning_rate + (1 - height) * cfg.min_lr


def set_rate(optimizers, rate):
    """Gives all groups of parameters a learning rate, times their own lr_scale where they have one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)


def last_step(cfg):
    """Returns the step where the rate is min_lr."""
    return cfg.lr_decay_iters or cfg.max_iters


def saved_schedule(ckpt, cfg):
    """Returns cfg with the schedule that a loaded checkpoint was trained by. Raises Refusal where its settings
    are not a schedule.
    """
    settings = {key: ckpt["config"][key] for key in SCHEDULE if key in ckpt["config"]}
    try:
        return replace(cfg, **settings)
    except ValueError as e:
        raise Refusal(f"the checkpoint's schedule: {e}")


def plan_rates(step, saved, cfg):
    """Settles the rates of a run from this step on; returns lines that tell the user what is new about them.

    saved: the settings until now where a run goes on, else None. A finished run that cfg makes longer
    gets a new stage, which begins at the highest rate and goes down again: warm-up, stable, decay (Hu et
    al. 2024), or with a cosine a warm restart. cfg keeps the stage as a warm-up that ends at this step, so
    that a stage which is interrupted goes on to the bit. Where the user gives another warm-up there is no
    new stage: the rates are those of one run of the whole length.
    """
    end = last_step(cfg)
    lines = []
    if saved and 0 < step < cfg.max_iters:
        planned = get_lr(step, saved)
        stage = ""
        if last_step(saved) <= step < end and saved.warmup_iters == cfg.warmup_iters < step:
            cfg.warmup_iters = step
            stage = f", the highest, as a finished run is made longer, and falls again until step {end}"
        rate = get_lr(step, cfg)
        if rate != planned:
            last = get_lr(step - 1, saved)
            change = f"from {last:.3g} to {rate:.3g}{stage}"
            lines.append(f"step {step + 1}: the learning rate goes {change}")
    if cfg.min_lr == 0 and max(end, step) < cfg.max_iters:
        lines.append(
            f"steps {max(end, step) + 1} to {cfg.max_iters} have a learning rate of 0 and change nothing: "
            f"lr_decay_iters={end} is below max_iters; --lr_decay_iters=0 goes down until the end"
        )
    return lines


class Optimizer:
    """What a training loop needs of torch.optim.Optimizer: its groups and its saved state, but not its hooks, which
    import torch._dynamo and so cost two seconds at each start, even where nothing is compiled.

    groups: dicts of "params" and of the settings that are not the defaults. A class may say in `moments` the names
    of what it keeps for each parameter from its first step on: a checkpoint must have exactly these then.
    """

    def __init__(self, groups, **defaults):
        self.param_groups = [defaults | group for group in groups]
        self.state = defaultdict(dict)  # {parameter: {name: moment}}

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self):
        """Returns {"state", "param_groups"} with numbers in place of parameters, as torch's classes do."""
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = {p: i for i, p in enumerate(params)}
        groups = []
        for group in self.param_groups:
            groups.append(group | {"params": [numbers[p] for p in group["params"]]})
        return {"state": {numbers[p]: state for p, state in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, saved):
        """Takes the moments of a saved state of the same parameters. The settings stay as they are."""
        params = [p for group in self.param_groups for p in group["params"]]
        for i, moments in saved["state"].items():
            p = params[i]
            self.state[p] = {
                name: placed_like(x, p) if isinstance(x, torch.Tensor) else x
                for name, x in moments.items()
            }


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019), computed by torch.optim's function."""

    moments = {"step", "exp_avg", "exp_avg_sq"}

    def __init__(self, groups, lr, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8, fused=True):
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=fused)
        super().__init__(groups, **defaults)
        self.can_skip = fused

    @torch.no_grad()
    def step(self, is_skipped=None):
        """One update; none where is_skipped, a float tensor on the device, is above 0."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "step": torch.zeros((), dtype=torch.float32, device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            beta1, beta2 = group["betas"]
            adamw(
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [local(self.state[p]["exp_avg"]) for p in params],
                [local(self.state[p]["exp_avg_sq"]) for p in params],
                [],
                [self.state[p]["step"] for p in params],
                fused=group["fused"],
                found_inf=is_skipped,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


class Muon(Optimizer):
    """Momentum whose update is orthogonalised, for the matrices between embedding and head (Jordan et
    al. 2024), with Nesterov's step and updates as long as AdamW's (Liu et al. 2025).

    Matrices of one shape go through Newton-Schulz together, in the run's own dtype. torch.optim.Muon
    always uses bfloat16, one matrix at a time; a CPU without bfloat16 instructions then takes 25 times as
    long. With its five equal steps in place of POLYNOMIALS the two give the same weights in bfloat16
    (tests/test_optim.py). A parameter of more than two dimensions is many matrices, which torch's refuses.
    """

    can_skip = True
    moments = {"momentum_buffer"}

    def __init__(self, groups, lr, momentum=0.95, weight_decay=0.1, dtype=torch.float32, compile=False):
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.dtype = dtype
        self.is_compiled = compile
        self.orthogonalize = orthogonalize
        self.update = muon_update
        if compile:  # for each shape of matrices once
            self.orthogonalize = torch.compile(orthogonalize, dynamic=False)
            self.update = torch.compile(muon_update, dynamic=False)

    @torch.no_grad()
    def step(self, is_skipped=None):
        """One update; none, to the bit, where is_skipped, a float tensor on the device, is above 0."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self.step_together(params, group, is_skipped)

    def step_together(self, params, group, is_skipped):
        """One update of parameters of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        weights = [local(p) for p in params]
        grads = [local(p.grad) for p in params]
        momenta = [local(self.state[p]["momentum_buffer"]) for p in params]
        settings = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
        settings["scale"] = 0.2 * max(params[0].shape[-2:]) ** 0.5  # makes updates as long as AdamW's
        update, function = self.update, orthogonalize_list
        is_number = not isinstance(group["lr"], torch.Tensor)
        if is_sharded(params[0]) and params[0].dim() == 2:  # of experts, shards are whole matrices
            update, function = muon_update, partial(apply_to_whole, self.orthogonalize, params=params)
        elif self.is_compiled and is_number:  # a number would be compiled anew whenever it changes
            settings["lr"] = torch.full((), group["lr"], device=weights[0].device)
        update(weights, grads, momenta, settings, is_skipped, self.dtype, function)


def muon_update(weights, grads, momenta, settings, is_skipped, dtype, function):
    """One step of Muon, in place, on three lists: weights of one shape, their grads and their momenta. Where
    is_skipped, a float tensor or None, is above 0, nothing changes, to the bit. function: orthogonalize_list, or
    what computes the same of a list in `dtype`.
    """
    if is_skipped is not None:
        is_skipped = is_skipped > 0
        grads = [torch.where(is_skipped, m, g) for m, g in zip(momenta, grads)]
    torch._foreach_lerp_(momenta, grads, 1 - settings["momentum"])
    updates = torch._foreach_lerp(grads, momenta, settings["momentum"])
    updates = [x.to(w.dtype) for x, w in zip(function([x.to(dtype) for x in updates]), weights)]
    rate = settings["lr"] * settings["scale"]
    new = torch._foreach_mul(weights, 1 - settings["lr"] * settings["weight_decay"])
    if isinstance(rate, torch.Tensor):  # a captured or compiled step has no number that may change
        torch._foreach_sub_(new, torch._foreach_mul(updates, rate))
    else:
        torch._foreach_add_(new, updates, alpha=-rate)
    if is_skipped is not None:
        new = [torch.where(is_skipped, w, n) for w, n in zip(weights, new)]
    torch._foreach_copy_(weights, new)


def orthogonalize_list(updates):
    """Returns the updates of parameters of one shape (..., rows, columns) orthogonalised."""
    updates = torch.stack(updates)
    return list(orthogonalize(updates.flatten(0, -3)).view_as(updates))


def orthogonalize(G):
    """Returns each matrix of G (n, rows, columns) with its singular values moved to about 1 (0.75 to 1.2 for those
    that are at least 0.003 of its norm), by Newton-Schulz: each step takes a polynomial of them.
    """
    X = G.mT if G.size(-2) > G.size(-1) else G  # the smaller side first: A below is (small, small)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLYNOMIALS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if G.size(-2) > G.size(-1) else X
