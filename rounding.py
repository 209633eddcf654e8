"""Which integers stand for a matrix, and how far they are off: rtn, gptq and, for awq, the scale of its inputs.

    rtn    each number by itself to the nearest one
    gptq   Frantar et al. 2022, arXiv:2210.17323: one column of a matrix after the other; the columns after
           it make up for what rounding it changes in the outputs
    awq    Lin et al. 2023, arXiv:2306.00978: large inputs are made smaller and their weights larger, by the
           power of the inputs' size that changes the outputs least; then each number is rounded to the nearest

W (out, in) is a matrix in float32 or float64, and H (in, in) is X^T X of its inputs X (n, in), in float64. Of experts
W is (n_expert, out, in) and H (n_expert, in, in), and their Codes stand below each other. group_size is the number of
inputs that share a scale, 0 for all of a row. An error is the relative one of a matrix's outputs:
||X (W - Q)^T||^2 / ||X W^T||^2.
"""

import math

import torch

from quantized import LARGEST, Codes

COLUMNS = 128  # that GPTQ rounds before it changes all columns after them
GRID = 20  # powers of the inputs' size that AWQ tries, from 0 on


def find_scales(W, bits):
    """Returns scales and zeros (out, 1), floats, for a group of columns W (out, n): with 8 bits the number of
    largest size becomes 127 or -127, with 4 the range, with 0 in it, becomes 0 to 15.
    """
    if bits == 8:
        scales = W.abs().amax(1, keepdim=True) / LARGEST[bits]
        zeros = torch.zeros_like(scales)
    else:
        lowest = W.amin(1, keepdim=True).clamp(max=0)
        highest = W.amax(1, keepdim=True).clamp(min=0)
        scales = (highest - lowest) / LARGEST[bits]
        zeros = lowest
    scales = scales.clamp(min=1e-30).bfloat16().to(W.dtype)
    if bits == 4:
        zeros = (-zeros / scales).round().clamp(0, LARGEST[bits])
    return scales, zeros


def nearest_codes(W, scales, zeros, bits):
    """Returns the integers, as floats, nearest to W (out, n)."""
    lowest = -LARGEST[bits] if bits == 8 else 0
    return ((W / scales).round() + zeros).clamp(lowest, LARGEST[bits])


def to_codes(codes, scales, zeros, bits):
    """Returns the Codes of integers, scales and zeros that are floats."""
    if bits == 8:
        return Codes(codes.to(torch.int8), scales, None)
    return Codes(codes.to(torch.uint8), scales, zeros.to(torch.uint8))


def stacked_codes(matrices):
    """Returns a list of Codes as one, with their matrices below each other."""
    return Codes(*[None if parts[0] is None else torch.cat(parts) for parts in zip(*matrices)])


def group_scales(W, bits, group_size):
    """Returns the scales and zeros (out, groups) of W."""
    groups = W.split(group_size or W.size(1), 1)
    pairs = [find_scales(group, bits) for group in groups]
    return tuple(torch.cat(columns, 1) for columns in zip(*pairs))


def rtn(W, bits, group_size):
    """Returns the Codes of W, or of experts, each number rounded to the nearest."""
    W = W.flatten(0, -2)
    scales, zeros = group_scales(W, bits, group_size)
    width = W.size(1) // scales.size(1)
    of_columns = [x.repeat_interleave(width, 1) for x in (scales, zeros)]
    return to_codes(nearest_codes(W, *of_columns, bits), scales, zeros, bits)


def inverse_factor(H, damping):
    """Returns the upper triangular U with U^T U = (H + damping mean(diag H) I)^-1."""
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    unused = H.diagonal() == 0  # only where all inputs were always 0, as else the damping is in each
    H.diagonal()[unused] = 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq(W, H, bits, group_size, damping=0.01, act_order=False):
    """Returns W's Codes by GPTQ.

    A group's scale is chosen when its first column is reached, for what its columns have become by then. With
    act_order a group's columns do not follow each other, so all scales are chosen before, for W itself.
    """
    W = W.double().clone()
    n_in = W.size(1)
    width = group_size or n_in
    order = torch.arange(n_in)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    U = inverse_factor(H.double()[order][:, order], damping)
    scales, zeros = group_scales(W, bits, group_size)
    W = W[:, order]
    codes = torch.empty_like(W)
    for first in range(0, n_in, COLUMNS):
        end = min(first + COLUMNS, n_in)
        errors = torch.empty(len(W), end - first, dtype=W.dtype)
        for i in range(first, end):
            group = int(order[i]) // width
            if group_size and not act_order and i % width == 0:  # groups divide COLUMNS
                scales[:, [group]], zeros[:, [group]] = find_scales(W[:, i : i + width], bits)
            s, z = scales[:, [group]], zeros[:, [group]]
            codes[:, [i]] = nearest_codes(W[:, [i]], s, z, bits)
            error = (W[:, i] - ((codes[:, [i]] - z) * s)[:, 0]) / U[i, i]
            W[:, i:end] -= error[:, None] * U[i, i:end]
            errors[:, i - first] = error
        W[:, end:] -= errors @ U[first:end, end:]
    return to_codes(codes[:, order.argsort()], scales, zeros, bits)


def error_of(W, codes, H):
    """Returns the relative error of a matrix's outputs, or of all experts', with its Codes; inf for outputs of 0."""
    W = W.double()
    D = W - codes.dense().view_as(W).double()
    size = ((W @ H) * W).sum()
    error = ((D @ H) * D).sum()
    return (error / size).item() if size > 0 else math.inf


def awq_scale(pairs, sizes, bits, group_size, spread=None):
    """Returns the scale s (m,) of the inputs of matrices, [(W, H)], that changes all their outputs together least,
    when W s is rounded to the nearest and inputs are divided by s.

    sizes (m,): the mean absolute value of each input; s is a power of it, from 0 to 1. spread: the function from
    (m,) to (in,) where several inputs share a scale; None: each has its own.
    """
    spread = spread or (lambda s: s)
    sizes = sizes.clamp(min=1e-4)
    best = torch.ones_like(sizes)
    least = math.inf
    for step in range(GRID):
        s = sizes ** (step / GRID)
        s = s / (s.max() * s.min()).sqrt()
        of_inputs = spread(s)
        error = 0.0
        for W, H in pairs:
            D = rtn(W * of_inputs, bits, group_size).dense() / of_inputs - W
            error += ((D @ H) * D).sum().item()
        if error < least:
            best, least = s, error
    return best
