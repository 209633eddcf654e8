"""Matrix products that torch makes slowly: on a processor of a few rows, which decoding has, and of very many, which
training has (Linear), and of rows sorted by expert, each times its expert's matrix (GroupedProduct), which model.MoE
needs.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

HAS_MKL = torch.backends.mkl.is_available()
HAS_AVX512 = HAS_MKL and torch.backends.cpu.get_cpu_capability() == "AVX512"
FEW_ROWS = 32
MANY_ROWS = 1024
LARGE_MATRIX = 2**16  # numbers: smaller ones come from a cache, and what counts is the number of calls
PIECES = 8  # of a matrix, for so many threads

# -----------------------------------------------------------------------------------------------------
# Few rows and many


class Linear(nn.Linear):
    """nn.Linear, which on a processor multiplies the few rows of a decoding step and the many of a training step in
    other ways, where the matrix is so large that it may not come from a cache.
    """

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """Returns F.linear(x, weight, bias)."""
    if not HAS_MKL or weight.numel() < LARGE_MATRIX or not is_plain(x):
        return F.linear(x, weight, bias)
    if 0 < x.numel() <= FEW_ROWS * x.size(-1):
        y = few_rows_product(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    if has_many_rows(x):
        return many_rows_product(x, weight, bias)
    return F.linear(x, weight, bias)


def joint_linear(x, linears, joint=None, on_processor=True):
    """Returns what each of linears gives for x. In training that is one product, with all of their weights: in a
    compiled step of a GPU, and on a processor where many_rows_product makes it, unless on_processor is False.
    joint: what joined gives of them, where it is at hand.
    """
    if joint is None:
        # a compiler writes the gradients of the pieces side by side, which else are copied there
        is_compiled = x.is_cuda and torch.compiler.is_compiling()
        is_joint = torch.is_grad_enabled() and (is_compiled or on_processor and has_many_rows(x))
        joint = joined(linears) if is_joint else None
    if joint is None:
        return [module(x) for module in linears]
    return linear(x, *joint).split([module.out_features for module in linears], -1)


def joined(linears):
    """Returns (weight, bias or None) of all linears together; None for adapters and integers."""
    if any(type(module) is not Linear for module in linears):
        return None
    weight = torch.cat([module.weight for module in linears])
    bias = None if linears[0].bias is None else torch.cat([module.bias for module in linears])
    return weight, bias


def is_plain(x):
    """Tells whether x is computed now, by a processor, in float32."""
    return x.dtype == torch.float32 and x.is_cpu and not torch.compiler.is_compiling()


def has_many_rows(x):
    """Tells whether many_rows_product is the quicker one for x: on one thread it is not, nor without AVX-512."""
    is_large = x.numel() >= MANY_ROWS * x.size(-1)
    return is_large and HAS_AVX512 and is_plain(x) and torch.get_num_threads() > 1


def few_rows_product(rows, weight):
    """Returns F.linear(rows (n, in), weight (out, in)), for which MKL takes 1.2 to 6 times as long: by one thread, and
    for a lone row as a product of matrix and vector (LOG.md).
    """
    n, n_in = rows.shape
    if len(weight) % 2:
        return torch.cat((few_rows_product(rows, weight[:-1]), F.linear(rows, weight[-1:])), 1)
    n_pieces = math.gcd(len(weight), PIECES)
    pieces = weight.view(n_pieces, -1, n_in)
    copies = rows.expand(n_pieces, n, n_in)
    if n <= 8 and rows.numel() <= 4096:  # such rows are read as columns from the nearest cache
        return torch.bmm(pieces, copies.mT).view(-1, n).t().contiguous()
    if torch.get_num_threads() == 1:
        return F.linear(rows, weight)
    return torch.bmm(copies, pieces.mT).transpose(0, 1).reshape(n, -1)


def many_rows_product(x, weight, bias):
    """Returns F.linear(x, weight, bias) as a convolution over an image of one line, a pixel a row: by oneDNN, which on
    two threads with AVX-512 takes 0.9 to 0.95 of MKL's time, forward and backward (LOG.md).
    """
    # (1, in, 1, n), in memory as x is
    image = x.reshape(1, 1, -1, x.size(-1)).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


# -----------------------------------------------------------------------------------------------------
# Rows sorted by expert. Nothing waits for the device, and gradients are added up in the same order each time


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
