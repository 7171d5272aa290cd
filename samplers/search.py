"""Search for a solver: the schedule that gives this denoiser its best samples in a few calls, in one stage or two.

First every schedule (see ``usf``) is run from the same noise as a converged trajectory, and its error is the geometric
mean, over samples, of the distance to where that ended: a sample that falls on the other side of a watershed is one bad
sample, and does not drown the rest. What is searched:

- the discrete decisions of every step, by evolution: solvers made by hand on standard grids are the first population,
  and mutants of the best are measured, picked at random or by a predictor trained on what was measured so far (S^3,
  2312.07243);
- times and scales, by Gauss-Newton on the best schedule that can still be improved so. With errors e_i of samples,
  residuals r_i / e_i make it descend on sum log e_i; derivatives are differences: the network's gradient is not needed.

Then, if a ``metric`` of samples is given, the search goes on by that (``search_metric``). The best go on to other
noise, where they are measured again; what wins there is measured a third time, on noise that had no part in choosing
it, beside the best of the solvers made by hand.

    >>> from fewstep.models import GaussianMixture, paths
    >>> d = GaussianMixture([0.4, 0.6], [[-1.0], [1.0]], [0.05, 0.1]).denoiser(paths.flow())
    >>> table = search(d, calls=2, budget=700, batch=8, reference=30)
    >>> found = table.options["search"]
    >>> table.calls, found["spent"] <= 700, found["fresh_error"] <= found["fresh_error_by_hand"]
    (2, True, True)
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

from ..models.denoiser import Denoiser
from . import search_metric
from .multistep import check_choice
from .ranker import ranker
from .schedules import Schedule, encoded, handmade, mutant, numbers, plain, with_numbers
from .search_metric import Metric, Scorer, best
from .table import Table
from .trials import Record, State, Trials, error, lengths, rounded

FINALISTS = 4  # of the search, and as many made by hand
# a generation: mutants made, the predictor's picks, random ones
PARENTS, BROOD, MEASURED, LUCKY = 12, 96, 6, 2
DIFFERENCE = 1e-3
SAVE_EVERY = 5.0  # seconds
FIRST = 0.25  # with a metric, what the first stage may have of the budget that is not spoken for


def search(d: Denoiser, calls: int, *, budget: int = 10_000, seed: int = 0, batch: int = 64,
           cond: Mapping[str, torch.Tensor] | None = None, metric: Metric | None = None, metric_batches: int = 16,
           predictor: str = "ranker", reference: int = 200, file: str | os.PathLike | None = None,
           progress: bool = False) -> Table:  # fmt: skip
    """The best schedule of ``calls`` network calls that ``budget`` calls, each on ``batch`` samples, have found.

    Its table's ``options["search"]`` say how: the budget and what was spent, the errors on the three sets of noise (of
    training, of choosing, fresh), and the best solver made by hand on the same noise; with a metric also its values on
    fresh noise, of the winner, of the first stage's winner and of the best made by hand. The result is one of these
    itself where nothing better was found. The same arguments give the same table; under a network whose own sums
    depend on it (their number of threads, the machine), one about as good.

    Args:
        batch: too few samples are learnt by heart: 64 where they have few elements, 16 to 32 for images.
        cond: the network's keyword arguments, tensors whose rows are dealt out to the samples in turn.
        metric: samples (metric_batches * batch, ...) -> a number, small is good, such as a Frechet distance to data.
            Scoring a schedule takes calls * metric_batches of the budget, so give ten times as much of that.
        predictor: "ranker" measures the mutants that a small network likes best, "none" some picked at random; which
            matters little without a metric: Gauss-Newton does most of the work then.
        reference: calls of a converged trajectory; three of them are part of the budget.
        file: where the state is kept, as JSON, every few seconds. A search begun there is continued, to the same result
            that it would have had without interruption; it makes the training noise's trajectory once more.
    """
    for name, value, least in (("calls", calls, 2), ("budget", budget, 1), ("batch", batch, 2), ("seed", seed, 0),
                               ("reference", reference, 20), ("metric_batches", metric_batches, 1)):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(d, Denoiser) or d.shape is None:
        raise TypeError(f"d must be a Denoiser made with shape=..., got {type(d).__name__}")
    check_choice("predictor", predictor, ("ranker", "none"))
    if metric is not None and not callable(metric):
        raise TypeError(f"metric must be a function of samples, got {type(metric).__name__}")
    scorer = None if metric is None else Scorer(metric, int(metric_batches))
    asked = {"calls": int(calls), "budget": int(budget), "seed": int(seed), "batch": int(batch),
             "reference": int(reference), "predictor": predictor, "path": d.path.to_config(), "shape": list(d.shape),
             "metric": getattr(metric, "__name__", type(metric).__name__) if metric else None,
             "metric_batches": int(metric_batches) if metric else None}  # fmt: skip
    run = Trials(d, asked, cond or {})
    known = list(handmade(d.path, calls))
    limits = _limits(asked, len(known), scorer)
    path = FilePath(file) if file is not None else None
    with _bar(int(budget), progress) as bar:
        run.on_call = lambda: bar.update(1)
        state = _begin(run, path, known)
        bar.update(run.spent - bar.n)  # a state that was loaded has spent some
        done, saved = (state, run.spent), time.monotonic()
        if path:
            run.save(path, *done)
        try:
            while (stage := _stage(run, state, scorer, limits)) is not None:
                state = stage(state)
                now = f"error {min(r.error for r in state.records):.4g}"
                now += f", metric {min(state.scored.values()):.4g}" if state.scored else ""
                bar.set_postfix_str(now, refresh=False)
                done = state, run.spent
                if path and time.monotonic() - saved > SAVE_EVERY:
                    run.save(path, *done)
                    saved = time.monotonic()
        finally:  # an interrupted generation will be made again from its beginning
            if path:
                run.save(path, *done)
        return _chosen(run, state, scorer)


def _begin(run: Trials, file: FilePath | None, known: list[tuple[str, Schedule]]) -> State:
    """A state that was saved, or the solvers made by hand, measured."""
    if file is not None and file.exists():
        return run.load(file)
    run.converged(0)
    return State([Record(error(run.residuals(s)), s, name) for name, s in known])


def _limits(asked: dict[str, Any], known: int, scorer: Scorer | None) -> tuple[int, int]:
    """The calls after which the first stage ends, and the second: what comes then is set aside."""
    calls, reference = asked["calls"], asked["reference"]
    end = 2 * reference + 2 * FINALISTS * calls + 3 * calls
    begin = reference + known * calls
    seeds = 0
    if scorer is not None:
        end += FINALISTS * calls + scorer.cost(3 * FINALISTS + 3, calls)
        seeds = scorer.cost(2 * search_metric.SEEDS, calls)
    spare = asked["budget"] - begin - end - seeds
    if spare < 0:
        raise ValueError(
            f"budget must be at least {asked['budget'] - spare} calls here: three trajectories of {reference}, {known} "
            f"solvers made by hand{'' if scorer is None else ', the scores of some'} and the finalists; "
            f"got {asked['budget']}"
        )
    return begin + int(spare * (1 if scorer is None else FIRST)), asked["budget"] - end


def _stage(run: Trials, state: State, scorer: Scorer | None, limits: tuple[int, int]) -> Callable | None:
    """What makes the next generation, or None where the budget is spent."""
    if state.evolved == 0 and run.spent + run.calls <= limits[0]:
        return lambda state: _generation(run, state, limits[0])
    if scorer is not None and run.spent + scorer.cost(1, run.calls) <= limits[1]:
        return lambda state: search_metric.evolve(run, scorer, state, limits[1])
    return None


def _generation(run: Trials, state: State, limit: int) -> State:
    """New mutants, those that the predictor likes measured; then one step of Gauss-Newton."""
    records, generation = state.records, state.generation
    rng = np.random.default_rng([run.seed, generation])
    parents = best(records, PARENTS)
    seen = {record.schedule for record in records}
    learns = run.asked["predictor"] == "ranker"
    count = BROOD if learns else MEASURED + LUCKY
    ranks = np.minimum(rng.exponential(3.0, (count, 2)).astype(int), len(parents) - 1)
    brood = [mutant(run.path, parents[i].schedule, parents[j].schedule, rng) for i, j in ranks]
    brood = [child for child in dict.fromkeys(brood) if child not in seen]
    order = _by_promise(run, records, brood, generation) if learns else np.arange(len(brood))
    new = []
    for child in (brood[k] for k in (*order[:MEASURED], *rng.permutation(order[MEASURED:])[:LUCKY])):
        if run.spent + run.calls > limit:
            break
        new.append(Record(error(run.residuals(child)), child))
    records = [*records, *new]
    open_ended = [r for r in records if not r.settled and math.isfinite(r.error)]
    if open_ended:
        old = min(open_ended, key=lambda r: r.error)
        better = _gauss_newton(run, old, limit)
        records[records.index(old)] = old._replace(settled=True)
        records += [better] if better else []
    return state._replace(records=records, generation=generation + 1)


def _by_promise(run: Trials, records: list[Record], brood: list[Schedule], seed: int) -> np.ndarray:
    """The brood's order, the one first that a predictor trained on the records likes best."""
    if not brood:
        return np.arange(0)
    known, asked = (
        np.array([encoded(run.path, s) for s in group]) for group in ([r.schedule for r in records], brood)
    )
    return np.argsort(ranker(known, np.array([r.error for r in records]), seed)(asked), kind="stable")


