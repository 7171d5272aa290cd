"""Search for a solver: the schedule that brings this denoiser nearest to its converged samples in a few calls.

Every schedule (see ``usf``) is run from the same noise as a converged trajectory, and its error is the geometric mean,
over samples, of the distance to where that ended: a sample that falls on the other side of a watershed is one bad
sample, and does not drown the rest. What is searched:

- the discrete decisions of every step, by evolution: solvers made by hand on standard grids are the first population,
  and mutants of the best are measured, picked at random or by a predictor trained on what was measured so far (S^3,
  2312.07243);
- times and scales, by Gauss-Newton on the best schedule that can still be improved so. With errors e_i of samples,
  residuals r_i / e_i make it descend on sum log e_i; derivatives are differences: the network's gradient is not needed.

The best go on to other noise, where they are measured again, or by ``metric`` if there is one; what wins there is
measured a third time, on noise that had no part in choosing it, beside the best of the solvers made by hand.

    >>> from fewstep.models import GaussianMixture, paths
    >>> d = GaussianMixture([0.4, 0.6], [[-1.0], [1.0]], [0.05, 0.1]).denoiser(paths.flow())
    >>> table = search(d, calls=2, budget=700, batch=8, reference=30)
    >>> found = table.options["search"]
    >>> table.calls, found["spent"] <= 700, found["fresh_error"] <= found["fresh_error_by_hand"]
    (2, True, True)
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from . import grids
from .loop import sample
from .multistep import check_choice, multistep
from .noise import starting_noise
from .ranker import ranker
from .schedules import Schedule, encoded, handmade, mutant, numbers, with_numbers
from .table import Table

VERSION = 1
FINALISTS = 4  # of the search, and as many made by hand
PARENTS, BROOD, MEASURED, LUCKY = (
    12,
    96,
    6,
    2,
)  # a generation: mutants made, the predictor's picks, picks at random
DIFFERENCE = 1e-3
SAVE_EVERY = 5.0  # seconds


class Record(NamedTuple):
    """A schedule that was measured. ``settled``: Gauss-Newton could not improve it further."""

    error: float
    schedule: Schedule
    name: str | None = None  # of a solver made by hand
    settled: bool = False


def search(d: Denoiser, calls: int, *, budget: int = 10_000, seed: int = 0, batch: int = 64,
           cond: Mapping[str, torch.Tensor] | None = None, metric: Callable[[torch.Tensor], float] | None = None,
           metric_batches: int = 16, predictor: str = "ranker", reference: int = 200,
           file: str | os.PathLike | None = None, progress: bool = False) -> Table:  # fmt: skip
    """The best schedule of ``calls`` network calls that ``budget`` calls, each on ``batch`` samples, have found.

    Its table's ``options["search"]`` say how: the budget and what was spent, the errors on the three sets of noise (of
    training, of choosing, fresh), and the best solver made by hand on the same noise. The result is that solver itself
    where nothing better was found.

    Args:
        batch: too few samples are learnt by heart: 64 where they have few elements, 16 to 32 for images.
        cond: the network's keyword arguments, tensors whose rows are dealt out to the samples in turn.
        metric: samples (metric_batches * batch, ...) -> a number, small is good; it chooses among the finalists.
        predictor: "ranker" measures the mutants that a small network likes best, "none" some picked at random; which
            matters little: Gauss-Newton does most of the work (``benchmarks/search.py --predictor none`` compares).
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
    asked = {"calls": int(calls), "budget": int(budget), "seed": int(seed), "batch": int(batch),
             "reference": int(reference), "predictor": predictor, "path": d.path.to_config(), "shape": list(d.shape),
             "metric": getattr(metric, "__name__", type(metric).__name__) if metric else None}  # fmt: skip
    run = _Run(d, asked, cond or {})
    final = _cost_of_the_end(asked, metric_batches)
    known = list(handmade(d.path, calls))
    least = reference + len(known) * calls + final
    if budget < least:
        raise ValueError(
            f"budget must be at least {least} calls here: three trajectories of {reference}, {len(known)} solvers made "
            f"by hand and the finalists; got {budget}"
        )
    state = FilePath(file) if file is not None else None
    with _bar(int(budget), progress) as bar:
        run.on_call = lambda: bar.update(1)
        records, generation = run.begin(state, known)
        done, saved = (records, generation, run.spent), time.monotonic()
        try:
            while run.spent + calls <= budget - final:
                records = _generation(run, records, generation, budget - final)
                generation += 1
                bar.set_postfix_str(f"error {min(r.error for r in records):.4g}", refresh=False)
                done = records, generation, run.spent
                if state and time.monotonic() - saved > SAVE_EVERY:
                    run.save(state, *done)
                    saved = time.monotonic()
        finally:  # an interrupted generation will be made again from its beginning
            if state:
                run.save(state, *done)
        return _chosen(run, records, metric, metric_batches)


