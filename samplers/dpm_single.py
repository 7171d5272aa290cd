"""Single-step DPM-Solver 2S and 3S (2206.00927, eps-form) and DPM-Solver++ 2S and 3S (2211.01095, x0-form).

Stages stand at lam_s + r h, h = lam_n - lam_s. 2S takes r = 1/2 and weighs its second output alone; 3S takes
r = 1/3 and 2/3, and each of its two last lines is the exact step over the line through d_s and the newest d.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .multistep import advance, check_choice, check_order
from .program import Program, Value, solver
from .rk import TABLEAUS, rk_step
from .table import Table


def _block(p: Program, x: Value, s: np.ndarray, n: np.ndarray, order: int, form: str) -> Value:
    """One block of ``order`` calls from time s to n."""
    if order == 1 or (p.path.sigma(n) == 0).any():
        return rk_step(p, x, s, n, TABLEAUS["1euler"], form)
    lam_s, lam_n = p.path.lam(s), p.path.lam(n)
    if not np.isfinite(lam_s).all():  # alpha_s = 0 has no middle in lam: as many stages in alpha/sigma
        return rk_step(p, x, s, n, TABLEAUS["2mid" if order == 2 else "3heun"], "x0")
    d = p.call(x, t=s, form=form)
    known = [(d, s)]
    for k in range(1, order):
        t = p.path.time(lam_s + k / order * (lam_n - lam_s))
        y = advance(p, x, s, t, known, form, "lam")
        newest = p.call(y, t=t, form=form, base=x), t
        known = [newest] if order == 2 else [newest, (d, s)]
    return advance(p, x, s, n, known, form, "lam")


def fast_orders(calls: int) -> list[int]:
    """Block orders that spend exactly ``calls`` calls, mostly third order and first order last (DPM-Solver-fast).

    >>> fast_orders(10), fast_orders(9), fast_orders(8)
    ([3, 3, 3, 1], [3, 3, 2, 1], [3, 2, 2, 1])
    """
    check_order("calls", calls, 1, 1_000_000)
    if calls < 3:
        return [1] * calls
    tail = {0: [2, 1], 1: [1], 2: [2, 2, 1]}[calls % 3]
    return [3] * ((calls - sum(tail)) // 3) + tail


@solver(
    paper="2206.00927, 2211.01095",
    calls="order",
    order=lambda o: o["order"] if isinstance(o["order"], int) else min(o["order"][:-1] or o["order"]),
)
def dpm_single(path, times, order: int | Sequence[int] = 2, form: str = "x0") -> Table:
    """DPM-Solver++ 2S and 3S (``form="x0"``) or DPM-Solver 2S and 3S ("eps"); a last step to sigma = 0 is first order.

    ``order`` is one for all steps or one a step: with ``order=fast_orders(calls)`` and that many steps, a budget is
    spent to the last call.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> path = paths.vp_linear(); times = grids.logsnr(path, 4)
    >>> dpm_single(path, times, order=3).calls, dpm_single(path, times, order=fast_orders(9)).calls
    (10, 9)
    """
    check_choice("form", form, ("eps", "x0"))
    p = Program(path, times)
    orders = [order] * p.steps if isinstance(order, (int, np.integer)) else list(order)
    if len(orders) != p.steps:
        raise ValueError(f"order must be one number or one a step: {p.steps} steps, got {len(orders)} orders")
    x = p.start()
    for i, each in enumerate(orders):
        x = _block(p, x, p.t[i], p.t[i + 1], check_order("order", each, 1, 3), form)
    return p.table(x)
