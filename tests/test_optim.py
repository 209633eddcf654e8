"""Muon against torch's, and against the singular value decomposition; what is said of the rate."""

from dataclasses import asdict

import pytest
import torch

from optim import Muon, get_lr, orthogonalize, rate_notes
from train import Config

SHAPES = [(24, 32), (24, 32), (32, 24), (48, 16), (1, 8)]


@pytest.mark.parametrize(
    "options",
    [{}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3}, {"nesterov": False, "momentum": 0.5}],
)
def test_in_bfloat16_it_is_torchs_muon_and_in_float32_close(options):
    def trained(optimizer_class, **dtype):
        g = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]
        optimizer = optimizer_class(params, lr=0.02, **options, **dtype)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.step()
        return params

    reference = trained(torch.optim.Muon)
    bfloat16 = trained(Muon, dtype=torch.bfloat16)
    float32 = trained(Muon)
    for a, b, c in zip(reference, bfloat16, float32):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
        torch.testing.assert_close(c, a, rtol=0, atol=0.02)
        assert not torch.equal(b, c)


def test_singular_values_move_to_about_one_and_directions_stay():
    G = torch.randn(3, 20, 40, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    S = U.mT @ orthogonalize(G) @ Vh.mT  # diagonal where the directions stay
    values = S.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min()
    assert values.max() < 1.25
    assert (S - torch.diag_embed(values)).abs().max() < 1e-4
    torch.testing.assert_close(orthogonalize(G.mT), orthogonalize(G).mT, rtol=0, atol=1e-5)


def rates(**keys):
    return Config(learning_rate=1e-3, warmup_iters=2, **keys)


def test_a_rate_that_a_user_may_not_expect_is_named():
    assert rate_notes(rates(max_iters=8)) == []
    [note] = rate_notes(rates(max_iters=8, lr_decay_iters=4))
    assert note.startswith("steps 5 to 8 learn nothing")
    assert rate_notes(rates(max_iters=8, lr_decay_iters=4, min_lr=1e-5)) == []  # nanoGPT's habit
    assert [get_lr(step, rates(max_iters=8, lr_decay_iters=4)) > 0 for step in (3, 4)] == [True, False]


def test_a_run_that_is_lengthened_names_both_rates():
    """Warm-up, stable, decay: it goes on at the stable rate and decays later."""
    before = rates(max_iters=10)
    after = rates(max_iters=100)
    resumed = {"step": 10, "config": asdict(before)}
    assert rate_notes(before, resumed) == rate_notes(after, {"step": 10, "config": asdict(after)}) == []
    [note] = rate_notes(after, resumed)
    old, new = get_lr(9, before), get_lr(10, after)
    assert new == 1e-3 > old
    assert note == f"the learning rate goes from {old:.3g} to {new:.3g} at step 10: max_iters changed"
