"""multistep(corrector=True): predict, call, correct, at one call a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import grids, multistep, rk, sa, sample

NOISE = torch.randn(32, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIXTURE = GaussianMixture([0.3, 0.4, 0.3], [[-1.2], [0.3], [1.0]], [0.15, 0.2, 0.25])


@pytest.mark.parametrize("nodes, order", [(1, 2), (2, 2), (3, 3), (4, 3)])
def test_order_of_convergence(nodes, order):
    assert (
        multistep.entry.order({"nodes": nodes, "corrector": True, "final": "auto", "start": "lower"}) == order
    )
    path = paths.vp_linear()
    d = MIXTURE.denoiser(path)

    def solved(solver, n, **options):
        return sample(d, NOISE, solver(path, grids.uniform(path, n, t_min=0.1, end="t_min"), **options))

    reference = solved(rk, 500, method="4")
    errors = [
        (solved(multistep, n, variable="vp", nodes=nodes, corrector=True) - reference).norm()
        for n in (40, 80, 160)
    ]
    assert min(np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])) > order - 0.2


def test_it_is_sa_solver_without_noise_where_both_have_three_nodes():
    """Their first steps have two nodes, and weights of their own; the rows after them are the same."""
    path = paths.vp_linear()
    times = grids.logsnr(path, 8)
    ours = multistep(path, times, nodes=3, corrector=True)
    theirs = sa(path, times, predictor=3, corrector=3, tau=0.0, final="auto")
    assert ours.calls == theirs.calls == 8 and not ours.stochastic
    for name in "ab":
        assert np.abs(getattr(ours, name)[4:] - getattr(theirs, name)[4:]).max() < 1e-12


@pytest.mark.parametrize("path", [paths.vp_linear(), paths.edm(), paths.flow()], ids=lambda p: p.name)
def test_it_is_ahead_of_the_predictor_alone(path):
    d = random_mixture(16, 5, 0).denoiser(path)
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def solved(n, **options):
        return sample(d, noise, multistep(path, grids.vp(path, n, exponent=2.0), variable="vp", **options))

    reference = solved(200, nodes=4)
    alone, corrected = (float((solved(12, nodes=3, corrector=c) - reference).norm()) for c in (False, True))
    assert corrected < alone