def _gauss_newton(run: Trials, old: Record, limit: int) -> Record | None:
    """One damped step in the schedule's ``numbers``, or None where none is better; more than 1 % or it is the last."""

    def at(values: np.ndarray) -> tuple[Schedule, np.ndarray]:
        schedule = with_numbers(run.path, old.schedule, values)
        return schedule, run.residuals(schedule)

    values = numbers(old.schedule)
    if run.spent + (len(values) + 2) * run.calls > limit:
        return None
    start = run.residuals(old.schedule)
    weight = 1.0 / lengths(start)[:, None]
    columns = []
    for k in range(len(values)):
        moved = values.copy()
        moved[k] -= DIFFERENCE
        columns.append((weight * (start - at(moved)[1])).ravel() / DIFFERENCE)
    jacobian = np.stack(columns, axis=1)
    if not np.isfinite(jacobian).all():
        return None
    gradient, square = jacobian.T @ (weight * start).ravel(), jacobian.T @ jacobian
    damping = 1e-2
    while damping < 1e3 and run.spent + run.calls <= limit:
        curvature = square + damping * np.diag(np.diag(square)) + 1e-9 * np.eye(len(values))
        schedule, residuals = at(values - np.linalg.solve(curvature, gradient))
        if (new := error(residuals)) < old.error:
            return Record(new, schedule, None, new > 0.99 * old.error)
        damping *= 10.0
    return None


