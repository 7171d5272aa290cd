"""Distilled Decoding 2 on the digits: sixteen calls of an autoregressive model in one, beside floors and ceilings.

    python benchmarks/dd2.py                      # all cells, two at once; goes on where it was
    python benchmarks/dd2.py --only sid           # some of them
    python benchmarks/dd2.py --table              # what is there

The teacher is the embedded digits-ar, students are by the recipe dd2-digits, three seeds of each form of the loss. All
are judged on 5000 draws of classes and noise: FD (of class features) to 5000 samples of the teacher and to all 1797
digits, the median distance to the nearest training digit, and nats a token: what the teacher thinks of the tokens, of
which more is unlikely pictures and less is lost variety; its own samples have its entropy. Students' places are rounded
to codewords; "as they come" they are not.

Floors: training digits rounded to the codebook; the teacher with other draws; held-out digits. Ceilings: the student as
it starts, which is what training adds to; and each place drawn from its own law in the class, without the others ("set
of tokens"), which is what one call comes to without a loss on what stands before.

The toy is that of tests/distill/test_dd2.py: total variation of two tokens' joint law to the exact one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from fewstep.distill.cast import cast
from fewstep.distill.data import open_data
from fewstep.distill.methods.dd2 import autoregressive_start
from fewstep.distill.run import run
from fewstep.distill.saved import metrics, open_student
from fewstep.distill.schema import read
from fewstep.distill.student import few_steps
from fewstep.distill.training import Trainer
from fewstep.eval import bench
from fewstep.eval.cells import command
from fewstep.eval.demo import Judge
from fewstep.eval.frechet import frechet_distance
from fewstep.eval.neighbours import nearest
from fewstep.kernels.gumbel_draw import gumbel_draw
from fewstep.models import Denoiser, digits, load
from fewstep.models.autoregressive import ARConfig, Autoregressive, conditional
from fewstep.samplers.noise import USER, starting_noise, uniform

RESULTS = Path(__file__).parent / "results" / "dd2-cpu.json"
RUNS = Path("runs/dd2")
SEEDS = (0, 1, 2)
FORMS = {"sid": [], "dmd": ["method.distance=dmd"]}
COUNT, TEACHER_SEED = 5000, 1001


def jobs() -> Iterator[tuple[str, Callable[[dict], Any]]]:
    """Cells, what matters most first."""
    yield "floors", floors
    yield "teacher", teacher_cell
    yield "start", start_cell
    for seed in SEEDS:
        for form in FORMS:
            yield f"run|{form}|{seed}", partial(run_cell, form, seed)
    for seed in SEEDS:
        for form in FORMS:
            yield f"toy|{form}|{seed}", partial(toy_cell, form, seed)
    yield "time", time_cell
    yield "pictures", picture_cell


# --- the digits ------------------------------------------------------------------------------------------------------


def starts(count: int = COUNT, seed: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and labels, drawn and not counted off."""
    label = (uniform(seed, torch.arange(count), 1, stream=USER)[:, 0] * 10).long()
    return starting_noise(seed, count, (1, 8, 8)), label


@functools.cache
def teacher() -> tuple[Denoiser, torch.Tensor, torch.Tensor]:
    """(the model, 5000 samples that all are held against, their features)."""
    d = load("digits-ar")
    made = d.net.sample(starts(seed=78)[1], TEACHER_SEED)
    return d, made, Judge.digits().features(made)


