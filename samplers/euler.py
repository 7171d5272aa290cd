"""Euler's method where the PF-ODE is a pure quadrature (2206.00364 in rho, 2209.03003 in t).

    eps:  x_n = (alpha_n/alpha_s) x + (sigma_n - sigma_s alpha_n/alpha_s) eps        v:  x_n = x + (t_n - t_s) v

The rows are those of DDIM at eta = 0, whatever the form. Ancestral Euler walks down to rho_down and re-noises to rho_n,
rho_down^2 = rho_n^2 - eta^2 rho_n^2 (1 - rho_n^2/rho_s^2), and that is DDIM at the same eta.
"""

from __future__ import annotations

from .program import Program, solver
from .rk import TABLEAUS, check_form, rk_step
from .table import Table


@solver(paper="2206.00364, 2209.03003", calls="1", order=1)
def euler(path, times, form: str = "auto") -> Table:
    """Euler in rho (``form="eps"``, EDM's) or in t ("v", the flow's); its ancestral form is ``ddim(eta=1)``.

    The samples are the same in every form; "auto" is v on a flow and else eps.

    >>> import numpy as np
    >>> from fewstep.models import paths
    >>> from fewstep.samplers import ddim, grids
    >>> path = paths.edm(); times = grids.karras(path, 5)
    >>> bool(np.allclose(euler(path, times).unrolled().noise, 80.0))
    True
    """
    form = check_form(path, form)
    p = Program(path, times)
    x = p.start()
    for i in range(p.steps):
        x = rk_step(p, x, p.t[i], p.t[i + 1], TABLEAUS["1euler"], form)
    return p.table(x)
