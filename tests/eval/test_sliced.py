"""Sliced Wasserstein against closed forms and against transport by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.eval import sliced_wasserstein
from fewstep.eval.sliced import directions


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_dimensional_gaussians():
    # Mid-quantiles, scaled to variance 1: W_2^2 = (m_a - m_b)^2 + (s_a - s_b)^2 then holds exactly.
    levels = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    z = torch.special.ndtri(levels)
    z = (z / z.square().mean().sqrt())[torch.randperm(1000, generator=torch.Generator().manual_seed(0)), None]
    ours = sliced_wasserstein(0.5 + 2.0 * z, -1.0 + 0.7 * z.flip(0), projections=3)
    assert ours == pytest.approx(math.sqrt(1.5**2 + 1.3**2), abs=1e-12)


def test_one_dimensional_gaussians_at_unequal_counts():
    def quantiles(count):
        return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]

    errors = [
        abs(sliced_wasserstein(2 * quantiles(n), 1 + quantiles(3 * n // 2), 1) - math.sqrt(2))
        for n in (200, 800, 3200)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_translation_is_exact_for_whole_blocks_of_directions(dim):
    x, v = normal(40, dim), normal(dim, seed=1)
    shuffled = x[torch.randperm(40, generator=torch.Generator().manual_seed(2))]
    ours = sliced_wasserstein(x, shuffled + v, projections=3 * dim, chunk=2)
    assert ours == pytest.approx(float(v.norm()) / math.sqrt(dim), rel=1e-12)
    assert sliced_wasserstein(x, shuffled, projections=3 * dim) == 0


@pytest.mark.parametrize(("m", "n"), [(4, 6), (5, 7), (1, 3), (8, 4)])
def test_unequal_counts_equal_repeated_rows(m, n):
    # Repeating every row leaves an empirical distribution as it is, and makes the counts equal.
    a, b = normal(m, 3), normal(n, 3, seed=1)
    ours = sliced_wasserstein(a, b, projections=20)
    theirs = sliced_wasserstein(a.repeat(n, 1), b.repeat(m, 1), projections=20)
    assert ours == pytest.approx(theirs, rel=1e-13)


def test_the_mean_over_directions_of_gaussians():
    # Isotropic scaling about 0: every direction has W_2^2 = (1 - s)^2 <u.x, u.x>, whose mean is |x|^2 / (N D).
    x = normal(100, 6)
    exact = 0.5 * math.sqrt(float(x.square().sum()) / 600)
    assert sliced_wasserstein(x, 1.5 * x, projections=6 * 4) == pytest.approx(exact, rel=1e-12)


def test_directions_are_uniform_and_follow_the_seed():
    u = directions(4, 4002, seed=1)
    assert u.shape == (4002, 4)
    assert torch.allclose(u.norm(dim=1), torch.ones(4002, dtype=u.dtype))
    # Var of a mean of u_i u_j over 1000 independent blocks is below 1 / 1000.
    assert torch.allclose(u.T @ u / len(u), torch.eye(4, dtype=u.dtype) / 4, atol=4 / math.sqrt(1000) / 4)
    assert float(u[::4].mean(dim=0).abs().max()) < 4 * math.sqrt(1 / 4 / 1001)
    assert torch.equal(u, directions(4, 4002, seed=1)) and not torch.equal(u, directions(4, 4002, seed=2))


def test_bad_input_is_named():
    x = normal(5, 3)
    with pytest.raises(ValueError, match="a has 0 rows"):
        sliced_wasserstein(x[:0], x)
    with pytest.raises(ValueError, match="b has 1 dimensions; expected 3"):
        sliced_wasserstein(x, x[:, :1])
    with pytest.raises(ValueError, match="projections is 0; expected a whole number"):
        sliced_wasserstein(x, x, projections=0)
    with pytest.raises(ValueError, match="a has NaN or infinity"):
        sliced_wasserstein(x / 0, x)
