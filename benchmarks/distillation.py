"""Distillers side by side: every method, three seeds, one command that goes on where it was.

    python benchmarks/distillation.py digits                 # one-step and few-step students of the embedded teacher
    python benchmarks/distillation.py consistency            # the consistency family on the digits, judged alike
    python benchmarks/distillation.py mixture                # modes found of 25, with the exact teacher
    python benchmarks/distillation.py digits --table         # the table of what is there, nothing run

A cell is a recipe with a seed; its run resumes (``fewstep distill``), its numbers are kept in ``--runs``, ``--jobs``
cells run at once, a thread each, and the table goes to benchmarks/results unless one of more cells is there.

Digits are judged on 5000 held-out starts: Frechet and kernel distance of the classifier's features to all 1797 digits,
the median distance to the nearest training digit (beside that of real held-out ones), the median distance to some
training digits as a share of that to as many held-out ones (copying: below 1 where training digits are repeated), and
how far the samples of one class lie from their mean, as a share of what the digits do (diversity).

A mode of the mixture is found where a fifth of
its share of the samples lies within 4 standard deviations of it, reached where that many are nearest to it; in_modes is
the share of all samples that lie in some mode.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fewstep.distill.draws import Draws
from fewstep.distill.run import run
from fewstep.distill.saved import open_student
from fewstep.distill.validation import compare_points, modes_found
from fewstep.eval.bench import environment
from fewstep.eval.demo import Judge
from fewstep.eval.neighbours import nearest
from fewstep.models import digits, load
from fewstep.models.checkpoint import write_atomically
from fewstep.models.denoiser import Denoiser
from fewstep.samplers import ddim, grids, heun, sample
from fewstep.samplers.noise import USER, starting_noise, uniform

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
DIGITS = {
    "DMD2, 1 call": ("dmd2-digits", []),
    "f-distill rkl, 1 call": ("fdistill-digits", ["divergence=rkl"]),
    "f-distill js, 1 call": ("fdistill-digits", ["divergence=js"]),
    "f-distill kl, 1 call": ("fdistill-digits", ["divergence=kl"]),
    "SIM, 1 call": ("sim-digits", []),
    "DMD2, 4 calls": ("dmd2-digits", ["student.steps=4"]),
    "phased DMD, 2 x 2 calls": ("phased-digits", []),
}
CONSISTENCY = {
    "ECT, 1 call": ("ect-digits", []),
    "ECT, 2 calls": ("ect-digits", ["student.times=[20.0, 0.8]"]),
    "sCM, 1 call": ("scm-digits", []),
    "sCM, 2 calls": ("scm-digits", ["student.times=[20.0, 0.8]"]),
    "MeanFlow, 1 call": ("meanflow-digits", []),
    "MeanFlow, 2 calls": ("meanflow-digits", ["student.steps=2"]),
}
# levels 0.09 .. 0.31, at which a mode does not know its neighbour, from a start in 5 of the 25
LOW = ["student.t_max=0.4", "method.times.high=0.3", "method.critic_times.high=0.35"]
LOW_GAN = [*LOW, "method.gan.times.high=0.3"]
MIXTURE = {
    "low noise: DMD2 (reverse KL)": ("dmd2-mixture", LOW),
    "low noise: f-distill js": ("fdistill-mixture", ["divergence=js", *LOW_GAN]),
    "low noise: f-distill kl": ("fdistill-mixture", ["divergence=kl", *LOW_GAN]),
    "all levels: DMD2 (reverse KL)": ("dmd2-mixture", []),
    "all levels: f-distill js": ("fdistill-mixture", ["divergence=js"]),
    "all levels: f-distill kl": ("fdistill-mixture", ["divergence=kl"]),
    "all levels: SIM": ("sim-mixture", []),
    "all levels: phased DMD, 2 x 2 calls": ("phased-mixture", []),
}
TASKS = {"digits": DIGITS, "consistency": CONSISTENCY, "mixture": MIXTURE}
# a student that does not learn, however long it is trained: every claim of quality must fail on it
CONTROL = ["optim.lr=0.0", "train.iters=4", "report.exam=64"]


def judged_digits(x: torch.Tensor, label: torch.Tensor, judge: Judge) -> dict[str, float]:
    """Quality of samples (N, 1, 8, 8) with their labels."""
    real, classes = (torch.as_tensor(a) for a in digits("all"))
    flat, some = x.clamp(-1, 1).flatten(1), judge.train[: len(judge.held_out)]
    to_train, to_held_out = (float(nearest(flat, part).distance.median()) for part in (some, judge.held_out))
    diversity = spread(judge.features(x.clamp(-1, 1)), label) / spread(judge.features(real), classes)
    return {**judge.quality(x), "copying": to_train / to_held_out, "diversity": diversity}


def starts(count: int = 5000) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (N, 1, 8, 8) and labels (N,), drawn and not counted off: KID is unbiased for independent samples only."""
    label = (uniform(77, torch.arange(count), 1, stream=USER)[:, 0] * 10).long()
    return starting_noise(77, count, (1, 8, 8)), label


