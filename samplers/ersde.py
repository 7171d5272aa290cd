"""ER-SDE-Solver (2309.06169): the reverse SDEs of any noise-scale function f of rho = sigma / alpha, in x0 form.

    x_n = (alpha_n / alpha_s) r x_s + alpha_n [(1 - r) m_0 + M1 m' + M2 m''/2] + alpha_n sqrt(rho_n^2 - rho_s^2 r^2) z

    r = f(rho_n) / f(rho_s),      M_k = (rho_n - rho_s)^k + k f(rho_n) int_{rho_n}^{rho_s} (q - rho_s)^(k-1) dq / f(q)

f(q) = q is the ODE, f(q) = q^2 the reverse SDE. m', m'' are divided differences over rho. The published third order
takes a backward difference for m', which holds it at order 2; weight="exact" takes the derivative of the parabola.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .multistep import check_choice, check_order
from .program import Program, Value, solver
from .quadrature import gauss_legendre
from .table import Table

Scale = Callable[[np.ndarray], np.ndarray]

# f(rho) / rho
SCALES: dict[str, Scale] = {
    "ode": np.ones_like,
    "sde": lambda q: q,
    "ersde": lambda q: np.exp(q**0.3) + 10.0,
}


@solver(paper="2309.06169", calls="1", order=lambda o: min(o["order"], 2))
def ersde(path, times, order: int = 3, scale: str | Scale = "ersde", weight: str = "shipped") -> Table:
    """ER-SDE-Solver of order 1 to 3; ``scale`` is "ode", "sde", "ersde" (q (e^(q^0.3) + 10)), or a function f(q).

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.edm()
    >>> ersde(path, grids.karras(path, 8)).stochastic, ersde(path, grids.karras(path, 8), scale="ode").stochastic
    (True, False)
    """
    check_order("order", order, 1, 3)
    check_choice("weight", weight, ("shipped", "exact"))
    g = _per_rho(scale)
    p = Program(path, times)
    rho = p.rho
    x = p.start()
    known: list[Value] = []
    for i in range(p.steps):
        known = [p.call(x, at=i, form="x0"), *known][:order]
        left = _left(p, i, g)
        decay = left / p.sigma[i]
        x = decay * x + (p.alpha[i + 1] - decay * p.alpha[i]) * known[0]
        if len(known) > 1:
            m1, m2 = _moments(rho[i], rho[i + 1], g)
            slope = (known[0] - known[1]) / (rho[i] - rho[i - 1])
            x = x + p.alpha[i + 1] * m1 * slope
        if len(known) > 2:
            bend = (slope - (known[1] - known[2]) / (rho[i - 1] - rho[i - 2])) / (rho[i] - rho[i - 2])
            x = x + p.alpha[i + 1] * (m2 + m1 * (rho[i] - rho[i - 1]) * (weight == "exact")) * bend
        c = np.sqrt((p.sigma[i + 1] - left) * (p.sigma[i + 1] + left))
        x = x + c * p.noise() if np.any(c > 0) else x
    return p.table(x)


def _per_rho(scale: str | Scale) -> Scale:
    """f(rho) / rho, also at rho = infinity (alpha = 0)."""
    if callable(scale):
        return lambda q: scale(np.minimum(q, 1e9)) / np.minimum(q, 1e9)
    return SCALES[check_choice("scale", scale, tuple(SCALES))]


def _left(p: Program, i: int, g: Scale) -> np.ndarray:
    """alpha_n rho_s r, what is left of the old noise in x_n, without the infinities of rho."""
    ending = p.rho[i + 1] == 0
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = np.where(ending, 0.0, g(np.where(ending, 1.0, p.rho[i + 1])) / g(p.rho[i]))
    if not np.isfinite(ratio).all() or (ratio > 1 + 1e-12).any():
        raise ValueError("scale must be positive and grow at least as fast as rho; this one does not "
                         f"between rho = {p.rho[i].max():g} and {p.rho[i + 1].min():g}")  # fmt: skip
    return p.sigma[i + 1] * np.minimum(ratio, 1.0)


def _moments(rho_s: np.ndarray, rho_n: np.ndarray, g: Scale) -> tuple[np.ndarray, np.ndarray]:
    """M1 and M2, with the integral taken over log rho."""
    ending = rho_n == 0
    low = np.where(ending, rho_s, rho_n)
    log_q, w = gauss_legendre(np.log(low), np.log(rho_s))
    q = np.exp(log_q)
    with np.errstate(over="ignore"):
        w = np.where(ending, 0.0, rho_n * g(low)) * w / g(q)
    return (rho_n - rho_s) + w.sum(axis=0), (rho_n - rho_s) ** 2 + 2 * (w * (q - rho_s)).sum(axis=0)
