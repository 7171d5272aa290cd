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
    what = f"{table.calls} calls, {table.slots} slots" + (
        f", {table.lanes} lanes (lane {lane} shown)" if table.lanes > 1 else ""
    )
    lines = [
        f"{table.solver}({options}) on {table.path.get('path')}: {what}",
        f"{'call':>4} {'t':>9} {'alpha':>9} {'sigma':>9}  then",
    ]

    def register(row: int, out: int) -> str:
        terms = [
            (table.a[row, lane, out, k], name)
            for k, name in enumerate(("x", "y") if row else ("noise", "noise"))
        ]
        terms += [(b, f"d{k}") for k, b in enumerate(table.b[row, lane, out])] + [
            (table.c[row, lane, out], "z")
        ]
        text = " ".join(f"{value:+.5g} {name}" for value, name in terms if value).removeprefix("+") or "0"
        return text.removeprefix("1 ") if text.endswith((" x", " y")) else text

    def row_text(row: int) -> str:
        x, y = register(row, 0), register(row, 1)
        return f"x = y = {x}" if x == y else f"x = {x};  y = {y}"

    lines.append(f"{'':>4} {'':>9} {'':>9} {'':>9}  {row_text(0)}")
    for call in range(table.calls):
        scalars = " ".join(f"{getattr(table, name)[call, lane]:>9.5g}" for name in ("t", "alpha", "sigma"))
        lines.append(f"{call:>4} {scalars}  d{table.slot[call]} = {table.form[call]};  {row_text(call + 1)}")
    return "\n".join(lines)


def plot(table: Table, file: str | os.PathLike | None = None, lane: int = 0):
    """Left: where the calls stand in noise. Right: every call's x0 estimate, its share in each point and the result."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures are drawn by matplotlib: pip install matplotlib (or fewstep[demo])"
        ) from error

    calls = table.calls
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    options = ", ".join(f"{k}={v}" for k, v in table.options.items() if v is not None)
    figure.suptitle(
        f"{table.solver}({options}) on {table.path.get('path')}: {calls} network calls", fontsize=11
    )
    _plot_levels(left, table, lane)
    _plot_shares(right, table.unrolled(lane, form="x0").d, calls)
    if file is not None:
        figure.savefig(file, dpi=120)
    return figure


def _plot_levels(axes, table: Table, lane: int) -> None:
    """log-SNR of the calls, the points of one step joined by a line; alpha = 0 has none and hangs at the lower edge."""
    with np.errstate(divide="ignore"):
        lam = np.log(table.alpha[:, lane] / table.sigma[:, lane])
    known = np.flatnonzero(np.isfinite(lam))
    axes.plot(known, lam[known], "-", color="#9db4c0", zorder=1)
    axes.scatter(known, lam[known], c=lam[known], cmap="viridis", s=46, edgecolor="white", zorder=2)
    low, high = (lam[known].min(), lam[known].max()) if len(known) else (-1.0, 1.0)
    margin = 0.12 * max(high - low, 1.0)
    for call in np.flatnonzero(~np.isfinite(lam)):
        axes.annotate("pure noise", (call, low - margin), (call + 0.3, low - 0.6 * margin), color="#5c6b73",
                      arrowprops={"arrowstyle": "->", "color": "#5c6b73"})  # fmt: skip
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(-0.6, table.calls - 0.4)
    axes.set(xlabel="network call", ylabel="log(alpha / sigma):  noise below, data above")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_shares(axes, shares: np.ndarray, calls: int) -> None:
    """Rows are the points at which the network was called and, last, the result; what lies in the future is blank."""
    future = np.triu(np.ones_like(shares, dtype=bool))
    scale = np.abs(shares).max(axis=1, keepdims=True)
    shown = np.ma.array(shares / np.where(scale > 0, scale, 1.0), mask=future)
    axes.imshow(shown, cmap="RdBu", vmin=-1.3, vmax=1.3, aspect="auto", interpolation="nearest")
    if calls <= 12:
        for row, column in np.argwhere(~future):
            value = shares[row, column]
            text = f"{value:.2f}".replace("-0.00", "0.00") if abs(value) < 10 else f"{value:.0f}"
            color = "white" if abs(shown[row, column]) > 0.75 else "#333333"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
    marks = range(0, calls, max(1, calls // 12))
    axes.set_xticks(list(marks), [f"x0 of {k}" if calls <= 6 else str(k) for k in marks])
    axes.set_yticks([*marks, calls], [*(str(k) for k in marks), "result"])
    axes.axhline(calls - 0.5, color="#333333", linewidth=1)
    axes.set(
        xlabel="made of the x0 estimate of call",
        ylabel="point of call",
        title="weight of each estimate; the largest of a row is darkest",
    )
    axes.title.set_fontsize(9)
    axes.spines[:].set_visible(False)
