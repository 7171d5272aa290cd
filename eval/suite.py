"""Samplers against each other: every one at every budget of network calls, from the same noise, by the same metrics.

A cell is a sampler at a budget: its samples, which are kept, so that a suite that was broken off goes on; what a judge
sees in them; and its numbers. ``report`` makes a page of what it leaves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import Denoiser, decode
from ..samplers import starting_noise
from .bench import environment
from .contestants import Contestant
from .features import Extractor
from .files import written_aside
from .generate import generate
from .measure import MOMENTS_DO, measure
from .ranks import ALONE, Ranks
from .seen import see
from .sources import open_images
from .statistics_files import Statistics

RESULTS = "results.json"
# The condition of samples with these ids, and their labels or None.
Conditions = Callable[[torch.Tensor], tuple[Mapping[str, Any] | None, torch.Tensor | None]]


def unconditional(ids: torch.Tensor) -> tuple[None, None]:
    """No condition."""
    return None, None


def run(
    d: Denoiser,
    samplers: Sequence[Contestant],
    budgets: Sequence[int],
    reference: Statistics,
    judge: Extractor,
    folder: Path,
    *,
    metrics: Sequence[str] = ("fd",),
    num: int = 2000,
    seed: int = 0,
    batch: int = 64,
    conditions: Conditions = unconditional,
    told: Mapping[str, Any] | None = None,
    expected: Sequence[Mapping[str, Any]] = (),
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> dict[str, Any]:
    """What came out, as plain data, and as ``results.json`` in ``folder`` (written by the first rank).

    told: the model and its condition in plain words, for the protocol. expected: numbers that a paper gives, each with
    sampler, budget, metric, value and source: they are set beside ours.
    """
    folder, told = Path(folder), dict(told or {})
    check(samplers, budgets, d)
    rows: list[dict[str, Any]] = []
    for sampler in samplers:
        for budget in budgets:
            calls = sampler.calls(d.path, budget)
            table = sampler.table(d.path, budget)
            facts = {**told, "sampler": sampler.name, "calls": calls, "seed": seed}

            def make(ids: torch.Tensor, sampler: Contestant = sampler, budget: int = budget):
                cond, labels = conditions(ids)
                noise = starting_noise(seed, ids, d.shape).to(ids.device)
                return decode(d, sampler.draw(d, noise, budget, cond, seed, ids)), labels

            images = generate(
                make, cell(folder, sampler.name, budget), num, {**facts, "table": hash_of(table.to_json())},
                batch=batch, ranks=ranks, progress=progress,
            )  # fmt: skip
            keep = any(name not in MOMENTS_DO for name in metrics)
            seen = see(images, judge, num, keep, batch, ranks=ranks, progress=progress)
            for number in measure(seen, reference, metrics):
                rows.append(
                    {"sampler": sampler.name, "budget": budget, "calls": calls, **number.record()}
                    | _from_paper(expected, sampler.name, budget, number.metric)
                )
            if progress and ranks.first:
                shown = "  ".join(f"{r['metric']} {r['value']:.4g}" for r in rows if r["sampler"] == sampler.name
                                  and r["budget"] == budget)  # fmt: skip
                print(f"{sampler.name}, {calls} calls: {shown}", flush=True)
    results = {"told": {**told, "seed": seed, "num": num}, "versions": environment(), "rows": rows}
    if ranks.first:
        with written_aside(folder / RESULTS) as aside:
            aside.write_text(json.dumps(results, indent=1) + "\n")
    ranks.wait()
    return results


def cell(folder: str | Path, name: str, budget: int) -> Path:
    """Where the samples of a cell lie.

    >>> cell("report", "deis:order=4@karras", 8).as_posix()
    'report/samples/deis-order-4-karras-8'
    """
    return Path(folder) / "samples" / f"{re.sub(r'[^a-zA-Z0-9_.]+', '-', name)}-{budget}"


def pictures(
    folder: str | Path, results: Mapping[str, Any], count: int
) -> dict[tuple[str, int], torch.Tensor]:
    """The first ``count`` samples of every cell, bytes (count, C, H, W): the same noise in all."""
    found = {}
    for row in results["rows"]:
        key = (row["sampler"], row["budget"])
        if key not in found:
            images = open_images(cell(folder, *key))
            found[key] = torch.stack([images.read(i) for i in range(min(count, images.count))])
    return found


def hash_of(text: str) -> str:
    """Twelve digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check(samplers: Sequence[Contestant], budgets: Sequence[int], d: Denoiser) -> None:
    """``ValueError`` where a cell cannot be, before any is made."""
    if not samplers or not budgets:
        raise ValueError("a suite needs one sampler and one budget at least")
    if d.shape is None:
        raise ValueError("the denoiser must know its shape: Denoiser(..., shape=(C, H, W))")
    names = [s.name for s in samplers]
    for what, values in (("samplers", names), ("nfe", list(budgets))):
        if len(set(values)) < len(values):
            raise ValueError(f"{what} must differ from each other, got {', '.join(map(str, values))}")
    for sampler in samplers:
        for budget in budgets:
            sampler.table(d.path, budget)


def _from_paper(
    expected: Sequence[Mapping[str, Any]], sampler: str, budget: int, metric: str
) -> dict[str, Any]:
    for one in expected:
        if (one["sampler"], one["budget"], one.get("metric", "fd")) == (sampler, budget, metric):
            return {"expected": one["value"], "source": one["source"]}
    return {"expected": None, "source": ""}
