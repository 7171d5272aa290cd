"""The multistep family: a form, a variable to interpolate in, and a number of nodes.

DEIS is (eps; t, rho or lam), DPM-Solver++ with the exact weight and UniP are (x0, lam), iPNDM-v is (eps, rho),
Adams-Bashforth on a flow is (v, t), DDIM is any of them with one node.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids, multistep
    >>> path = paths.vp_linear(); times = grids.logsnr(path, 6)
    >>> table = multistep(path, times, form="x0", variable="lam", nodes=3); table.calls, table.slots
    (6, 3)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..models.paths import Path
from .program import Program, Value, solver
from .quadrature import VARIABLES, decay, total, weights
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


Known = list[tuple[Value, np.ndarray]]  # stored outputs and their times, newest first


def advance(p: Program, x: Value, s: np.ndarray, n: np.ndarray, known: Known, form: str, variable: str,
            kernel: np.ndarray | float = 1.0, rule: str = "exact", limit: bool = False) -> Value:  # fmt: skip
    """The exponential-integrator step from time s to n over ``known`` outputs, without its noise."""
    step = decay(p.path, s, n, form, kernel) * x
    all_b = weights(p.path, s, n, [t for _, t in known], form, variable, kernel, rule, limit)
    for (d, _), b in zip(known, all_b, strict=True):
        step = step + b * d
    return step


def correct(p: Program, x: Value, s: np.ndarray, n: np.ndarray, new: Value, used: Known, past: Known, form: str,
            variable: str, kernel: np.ndarray | float = 1.0, rule: str = "exact") -> Value:  # fmt: skip
    """Redo the step that ``advance`` made over ``used`` to the point x: now over the output ``new`` at x and ``past``.

    The decay and the noise of both are the same, so only the weights' difference is added to x.
    """
    for nodes, sign in ((used, -1.0), ([(new, n), *past], 1.0)):
        all_b = weights(p.path, s, n, [t for _, t in nodes], form, variable, kernel, rule)
        for (d, _), b in zip(nodes, all_b, strict=True):
            x = x + sign * b * d
    return x


def transfer(p: Program, x: Value, s: np.ndarray, n: np.ndarray, d: Value, form: str) -> Value:
    """The step from time s to n for a constant d: DDIM, in any form."""
    return decay(p.path, s, n, form) * x + total(p.path, s, n, form) * d


def leave_alpha_zero(p: Program, x: Value) -> Value | None:
    """The first step of an eps-form solver where it begins at alpha = 0 in some lane: DDIM in x0 form; else None.

    There x is all noise and eps says nothing of x0, so the output is not kept. All lanes of a table take this step, or
    none does.
    """
    if not (p.alpha[0] == 0).any():
        return None
    return transfer(p, x, p.t[0], p.t[1], p.call(x, at=0, form="x0"), "x0")


def runge_kutta(p: Program, x: Value, i: int, d: Value, form: str, order: int) -> Value:
    """Heun's (order 2) or Kutta's (order 3) step in the form's own variable, from grid point i where d is known.

    In rho, 1/rho or t the ODE is dy/dtau = d, and an increment of y is a ``transfer`` of x.
    """
    s, n, path = p.t[i], p.t[i + 1], p.path
    if order == 2:
        last = p.call(transfer(p, x, s, n, d, form), at=i + 1, form=form, base=x)
        return transfer(p, x, s, n, (d + last) / 2.0, form)
    if form == "v":
        middle = (s + n) / 2
    else:
        power = 1.0 if form == "eps" else -1.0
        middle = path.time_of_rho(((p.rho[i] ** power + p.rho[i + 1] ** power) / 2) ** power)
    half = p.call(transfer(p, x, s, middle, d, form), t=middle, form=form, base=x)
    last = p.call(transfer(p, x, s, n, 2.0 * half - d, form), at=i + 1, form=form, base=x)
    return transfer(p, x, s, n, (d + 4.0 * half + last) / 6.0, form)


def adams(path: Path, times: Any, form: str, variable: str, nodes: int, rule: str = "exact", final: str = "auto",
          start: str = "lower", corrector: bool = False) -> Table:  # fmt: skip
    """The table of a deterministic multistep solver; what the named members of the family call."""
    check_choice("final", final, ("auto", "lower", "full"))
    check_choice("start", start, ("lower", "rk"))
    p = Program(path, times)
    x = p.start()
    known: Known = []
    used: Known = []  # what the step to the newest point was made of, where it can be corrected
    skip = 0
    if form == "eps" and (away := leave_alpha_zero(p, x)) is not None:
        x, skip = away, 1
    for i in range(skip, p.steps):
        d = p.call(x, at=i, form=form)
        if corrector and used:
            x = correct(p, x, p.t[i - 1], p.t[i], d, used, known[: max(nodes - 1, 1)], form, variable)
        known = [(d, p.t[i]), *known][:nodes]
        used = []
        if start == "rk" and nodes > 2 and i - skip < nodes - 1 and (p.sigma[i + 1] > 0).all():
            x = runge_kutta(p, x, i, d, form, nodes - 1)
        else:
            used = known[: p.steps - i] if final == "lower" else known
            x = advance(p, x, p.t[i], p.t[i + 1], used, form, variable, rule=rule, limit=final == "full")
    return p.table(x)


def adams_order(nodes: int, options: dict) -> int:
    """The order of ``adams``: a first-order first or last step holds it at 2; at 3 where the first is corrected."""
    if options.get("corrector") and options["final"] != "lower" and options.get("start") != "rk":
        return min(max(nodes, 2), 3)
    return nodes if options.get("start") == "rk" and options["final"] != "lower" else min(nodes, 2)


@solver(paper="2204.13902, 2211.01095, 2302.04867", calls="1", order=lambda o: adams_order(o["nodes"], o))
def multistep(
    path,
    times,
    form: str = "x0",
    variable: str = "lam",
    nodes: int = 3,
    final: str = "auto",
    start: str = "lower",
    corrector: bool = False,
) -> Table:
    """Adams-Bashforth over the last ``nodes`` outputs, in any form and interpolation variable.

    ``final="lower"`` lets the order fall by one a step towards the end (first order last), as DPM-Solver++ does below
    15 steps; ``"auto"`` keeps the full order, except over lam and snr, infinite there, in a last step to sigma = 0;
    ``"full"`` keeps it there too where the weights have a limit (eps and v over lam), which often extrapolates badly.
    ``start="lower"`` lets the order rise from one; ``"rk"`` makes the first nodes - 1 steps by a Runge-Kutta method of
    order nodes - 1, in (nodes - 1)(nodes - 2) calls more: for beginning midway, where the first steps matter.
    ``corrector=True`` redoes each step but the last with the output at its end among the nodes, at no call more.
    """
    check_choice("form", form, ("eps", "x0", "v"))
    check_choice("variable", variable, VARIABLES)
    check_order("nodes", nodes, 1, 4)
    if form == "v" and path.name not in ("flow", "edm"):
        raise ValueError("form='v' (dx/dt) needs a straight path, where it is constant for a point mass: flow or edm, "
                         f"got {path.name}")  # fmt: skip
    return adams(path, times, form, variable, nodes, final=final, start=start, corrector=corrector)