def spread(features: torch.Tensor, label: torch.Tensor) -> float:
    """Root mean square distance of features to the mean of their class."""
    square = [features[label == k].var(0, unbiased=True).sum() for k in label.unique()]
    return float(torch.stack(square).mean().sqrt())


def digits_cell(folder: Path) -> dict[str, float]:
    student, _, _ = open_student(folder)
    noise, label = starts()
    return judged_digits(student.sample(noise, {"label": label}, seed=77), label, Judge.digits())


def mixture_cell(folder: Path) -> dict[str, float]:
    student, _, _ = open_student(folder)
    return judged_points(student.sample(starting_noise(77, 3000, (2,)), seed=77).double())


def judged_points(x: torch.Tensor) -> dict[str, float]:
    from fewstep.distill.data import STD, grid_means, mixture_samples

    truth = mixture_samples(Draws(78, 0, 0, 3000, 3000)).double()
    distance, nearest_mode = torch.cdist(x, grid_means()).min(dim=1)
    share = torch.bincount(nearest_mode, minlength=len(grid_means())) / len(x) * len(grid_means())
    numbers = {"reached": int((share >= 0.2).sum()), "in_modes": float((distance < 4 * STD).double().mean())}
    return {"modes": modes_found(x), **numbers, **compare_points(x, truth)}


def floors_of(task: str, runs: Path) -> dict[str, dict[str, float]]:
    """What students are held against, made once."""
    kept = runs / f"{task}-floors.json"
    if not kept.is_file():
        write_atomically(kept, json.dumps(floors_mixture() if task == "mixture" else floors_digits()))
    return json.loads(kept.read_text())


def floors_digits() -> dict[str, dict[str, float]]:
    """The teacher at many calls, and its own Euler steps at few."""
    d, judge = load("digits-edm"), Judge.digits()
    noise, label = starts()
    rows = {"teacher, Heun, 35 calls": judged_digits(_made(d, heun(d.path, grids.karras(d.path, 18)), noise, label),
                                                     label, judge)}  # fmt: skip
    for calls in (1, 2, 4, 8):
        table = ddim(d.path, grids.karras(d.path, calls))
        rows[f"teacher, Euler, {calls} call{'s' if calls > 1 else ''}"] = judged_digits(
            _made(d, table, noise, label), label, judge
        )
    real = rows["teacher, Heun, 35 calls"]["nearest_held_out"]
    return {"held-out digits": {"nearest": real, "copying": 1.0, "diversity": 1.0}, **rows}


def floors_mixture() -> dict[str, dict[str, float]]:
    """What exact samples have."""
    from fewstep.distill.data import mixture_samples

    return {"exact samples": judged_points(mixture_samples(Draws(79, 0, 0, 3000, 3000)).double())}


