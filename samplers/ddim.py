"""DDIM (2010.02502): the first-order sampler, from the ODE (eta = 0) to ancestral sampling (eta = 1), on any path.

x_n = alpha_n x0 + sqrt(sigma_n^2 - c^2) eps + c z,     c = eta sigma_n sqrt(1 - (alpha_s sigma_n / alpha_n sigma_s)^2)
"""

from __future__ import annotations

import numpy as np

from .program import Program, Value, solver
from .table import Table


def first_order(p: Program, x: Value, i: int, d: Value, c: np.ndarray) -> Value:
    """The x0-form row of any first-order sampler: keep what the fresh noise c leaves of eps."""
    kept = np.sqrt(np.maximum(p.sigma[i + 1] ** 2 - c**2, 0.0))
    a = kept / p.sigma[i]
    x = a * x + (p.alpha[i + 1] - a * p.alpha[i]) * d
    return x + c * p.noise() if np.any(c > 0) else x


def ancestral_noise(p: Program, i: int) -> np.ndarray:
    """The fresh noise of the exact reverse step given x0: sigma_n sqrt(1 - e^(-2h))."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shrink = np.where(p.alpha[i] == 0, 0.0, p.alpha[i] * p.sigma[i + 1] / (p.alpha[i + 1] * p.sigma[i]))
    return p.sigma[i + 1] * np.sqrt(np.maximum(1.0 - shrink**2, 0.0))


@solver(paper="2010.02502", calls="1", order=1)
def ddim(path, times, eta: float = 0.0) -> Table:
    """First order, deterministic at eta = 0, ancestral at eta = 1; Euler of the flow on a straight path.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.flow()
    >>> ddim(path, grids.uniform(path, 4)).stochastic, ddim(path, grids.uniform(path, 4), eta=1.0).stochastic
    (False, True)
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta!r}")
    p = Program(path, times)
    x = p.start()
    for i in range(p.steps):
        d = p.call(x, at=i, form="x0")
        x = first_order(p, x, i, d, eta * ancestral_noise(p, i))
    return p.table(x)
