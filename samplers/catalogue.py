"""Solvers and grids by name, for the shell and for configs; from Python, import the function.

>>> find("deis").entry.paper
'2204.13902'
>>> "logsnr" in grid_names()
True
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from . import grids as _grids


def solvers() -> dict[str, Callable]:
    """Every solver that ``fewstep.samplers`` exports, by name."""
    from .. import samplers

    exported = ((name, getattr(samplers, name)) for name in samplers.__all__)
    return {name: thing for name, thing in exported if hasattr(thing, "entry")}


def find(name: str) -> Callable:
    """The solver called ``name``."""
    return _pick("solver", name, solvers())


def find_grid(name: str) -> Callable:
    """The grid called ``name``: a function (path, n, ...) -> times."""
    return _pick("grid", name, {key: getattr(_grids, key) for key in grid_names()})


def grid_names() -> tuple[str, ...]:
    """The grids that need nothing but a path and a number of steps."""
    return _grids.NAMES


def _pick(kind: str, name: str, known: dict[str, Callable]) -> Callable:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"{kind} must be one of {', '.join(known)}, got {name!r}{hint}")