class _Run:
    """The denoiser with its noise: what is measured, and how many calls that took."""

    def __init__(self, d: Denoiser, asked: dict[str, Any], cond: Mapping[str, torch.Tensor]):
        self.d, self.path, self.asked, self.cond = d, d.path, asked, dict(cond)
        self.calls, self.batch, self.seed = asked["calls"], asked["batch"], asked["seed"]
        leaf = d.parts()[0]
        weight = next(leaf.net.parameters(), None) if leaf.net is not None else None
        self.device = torch.device("cpu") if weight is None else weight.device
        # an exact model has no network to ask: double precision
        self.dtype = (
            torch.float32 if leaf.dtype is not None and leaf.dtype != torch.float64 else torch.float64
        )
        self.spent = 0
        self.on_call: Callable[[], Any] = lambda: None
        self._noise: dict[int, torch.Tensor] = {}
        self._converged: dict[int, torch.Tensor] = {}

    def samples(self, table: Table, block: int) -> torch.Tensor:
        """Samples from block ``block`` of noise, which are those of ids block * batch and on."""
        ids = torch.arange(block * self.batch, (block + 1) * self.batch)
        if block not in self._noise:
            self._noise[block] = starting_noise(self.seed, ids, self.d.shape or (), self.dtype).to(
                self.device
            )
        cond = {k: v.to(self.device)[(ids % len(v)).to(self.device)] for k, v in self.cond.items()}
        self.spent += table.calls
        noise = self._noise[block]
        return sample(self.d, noise, table, cond=cond, callback=lambda _: self.on_call(), check="off")

    def converged(self, block: int) -> torch.Tensor:
        """Where the ODE takes a block of noise."""
        if block not in self._converged:
            times = grids.vp(self.path, self.asked["reference"], exponent=2.0)
            table = multistep(self.path, times, form="x0", variable="vp", nodes=4)
            self._converged[block] = self.samples(table, block).double()
            if not torch.isfinite(self._converged[block]).all():
                raise ValueError("d's converged samples are not finite: there is nothing to come near to")
        return self._converged[block]

    def residuals(self, schedule: Schedule, block: int = 0) -> np.ndarray:
        """(batch, elements) distances to the converged samples; infinite where the schedule makes no sense."""
        target = self.converged(block)
        try:
            table = schedule.table(self.path)
        except ValueError:  # coefficients that are not finite; no call was made
            return np.full((self.batch, target[0].numel()), math.inf)
        gap = (self.samples(table, block).double() - target).flatten(1).cpu().numpy()
        return np.where(np.isfinite(gap), gap, math.inf)

    def begin(self, file: FilePath | None, known: list[tuple[str, Schedule]]) -> tuple[list[Record], int]:
        """The records to start from: a state that was saved, or the solvers made by hand, measured."""
        if file is not None and file.exists():
            return self.load(file)
        self.converged(0)
        return [Record(error(self.residuals(s)), s, name) for name, s in known], 0

    def save(self, file: FilePath, records: list[Record], generation: int, spent: int) -> None:
        """Write the state aside, then rename."""
        content = {
            "fewstep_search": VERSION, "asked": self.asked, "spent": spent, "generation": generation,
            "scale": float(self.converged(0).square().mean()),
            "records": [r._replace(error=repr(r.error)) for r in records],
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        aside.write_text(json.dumps(content))
        os.replace(aside, file)

    def load(self, file: FilePath) -> tuple[list[Record], int]:
        """The state that ``save`` wrote, if it is one of this search."""
        try:
            content = json.loads(file.read_text())
            version, asked = content["fewstep_search"], content["asked"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"file must be the state of a search or not be there yet, got {file}") from None
        if version != VERSION or asked != json.loads(json.dumps(self.asked)):
            other = [key for key in self.asked if asked.get(key) != json.loads(json.dumps(self.asked[key]))]
            raise ValueError(
                f"file {file} holds another search ({', '.join(other) or 'version'} differ): name another or remove it"
            )
        scale = float(self.converged(0).square().mean())
        if abs(scale - content["scale"]) > 1e-3 * scale:
            raise ValueError(
                f"file {file} holds a search with another model or other cond: its converged samples differ"
            )
        self.spent = content["spent"]
        records = [
            Record(float(e), Schedule(tuple(s[0]), tuple(s[1])), name, settled)
            for e, s, name, settled in content["records"]
        ]
        return records, content["generation"]


def error(residuals: np.ndarray) -> float:
    """The geometric mean over samples of the root mean square over elements."""
    each = _each(residuals)
    return float(np.exp(np.log(each).mean())) if np.isfinite(each).all() else math.inf


def _each(residuals: np.ndarray) -> np.ndarray:
    return np.maximum(np.sqrt((residuals**2).mean(axis=1)), 1e-12)


def _best(records: list[Record], count: int) -> list[Record]:
    """The best, of each set of decisions only the best one."""
    found: dict[tuple, Record] = {}
    for record in sorted(records, key=lambda r: r.error):
        found.setdefault(record.schedule.decisions, record)
        if len(found) == count:
            break
    return list(found.values())


def _generation(run: _Run, records: list[Record], generation: int, limit: int) -> list[Record]:
    """New mutants, those that the predictor likes measured; then one step of Gauss-Newton."""
    rng = np.random.default_rng([run.seed, generation])
    parents = _best(records, PARENTS)
    seen = {record.schedule for record in records}
    ranks = np.minimum(rng.exponential(3.0, (BROOD, 2)).astype(int), len(parents) - 1)
    brood = [mutant(run.path, parents[i].schedule, parents[j].schedule, rng) for i, j in ranks]
    brood = [child for child in dict.fromkeys(brood) if child not in seen]
    order = (
        _by_promise(run, records, brood, generation)
        if run.asked["predictor"] == "ranker"
        else np.arange(len(brood))
    )
    picked = [*order[:MEASURED], *rng.permutation(order[MEASURED:])[:LUCKY]]
    new = []
    for child in (brood[k] for k in picked):
        if run.spent + run.calls > limit:
            return [*records, *new]
        new.append(Record(error(run.residuals(child)), child))
    records = [*records, *new]
    open_ended = [r for r in records if not r.settled and math.isfinite(r.error)]
    if not open_ended:
        return records
    old = min(open_ended, key=lambda r: r.error)
    better = _gauss_newton(run, old, limit)
    records[records.index(old)] = old._replace(settled=True)
    return [*records, better] if better else records


def _by_promise(run: _Run, records: list[Record], brood: list[Schedule], seed: int) -> np.ndarray:
    """The brood's order, the one first that a predictor trained on the records likes best."""
    if not brood:
        return np.arange(0)
    known, asked = (
        np.array([encoded(run.path, s) for s in group]) for group in ([r.schedule for r in records], brood)
    )
    return np.argsort(ranker(known, np.array([r.error for r in records]), seed)(asked), kind="stable")


def _gauss_newton(run: _Run, old: Record, limit: int) -> Record | None:
    """One damped step in the schedule's ``numbers``, or None where none is better; more than 1 % or it is the last."""

    def at(values: np.ndarray) -> tuple[Schedule, np.ndarray]:
        schedule = with_numbers(run.path, old.schedule, values)
        return schedule, run.residuals(schedule)

    values = numbers(old.schedule)
    if run.spent + (len(values) + 2) * run.calls > limit:
        return None
    start = run.residuals(old.schedule)
    weight = 1.0 / _each(start)[:, None]
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


def _cost_of_the_end(asked: dict[str, Any], metric_batches: int) -> int:
    finals = 2 * FINALISTS * asked["calls"] * (metric_batches if asked["metric"] else 1)
    return 2 * asked["reference"] + finals + 2 * FINALISTS * asked["calls"] + 2 * asked["calls"]


def _chosen(run: _Run, records: list[Record], metric: Callable | None, metric_batches: int) -> Table:
    """The table of the winner, with how it was found."""
    hands = _best([r for r in records if r.name], FINALISTS)
    finalists = [*_best(records, FINALISTS), *hands]
    finalists = list(dict.fromkeys(finalists))
    errors = {record: error(run.residuals(record.schedule, 1)) for record in finalists}
    scores = errors
    if metric is not None:
        scores = {record: _by_metric(run, record, metric, metric_batches) for record in finalists}
    winner, hand = min(finalists, key=scores.__getitem__), min(hands, key=scores.__getitem__)
    fresh = {record: run.residuals(record.schedule, 2) for record in dict.fromkeys((winner, hand))}
    table = winner.schedule.table(run.path)
    found: dict[str, Any] = {
        **{key: run.asked[key] for key in ("budget", "seed", "batch", "reference", "predictor", "metric")},
        "spent": run.spent, "schedules": len(records), "name": winner.name, "by_hand": hand.name,
    }  # fmt: skip
    for suffix, record in (("", winner), ("_by_hand", hand)):
        found[f"error{suffix}"], found[f"held_out_error{suffix}"] = record.error, errors[record]
        found[f"fresh_error{suffix}"] = error(fresh[record])
        found[f"fresh_rmse{suffix}"] = float(np.sqrt((fresh[record] ** 2).mean()))
        if metric is not None:
            found[f"metric_value{suffix}"] = scores[record]
    return replace(table, options={**table.options, "search": found})


def _by_metric(run: _Run, record: Record, metric: Callable, batches: int) -> float:
    table = record.schedule.table(run.path)
    value = metric(torch.cat([run.samples(table, 3 + block) for block in range(batches)]))
    if not math.isfinite(value := float(value)):
        raise ValueError(f"metric must return a finite number, got {value!r}")
    return value


def _bar(total: int, progress: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="searching", unit="call", disable=not progress, mininterval=0.5)
