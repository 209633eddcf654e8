"""LoRA (Hu et al. 2021, arXiv:2106.09685): beside a frozen matrix W learn two thin ones, y = W x +
(alpha / rank) B A dropout(x).

    from lora import LoRAConfig, inject, merge
    inject(model, LoRAConfig(rank=8))     # only the adapters learn; as B starts at zero, the model computes the same
    merge(model)                          # W becomes W + (alpha / rank) B A, and the model is an ordinary one again

A model is any nn.Module whose Linears have the names in LINEARS. Linears of experts, with a weight (n, out, in)
and a `multiply`, get an adapter for each expert. Nothing is assumed of the model's other parts.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import check_range
from dropout import Dropout
from products import Linear

LINEARS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


@dataclass
class LoRAConfig:
    # fmt: off
    rank: int = 8              # of B A; 0 = no adapters, all weights are learned
    alpha: float = 16.0        # B A counts alpha / rank times
    lora_dropout: float = 0.0  # on what goes into A
    target: str = "all"        # Linears with an adapter: all | q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
    # fmt: on

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"rank cannot be negative; 0 trains all weights, not {self.rank}")
        check_range(self, "above 0 and at most 1e36", "alpha")  # float32 ends at 3e38
        check_range(self, "at least 0 and below 1", "lora_dropout")
        for name in self.names:
            if name not in LINEARS:
                raise ValueError(
                    f"target {name!r} takes no adapter, only {','.join(LINEARS)} do: the embedding is a table, "
                    "and the head may be the same matrix, so that merging one would change the other"
                )

    @property
    def names(self):
        return LINEARS if self.target == "all" else tuple(self.target.split(","))


class LoRALinear(nn.Module):
    """A Linear and its adapter: A (rank, in), drawn as nn.Linear draws its weight, and B (out, rank),
    zero; both float32. A Linear of n experts has n of each.
    """

    is_on = True  # see switched_off

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.dropout = Dropout(dropout)
        self.multiply = getattr(base, "multiply", F.linear)
        *n, n_out, n_in = base.weight.shape
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(*n, rank, n_in, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(*n, n_out, rank, dtype=torch.float32, device=device))
        for matrix in self.A.data.view(-1, rank, n_in):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))  # as peft, Hugging Face's, does

    def forward(self, x, *ends):
        if not self.is_on:
            return self.base(x, *ends)
        thin = self.multiply(self.dropout(x), self.A, *ends)
        return self.base(x, *ends) + self.scale * self.multiply(thin, self.B, *ends)

    @torch.no_grad()
    def sum(self):
        """Returns weight and adapter as one matrix, added in float32 at least, in the weight's dtype."""
        weight = self.base.weight
        change = self.scale * (self.B @ self.A)
        return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + change).type_as(weight)

    @torch.no_grad()
    def merged(self):
        """Returns the Linear with the adapter in its weight."""
        self.base.weight.copy_(self.sum())
        return self.base


def inject(model, c):
    """Freezes the model and puts an adapter beside each Linear that c names.

    Raises ValueError where the model has no such Linear, or one that takes no adapter of this rank; nothing
    has changed then.
    """
    linears = {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in c.names}
    kinds = {name.rpartition(".")[2] for name in linears}
    if not kinds or c.target != "all" and kinds != set(c.names):
        missing = ", ".join(sorted(set(c.names) - kinds))
        raise ValueError(f"target {c.target}: this model has no {missing}")
    for name, linear in linears.items():
        if c.rank > min(linear.in_features, linear.out_features):
            shape = f"{linear.out_features} x {linear.in_features}"
            raise ValueError(
                f"rank {c.rank} is more than {name}, {shape}, can have: "
                "take a smaller one; 0, where that is taken, trains all weights"
            )
        if not is_product(linear):
            raise ValueError(
                f"{name}, a {type(linear).__name__}, does more than multiply by its weight: merged, an adapter would "
                "compute something else; --rank=0, where that is taken, trains all weights"
            )
    model.requires_grad_(False)
    for name, linear in linears.items():
        adapted = LoRALinear(linear, c.rank, c.alpha, c.lora_dropout)
        replace(model, name, adapted.train(linear.training))


def is_product(linear):
    """Returns whether a Linear only multiplies by its weight, so that an adapter can be merged into that."""
    return hasattr(linear, "multiply") or type(linear).forward in (nn.Linear.forward, Linear.forward)


def replace(model, name, module):
    """Puts a module in the place of the one that the model has under this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def switched_off(model):
    """The context in which the model computes what it did before it got adapters."""
    adapted = [m for m in model.modules() if isinstance(m, LoRALinear)]
    try:
        for m in adapted:
            m.is_on = False
        yield
    finally:
        for m in adapted:
            m.is_on = True


@contextmanager
def folded_in(model):
    """The context in which the adapters are in the weights: a model that only reads is as fast as its base then."""
    adapted = [m for m in model.modules() if isinstance(m, LoRALinear)]
    weights = [m.base.weight.data for m in adapted]
    try:
        with switched_off(model):
            for m in adapted:
                m.base.weight.data = m.sum()
            yield
    finally:
        for m, weight in zip(adapted, weights):
            m.base.weight.data = weight


def without_dropout(model):
    """Ends the dropout of a model, but not that of its adapters. A loss that compares the model with itself as it
    was would only make it learn to undo dropout.
    """
    own = {id(m.dropout) for m in model.modules() if isinstance(m, LoRALinear)}
    for m in model.modules():
        if isinstance(m, nn.Dropout) and id(m) not in own:
            m.p = 0.0
        elif isinstance(getattr(m, "dropout", None), float):  # of attention
            m.dropout = 0.0


def merge(model):
    """Puts every adapter into its Linear and thaws the model."""
    for name, m in list(model.named_modules()):
        if isinstance(m, LoRALinear):
            replace(model, name, m.merged())
    model.requires_grad_(True)


def state_dict(model):
    """Returns the adapters alone, {"blocks.0.attn.q_proj.A": (rank, in), ...}; the tensors are not copies."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{name}.A"] = module.A.detach()
            tensors[f"{name}.B"] = module.B.detach()
    return tensors


def load_state_dict(model, adapters):
    """Copies adapters into the model's. Raises ValueError where they are not this model's, by name or shape."""
    own = state_dict(model)
    if own.keys() != adapters.keys():
        raise ValueError(
            f"the adapters are for other layers: {min(own.keys() ^ adapters.keys(), key=str)}"
        )
    for name, tensor in own.items():
        if tensor.shape != adapters[name].shape:
            raise ValueError(f"{name} is {tuple(adapters[name].shape)} and not {tuple(tensor.shape)}")
        tensor.copy_(adapters[name])


def trainable(model):
    """Returns (how many parameters are learned, how many there are, with adapters), each counted once."""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return learned, sum(p.numel() for p in model.parameters())
