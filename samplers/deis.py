"""DEIS (2204.13902): eps-form exponential integrators, Adams-Bashforth in t, rho or log rho.

The paper's tAB-q has degree q and so q + 1 nodes: tAB-3 is ``order=4, variable="t"``. ``variable="lam"`` is what diffusers
calls DEIS.
"""

from __future__ import annotations

from .multistep import check_choice, check_order, multistep
from .program import solver
from .rk import TABLEAUS
from .rk import rk as runge_kutta
from .table import Table


@solver(paper="2204.13902", calls="1", order=lambda o: TABLEAUS[o["rk"]].order if o["rk"] else min(o["order"], 2))
def deis(path, times, order: int = 3, variable: str = "t", rk: str | None = None) -> Table:
    """tAB ("t"), rhoAB ("rho") or diffusers' DEIS ("lam"), with ``order`` nodes; or rhoRK, by a tableau's name in ``rk``.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.vp_linear()
    >>> deis(path, grids.quadratic(path, 10), order=4).slots
    4
    >>> deis(path, grids.quadratic(path, 10), rk="3kutta").calls
    28
    """
    if rk is not None:
        return runge_kutta(path, times, method=rk, form="eps")
    check_order("order", order, 1, 4)
    check_choice("variable", variable, ("t", "rho", "lam"))
    return multistep(path, times, form="eps", variable=variable, nodes=order)
