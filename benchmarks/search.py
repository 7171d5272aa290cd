"""Searched solvers beside the best made by hand, at 4 to 10 network calls.

    python benchmarks/search.py                              a mixture and the digits teacher; minutes on one core
    python benchmarks/search.py --problems mixture --calls 5 8
    python benchmarks/search.py --metric fd                  the digits teacher by its samples' distance to the data
    python benchmarks/search.py --out benchmarks/results     keeps what there is in search-cpu.json, makes what is not

A search gets ``1500 + 250 calls`` network calls, each on a few samples. What it finds is measured on noise that it
has never seen, beside every solver made by hand that it started from; of those the best *on that noise* counts. The
error is the geometric mean over samples of the distance to the ODE's converged solution; the plain root mean square is
given too. By a metric a search gets 8000 calls on 32 samples, and 1000 samples from each of three other seeds judge.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.eval.digit_metrics import digit_metric
from fewstep.eval.files import written_aside
from fewstep.models import load, paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import sample, search, starting_noise, usf
from fewstep.samplers.schedules import handmade
from fewstep.samplers.trials import converged_table, error

CALLS = (4, 5, 6, 7, 8, 9, 10)
CALLS_BY_METRIC = (5, 3, 8)  # at the first, by random numbers too
TEST_SEED = 12345
SEEDS = (101, 102, 103)  # of samples that judge a search by a metric


def problem(name: str):
    """The denoiser, its classes, samples a call while searching, samples in the test."""
    if name == "mixture":
        return random_mixture(64, 10, 0).denoiser(paths.vp_linear()), {}, 48, 256
    return load(name), {"label": torch.arange(10)}, 20, 120


class Test:
    """A problem's noise that no search has seen, and where it leads."""

    def __init__(self, name: str):
        self.name = name
        self.d, self.cond, self.batch, self.count = problem(name)
        dtype = torch.float64 if self.d.dtype is None else torch.float32
        self.noise = starting_noise(TEST_SEED, self.count, self.d.shape, dtype)
        self.repeated = {key: rows[torch.arange(self.count) % len(rows)] for key, rows in self.cond.items()}
        self.target = self.run(converged_table(self.d.path, 200))

    def run(self, table) -> torch.Tensor:
        return sample(self.d, self.noise, table, cond=self.repeated).double()

    def gaps(self, table) -> np.ndarray:
        """(samples, elements) to the converged solution."""
        return (self.run(table) - self.target).flatten(1).numpy()


def measure(test: Test, calls: int, predictor: str) -> dict[str, Any]:
    """A row: a search and the best made by hand on the test's noise."""
    d, begun, budget = test.d, time.perf_counter(), 1500 + 250 * calls
    table = search(
        d,
        calls,
        budget=budget,
        batch=test.batch,
        reference=150,
        cond=test.cond,
        predictor=predictor,
        progress=True,
    )
    seconds = time.perf_counter() - begun
    found = test.gaps(table)
    by_hand = {key: test.gaps(schedule.table(d.path)) for key, schedule in handmade(d.path, calls)}
    best = min(by_hand, key=lambda key: error(by_hand[key]))
    row = {
        "problem": test.name, "calls": calls, "budget": budget, "spent": table.options["search"]["spent"],
        "seconds": round(seconds, 1), "error": error(found), "rmse": _rms(found), "best_by_hand": best,
        "error_by_hand": error(by_hand[best]), "rmse_by_hand": _rms(by_hand[best]),
        "least_rmse_by_hand": min(map(_rms, by_hand.values())),
        "nearer": float((_norm(found) < _norm(by_hand[best])).mean()),
        "made_by_hand": table.options["search"]["name"],
        "steps": table.options["steps"], "times": table.times.tolist(),
    }  # fmt: skip
    print(
        f"{test.name} {calls}: {row['error']:.5f} beside {row['error_by_hand']:.5f} by {best}, {seconds:.0f} s",
        flush=True,
    )
    return row


