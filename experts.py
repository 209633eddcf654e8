"""A mixture of experts: an MLP (mlp = "moe" in model.py), the products of rows sorted by expert that it needs, and the
loss that spreads tokens evenly.

Letters in shapes: B rows, T tokens in each, C width, R rows of products, a token at one of its experts each.
"""

import math
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from products import LARGE_MATRIX, is_plain, linear, product_dtype

FEW_ROWS = 8  # an expert, on average


def gated_width(n_embd):
    """Returns the inner width for n_inner=0 of an MLP with a gate: its three matrices are then as large as the two of
    an MLP without one, 4 n_embd wide.
    """
    return math.ceil(8 * n_embd / 3 / 32) * 32


class Routing(NamedTuple):
    """Where one layer sends each token."""

    probabilities: Any  # (B, T, n_expert), of all experts: at least float32
    experts: Any  # (B, T, n_expert_per_token) int64, the likeliest of them


class MoE(nn.Module):
    """A mixture of experts (Shazeer et al. 2017): each token goes through the n_expert_per_token SwiGLUs
    that a router finds likeliest, and gets the sum of what they return, weighted by their probabilities.

    Tokens are sorted by expert, so that each expert's matrices are multiplied once, with however many tokens
    it got. Nothing waits for the device, and no token is dropped. Which experts a token gets depends on that
    token alone. If you write your own forward, add its Routing to self.routings, or balance is not learned.
    """

    inner_width = staticmethod(gated_width)
    routings = None  # see recorded_routings

    def __init__(self, c):
        super().__init__()
        self.top_k = c.n_expert_per_token
        self.norm_topk_prob = c.norm_topk_prob
        # Qwen3-MoE and OLMoE, which have qk_norm, round the scores to x's dtype; Mixtral's stay float32
        self.rounds_scores = c.qk_norm
        self.router = nn.Linear(c.n_embd, c.n_expert, bias=False)
        self.gate_proj = ExpertLinear(c.n_expert, c.n_embd, c.n_inner)
        self.up_proj = ExpertLinear(c.n_expert, c.n_embd, c.n_inner)
        self.down_proj = ExpertLinear(c.n_expert, c.n_inner, c.n_embd)
        self.down_proj.into_residual = True

    def route(self, x):
        """Returns the Routing of x (B, T, C), and the scores (B, T, top_k) of its experts. Both are computed in
        float32 at least.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.router.weight.to(dtype))
        probabilities = logits.softmax(-1)
        scores, experts = probabilities.topk(self.top_k)
        if self.norm_topk_prob:
            scores = scores / scores.sum(-1, keepdim=True)
        if self.rounds_scores:
            scores = scores.type_as(x)
        return Routing(probabilities, experts), scores

    def forward(self, x):
        routing, scores = self.route(x)
        if self.routings is not None:
            self.routings.append(routing)
        # a row is a token at one of its experts; token t has rows t top_k to (t + 1) top_k
        experts, order = routing.experts.flatten().sort(stable=True)
        numbers = torch.arange(routing.probabilities.size(-1), device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        rows = x.flatten(0, 1).repeat_interleave(self.top_k, 0)
        rows = Permute.apply(rows, order, inverse)
        rows = F.silu(self.gate_proj(rows, ends)) * self.up_proj(rows, ends)
        rows = Permute.apply(self.down_proj(rows, ends), inverse, order)
        y = rows.view(*scores.shape, -1) * scores[..., None]
        return y.sum(-2).type_as(rows)


@contextmanager
def recorded_routings(model):
    """Returns a context that yields a list, to which each layer of experts adds its Routing meanwhile."""
    routings = []
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        layer.routings = routings
    try:
        yield routings
    finally:  # blocks that are recomputed in the backward pass must record nothing
        for layer in layers:
            layer.routings = None


class ExpertLinear(nn.Module):
    """One Linear for each expert, without biases: weight (n_expert, out_features, in_features)."""

    def __init__(self, n_expert, in_features, out_features):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(n_expert, out_features, in_features))

    def forward(self, rows, ends):
        return self.multiply(rows, self.weight, ends)

    @staticmethod
    def multiply(rows, weight, ends):
        """Returns rows (R, in) times their experts' matrices, of weight (n_expert, out, in): F.linear for an
        ExpertLinear. Rows are sorted by expert; those of expert e end before ends[e] (int32).
        """
        dtype = product_dtype(rows)
        return GroupedProduct.apply(rows.to(dtype), weight.to(dtype).mT, ends)


def balance_loss(routings, targets, doc=None, reduction="mean"):
    """Returns how unevenly tokens go to experts: n_expert_per_token if each expert gets the same share, up to
    n_expert if one gets all. A mean over layers and targets (B, T); with reduction="sum" it is summed over
    targets.

    As in the Switch Transformer (Fedus et al. 2021) it is n_expert times the sum over experts of their share
    of the tokens times their mean probability; but for each row by itself (DeepSeek-V3, 2024, eq. 17), so that
    it does not depend on which rows share a batch. Padding (doc -1) does not count.
    """
    is_token = torch.ones_like(targets) if doc is None else doc != -1
    weights = is_token / is_token.sum(1, keepdim=True).clamp(min=1)  # (B, T)
    rows = 0.0
    for probabilities, experts in routings:
        n_expert = probabilities.size(-1)
        numbers = torch.arange(n_expert, device=experts.device)
        is_chosen = (experts[..., None] == numbers).sum(2)  # (B, T, n_expert)
        shares = (weights[..., None] * is_chosen).sum(1)
        means = (weights[..., None] * probabilities).sum(1)
        rows = rows + n_expert * (shares * means).sum(-1)  # (B,)
    n_targets = (targets != -100).sum(1)
    total = (n_targets * rows).sum() / len(routings)
    return total if reduction == "sum" else total / n_targets.sum()


# -----------------------------------------------------------------------------------------------------
# Rows sorted by expert. Nothing waits for the device, and gradients are added up in the same order each time


class Permute(torch.autograd.Function):
    """Rows of x (R, C) in another order. The gradient is taken in the inverse order. Autograd does not know
    that no row is there twice, and would add gradients up: slowly, or on a GPU in an order of chance.
    """

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


class GroupedProduct(torch.autograd.Function):
    """Rows (R, in) sorted by expert, each times its expert's matrix of (n_expert, in, out): (R, out)."""

    @staticmethod
    def forward(ctx, rows, matrices, ends):
        ctx.save_for_backward(rows, matrices, ends)
        return grouped_product(rows, matrices, ends)

    @staticmethod
    def backward(ctx, gradient):
        rows, matrices, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        rows_gradient = None
        matrices_gradient = None
        if ctx.needs_input_grad[0]:
            rows_gradient = grouped_product(gradient, matrices.mT, ends)
        if ctx.needs_input_grad[1]:  # not of frozen experts beside adapters
            matrices_gradient = grouped_outer(gradient, rows, ends).mT
        return rows_gradient, matrices_gradient, None


