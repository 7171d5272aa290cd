"""How a solver is written: as algebra on values that are not there yet, compiled to a ``Table``.

    >>> import numpy as np
    >>> from fewstep.models import paths
    >>> p = Program(paths.edm(), [80.0, 10.0, 0.0])
    >>> x = p.start()                                            # sigma_0 times unit noise
    >>> for i in range(p.steps):                                 # Euler:  x_n = x + (sigma_n - sigma_s) eps
    ...     eps = p.call(x, at=i, form="eps")
    ...     x = x + (p.sigma[i + 1] - p.sigma[i]) * eps
    >>> p.table(x).b[:, 0, 0, 0].tolist()
    [0.0, -70.0, -10.0]

A value is a linear combination of the two registers, the stored outputs and one fresh normal. ``call`` puts its
argument into register y, and ``base`` into x; both stay usable, other older values do not (a clear error says so).
Coefficients are floats or arrays with one entry a lane.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..models.paths import Path
from .table import Table

Number = Any  # float or (lanes,) array


class Value:
    """A linear combination of symbols; ``terms`` maps ("x" | "y" | "d" | "z", row) to one coefficient a lane."""

    __slots__ = ("terms",)
    __array_ufunc__ = None  # an array times a value is a value, not an array of them

    def __init__(self, terms: dict[tuple[str, int], Number]):
        self.terms = terms

    def __add__(self, other: Value) -> Value:
        if not isinstance(other, Value):
            return NotImplemented
        terms = dict(self.terms)
        for key, value in other.terms.items():
            terms[key] = terms[key] + value if key in terms else value
        return Value(terms)

    def __mul__(self, factor: Number) -> Value:
        return Value({key: value * factor for key, value in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Number) -> Value:
        return self * (1.0 / divisor)

    def __neg__(self) -> Value:
        return self * -1.0

    def __sub__(self, other: Value) -> Value:
        return self + (-other)


def check_times(path: Path, times: Any) -> np.ndarray:
    """Times as float64 of shape (n + 1,) or (lanes, n + 1), strictly falling inside the path; else ``ValueError``.

    Whole numbers are times like any others ([80, 10, 0] on EDM, steps of a discrete path).
    """
    try:
        array = np.asarray(times.detach().cpu() if hasattr(times, "detach") else times)
    except ValueError:
        array = np.array("ragged")
    if array.dtype.kind not in "iuf":
        raise ValueError(
            f"times must be real numbers, an array or a list of equally long lists, got {times!r}"
        )
    array = array.astype(np.float64)
    if array.ndim not in (1, 2) or array.shape[-1] < 2:
        raise ValueError(
            f"times must have shape (n + 1,) or (lanes, n + 1) with at least one step, got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError("times must be finite")
    if (np.diff(array) >= 0).any():
        *lane, step = np.argwhere(np.diff(array) >= 0)[0]
        begin, end = array[(*lane, step)], array[(*lane, step + 1)]
        raise ValueError(
            f"times must fall strictly, from noise to data: step {step} goes from {begin:g} to {end:g}"
        )
    slack = 1e-9 * (path.t_max - path.t_clean)
    if array.max() > path.t_max + slack or array.min() < path.t_clean - slack:
        raise ValueError(f"times must lie in [{path.t_clean:g}, {path.t_max:g}] on {path.name}, "
                         f"got {array.min():g} .. {array.max():g}")  # fmt: skip
    return array


class Program:
    """The grid's scalars as (n + 1, lanes) arrays ``t alpha sigma rho lam``, and the tape that a solver writes."""

    def __init__(self, path: Path, times: Any):
        if not isinstance(path, Path):
            raise TypeError(f"path must be a fewstep path, e.g. denoiser.path, got {type(path).__name__}")
        self.path = path
        self.times = check_times(path, times)
        self.t = np.ascontiguousarray(np.atleast_2d(self.times).T)
        self.steps, self.lanes = self.t.shape[0] - 1, self.t.shape[1]
        self.alpha, self.sigma, self.rho, self.lam = (
            path.alpha(self.t),
            path.sigma(self.t),
            path.rho(self.t),
            path.lam(self.t),
        )
        self._calls: list[tuple[np.ndarray, np.ndarray, np.ndarray, str]] = []
        self._transitions: list[tuple[dict, dict]] = []
        self._noise_row = -1

    def start(self, scale: Number | None = None) -> Value:
        """The opening state: sigma(t_0) times unit noise, unless another scale is given."""
        return Value({("x", 0): self.sigma[0] if scale is None else scale})

    def noise(self) -> Value:
        """The fresh standard normal of the coming transition; one a transition."""
        if self._noise_row == len(self._calls):
            raise RuntimeError("a row has one normal: combine the two, or put a network call between them")
        self._noise_row = len(self._calls)
        return Value({("z", self._noise_row): 1.0})

    def call(
        self,
        point: Value,
        at: int | None = None,
        form: str = "eps",
        base: Value | None = None,
        t: Number = None,
    ) -> Value:
        """Call the network at ``point``, on grid point ``at`` or at time ``t``; the answer as ``form``."""
        if (at is None) == (t is None):
            raise ValueError("call needs either at= (a grid point) or t= (a time)")
        time = (
            self.t[at]
            if t is None
            else np.broadcast_to(np.asarray(t, dtype=np.float64), (self.lanes,)).copy()
        )
        base = point if base is None else base
        self._transitions.append((base.terms, point.terms))
        row = len(self._calls) + 1
        self._calls.append((time, self.path.alpha(time), self.path.sigma(time), form))
        # the same values from now on, read from where they have just been put
        base.terms = {("x", row): 1.0}
        if point is not base:
            point.terms = {("y", row): 1.0}
        return Value({("d", row): 1.0})

    def table(self, x: Value) -> Table:
        """Close the tape with its result, find each output a slot for as long as it is read, and write the arrays."""
        if not self._calls:
            raise ValueError("a table needs at least one row: the program has not called the network")
        transitions = [*self._transitions, (x.terms, x.terms)]
        rows, lanes = len(self._calls), self.lanes
        slot = _slots(transitions, rows)
        a = np.zeros((rows + 1, lanes, 2, 2))
        b = np.zeros((rows + 1, lanes, 2, max(slot) + 1))
        c = np.zeros((rows + 1, lanes, 2))
        for row, registers in enumerate(transitions):
            for out, terms in enumerate(registers):
                for (kind, where), value in terms.items():
                    if kind == "d":
                        b[row, :, out, slot[where - 1]] = value
                    elif where != row:
                        raise RuntimeError(f"row {row} needs a value that was in register {kind} at row {where}: "
                                           "pass it on as base= or write it with stored outputs")  # fmt: skip
                    elif kind == "z":
                        c[row, :, out] = value
                    else:
                        a[row, :, out, "xy".index(kind)] = value
        t, alpha, sigma = (np.stack([call[k] for call in self._calls]) for k in range(3))
        return Table(t, alpha, sigma, tuple(call[3] for call in self._calls), np.array(slot), a, b, c,
                     self.path.to_config(), self.times.copy())  # fmt: skip


