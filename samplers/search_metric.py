"""The second stage of ``search``: the schedules whose samples a metric likes, by predictor and evolution (2312.07243).

The first stage asks for the ODE's own samples. What one wants are good samples, and with few calls these are not the
same. So the best of the first stage and the best made by hand are scored by the metric; then mutants of the best, those
that a ranker thinks worth their calls (S^3). It learns from pairs of scores and, since these are few and dear, from as
many pairs of the first stage's errors.

All candidates are scored on the same noise: the luck of one is the luck of the others, and differences are known better
than scores. The search learns that luck by heart, so the finalists are scored on other noise, and the winner is scored
for the record on a third, beside the first stage's own winner and the best made by hand.

The paper scores by FID from the beginning, and knows no first stage. Its authors' code has no predictor either: it
mutates and crosses the 15 best so far, by FIDs of 1000 images, and may put a fixed guess in place of the first call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .ranker import ranker
from .schedules import Schedule, encoded, mutant
from .trials import Record, State, Trials, rounded

# a generation: mutants made, the predictor's picks, random ones
BROOD, MEASURED, LUCKY, PARENTS = 192, 5, 1, 10
SEEDS = 6  # of the first stage that are scored to begin with, and of those made by hand
FINALISTS = 4  # of this stage, of the first, and of those made by hand
ROLES = ("training", "choosing", "fresh")  # what noise is for

Metric = Callable[[torch.Tensor], float]


class Scorer(NamedTuple):
    """A metric of ``batches`` batches of samples; small is good."""

    metric: Metric
    batches: int

    def cost(self, schedules: int, calls: int) -> int:
        """Network calls that scoring takes."""
        return schedules * calls * self.batches

    def __call__(self, run: Trials, schedule: Schedule, role: str) -> float:
        """The score on the noise of that role: the blocks after the first stage's three."""
        first = 3 + ROLES.index(role) * self.batches
        try:
            table = schedule.table(run.path)
        except ValueError:
            return math.inf
        samples = run.samples(table, *range(first, first + self.batches))
        if not torch.isfinite(samples).all():
            return math.inf
        value = self.metric(samples)
        if not math.isfinite(value := float(value)):
            raise ValueError(f"metric must return a finite number, got {value!r}")
        return rounded(value)


def evolve(run: Trials, scorer: Scorer, state: State, limit: int) -> State:
    """One generation: first the seeds, later mutants; with fewer of them where ``limit`` calls would be exceeded."""
    scored = dict(state.scored)
    if state.evolved == 0:
        seeds = [*best(state.records, SEEDS), *best([r for r in state.records if r.name], SEEDS)]
        brood = [record.schedule for record in seeds]
    else:
        brood = _promising(run, state)
    for schedule in dict.fromkeys(brood):
        if schedule not in scored and run.spent + scorer.cost(1, run.calls) <= limit:
            scored[schedule] = scorer(run, schedule, "training")
    return state._replace(scored=scored, evolved=state.evolved + 1)


def _promising(run: Trials, state: State) -> list[Schedule]:
    """Mutants of those that score best: the ones that the predictor likes, and a few at random."""
    rng = np.random.default_rng([run.seed, state.evolved, 1])
    parents = sorted(state.scored, key=state.scored.__getitem__)[:PARENTS]
    learns = run.asked["predictor"] == "ranker"
    count = BROOD if learns else MEASURED + LUCKY
    ranks = np.minimum(rng.exponential(3.0, (count, 2)).astype(int), len(parents) - 1)
    brood = [mutant(run.path, parents[i], parents[j], rng) for i, j in ranks]
    brood = [child for child in dict.fromkeys(brood) if child not in state.scored]
    order = np.arange(len(brood))
    if learns and brood:
        scores = _rows(run, list(state.scored)), np.array(list(state.scored.values()))
        errors = _rows(run, [r.schedule for r in state.records]), np.array([r.error for r in state.records])
        order = np.argsort(ranker(*scores, seed=state.evolved, warm=errors)(_rows(run, brood)), kind="stable")
    return [brood[k] for k in (*order[:MEASURED], *rng.permutation(order[MEASURED:])[:LUCKY])]


def _rows(run: Trials, schedules: list[Schedule]) -> np.ndarray:
    return np.array([encoded(run.path, schedule) for schedule in schedules])


def best(records: list[Record], count: int) -> list[Record]:
    """The best, of each set of decisions only the best one."""
    found: dict[tuple, Record] = {}
    for record in sorted(records, key=lambda r: r.error):
        found.setdefault(record.schedule.decisions, record)
        if len(found) == count:
            break
    return list(found.values())
