"""DEIS (2204.13902): eps-form exponential integrators, Adams-Bashforth in t, rho or log rho.

The paper's tAB-q has degree q and so q + 1 nodes: tAB-3 is ``order=4, variable="t"``. ``variable="lam"`` is what
diffusers calls DEIS.
"""

from __future__ import annotations

from .multistep import adams, adams_order, check_choice, check_order
from .program import solver
from .rk import TABLEAUS
from .rk import rk as runge_kutta
from .table import Table


def _order(options: dict) -> int:
    return TABLEAUS[options["rk"]].order if options["rk"] else adams_order(options["order"], options)


@solver(paper="2204.13902", calls="1", order=_order)
def deis(
    path,
    times,
    order: int = 3,
    variable: str = "t",
    rk: str | None = None,
    final: str = "auto",
    start: str = "lower",
) -> Table:
    """tAB ("t"), rhoAB ("rho") or diffusers' DEIS ("lam"), with ``order`` nodes; or rhoRK, by the name in ``rk``.

    ``final`` and ``start`` as in ``multistep``.

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
    return adams(path, times, "eps", variable, order, final=final, start=start)
