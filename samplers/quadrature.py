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

from ..models.paths import Path

VARIABLES = ("t", "rho", "lam", "snr")
_NODES = 64


@lru_cache(maxsize=4)
def _legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(count)


@lru_cache(maxsize=1)
def _laguerre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.laguerre.laggauss(8)


def gauss_legendre(lower: np.ndarray, upper: np.ndarray, count: int = _NODES) -> tuple[np.ndarray, np.ndarray]:
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
    raise ValueError(f"variable must be one of {', '.join(VARIABLES)}, got {variable!r}")


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


def decay(path: Path, s: np.ndarray, n: np.ndarray, form: str) -> np.ndarray:
    """g_n / g_s: what the step does to x before anything is added."""
    if form == "eps":
        return path.alpha(n) / path.alpha(s)
    if form == "x0":
        return path.sigma(n) / path.sigma(s)
    if form == "v":
        return np.ones_like(s)
    raise ValueError(f"form must be eps, x0 or v, got {form!r}")


def total(path: Path, s: np.ndarray, n: np.ndarray, form: str) -> np.ndarray:
    """What the coefficients b_j of an ODE step add up to, whatever the nodes: the step is exact for a point mass."""
    a = decay(path, s, n, form)
    if form == "eps":
        return path.sigma(n) - a * path.sigma(s)
    if form == "x0":
        return path.alpha(n) - a * path.alpha(s)
    return n - s


def weights(path: Path, s: np.ndarray, n: np.ndarray, nodes: Sequence[np.ndarray], form: str, variable: str) -> list[np.ndarray]:
    """b_j for a step from times s to n (lanes,), with d known at the times ``nodes``, each (lanes,).

    A node where the variable is infinite (lam or rho at alpha = 0) has weight 0: it drops out, as in the limit.
    """
    whole = total(path, s, n, form)
    places = [variable_at(path, variable, node) for node in nodes]
    usable = [j for j, place in enumerate(places) if np.isfinite(place).all()]
    answer = [np.zeros_like(whole) for _ in nodes]
    if len(usable) <= 1 or (form == "x0" and not np.isfinite(variable_at(path, variable, n)).all()):
        # x0 has no polynomial in lam or snr up to sigma = 0: there only first order makes sense
        answer[usable[0] if usable else 0] = whole
        return answer
    points, measure = _measure(path, s, n, form, variable)
    basis = lagrange([places[j] for j in usable], points)
    raw = [(measure * l).sum(axis=0) for l in basis]  # noqa: E741
    scale = whole / sum(raw)  # 1 up to rounding: makes the point-mass identity exact
    for j, value in zip(usable, raw, strict=True):
        answer[j] = value * scale
    return answer


def _measure(path: Path, s: np.ndarray, n: np.ndarray, form: str, variable: str) -> tuple[np.ndarray, np.ndarray]:
    """Points in the variable and weights g_n d tau that integrate a smooth function of it over the step."""
    if form == "v":
        t, w = gauss_legendre(s, n)
        return variable_at(path, variable, t), w
    lam_s, lam_n = path.lam(s), path.lam(n)
    if np.isfinite(lam_s).all() and np.isfinite(lam_n).all():
        lam, w = gauss_legendre(lam_s, lam_n)
        density = path.sigma(n) * np.exp(lam) if form == "x0" else -path.alpha(n) * np.exp(-lam)
        return variable_at(path, variable, path.time(lam)), w * density
    if form == "x0":
        if np.isfinite(lam_s).all():  # sigma_n = 0: everything happens at the end
            return variable_at(path, variable, n)[None], path.alpha(n)[None]
        snr, w = gauss_legendre(np.zeros_like(lam_n), np.exp(lam_n))  # alpha_s = 0
        return variable_at(path, variable, path.time(np.log(snr))), w * path.sigma(n)
    if variable == "lam":  # eps down to sigma = 0: int e^-lam (polynomial in lam) is Gauss-Laguerre's own, hence exact
        x, w = _laguerre()
        return lam_s + x[:, None], -path.alpha(n) * np.exp(-lam_s) * w[:, None]
    rho, w = gauss_legendre(path.rho(s), path.rho(n))
    return variable_at(path, variable, path.time_of_rho(rho)), w * path.alpha(n)
