"""A table for people: as text, and as a picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .table import Table


def describe(table: Table, lane: int = 0) -> str:
    """The rows as equations, one a line."""
    options = ", ".join(f"{k}={v!r}" for k, v in table.options.items())
    what = f"{table.calls} calls, {table.slots} slots" + (f", {table.lanes} lanes (lane {lane} shown)" if table.lanes > 1 else "")
    lines = [f"{table.solver}({options}) on {table.path.get('path')}: {what}", f"{'call':>4} {'t':>9} {'alpha':>9} {'sigma':>9}  then"]

    def register(row: int, out: int) -> str:
        terms = [(table.a[row, lane, out, k], name) for k, name in enumerate(("x", "y") if row else ("noise", "noise"))]
        terms += [(b, f"d{k}") for k, b in enumerate(table.b[row, lane, out])] + [(table.c[row, lane, out], "z")]
        text = " ".join(f"{value:+.5g} {name}" for value, name in terms if value)
        return text.removeprefix("+") or "0"

    def row_text(row: int) -> str:
        x, y = register(row, 0), register(row, 1)
        return f"x = y = {x}" if x == y else f"x = {x};  y = {y}"

    lines.append(f"{'':>4} {'':>9} {'':>9} {'':>9}  {row_text(0)}")
    for call in range(table.calls):
        scalars = " ".join(f"{getattr(table, name)[call, lane]:>9.5g}" for name in ("t", "alpha", "sigma"))
        lines.append(f"{call:>4} {scalars}  d{table.slot[call]} = {table.form[call]};  {row_text(call + 1)}")
    return "\n".join(lines)


def plot(table: Table, file: str | os.PathLike | None = None, lane: int = 0):
    """Left: noise levels of the calls. Right: the unrolled weights, each call's point against the outputs it is made of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unrolled = table.unrolled(lane)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    with np.errstate(divide="ignore"):
        left.plot(np.log(table.alpha[:, lane] / table.sigma[:, lane]), "o-", color="#2a6f97")
    left.set(xlabel="call", ylabel="log(alpha / sigma)", title=f"{table.solver} on {table.path.get('path')}: {table.calls} calls")
    limit = float(np.abs(unrolled.d).max())
    image = right.imshow(unrolled.d, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    right.set(xlabel="stored output of call", ylabel="point of call (last: the result)", title="unrolled weights")
    figure.colorbar(image, ax=right)
    if file is not None:
        figure.savefig(file, dpi=120)
    return figure
