"""Letters of 32 x 32 in colour: a teacher and four students of it, timed and judged; for one GPU and eight minutes.

    python benchmarks/glyphs_gpu.py --out benchmarks/results/glyphs-gpu
    python benchmarks/glyphs_gpu.py --tiny --device cpu --out out/glyphs          # the script itself, in seconds

Parts: a judge (a classifier, whose features distances are measured in); the teacher, glyphs-flow, for a third of the
time; DMD2, f-distill, SIM and phased DMD by the shipped recipes for an equal share each; how fast data come. How long
each part trains follows from a few timed steps, so the whole ends in time on any device.

``OUT.json`` is written after every part, with the device's name, seconds an iteration and peak memory; ``OUT.md`` holds
the table and ``OUT.png`` the pictures: a row for the teacher and each student, the same noise and classes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fewstep.distill.cast import cast, networks
from fewstep.distill.data import DataRecipe, as_float, open_source
from fewstep.distill.data.glyphs import CHARACTERS, drawn
from fewstep.distill.draws import Draws
from fewstep.distill.opening import open_batches, open_teacher
from fewstep.distill.parallel import Ranks
from fewstep.distill.run import run as distill
from fewstep.distill.saved import open_student
from fewstep.distill.schema import read as read_student
from fewstep.distill.teacher import TeacherRecipe, begin, read, run
from fewstep.distill.training import Trainer
from fewstep.eval import bench, images
from fewstep.eval.frechet import frechet_distance
from fewstep.eval.kid import kernel_distance
from fewstep.models import load
from fewstep.models.checkpoint import write_atomically
from fewstep.samplers import abm, ddim, grids, sample, starting_noise

STUDENTS = ("dmd2-glyphs", "fdistill-glyphs", "sim-glyphs", "phased-glyphs")
SHARES = {"teacher": 0.36, "student": 0.09}  # of the minutes; the rest is judging
JUDGING = 20  # seconds that a part takes beside its training
TINY_NET = ["net.block_out_channels=[8,16,16]", "net.norm_num_groups=8", "net.attention_head_dim=8"]
TINY_TRAINING = ["batch=4", "exam=8", "precision=fp32", "warmup=1"]
TINY_STUDENT = ["threads=1", "train.batch=4", "train.critic_steps=1", "train.precision=fp32"]


class Bench:
    """What the parts share: where, how long, how much."""

    def __init__(self, device: torch.device, minutes: float, tiny: bool, folder: Path):
        self.device, self.minutes, self.tiny, self.folder = device, minutes, tiny, folder
        self.end = time.monotonic() + 60 * minutes
        self.count = 32 if tiny else 5000
        self.teacher = folder / "glyphs-flow.safetensors"
        self.judge = Judge(self)
        self.rows: dict[str, torch.Tensor] = {}

    def seconds(self, share: str) -> float:
        """What a part may train for; less where time runs out."""
        return max(5.0, min(60 * self.minutes * SHARES[share], self.end - time.monotonic() - JUDGING))

    def glyphs(self, seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Real letters in [-1, 1] and their classes."""
        x, label = drawn(CHARACTERS, Draws(seed, 0, 0, count, count, self.device))
        return as_float(x), label

    def made(self, make: Callable) -> torch.Tensor:
        """``count`` samples of ``make(noise, cond, ids)``, of all classes in turn."""
        noise = starting_noise(77, self.count, (3, 32, 32))
        ids, label = torch.arange(self.count), torch.arange(self.count) % len(CHARACTERS)
        parts = zip(*(t.to(self.device).split(500) for t in (noise, label, ids)), strict=True)
        return torch.cat([make(x, {"label": k}, i) for x, k, i in parts])

    def judged(self, name: str, x: torch.Tensor, keep: bool = True) -> dict[str, float]:
        """Distances of samples to real letters, how many are read as their class, and their spread within classes."""
        if keep:
            self.rows[name] = x[:20].clamp(-1, 1).cpu()
        return self.judge(x, torch.arange(len(x), device=x.device) % len(CHARACTERS))


