"""Dropout (Srivastava et al. 2014), drawn faster than torch draws it on a processor."""

import torch
import torch.nn as nn
import torch.nn.functional as F

BITS = 16  # of randomness for each number


class Dropout(nn.Dropout):
    """nn.Dropout with the draws of dropout()."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def dropout(x, p):
    """Returns x with each number made 0 with probability p, and the others divided by 1 - p, as F.dropout does.

    On a processor torch draws 64 random bits for each number, on one thread. Here 64 bits decide on four numbers,
    from the same generator, and p is rounded to 1/65536.
    """
    if p == 0:
        return x
    if not x.is_cpu or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() * BITS // 64), dtype=torch.int64).random_(-(2**63), None)
    numbers = bits.view(torch.int16)[: x.numel()].view(x.shape)  # each of -32,768 to 32,767 as likely
    n_dropped = min(round(p * 2**BITS), 2**BITS - 1)
    is_kept = numbers >= n_dropped - 2 ** (BITS - 1)
    return x * is_kept.to(x.dtype).mul_(2**BITS / (2**BITS - n_dropped))