def judged(x: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    d, _, wanted = teacher()
    judge = Judge.digits()
    features = judge.features(x.clamp(-1, 1))
    book = d.net.book
    with torch.no_grad():
        logits = d.net.logits(book.rounded(x), label)
    return {
        "fd_teacher": frechet_distance(features, wanted),
        "fd_digits": frechet_distance(features, judge.real),
        "nearest": float(nearest(x.clamp(-1, 1).flatten(1), judge.train).distance.median()),
        "nats": float(functional.cross_entropy(logits.flatten(0, 1), book.tokens(x).flatten())),
    }


def floors(known: dict) -> dict[str, Any]:
    """What is not sampled by anything: digits, rounded and not; tokens of the teacher dealt out anew."""
    d, made, _ = teacher()
    book = d.net.book
    found = {}
    for split in ("train", "held_out"):
        images, label = (torch.from_numpy(a) for a in digits(split))
        found[split] = judged(images, label)
        found[f"{split} rounded"] = judged(book.rounded(images), label)
    label = starts(seed=78)[1]
    places = book.split(made).clone()
    random = torch.Generator().manual_seed(0)
    for k in range(10):
        rows = (label == k).nonzero()[:, 0]
        for i in range(book.places):
            places[rows, i] = places[rows[torch.randperm(len(rows), generator=random)], i]
    found["set of tokens"] = judged(book.join(places), label)
    return found


def teacher_cell(known: dict) -> list[dict[str, float]]:
    d, label = teacher()[0], starts()[1]
    return [judged(d.net.sample(label, seed), label) for seed in SEEDS]


def student_marks(student) -> dict[str, dict[str, float]]:
    noise, label = starts()
    x = student.sample(noise, {"label": label})
    return {"as they come": judged(x, label), "rounded": judged(teacher()[0].net.book.rounded(x), label)}


def start_cell(known: dict) -> dict[str, Any]:
    """The student before its first update, by the recipe of seed 0."""
    recipe, _ = read("dd2-digits")
    parent = autoregressive_start(teacher()[0], recipe.student.warm_up, recipe.train.batch, recipe.seed)
    return student_marks(few_steps(parent))


def run_cell(form: str, seed: int, known: dict) -> dict[str, Any]:
    name = f"{form}-{seed}"
    folder = run("dd2-digits", [f"out={RUNS}", f"name={name}", f"seed={seed}", "threads=1", *FORMS[form]])
    student, recipe, _ = open_student(folder)
    seen = [(line["iteration"], line["teacher_fd"]) for line in metrics(folder) if "teacher_fd" in line]
    return {
        **student_marks(student),
        "seen": seen,
        "recipe": {"train": recipe.train.iters, "method": recipe.method},
    }


def time_cell(known: dict) -> dict[str, Any]:
    """Sixteen calls with keys and values kept, against one call, in turns."""
    d = teacher()[0]
    student, _, _ = open_student(RUNS / "sid-0")
    found = {}
    for batch in (1, 64):
        noise, label = starts(batch)
        sixteen, one = partial(d.net.sample, label, 0), partial(student.sample, noise, {"label": label})
        timed = bench.compare({"16 calls": sixteen, "1 call": one}, repeats=30)
        found[str(batch)] = {name: row["median"] for name, row in timed["names"].items()}
        found[str(batch)]["ratio"] = 1 / timed["names"]["1 call"]["ratio"]["median"]
    return found


def picture_cell(known: dict) -> dict[str, Any]:
    """A digit of each class, in sixteenths: the teacher's, the trained student's, the start's."""
    d, label = teacher()[0], torch.arange(10)
    noise = starting_noise(5, 10, (1, 8, 8))
    recipe, _ = read("dd2-digits")
    start = few_steps(autoregressive_start(d, recipe.student.warm_up, recipe.train.batch, recipe.seed))
    made = {
        "autoregressive, 16 calls": d.net.sample(label, 5),
        "DD2, 1 call": open_student(RUNS / "sid-0")[0].sample(noise, {"label": label}),
        "before training, 1 call": start.sample(noise, {"label": label}),
    }
    return {name: ((x[:, 0].clamp(-1, 1) + 1) * 8).round().int().tolist() for name, x in made.items()}


# --- the toy ---------------------------------------------------------------------------------------------------------

JOINT = torch.tensor([[30, 2, 2, 2], [2, 2, 20, 2], [2, 2, 2, 10], [2, 15, 2, 5]], dtype=torch.float64) / 102
CORNERS = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])


