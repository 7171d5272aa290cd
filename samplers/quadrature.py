"""Coefficients of exponential integrators: the exact solution of the PF-ODE if its d were a polynomial.

In each form the ODE is a pure quadrature after a change of variables,

    eps:  d(x/alpha) / d rho = eps      x0:  d(x/sigma) / d(1/rho) = x0      v:  dx/dt = v

so with d replaced by its Lagrange interpolant in a variable w (t, rho, lam or snr = 1/rho) over known nodes,

    x_n = (g_n / g_s) x_s + sum_j b_j d_j,      b_j = g_n  int l_j(w) d tau,     g = alpha, sigma, 1

Integrals run over lam by Gauss-Legendre where lam is finite at both ends, and otherwise by what is exact in the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..models.paths import Path, vp_linear

_VP = vp_linear()
VARIABLES = ("t", "rho", "lam", "snr", "vp")
_NODES = 64


@lru_cache(maxsize=4)
def _legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(count)


@lru_cache(maxsize=1)
def _laguerre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.laguerre.laggauss(8)


def gauss_legendre(
    lower: np.ndarray, upper: np.ndarray, count: int = _NODES
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [lower, upper]: (count, lanes) each."""
    x, w = _legendre(count)
    half = (upper - lower) / 2
    return (upper + lower) / 2 + half * x[:, None], half * w[:, None]


def variable_at(path: Path, variable: str, t: np.ndarray) -> np.ndarray:
    """The interpolation variable at times t."""
    if variable == "t":
        return t
    if variable == "rho":
        return path.rho(t)
    if variable == "lam":
        return path.lam(t)
    if variable == "snr":
        with np.errstate(divide="ignore"):
            return path.alpha(t) / path.sigma(t)
    if variable == "vp":
        return vp_time(path.lam(t))
    raise ValueError(f"variable must be one of {', '.join(VARIABLES)}, got {variable!r}")


def vp_time(lam: np.ndarray) -> np.ndarray:
    """The time at which the linear VP path has this log-SNR; infinite where there is no signal.

    The ODE does not know which path its noise levels came from, and x0 is smooth in this time at both ends (in rho^2
    near the data, in sqrt(log rho) near the noise), so it serves as a variable on every path.
    """
    signal = np.isfinite(lam) | (lam > 0)
    return np.where(signal, _VP.time(np.where(signal, lam, 0.0)), np.inf)


def vp_lam(u: np.ndarray) -> np.ndarray:
    """The inverse of ``vp_time``."""
    return _VP.lam(u)


def lagrange(nodes: Sequence[np.ndarray], at: np.ndarray) -> list[np.ndarray]:
    """The Lagrange basis l_j over ``nodes`` (each (lanes,)), evaluated at ``at`` (points, lanes)."""
    basis = []
    for j, node in enumerate(nodes):
        value = np.ones_like(at)
        for k, other in enumerate(nodes):
            if k != j:
                value = value * (at - other) / (node - other)
        basis.append(value)
    return basis


def decay(
    path: Path, s: np.ndarray, n: np.ndarray, form: str, kernel: np.ndarray | float = 1.0
) -> np.ndarray:
    """g_n / g_s: what the step does to x before anything is added.

    ``kernel`` = 1 + tau^2 > 1 is the reverse SDE in x0 form: (sigma_n / sigma_s) e^(-tau^2 h), where h = lam_n - lam_s.
    """
    if form == "eps":
        return path.alpha(n) / path.alpha(s)
    if form == "x0":
        plain = path.sigma(n) / path.sigma(s)
        return plain * (plain * path.alpha(s) / path.alpha(n)) ** (np.asarray(kernel) - 1.0)
    if form == "v":
        return np.ones_like(s)
    raise ValueError(f"form must be eps, x0 or v, got {form!r}")


def total(
    path: Path, s: np.ndarray, n: np.ndarray, form: str, kernel: np.ndarray | float = 1.0
) -> np.ndarray:
    """What the coefficients b_j of a step add up to, whatever the nodes: the step is exact for a point mass."""
    a = decay(path, s, n, form, kernel)
    if form == "eps":
        return path.sigma(n) - a * path.sigma(s)
    if form == "x0":
        return path.alpha(n) - a * path.alpha(s)
    return n - s


def weights(
    path: Path,
    s: np.ndarray,
    n: np.ndarray,
    nodes: Sequence[np.ndarray],
    form: str,
    variable: str,
    kernel: np.ndarray | float = 1.0,
    rule: str = "exact",
    limit: bool = True,
) -> list[np.ndarray]:
    """b_j for a step from times s to n (lanes,), with d known at the times ``nodes``, each (lanes,).

    A node where the variable is infinite (lam or rho at alpha = 0) has weight 0: it drops out, as in the limit. Where
    no limit exists (x0 over lam, down to sigma = 0) the step is first order; with ``limit=False`` it is so wherever lam
    is infinite at the end, since a polynomial in lam extrapolates badly to there.

    ``rule`` names the weights that published codes use in place of the exact moment of highest degree, over lam:
    "bh1" and "bh2" with two nodes; "shipped" is "bh2" with two nodes, and with three half of the second moment.
    """
    kernel = np.broadcast_to(np.asarray(kernel, dtype=np.float64), s.shape)
    with np.errstate(divide="ignore"):
        finite = np.isfinite(
            [path.lam(s), path.lam(n), *(variable_at(path, variable, node) for node in nodes)]
        )
    answer = np.zeros((len(nodes), len(s)))
    for kind in np.unique(finite, axis=1).T:  # lanes that have the same limits to take
        lanes = (finite == kind[:, None]).all(axis=0)
        cut = [node[lanes] for node in nodes]
        answer[:, lanes] = _weights(path, s[lanes], n[lanes], cut, form, variable, kernel[lanes], rule, limit)
    return list(answer)


