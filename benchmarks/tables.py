"""The README's tables of time shift, teleportation and search, from the results that lie in ``benchmarks/results``.

    python benchmarks/tables.py            writes them into README.md, between their two marks
    python benchmarks/tables.py --run      measures everything anew first: a quarter of an hour on one quiet core

A number in the README is the number in the JSON: a test renders them and compares.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/tables.py: begin -->", "<!-- end -->"
MODEL = "digits-edm"
RUNS = (("shift_and_teleport.py",), ("search.py",), ("search.py", "--metric", "fd"))

MATCHES = ("noise", "marginal")

Rows = list[dict[str, Any]]


def paper(number: str) -> str:
    """A link to it."""
    return f"[{number}](https://arxiv.org/abs/{number})"


def shifted(rows: Rows, model: str = MODEL) -> list[str]:
    """Plain and time-shifted, a row a solver and a column a number of steps."""
    rows = [row for row in rows if row["problem"] == model]
    steps = sorted({row["steps"] for row in rows})
    lines = [
        f"| {model} | " + " | ".join(f"{n} steps" for n in steps) + " |",
        "|---" + "|--:" * len(steps) + "|",
    ]
    for solver in dict.fromkeys(row["solver"] for row in rows):
        cells = {row["steps"]: row for row in rows if row["solver"] == solver}
        text = (
            " / ".join(f"{cells[n][key]['fd']:.2f}" for key in ("plain", "noise", "marginal")) for n in steps
        )
        lines.append(f"| {solver} | " + " | ".join(text) + " |")
    return lines


def skipped(rows: Rows, model: str = MODEL) -> list[str]:
    """FD by the share of calls skipped, a row a solver and a column a tenth of the calls."""

    def told(cell: dict[str, float]) -> str:
        return f"{cell['fd']:.2f}" + (f" ± {cell['loss_se']:.2f}" if cell.get("loss_se") else "")

    rows = [row for row in rows if row["problem"] == model]
    tenths = sorted({row["skipped"] for row in rows})
    lines = [
        f"| {model} | none | " + " | ".join(f"{n}0 %" for n in tenths[1:]) + " |",
        "|---" + "|--:" * len(tenths) + "|",
    ]
    for solver in dict.fromkeys(row["solver"] for row in rows):
        mine = {row["skipped"]: row for row in rows if row["solver"] == solver}
        cells = " | ".join(told(mine[n]["seeded, a class"]) for n in tenths)
        lines.append(f"| {solver}, {mine[0]['calls']} calls | {cells} |")
    return lines


def searched(rows: Rows) -> list[str]:
    """The best made by hand and what was found, a row a problem and a column a number of calls."""
    calls = sorted({row["calls"] for row in rows})
    lines = ["| | " + " | ".join(f"{n} calls" for n in calls) + " |", "|---" + "|--:" * len(calls) + "|"]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        cells = {row["calls"]: row for row in rows if row["problem"] == problem}
        text = (f"{cells[n]['error_by_hand']:.4f} / **{cells[n]['error']:.4f}**" for n in calls)
        lines.append(f"| {problem} | " + " | ".join(text) + " |")
    return lines


def by_metric(results: dict[str, Any]) -> list[str]:
    """The mean over seeds, a row a search."""

    def mean(values: list[float]) -> str:
        return f"{sum(values) / len(values):.2f}"

    lines = ["| searched by | calls | best by hand | first stage | by the metric |", "|---|--:|--:|--:|--:|"]
    for row in results["rows"]:
        cells = " | ".join(mean(row[key]) for key in ("by_hand", "first_stage", "searched"))
        lines.append(f"| {row['metric']} | {row['calls']} | {cells} |")
    return lines


def wins(rows: Rows, key: str, problems: tuple[str, ...]) -> str:
    """In how many cells the FD of labels matched so is better than that of plain ones."""
    some = [row for row in rows if row["problem"] in problems]
    return f"{sum(row[key]['fd'] < row['plain']['fd'] for row in some)} of {len(some)}"


def largest(rows: Rows, model: str = MODEL) -> float:
    """The largest change of FD, in its standard errors, of up to three steps skipped."""
    cells = [row["seeded, a class"] for row in rows if row["problem"] == model and 1 <= row["skipped"] <= 3]
    return max(abs(cell["loss"]) / cell["loss_se"] for cell in cells)


def lossless(found: Rows) -> str:
    """Of every solver, what may be skipped at no loss of FD on each of the models."""
    models = list(dict.fromkeys(row["problem"] for row in found))
    shares = {(row["solver"], row["problem"]): f"{100 * row['share']:.0f}" for row in found}
    solvers = dict.fromkeys(row["solver"] for row in found)
    each = [f"{solver} {', '.join(shares[solver, model] for model in models)} %" for solver in solvers]
    return f"on {', '.join(models)}: {'; '.join(each)}"


def section() -> str:
    """What stands between the marks."""
    shift = json.loads((RESULTS / "shift-and-teleport-cpu.json").read_text())["results"]
    search = json.loads((RESULTS / "search-cpu.json").read_text())
    digits, wide = tuple(name for name in shift["floor"] if name.startswith("digits")), ("mixture-wide",)
    on_digits, on_wide = ([wins(shift["shift"], key, names) for key in MATCHES] for names in (digits, wide))
    ratios = [row["error_by_hand"] / row["error"] for row in search["rows"] if row["problem"] == "digits"]
    paragraphs = [
        f"**Time shift** ({paper('2305.15583')}), FD of {shift['num']} digits: *plain / labels matched to the noise, "
        f"as in the paper / to the marginal*. The ODE's own samples have {shift['floor'][MODEL]:.2f}.",
        "\n".join(shifted(shift["shift"])),
        f"On the three digits networks matching the noise is better than nothing in {on_digits[0]} cells, matching the "
        f"marginal in {on_digits[1]}. (A digit's 64 pixels hardly tell its variance. With 3072 and an exact score, "
        f"samples come nearer to the data's mean log-density in {on_wide[0]} and {on_wide[1]}.)",
        f"**Teleportation** ({paper('2412.09726')}), the same FD by the share of calls skipped, the first of 10 steps "
        "being made in closed form by a Gaussian a class; ± is the standard error of the change from the same noise:",
        "\n".join(skipped(shift["skip"])),
        f"No change up to 30 % is more than {largest(shift['skip']):.1f} of its standard errors. So many of the calls "
        f"may go while FD itself stays within 1 %, {lossless(shift['lossless'])}.",
        f"**Search** ({paper('2312.07243')}), distance to the ODE's solution on noise that no search has seen: *the "
        "best of all solvers made by hand, on that noise* / **searched**.",
        "\n".join(searched(search["rows"])),
        f"On digits it is nearer by {min(ratios):.1f} to {max(ratios):.1f} times. The mixture's score is exact; means "
        "are geometric, so the few samples that fall on the wrong side of a watershed weigh no more than others.",
    ]
    if (RESULTS / "search-fd-cpu.json").exists():
        metric = json.loads((RESULTS / "search-fd-cpu.json").read_text())
        bare = sum(metric["floor"]) / len(metric["floor"])
        paragraphs += [
            f"And by a metric, the FD of {metric['num']} digits of other seeds; the ODE's own samples have {bare:.2f}, "
            "and the metric tells nothing apart that is as low:",
            "\n".join(by_metric(metric)),
        ]
    reports = " and ".join(
        f"[{name}](benchmarks/results/{name}-cpu.md)" for name in ("shift-and-teleport", "search")
    )
    paragraphs.append(f"`make tables` makes these; all rows are in {reports}.")
    fold = partial(textwrap.fill, width=140, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(text if text.startswith("|") else fold(text) for text in paragraphs)


def placed(text: str, content: str) -> str:
    """The README's text with that content between its marks."""
    head, mark, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"the README must hold the marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{content}\n\n{END}{tail}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="measure everything anew first")
    if parser.parse_args(arguments).run:
        for old in ("shift-and-teleport-cpu", "search-cpu", "search-fd-cpu"):
            (RESULTS / f"{old}.json").unlink(missing_ok=True)  # rows that are there would be kept
        for script, *words in RUNS:
            subprocess.run([sys.executable, HERE / script, *words, "--out", RESULTS], check=True)
    README.write_text(placed(README.read_text(encoding="utf-8"), section()), encoding="utf-8")
    print(f"{README}: written")


if __name__ == "__main__":
    main()