def _slots(transitions: list[tuple[dict, dict]], rows: int) -> list[int]:
    """Give call r = 1 .. R a slot that is free from its writing to its last reading."""
    last = [0] * (rows + 1)
    for row, registers in enumerate(transitions):
        for terms in registers:
            for kind, where in terms:
                if kind == "d":
                    last[where] = max(last[where], row)
    slots: list[int] = []
    busy_until: list[int] = []
    for call in range(1, rows + 1):
        free = next((k for k, until in enumerate(busy_until) if until < call), len(busy_until))
        if free == len(busy_until):
            busy_until.append(0)
        busy_until[free] = max(last[call], call)
        slots.append(free)
    return slots


# --- what a solver says of itself --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What a solver says of itself: paper, calls a step, and order of convergence.

    ``order`` is a number, or a function of the options; ``order_of(**options)`` fills in the defaults and evaluates it.
    It is the order that theory gives the table as it is built, its cold start and its lowered last steps included (a
    first-order first step costs O(h^2) in all), for a smooth solution and t from anywhere to t_min; for a stochastic
    solver, the weak order.

    >>> from fewstep.samplers import deis
    >>> deis.entry.order_of(order=1), deis.entry.order_of(order=3)
    (1, 2)
    """

    name: str
    paper: str
    calls: str
    order: int | Callable[[dict[str, Any]], int]
    summary: str
    options: dict[str, Any]

    def order_of(self, **options: Any) -> int:
        """The order of convergence with these options (the rest as by default)."""
        return self.order({**self.options, **options}) if callable(self.order) else self.order


def solver(paper: str, calls: str = "1", order: int | Callable[[dict[str, Any]], int] = 1) -> Callable:
    """Mark a function (path, times, **options) -> Table as a solver: its table remembers its name and options.

    ``order`` is the order of convergence: a number, or a function of the dict of options.
    """

    def mark(function: Callable[..., Table]) -> Callable[..., Table]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def build(path: Path, times: Any, **options: Any) -> Table:
            try:
                bound = signature.bind(path, times, **options)
            except TypeError as error:
                known = ", ".join(list(signature.parameters)[2:]) or "none"
                raise ValueError(f"{function.__name__}: {error}; its options are: {known}") from None
            bound.apply_defaults()
            table = function(*bound.args, **bound.kwargs)
            used = {k: _plain(v) for k, v in list(bound.arguments.items())[2:]}
            return replace(table, solver=function.__name__, options=used)

        options = {k: v.default for k, v in list(signature.parameters.items())[2:]}
        summary = (function.__doc__ or "").strip().splitlines()[0] if function.__doc__ else ""
        build.entry = Entry(function.__name__, paper, calls, order, summary, options)  # type: ignore[attr-defined]
        return build

    return mark


def _plain(value: Any) -> Any:
    """An option as JSON can hold it."""
    if isinstance(value, float) and not np.isfinite(value):
        return repr(value)
    if isinstance(value, (str, bool, int, float, type(None))):
        return value
    if isinstance(value, (list, tuple, np.ndarray)):
        return np.asarray(value).tolist()
    return getattr(value, "__name__", repr(value))
