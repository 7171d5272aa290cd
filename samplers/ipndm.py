"""iPNDM (2204.13902, after 2202.09778): Adams-Bashforth weights of an even grid on any grid, in eps form.

    x_n = (alpha_n / alpha_s) x_s + (sigma_n - sigma_s alpha_n / alpha_s) sum_j beta_j eps_j

Fixed weights ignore how unequal the steps are, so the order is 2 whatever their number; few-step images are good all
the same. ``ipndm_v`` has the weights of the actual steps in rho.
"""

from __future__ import annotations

from .multistep import adams, adams_order, check_order, leave_alpha_zero, transfer
from .program import Program, Value, solver
from .table import Table

BETAS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def blend(known: list[Value]) -> Value:
    """The Adams-Bashforth mean of up to four outputs, newest first."""
    first, *others = (beta * d for beta, d in zip(BETAS[len(known) - 1], known, strict=True))
    return sum(others, first)


@solver(paper="2204.13902, 2202.09778", calls="1", order=lambda o: min(o["order"], 2))
def ipndm(path, times, order: int = 4) -> Table:
    """iPNDM with up to ``order`` outputs, rising from one.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.edm()
    >>> ipndm(path, grids.karras(path, 10)).slots
    4
    """
    check_order("order", order, 1, 4)
    p = Program(path, times)
    x = p.start()
    known: list[Value] = []
    skip = 0
    if (away := leave_alpha_zero(p, x)) is not None:
        x, skip = away, 1
    for i in range(skip, p.steps):
        known = [p.call(x, at=i, form="eps"), *known][:order]
        x = transfer(p, x, p.t[i], p.t[i + 1], blend(known), "eps")
    return p.table(x)


@solver(paper="2204.13902", calls="1", order=lambda o: adams_order(o["order"], o))
def ipndm_v(path, times, order: int = 4, final: str = "auto", start: str = "lower") -> Table:
    """iPNDM-v: the weights follow the steps in rho, which makes it rhoAB of DEIS.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.edm()
    >>> ipndm_v(path, grids.karras(path, 10)).calls
    10
    """
    check_order("order", order, 1, 4)
    return adams(path, times, "eps", "rho", order, final=final, start=start)
