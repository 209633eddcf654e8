"""Rows that are sorted by group, each times its group's matrix: what model.MoE needs of tokens and experts.

Nothing here waits for the device, and gradients are added up in the same order each time.
"""

import torch
import torch.nn.functional as F


class Permute(torch.autograd.Function):
    """Rows of x (R, C) in another order. The gradient takes the inverse order, where autograd, which
    does not know that nothing is there twice, adds up: slowly, or on a GPU in an order of chance.
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
    if has_grouped_mm(rows, matrices):
        return F.grouped_mm(rows, matrices, offs=ends)
    blocks = Blocks(rows.size(0), ends)
    return blocks.join(torch.bmm(blocks.split(rows), matrices[blocks.experts]))


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
    """Returns whether F.grouped_mm multiplies these without waiting for the device: on a GPU, and for the
    compiler, that is in bfloat16 alone, and strides must be multiples of 16 bytes.
    """
    dtypes = [torch.bfloat16]
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        dtypes += [torch.float32, torch.float16]
    sizes = rows.size(-1), other.size(-1)
    is_aligned = all(size * rows.element_size() % 16 == 0 for size in sizes)
    return rows.device.type in ("cpu", "cuda") and rows.dtype in dtypes and is_aligned


class Blocks:
    """Rows that are sorted by expert, in blocks of one size with one expert each: what stands in for
    F.grouped_mm on any device, in any dtype and at any size.

    The last block of an expert is filled up with zeros. The number of blocks is that of the worst case,
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
        # (n,); the blocks that are left over are zeros, for whichever expert
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