class Exact(Autoregressive):
    """Two tokens of four whose joint law is a table."""

    def __init__(self) -> None:
        super().__init__(
            ARConfig(shape=(2, 2), codes=4, width=24, depth=1, heads=2, num_class_embeds=2), CORNERS
        )

    def logits(self, before: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        first = self.book.tokens(before)[:, 0]
        return torch.stack([JOINT.sum(1).log().expand(len(first), 4), JOINT[first].log()], dim=1).float()

    def sample(self, label=None, seed=0, ids=None, row=0) -> torch.Tensor:
        ids = torch.arange(len(label)) if ids is None else ids
        pair, _ = gumbel_draw(JOINT.log().flatten().expand(len(ids), 16), torch.tensor([seed]), ids, row)
        return self.book.vectors(torch.stack([pair // 4, pair % 4], dim=1))


def toy_cell(form: str, seed: int, known: dict) -> dict[str, float]:
    given = {
        "method": {"name": "dd2"}, "data": {"path": "labels"}, "student": {"warm_up": 200}, "seed": seed,
        "train": {"batch": 128, "critic_steps": 3, "ema": 0.99}, "optim": {"lr": 1e-3, "critic_lr": 2e-3},
    }  # fmt: skip
    recipe, method = read(given, FORMS[form])
    torch.manual_seed(seed)
    exact = conditional(Exact())
    data = open_data(recipe.data, exact)
    trainer = Trainer(recipe, method, cast(recipe, method, exact, data), data)
    found = {"start": _off(trainer)}
    for turn in (200, 600):
        while trainer.iteration < turn:
            trainer.turn()
        found[str(turn)] = _off(trainer)
    return found


def _off(trainer: Trainer, count: int = 50_000) -> float:
    with trainer.averaged():
        label = torch.zeros(count, dtype=torch.int64)
        x = trainer.players.student.sample(starting_noise(3, count, (2, 2)), {"label": label})
    tokens = trainer.players.teacher.net.book.tokens(x)
    found = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16) / count
    return float(0.5 * (found - JOINT.flatten()).abs().sum())


# --- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = ("fd_teacher", "fd_digits", "nats", "nearest")


def _row(name: str, calls: str, cells: list[dict[str, float]]) -> str:
    said = []
    for key in COLUMNS:
        values = torch.tensor([cell[key] for cell in cells], dtype=torch.float64)
        spread = f" ± {values.std() / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
        said.append(f"{values.mean():.2f}{spread}")
    return f"| {name} | {calls} | {' | '.join(said)} |"


def tables(known: dict) -> str:
    """Everything as Markdown."""
    lines = [
        "Digits by patches of 2 x 2 pixels, 16 tokens of 128 codewords; 5000 samples, ± standard errors of 3 seeds.",
        "",
        "| | calls | FD to the teacher | FD to digits | nats a token | nearest digit |",
        "|---|---|---|---|---|---|",
    ]
    fixed = known.get("floors", {})
    rows = [
        (name, "", [fixed[name]])
        for name in ("train", "train rounded", "held_out", "held_out rounded")
        if fixed
    ]
    if "teacher" in known:
        rows.append(("autoregressive teacher", "16", known["teacher"]))
    for form in FORMS:
        cells = [known[key] for key in (f"run|{form}|{seed}" for seed in SEEDS) if key in known]
        if cells:
            rows.append((f"DD2, {form}", "1", [cell["rounded"] for cell in cells]))
            rows.append((f"DD2, {form}, as they come", "1", [cell["as they come"] for cell in cells]))
    if "start" in known:
        rows.append(("student before training", "1", [known["start"]["rounded"]]))
    if fixed:
        rows.append(("set of tokens", "1", [fixed["set of tokens"]]))
    lines += [_row(*row) for row in rows]
    if "time" in known:
        lines += [
            "",
            "One call against sixteen with keys and values kept, one core, medians of interleaved rounds: ",
        ]
        lines[-1] += ", ".join(
            f"{cell['ratio']:.1f} times faster at a batch of {batch}" for batch, cell in known["time"].items()
        )
    toys = {form: [known[k] for k in (f"toy|{form}|{s}" for s in SEEDS) if k in known] for form in FORMS}
    if any(toys.values()):
        apart = 0.5 * float((JOINT.sum(1)[:, None] * JOINT.sum(0) - JOINT).abs().sum())
        lines += ["", f"The toy: total variation to the exact joint law (tokens apart: {apart:.3f}).", ""]
        lines += ["| | start | 200 turns | 600 turns |", "|---|---|---|---|"]
        for form, cells in toys.items():
            if cells:
                said = [", ".join(f"{cell[at]:.3f}" for cell in cells) for at in ("start", "200", "600")]
                lines.append(f"| {form} | {' | '.join(said)} |")
    return "\n".join([*lines, ""])


def page(figure: Any) -> None:
    """The documentation's figure: students while they train, and digits of each class by sixteen calls and by one."""
    known = json.loads(RESULTS.read_text())["results"]
    from matplotlib.ticker import LogLocator, NullLocator

    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for index, form in enumerate(FORMS):
        for seed in SEEDS:
            line = known[f"run|{form}|{seed}"]["seen"]
            left.plot(*zip(*line, strict=True), f"C{index}", label="" if seed else f"DD2, {form}")
    left.axhline(known["floors"]["set of tokens"]["fd_teacher"], color="0.5", ls=":", label="set of tokens")
    left.set(xlabel="iterations", ylabel="Fréchet distance to the teacher", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    rows = [
        functional.pad(
            torch.cat([functional.pad(torch.tensor(x), (0, 1)) for x in images], dim=1), (0, 0, 0, 2)
        )
        for images in known["pictures"].values()
    ]
    right.imshow(torch.cat(rows), cmap="gray_r")
    right.set_yticks([3.5, 13.5, 23.5], [name.replace(", ", ",\n") for name in known["pictures"]], fontsize=8)
    right.set_xticks([])


if __name__ == "__main__":
    command(__doc__, RESULTS, jobs(), tables, at_once=2)
