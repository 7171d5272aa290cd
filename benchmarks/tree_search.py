"""What tree search finds, beside best-of-n; and what it saves to grow the trees of many prompts side by side.

    python benchmarks/tree_search.py                         everything that is not in the results yet, then the tables
    python benchmarks/tree_search.py --seconds 200           stop after so long; the next run goes on from there
    python benchmarks/tree_search.py --table                 print the tables from the results as they are

Search on the digits teacher: the mean best reward at a budget; behind it how many rollouts best-of-n needs for that
mean, over how many the budget pays for (``>`` beyond 1024 rollouts). The means of best-of-n are exact averages over
subsets of 4096 rollouts. Groups: the time of ten prompts' trees grown one after another over that of growing them side
by side, medians of interleaved rounds.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import torch

from fewstep.eval.cells import command
from fewstep.models import load
from fewstep.models.rewards import class_probability, compressibility, ink
from fewstep.samplers import ddim, grids, sample, starting_noise
from fewstep.samplers.best_of_n import best_of_n
from fewstep.samplers.smc_steering import smc_steering
from fewstep.samplers.tree_sample import tree_sample
from fewstep.samplers.tree_search import tree_search

RESULTS = Path(__file__).parent / "results" / "tree-search-cpu.json"
BUDGETS, SEEDS, ROUNDS = (192, 384), 16, 3  # calls; of searches; repetitions of a timing
PARTS, PART = 2, 2048  # rollouts for the best of n
REWARDS = {
    "much ink": ink(),
    "little ink": lambda x: -ink()(x),
    "compressible": compressibility(),
    "log p(3)": class_probability(3, log=True),
}
GROWTH = {"improvement": "ours", "bounds": "the paper's UCT"}
GROUPS = {
    "tree sampling": (tree_sample, {"budget": 384, "scale": 60.0}),
    "the paper's walks": (tree_sample, {"budget": 192, "scale": 60.0, "grow": "walks"}),
    "tree search": (tree_search, {"budget": 192, "batch": 8}),
    "SMC steering": (smc_steering, {"particles": 4, "scale": 60.0}),
    "best of n": (best_of_n, {"n": 4}),
}


def teacher():
    """The denoiser, twelve stochastic steps, and the condition that says nothing."""
    d = load("digits-edm")
    return d, ddim(d.path, grids.vp(d.path, 12), eta=1.0), torch.tensor([d.net.null_label])


def part(index: int) -> dict[str, list[float]]:
    """The rewards of so many rollouts."""
    d, table, label = teacher()
    ids = torch.arange(index * PART, (index + 1) * PART)
    noise = starting_noise(20_000, ids, d.shape)
    x = sample(d, noise, table, cond={"label": label.expand(PART)}, seed=20_000, ids=ids)
    return {name: [round(v, 5) for v in reward(x).tolist()] for name, reward in REWARDS.items()}


def search(name: str, budget: int, seed: int, grow: str) -> float:
    """The best reward found."""
    d, table, label = teacher()
    tree = tree_search(d, table, REWARDS[name], budget, grow=grow, seed=seed, cond={"label": label}, batch=8)
    return float(tree.best()[1])


def side_by_side(name: str) -> float:
    """The time of one group after another over that of all together."""
    method, options = GROUPS[name]
    d, table, _ = teacher()
    noise, label, reward = starting_noise(0, 10, d.shape), torch.arange(10), ink()

    def run(groups) -> float:
        begun = time.perf_counter()
        for rows in groups:
            method(d, noise[rows], table, reward=reward, ids=rows, cond={"label": label[rows]}, **options)
        return time.perf_counter() - begun

    run([label[:2]])
    times = [(run(label.split(1)), run([label])) for _ in range(ROUNDS)]
    return float(np.median([alone for alone, _ in times]) / np.median([together for _, together in times]))


def jobs():
    """Names and functions of the results, what matters most first."""
    for i in range(PARTS):
        yield f"rollouts|{i}", lambda known, i=i: part(i)
    for name in GROUPS:
        yield f"groups|{name}", lambda known, name=name: side_by_side(name)
    for seed, name, budget, grow in itertools.product(range(SEEDS), REWARDS, BUDGETS, GROWTH):
        yield f"search|{name}|{budget}|{grow}|{seed}", lambda known, a=(name, budget, seed, grow): search(*a)


def means_of_best(rewards: np.ndarray, most: int = 1024) -> list[float]:
    """E[max of n] over all subsets (with replacement) of rewards, n = 1 .. most.

    >>> [round(v, 4) for v in means_of_best(np.array([0.0, 1.0]), 3)]
    [0.5, 0.75, 0.875]
    """
    rewards = np.sort(rewards)
    upto = np.arange(1, len(rewards) + 1) / len(rewards)
    return [float((rewards * (upto**n - (upto - 1 / len(rewards)) ** n)).sum()) for n in range(1, most + 1)]


def tables(known: dict) -> str:
    lines = [
        "# Tree search", "", "`python benchmarks/tree_search.py`, on a CPU.", "",
        " ".join(__doc__.split("\n\n")[2].split()), "",
        "| reward | growth | runs | " + " | ".join(f"{b} calls | of best-of-n's | worst run" for b in BUDGETS) + " |",
        "|---|---|--:|" + "--:|--:|--:|" * len(BUDGETS),
    ]  # fmt: skip
    for name in REWARDS:
        every = [v for i in range(PARTS) for v in known.get(f"rollouts|{i}", {}).get(name, [])]
        if not every:
            continue
        best = means_of_best(np.array(every))
        for grow, label in GROWTH.items():
            cells, runs = [], 0
            for budget in BUDGETS:
                found = np.array(
                    [v for k, v in known.items() if k.startswith(f"search|{name}|{budget}|{grow}|")]
                )
                runs = max(runs, len(found))
                if len(found) < 2:
                    cells += ["", "", ""]
                    continue
                spread = found.std(ddof=1) / len(found) ** 0.5
                needed = next((n for n, value in enumerate(best, 1) if value >= found.mean()), None)
                ratio = f"{needed / (budget / 12):.1f}" if needed else f"> {1024 / (budget / 12):.0f}"
                cells += [f"{found.mean():.4f} +- {spread:.4f}", f"{ratio} x", f"{found.min():.4f}"]
            lines.append(f"| {name} | {label} | {runs} | " + " | ".join(cells) + " |")
        plain = (f"{best[budget // 12 - 1]:.4f} | 1 x | " for budget in BUDGETS)
        lines.append(f"| {name} | best of n | | " + " | ".join(plain) + " |")
    lines += ["", "| ten groups | one after another, over side by side |", "|---|--:|"]
    lines += [f"| {name} | {known[f'groups|{name}']:.2f} |" for name in GROUPS if f"groups|{name}" in known]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    command(__doc__, RESULTS, jobs(), tables)
