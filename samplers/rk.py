"""Runge-Kutta where the PF-ODE is a pure quadrature: DEIS' rhoRK (2204.13902) and its twins in x0 and v form.

    eps:  d(x/alpha) / d rho = eps        x0:  d(x/sigma) / d(1/rho) = x0        v:  dx/dt = v

With g = alpha, sigma, 1 and tau = rho, 1/rho, t, stage k stands at tau_k = tau_s + c_k (tau_n - tau_s):

    y_k = (g_k/g_s) x + g_k (tau_n - tau_s) sum_j A_kj d_j,      x_n = (g_n/g_s) x + g_n (tau_n - tau_s) sum_j B_j d_j
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..models.paths import Path
from .multistep import check_choice
from .program import Program, Value, solver
from .quadrature import decay, total
from .table import Table


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: the rows of A from the second stage on, the weights B, and its order.

    >>> TABLEAUS["3kutta"].nodes
    (0.0, 0.5, 1.0)
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    @property
    def nodes(self) -> tuple[float, ...]:
        """c_k, what the rows of A add up to."""
        return (0.0, *(sum(row) for row in self.a))


TABLEAUS = {
    "1euler": Tableau((), (1.0,), 1),
    "2heun": Tableau(((1.0,),), (1 / 2, 1 / 2), 2),
    "2mid": Tableau(((1 / 2,),), (0.0, 1.0), 2),
    "2ralston": Tableau(((2 / 3,),), (1 / 4, 3 / 4), 2),
    "3kutta": Tableau(((1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 3),
    "3heun": Tableau(((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), 3),
    "3ralston": Tableau(((1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9), 3),
    "3ssp": Tableau(((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3), 3),
    "4": Tableau(((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
}


def fraction(path: Path, s: np.ndarray, n: np.ndarray, c: float, form: str) -> np.ndarray:
    """The time at which tau has gone the fraction c of its way from s to n."""
    if c in (0.0, 1.0):
        return n if c else s
    if form == "v":
        return s + c * (n - s)
    if form == "eps":
        return path.time_of_rho(path.rho(s) + c * (path.rho(n) - path.rho(s)))
    snr_s, snr_n = path.alpha(s) / path.sigma(s), path.alpha(n) / path.sigma(n)
    return path.time(np.log(snr_s + c * (snr_n - snr_s)))


def weighted(factors: Sequence[float], values: Sequence[Value]) -> Value:
    """sum_j factor_j value_j, without the zeros."""
    return sum((f * v for f, v in zip(factors, values, strict=True) if f), Value({}))


def rk_step(p: Program, x: Value, s: np.ndarray, n: np.ndarray, tableau: Tableau, form: str) -> Value:
    """One step from time s to n (lanes,).

    To sigma = 0 it is first order, as in EDM: a stage there would ask the network for noise that is not there. An
    eps-form step from alpha = 0 in any lane is written in x0, whose clock 1/rho is finite there.
    """
    if (p.path.sigma(n) == 0).any():
        tableau = TABLEAUS["1euler"]
    if form == "eps" and (p.path.alpha(s) == 0).any():
        form = "x0"
    d = [p.call(x, t=s, form=form)]
    for c, row in zip(tableau.nodes[1:], tableau.a, strict=True):
        t = fraction(p.path, s, n, c, form)
        y = decay(p.path, s, t, form) * x + (total(p.path, s, t, form) / c) * weighted(row, d)
        d.append(p.call(y, t=t, form=form, base=x))
    return decay(p.path, s, n, form) * x + total(p.path, s, n, form) * weighted(tableau.b, d)


def check_form(path: Path, form: str) -> str:
    """eps, x0, or v where dx/dt is constant for a point mass, else ``ValueError``; "auto": v on a flow, else eps."""
    check_choice("form", form, ("auto", "eps", "x0", "v"))
    if form == "v" and path.name not in ("flow", "edm"):
        raise ValueError(f"form='v' (dx/dt) needs a straight path: flow or edm, got {path.name}")
    return ("v" if path.name == "flow" else "eps") if form == "auto" else form


@solver(paper="2204.13902", calls="the number in method", order=lambda o: TABLEAUS[o["method"]].order)
def rk(path, times, method: str = "3kutta", form: str = "auto") -> Table:
    """Runge-Kutta in rho (``form="eps"``: DEIS' rhoRK), in 1/rho ("x0") or in t ("v"); "auto": v on a flow, else eps.

    ``method`` is one of 1euler, 2heun, 2mid, 2ralston, 3kutta, 3heun, 3ralston, 3ssp, 4. N steps of s stages down to
    sigma = 0 make s (N - 1) + 1 calls. From a flow's t = 1, where rho is infinite, the eps-form is of second order
    whatever the method; x0 and v keep theirs.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import grids
    >>> rk(paths.flow(), grids.uniform(paths.flow(), 4), method="4").calls
    13
    """
    check_choice("method", method, tuple(TABLEAUS))
    form = check_form(path, form)
    p = Program(path, times)
    x = p.start()
    for i in range(p.steps):
        x = rk_step(p, x, p.t[i], p.t[i + 1], TABLEAUS[method], form)
    return p.table(x)