def measure_by_metric(
    calls: int, metric: str, predictor: str, file: Path | None, num: int = 1000
) -> dict[str, Any]:
    """A row: digits by a metric, of both stages and of the best made by hand; ``file`` is the search's state."""
    d, cond, judge = (
        load("digits"),
        {"label": torch.arange(10)},
        digit_metric(metric.removeprefix("shuffled ")),
    )
    score = judge
    if metric.startswith("shuffled"):
        rng = np.random.default_rng(0)

        def score(x: torch.Tensor) -> float:
            return rng.uniform()

    def values(table, seeds=SEEDS, num=num) -> list[float]:
        every = []
        for seed in seeds:
            parts = [
                sample(d, starting_noise(seed, ids, d.shape), table, cond={"label": ids % 10})
                for ids in torch.arange(num).split(100)
            ]
            every.append(judge(torch.cat(parts)))
        return every

    begun = time.perf_counter()
    table = search(d, calls, budget=8000, batch=32, reference=100, cond=cond, metric=score, predictor=predictor,
                   file=file, progress=True)  # fmt: skip
    seconds, told = time.perf_counter() - begun, table.options["search"]
    first = usf(d.path, told["first_stage"]["times"], steps=told["first_stage"]["steps"])
    hands = {key: schedule.table(d.path) for key, schedule in handmade(d.path, calls)}
    order = sorted(hands, key=lambda key: values(hands[key], SEEDS[:1], 200)[0])[:4]
    by_hand = {key: values(hands[key]) for key in order}
    best = min(by_hand, key=lambda key: sum(by_hand[key]))
    row = {
        "metric": metric, "calls": calls, "spent": told["spent"], "schedules": told["schedules"],
        "seconds": round(seconds, 1), "num": num, "best_by_hand": best, "by_hand": by_hand[best],
        "first_stage": values(first), "searched": values(table), "steps": table.options["steps"],
        "times": table.times.tolist(), "options": told,
    }  # fmt: skip
    print(f"digits by {metric} {calls}: {row['searched']}, first stage {row['first_stage']}, {best} {by_hand[best]}, "
          f"{seconds:.0f} s", flush=True)  # fmt: skip
    return row


def floor(metric: str, num: int = 1000) -> list[float]:
    """The metric of the ODE's own samples."""
    d, judge = load("digits"), digit_metric(metric)
    table = converged_table(d.path, 30)
    return [
        judge(torch.cat([sample(d, starting_noise(seed, ids, d.shape), table, cond={"label": ids % 10})
                         for ids in torch.arange(num).split(100)]))
        for seed in SEEDS
    ]  # fmt: skip


def _norm(gap: np.ndarray) -> np.ndarray:
    return np.sqrt((gap**2).mean(axis=1))


def _rms(gap: np.ndarray) -> float:
    return float(np.sqrt((gap**2).mean()))


