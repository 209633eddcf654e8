"""Dropout: how many numbers it drops, which, and what becomes of the others."""

import math

import pytest
import torch

from dropout import Dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_number_is_dropped_with_probability_p_and_by_itself(p, dtype):
    torch.manual_seed(0)
    n = 2**20
    y = dropout(torch.ones(4, n // 4, dtype=dtype), p)
    is_dropped = (y == 0).view(-1)
    error = 5 / n**0.5
    assert abs(is_dropped.double().mean() - p) < error * (p * (1 - p)) ** 0.5 + 2**-16
    for distance in 1, 2, 3, 4, n // 4:  # four neighbours share a draw of the generator
        both = (is_dropped[distance:] & is_dropped[:-distance]).double().mean()
        assert abs(both - p * p) < 2 * error * p
    expected = torch.ones((), dtype=dtype) / (1 - p)
    torch.testing.assert_close(
        y[y != 0].unique(), expected[None], rtol=1e-2 if p > 0.9 else 1e-4, atol=0
    )


def test_the_gradient_is_what_the_number_was_multiplied_by():
    x = torch.randn(3, 5, 7, requires_grad=True)  # no multiple of four
    torch.manual_seed(0)
    y = dropout(x, 0.4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x * gradient, rtol=1e-6, atol=0)
    assert 0 < (gradient == 0).sum() < x.numel()
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.4), y)
    assert not torch.equal(dropout(x, 0.4), y)


def test_the_edges_of_p():
    x = torch.randn(1001)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn for nothing
    y = dropout(x, math.nextafter(1, 0))
    assert y.isfinite().all() and (y == 0).sum() > 990
    assert dropout(x[:0], 0.5).shape == (0,)
    assert torch.equal(Dropout(0.5).eval()(x), x)
