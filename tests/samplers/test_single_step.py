"""Single-step, ancestral and re-noising solvers against their formulas, written out on numbers instead of tables."""

import math

import numpy as np
import pytest

from fewstep.models import paths
from fewstep.samplers import ddim, ddpm, deis, dpm_single, euler, fast_orders, grids, heun, restart, rk

X = np.linspace(-2.0, 2.0, 7)


def x0_of(path):
    """Some smooth, nonlinear network."""
    return lambda y, t: np.tanh(path.alpha(t) * y / (0.3 + path.sigma(t) ** 2))


def eps_of(path):
    return lambda y, t: (y - path.alpha(t) * x0_of(path)(y, t)) / path.sigma(t)


def test_heun_is_edm_s_algorithm_2_with_its_churn(run_table):
    path, n = paths.edm(), 9
    churn, low, high, noise = 20.0, 0.05, 50.0, 1.007
    times = grids.karras(path, n)
    z = np.random.default_rng(0).standard_normal((40, len(X)))
    table = heun(path, times, s_churn=churn, s_min=low, s_max=high, s_noise=noise)
    rows = [row for row in range(table.calls) if table.c[row + 1].any()]
    got = run_table(table, path, 80.0 * X, x0_of(path), lambda row: z[row])

    x, d = 80.0 * X, eps_of(path)  # dx/dsigma = (x - D) / sigma = eps
    draws = iter(rows)
    for s, t in zip(times[:-1], times[1:]):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= s <= high else 0.0
        hat = s * (1 + gamma)
        if gamma:
            x = x + math.sqrt(hat**2 - s**2) * noise * z[next(draws)]
        first = d(x, hat)
        new = x + (t - hat) * first
        if t != 0:
            new = x + (t - hat) * (first + d(new, t)) / 2
        x = new
    assert next(draws, None) is None and len(rows) > 3
    assert got == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("method", ["2heun", "3kutta", "4"])
def test_rho_rk_is_the_same_on_paths_with_the_same_noise_levels(method):
    vp, ve = paths.vp_linear(), paths.edm(sigma_max=200.0)
    times = grids.quadratic(vp, 6)
    one, other = (rk(path, t, method=method).unrolled() for path, t in ((vp, times), (ve, vp.rho(times))))
    assert one.d[-1] == pytest.approx(other.d[-1], rel=1e-9, abs=1e-11)
    assert np.array_equal(deis(vp, times, rk=method).unrolled().d, one.d)


@pytest.mark.parametrize("path", [paths.vp_linear(), paths.flow()], ids=lambda p: p.name)
@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_single_is_the_papers_formulas(order, form, path, run_table):
    s, n = path.time(-0.7), path.time(0.4)
    got = run_table(dpm_single(path, [s, n], order=order, form=form), path, X, x0_of(path))
    lam = path.lam(s)
    h = path.lam(n) - lam
    net = x0_of(path) if form == "x0" else eps_of(path)

    def first(t, r):  # DPM-Solver-1 over the fraction r of h
        if form == "x0":
            return path.sigma(t) / path.sigma(s) * X - path.alpha(t) * math.expm1(-r * h) * net(X, s)
        return path.alpha(t) / path.alpha(s) * X - path.sigma(t) * math.expm1(r * h) * net(X, s)

    def bend(t, r):  # what a slope of d in lam / h adds over the fraction r
        z = -r * h if form == "x0" else r * h
        phi = math.expm1(z) / z - 1
        return -path.alpha(t) * phi if form == "x0" else -path.sigma(t) * phi

    if order == 2:
        middle = path.time(lam + h / 2)
        slope = net(first(middle, 0.5), middle) - net(X, s)
        if form == "x0":
            want = first(n, 1.0) - path.alpha(n) * math.expm1(-h) * slope
        else:
            want = first(n, 1.0) - path.sigma(n) * math.expm1(h) * slope
    else:
        t1, t2 = path.time(lam + h / 3), path.time(lam + 2 * h / 3)
        one = net(first(t1, 1 / 3), t1) - net(X, s)
        two = net(first(t2, 2 / 3) + 2 * bend(t2, 2 / 3) * one, t2) - net(X, s)
        want = first(n, 1.0) + 1.5 * bend(n, 1.0) * two
    assert got == pytest.approx(want, abs=1e-12)


def test_fast_orders_spend_the_budget():
    path = paths.vp_linear()
    for calls in range(1, 25):
        orders = fast_orders(calls)
        assert sum(orders) == calls and orders[-1] == 1
        assert dpm_single(path, grids.logsnr(path, len(orders)), order=orders).calls == calls


def test_euler_in_any_form_and_small_variance_are_ddim(all_paths):
    for path in all_paths:
        times = grids.quadratic(path, 5)
        assert np.array_equal(ddpm(path, times).b, ddim(path, times, eta=1.0).b)
        assert np.array_equal(ddpm(path, times).c, ddim(path, times, eta=1.0).c)
        assert np.array_equal(euler(path, times, form="x0").b, rk(path, times, method="1euler", form="x0").b)
        assert euler(path, times, form="x0").b == pytest.approx(ddim(path, times).b, abs=1e-14)


def test_the_large_variance_is_beta():
    abar = paths.ddpm_alphas_cumprod()
    path = paths.vp_discrete(abar)
    table = ddpm(path, [999.0, 998.0, 997.0, -1.0], variance="large")
    betas = [1 - abar[999] / abar[998], 1 - abar[998] / abar[997]]
    assert table.c[1:3, 0, 0] ** 2 == pytest.approx(betas, rel=1e-9)
    assert table.c[3, 0, 0] == 0.0  # none on the last step


def test_lanes_hold_the_tables_side_by_side():
    path = paths.flow()
    both = np.stack([grids.uniform(path, 5), grids.shifted(path, 5, shift=3.0)])
    for solver, options in (
        (heun, {}),
        (heun, {"s_churn": 2.0}),
        (rk, {"method": "4"}),
        (dpm_single, {"order": 3}),
        (ddpm, {}),
    ):
        table = solver(path, both, **options)
        for lane in (0, 1):
            alone = solver(path, both[lane], **options)
            for name in ("t", "a", "b", "c"):
                assert getattr(table, name)[:, lane] == pytest.approx(
                    getattr(alone, name)[:, 0], rel=1e-12, abs=1e-13
                )


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda p, t: rk(p, t, method="5"), "method"),
        (lambda p, t: rk(p, t, form="v"), "straight path"),
        (lambda p, t: deis(p, t, rk="5"), "method"),
        (lambda p, t: heun(p, t, s_churn=-1.0), "s_churn"),
        (lambda p, t: dpm_single(p, t, order=4), "order"),
        (lambda p, t: dpm_single(p, t, order=[1, 2]), "one a step"),
        (lambda p, t: dpm_single(p, t, form="v"), "form"),
        (lambda p, t: ddpm(p, t, variance="learned"), "variance"),
        (lambda p, t: restart(p, t, intervals=((0.3, 0.06, 1, 1),)), "rho_low < rho_high"),
        (lambda p, t: restart(p, t, intervals=((0.1, 1.0, 0, 1),)), "repeats"),
        (lambda p, t: restart(p, t, intervals=((0.1, 1.0),)), "an interval is"),
        (lambda p, t: restart(p, t[[0, -1]]), "at least two steps"),
    ],
)
def test_bad_options_are_named(call, match):
    path = paths.vp_linear()
    with pytest.raises(ValueError, match=match):
        call(path, grids.karras(path, 10))
