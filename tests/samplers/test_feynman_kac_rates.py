"""Rates from the inner products of two vectors against the sum of squares, and what two vectors cannot hold."""

from __future__ import annotations

import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.samplers.feynman_kac_rates import combined, dot, in_two, log_rate, squares

PATH = paths.vp_linear()
MIXTURES = [
    GaussianMixture([0.4, 0.6], [[m, 0.0], [1.0, m]], [[0.3, 0.5], [0.6, 0.4]]) for m in (0.0, 0.7, -1.1)
]


@pytest.mark.parametrize("kinds", ["eps eps eps", "eps x0 x0", "x0 x0 x0"])
@pytest.mark.parametrize("powers", [(2.0, 0.0, 0.0), (-1.0, 2.0, 0.0), (1.0, 0.5, 0.0), (-1.0, 0.8, 1.2)])
def test_two_vectors_hold_the_rate(kinds, powers):
    y, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double(), PATH.time_of_rho(0.9)
    leaves = [m.denoiser(PATH, kind) for m, kind in zip(MIXTURES, kinds.split(), strict=True)]
    outputs = [d.raw(y, t)[0] for d in leaves]
    for diverges in (False, True):
        divergence = torch.zeros(5).double() if diverges else None
        pair = in_two(squares(leaves, powers, t, diverges))
        if pair is None:  # of one density and its divergence there is nothing to square
            assert diverges and powers[1:] == (0.0, 0.0) or kinds == "eps x0 x0" and powers[0] < 0 < powers[2]
            continue
        u, v = (combined(square, y, outputs) for square in pair[:2])
        found = pair.uu * dot(u, u) + pair.uv * dot(u, v) + pair.vv * dot(v, v)
        assert torch.allclose(
            found, log_rate(y, outputs, leaves, powers, t, divergence), rtol=1e-9, atol=1e-12
        )


def test_three_experts_of_another_total_take_four_squares():
    leaves = [m.denoiser(PATH, "eps") for m in MIXTURES]
    assert len(squares(leaves, (1.0, 0.5, 0.5), 0.5, False)) == 4
    assert in_two(squares(leaves, (1.0, 0.5, 0.5), 0.5, False)) is None
    assert in_two(squares(leaves, (1.0, 0.5, 0.5), 0.5, True)) is not None  # the gaps alone
