"""Tree sampling beside importance sampling, SMC steering, SVDD and gradient guidance, at equal network calls.

    python benchmarks/trees.py                               everything that is not in the results yet, then the tables
    python benchmarks/trees.py --seconds 200                 stop after so long; the next run goes on from there
    python benchmarks/trees.py --table                       print the tables from the results as they are

The target is p exp(scale r), p being the law of the sampler itself. A method's samples (weighted, where it has weights)
are compared by W1 with a reference by importance sampling over many more rollouts, in units of the target's standard
deviation; with the best reward that was seen. A differentiated call counts as three. What search finds:
``tree_search.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fewstep.eval.cells import command
from fewstep.models import GaussianMixture, load, paths
from fewstep.models.rewards import class_probability, ink
from fewstep.samplers import ddim, grids, sample, starting_noise
from fewstep.samplers.best_of_n import best_of_n, importance
from fewstep.samplers.dps import dps
from fewstep.samplers.smc_steering import smc_steering
from fewstep.samplers.svdd import svdd
from fewstep.samplers.tree_sample import tree_sample
from fewstep.samplers.tree_search import tree_search

RESULTS = Path(__file__).parent / "results" / "trees-cpu.json"
SEEDS = {1000: 32, 4000: 16, 600: 8}  # by budget; those of 600 calls are the digits
SEARCHES = {
    1000: 4,
    4000: 2,
    600: 4,
}  # of tree search, which samples no law: its best rewards are what counts here


class Case(NamedTuple):
    d: Any
    table: Any
    reward: Any
    scale: float
    cond: dict
    feature: Any  # samples (n, ...) -> (n,), of which the law is compared
    budgets: tuple[int, ...]
    many: int  # rollouts of the reference
    dtype: torch.dtype


def mixture(dim: int, reward, scale: float) -> Case:
    means = torch.zeros(2, dim, dtype=torch.float64)
    means[0, 0], means[1, 0] = -2.0, 1.5
    path = paths.edm()
    d = GaussianMixture([0.3, 0.7], means, [0.16, 0.49]).denoiser(path)
    table = ddim(path, grids.karras(path, 10, t_max=20.0, t_min=0.02), eta=1.0)
    return Case(d, table, reward, scale, {}, lambda x: x[:, 0], (1000, 4000), 400_000, torch.float64)


def digit(reward, scale: float) -> Case:
    d = load("digits-edm")
    table = ddim(d.path, grids.vp(d.path, 12), eta=1.0)
    cond = {"label": torch.tensor([d.net.null_label])}
    return Case(d, table, reward, scale, cond, lambda x: reward(x), (600,), 0, torch.float32)


def undecided(x: torch.Tensor) -> torch.Tensor:
    """High for images that the judge takes for a 3 and an 8 alike: blurred estimates do that better than digits."""
    three, eight = class_probability(3)(x), class_probability(8)(x)
    return torch.minimum(three, eight)


DIGITS = {"much ink": ink(), "log p(7)": class_probability(7, log=True), "undecided": undecided}
MIXTURES = {
    "mixture, easy": lambda: mixture(1, lambda x: -(x[:, 0] + 2).abs(), 1.5),
    "mixture, rare": lambda: mixture(1, lambda x: -((x[:, 0] + 3.3) ** 2), 10.0),
    "mixture, misleading": lambda: mixture(
        1, lambda x: -torch.minimum((x[:, 0] + 3.0).abs(), x[:, 0].abs()), 4.0
    ),
    "mixture in 16 D, rare": lambda: mixture(16, lambda x: x[:, :8].sum(1), 1.6),
}
TILTED = {
    "digits: a seven": ("log p(7)", 1.0),
    "digits: much ink": ("much ink", 60.0),
    "digits: 3 or 8, misleading": ("undecided", 20.0),
}
CASES = {**MIXTURES, **{k: (lambda r=r, s=s: digit(DIGITS[r], s)) for k, (r, s) in TILTED.items()}}
PARTS, PART = 2, 2048  # rollouts of the digits teacher, for references


def tree(case: Case, budget: int, seed: int, **options):
    options = dict(scale=case.scale, seed=seed, cond=case.cond, dtype=case.dtype, **options)
    made = tree_sample(case.d, case.table, case.reward, budget, **options)
    x = made.leaf_states(range(len(made.leaves)))
    weights = made.log_weights()
    if options.get("explore"):
        weights = made.visit_weights()
    return x, weights.softmax(0), float(weights.logsumexp(0))


def searched(case: Case, budget: int, seed: int, **options):
    made = tree_search(
        case.d, case.table, case.reward, budget, seed=seed, cond=case.cond, dtype=case.dtype, **options
    )
    x = made.leaf_states(range(len(made.leaves)))
    return x, torch.full((len(x),), 1 / len(x)), None


def particles(method, case: Case, seed: int, **options):
    noise = starting_noise(seed, torch.tensor([0]), case.d.shape, case.dtype)
    _, drawn = method(case.d, noise, case.table, reward=case.reward, cond=case.cond, seed=seed, **options)
    return drawn.x[0], drawn.log_weights[0].double().softmax(0), float(drawn.log_z[0])


def gradient(case: Case, budget: int, seed: int):
    n = budget // (3 * case.table.calls)
    noise = starting_noise(seed, n, case.d.shape, case.dtype)
    cond = {key: value.expand(n) for key, value in case.cond.items()}
    x, _ = dps(case.d, noise, case.table, reward=case.reward, scale=case.scale, cond=cond, seed=seed)
    return x, torch.full((n,), 1 / n), None


def nested(case: Case, budget: int, seed: int):
    each = 1 + 4 * (case.table.calls - 2)
    n = budget // each
    noise = starting_noise(seed, n, case.d.shape, case.dtype)
    cond = {key: value.expand(n) for key, value in case.cond.items()}
    x, _ = svdd(case.d, noise, case.table, reward=case.reward, scale=case.scale, cond=cond, seed=seed)
    return x, torch.full((n,), 1 / n), None


METHODS = {
    "tree sampling": lambda c, b, s: tree(c, b, s),
    "the paper's walks": lambda c, b, s: tree(c, b, s, grow="walks"),
    "walks, 4 levels, blended, by visits": lambda c, b, s: tree(c, b, s, grow="walks", levels=4, explore=0.1),
    "importance sampling": lambda c, b, s: particles(importance, c, s, n=b // c.table.calls, scale=c.scale),
    "SMC steering": lambda c, b, s: particles(
        smc_steering, c, s, particles=b // c.table.calls, scale=c.scale
    ),
    "SVDD": nested,
    "DPS": gradient,
    "best of n": lambda c, b, s: _best(c, b, s),
    "tree search": lambda c, b, s: searched(c, b, s),
}


def _best(case: Case, budget: int, seed: int):
    noise = starting_noise(seed, torch.tensor([0]), case.d.shape, case.dtype)
    x, _ = best_of_n(case.d, noise, case.table, reward=case.reward, n=budget // case.table.calls, cond=case.cond,
                     seed=seed)  # fmt: skip
    return x, torch.ones(1), None


def rolled(case: Case, count: int, seed: int) -> torch.Tensor:
    out = []
    for begin in range(0, count, 2000):
        ids = torch.arange(begin, min(begin + 2000, count))
        cond = {key: value.expand(len(ids)) for key, value in case.cond.items()}
        noise = starting_noise(seed, ids, case.d.shape, case.dtype)
        out.append(sample(case.d, noise, case.table, cond=cond, seed=seed, ids=ids))
    return torch.cat(out)


def reference(name: str, known: dict) -> dict[str, Any]:
    case = CASES[name]()
    if name in TILTED:
        feature = torch.tensor(pooled(known, TILTED[name][0]), dtype=torch.float64)
        log = case.scale * feature
    else:
        x = rolled(case, case.many, 10_000)
        log, feature = case.scale * case.reward(x).double(), case.feature(x).double()
    share = log.softmax(0)
    order = torch.searchsorted(share.cumsum(0), (torch.arange(1000) + 0.5) / 1000).clamp_max(len(log) - 1)
    picked = feature[order].sort().values
    return {
        "log_z": float(log.logsumexp(0)) - math.log(len(log)), "ess": float(1 / share.square().sum()),
        "fraction": float(1 / share.square().sum()) / len(log), "sd": float(picked.std()),
        "feature": [round(v, 5) for v in picked.tolist()],
    }  # fmt: skip


def part(index: int) -> dict[str, list[float]]:
    case = digit(ink(), 1.0)
    ids = torch.arange(index * PART, (index + 1) * PART)
    noise = starting_noise(20_000, ids, case.d.shape)
    x = sample(
        case.d,
        noise,
        case.table,
        cond={k: v.expand(PART) for k, v in case.cond.items()},
        seed=20_000,
        ids=ids,
    )
    return {name: [round(v, 5) for v in reward(x).tolist()] for name, reward in DIGITS.items()}


def pooled(known: dict, reward: str) -> list[float]:
    return [v for i in range(PARTS) for v in known[f"rollouts|{i}"][reward]]


def error(values) -> float:
    """The standard error of a mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.inf


