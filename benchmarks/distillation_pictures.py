"""Pictures of what ``benchmarks/distillation.py digits`` made: students beside their teacher, and how they got there.

    python benchmarks/distillation_pictures.py               # from runs/benchmark, or --runs

distillation-digits-cpu.png: the same noise through the teacher and each student of the first seed, a digit a column.
distillation-digits-curves.png and .json: Frechet distance to the teacher's samples against student updates, of 1000
samples each, so a little above the table's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fewstep.benchmarks.distillation import DIGITS, RESULTS, SEEDS, kept_at
from fewstep.distill.saved import metrics, open_student
from fewstep.eval import images
from fewstep.eval.files import written_aside
from fewstep.models import load
from fewstep.models.checkpoint import write_atomically
from fewstep.samplers import ddim, grids, heun, sample, starting_noise


def folder(runs: Path, name: str, seed: int) -> Path:
    """Of a cell's run."""
    return kept_at("digits", name, seed, runs, []).with_suffix("")


def students(runs: Path):
    """The grid, a PIL picture."""
    d, cond = load("digits-edm"), {"label": torch.arange(10)}
    noise = starting_noise(5, 10, d.shape)
    tables = {
        "teacher, 35 calls": heun(d.path, grids.karras(d.path, 18)),
        "teacher, Euler, 4 calls": ddim(d.path, grids.karras(d.path, 4)),
        "teacher, Euler, 1 call": ddim(d.path, grids.karras(d.path, 1)),
    }
    rows = {name: sample(d, noise, table, cond=cond) for name, table in tables.items()}
    for name in DIGITS:
        rows[name] = open_student(folder(runs, name, SEEDS[0]))[0].sample(noise, cond, seed=5)
    return images.grid(
        images.to_uint8(torch.cat(list(rows.values()))), columns=10, labels_rows=list(rows), scale=5
    )


def curves(runs: Path) -> dict[str, dict[str, list[list[float]]]]:
    """name -> seed -> [[iteration, FD to the teacher's samples], ..], of the seeds that were measured on their way."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name in DIGITS:
        for seed in SEEDS:
            lines = metrics(folder(runs, name, seed))
            marked = [[line["iteration"], line["main"]] for line in lines if "main" in line]
            if len(marked) > 1:
                found.setdefault(name, {})[str(seed)] = marked
    return found


def draw(found: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """A line a method, the mean over seeds, in the band that they span."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for k, (name, seeds) in enumerate(found.items()):
        values = torch.tensor(list(seeds.values()))
        iterations, fd = values[0, :, 0], values[..., 1]
        axis.plot(iterations, fd.mean(0), color=f"C{k}", label=name, linewidth=1.3)
        axis.fill_between(iterations, fd.amin(0), fd.amax(0), color=f"C{k}", alpha=0.15, linewidth=0)
    axis.set(xlabel="student updates", ylabel="FD to the teacher's samples", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    found = curves(arguments.runs)
    stem = RESULTS / "distillation-digits-curves"
    write_atomically(stem.with_suffix(".json"), json.dumps(found) + "\n")
    draw(found, stem.with_suffix(".png"))
    images.save_png(RESULTS / "distillation-digits-cpu.png", students(arguments.runs))


if __name__ == "__main__":
    main()
