"""The weights of exponential integrators against independent integrals: adaptive quadrature, mpmath, closed forms."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad

from fewstep.models import paths
from fewstep.samplers import grids
from fewstep.samplers.quadrature import decay, total, variable_at, weights

PATHS = {
    "vp_linear": paths.vp_linear(),
    "vp_cosine": paths.vp_cosine(),
    "edm": paths.edm(),
    "flow": paths.flow(),
}
RHO = (3.0, 1.9, 1.2, 0.7, 0.4)  # newest last: three past nodes, the start of the step, its end


def at(value) -> np.ndarray:
    return np.array([float(value)])


def integral(path, s, n, form, variable, degree, kernel=1.0) -> float:
    """g_n int w^degree d tau over the step, by adaptive quadrature in the form's own variable."""

    def w(t):
        return float(variable_at(path, variable, np.array(t))) ** degree

    if form == "eps":
        return (
            path.alpha(n)
            * quad(lambda q: w(path.time_of_rho(q)), path.rho(s), path.rho(n), epsabs=0, epsrel=1e-13)[0]
        )
    if form == "x0":  # in u = (snr / snr_n)^kernel
        low = (path.rho(n) / path.rho(s)) ** kernel
        snr = 1 / path.rho(n)
        inside = lambda u: w(path.time(math.log(snr) + math.log(u) / kernel))  # noqa: E731
        return path.alpha(n) * quad(inside, low, 1.0, epsabs=0, epsrel=1e-13)[0]
    return quad(w, s, n, epsabs=0, epsrel=1e-13)[0]


def step_of(path):
    """s, n and the nodes, newest first, as (1,) arrays, of a step between the noise levels RHO."""
    times = [at(path.time_of_rho(rho)) for rho in RHO]
    return times[-2], times[-1], times[-2::-1]