class Judge:
    """A small classifier of letters; its last features are what distances are measured in."""

    def __init__(self, shared: Bench):
        self.shared = shared
        layers: list[nn.Module] = []
        for a, b in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(128, 128, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
                                  nn.Flatten(), nn.Linear(128, 64), nn.SiLU()).to(shared.device)  # fmt: skip
        self.head = nn.Linear(64, len(CHARACTERS)).to(shared.device)

    def train(self) -> dict[str, float]:
        """Fresh letters every step; the accuracy is on letters that it has not seen."""
        steps, batch = (3, 16) if self.shared.tiny else (1500, 256)
        optimizer = torch.optim.AdamW([*self.body.parameters(), *self.head.parameters()], 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for step in range(steps):
            x, label = drawn(CHARACTERS, Draws(1, step, 0, batch, batch, self.shared.device))
            loss = functional.cross_entropy(self.head(self.body(as_float(x))), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.body.eval().requires_grad_(False)
        self.head.requires_grad_(False)
        x, label = self.shared.glyphs(2, 4 * self.shared.count)
        self.real, self.spread = self.features(x), spread(self.features(x), label)
        others, label = self.shared.glyphs(3, self.shared.count)
        return {"accuracy": float((self.head(self.features(others)).argmax(1) == label).float().mean()),
                **self(others, label)}  # fmt: skip

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 64)."""
        return torch.cat([self.body(part) for part in x.clamp(-1, 1).split(1000)])

    def __call__(self, x: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
        found = self.features(x)
        return {
            "fd": float(frechet_distance(found.cpu(), self.real.cpu())),
            "kid": float(kernel_distance(found.cpu(), self.real[: len(found)].cpu()).value),
            "read as their class": float((self.head(found).argmax(1) == label).float().mean()),
            "diversity": spread(found, label) / self.spread,
        }


def spread(features: torch.Tensor, label: torch.Tensor) -> float:
    """Root mean square distance of features to the mean of their class."""
    square = [
        features[label == k].var(0, unbiased=True).sum() for k in label.unique() if (label == k).sum() > 1
    ]
    return float(torch.stack(square).mean().sqrt())


def timed(device: torch.device, step: Callable[[], Any], warmup: int, count: int) -> float:
    """Seconds a step."""
    for k in range(warmup + count):
        if k == warmup:
            _wait(device)
            start = time.perf_counter()
        step()
    _wait(device)
    return (time.perf_counter() - start) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(device: torch.device) -> float | None:
    """Gigabytes at most since the last time it was asked."""
    if device.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return round(most, 2)


def judge(shared: Bench) -> dict:
    """The judge's accuracy, and what real letters score against others."""
    return shared.judge.train()


def teacher(shared: Bench) -> dict:
    """Trained for its share; judged at 40 calls, and its own Euler steps at 1 to 8."""
    options = [f"device={shared.device.type}", f"out={shared.folder}", "checkpoint=0"]
    options += [*TINY_NET, *TINY_TRAINING] if shared.tiny else []
    recipe = read("glyphs-flow", options)
    assert isinstance(recipe, TeacherRecipe)
    training = begin(recipe, Ranks(device=shared.device))
    _peak(shared.device)
    pilot = timed(shared.device, training.step, *((1, 1) if shared.tiny else (10, 20)))
    peak = _peak(shared.device)
    steps = 3 if shared.tiny else int(min(recipe.steps, max(10, shared.seconds("teacher") / pilot)))
    del training
    start = time.monotonic()
    run("glyphs-flow", [*options, f"steps={steps}", "exam=0"])
    answer: dict[str, Any] = {
        "steps": steps, "batch": recipe.batch, "seconds a step": pilot, "images a second": recipe.batch / pilot,
        "peak GB": peak, "minutes": (time.monotonic() - start) / 60,
    }  # fmt: skip
    d = load(shared.teacher).to(shared.device)
    answer["parameters"] = sum(p.numel() for p in d.net.parameters())
    tables = {"40 calls": abm(d.path, grids.vp(d.path, 8 if shared.tiny else 40))}
    for calls in (1, 2, 4, 8)[: 1 if shared.tiny else 4]:
        tables[f"Euler, {calls} call{'s' * (calls > 1)}"] = ddim(d.path, grids.uniform(d.path, calls))
    for name, table in tables.items():
        x = shared.made(lambda noise, cond, ids, table=table: sample(d, noise, table, cond=cond))
        answer[name] = shared.judged(f"teacher, {name}", x)
    return answer


def student(name: str) -> Callable[[Bench], dict]:
    """The part of a recipe."""

    def part(shared: Bench) -> dict:
        options = [f"teacher.path={shared.teacher}", f"device={shared.device.type}", f"out={shared.folder}"]
        options += TINY_STUDENT if shared.tiny else []
        pilot, peak = piloted(name, options, shared)
        asked = read_student(name, options)[0].train.iters
        iters = 2 if shared.tiny else int(min(asked, max(10, shared.seconds("student") / pilot)))
        quiet = [f"report.{key}={iters}" for key in ("validate", "checkpoint", "grid")]
        start = time.monotonic()
        folder = distill(
            name, [*options, *quiet, f"report.exam={16 if shared.tiny else 500}", f"train.iters={iters}"]
        )
        minutes = (time.monotonic() - start) / 60
        made, recipe, _ = open_student(folder)
        made.d.to(shared.device)
        x = shared.made(lambda noise, cond, ids: made.sample(noise, cond, ids=ids))
        return {"calls": made.calls, "iterations": iters, "batch": recipe.train.batch,
                "critic steps": recipe.train.critic_steps, "seconds an iteration": pilot, "peak GB": peak,
                "minutes": minutes, **shared.judged(name.removesuffix("-glyphs"), x)}  # fmt: skip

    part.__name__ = name
    return part


def piloted(name: str, options: list[str], shared: Bench) -> tuple[float, float | None]:
    """(seconds an iteration, peak GB) of a few iterations of the very trainer."""
    recipe, method = read_student(name, options)
    ranks = Ranks(device=shared.device)
    d = open_teacher(recipe).to(shared.device)
    data = open_batches(recipe, d, ranks)
    players = cast(recipe, method, d, data)
    for net in networks(players):
        net.to(shared.device)
    trainer = Trainer(recipe, method, players, data, ranks)
    _peak(shared.device)
    seconds = timed(shared.device, trainer.turn, *((0, 1) if shared.tiny else (3, 5)))
    return seconds, _peak(shared.device)


def data_rates(shared: Bench) -> dict:
    """Images a second: letters drawn where the network is, and PNGs from a folder, alone and read ahead."""
    from PIL import Image

    batch, turns = (8, 4) if shared.tiny else (256, 40)

    def rate(source, device: torch.device | str, ahead: int = 0) -> float:
        turn = iter(range(10_000))

        def one() -> None:
            source.read(Draws(0, next(turn), 0, batch, batch, device))[0].to(shared.device, non_blocking=True)

        # what was read ahead at first is used up before the clock starts
        return batch / timed(shared.device, one, 3 * ahead + 3, turns)

    answer = {"glyphs, drawn there": rate(open_source(DataRecipe("glyphs")), shared.device)}
    folder = shared.folder / "pictures"
    folder.mkdir()
    x, _ = drawn(CHARACTERS, Draws(5, 0, 0, 64, 64))
    for k, one in enumerate(functional.interpolate(x.float(), scale_factor=1 if shared.tiny else 8)):
        Image.fromarray(one.byte().permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
    for ahead in (0, 4, 12):
        source = open_source(DataRecipe(str(folder), ahead=ahead))
        side = source.shape[-1]
        answer[f"PNG {side} x {side}, {ahead} batches ahead"] = rate(source, "cpu", ahead)
    return answer


PARTS: tuple[Callable[[Bench], dict], ...] = (judge, teacher, *map(student, STUDENTS), data_rates)


def table(results: dict[str, Any]) -> str:
    """Markdown: who, calls, quality, cost."""
    keys = ("fd", "kid", "read as their class", "diversity")
    lines = [
        "| | calls | " + " | ".join(keys) + " | s an iteration | peak GB | minutes |",
        "|---|" + "--:|" * 8,
    ]
    rows: dict[str, dict[str, Any]] = {}
    if isinstance(results.get("judge"), dict):
        rows["real letters"] = results["judge"]
    if isinstance(found := results.get("teacher"), dict):
        cost = {"seconds an iteration": found["seconds a step"], **found}
        for name, numbers in found.items():
            if isinstance(numbers, dict):
                calls = int("".join(c for c in name if c.isdigit()))
                rows[f"teacher, {name}"] = {"calls": calls, **(cost if not len(rows) > 1 else {}), **numbers}
    rows |= {name: results[name] for name in STUDENTS if isinstance(results.get(name), dict)}
    for name, numbers in rows.items():
        cells = [numbers.get(k) for k in ("calls", *keys, "seconds an iteration", "peak GB", "minutes")]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.3g}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the parts that time allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help="small networks, few steps: seconds on a CPU")
    parser.add_argument("--out", type=Path, required=True, help="the results' name without .json, .md, .png")
    parser.add_argument("--runs", type=Path, help="where the runs' folders go and stay (default: nowhere)")
    arguments = parser.parse_args(argv)
    folder = arguments.runs or Path(tempfile.mkdtemp())
    shared = Bench(torch.device(arguments.device), arguments.minutes, arguments.tiny, folder)
    results: dict[str, Any] = {}
    try:
        for part in PARTS:
            name = part.__name__
            if time.monotonic() > shared.end - JUDGING:
                results[name] = "no time left"
            else:
                try:
                    results[name] = part(shared)
                except Exception as error:  # one part's failure is a result; the others still run
                    results[name] = f"{type(error).__name__}: {error}"
            print(name, results[name], flush=True)
            bench.save(arguments.out.with_suffix(".json"), results)
        head = f"Made by `python benchmarks/glyphs_gpu.py` on {bench.environment()['device']}.\n\n"
        write_atomically(arguments.out.with_suffix(".md"), head + table(results))
        if shared.rows:
            rows = torch.cat([*shared.rows.values()])
            picture = images.grid(rows, columns=20, labels_rows=list(shared.rows))
            images.save_png(arguments.out.with_suffix(".png"), picture)
    finally:
        if arguments.runs is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
