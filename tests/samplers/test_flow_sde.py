"""Flow-GRPO's sampler: the printed step, the noise it leaves, one sampler on every path, marginals in the limit."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.models import GaussianMixture, paths
from fewstep.samplers import ddim, flow_sde, grids
from fewstep.samplers.transitions import transitions

MEAN, VARIANCE = 0.6, 0.3


def moments(table, path, mean, variance):
    """(mean, variance) of what a Markov table draws of a Gaussian's exact denoiser, from its marginal at the start."""
    d = gaussian(path, mean, VARIANCE)  # any one will do to read the table by
    at = float(table.times[0])
    m, v = path.alpha(at) * mean, path.alpha(at) ** 2 * variance + path.sigma(at) ** 2
    for step in transitions(table.on(d)):
        alpha, sigma = path.alpha(step.t), path.sigma(step.t)
        share = alpha * variance / (alpha**2 * variance + sigma**2)  # of x in D(x)
        slope = step.keep + step.gain * share
        m, v = slope * m + step.gain * (mean - share * alpha * mean), slope**2 * v + step.std**2
    return m, v


def gaussian(path, mean, variance):
    return GaussianMixture([1.0], [[mean]], variance).denoiser(path)


def test_the_step_is_the_one_that_the_paper_prints():
    path = paths.flow()
    times = np.array([1.0, 0.8, 0.55, 0.2, 0.0])
    steps = transitions(flow_sde(path, times, a=0.7).on(gaussian(path, MEAN, VARIANCE)))
    x, x0 = 0.37, -1.2
    for i, step in enumerate(steps):
        sigma, dt = times[i], times[i + 1] - times[i]
        spread = 0.7 * np.sqrt(sigma / (1 - (times[1] if sigma == 1 else sigma)))
        v = (x - x0) / sigma
        mean = x * (1 + spread**2 / (2 * sigma) * dt) + v * (1 + spread**2 * (1 - sigma) / (2 * sigma)) * dt
        assert step.keep * x + step.gain * x0 == pytest.approx(mean, rel=1e-12)
        assert step.std == pytest.approx(spread * np.sqrt(-dt), rel=1e-12)


@pytest.mark.parametrize("scheme", ["euler", "preserving"])
@pytest.mark.parametrize("path", [paths.vp_linear(), paths.edm(), paths.flow()], ids=lambda p: p.name)
def test_marginals_are_the_path_s_as_steps_are_added(path, scheme):
    level = path.time_of_rho(np.exp(np.linspace(np.log(9.0), np.log(0.05), 1281)))
    errors = []
    for stride in (16, 8, 4, 2, 1):
        m, v = moments(flow_sde(path, level[::stride], scheme=scheme), path, MEAN, VARIANCE)
        end = float(level[-1])
        wanted = path.alpha(end) ** 2 * VARIANCE + path.sigma(end) ** 2
        errors.append(max(abs(m - path.alpha(end) * MEAN), abs(v - wanted)))
    assert errors[-1] < 0.02 and errors[-2] / errors[-1] == pytest.approx(2.0, abs=0.3), errors


def test_it_is_one_sampler_on_every_path():
    """Its steps at the same noise levels draw the same numbers, at the paths' own scales."""
    level = np.exp(np.linspace(np.log(30.0), np.log(0.1), 9))
    found = {}
    for path in (paths.vp_linear(), paths.edm(), paths.flow()):
        for scheme in ("euler", "preserving"):
            m, v = moments(flow_sde(path, path.time_of_rho(level), scheme=scheme), path, MEAN, VARIANCE)
            alpha = path.alpha(float(path.time_of_rho(level)[-1]))
            found.setdefault(scheme, []).append((m / alpha, v / alpha**2))
    for values in found.values():
        np.testing.assert_allclose(values, [values[0]] * 3, rtol=1e-9)
    assert abs(found["euler"][0][1] - found["preserving"][0][1]) > 1e-3  # and it is two, the schemes differ


def test_euler_leaves_the_noise_that_it_should_and_preserving_none():
    """Of a point, the variance after a step is s^2 + S^2 l^2 / t + S^4 l^2 / (4 t^2), with l = t - s."""
    path, t, s, a = paths.flow(), 0.6, 0.5, 0.7
    variance = a * a * t / (1 - s)  # a first step has the next time in 1 - t
    table = flow_sde(path, [t, s])
    excess = moments(table, path, MEAN, 0.0)[1] - s * s
    length = t - s
    assert excess == pytest.approx(variance * length**2 / t + variance**2 * length**2 / (4 * t * t), rel=1e-9)
    assert moments(flow_sde(path, [t, s], scheme="preserving"), path, MEAN, 0.0)[1] == pytest.approx(s * s)
    whole = grids.uniform(path, 10)
    last = [float(flow_sde(path, whole, scheme=scheme).c[-1, 0, 0]) for scheme in ("euler", "preserving")]
    assert last[0] == pytest.approx(0.7 * np.sqrt(0.1 / 0.9 * 0.1)) and last[1] == 0.0


def test_without_noise_it_is_ddim():
    for path in (paths.edm(), paths.flow()):
        times = grids.vp(path, 6)
        ours, theirs = flow_sde(path, times, a=0.0), ddim(path, times)
        np.testing.assert_allclose(ours.unrolled().d, theirs.unrolled().d, atol=1e-12)
        np.testing.assert_allclose(ours.unrolled().noise, theirs.unrolled().noise, atol=1e-9)
        assert not ours.stochastic


def test_bad_options():
    path = paths.flow()
    with pytest.raises(ValueError, match="a must lie"):
        flow_sde(path, [1.0, 0.0], a=-1.0)
    with pytest.raises(ValueError, match="scheme must be"):
        flow_sde(path, [1.0, 0.0], scheme="heun")
