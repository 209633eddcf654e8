"""The optimizers against torch's, and Muon against the singular value decomposition."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import optim
import train
from config import Refusal
from device import Compute
from optim import AdamW, Muon, Optimizer, load_optimizers, make_optimizers, orthogonalize

SHAPES = [(24, 32), (24, 32), (32, 24), (48, 16), (1, 8)]


def trained(optimizer, params, is_skipped=lambda step: None):
    """Takes five steps of an optimizer of params, with gradients that are drawn anew for each."""
    g = torch.Generator().manual_seed(0)
    for step in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        skipped = is_skipped(step)
        optimizer.step() if skipped is None else optimizer.step(skipped)
    return params


def draw(shapes=SHAPES):
    g = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3, "momentum": 0.5}])
def test_in_bfloat16_it_is_torchs_muon_and_in_float32_close(settings, monkeypatch):
    """With torch's polynomial, which it takes five times."""
    monkeypatch.setattr(optim, "POLYNOMIALS", [(3.4445, -4.775, 2.0315)] * 5)
    params = draw()
    reference = trained(
        torch.optim.Muon(params, lr=0.02, adjust_lr_fn="match_rms_adamw", **settings), params
    )
    results = []
    for dtype in torch.bfloat16, torch.float32:
        params = draw()
        results.append(trained(Muon([{"params": params}], lr=0.02, dtype=dtype, **settings), params))
    for a, b, c in zip(reference, *results):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
        torch.testing.assert_close(c, a, rtol=0, atol=0.02)
        assert not torch.equal(b, c)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_torchs_to_the_bit_and_so_is_its_state(fused):
    params, peers = draw(), draw()
    groups = [{"params": params[:2], "weight_decay": 0.3, "lr": 0.1}, {"params": params[2:]}]
    peer_groups = [groups[0] | {"params": peers[:2]}, {"params": peers[2:]}]
    settings = dict(lr=0.02, betas=(0.8, 0.9), weight_decay=0.0, fused=fused)
    optimizer = AdamW(groups, **settings)
    peer = torch.optim.AdamW(peer_groups, **settings)
    trained(optimizer, params)
    trained(peer, peers)
    assert all(map(torch.equal, params, peers))
    saved, peer_saved = optimizer.state_dict(), peer.state_dict()
    assert saved["state"].keys() == peer_saved["state"].keys()
    for i, moments in saved["state"].items():
        assert moments.keys() == peer_saved["state"][i].keys()
        assert all(torch.equal(x, peer_saved["state"][i][name]) for name, x in moments.items())
    for group, peer_group in zip(saved["param_groups"], peer_saved["param_groups"]):
        assert group.items() <= peer_group.items()
    # each goes on with the other's state
    again, peer_again = AdamW(groups, **settings), torch.optim.AdamW(peer_groups, **settings)
    again.load_state_dict(peer_saved)
    peer_again.load_state_dict({"state": saved["state"], "param_groups": peer_saved["param_groups"]})
    trained(again, params)
    trained(peer_again, peers)
    assert all(map(torch.equal, params, peers))


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_step_that_is_left_out_is_as_if_it_had_not_been(kind):
    params, expected = draw(), draw()
    optimizer = kind([{"params": params}], lr=0.02)
    plain = kind([{"params": expected}], lr=0.02)
    trained(optimizer, params, lambda step: torch.tensor(float(step == 4)))
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p in expected:
            p.grad = torch.randn(p.shape, generator=g)
        plain.step()
    assert all(map(torch.equal, params, expected))
    for i, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(x, plain.state_dict()["state"][i][name]) for name, x in moments.items())


