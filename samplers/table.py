"""A solver as data: a ``Table`` of float64 coefficients that one loop can run on any denoiser.

There are two registers, x (the accepted state) and y (the point where the network is called), and K slots of history.
Row 0 opens: it scales unit noise, both registers holding the noise. Row r = 1 .. R then follows network call r - 1: the
network is fed y at (t, alpha, sigma), its answer is stored in a slot as ``form`` (eps, x0 or v = dx/dt), and from the
old registers, the history and one fresh standard normal z

    x' = a[0].(x, y) + b[0].d + c[0] z          y' = a[1].(x, y) + b[1].d + c[1] z

Multistep, Runge-Kutta, predictor-corrector, churn and re-noising are all rows of this kind. Every array carries a lanes
axis, so that the samples of a batch may follow different coefficients.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import ddim, grids
    >>> table = ddim(paths.flow(), grids.uniform(paths.flow(), 4))
    >>> table.calls, table.lanes, table.t[:, 0].tolist()
    (4, 1, [1.0, 0.75, 0.5, 0.25])
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from ..models import paths
from ..models.denoiser import FORMS, Denoiser, convert

if TYPE_CHECKING:
    from .plan import Plan

VERSION = 1
_ARRAYS = ("t", "alpha", "sigma", "slot", "a", "b", "c")


class Unrolled(NamedTuple):
    """Every call's point, and last the result, as a combination of noise, stored d and fresh z (one lane)."""

    noise: np.ndarray  # (R + 1,)
    d: np.ndarray  # (R + 1, R)
    z: np.ndarray  # (R + 1, R + 1), column r belongs to row r


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """R network calls, L lanes, K slots. ``t``, ``alpha``, ``sigma``: (R, L); ``slot``: (R,); ``form``: R names;
    ``a``: (R + 1, L, 2, 2); ``b``: (R + 1, L, 2, K); ``c``: (R + 1, L, 2)."""

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    form: tuple[str, ...]
    slot: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    path: dict
    times: np.ndarray
    solver: str = "table"
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in (*_ARRAYS, "times"):  # copies of its own, which nobody writes to
            object.__setattr__(self, name, _array(name, getattr(self, name)))
        object.__setattr__(self, "form", tuple(self.form))
        self.check()

    @property
    def calls(self) -> int:
        """How often the network is called for a sample."""
        return len(self.form)

    @property
    def lanes(self) -> int:
        """How many sets of coefficients stand side by side."""
        return self.t.shape[1]

    @property
    def slots(self) -> int:
        """How many stored outputs are alive at once."""
        return self.b.shape[-1]

    @property
    def stochastic(self) -> bool:
        """Whether any row draws fresh noise."""
        return bool((self.c != 0).any())

    def check(self) -> None:
        """Raise ``ValueError`` unless the arrays fit together, are finite, and read only slots that were written."""
        rows, lanes = len(self.form), self.t.shape[-1] if self.t.ndim else 0
        slots = self.b.shape[-1] if self.b.ndim == 4 else 0
        shapes = {
            "t": (rows, lanes), "alpha": (rows, lanes), "sigma": (rows, lanes), "slot": (rows,),
            "a": (rows + 1, lanes, 2, 2), "b": (rows + 1, lanes, 2, slots), "c": (rows + 1, lanes, 2),
        }  # fmt: skip
        if rows == 0 or lanes == 0:
            raise ValueError(f"a table needs at least one row and one lane, got {rows} and {lanes}")
        if self.times.ndim not in (1, 2) or self.times.ndim == 2 and len(self.times) != lanes:
            raise ValueError(f"times must have shape (n + 1,) or ({lanes}, n + 1), got {self.times.shape}")
        if not (np.diff(self.times) < 0).all():
            raise ValueError(f"times must be finite and fall strictly, got {self.times.tolist()}")
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape:
                raise ValueError(f"{name} must have shape {shape} for {rows} calls, got {array.shape}")
            bad = ~np.isfinite(array)
            if bad.any():
                row = int(np.argwhere(bad)[0][0])
                raise ValueError(
                    f"{name} is not finite in row {row} of {self.solver}: check the times and the order there"
                )
        unknown = [form for form in self.form if form not in FORMS]
        if unknown:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {unknown[0]!r}")
        if ((self.slot < 0) | (self.slot >= max(slots, 1))).any():
            raise ValueError(f"slot must lie in 0 .. {slots - 1}, got {self.slot.tolist()}")
        written: set[int] = set()
        for row in range(rows + 1):
            if row:
                written.add(int(self.slot[row - 1]))
            read = set(np.flatnonzero((self.b[row] != 0).any(axis=(0, 1))).tolist())
            if not read <= written:
                raise ValueError(f"row {row} reads slot {min(read - written)}, which no call has written yet")

    def on(self, d: Denoiser, device: torch.device | str = "cpu") -> Plan:
        """This table's coefficients with the denoiser's conversion folded in: made once, used for every step."""
        from .plan import Plan

        return Plan(self, d, torch.device(device))

    def unrolled(self, lane: int = 0, form: Literal["stored", "x0"] = "stored") -> Unrolled:
        """Substitute the rows into one another: two solvers are the same if and only if these matrices are.

        With ``form="x0"`` d are the estimates of x0 behind what is stored: of a start at alpha = 0 the weights of a
        point sum to its alpha.
        """
        if form not in ("stored", "x0"):
            raise ValueError(f"form must be 'stored' or 'x0', got {form!r}")
        path = paths.from_config(self.path)
        rows, slots = self.calls, self.slots
        width = 1 + rows + rows + 1
        x = y = np.eye(1, width)[0]
        history = np.zeros((slots, width))
        points = []
        for row in range(rows + 1):
            if row:
                p, q = 0.0, 1.0
                if form == "x0":
                    stored = self.form[row - 1]
                    p, q = convert(
                        path, float(self.t[row - 1, lane]), "x0", "flow" if stored == "v" else stored
                    )
                history[self.slot[row - 1]] = p * y + q * np.eye(1, width, row)[0]
            z = np.eye(1, width, 1 + rows + row)[0]
            a, b, c = self.a[row, lane], self.b[row, lane], self.c[row, lane]
            x, y = (a[k, 0] * x + a[k, 1] * y + b[k] @ history + c[k] * z for k in (0, 1))
            points.append(x if row == rows else y)
        stacked = np.stack(points)
        return Unrolled(stacked[:, 0], stacked[:, 1 : 1 + rows], stacked[:, 1 + rows :])

    def lane(self, index: int) -> Table:
        """One lane as a table of its own."""
        if not 0 <= index < self.lanes:
            raise ValueError(f"lane must lie in 0 .. {self.lanes - 1}, got {index}")
        pick = slice(index, index + 1)
        times = self.times if self.times.ndim == 1 else self.times.reshape(-1, self.times.shape[-1])[index]
        cut = {name: getattr(self, name)[:, pick].copy() for name in ("t", "alpha", "sigma", "a", "b", "c")}
        return replace(self, times=times.copy(), **cut)

    # --- as an artefact ------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The table as JSON text: every float64 is written so that it reads back to the same bits."""
        content: dict[str, Any] = {
            "fewstep_table": VERSION, "solver": self.solver, "options": self.options, "path": self.path,
            "times": self.times.tolist(), "form": list(self.form),
        }  # fmt: skip
        content.update({name: getattr(self, name).tolist() for name in _ARRAYS})
        return json.dumps(content, allow_nan=False)

    def save(self, file: str | os.PathLike) -> None:
        """Write JSON, aside first and then renamed, so that no half-written table is ever seen."""
        target = FilePath(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        try:
            with os.fdopen(handle, "w") as out:
                out.write(self.to_json())
            os.chmod(aside, 0o644)
            os.replace(aside, target)
        except BaseException:
            os.unlink(aside)
            raise

    @staticmethod
    def from_json(text: str) -> Table:
        """Read what ``to_json`` wrote; everything is checked again."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a table: the file is no JSON ({error})") from None
        if not isinstance(content, dict) or "fewstep_table" not in content:
            raise ValueError("not a table: the key 'fewstep_table' is missing")
        if content["fewstep_table"] != VERSION:
            raise ValueError(
                f"this table has format {content['fewstep_table']!r}; this version reads {VERSION}"
            )
        missing = [k for k in (*_ARRAYS, "times", "form", "path", "solver", "options") if k not in content]
        if missing:
            raise ValueError(f"not a table: {', '.join(missing)} missing")
        for name, kind in (("form", list), ("path", dict), ("solver", str), ("options", dict)):
            if not isinstance(content[name], kind):
                raise ValueError(f"not a table: {name} must be a {kind.__name__}, got {content[name]!r}")
        paths.from_config(content["path"])
        return Table(**{name: value for name, value in content.items() if name in Table.__dataclass_fields__})

    def __reduce__(self):
        return Table.from_json, (self.to_json(),)

    @staticmethod
    def load(file: str | os.PathLike) -> Table:
        """Read a table that ``save`` wrote."""
        return Table.from_json(FilePath(file).read_text())

    def __repr__(self) -> str:
        from .show import describe

        return describe(self)

    def plot(self, file: str | os.PathLike | None = None, lane: int = 0):
        """A picture of the noise levels and the unrolled weights: a matplotlib figure, written to ``file`` if given."""
        from .show import plot

        return plot(self, file, lane)


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers ({error})") from None
    if name == "slot":
        if not (array == array.round()).all():
            raise ValueError(f"slot must be integers, got {array.tolist()}")
        array = array.astype(np.int64)
    array.setflags(write=False)
    return array
