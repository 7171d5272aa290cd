"""What a suite found, as one page that needs nothing else: curves, samples of one noise, tables, the protocol.

out/index.html      the page, pictures and all
out/table.csv       every number with its protocol
out/quality.png     metrics against network calls, a line a sampler
out/samples.png     samples of the same noise, a row a sampler, a column a budget
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from .files import written_aside
from .images import grid
from .protocol import Protocol

COLUMNS = (
    "sampler", "budget", "calls", "metric", "value", "stderr", "settings", "features", "weights", "resize", "rounding",
    "num", "reference", "seeds", "expected", "source",
)  # fmt: skip
BETTER_HIGH = ("is", "precision", "recall", "density", "coverage")
UNITS = {
    "fd": "Fréchet distance of features",
    "kid": "kernel distance of features",
    "kid-full": "kernel distance, all pairs",
    "is": "inception score",
    "sw2": "sliced Wasserstein distance",
    "precision": "share of the samples",
    "recall": "share of the reference",
    "density": "1 as in the reference",
    "coverage": "share of the reference",
}


def report(
    results: Mapping[str, Any],
    pictures: Mapping[tuple[str, int], torch.Tensor],
    folder: str | Path,
    title: str = "Samplers by network calls",
    about: str = "",
) -> Path:
    """Write the page and its parts; the page's path.

    results: as ``suite.run`` gives them. pictures: bytes (k, C, H, W) of each (sampler, budget), the same noise in all.
    """
    folder = Path(folder)
    rows = [{name: row.get(name) for name in COLUMNS} for row in results["rows"]]
    if not rows:
        raise ValueError("results has no rows: nothing was measured")
    quality, samples = _png(curves(rows)), _png(_samples(pictures))
    for name, content in (
        ("quality.png", quality),
        ("samples.png", samples),
        ("table.csv", _csv(rows).encode()),
        ("index.html", _page(results, rows, quality, samples, title, about).encode()),
    ):
        with written_aside(folder / name) as aside:
            aside.write_bytes(content)
    return folder / "index.html"


def shown(value: Any) -> str:
    """A number as tables and CSV have it: six digits, nothing for what is not there.

    >>> shown(3.14159265), shown(None), shown(50000), shown("k 3")
    ('3.14159', '', '50000', 'k 3')
    """
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def curves(rows: Sequence[Mapping[str, Any]]):
    """A matplotlib figure: a panel a metric, its value against network calls, a line a sampler."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    except ImportError as error:
        raise ImportError(f"reports need matplotlib ({error}): pip install 'fewstep[eval]'") from error
    metrics, samplers = _once(r["metric"] for r in rows), _once(r["sampler"] for r in rows)
    columns = min(3, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 0.9 + 3.2 * lines), layout="constrained", dpi=110)
    figure.get_layout_engine().set(hspace=0.06)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, metric in zip(axes, metrics, strict=False):
        values = [r["value"] for r in rows if r["metric"] == metric]
        for index, sampler in enumerate(samplers):
            mine = sorted(
                (r for r in rows if (r["metric"], r["sampler"]) == (metric, sampler)),
                key=lambda r: r["calls"],
            )
            x, y = [r["calls"] for r in mine], [r["value"] for r in mine]
            bars = [r["stderr"] or 0.0 for r in mine]
            if any(bars):
                ax.errorbar(x, y, bars, color=f"C{index % 10}", linestyle="none", capsize=2)
            ax.plot(x, y, color=f"C{index % 10}", marker="o", markersize=4, label=sampler)
            papers = [(r["calls"], r["expected"]) for r in mine if r["expected"] is not None]
            if papers:
                ax.plot(
                    *zip(*papers, strict=True), "x", color=f"C{index % 10}", label=f"{sampler}, as published"
                )
        ticks = sorted({r["budget"] for r in rows})
        ax.set(xscale="log", xlabel="network calls a sample", ylabel=UNITS.get(metric, metric))
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.set_xticks([], minor=True)
        if min(values) > 0 and metric not in BETTER_HIGH:
            ax.set_yscale("log")
            wide = max(values) > 4 * min(values)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)) if wide else MaxNLocator(5))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        ax.set_title(f"{metric}, {'higher' if metric in BETTER_HIGH else 'lower'} is better", fontsize=10)
        ax.grid(alpha=0.3, which="both")
    lines_of = {
        label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        lines_of.values(),
        lines_of.keys(),
        loc="outside lower center",
        ncols=2 * columns,
        fontsize=9,
        frameon=False,
    )
    for ax in axes[len(metrics) :]:
        ax.set_visible(False)
    return figure


