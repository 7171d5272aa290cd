"""PNDM (2202.09778): linear multistep on the transfer map T (DDIM's step), begun by pseudo Runge-Kutta steps.

F-PNDM   three steps of four calls, e = (e1 + 2 e2 + 2 e3 + e4)/6, then T with Adams-Bashforth of order 4: N + 9 calls
S-PNDM   one step of two calls, e = (e1 + e2)/2, then Adams-Bashforth of order 2: N + 1 calls
PLMS     the same start, then orders 2, 3, 4, 4, ..: N + 1 calls; what diffusers runs with ``skip_prk_steps``
"""

from __future__ import annotations

from .ipndm import blend
from .multistep import check_choice, leave_alpha_zero, transfer
from .program import Program, Value, solver
from .table import Table

VARIANTS = {"fast": (3, 4), "simple": (1, 2), "plms": (1, 4)}  # steps to start, and the order afterwards


@solver(paper="2202.09778", calls="1, and 9 (fast) or 1 (simple, plms) in all", order=2)
def pndm(path, times, variant: str = "fast") -> Table:
    """F-PNDM (variant="fast"), S-PNDM ("simple") or PLMS ("plms").

    A pseudo Runge-Kutta step calls the network where it lands; one that lands on sigma = 0, where there is nothing to
    call, is an Adams-Bashforth step instead.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.vp_linear()
    >>> pndm(path, grids.uniform(path, 10)).calls, pndm(path, grids.uniform(path, 10), variant="simple").calls
    (19, 11)
    """
    check_choice("variant", variant, tuple(VARIANTS))
    p = Program(path, times)
    x = p.start()
    starting, order = VARIANTS[variant]
    known: list[Value] = []
    skip = 0
    if (away := leave_alpha_zero(p, x)) is not None:
        x, skip = away, 1
    for i in range(skip, p.steps):
        s, n = p.t[i], p.t[i + 1]
        e1 = p.call(x, at=i, form="eps")
        known = [e1, *known][:order]
        if i - skip >= starting or (p.sigma[i + 1] == 0).any():
            e = blend(known)
        elif variant != "fast":
            e = (e1 + p.call(transfer(p, x, s, n, e1, "eps"), at=i + 1, form="eps", base=x)) / 2.0
        else:
            middle = (s + n) / 2.0
            e2 = p.call(transfer(p, x, s, middle, e1, "eps"), t=middle, form="eps", base=x)
            e3 = p.call(transfer(p, x, s, middle, e2, "eps"), t=middle, form="eps", base=x)
            e4 = p.call(transfer(p, x, s, n, e3, "eps"), at=i + 1, form="eps", base=x)
            e = (e1 + 2.0 * e2 + 2.0 * e3 + e4) / 6.0
        x = transfer(p, x, s, n, e, "eps")
    return p.table(x)
