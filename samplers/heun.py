"""Heun's second-order method, with EDM's churn (2206.00364, algorithm 2), on any path through x / alpha.

Churn first raises the noise, where s_min <= rho_s <= s_max,

    rho_hat = rho_s (1 + gamma),      gamma = min(s_churn / N, sqrt 2 - 1)
    x_hat = (alpha_hat/alpha_s) x + alpha_hat s_noise sqrt(rho_hat^2 - rho_s^2) z

then x_n = x_hat + (rho_n - rho_hat) (d_hat + d_n) / 2 for x / alpha, and Euler where rho_n = 0: 2 N - 1 calls.
"""

from __future__ import annotations

import math

import numpy as np

from .program import Program, Value, solver
from .rk import TABLEAUS, check_form, rk_step
from .table import Table


def churned(
    p: Program, x: Value, s: np.ndarray, gamma: np.ndarray, s_noise: float
) -> tuple[Value, np.ndarray]:
    """x with its noise raised from rho to (1 + gamma) rho, and the time it then is at; never above the path's t_max."""
    rho = p.path.rho(s)
    with np.errstate(invalid="ignore"):
        raised = np.where(gamma > 0, np.minimum(rho * (1 + gamma), p.path.rho(p.path.t_max)), rho)
    gamma = np.where(raised > rho, gamma, 0.0)  # not at t_max, nor where rho is infinite
    if not (gamma > 0).any():
        return x, s
    t = np.where(gamma > 0, p.path.time_of_rho(raised), s)
    alpha = p.path.alpha(t)
    shrink = np.where(gamma > 0, alpha / np.where(gamma > 0, p.path.alpha(s), 1.0), 1.0)
    fresh = np.where(
        gamma > 0,
        alpha * np.sqrt(np.where(gamma > 0, raised, 0.0) ** 2 - np.where(gamma > 0, rho, 0.0) ** 2),
        0.0,
    )
    return shrink * x + (s_noise * fresh) * p.noise(), t


@solver(paper="2206.00364", calls="2", order=2)
def heun(
    path,
    times,
    form: str = "auto",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Table:
    """EDM's Heun, deterministic or with churn (``s_churn``, while ``s_min <= rho <= s_max``); on a flow, the flow's.

    ``form="auto"`` averages eps over a step in rho, and on a flow v over one in t.
    ``s_noise`` other than 1 makes the marginals a little too wide (or narrow) on purpose. No churn leads above t_max.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.edm()
    >>> heun(path, grids.karras(path, 18)).calls, heun(path, grids.karras(path, 18), s_churn=30.0).stochastic
    (35, True)
    """
    form = check_form(path, form)
    for name, value in {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise}.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")
    p = Program(path, times)
    x = p.start()
    for i in range(p.steps):
        s = p.t[i]
        inside = (p.rho[i] >= s_min) & (p.rho[i] <= s_max)
        x, s = churned(p, x, s, np.where(inside, min(s_churn / p.steps, math.sqrt(2) - 1), 0.0), s_noise)
        x = rk_step(p, x, s, p.t[i + 1], TABLEAUS["2heun"], form)
    return p.table(x)