def w1(x: np.ndarray, weights: np.ndarray, picked: np.ndarray) -> float:
    every = np.concatenate([x, picked])
    order = np.argsort(every)
    steps = np.concatenate([weights, np.full(len(picked), -1 / len(picked))])[order]
    return float((np.abs(steps.cumsum())[:-1] * np.diff(every[order])).sum())


# --- running ----------------------------------------------------------------------------------------------------------


def jobs():
    """Names and functions of what is already known, what matters most first."""
    for i in range(PARTS):
        yield f"rollouts|{i}", lambda known, i=i: part(i)
    for name in CASES:
        yield f"reference|{name}", lambda known, name=name: reference(name, known)
    for seed in range(max(SEEDS.values())):
        for budget, name in [(b, n) for n in MIXTURES for b in (1000, 4000)] + [(600, n) for n in TILTED]:
            for method in METHODS:
                if seed >= (SEARCHES if method == "tree search" else SEEDS)[budget]:
                    continue
                key = f"sample|{name}|{budget}|{method}|{seed}"
                yield key, lambda known, a=(name, budget, method, seed): cell(known, *a)


def cell(known: dict, name: str, budget: int, method: str, seed: int) -> dict[str, Any]:
    case, truth = CASES[name](), known[f"reference|{name}"]
    x, weights, log_z = METHODS[method](case, budget, seed)
    distance = w1(case.feature(x).double().numpy(), weights.double().numpy(), np.array(truth["feature"]))
    return {"w1": distance / truth["sd"], "best": float(case.reward(x).max()), "log_z": log_z}


