"""Matrix products that torch makes slowly: on a processor those of a few rows, which decoding has, and of very many,
which training has. Those of experts are in experts.py.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

HAS_MKL = torch.backends.mkl.is_available()
HAS_AVX512 = HAS_MKL and torch.backends.cpu.get_cpu_capability() == "AVX512"
FEW_ROWS = 32
MANY_ROWS = 1024
LARGE_MATRIX = 2**16  # numbers: a smaller matrix stays in a cache, and its time is that of the calls
PIECES = 8  # that a matrix is cut into, for as many threads


class Linear(nn.Linear):
    """nn.Linear with faster products on a processor, for the few rows of a decoding step and for the many of a
    training step, where the matrix is too large to stay in a cache.
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
    """Returns what each of the linears gives for x, by one product with all of their weights where that is faster in
    training: in a compiled step of a GPU, and on a processor where many_rows_product makes it, unless on_processor
    is False. joint: joined(linears), where it is at hand; None: it is not.
    """
    if joint is None:
        # a compiler writes the gradients of the pieces side by side; without one they would be copied there
        is_compiled = x.is_cuda and torch.compiler.is_compiling()
        is_joint = torch.is_grad_enabled() and (is_compiled or on_processor and has_many_rows(x))
        joint = joined(linears) if is_joint else None
    if joint is None:
        return [module(x) for module in linears]
    return linear(x, *joint).split([module.out_features for module in linears], -1)


def joined(linears):
    """Returns (weight, bias or None) of all linears as one; None where one of them has an adapter or integers."""
    if any(type(module) is not Linear for module in linears):
        return None
    weight = torch.cat([module.weight for module in linears])
    bias = None if linears[0].bias is None else torch.cat([module.bias for module in linears])
    return weight, bias


def product_dtype(x):
    """Returns the dtype of matrix products with x: that of autocast, or its own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_plain(x):
    """Returns whether x is a float32 tensor on a processor, and nothing is being compiled."""
    return x.dtype == torch.float32 and x.is_cpu and not torch.compiler.is_compiling()


def has_many_rows(x):
    """Returns whether many_rows_product is quicker for x: on one thread it is not, nor without AVX-512."""
    is_large = x.numel() >= MANY_ROWS * x.size(-1)
    return is_large and HAS_AVX512 and is_plain(x) and torch.get_num_threads() > 1


def few_rows_product(rows, weight):
    """Returns F.linear(rows (n, in), weight (out, in)), by a batch of products with pieces of the weight. MKL takes
    1.2 to 6 times as long: it uses one thread, and takes a lone row for a vector (LOG.md).
    """
    n, n_in = rows.shape
    if len(weight) % 2:
        return torch.cat((few_rows_product(rows, weight[:-1]), F.linear(rows, weight[-1:])), 1)
    n_pieces = math.gcd(len(weight), PIECES)
    pieces = weight.view(n_pieces, -1, n_in)
    copies = rows.expand(n_pieces, n, n_in)
    if n <= 8 and rows.numel() <= 4096:  # so few stay in the nearest cache, and may be read by columns
        return torch.bmm(pieces, copies.mT).view(-1, n).t().contiguous()
    if torch.get_num_threads() == 1:
        return F.linear(rows, weight)
    return torch.bmm(copies, pieces.mT).transpose(0, 1).reshape(n, -1)


def many_rows_product(x, weight, bias):
    """Returns F.linear(x, weight, bias) as a convolution over an image of one line in which each row is a pixel. That
    is made by oneDNN, which on two threads with AVX-512 takes 0.9 to 0.95 of MKL's time, forward and backward (LOG.md).
    """
    # (1, in, 1, n), in memory as x is
    image = x.reshape(1, 1, -1, x.size(-1)).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
