"""Muon against torch's, and against the singular value decomposition."""

import pytest
import torch

from optim import Muon, orthogonalize

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


def test_each_experts_matrix_is_updated_as_if_alone():
    """A parameter (3, 2, 24, 16) is six matrices that do not know of each other."""

    def trained(params):
        optimizer = Muon([{"params": params}], lr=0.02, adjust_lr_fn="match_rms_adamw")
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            gradient = torch.randn(3, 2, 24, 16, generator=g)
            for p, part in zip(params, gradient.view(len(params), *params[0].shape)):
                p.grad = part
            optimizer.step()
        return params

    weights = torch.randn(3, 2, 24, 16, generator=torch.Generator().manual_seed(1))
    [together] = trained([torch.nn.Parameter(weights.clone())])
    alone = trained([torch.nn.Parameter(weight.clone()) for weight in weights.flatten(0, 1)])
    torch.testing.assert_close(together.flatten(0, 1), torch.stack(alone), rtol=0, atol=1e-6)