@pytest.mark.parametrize("variable", ["t", "rho", "lam", "snr", "vp"])
@pytest.mark.parametrize("form", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", PATHS)
def test_polynomials_up_to_the_degree_are_integrated_exactly(name, form, variable):
    path = PATHS[name]
    s, n, nodes = step_of(path)
    for count in (1, 2, 3, 4):
        b = np.array(weights(path, s, n, nodes[:count], form, variable))[:, 0]
        w = np.array([float(variable_at(path, variable, node)[0]) for node in nodes[:count]])
        for degree in range(count):
            exact = integral(path, float(s[0]), float(n[0]), form, variable, degree)
            assert abs(b @ w**degree - exact) < 1e-12 * np.abs(b * w**degree).sum(), (count, degree)


def test_reversed_nodes_are_caught():
    path = PATHS["vp_linear"]
    s, n, nodes = step_of(path)
    b = np.array(weights(path, s, n, nodes[2::-1], "x0", "lam"))[
        :, 0
    ]  # outputs newest first, times oldest first
    lam = np.array([path.lam(float(node[0])) for node in nodes[:3]])
    exact = integral(path, float(s[0]), float(n[0]), "x0", "lam", 1)
    assert abs(b.sum() - total(path, s, n, "x0")[0]) < 1e-14  # a constant does not see it
    assert abs(b @ lam - exact) > 1e-2


def test_nodes_may_come_in_any_order():
    path = PATHS["vp_cosine"]
    s, n, nodes = step_of(path)
    straight = weights(path, s, n, nodes, "eps", "t")
    np.testing.assert_allclose(weights(path, s, n, nodes[::-1], "eps", "t")[::-1], straight, rtol=1e-12)


@pytest.mark.parametrize("kernel", [1.0, 1.36, 2.0, 5.0])
@pytest.mark.parametrize("name", PATHS)
def test_stretched_kernels(name, kernel):
    path = PATHS[name]
    s, n, nodes = step_of(path)
    b = np.array(weights(path, s, n, nodes[:3], "x0", "lam", kernel))[:, 0]
    lam = np.array([path.lam(float(node[0])) for node in nodes[:3]])
    for degree in range(3):
        exact = integral(path, float(s[0]), float(n[0]), "x0", "lam", degree, kernel)
        assert abs(b @ lam**degree - exact) < 1e-12 * np.abs(b * lam**degree).sum()
    h = path.lam(float(n[0])) - path.lam(float(s[0]))
    expected = path.sigma(n) / path.sigma(s) * math.exp(-(kernel - 1) * h)
    np.testing.assert_allclose(decay(path, s, n, "x0", kernel), expected, rtol=1e-13)


def phi(k: int, z: float) -> mpmath.mpf:
    """phi_k(z) = sum_j z^j / (j + k)!, in 40 digits."""
    with mpmath.workdps(40):
        return mpmath.nsum(lambda j: mpmath.mpf(z) ** j / mpmath.factorial(j + k), [0, mpmath.inf])


@pytest.mark.parametrize("h", [1e-4, 1e-2, 0.3, 2.0])
@pytest.mark.parametrize("form", ["x0", "eps"])
def test_three_nodes_over_lam_are_the_phi_functions(form, h):
    """Moments +-G m! h phi_{m+1}(-+h), also where h^-3 would eat all digits of the recurrence for phi."""
    path = PATHS["edm"]
    r = [0.0, -0.8, -2.1]
    nodes = [at(math.exp(-v * h)) for v in r]
    s, n = nodes[0], at(math.exp(-h))
    moments = [
        (float(path.alpha(n)[0]) * math.factorial(m) * h * phi(m + 1, -h)) if form == "x0"
        else (-float(path.sigma(n)[0]) * math.factorial(m) * h * phi(m + 1, h))
        for m in range(3)
    ]  # fmt: skip
    with mpmath.workdps(40):
        vandermonde = mpmath.matrix([[mpmath.mpf(v) ** m for v in r] for m in range(3)])
        exact = [float(v) for v in mpmath.lu_solve(vandermonde, mpmath.matrix(moments))]
    b = np.array(weights(path, s, n, nodes, form, "lam"))[:, 0]
    # the step length itself is only known to an ulp of lam
    assert np.abs(b - exact).max() < 1e-12 * np.abs(exact).max() + 4e-16


def test_published_rules_change_one_moment():
    """Sums of b_j r_j^m, r = (lam_j - lam_s)/h: bh2 takes A0/2 for the first, bh1 h/2, shipped half of the second."""
    path = PATHS["vp_linear"]
    s, n, nodes = step_of(path)
    lam_s, lam_n = path.lam(s)[0], path.lam(n)[0]
    h = lam_n - lam_s
    r = np.array([(path.lam(node)[0] - lam_s) / h for node in nodes])
    for form, whole, linear in (
        ("x0", path.alpha(n)[0] * -math.expm1(-h), path.alpha(n)[0] * h),
        ("eps", -path.sigma(n)[0] * math.expm1(h), -path.sigma(n)[0] * h),
    ):
        for rule, first in (("bh2", whole / 2), ("shipped", whole / 2), ("bh1", linear / 2)):
            b = np.array(weights(path, s, n, nodes[:2], form, "lam", rule=rule))[:, 0]
            assert [b.sum(), b @ r[:2]] == pytest.approx([whole, first], rel=1e-12)
        exact = np.array(weights(path, s, n, nodes[:3], form, "lam"))[:, 0]
        shipped = np.array(weights(path, s, n, nodes[:3], form, "lam", rule="shipped"))[:, 0]
        assert shipped @ r[:3] ** 2 == pytest.approx(exact @ r[:3] ** 2 / 2, rel=1e-11)
        assert shipped @ r[:3] == pytest.approx(exact @ r[:3], rel=1e-12)
        for rule in ("bh1", "bh2"):  # these have nothing to say about three nodes
            np.testing.assert_array_equal(
                np.array(weights(path, s, n, nodes[:3], form, "lam", rule=rule))[:, 0], exact
            )


# --- the ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("variable", ["t", "rho", "vp"])
def test_x0_down_to_sigma_zero_is_the_interpolant_at_the_end(name, variable):
    path = PATHS[name]
    s, _, nodes = step_of(path)
    end = at(path.t_clean)
    b = np.array(weights(path, s, end, nodes[:3], "x0", variable))[:, 0]
    w = np.array([float(variable_at(path, variable, node)[0]) for node in nodes[:3]])
    assert [b @ w**m for m in range(3)] == pytest.approx([1.0, 0.0, 0.0], abs=1e-13)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("variable", ["t", "rho", "lam", "vp"])
def test_eps_down_to_sigma_zero(name, variable):
    path = PATHS[name]
    s, _, nodes = step_of(path)
    end = at(path.t_clean)
    b = np.array(weights(path, s, end, nodes, "eps", variable))[:, 0]
    w = np.array([float(variable_at(path, variable, node)[0]) for node in nodes])
    rho = path.rho(float(s[0]))
    for m in range(4):
        if variable == "lam":  # int (ln q)^m dq = q sum_i (-1)^i m!/(m-i)! (ln q)^(m-i), 0 at q = 0
            log = math.log(rho)
            powers = sum((-1) ** i * math.perm(m, i) * log ** (m - i) for i in range(m + 1))
            exact = -((-1) ** m) * rho * powers
        else:
            exact = integral(path, float(s[0]), path.t_clean, "eps", variable, m)
        assert abs(b @ w**m - exact) < 1e-12 * np.abs(b * w**m).sum()


@pytest.mark.parametrize(
    "form, variable", [("eps", "t"), ("eps", "rho"), ("eps", "lam"), ("x0", "t"), ("x0", "rho"), ("v", "lam")]
)
def test_limits_at_sigma_zero_are_limits(form, variable):
    path = PATHS["flow"]
    s, _, nodes = step_of(path)
    limit = np.array(weights(path, s, at(path.t_clean), nodes[:3], form, variable))
    gaps = [
        np.abs(np.array(weights(path, s, at(path.time_of_rho(rho)), nodes[:3], form, variable)) - limit).max()
        for rho in (1e-5, 1e-7, 1e-9)
    ]
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] and gaps[2] < 1e-5  # like rho log^2 rho


