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
from .quadrature import VARIABLES, variable_at
from .table import Table
from .usf import RULES, SCALES, Step, usf

GAP = 1e-3  # of log-SNR, between two times
DIGITS = (
    6  # after the point, of log-SNRs and scales: rounding does not reach them, and a search comes out alike
)
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
            lam = tuple(float(v) for v in path.lam(times[1:-1]))
            yield f"{solver} / {grid}", Schedule(lam, steps)


@lru_cache(maxsize=64)
def _alike(path: Path) -> dict[str, str]:
    """The variable that each one is the same as, or affine to, on the path: the first of its kind."""
    times = np.linspace(path.t_min, path.t_max, 9)[1:-1]
    found: dict[str, str] = {}
    seen: list[tuple[str, np.ndarray]] = []
    for variable in ("vp", "rho", "lam", "t", "snr"):
        v = variable_at(path, variable, times)
        shape = (v - v[0]) / (v[-1] - v[0])
        found[variable] = next(
            (name for name, old in seen if np.allclose(shape, old, rtol=0, atol=1e-9)), variable
        )
        seen.append((variable, shape))
    return found


def plain(path: Path, schedule: Schedule) -> Schedule:
    """The same table in the fewest words: of what makes no difference to a step nothing is said.

    For those who read it. A search itself goes better with the whole text: what is idle in a parent may be of use in a
    child (without, distances were 1.1 and 2.2 times as large on two seeds at 6 calls, on a mixture).

    >>> from fewstep.models import paths
    >>> plain(paths.vp_linear(), Schedule((0.0,), ("eps lam 4 bh1", "x0 t 3 taylor corrector=2 scale=2.0"))).steps
    ('x0 vp 1', 'x0 vp 2 scale=2.0')
    """
    blank = float(path.alpha(path.t_max)) == 0.0  # the first output has no vp, rho or lam to stand at
    steps = [Step.read(step) for step in schedule.steps]
    left = {max(i - step.back, 0) for i, step in enumerate(steps)}  # the points that steps are made from
    made: list[Step] = []
    for i, step in enumerate(steps):
        last = i + 1 == len(steps)
        corrector = min(step.corrector, i + 1) if i + 1 in left else 0
        if step.form == "eps" and blank and step.back >= i:
            step, corrector = Step("x0", nodes=1, back=step.back), 0
        step = replace(step, variable=_alike(path)[step.variable], nodes=min(step.nodes, i + 1),
                       back=min(step.back, i), corrector=corrector)  # fmt: skip
        step = replace(step, rule=_rule(step))
        ruled = step.rule not in ("exact", "taylor")
        if blank and i and step.variable in ("vp", "rho", "lam") and not ruled:
            step = replace(step, nodes=min(step.nodes, i))
        older = ruled and step.nodes == 2 and step.back == 1  # what a rule for two falls back on
        if last and step.variable in ("lam", "snr") and not older:
            step = replace(step, nodes=1)
        if step.nodes == 1:
            step = replace(step, scale=1.0)
            if not step.corrector:
                one_point = not step.back and not (made and made[-1].corrector)  # which has both x0 and eps
                step = replace(
                    step, variable="vp", form="x0" if one_point and step.form == "eps" else step.form
                )
        made.append(replace(step, rule=_rule(step)))
    return Schedule(schedule.lam, tuple(map(str, made)))


def _rule(step: Step) -> str:
    """The step's rule, or "exact" where that says the same; ``nodes`` and ``corrector`` are as many as there are."""
    over = {step.nodes, step.corrector + 1 if step.corrector else 0}
    if step.rule == "taylor":
        return "taylor" if max(over) > 2 else "exact"
    paired = (step.nodes == 2 and step.back <= 1) or (step.corrector == 1 and not step.back)
    triple = 3 in over
    if step.rule == "exact" or step.variable != "lam" or not (paired or (triple and step.rule == "shipped")):
        return "exact"
    return "bh2" if step.rule == "shipped" and not triple else step.rule


def spaced(path: Path, lam: np.ndarray) -> tuple[float, ...]:
    """Log-SNRs put in order, between the limits and apart from one another."""
    low, high = limits(path)
    high = np.floor(high * 10**DIGITS) / 10**DIGITS
    lam = np.sort(np.clip(lam, low, high))
    for i in range(len(lam)):
        lam[i] = max(lam[i], (lam[i - 1] if i else low) + GAP)
    for i in reversed(range(len(lam))):
        lam[i] = min(lam[i], high if i == len(lam) - 1 else lam[i + 1] - GAP)
    return tuple(lam.round(DIGITS).tolist())


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
    for i, scale in zip(_scaled(steps), np.clip(values[count:], *SCALES).round(DIGITS), strict=True):
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