def markdown(rows: list[dict[str, Any]], device: str) -> str:
    text = [
        "# Searched solvers", "",
        f"`python benchmarks/search.py`, {device}. Distances to the ODE's converged solution on",
        "held-out noise: the geometric mean over samples, and the root mean square over all. *By hand* is the best of",
        "all known solvers and grids on that same noise, of each measure its own best; *nearer* is the share of",
        "samples that the searched solver brings nearer. A mixture has watersheds: the root mean square is that",
        "of the few that fall on the other side.", "",
        "| problem | calls | best by hand | its error | searched | ratio | nearer | RMSE by hand | searched |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for r in rows:
        ratio = r["error_by_hand"] / r["error"]
        text.append(
            f"| {r['problem']} | {r['calls']} | {r['best_by_hand']} | {r['error_by_hand']:.5f} | {r['error']:.5f} | "
            f"{ratio:.2f} | {r['nearer']:.0%} | {r['least_rmse_by_hand']:.4f} | {r['rmse']:.4f} |"
        )
    for name in dict.fromkeys(r["problem"] for r in rows):
        ratios = [math.log(r["error_by_hand"] / r["error"]) for r in rows if r["problem"] == name]
        text += ["", f"{name}: {math.exp(sum(ratios) / len(ratios)):.2f} times nearer on average (geometric), at worst "
                     f"{math.exp(min(ratios)):.2f}."]  # fmt: skip
    return "\n".join(text) + "\n"


def markdown_by_metric(results: dict[str, Any]) -> str:
    def cell(values: list[float]) -> str:
        return f"{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"

    metric = results["metric"]
    text = [
        f"# Searched by {metric}", "",
        f"`python benchmarks/search.py --metric {metric}`, {results['device']}. The {metric} of",
        f"{results['num']} digits to all digits, features of the classifier; the mean of three seeds that no search",
        "has seen, and in brackets the least and the most. *First stage* is the winner by distance to the ODE's",
        "solution, *searched* what the metric makes of it, *by hand* the best of all known solvers and grids by that",
        "metric, on one of the same seeds. *Shuffled* are searches by random numbers. The ODE's own samples have",
        f"{cell(results['floor'])}, part of which is the bias of {results['num']} samples.", "",
        "| metric | calls | by hand | | first stage | searched |", "|---|--:|---|--:|--:|--:|",
    ]  # fmt: skip
    text += [
        f"| {r['metric']} | {r['calls']} | {r['best_by_hand']} | {cell(r['by_hand'])} | {cell(r['first_stage'])} | "
        f"{cell(r['searched'])} |"
        for r in results["rows"]
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problems", nargs="+", default=["mixture", "digits"], help="mixture, digits, digits-vp, ..."
    )
    parser.add_argument("--calls", nargs="+", type=int, help="4 to 10; with --metric 5 and 8")
    parser.add_argument("--predictor", default="ranker", help="ranker or none")
    parser.add_argument("--metric", choices=("fd", "kid"), help="search digits by this")
    parser.add_argument(
        "--out", type=Path, help="a folder for the JSON and the markdown; rows in it are kept"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = f"cpu ({platform.machine()}, one thread, torch {torch.__version__})"
    name = f"search-{arguments.metric}-cpu" if arguments.metric else "search-cpu"
    file = arguments.out / f"{name}.json" if arguments.out else None
    results: dict[str, Any] = {"device": device, "predictor": arguments.predictor, "rows": []}
    if file is not None and file.exists():
        results = json.loads(file.read_text())
        if (results["device"], results["predictor"]) != (device, arguments.predictor):
            parser.error(
                f"{file} is of {results['device']}, {results['predictor']}: remove it or name another folder"
            )
    calls = arguments.calls or (CALLS_BY_METRIC if arguments.metric else CALLS)
    keys = ("metric", "calls") if arguments.metric else ("problem", "calls")
    kinds = [arguments.metric, f"shuffled {arguments.metric}"] if arguments.metric else arguments.problems
    tests: dict[str, Test] = {}

    def keep() -> None:
        results["rows"].sort(
            key=lambda row: ("shuffled" in row[keys[0]], row[keys[0]] != "mixture", row["calls"])
        )
        if file is not None:
            with written_aside(file) as aside:
                aside.write_text(json.dumps(results, indent=1))

    if arguments.metric and "floor" not in results:
        results |= {"metric": arguments.metric, "num": 1000, "floor": floor(arguments.metric)}
        keep()
    for kind in kinds:
        for count in calls if not kind.startswith("shuffled") else calls[:1]:
            if (kind, count) in {tuple(row[key] for key in keys) for row in results["rows"]}:
                continue
            if arguments.metric:
                state = file and file.with_name(f".{kind.replace(' ', '-')}-{count}.search")
                results["rows"].append(measure_by_metric(count, kind, arguments.predictor, state))
                if state:
                    state.unlink()
            else:
                test = tests[kind] = tests.get(kind) or Test(kind)
                results["rows"].append(measure(test, count, arguments.predictor))
            keep()
    text = markdown_by_metric(results) if arguments.metric else markdown(results["rows"], device)
    print("\n" + text)
    if file is not None:
        with written_aside(file.with_suffix(".md")) as aside:
            aside.write_text(text)


if __name__ == "__main__":
    main()
