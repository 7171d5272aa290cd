"""Best-of-n, importance sampling, SMC steering, SVDD and gradient guidance: their limits, and what they refuse."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.models.rewards import RewardError, compressibility
from fewstep.samplers import ddim, grids, sample, starting_noise
from fewstep.samplers.best_of_n import best_of_n, importance
from fewstep.samplers.dps import dps
from fewstep.samplers.smc_steering import smc_steering
from fewstep.samplers.svdd import svdd

D = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.flow())
TABLE = ddim(D.path, grids.uniform(D.path, 12), eta=1.0)


def reward(x):
    return x[:, 0]


def nothing(x):
    return 0 * x[:, 0]


def plain(noise, seed=3):
    return sample(D, noise, TABLE, seed=seed)


@pytest.mark.parametrize(
    "method, options",
    [
        (best_of_n, dict(n=4)),
        (importance, dict(n=4)),
        (smc_steering, dict(particles=4)),
        (smc_steering, dict(particles=4, potential="max")),
        (smc_steering, dict(particles=4, potential="sum")),
        (svdd, dict(width=3, keep="best")),
        (svdd, dict(width=1)),
    ],
)
def test_with_nothing_to_gain_each_is_sample(method, options):
    noise = starting_noise(1, 3, (1,))
    x, _ = method(D, noise, TABLE, reward=nothing, seed=3, **options)
    assert torch.equal(x, plain(noise))


@pytest.mark.parametrize("mode", ["score", "paper"])
def test_gradients_of_nothing_change_nothing(mode):
    noise = starting_noise(1, 3, (1,), torch.float64)
    x, _ = dps(D, noise, TABLE, reward=nothing, seed=3, mode=mode)
    assert torch.allclose(x, plain(noise), atol=1e-12)


@pytest.mark.parametrize(
    "method, scale",
    [
        (importance, 1.0),
        (functools.partial(smc_steering, potential="difference"), 1.0),
        (functools.partial(smc_steering, potential="max"), 1.0),
        (functools.partial(smc_steering, potential="sum"), 0.1),  # twelve times as much on the way
    ],
)
def test_weights_recover_the_tilted_law_and_its_normaliser(method, scale):
    """The law of many rollouts tilted by e^(scale x); the unweighted particles' law is another."""
    noise = starting_noise(0, 1, (1,), torch.float64)
    many = plain(starting_noise(8, 40_000, (1,), torch.float64))[:, 0]
    wanted, log_z = (
        (many * (scale * many).softmax(0)).sum(),
        (scale * many).logsumexp(0) - math.log(len(many)),
    )
    count = {"n": 4000} if method is importance else {"particles": 4000}
    _, drawn = method(D, noise, TABLE, reward=reward, scale=scale, seed=2, **count)
    mean = (drawn.x[0, :, 0] * drawn.log_weights[0].softmax(0)).sum()
    # 4000 weighted draws of variance below 1 are worth more than 600 here: 3 standard errors are 0.12
    assert abs(mean - wanted) < 0.12 and abs(drawn.log_z[0] - log_z) < 0.12
    if method is importance or scale < 1:
        assert abs(drawn.x[0, :, 0].mean() - wanted) > 0.25


def test_the_best_of_n_is_the_best_and_a_batch_may_be_split():
    noise = starting_noise(0, 2, (1,))
    x, drawn = best_of_n(D, noise, TABLE, reward=reward, n=30)
    assert torch.equal(x[:, 0], drawn.x[..., 0].amax(-1)) and drawn.calls == 30 * 12
    assert torch.equal(x, best_of_n(D, noise, TABLE, reward=reward, n=30, batch=7)[0])


def test_svdd_counts_its_calls_and_beams_are_the_greediest():
    calls = []
    d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.flow())
    inner, d.call = d.call, lambda x, tau: calls.append(len(x)) or inner(x, tau)
    noise = starting_noise(0, 1, (1,))
    for options in (dict(width=4), dict(width=4, particles=3), dict(width=2, levels=3)):
        calls.clear()
        _, drawn = svdd(d, noise, TABLE, reward=reward, **options)
        assert sum(calls) == drawn.calls
    noise, options = starting_noise(0, 40, (1,)), dict(reward=reward, particles=2, width=4)
    values = {
        keep: float(svdd(D, noise, TABLE, keep=keep, **options)[0].mean())
        for keep in ("draw", "best", "beam")
    }
    assert values["draw"] < values["best"] <= values["beam"] + 0.1


def test_gradient_guidance_is_exact_for_linear_rewards_and_off_for_others():
    """Many ODE steps: N(0, 1) tilted by 2x is N(2, 1); by -(x - 2)^2/(2/4) it is N(1.6, 0.2), which DPS misses."""
    table = ddim(D.path, grids.uniform(D.path, 60))
    noise = starting_noise(0, 4000, (1,), torch.float64)
    x, _ = dps(D, noise, table, reward=reward, scale=2.0)
    assert abs(x.mean() - 2) < 0.06 and abs(x.var() - 1) < 0.1
    x, _ = dps(D, noise, table, reward=lambda x: -2 * (x[:, 0] - 2) ** 2)
    assert x.var() < 0.15 or abs(x.mean() - 1.6) > 0.1


def test_what_they_refuse():
    noise = starting_noise(0, 2, (1,))
    with pytest.raises(ValueError, match="must be differentiable"):
        dps(D, noise, TABLE, reward=compressibility())
    with pytest.raises(ValueError, match="must be differentiable"):
        dps(D, noise, TABLE, reward=lambda x: x.detach()[:, 0])
    for method in (best_of_n, importance, smc_steering, svdd, dps):
        with pytest.raises(RewardError, match="must be finite"):
            method(D, noise, TABLE, reward=lambda x: x[:, 0] / 0 * 0)
        with pytest.raises(RewardError, match="one number a sample"):
            method(D, noise, TABLE, reward=lambda x: x)
    for call, message in (
        (lambda: best_of_n(D, noise, TABLE, reward=reward, n=0), "n must be"),
        (lambda: smc_steering(D, noise, TABLE, reward=reward, particles=0), "particles must be"),
        (lambda: smc_steering(D, noise, TABLE, reward=reward, potential="min"), "potential must be"),
        (lambda: svdd(D, noise, TABLE, reward=reward, keep="all"), "keep must be"),
        (lambda: dps(D, noise, TABLE, reward=reward, mode="x"), "mode must be"),
        (lambda: best_of_n(D, None, TABLE, reward=reward), "noise must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