def _chosen(run: Trials, state: State, scorer: Scorer | None) -> Table:
    """The table of the winner, with how it was found."""
    named = {record.schedule: record for record in state.records}
    hands = [r.schedule for r in best([r for r in state.records if r.name], FINALISTS)]
    firsts = [r.schedule for r in best(state.records, FINALISTS)]
    evolved = sorted(state.scored, key=state.scored.__getitem__)[: search_metric.FINALISTS]
    finalists = list(dict.fromkeys([*firsts, *hands, *evolved]))
    errors = {schedule: error(run.residuals(schedule, 1)) for schedule in finalists}
    scores = errors if scorer is None else {s: scorer(run, s, "choosing") for s in finalists}
    winner, hand = min(finalists, key=scores.__getitem__), min(hands, key=scores.__getitem__)
    first = min([*firsts, *hands], key=errors.__getitem__)
    found: dict[str, Any] = {
        **{key: value for key, value in run.asked.items() if key not in ("calls", "path", "shape")},
        "schedules": len({*named, *state.scored}), "name": named[winner].name if winner in named else None,
        "by_hand": named[hand].name,
    }  # fmt: skip
    fresh: dict[Schedule, tuple] = {}
    for suffix, schedule in (("", winner), ("_by_hand", hand), ("_first_stage", first))[: 3 if scorer else 2]:
        if schedule not in fresh:
            gap = run.residuals(schedule, 2)
            fresh[schedule] = gap, scorer(run, schedule, "fresh") if scorer else None
        gap, value = fresh[schedule]
        found[f"error{suffix}"] = named[schedule].error if schedule in named else None
        found[f"held_out_error{suffix}"], found[f"fresh_error{suffix}"] = errors[schedule], error(gap)
        found[f"fresh_rmse{suffix}"] = rounded(float(np.sqrt((gap**2).mean())))
        if scorer is not None:
            found[f"metric_value{suffix}"] = value
    if scorer is not None:
        table = plain(run.path, first).table(run.path)
        found["first_stage"] = {"steps": table.options["steps"], "times": table.times.tolist()}
    table = plain(run.path, winner).table(run.path)
    return replace(table, options={**table.options, "search": {**found, "spent": run.spent}})


def _bar(total: int, progress: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="searching", unit="call", disable=not progress, mininterval=0.5)
