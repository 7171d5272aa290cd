"""Picture of what ``benchmarks/distillation.py mixture`` made: students over the 25 modes, from one start.

    python benchmarks/distillation_modes.py            # from runs/benchmark, or --runs; the first seed there is

distillation-mixture-cpu.png: exact samples, then each student; rings of four standard deviations are the modes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fewstep.benchmarks.distillation import MIXTURE, RESULTS, SEEDS, kept_at
from fewstep.distill.data import STD, grid_means, mixture_samples
from fewstep.distill.draws import Draws
from fewstep.distill.saved import open_student
from fewstep.eval.files import written_aside
from fewstep.samplers import starting_noise


def panels(runs: Path, count: int = 2000) -> dict[str, torch.Tensor]:
    """name -> samples (N, 2), of the first seed of each method that has one."""
    made = {"exact samples": mixture_samples(Draws(79, 0, 0, count, count))}
    for name in MIXTURE:
        folders = [kept_at("mixture", name, seed, runs, []).with_suffix("") for seed in SEEDS]
        there = [folder for folder in folders if (folder / "student.safetensors").is_file()]
        if there:
            made[name] = open_student(there[0])[0].sample(starting_noise(77, count, (2,)), seed=77)
    return made


def draw(made: dict[str, torch.Tensor], path: Path, columns: int = 4) -> None:
    """A scatter each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(made) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(2.6 * columns, 2.7 * rows), sharex=True, sharey=True, layout="constrained"
    )
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, (name, points) in zip(grid.flat, made.items(), strict=False):
        for x, y in grid_means().tolist():
            axis.add_patch(pyplot.Circle((x, y), 4 * STD, fill=False, color="0.75", linewidth=0.6))
        axis.plot(*points.T.numpy(), ".", markersize=1.2, color="C0")
        axis.set(title=name.replace(": ", "\n"), xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
        axis.title.set_fontsize(8)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    draw(panels(parser.parse_args().runs), RESULTS / "distillation-mixture-cpu.png")


if __name__ == "__main__":
    main()
