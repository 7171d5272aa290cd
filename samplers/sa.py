"""SA-Solver (2309.05019): stochastic Adams, predictor and corrector over lam in x0 form, with noise of strength tau.

    x_n = (sigma_n / sigma_s) e^(-tau^2 h) x_s + sum_j b_j x0_j + sigma_n sqrt(1 - e^(-2 tau^2 h)) z

with b_j the weights of the kernel (1 + tau^2) e^(-(1 + tau^2)(lam_n - lam)). The corrector's step has the same decay
and the same z as the predictor's, so it is the predicted point plus a difference of weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .multistep import Known, advance, check_choice, check_order, correct
from .program import Program, solver
from .sde_dpmpp import fresh_noise
from .table import Table


def _order(o: dict) -> int:
    return min(o["corrector"] or 2, o["predictor"] + bool(o["corrector"]), 2)


@solver(paper="2309.05019", calls="1", order=_order)
def sa(
    path,
    times,
    predictor: int = 2,
    corrector: int = 2,
    tau: float | Callable[[np.ndarray], np.ndarray] = 1.0,
    between: tuple[float, float] | None = None,
    final: str = "lower",
) -> Table:
    """SA-Solver with ``predictor`` past nodes and ``corrector`` nodes, the new one among them (0: no corrector).

    ``tau`` is a number or a function of t, taken at the start of a step; ``between=(low, high)`` makes it 0 where
    rho = sigma / alpha lies outside. Two nodes have the published weights, linear in h. ``final="lower"`` lets the
    orders fall towards the end, as published; "auto" only at sigma = 0.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.edm()
    >>> table = sa(path, grids.karras(path, 8), between=(0.05, 1.0)); table.calls, int((table.c[:, 0, 0] > 0).sum())
    (8, 1)
    """
    check_order("predictor", predictor, 1, 4)
    check_order("corrector", corrector, 0, 4)
    check_choice("final", final, ("lower", "auto"))
    p = Program(path, times)
    kernels = 1.0 + _taus(p, tau, between) ** 2
    x = p.start()
    known: Known = []
    used: Known = []
    for i in range(p.steps):
        new = p.call(x, at=i, form="x0")
        if corrector and i:
            nodes = min(corrector, i + 1, p.steps - i + 2) if final == "lower" else min(corrector, i + 1)
            x = correct(
                p, x, p.t[i - 1], p.t[i], new, used, known[: nodes - 1], "x0", "lam", kernels[i - 1], "bh1"
            )
        known = [(new, p.t[i]), *known][: max(predictor, corrector)]
        used = known[: min(predictor, p.steps - i) if final == "lower" else predictor]
        x = advance(p, x, p.t[i], p.t[i + 1], used, "x0", "lam", kernels[i], "bh1")
        x = fresh_noise(p, x, i, kernels[i])
    return p.table(x)


def _taus(p: Program, tau: float | Callable, between: tuple[float, float] | None) -> np.ndarray:
    """tau at the start of every step, (steps, lanes)."""
    t = p.t[:-1]
    if not callable(tau) and (isinstance(tau, (str, bool)) or np.ndim(tau)):
        raise ValueError(f"tau must be a number in [0, 10], or a function of t with such values, got {tau!r}")
    value = np.broadcast_to(np.asarray(tau(t) if callable(tau) else tau, dtype=np.float64), t.shape)
    if not (np.isfinite(value).all() and (value >= 0).all() and (value <= 10).all()):
        raise ValueError(f"tau must be a number in [0, 10], or a function of t with such values, got {tau!r}")
    if between is None:
        return value
    if np.shape(between) != (2,) or not 0 <= between[0] <= between[1]:
        raise ValueError(
            f"between must be (low, high) with 0 <= low <= high, in units of sigma / alpha, got {between!r}"
        )
    return np.where((between[0] <= p.rho[:-1]) & (p.rho[:-1] <= between[1]), value, 0.0)
