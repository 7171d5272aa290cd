"""``make demo``: the embedded teacher, several solvers, 5, 10 and 20 network calls; a picture and a table.

Each column of the table says how far few calls are from many:

    to teacher   root-mean-square distance, a pixel, to the teacher's own converged samples from the same noise
    FD, KID      Frechet and (unbiased) kernel distance of classifier features to the digits; the
                 floor is the converged sampler
    nearest      median distance to the nearest training digit; far below held-out digits' own would mean memorising
    images/s     on this machine, in this run
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..models import Denoiser, load
from ..models.classifier import load_classifier
from ..models.digits import digits
from ..samplers import abm, ddim, deis, dpmpp, grids, heun, sample, unipc
from ..samplers.noise import USER, starting_noise, uniform
from . import images
from .frechet import frechet_distance
from .kid import kernel_distance
from .neighbours import memorisation

BUDGETS = (5, 10, 20)
# (label, solver, its options, grid): the grid is the one its authors use
ROWS: tuple[tuple[str, Callable, dict, Callable], ...] = (
    ("DDIM", ddim, {}, grids.logsnr),
    ("Heun (EDM)", heun, {}, grids.karras),
    ("DEIS tAB-2", deis, {"order": 3}, grids.logsnr),
    ("DPM-Solver++ 2M", dpmpp, {"order": 2}, grids.logsnr),
    ("UniPC-3", unipc, {"order": 3}, grids.logsnr),
    ("ABM (our default)", abm, {}, grids.vp),
)


class Judge(NamedTuple):
    """What samples are held against."""

    features: Callable[[torch.Tensor], torch.Tensor]
    real: torch.Tensor
    train: torch.Tensor
    held_out: torch.Tensor

    @staticmethod
    def digits() -> Judge:
        """The digits, seen through the classifier that ships with the package."""
        classifier = load_classifier()
        pixels = {split: torch.as_tensor(digits(split)[0]) for split in ("all", "train", "held_out")}
        return Judge(
            classifier.features,
            classifier.features(pixels["all"]),
            pixels["train"].flatten(1),
            pixels["held_out"].flatten(1),
        )

    def quality(self, x: torch.Tensor) -> dict[str, float]:
        """FD, KID and nearest-neighbour distances of samples."""
        features = self.features(x.clamp(-1, 1))
        near = memorisation(x.clamp(-1, 1).flatten(1), self.train, self.held_out)
        return {"fd": frechet_distance(features, self.real), "kid": kernel_distance(features, self.real).value,
                "nearest": float(near.samples), "nearest_held_out": float(near.held_out)}  # fmt: skip


def converged(d: Denoiser, noise: torch.Tensor, label: torch.Tensor, steps: int = 60) -> torch.Tensor:
    """The teacher's own samples: many steps of the best solver that we have."""
    return sample(d, noise, abm(d.path, grids.vp(d.path, steps), nodes=4), cond={"label": label})


def run(model: str, num: int, out: Path, steps: int = 60) -> list[dict]:
    """Sample, judge, print, draw; returns the table's rows."""
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    d, judge = load(model), Judge.digits()
    noise = starting_noise(0, num, d.shape)
    # drawn, not counted off: KID is unbiased for independent samples only
    label = (uniform(0, torch.arange(num), 1, stream=USER)[:, 0] * 10).long()
    shown = torch.stack([(label == digit).nonzero()[0, 0] for digit in range(10)])
    print(f"{model}: {num} samples, the same noise for every solver", flush=True)
    truth = converged(d, noise, label, steps)
    floor = {
        "solver": f"converged ({steps} calls)",
        "calls": steps,
        "rmse": 0.0,
        **judge.quality(truth),
        "speed": float("nan"),
    }
    rows, pictures = [floor], []
    show(None, floor)
    for name, solver, options, grid in ROWS:
        for calls in BUDGETS:
            table = solver(d.path, grids.for_calls(solver, d.path, calls, grid=grid, **options), **options)
            start = time.perf_counter()
            x = sample(d, noise, table, cond={"label": label})
            seconds = time.perf_counter() - start
            rmse = float((x - truth).square().mean().sqrt())
            rows.append(
                {
                    "solver": name,
                    "calls": table.calls,
                    "rmse": rmse,
                    **judge.quality(x),
                    "speed": num / seconds,
                }
            )
            show(floor, rows[-1])
            pictures.append(_sheet(x[shown]))
    pictures += [_sheet(truth[shown])] * len(BUDGETS)
    labels = [*(name for name, *_ in ROWS), f"converged\n({steps} calls)"]
    images.save_png(out, images.grid(torch.stack(pictures), columns=len(BUDGETS), labels_rows=labels,
                                     labels_columns=[f"{n} calls" for n in BUDGETS], scale=6))  # fmt: skip
    print(f"nearest training digit: held-out digits lie at {floor['nearest_held_out']:.2f}\npicture: {out}")
    return rows


def _sheet(x: torch.Tensor) -> torch.Tensor:
    """The ten digits as one image, a dark margin between them."""
    return images.tile(torch.nn.functional.pad(images.to_uint8(x), (1, 1, 1, 1)), columns=5)


def show(floor: dict | None, row: dict) -> None:
    """One line of the table, with its heading before the first."""
    if floor is None:
        print(
            f"{'solver':<24}{'calls':>6}{'to teacher':>12}{'FD':>9}{'KID':>9}{'nearest':>9}{'images/s':>10}"
        )
    speed = f"{row['speed']:>10.0f}" if row["speed"] == row["speed"] else f"{'':>10}"
    print(
        f"{row['solver']:<24}{row['calls']:>6}{row['rmse']:>12.4f}{row['fd']:>9.2f}{row['kid']:>9.4f}{row['nearest']:>9.2f}{speed}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``fewstep demo``."""
    parser = argparse.ArgumentParser(
        prog="fewstep demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits", help="digits-edm (digits), digits-vp or digits-flow")
    parser.add_argument("--num", type=int, default=600, help="samples a cell (default: 600)")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"))
    arguments = parser.parse_args(argv)
    if arguments.num < 100:
        parser.error(f"--num must be at least 100, so that FD and KID mean something; got {arguments.num}")
    run(arguments.model, arguments.num, arguments.out)
    return 0
