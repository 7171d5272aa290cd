"""Searched solvers beside the best made by hand, at 4 to 10 network calls.

    python benchmarks/search.py                              a mixture and the digits teacher; minutes on one core
    python benchmarks/search.py --problems mixture --calls 5 8
    python benchmarks/search.py --out benchmarks/results     writes search-<device>.json and .md there

A search gets ``1500 + 250 calls`` network calls, each on a few samples. What it finds is measured on noise that it
has never seen, beside every solver made by hand that it started from; of those the best *on that noise* counts. The
error is the geometric mean over samples of the distance to the ODE's converged solution; the plain root mean square is
given too.
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

from fewstep.eval.files import written_aside
from fewstep.models import load, paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import grids, multistep, sample, starting_noise
from fewstep.samplers.schedules import handmade
from fewstep.samplers.search import error, search

CALLS = (4, 5, 6, 7, 8, 9, 10)
TEST_SEED = 12345


def problem(name: str):
    """The denoiser, its classes, samples a call while searching, samples in the test."""
    if name == "mixture":
        return random_mixture(64, 10, 0).denoiser(paths.vp_linear()), {}, 48, 256
    return load(name), {"label": torch.arange(10)}, 20, 120


def measure(name: str, all_calls: list[int], predictor: str) -> list[dict[str, Any]]:
    d, cond, batch, count = problem(name)
    dtype = torch.float64 if d.dtype is None else torch.float32
    noise = starting_noise(TEST_SEED, count, d.shape, dtype)
    repeated = {key: rows[torch.arange(count) % len(rows)] for key, rows in cond.items()}
    many = multistep(d.path, grids.vp(d.path, 200, exponent=2.0), form="x0", variable="vp", nodes=4)
    target = sample(d, noise, many, cond=repeated).double()

    def gaps(table) -> np.ndarray:
        return (sample(d, noise, table, cond=repeated).double() - target).flatten(1).numpy()

    rows = []
    for calls in all_calls:
        begun = time.perf_counter()
        budget = 1500 + 250 * calls
        table = search(
            d, calls, budget=budget, batch=batch, reference=150, cond=cond, predictor=predictor, progress=True
        )
        seconds = time.perf_counter() - begun
        found = gaps(table)
        by_hand = {key: gaps(schedule.table(d.path)) for key, schedule in handmade(d.path, calls)}
        best = min(by_hand, key=lambda key: error(by_hand[key]))
        rows.append({
            "problem": name, "calls": calls, "budget": budget, "spent": table.options["search"]["spent"],
            "seconds": round(seconds, 1), "error": error(found), "rmse": _rms(found), "best_by_hand": best,
            "error_by_hand": error(by_hand[best]), "rmse_by_hand": _rms(by_hand[best]),
            "least_rmse_by_hand": min(map(_rms, by_hand.values())),
            "nearer": float((_norm(found) < _norm(by_hand[best])).mean()),
            "made_by_hand": table.options["search"]["name"],
            "steps": table.options["steps"], "times": table.times.tolist(),
        })  # fmt: skip
        row = rows[-1]
        print(
            f"{name} {calls}: {row['error']:.5f} beside {row['error_by_hand']:.5f} by {best}, {seconds:.0f} s",
            flush=True,
        )
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problems", nargs="+", default=["mixture", "digits"], help="mixture, digits, digits-vp, ..."
    )
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--predictor", default="ranker", help="ranker or none")
    parser.add_argument("--out", type=Path, help="a folder for the JSON and the markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in arguments.problems for row in measure(name, arguments.calls, arguments.predictor)]
    device = f"cpu ({platform.machine()}, one thread, torch {torch.__version__})"
    print("\n" + markdown(rows, device))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with written_aside(arguments.out / "search-cpu.json") as file:
            file.write_text(
                json.dumps({"device": device, "predictor": arguments.predictor, "rows": rows}, indent=1)
            )
        with written_aside(arguments.out / "search-cpu.md") as file:
            file.write_text(markdown(rows, device))


if __name__ == "__main__":
    main()
