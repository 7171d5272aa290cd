"""A table's steps as Gaussian kernels: their means are the loop's, their densities those of what it draws."""

import math

import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.samplers import consistency, ddim, ddpm, dpmpp, euler, grids, heun, init, starting_noise, step
from fewstep.samplers.transitions import transitions

PATHS = [paths.vp_linear(), paths.edm(), paths.flow()]


def tables(path):
    times = grids.logsnr(path, 6)
    return [
        ddim(path, times, eta=1.0),
        ddim(path, times, eta=0.5),
        ddpm(path, times),
        consistency(path, times),
    ]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_a_step_of_the_loop_is_the_mean_and_std_times_its_noise(path):
    d = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [0.05, 0.1]).denoiser(path)
    for table in tables(path):
        plan = table.on(d)
        state = init(table, starting_noise(0, 5, (2,)).double())
        for one in transitions(plan):
            z = starting_noise(one.row + 1, 5, (2,)).double()
            after, _ = step(d, plan, state, z=z)
            expected = one.mean(state.x, d(state.x, one.t)) + one.std * z
            torch.testing.assert_close(after.x, expected, rtol=1e-10, atol=1e-10)
            state = after


def test_its_density_is_that_of_a_normal():
    d = GaussianMixture([1.0], [[0.0, 1.0]], 1.0).denoiser(paths.edm())
    one = transitions(ddim(d.path, grids.karras(d.path, 5), eta=1.0).on(d))[1]
    x = starting_noise(0, 3, (2,)).double()
    x0, after = d(x, one.t), starting_noise(1, 3, (2,)).double()
    expected = torch.distributions.Normal(one.mean(x, x0), one.std).log_prob(after).sum(1)
    torch.testing.assert_close(one.log_prob(after, x, x0), expected)
    other = torch.distributions.Normal(one.mean(x, x0 + 1), one.std)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(one.mean(x, x0), one.std), other).sum(1)
    torch.testing.assert_close(one.divergence(x0, x0 + 1), kl)
    assert math.isfinite(float(kl.sum()))


def test_tables_that_are_no_chain_or_draw_nothing_are_refused():
    d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
    times = grids.karras(d.path, 5)
    for table in (dpmpp(d.path, times, order=2), heun(d.path, times)):
        with pytest.raises(ValueError, match="no history"):
            transitions(table.on(d))
    with pytest.raises(ValueError, match="must draw noise"):
        transitions(euler(d.path, times).on(d))
    last = transitions(ddim(d.path, times, eta=1.0).on(d))[-1]
    with pytest.raises(ValueError, match="draws no noise"):
        last.log_prob(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