def _made(d: Denoiser, table, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return torch.cat([
        sample(d, n, table, cond={"label": k}) for n, k in zip(noise.split(500), label.split(500), strict=True)
    ])  # fmt: skip


def kept_at(task: str, name: str, seed: int, runs: Path, extra: list[str]) -> Path:
    """Where a cell's numbers lie; its run's folder has the same name."""
    words = f"{task}-{name}-{seed}{'-control' if extra else ''}".lower()
    return runs / ("".join(c if c.isalnum() or c == "-" else "-" for c in words) + ".json")


def cell(task: str, name: str, seed: int, runs: Path, threads: int, extra: list[str]) -> dict[str, Any]:
    """The numbers of one run, made or read."""
    kept = kept_at(task, name, seed, runs, extra)
    if kept.is_file():
        return json.loads(kept.read_text())
    recipe, options = TASKS[task][name]
    whole = not kept.with_suffix("").exists()  # of a run that was broken off the time is not known
    start, used = time.monotonic(), time.process_time()
    where = [f"seed={seed}", f"name={kept.stem}", f"out={runs}", f"threads={threads}"]
    folder = run(recipe, [*options, *extra, *where])
    spent = {"minutes": (time.monotonic() - start) / 60, "core_minutes": (time.process_time() - used) / 60}
    spent = spent if whole else {}
    numbers = (mixture_cell if task == "mixture" else digits_cell)(folder) | spent
    write_atomically(kept, json.dumps(numbers))
    return numbers


def judge_again(task: str, runs: Path, extra: list[str]) -> None:
    """What is kept of every cell, from its student anew."""
    for name in TASKS[task]:
        for seed in SEEDS:
            kept = kept_at(task, name, seed, runs, extra)
            if kept.is_file():
                judged = (mixture_cell if task == "mixture" else digits_cell)(kept.with_suffix(""))
                write_atomically(kept, json.dumps({**json.loads(kept.read_text()), **judged}))
    (runs / f"{task}-floors.json").unlink(missing_ok=True)


def make(
    task: str, runs: Path, only: list[str], seeds: list[int], jobs: int, threads: int, extra: list[str]
) -> None:
    """Run what is missing, seed by seed, ``jobs`` cells at once in processes of their own."""
    wanted = [
        (task, name, seed, runs, threads, extra)
        for seed in seeds
        for name in TASKS[task]
        if not only or any(word in name for word in only)
    ]
    missing = [one for one in wanted if not kept_at(task, one[1], one[2], runs, extra).is_file()]
    if jobs == 1:
        for one in missing:
            cell(*one)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for done in [pool.submit(cell, *one) for one in missing]:
            done.result()


def gathered(task: str, runs: Path, extra: list[str]) -> dict[str, dict[str, list[float]]]:
    """name -> number -> its values over seeds, of all cells that are there."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in TASKS[task]:
        for seed in SEEDS:
            kept = kept_at(task, name, seed, runs, extra)
            for key, value in (json.loads(kept.read_text()) if kept.is_file() else {}).items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
    return found


def claims(rows: dict[str, dict[str, list[float]]], floors: dict[str, dict[str, float]]) -> dict[str, bool]:
    """What is said of the digits' students, and whether it is so of these: means over seeds."""
    means = {name: {k: sum(v) / len(v) for k, v in numbers.items()} for name, numbers in rows.items()}
    one_step = [numbers for name, numbers in means.items() if name.endswith(", 1 call")]
    euler = floors["teacher, Euler, 8 calls"]
    if not one_step:
        return {}
    best = min(one_step, key=lambda numbers: numbers["fd"])
    return {
        "the best of one call: FD below the teacher's Euler at 8": best["fd"] < euler["fd"],
        "the best of one call: KID below the teacher's Euler at 8": best["kid"] < euler["kid"],
        "the best of one call: FD below 5": best["fd"] < 5,
        "the best of one call: no closer to training digits than held-out ones, by two standard errors": (
            best["nearest"] > best["nearest_held_out"] - 2 * nearest_error()
        ),
        "every student: no closer to training digits than held-out ones are": all(
            numbers["nearest"] >= numbers["nearest_held_out"] for numbers in means.values()
        ),
        "every student: no closer to training digits than to as many held-out ones (by more than 5 %)": all(
            numbers["copying"] > 0.95 for numbers in means.values()
        ),
    }


def nearest_error(draws: int = 2000) -> float:
    """The standard error of the median distance of held-out digits to the nearest training digit, by bootstrap."""
    train, held_out = (torch.as_tensor(digits(split)[0]).flatten(1) for split in ("train", "held_out"))
    near = nearest(held_out, train).distance
    chosen = torch.randint(len(near), (draws, len(near)), generator=torch.Generator().manual_seed(0))
    return float(near[chosen].median(1).values.std())


def mixture_claims(rows: dict[str, dict[str, list[float]]]) -> dict[str, bool]:
    """What is said of the mixture's students, and whether it is so of these: means over seeds."""
    mean = {name: {k: sum(v) / len(v) for k, v in numbers.items()} for name, numbers in rows.items()}
    if len(mean) < len(MIXTURE):
        return {}
    low = {name: numbers for name, numbers in mean.items() if name.startswith("low noise")}
    seeking = low.pop("low noise: DMD2 (reverse KL)")
    everywhere = [numbers for name, numbers in mean.items() if name.startswith("all levels")]
    found = {}
    for name, n in low.items():
        found[f"{name} reaches twice as many modes as reverse KL"] = n["reached"] >= 2 * seeking["reached"]
        found[f"{name} reaches 23 of 25 or more"] = n["reached"] >= 23
        found[f"{name} has half of reverse KL's sliced W2"] = n["sliced_w2"] < 0.5 * seeking["sliced_w2"]
    found["low noise: reverse KL has the largest share in modes"] = all(
        n["in_modes"] < seeking["in_modes"] for n in low.values()
    )
    found["all levels: every student reaches 24 of 25 or more"] = all(n["reached"] >= 24 for n in everywhere)
    found["all levels: every student has 20 modes or more"] = all(n["modes"] >= 20 for n in everywhere)
    return found


def cells(rows: dict[str, dict[str, list[float]]]) -> int:
    """How many there are."""
    return sum(max(len(values) for values in numbers.values()) for numbers in rows.values())


def table(task: str, rows: dict[str, dict[str, list[float]]], floors: dict[str, dict[str, float]]) -> str:
    """Markdown: means over seeds, and their range."""
    keys = ["modes", "reached", "in_modes", "mmd", "sliced_w2", "core_minutes"] if task == "mixture" else [
        "fd", "kid", "nearest", "copying", "diversity", "core_minutes"]  # fmt: skip
    lines = ["| | " + " | ".join(keys) + " | seeds |", "|---|" + "--:|" * (len(keys) + 1)]
    for name, numbers in floors.items():
        cells = [f"{numbers[k]:.3g}" if k in numbers else "" for k in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " | |")
    for name, numbers in rows.items():
        cells = []
        for key in keys:
            values = numbers.get(key, [float("nan")])
            mean = sum(values) / len(values)
            cells.append(
                f"{mean:.3g} ({min(values):.3g} .. {max(values):.3g})" if len(values) > 1 else f"{mean:.3g}"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(numbers[keys[0]])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--only", nargs="*", default=[], help="words of the methods to run")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--again", action="store_true", help="judge the students that are there anew")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--control", action="store_true", help="run with the student's learning rate at 0 and print"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    task, extra = arguments.task, CONTROL if arguments.control else []
    if extra and task == "mixture":  # the students start in three places
        arguments.seeds = [0]
    elif extra:  # one method stands for all: none of them moves at a rate of 0
        first = next(iter(TASKS[task]))
        arguments.only, arguments.seeds = arguments.only or [first], [0]
    if arguments.again:
        judge_again(task, arguments.runs, extra)
    if not arguments.table:
        make(task, arguments.runs, arguments.only, arguments.seeds, arguments.jobs, arguments.threads, extra)
    rows = gathered(task, arguments.runs, extra)
    if arguments.only and not extra:
        print(table(task, rows, {}))
        return
    floors = floors_of(task, arguments.runs)
    shown = table(task, rows, floors)
    print(shown)
    content = {"environment": environment(), "floors": floors, "rows": rows}
    if task in ("digits", "mixture") and rows:
        content["claims"] = mixture_claims(rows) if task == "mixture" else claims(rows, floors)
        said = "\n".join(f"- {'yes' if true else 'NO'}: {what}" for what, true in content["claims"].items())
        print(said)
        shown += f"\n{said}\n"
    stem = RESULTS / f"distillation-{task}-cpu{'-control' if extra else ''}"
    there = stem.with_suffix(".json")
    if there.is_file() and cells(rows) < cells(json.loads(there.read_text())["rows"]):
        print(f"{there} has more cells than {arguments.runs}, and is left as it is")
        return
    write_atomically(there, json.dumps(content, indent=1) + "\n")
    command = f"python benchmarks/distillation.py {task}{' --control' if extra else ''}"
    what = "digits" if task == "consistency" else task
    head = f"Students of {what}, means over seeds and their range. Made by `{command}`.\n\n"
    write_atomically(stem.with_suffix(".md"), head + shown)


if __name__ == "__main__":
    main()