def test_v_over_lam_down_to_sigma_zero():
    path = PATHS["flow"]
    s, _, nodes = step_of(path)
    b = np.array(weights(path, s, at(0.0), nodes[:3], "v", "lam"))[:, 0]
    lam = np.array([path.lam(float(node[0])) for node in nodes[:3]])
    with mpmath.workdps(30):
        for m in range(3):
            exact = -mpmath.quad(
                lambda t, m=m: (mpmath.log(1 - t) - mpmath.log(t)) ** m, [0, 0.01, float(s[0])]
            )
            assert abs(b @ lam**m - float(exact)) < 1e-12 * np.abs(b * lam**m).sum()


@pytest.mark.parametrize("form, variable", [("x0", "lam"), ("x0", "snr"), ("eps", "snr"), ("v", "snr")])
def test_where_no_limit_exists_the_step_is_first_order(form, variable):
    path = PATHS["flow"]
    s, _, nodes = step_of(path)
    b = weights(path, s, at(0.0), nodes[:3], form, variable)
    assert [float(v[0]) for v in b] == [total(path, s, at(0.0), form)[0], 0.0, 0.0]


@pytest.mark.parametrize(
    "variable, kept", [("lam", False), ("rho", False), ("vp", False), ("t", True), ("snr", True)]
)
def test_a_node_at_alpha_zero(variable, kept):
    path = PATHS["flow"]
    b = weights(path, at(0.8), at(0.6), [at(0.8), at(1.0)], "x0", variable)
    assert (b[1][0] != 0) == kept
    assert sum(b)[0] == pytest.approx(total(path, at(0.8), at(0.6), "x0")[0], rel=1e-14)


def test_a_step_from_alpha_zero():
    """From t = 1 of a flow: one node takes all; a corrector over 1/rho has the trapezoidal rule, as has bh2."""
    path = PATHS["flow"]
    s, n = at(1.0), at(0.75)
    for variable in ("t", "rho", "lam", "snr"):
        assert weights(path, s, n, [s], "x0", variable)[0][0] == pytest.approx(0.25)
    for b in (weights(path, s, n, [n, s], "x0", "snr"), weights(path, s, n, [n, s], "x0", "lam", rule="bh2")):
        assert [float(v[0]) for v in b] == pytest.approx([0.125, 0.125])


def test_a_thousand_steps_are_as_exact_as_ten():
    """Even steps of t on a flow in v form: Adams-Bashforth's own numbers, however short the steps."""
    path = PATHS["flow"]
    classic = np.array([55, -59, 37, -9]) / 24
    for n in (10, 1000):
        t = grids.uniform(path, n)
        k = n // 2
        nodes = [at(t[k - j]) for j in range(4)]
        b = np.array(weights(path, at(t[k]), at(t[k + 1]), nodes, "v", "t"))[:, 0]
        np.testing.assert_allclose(b / (t[k + 1] - t[k]), classic, rtol=1e-12 * n)
        for form, variable in (("x0", "lam"), ("eps", "lam"), ("eps", "t"), ("x0", "t")):
            b = np.array(weights(path, at(t[k]), at(t[k + 1]), nodes, form, variable))[:, 0]
            assert np.abs(b / total(path, at(t[k]), at(t[k + 1]), form)[0] - classic).max() < 20 / n


@pytest.mark.parametrize("call, message", [
    (lambda p, s, n: weights(p, s, n, [s], "score", "t"), "form"),
    (lambda p, s, n: weights(p, s, n, [s], "x0", "time"), "variable"),
    (lambda p, s, n: weights(p, s, n, [s], "x0", "t", rule="heun"), "rule"),
])  # fmt: skip
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(PATHS["flow"], at(0.5), at(0.4))