def test_singular_values_move_to_about_one_and_directions_stay():
    G = torch.randn(3, 20, 40, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    S = U.mT @ orthogonalize(G) @ Vh.mT  # diagonal where the directions stay
    values = S.diagonal(dim1=-2, dim2=-1)
    assert 0.75 < values.min()
    assert values.max() < 1.2
    assert (S - torch.diag_embed(values)).abs().max() < 1e-4
    torch.testing.assert_close(orthogonalize(G.mT), orthogonalize(G).mT, rtol=0, atol=1e-5)


def nearest_to_one(low, high):
    """Returns a, b, c of the a x + b x^3 + c x^5 that is nearest to 1 on [low, high], and its largest error: that where
    it lies as far above and below 1 at four points in turns (Remez).
    """
    points = np.linspace(low, high, 4)
    for _ in range(50):
        powers = np.stack([points, points**3, points**5, [1, -1, 1, -1]], 1)
        a, b, c, error = np.linalg.solve(powers, np.ones(4))
        extremes = np.roots([5 * c, 3 * b, a]) ** 0.5
        points = np.array([low, *np.sort(extremes), high])
    return (a, b, c), error


def test_each_polynomial_is_nearest_to_one_on_what_the_one_before_it_leaves():
    low, high = 0.003, 1.0
    for polynomial in optim.POLYNOMIALS:
        expected, error = nearest_to_one(low, high)
        low, high = 1 - error, 1 + error
        np.testing.assert_allclose(
            polynomial, np.array(expected) / 1.02 ** np.array([1, 3, 5]), rtol=0, atol=1e-4
        )
    assert error < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_low_rank_stay_small(dtype):
    """Their largest singular value is their norm, which bfloat16 may round up: unscaled polynomials made 1e11 of it."""
    g = torch.Generator().manual_seed(0)
    for rows, columns in (1, 8), (2, 2), (8, 8), (64, 64), (96, 256):
        for scales in [1.0], [1.0, 1e-3], [1.0, 0.1, 0.01]:
            U = torch.randn(20, rows, len(scales), generator=g) * torch.tensor(scales)
            V = torch.randn(20, len(scales), columns, generator=g)
            for G in U @ V, U.sign() @ V:
                values = torch.linalg.svdvals(orthogonalize(G.to(dtype)).float())
                assert values.max() < 1.21


def test_each_experts_matrix_is_updated_as_if_alone():
    """A parameter (3, 2, 24, 16) is six matrices that do not know of each other."""

    def trained_experts(params):
        optimizer = Muon([{"params": params}], lr=0.02)
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            gradient = torch.randn(3, 2, 24, 16, generator=g)
            for p, part in zip(params, gradient.view(len(params), *params[0].shape)):
                p.grad = part
            optimizer.step()
        return params

    weights = torch.randn(3, 2, 24, 16, generator=torch.Generator().manual_seed(1))
    [together] = trained_experts([torch.nn.Parameter(weights.clone())])
    alone = trained_experts([torch.nn.Parameter(weight.clone()) for weight in weights.flatten(0, 1)])
    torch.testing.assert_close(together.flatten(0, 1), torch.stack(alone), rtol=0, atol=1e-6)


def test_muon_is_compiled_on_a_gpu_that_compiles(monkeypatch):
    """By dynamo without inductor, whose code rounds otherwise: the same weights (to the bit from torch 2.13 on, before
    it writes lerp out), a graph a shape, and no more of them for another rate.
    """
    graphs = []

    def backend(graph, inputs):
        weights = [x for x in inputs if x.dim() > 0]
        graphs.append((len(weights) // 3, *weights[0].shape))  # with gradients and momenta
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    shapes = [*SHAPES, (3, 2, 24, 16)]  # two matrices of one shape, and six in one parameter
    cfg = train.Config(learning_rate=0.02)
    results = []
    for device, as_rate in ("cpu", torch.tensor), ("cuda", torch.tensor), ("cuda", float):
        model = torch.nn.Module()
        model.blocks = torch.nn.ParameterList(draw(shapes))
        _, muon = make_optimizers(model, cfg, Compute(torch.device(device), "float32", True, ""))
        weights = list(model.parameters())
        for rate in 0.02, 0.03:
            muon.param_groups[0]["lr"] = as_rate(rate)
            trained(muon, weights, lambda step: torch.tensor(float(step == 2)))
        results.append(weights)
    for weights in results[1:]:
        for p, q in zip(results[0], weights):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    kinds = [(2, 24, 32), (1, 32, 24), (1, 48, 16), (1, 1, 8), (1, 3, 2, 24, 16)]
    assert graphs == kinds


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_rate_that_is_a_tensor_is_the_same_rate(kind):
    """As captured steps have it."""
    params, expected = draw(), draw()
    trained(kind([{"params": params}], lr=torch.tensor(0.02), weight_decay=0.3), params)
    trained(kind([{"params": expected}], lr=0.02, weight_decay=0.3), expected)
    for p, q in zip(params, expected):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


class Signs(Optimizer):
    """One of a reader's own, which keeps an average and a number."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p] or {"mean": torch.zeros_like(p), "steps": 0}
                state["mean"].lerp_(p.grad, 0.1)
                state["steps"] += 1
                self.state[p] = state
                p -= group["lr"] * state["mean"].sign()


def own(params):
    return Signs([{"params": params}], lr=0.1)


def plain(params):
    """Returns one that keeps nothing."""
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("make", [own, plain, partial(torch.optim.Adamax, lr=0.1)])
def test_an_optimizer_of_ones_own_goes_on(make):
    params = draw()
    optimizer = make(params)
    trained(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    ckpt = {"optimizers": [saved], "step": 5, "losses": [], "scaler": {}}
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(copies)
    load_optimizers([resumed], None, ckpt, train.Config())
    for p, other in zip(trained(optimizer, params), trained(resumed, copies)):
        assert torch.equal(p, other)
    if saved["state"]:
        next(iter(saved["state"][0].values())).fill_(torch.nan)
        with pytest.raises(Refusal, match="of parameter 0 holds nan"):
            load_optimizers([make(draw())], None, ckpt, train.Config())
