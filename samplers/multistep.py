"""The multistep family: a form, a variable to interpolate in, and a number of nodes.

DEIS is (eps; t, rho or lam), DPM-Solver++ 2M with the exact weight and UniP are (x0, lam), iPNDM-v is (eps, rho), Adams-Bashforth
on a flow is (v, t), DDIM is any of them with one node.

    >>> import numpy as np
    >>> from fewstep.models import paths
    >>> from fewstep.samplers import ddim, grids, multistep
    >>> path = paths.vp_linear(); times = grids.logsnr(path, 6)
    >>> one, other = multistep(path, times, form="eps", nodes=1).unrolled(), ddim(path, times).unrolled()
    >>> table = multistep(path, times, form="x0", variable="lam", nodes=3); table.calls, table.slots
    (6, 3)
"""

from __future__ import annotations

import numpy as np

from .program import Program, Value, solver
from .quadrature import VARIABLES, decay, weights
from .table import Table


def check_order(name: str, value: int, low: int, high: int) -> int:
    """An order or a number of nodes within low .. high, or ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer in {low} .. {high}, got {value!r}")
    return int(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """One of the named choices, or ``ValueError``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def advance(p: Program, x: Value, s: np.ndarray, n: np.ndarray, known: list[tuple[Value, np.ndarray]], form: str, variable: str) -> Value:
    """The exponential-integrator step from time s to n over ``known`` pairs (stored output, its time), newest first."""
    step = decay(p.path, s, n, form) * x
    for (d, _), b in zip(known, weights(p.path, s, n, [time for _, time in known], form, variable), strict=True):
        step = step + b * d
    return step


@solver(paper="2204.13902, 2211.01095, 2302.04867", calls="1", order=lambda o: min(o["nodes"], 2))
def multistep(path, times, form: str = "x0", variable: str = "lam", nodes: int = 3, final: str = "auto") -> Table:
    """Adams-Bashforth over the last ``nodes`` outputs, in any form and interpolation variable.

    ``final="lower"`` lets the order fall by one a step towards the end (first order last), as DPM-Solver++ does below 15
    steps; ``"auto"`` keeps the full order, except for a last step to sigma = 0 that has none.
    """
    check_choice("form", form, ("eps", "x0", "v"))
    check_choice("variable", variable, VARIABLES)
    check_order("nodes", nodes, 1, 4)
    check_choice("final", final, ("auto", "lower"))
    if form == "v" and path.name not in ("flow", "edm"):
        raise ValueError(f"form='v' (dx/dt) needs a straight path, where it is constant for a point mass: flow or edm, got {path.name}")
    p = Program(path, times)
    x = p.start()
    known: list[tuple[Value, np.ndarray]] = []
    for i in range(p.steps):
        # an eps-form step cannot leave alpha = 0: the first row is then DDIM written in x0, which keeps no history
        here = "x0" if form == "eps" and (p.alpha[i] == 0).any() else form
        d = p.call(x, at=i, form=here)
        if here != form:
            x = advance(p, x, p.t[i], p.t[i + 1], [(d, p.t[i])], here, variable)
            continue
        known = [(d, p.t[i]), *known][:nodes]
        use = known[: p.steps - i] if final == "lower" else known
        x = advance(p, x, p.t[i], p.t[i + 1], use, form, variable)
    return p.table(x)
