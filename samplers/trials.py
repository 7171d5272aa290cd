"""What a search measures: schedules run by a denoiser from given noise, every network call counted, and kept in a file.

Noise comes in blocks of ``batch`` samples. Block 0 is for training, 1 for choosing, 2 for the last word; those of a
sample metric come after them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.codec import dealt
from ..models.denoiser import Denoiser
from . import grids
from .loop import sample
from .multistep import multistep
from .noise import starting_noise
from .schedules import Schedule
from .table import Table

VERSION = 2
FIGURES = 9  # of an error or a score: more are rounding, which the number of threads changes


class Record(NamedTuple):
    """A schedule that was measured. ``settled``: Gauss-Newton could not improve it further."""

    error: float
    schedule: Schedule
    name: str | None = None  # of a solver made by hand
    settled: bool = False


class State(NamedTuple):
    """Where a search is: errors by trajectory, scores by the metric, the generations of each."""

    records: list[Record]
    generation: int = 0
    scored: dict[Schedule, float] = {}  # noqa: RUF012
    evolved: int = 0


class Trials:
    """The denoiser with its noise, and how many network calls were ``spent``."""

    def __init__(self, d: Denoiser, asked: dict[str, Any], cond: Mapping[str, torch.Tensor]):
        self.d, self.path, self.asked, self.cond = d, d.path, asked, dict(cond)
        self.calls, self.batch, self.seed = asked["calls"], asked["batch"], asked["seed"]
        leaf = d.parts()[0]
        weight = next(leaf.net.parameters(), None) if leaf.net is not None else None
        self.device = torch.device("cpu") if weight is None else weight.device
        # an exact model has no network to ask: double precision
        network = leaf.dtype is not None and leaf.dtype != torch.float64
        self.dtype = torch.float32 if network else torch.float64
        self.spent = 0
        self.on_call: Callable[[], Any] = lambda: None
        self._noise: dict[int, torch.Tensor] = {}
        self._converged: dict[int, torch.Tensor] = {}

    def samples(self, table: Table, *blocks: int) -> torch.Tensor:
        """Samples from these blocks of noise, a batch each: block b has the ids b * batch and on."""
        return torch.cat([self._samples(table, block) for block in blocks])

    def _samples(self, table: Table, block: int) -> torch.Tensor:
        ids = torch.arange(block * self.batch, (block + 1) * self.batch)
        if block not in self._noise:
            noise = starting_noise(self.seed, ids, self.d.shape or (), self.dtype)
            self._noise[block] = noise.to(self.device)
        cond = dealt(self.cond, ids.to(self.device))
        self.spent += table.calls
        return sample(
            self.d, self._noise[block], table, cond=cond, callback=lambda _: self.on_call(), check="off"
        )

    def converged(self, block: int) -> torch.Tensor:
        """Where the ODE takes a block of noise."""
        if block not in self._converged:
            table = converged_table(self.path, self.asked["reference"])
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

    def save(self, file: FilePath, state: State, spent: int) -> None:
        """Write the state aside, then rename."""
        content = {
            "fewstep_search": VERSION, "asked": self.asked, "spent": spent,
            "scale": float(self.converged(0).square().mean()), "generation": state.generation, "evolved": state.evolved,
            "records": [r._replace(error=repr(r.error)) for r in state.records],
            "scored": [[schedule, repr(score)] for schedule, score in state.scored.items()],
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        aside.write_text(json.dumps(content))
        os.replace(aside, file)

    def load(self, file: FilePath) -> State:
        """The state that ``save`` wrote, if it is one of this search."""
        try:
            content = json.loads(file.read_text())
            version, asked = content["fewstep_search"], content["asked"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"file must be the state of a search or not be there yet, got {file}") from None
        mine = json.loads(json.dumps(self.asked))
        if version != VERSION or asked != mine:
            other = [key for key in mine if asked.get(key) != mine[key]]
            raise ValueError(
                f"file {file} holds another search ({', '.join(other) or 'version'} differ): name another or remove it"
            )
        scale = float(self.converged(0).square().mean())
        if abs(scale - content["scale"]) > 1e-3 * scale:
            raise ValueError(
                f"file {file} holds a search with another model or other cond: its converged samples differ"
            )
        self.spent = content["spent"]
        records = [Record(float(e), _schedule(s), name, done) for e, s, name, done in content["records"]]
        scored = {_schedule(schedule): float(score) for schedule, score in content["scored"]}
        return State(records, content["generation"], scored, content["evolved"])


def converged_table(path, calls: int) -> Table:
    """The solver that stands for the ODE's own solution."""
    times = grids.vp(path, calls, exponent=2.0)
    return multistep(path, times, form="x0", variable="vp", nodes=4, corrector=False)


def error(residuals: np.ndarray) -> float:
    """The geometric mean over samples of the root mean square over elements."""
    each = lengths(residuals)
    return rounded(float(np.exp(np.log(each).mean()))) if np.isfinite(each).all() else math.inf


def lengths(residuals: np.ndarray) -> np.ndarray:
    """Root mean square over the elements of each sample."""
    return np.maximum(np.sqrt((residuals**2).mean(axis=1)), 1e-12)


def rounded(value: float) -> float:
    """To as many figures as do not depend on the order of summation.

    >>> rounded(0.1 + 0.2), rounded(float("inf"))
    (0.3, inf)
    """
    return float(f"{value:.{FIGURES}g}")


def _schedule(content: list) -> Schedule:
    return Schedule(tuple(content[0]), tuple(content[1]))
