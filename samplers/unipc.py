"""UniPC (2302.04867): a multistep predictor over lam, and a corrector that reuses the call made at the predicted point.

    predict   x~_n = a x_s + sum_j b_j d_j                 nodes s, s-1, ..       (UniP-p)
    correct   x_n  = a x_s + sum_j c_j d_j + c_new d(x~_n)     the same and n    (UniC-p)

Both are exact Lagrange weights, but where there are two nodes: there the first moment is that of B(h), h ("bh1") or
e^h - 1 ("bh2"). The network is not called again at the corrected point, so a step costs one call.
"""

from __future__ import annotations

import numpy as np

from .multistep import Known, advance, check_choice, check_order, correct, leave_alpha_zero
from .program import Program, solver
from .table import Table


def _order(o: dict) -> int:
    cold = min(o["order"] + 1, 3) if o["corrector"] else min(o["order"], 2)
    return cold if o["final"] == "auto" else min(cold, 2)


@solver(paper="2302.04867", calls="1", order=_order)
def unipc(
    path,
    times,
    order: int = 2,
    rule: str = "bh2",
    form: str = "x0",
    corrector: bool = True,
    final: str = "lower",
) -> Table:
    """UniPC of order 1 to 4, bh1 or bh2, in x0 or eps form; without its corrector it is UniP.

    With ``final="lower"`` step i of N has order min(order, i + 1, N - i), as published; with ``"auto"`` only a last
    step to sigma = 0 is lowered, to first order. The result of the last step is not corrected: that would cost a call.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.flow()
    >>> unipc(path, grids.logsnr(path, 8), order=3).calls
    8
    """
    check_order("order", order, 1, 4)
    check_choice("rule", rule, ("bh1", "bh2"))
    check_choice("form", form, ("x0", "eps"))
    check_choice("final", final, ("lower", "auto"))
    if not isinstance(corrector, (bool, np.bool_)):
        raise ValueError(f"corrector must be True or False, got {corrector!r}")
    p = Program(path, times)
    x = p.start()
    known: Known = []
    used: Known = []
    skip = 0
    if form == "eps" and (away := leave_alpha_zero(p, x)) is not None:
        x, skip = away, 1
    for i in range(skip, p.steps):
        new = p.call(x, at=i, form=form)
        if corrector and used:
            x = correct(p, x, p.t[i - 1], p.t[i], new, used, used, form, "lam", rule=rule)
        known = [(new, p.t[i]), *known][:order]
        used = known[: p.steps - i] if final == "lower" else known
        x = advance(p, x, p.t[i], p.t[i + 1], used, form, "lam", rule=rule)
    return p.table(x)
