"""DPM-Solver (2206.00927) and DPM-Solver++ (2211.01095), multistep: Adams-Bashforth over lam, in eps and in x0 form.

    x_n = (sigma_n / sigma_s) x_s + A0 m_0 + A1 m' + A2 m'',      A0 = alpha_n (1 - e^-h)

with m', m'' the derivatives of the interpolant over lam / h and A1, A2 the moments of the exponential. The published
codes take A0 / 2 for A1 with two nodes ("midpoint"), and with three half of A2, which leaves the order at 2.
"""

from __future__ import annotations

from .multistep import adams, adams_order, check_choice, check_order
from .program import solver
from .table import Table

RULES = {"midpoint": "shipped", "exact": "exact"}


def _order(o: dict) -> int:
    return min(adams_order(o["order"], o), 3 if o["weight"] == "exact" else 2)


@solver(paper="2211.01095", calls="1", order=_order)
def dpmpp(
    path, times, order: int = 2, weight: str = "midpoint", final: str = "auto", start: str = "lower"
) -> Table:
    """DPM-Solver++ 1, 2M or 3M, as shipped (weight="midpoint") or "exact"; ``final`` and ``start`` as in ``multistep``.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.flow()
    >>> dpmpp(path, grids.logsnr(path, 8)).calls
    8
    """
    check_order("order", order, 1, 3)
    check_choice("weight", weight, tuple(RULES))
    return adams(path, times, "x0", "lam", order, rule=RULES[weight], final=final, start=start)


@solver(paper="2206.00927", calls="1", order=_order)
def dpm(
    path, times, order: int = 2, weight: str = "midpoint", final: str = "auto", start: str = "lower"
) -> Table:
    """DPM-Solver 1, 2M or 3M: the same in eps form.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.vp_linear()
    >>> dpm(path, grids.logsnr(path, 8), order=3).form[0]
    'eps'
    """
    check_order("order", order, 1, 3)
    check_choice("weight", weight, tuple(RULES))
    return adams(path, times, "eps", "lam", order, rule=RULES[weight], final=final, start=start)
