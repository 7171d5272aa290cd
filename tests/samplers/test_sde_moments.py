"""Stochastic solvers on Gaussian data, where all is linear: moments through the table's coefficients, no Monte Carlo.

A state is the vector of its coefficients over (1, opening noise, z_0 .. z_R); its mean is the first, its variance the
sum of the other squares.
"""

import numpy as np
import pytest

from fewstep import samplers
from fewstep.models import paths
from fewstep.samplers import grids, heun, restart

MEAN, VARIANCE = 0.6, 0.3
SIZES = ((60, 120), (160, 320))  # the second for what is not yet in the asymptotic range


def moments(table, path, begin, run_table, mean, variance, everywhere=False):
    """(mean, variance) of the result, or of every call's point with its time, from the exact marginal at ``begin``."""
    width = table.calls + 3
    one = np.eye(width)[0]

    def x0_of(y, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        return mean * one + alpha * variance / (alpha**2 * variance + sigma**2) * (y - alpha * mean * one)

    alpha, sigma = path.alpha(begin), path.sigma(begin)
    start = alpha * mean * one + np.sqrt(alpha**2 * variance + sigma**2) * np.eye(width)[1]
    seen = []
    x = run_table(table, path, start, x0_of, lambda row: np.eye(width)[3 + row], seen)
    if everywhere:
        return [(t, y[0], (y[1:] ** 2).sum()) for t, y in seen]
    return np.array([x[0], (x[1:] ** 2).sum()])


def marginal(path, t, mean, variance):
    """The mean and the variance that samples at time t must have."""
    return np.array([path.alpha(t) * mean, path.alpha(t) ** 2 * variance + path.sigma(t) ** 2])


def weak_slope(name, options, path, begin, end, sizes, run_table, build_table):
    """log2 of the ratio of the moments' errors as steps are halved."""
    errors = []
    for n in sizes:
        table = build_table(name, options, path, np.linspace(begin, end, n + 1))
        got = moments(table, path, begin, run_table, MEAN, VARIANCE)
        errors.append(np.abs(got - marginal(path, end, MEAN, VARIANCE)).max())
    return np.log2(errors[0] / errors[1]), errors[1]


@pytest.mark.parametrize(
    "path, begin", [(paths.vp_linear(), 0.7), (paths.flow(), 0.8)], ids=["vp_linear", "flow"]
)
def test_weak_order_is_the_entry_s(path, begin, variants, run_table, build_table):
    wrong, names = [], set()
    for name, options in variants:
        theory = getattr(samplers, name).entry.order_of(**options)
        if theory == 0:
            continue
        small = build_table(name, options, path, np.linspace(begin, 0.2, 6))
        if small is None or not small.stochastic:
            continue
        names.add(name)
        for sizes in SIZES:
            slope, error = weak_slope(name, options, path, begin, 0.2, sizes, run_table, build_table)
            if slope > theory - 0.2:
                break
        else:
            wrong.append(
                f"{name}({options}): weak order {slope:.2f} where theory says {theory} (error {error:.1e})"
            )
    assert not wrong, "\n".join(wrong)
    assert {"ddim", "ddpm", "heun", "sde_dpmpp", "sa", "ersde"} <= names


def test_moments_of_every_point_are_exact_for_a_point_mass(variants, run_table, build_table, all_paths):
    """Mean alpha m and variance sigma^2 at every call, be it a stage, churned or re-noised, on every path."""
    seen, worst = set(), 0.0
    for path in all_paths:
        times = grids.karras(path, 7)
        for name, options in variants:
            chosen = {**getattr(samplers, name).entry.options, **options}
            # both are wider than their marginals, by what other tests say
            if chosen.get("variance") == "large" or chosen.get("scheme") == "euler":
                continue
            table = build_table(name, options, path, times)
            if table is None or not table.stochastic:
                continue
            seen.add(name)
            for t, mean, variance in moments(table, path, path.t_max, run_table, MEAN, 0.0, everywhere=True):
                want = marginal(path, t, MEAN, 0.0)
                worst = max(worst, abs(mean - want[0]), abs(variance - want[1]) / max(want[1], 1e-3))
    # what cancels in the rows is alpha_n/alpha_s times float64's rounding, up to 164 on the cosine path
    assert worst < 1e-11
    assert {"consistency", "ddim", "ddpm", "heun", "restart", "sde_dpmpp", "sa", "ersde"} <= seen


def test_restart_on_gaussian_data_is_as_good_as_its_solver(run_table, all_paths):
    """Re-noising is exact, so halving all steps, the intervals' too, divides the moments' error by four, as Heun's."""
    for path in all_paths:
        end = path.time_of_rho(0.02)
        want = marginal(path, end, MEAN, VARIANCE)
        errors = []
        for n in (40, 80):
            intervals = ((0.06, 0.3, 2, n // 2), (0.5, 2.0, 1, n // 2))
            table = restart(path, grids.karras(path, n, t_min=end, end="t_min"), intervals=intervals)
            assert table.stochastic and table.calls == 2 * (n + 3 * (n // 2))
            errors.append(np.abs(moments(table, path, path.t_max, run_table, MEAN, VARIANCE) - want).max())
        assert errors[1] < 2e-3 and errors[0] / errors[1] > 3.3, (path.name, errors)


def test_churn_carries_a_marginal_onto_a_marginal():
    """a^2 (alpha_s^2 v + sigma_s^2) + c^2 = alpha_hat^2 v + sigma_hat^2, for any v."""
    for path, begin in ((paths.vp_linear(), 0.5), (paths.flow(), 0.6), (paths.edm(), 3.0)):
        table = heun(path, [begin, begin / 2, 0.0], s_churn=0.5)
        t = float(table.t[0, 0])
        a, c = table.a[0, 0, 1].sum() / path.sigma(begin), table.c[0, 0, 1]
        assert path.rho(t) == pytest.approx(1.25 * path.rho(begin), rel=1e-12)
        for variance in (0.0, 0.3, 4.0):
            before, after = (marginal(path, at, MEAN, variance) for at in (begin, t))
            assert [a * before[0], a**2 * before[1] + c**2] == pytest.approx(list(after), rel=1e-12)


def test_too_much_noise_is_seen(run_table, build_table):
    """The negative controls: variance="large" and s_noise = 1.1 leave the marginals, by what they should."""
    path = paths.vp_linear()
    times = np.linspace(0.7, 0.2, 41)
    for name, options in (("ddpm", {"variance": "large"}), ("heun", {"s_churn": 5.0, "s_noise": 1.1})):
        table = build_table(name, options, path, times)
        points = moments(table, path, 0.7, run_table, MEAN, 0.0, everywhere=True)
        excess = max(variance / path.sigma(t) ** 2 - 1 for t, _, variance in points)
        assert 1e-3 < excess < 0.3, name