def tables(known: dict) -> str:
    lines = ["# Trees at equal network calls", "", "`python benchmarks/trees.py`, on a CPU.", ""]
    lines += [" ".join(__doc__.split("\n\n")[2].split()), ""]
    for name in CASES:
        truth = known.get(f"reference|{name}")
        if truth is None:
            continue
        rows = {}
        for key, value in known.items():
            if key.startswith(f"sample|{name}|"):
                _, _, budget, method, _ = key.split("|")
                rows.setdefault(int(budget), {}).setdefault(method, []).append(value)
        budgets = sorted(rows)
        lines += [
            f"## {name}", "",
            f"Equally weighted rollouts are worth {truth['fraction']:.2g} of their number; log Z = "
            f"{truth['log_z']:.2f}. The reference is worth {truth['ess']:.0f} draws.", "",
            "| method | " + " | ".join(f"runs | W1, {b} calls | log Z | best reward" for b in budgets) + " |",
            "|---|" + "--:|--:|--:|--:|" * len(budgets),
        ]  # fmt: skip
        for method in METHODS:
            cells = []
            for budget in budgets:
                found = rows[budget].get(method, [])
                if not found:
                    cells += [""] * 4
                    continue
                gaps = np.array([f["w1"] for f in found])
                logs = [f["log_z"] for f in found if f["log_z"] is not None]
                best = np.mean([f["best"] for f in found])
                spread = f"{np.mean(logs):.2f} +- {np.std(logs):.2f}" if logs else ""
                cells += [
                    str(len(found)),
                    f"{gaps.mean():.3f}" + (f" +- {error(gaps):.3f}" if len(gaps) > 1 else ""),
                    spread,
                    f"{best:.4g}",
                ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines += ["", *(nearest(known, name, budget) for budget in budgets), ""]
    return "\n".join(lines + ahead(known))


RIVALS = ("the paper's walks", "importance sampling", "SMC steering", "SVDD", "DPS")


def ahead(known: dict) -> list[str]:
    """W1 of the rivals less tree sampling's, seed by seed."""
    lines = [
        "## How far tree sampling is ahead", "",
        "W1 of the other less that of tree sampling, paired by seeds, with the standard error of the mean: positive",
        "where tree sampling is nearer to the target.", "",
        "| case | calls | " + " | ".join(RIVALS) + " |", "|---|--:|" + "--:|" * len(RIVALS),
    ]  # fmt: skip
    for name in CASES:
        for budget in sorted(SEEDS):
            found = [lead(known, name, budget, rival, "tree sampling") for rival in RIVALS]
            if any(map(len, found)):
                cells = [f"{np.mean(gaps):+.3f} +- {error(gaps):.3f}" if len(gaps) else "" for gaps in found]
                lines.append(f"| {name} | {budget} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def lead(known: dict, name: str, budget: int, other: str, one: str) -> np.ndarray:
    """W1 of the other method less that of the one, seed by seed."""

    def of(method: str) -> dict[str, float]:
        begin = f"sample|{name}|{budget}|{method}|"
        return {k.removeprefix(begin): v["w1"] for k, v in known.items() if k.startswith(begin)}

    ours, theirs = of(one), of(other)
    return np.array([theirs[seed] - ours[seed] for seed in ours if seed in theirs])


def nearest(known: dict, name: str, budget: int) -> str:
    """Whoever is nearest to the target, and who is not further than that by two standard errors of the difference."""
    ways = {
        m: [v["w1"] for k, v in known.items() if k.startswith(f"sample|{name}|{budget}|{m}|")]
        for m in METHODS
        if m not in ("tree search", "best of n")  # they sample no law
    }
    first = min((m for m in ways if ways[m]), key=lambda m: np.mean(ways[m]))
    rest = {m: lead(known, name, budget, m, first) for m in ways if m != first and ways[m]}
    close = [m for m, gaps in rest.items() if len(gaps) > 1 and gaps.mean() < 2 * error(gaps)]
    beside = (
        f"; not told apart from it: {', '.join(close)}" if close else ", by more than two standard errors"
    )
    return f"Nearest at {budget} calls: {first}{beside}."


if __name__ == "__main__":
    command(__doc__, RESULTS, jobs(), tables)