def _samples(pictures: Mapping[tuple[str, int], torch.Tensor]):
    """A picture: samplers down, budgets across, in each cell the same noise."""
    from .images import tile

    samplers, budgets = _once(s for s, _ in pictures), sorted(_once(b for _, b in pictures))
    one = next(iter(pictures.values()))
    empty = torch.zeros_like(one)

    def cell(key: tuple[str, int]) -> torch.Tensor:
        apart = functional.pad(pictures.get(key, empty), (1, 1, 1, 1), value=128)  # a grey line between two
        return tile(apart, columns=min(len(one), 5))

    cells = [cell((s, b)) for s in samplers for b in budgets]
    return grid(
        torch.stack(cells), len(budgets), [_folded(s) for s in samplers], [f"{b} calls" for b in budgets],
        scale=max(1, 40 // one.shape[-1]),
    )  # fmt: skip


def _folded(name: str) -> str:
    """A long name on several lines, so that it stands beside a picture."""
    for mark in (":", "@", "+"):
        name = name.replace(mark, "\n" + mark)
    return name.replace(",", ",\n")


def _png(figure: Any) -> bytes:
    held = io.BytesIO()
    if hasattr(figure, "savefig"):
        figure.savefig(held, format="png")
    else:
        figure.save(held, format="PNG")
    return held.getvalue()


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([shown(row[name]) for name in COLUMNS] for row in rows)
    return held.getvalue()


def _page(results, rows, quality: bytes, samples: bytes, title: str, about: str) -> str:
    text = html.escape
    tables = "".join(_by_calls(metric, rows) for metric in _once(r["metric"] for r in rows))
    protocol = Protocol(**{k: rows[0][k] for k in Protocol.__dataclass_fields__}).line()
    told = ", ".join(f"{k} {v}" for k, v in results.get("told", {}).items())
    versions = ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items() if v is not None)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{text(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100%; image-rendering: auto }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
td.best {{ font-weight: 600 }}
footer, small {{ color: #555; font-size: 13px }}
.wide {{ overflow-x: auto; font-size: 13px; white-space: nowrap }}
.wide td {{ max-width: 9rem; overflow: hidden; text-overflow: ellipsis }}
.wide td:first-child {{ max-width: none }}
.beside {{ display: flex; flex-wrap: wrap; gap: 0 3rem }}
h3 {{ margin: 1rem 0 -.5rem }}
</style>
<h1>{text(title)}</h1>
<p>{text(about)}</p>
<h2>Quality against network calls</h2>
<img alt="Metrics against network calls, a line a sampler" src="{_embedded(quality)}">
<div class="beside">{tables}</div>
<h2>Samples of the same noise</h2>
<img alt="Samples, a row a sampler and a column a budget of calls" src="{_embedded(samples)}">
<h2>Every number</h2>
<div class="wide">{_long(rows)}</div>
<footer>
<p>Measured: {text(protocol)}</p>
<p>Sampled: {text(told)}</p>
<p>With: {text(versions)}</p>
</footer>
</html>
"""


def _by_calls(metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    mine = [r for r in rows if r["metric"] == metric]
    budgets = sorted(_once(r["budget"] for r in mine))
    held = {(r["sampler"], r["budget"]): r for r in mine}
    pick = max if metric in BETTER_HIGH else min
    best = {b: pick(r["value"] for r in mine if r["budget"] == b) for b in budgets}
    lines = []
    for sampler in _once(r["sampler"] for r in mine):
        cells = [held.get((sampler, b)) for b in budgets]
        lines.append(
            f"<tr><td>{html.escape(sampler)}</td>"
            + "".join("<td></td>" if r is None else _cell(r, r["value"] == best[r["budget"]]) for r in cells)
            + "</tr>"
        )
    heads = "".join(f"<th>{b} calls</th>" for b in budgets)
    name = html.escape(UNITS.get(metric, metric))
    table = f"<table><tr><th></th>{heads}</tr>{''.join(lines)}</table>"
    return f"<section><h3>{html.escape(metric)} <small>{name}</small></h3>{table}</section>\n"


def _cell(row: Mapping[str, Any], best: bool) -> str:
    fewer = f" <small>({row['calls']} calls)</small>" if row["calls"] != row["budget"] else ""
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.2g}"
    paper = "" if row["expected"] is None else f" <small>paper {shown(row['expected'])}</small>"
    return f"<td{' class=best' if best else ''}>{row['value']:#.4g}{error}{fewer}{paper}</td>"


def _long(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(shown(row[name]))}</td>" for name in COLUMNS) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{heads}</tr>{body}</table>"


def _embedded(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _once(values) -> list:
    return list(dict.fromkeys(values))