def _weights(path, s, n, nodes, form, variable, kernel, rule, limit) -> np.ndarray:
    whole = total(path, s, n, form, kernel)
    if rule not in ("exact", "shipped", "bh1", "bh2"):
        raise ValueError(f"rule must be exact, shipped, bh1 or bh2, got {rule!r}")
    places = [variable_at(path, variable, node) for node in nodes]
    usable = [j for j, place in enumerate(places) if np.isfinite(place).all()]
    answer = np.zeros((len(nodes), len(s)))
    if len(nodes) == 2 and rule != "exact":
        return _pair(path, s, n, nodes, form, kernel, rule, whole)
    # down to sigma = 0 only t and rho have polynomials that all forms can integrate; eps and v can also do with lam
    open_ended = variable == "snr" or (variable == "lam" and (form == "x0" or not limit))
    if len(usable) <= 1 or (open_ended and not np.isfinite(path.lam(n)).all()):
        answer[usable[0] if usable else 0] = whole
        return answer
    points, measure = _measure(path, s, n, form, variable, kernel)
    raw = np.array([(measure * value).sum(axis=0) for value in lagrange([places[j] for j in usable], points)])
    scale = whole / raw.sum(axis=0)  # 1 up to rounding: makes the point-mass identity exact
    answer[usable] = raw * scale
    if rule == "shipped" and len(usable) == 3:
        start = variable_at(path, variable, s)
        second = (measure * (points - start) ** 2).sum(axis=0) * scale
        for j in usable:
            others = [places[j] - places[k] for k in usable if k != j]
            answer[j] -= 0.5 * second / (others[0] * others[1])
    return answer


def _pair(path, s, n, nodes, form, kernel, rule, whole) -> np.ndarray:
    """Two nodes over lam, one of them s: first moment half the zeroth ("bh2", "shipped") or linear in h ("bh1")."""
    here = next((j for j, node in enumerate(nodes) if (node == s).all()), None)
    if here is None:
        raise ValueError("one of the two nodes must be the start of the step")
    other = nodes[1 - here]
    lam_s, lam_n, lam_other = path.lam(s), path.lam(n), path.lam(other)
    answer = np.zeros((2, len(s)))
    if not np.isfinite(lam_n).all():
        answer[here] = whole
        return answer
    first = 0.5 * whole
    if rule == "bh1" and np.isfinite(lam_s).all():
        first = 0.5 * (lam_n - lam_s) * (path.alpha(n) * kernel if form == "x0" else -path.sigma(n))
    position = np.ones_like(s) if (other == n).all() else (lam_other - lam_s) / (lam_n - lam_s)
    answer[1 - here] = first / position
    answer[here] = whole - answer[1 - here]
    return answer


def _measure(path, s, n, form, variable, kernel) -> tuple[np.ndarray, np.ndarray]:
    """Points in the variable and weights g_n d tau that integrate a smooth function of it over the step."""
    lam_s, lam_n = path.lam(s), path.lam(n)
    if form == "v":
        # t - n = (s - n) u^8 smooths the logarithm that lam has near the clean end
        u, w = gauss_legendre(np.ones_like(s), np.zeros_like(s))
        t, w = n + (s - n) * u**8, (s - n) * 8 * u**7 * w
        return variable_at(path, variable, t), w
    if np.isfinite(lam_s).all() and np.isfinite(lam_n).all():
        if form == "eps":
            lam, w = gauss_legendre(lam_s, lam_n)
            return variable_at(path, variable, path.time(lam)), w * (-path.alpha(n) * np.exp(-lam))
        # what lies 40 / kernel before the end weighs less than a rounding error
        lam, w = gauss_legendre(np.maximum(lam_s, lam_n - 40.0 / kernel), lam_n)
        return variable_at(path, variable, path.time(lam)), w * (
            path.alpha(n) * kernel * np.exp(kernel * (lam - lam_n))
        )
    if form == "x0":
        if np.isfinite(lam_s).all():  # sigma_n = 0: everything happens at the end
            return variable_at(path, variable, n)[None], path.alpha(n)[None]
        u, w = gauss_legendre(np.zeros_like(lam_n), np.ones_like(lam_n))  # alpha_s = 0: uniform in snr^kernel
        return variable_at(path, variable, path.time(lam_n + np.log(u) / kernel)), w * path.alpha(n)
    if (
        variable == "lam"
    ):  # eps down to sigma = 0: int e^-lam polynomial(lam), which Gauss-Laguerre does exactly
        x, w = _laguerre()
        return lam_s + x[:, None], -path.alpha(n) * np.exp(-lam_s) * w[:, None]
    rho, w = gauss_legendre(path.rho(s), path.rho(n))
    return variable_at(path, variable, path.time_of_rho(rho)), w * path.alpha(n)
