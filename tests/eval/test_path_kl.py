"""The divergence of sampling paths: that of the laws in the limit, that of the chains exactly, 0 between equals."""

import pytest
import torch

from fewstep.eval.path_kl import path_kl
from fewstep.models import GaussianMixture, paths
from fewstep.samplers import abm, ddim, grids, starting_noise

PATHS = [paths.vp_linear(), paths.edm(), paths.flow()]


def normal(path, mean, std=1.0):
    return GaussianMixture([1.0], [[mean]], std).denoiser(path)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_between_gaussians_it_goes_to_half_the_squared_distance_at_first_order(path):
    def error(steps):
        table = ddim(path, grids.vp(path, steps), eta=1.0)
        return (
            path_kl(normal(path, 1.0), normal(path, 0.0), starting_noise(0, 4, (1,)).double(), table).value
            - 0.5
        )

    coarse, fine = error(100), error(200)
    assert 0 < fine < 0.02 and coarse / fine == pytest.approx(2, abs=0.1)


def test_between_mixtures_it_is_that_of_the_laws_within_its_own_error():
    path = paths.vp_linear()
    base = GaussianMixture([0.5, 0.5], [[-1.5], [1.5]], [0.3, 0.3])
    tuned = GaussianMixture([0.2, 0.8], [[-1.5], [1.5]], [0.3, 0.3])
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)[:, None]
    log_p, log_q = tuned.log_prob(grid), base.log_prob(grid)
    truth = float((log_p.exp() * (log_p - log_q)).sum() * 12 / 20000)
    table = ddim(path, grids.vp(path, 200), eta=1.0)
    noise = starting_noise(1, 4000, (1,)).double()
    found = path_kl(tuned.denoiser(path), base.denoiser(path), noise, table)
    # a path's ratio is above the law's by its first-order error: 1.6 % at 200 steps between Gaussians
    assert abs(found.value - truth) < 4 * found.error + 0.03 * truth, (found.value, truth, found.error)
    other = path_kl(tuned.denoiser(path), tuned.denoiser(path), noise[:10], table)
    assert other.value == 0 and len(other.steps) == table.calls


@pytest.mark.parametrize("level", [0.5, 2.0])
def test_down_to_a_level_it_is_that_of_the_noised_laws(level):
    path = paths.edm()
    table = ddim(path, [*grids.vp(path, 1000)[:-1][grids.vp(path, 1000)[:-1] > level], level, 0.0], eta=1.0)
    found = path_kl(
        normal(path, 1.0), normal(path, 0.0), starting_noise(0, 4, (1,)).double(), table, level=level
    )
    # of N(1, 1 + level^2) from N(0, 1 + level^2)
    assert found.value == pytest.approx(0.5 / (1 + level**2), rel=0.02)
    with pytest.raises(ValueError, match="level must lie below"):
        path_kl(normal(path, 1.0), normal(path, 0.0), starting_noise(0, 4, (1,)), table, level=1e6)


def test_what_cannot_be_compared_is_refused():
    path = paths.edm()
    noise = starting_noise(0, 4, (1,))
    with pytest.raises(ValueError, match="must have no history"):
        path_kl(normal(path, 0.0), normal(path, 1.0), noise, abm(path, grids.vp(path, 5)))
    with pytest.raises(ValueError, match="must draw noise"):
        path_kl(normal(path, 0.0), normal(path, 1.0), noise, ddim(path, grids.vp(path, 5)))
