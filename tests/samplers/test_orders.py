"""Every exported deterministic solver converges at the order that its entry claims, on a mixture, down to t = 0.1."""

import itertools

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from fewstep import samplers
from fewstep.models import paths

WEIGHTS, MEANS, VARIANCES = np.array([0.3, 0.4, 0.3]), np.array([-1.2, 0.3, 1.0]), np.array([0.15, 0.2, 0.25])
X = np.linspace(-2.0, 2.0, 24)
SIZES = ((32, 64), (160, 320), (640, 1280))  # the later ones for what is not yet in the asymptotic range


def posterior_mean(path):
    """x0_of(x, t), the exact denoiser of the 1-d mixture."""

    def x0_of(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        total = alpha**2 * VARIANCES + sigma**2
        gap = x[:, None] - alpha * MEANS
        log_share = np.log(WEIGHTS) - 0.5 * gap**2 / total - 0.5 * np.log(total)
        share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        return (share * (MEANS + alpha * VARIANCES / total * gap)).sum(axis=1)

    return x0_of


def solved(path, x0_of, begin, end):
    """The probability-flow ODE by an eighth-order method of somebody else."""

    def velocity(t, x):
        x0 = x0_of(x, t)
        return path.alpha_prime(t) * x0 + path.sigma_prime(t) * (x - path.alpha(t) * x0) / path.sigma(t)

    return solve_ivp(velocity, (begin, end), X, method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]


def observed(tables, path, x0_of, exact, run_table):
    """log2 of the errors' ratio as the steps are halved, and the finer error."""
    errors = [np.sqrt(np.mean((run_table(table, path, X, x0_of) - exact) ** 2)) for table in tables]
    return np.log2(errors[0] / errors[1]), errors[1]


# beginning midway: there a first-order first step is seen, which at t_max of a VP path it is not
@pytest.mark.parametrize(
    "path, begin", [(paths.vp_linear(), 0.7), (paths.flow(), 0.7)], ids=["vp_linear", "flow"]
)
def test_observed_order_is_the_entry_s(path, begin, variants, run_table, build_table):
    x0_of = posterior_mean(path)
    exact = solved(path, x0_of, begin, 0.1)
    wrong, names = [], set()
    for name, options in variants:
        entry = getattr(samplers, name).entry
        theory = entry.order_of(**options)
        if theory == 0:  # no integrator: consistency, restart
            continue
        small = build_table(name, options, path, np.linspace(begin, 0.1, 6))
        if small is None or small.stochastic:
            continue
        names.add(name)
        used = {**entry.options, **options}
        # a rising start hides behind the later steps' larger error for a while: the slope may lie above its theory
        starts = used.get("start", "lower" if name == "abm" else None)
        rising = starts == "lower" and used.get("rk") is None and theory > 1
        for pair in SIZES:
            tables = [build_table(name, options, path, np.linspace(begin, 0.1, n + 1)) for n in pair]
            slope, error = observed(tables, path, x0_of, exact, run_table)
            sound = slope > theory - 0.2 and (rising or slope < theory + 0.6)
            if sound:
                break
        if not sound:
            wrong.append(
                f"{name}({options}): order {slope:.2f} where theory says {theory} (error {error:.1e})"
            )
    assert not wrong, "\n".join(wrong)
    assert {"ddim", "deis", "dpm_single", "dpmpp", "euler", "heun", "multistep", "rk", "unipc"} <= names


@pytest.mark.parametrize("form", ["eps", "x0", "v"])
@pytest.mark.parametrize("method", ["2heun", "3kutta", "4"])
def test_runge_kutta_keeps_its_order_from_alpha_zero(method, form, run_table, build_table):
    path = paths.flow()
    x0_of = posterior_mean(path)
    exact = solved(path, x0_of, 1.0, 0.1)
    tables = [
        build_table("rk", {"method": method, "form": form}, path, np.linspace(1.0, 0.1, n + 1))
        for n in (80, 160)
    ]
    slope, _ = observed(tables, path, x0_of, exact, run_table)
    # rho is infinite there: in the eps-form no method is of more than second order
    assert abs(slope - min(int(method[0]), 2 if form == "eps" else 4)) < 0.3


def test_a_wrong_coefficient_is_seen(run_table, build_table):
    """The negative control: 3kutta's last weights, a little off but still consistent, fall to first order."""
    from dataclasses import replace

    path = paths.vp_linear()
    x0_of = posterior_mean(path)
    exact = solved(path, x0_of, 0.7, 0.1)
    tables = []
    for n in (60, 120):
        table = build_table("rk", {"method": "3kutta"}, path, np.linspace(0.7, 0.1, n + 1))
        b = table.b.copy()
        for row in range(3, table.calls + 1, 3):
            first, last = table.slot[row - 3], table.slot[row - 1]
            moved = 0.02 * b[row, 0, :, last]
            b[row, 0, :, last] -= moved
            b[row, 0, :, first] += moved
        tables.append(replace(table, b=b))
    slope, _ = observed(tables, path, x0_of, exact, run_table)
    assert 0.8 < slope < 1.2


def test_tableaus_satisfy_the_order_conditions():
    from fewstep.samplers.rk import Tableau

    tableaus = __import__("sys").modules["fewstep.samplers.rk"].TABLEAUS
    assert isinstance(tableaus["4"], Tableau)
    for name, tableau in tableaus.items():
        s = len(tableau.b)
        a = np.zeros((s, s))
        for k, row in enumerate(tableau.a, start=1):
            assert len(row) == k, name
            a[k, :k] = row
        b, c = np.array(tableau.b), np.array(tableau.nodes)
        assert tableau.order == int(name[0])
        conditions = {
            1: [(b.sum(), 1)],
            2: [(b @ c, 1 / 2)],
            3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
            4: [(b @ c**3, 1 / 4), (b * c @ a @ c, 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
        }
        for got, want in itertools.chain.from_iterable(conditions[k] for k in range(1, tableau.order + 1)):
            assert got == pytest.approx(want, abs=1e-15), name
        if tableau.order < 4:
            assert any(abs(got - want) > 1e-3 for got, want in conditions[tableau.order + 1]), name
