"""Points of the space that ``search`` walks in: solver schedules, with times as numbers that may move freely.

>>> from fewstep.models import paths
>>> s = Schedule((-1.0, 1.0), ("x0 vp 1", "x0 vp 2", "eps lam 2"))
>>> s.calls, s.table(paths.flow()).times.round(3).tolist()
(3, [1.0, 0.731, 0.269, 0.0])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..models.paths import Path
from . import grids
from .quadrature import VARIABLES
from .table import Table
from .usf import RULES, SCALES, Step, usf

GAP = 1e-3  # of log-SNR, between two times
CHOICES = {
    "variable": VARIABLES,
    "nodes": (1, 2, 3, 4),
    "rule": RULES,
    "back": (0, 0, 1, 2),
    "corrector": (0, 0, 1, 2, 3),
}


class Schedule(NamedTuple):
    """``lam``: the log-SNR of every time but the first (t_max) and the last (clean); ``steps``: a text a step."""

    lam: tuple[float, ...]
    steps: tuple[str, ...]

    @property
    def calls(self) -> int:
        return len(self.steps)

    @property
    def decisions(self) -> tuple[Step, ...]:
        """The steps without their scales: schedules that share them differ in numbers alone."""
        return tuple(replace(Step.read(step), scale=1.0) for step in self.steps)

    def table(self, path: Path) -> Table:
        """Compiled; ``ValueError`` where its times or weights are not to be had."""
        times = [path.t_max, *(float(path.time(lam)) for lam in self.lam), path.t_clean]
        return usf(path, times, steps=list(self.steps))


def limits(path: Path) -> tuple[float, float]:
    """The log-SNR of t_max and t_min; where there is no signal at t_max, as far out as t_min is."""
    low, high = float(path.lam(path.t_max)), float(path.lam(path.t_min))
    return (low if np.isfinite(low) else -high), high


def forms(path: Path) -> tuple[str, ...]:
    """The forms in which steps can be made on the path; on edm v and eps are the same."""
    return ("x0", "eps", "v") if path.name == "flow" else ("x0", "eps")


def handmade(path: Path, calls: int) -> Iterator[tuple[str, Schedule]]:
    """Known solvers on standard grids, by name."""
    one = {"ddim": "x0 vp 1", "DPM-Solver++ 2M": "x0 lam 2 shipped", "DPM-Solver++ 3M": "x0 lam 3"}
    one |= {f"multistep x0/vp {n}": f"x0 vp {n}" for n in (2, 3, 4)}
    one |= {f"abm {n}": f"x0 vp {n} corrector={n - 1}" for n in (2, 3, 4)}
    one |= {f"DEIS {v} {n}": f"eps {v} {n}" for v, n in (("t", 3), ("t", 4), ("rho", 3), ("lam", 3))}
    spacings = {f"vp^{e:g}": grids.vp(path, calls, exponent=e) for e in (1.0, 1.5, 2.0)}
    spacings |= {name: getattr(grids, name)(path, calls) for name in ("logsnr", "karras", "uniform")}
    if path.name == "flow":
        one |= {f"Adams-Bashforth of the flow {n}": f"v t {n}" for n in (2, 3)}
        spacings["shift 3"] = grids.shifted(path, calls, shift=3.0)
    solvers = {name: (step,) * calls for name, step in one.items()}
    for order in (2, 3):
        nodes = [min(order, i + 1, calls - i) for i in range(calls)]
        solvers[f"UniPC {order}"] = tuple(f"x0 lam {n} bh2 corrector={n}" for n in nodes)
    for solver, steps in solvers.items():
        for grid, times in spacings.items():
            yield f"{solver} / {grid}", Schedule(tuple(float(v) for v in path.lam(times[1:-1])), steps)


def spaced(path: Path, lam: np.ndarray) -> tuple[float, ...]:
    """Log-SNRs put in order, between the limits and apart from one another."""
    low, high = limits(path)
    lam = np.sort(np.clip(lam, low, high))
    for i in range(len(lam)):
        lam[i] = max(lam[i], (lam[i - 1] if i else low) + GAP)
    for i in reversed(range(len(lam))):
        lam[i] = min(lam[i], high if i == len(lam) - 1 else lam[i + 1] - GAP)
    return tuple(lam.tolist())


def mutant(path: Path, parent: Schedule, other: Schedule, rng: np.random.Generator) -> Schedule:
    """A child: perhaps with the tail of another, with times moved, with one or two decisions made anew."""
    lam, steps = np.array(parent.lam), [Step.read(step) for step in parent.steps]
    kind = rng.integers(4)
    if kind == 0:
        cut = int(rng.integers(1, parent.calls))
        steps[cut:] = [Step.read(step) for step in other.steps[cut:]]
        lam[cut:] = other.lam[cut:]
    if kind == 1:
        moved = rng.random(len(lam)) < rng.choice([0.3, 1.0])
        lam = lam + moved * 10 ** rng.uniform(-2, 0) * rng.standard_normal(len(lam))
    if kind >= 1:
        for _ in range(rng.integers(1, 3)):
            i = int(rng.integers(parent.calls))
            steps[i] = _redecided(path, steps[i], rng)
    return Schedule(spaced(path, lam), tuple(map(str, steps)))


def _redecided(path: Path, step: Step, rng: np.random.Generator) -> Step:
    choices = {"form": forms(path), **CHOICES}
    name = list(choices)[rng.integers(len(choices))]
    value = choices[name][rng.integers(len(choices[name]))]
    return replace(step, **{name: value})  # type: ignore[arg-type]


def numbers(schedule: Schedule) -> np.ndarray:
    """What can be refined by small changes: the log-SNRs, and the scale of every step that has two nodes or more."""
    steps = [Step.read(step) for step in schedule.steps]
    return np.array([*schedule.lam, *(steps[i].scale for i in _scaled(steps))])


def with_numbers(path: Path, schedule: Schedule, values: np.ndarray) -> Schedule:
    """The schedule with other ``numbers``, put inside what is allowed."""
    count = len(schedule.lam)
    steps = [Step.read(step) for step in schedule.steps]
    for i, scale in zip(_scaled(steps), np.clip(values[count:], *SCALES), strict=True):
        steps[i] = replace(steps[i], scale=float(scale))
    return Schedule(spaced(path, values[:count]), tuple(map(str, steps)))


def _scaled(steps: list[Step]) -> list[int]:
    return [i for i, step in enumerate(steps) if i and step.nodes > 1]


@lru_cache(maxsize=100_000)
def encoded(path: Path, schedule: Schedule) -> np.ndarray:
    """A schedule as numbers for a predictor: of each step its decisions, one-hot, its scale and its log-SNR."""
    low, high = limits(path)
    choices = {"form": ("x0", "eps", "v"), **CHOICES}
    row: list[float] = []
    for step, lam in zip(map(Step.read, schedule.steps), (low, *schedule.lam), strict=True):
        for name, options in choices.items():
            row += [float(getattr(step, name) == value) for value in dict.fromkeys(options)]
        row += [step.scale - 1.0, 4.0 * (lam - low) / (high - low) - 2.0]
    return np.array(row)