def grouped_product(rows, matrices, ends):
    is_large = rows.size(1) * matrices.size(2) >= LARGE_MATRIX
    if is_large and len(rows) <= FEW_ROWS * len(ends) and is_plain(rows):
        return each_product(rows, matrices, ends.tolist())
    if has_grouped_mm(rows, matrices):
        return F.grouped_mm(rows, matrices, offs=ends)
    blocks = Blocks(rows.size(0), ends)
    return blocks.join(torch.bmm(blocks.split(rows), matrices[blocks.experts]))


def each_product(rows, matrices, ends):
    """Returns grouped_product of few rows, by a product for each expert that has some. On a processor F.grouped_mm
    takes 1.2 to 2.2 times as long at large matrices (LOG.md). ends: a list.
    """
    products = []
    start = 0
    for number, end in enumerate(ends):
        if start < end:
            products.append(linear(rows[start:end], matrices[number].mT))
            start = end
    return torch.cat(products)


def grouped_outer(a, b, ends):
    """Returns the sum of the outer products of each expert's rows of a (R, m) and b (R, n): (n_expert, m, n)."""
    if has_grouped_mm(a, b):
        return F.grouped_mm(a.mT, b, offs=ends)
    blocks = Blocks(a.size(0), ends)
    products = torch.bmm(blocks.split(a).mT, blocks.split(b))
    numbers = torch.arange(len(ends), device=a.device)
    is_of = (numbers[:, None] == blocks.experts).type_as(products)
    return (is_of @ products.flatten(1)).view(-1, *products.shape[1:])


def has_grouped_mm(rows, other):
    """Returns whether F.grouped_mm multiplies these without waiting for the device. On a GPU and when compiling it
    does so in bfloat16 alone, and on a GPU only where torch has a kernel for the card; strides must be multiples of
    16 bytes.
    """
    dtypes = [torch.bfloat16]
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        dtypes += [torch.float32, torch.float16]
    sizes = rows.size(-1), other.size(-1)
    is_aligned = all(size * rows.element_size() % 16 == 0 for size in sizes)
    if rows.dtype not in dtypes or not is_aligned:
        return False
    if rows.device.type == "cuda":  # elsewhere, as on an A100, it asks where each expert's rows end
        return torch.cuda.get_device_capability(rows.device)[0] in (9, 10)
    return rows.device.type == "cpu"


class Blocks:
    """Rows that are sorted by expert, in blocks of one size with one expert each. A batched product of them
    stands in for F.grouped_mm, on any device, in any dtype and at any size.

    The last block of an expert is filled up with zeros. There are as many blocks as the worst case needs,
    so that no size depends on where the tokens go.
    """

    LARGEST = 128  # rows

    def __init__(self, R, ends):
        device = ends.device
        n_expert = len(ends)
        self.size = min(self.LARGEST, -(-R // n_expert))
        n = (R + n_expert * (self.size - 1)) // self.size
        ends = ends.long()
        counts = ends.diff(prepend=ends.new_zeros(1))
        n_blocks = (counts + self.size - 1) // self.size
        block_ends = n_blocks.cumsum(0)
        # (n,); blocks that are left over hold zeros, so that it does not matter which expert they get
        experts = torch.searchsorted(block_ends, torch.arange(n, device=device), right=True)
        self.experts = experts.clamp(max=n_expert - 1)
        # (R,): where each row stands in the blocks
        rows = torch.arange(R, device=device)
        shifts = self.size * (block_ends - n_blocks) - (ends - counts)
        self.places = rows + shifts[torch.searchsorted(ends, rows, right=True)]

    def split(self, rows):
        """Returns rows (R, C) in blocks (n, size, C)."""
        padded = rows.new_zeros(len(self.experts) * self.size, rows.size(1))
        return padded.index_copy(0, self.places, rows).view(-1, self.size, rows.size(1))

    def join(self, blocks):
        """Returns the rows (R, C) in blocks (n, size, C)."""
        return blocks.flatten(0, 1)[self.places]
