"""DPM-Solver++ multistep (2211.01095): x0-form in lam."""

from __future__ import annotations

from .multistep import advance, check_choice, check_order
from .program import Program, Value, solver
from .quadrature import decay, total
from .table import Table


@solver(paper="2211.01095", calls="1", order=lambda o: min(o["order"], 2))
def dpmpp(path, times, order: int = 2, weight: str = "midpoint", final: str = "auto") -> Table:
    """DPM-Solver++ 1, 2M or 3M.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.flow()
    >>> dpmpp(path, grids.logsnr(path, 8)).calls
    8
    """
    check_order("order", order, 1, 3)
    check_choice("weight", weight, ("midpoint", "exact"))
    p = Program(path, times)
    x = p.start()
    known: list[tuple[Value, int]] = []
    for i in range(p.steps):
        known = [(p.call(x, at=i, form="x0"), i), *known][:order]
        last = (p.sigma[i + 1] == 0).any()
        use = known[:1] if last else known
        if weight == "midpoint" and len(use) == 2:
            (m0, _), (m1, j) = use
            r = (p.lam[i] - p.lam[j]) / (p.lam[i + 1] - p.lam[i])
            slope = (m0 - m1) / (2.0 * r) if (p.alpha[j] > 0).all() else 0.0 * m0
            x = decay(path, p.t[i], p.t[i + 1], "x0") * x + total(path, p.t[i], p.t[i + 1], "x0") * (m0 + slope)
        else:
            x = advance(p, x, p.t[i], p.t[i + 1], [(d, p.t[k]) for d, k in use], "x0", "lam")
    return p.table(x)
