"""SDE-DPM-Solver++ (2211.01095): the multistep solver of the reverse SDE, x0 form over lam.

    x_n = (sigma_n / sigma_s) e^(-eta h) x_s + sum_j b_j x0_j + sigma_n sqrt(1 - e^(-2 eta h)) z,     h = lam_n - lam_s

with b_j the weights of the kernel (1 + eta) e^(-(1 + eta)(lam_n - lam)): eta = 0 is the ODE, eta = 1 the reverse SDE.
"""

from __future__ import annotations

import numpy as np

from .dpmpp import RULES
from .multistep import Known, advance, check_choice, check_order
from .program import Program, Value, solver
from .table import Table


def fresh_noise(p: Program, x: Value, i: int, kernel: np.ndarray | float) -> Value:
    """Add the noise that step i's decay makes room for: sigma_n sqrt(1 - e^(-2 (kernel - 1) h))."""
    shrink = (p.sigma[i + 1] * p.alpha[i]) / (p.sigma[i] * p.alpha[i + 1])  # e^-h
    c = p.sigma[i + 1] * np.sqrt(np.maximum(1.0 - shrink ** (2.0 * (np.asarray(kernel) - 1.0)), 0.0))
    return x + c * p.noise() if np.any(c > 0) else x


@solver(paper="2211.01095", calls="1", order=lambda o: min(o["order"], 2))
def sde_dpmpp(
    path, times, order: int = 2, eta: float = 1.0, weight: str = "midpoint", final: str = "auto"
) -> Table:
    """SDE-DPM-Solver++ 1, 2M or 3M, as shipped (weight="midpoint") or "exact".

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.flow()
    >>> sde_dpmpp(path, grids.logsnr(path, 8)).stochastic
    True
    """
    check_order("order", order, 1, 3)
    check_choice("weight", weight, tuple(RULES))
    check_choice("final", final, ("auto", "lower"))
    if not 0.0 <= eta <= 10.0:
        raise ValueError(f"eta must lie in [0, 10], got {eta!r}")
    p = Program(path, times)
    x = p.start()
    known: Known = []
    for i in range(p.steps):
        known = [(p.call(x, at=i, form="x0"), p.t[i]), *known][:order]
        use = known[: p.steps - i] if final == "lower" else known
        x = advance(p, x, p.t[i], p.t[i + 1], use, "x0", "lam", 1.0 + eta, RULES[weight])
        x = fresh_noise(p, x, i, 1.0 + eta)
    return p.table(x)
