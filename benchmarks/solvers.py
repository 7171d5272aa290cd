"""Every solver at a few network calls, beside diffusers' schedulers: how far from the ODE's own solution.

    python benchmarks/solvers.py                                    all problems; minutes
    python benchmarks/solvers.py --quick                            one mixture, 5 and 10 calls; seconds
    python benchmarks/solvers.py --problems digits-edm --calls 6 12
    python benchmarks/solvers.py --out benchmarks/results           writes solvers-<device>.json, .md and .png there

A problem is a denoiser and unit noise. Its error is the distance, root mean square and of the median sample, to the
converged solution of the probability-flow ODE from that noise (300 calls, four nodes). Floor: its distance to what
another solver makes on another grid in 200 calls. Ceiling: DDIM on the best of its grids. A budget counts network
calls.

diffusers' classes get the benefit of the doubt: the network is asked at the exact noise level that the scheduler
computes with, and not at its rounded timestep; they open with the right share of noise; VP classes get a table of
betas that spans just the model's own noise levels; and of every class the best of all its spacings counts.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fewstep.eval import bench, schedulers
from fewstep.models import load, paths
from fewstep.models.denoiser import Denoiser
from fewstep.models.mixture import random_mixture
from fewstep.samplers import (
    abm,
    ddim,
    deis,
    dpm,
    dpm_single,
    dpmpp,
    fast_orders,
    grids,
    heun,
    ipndm,
    ipndm_v,
    multistep,
    pndm,
    rk,
    sample,
    unipc,
)

CALLS = (5, 8, 10, 15, 20)
MIXTURES = {"mixture-vp": paths.vp_linear, "mixture-edm": paths.edm, "mixture-flow": paths.flow}
NETWORKS = ("digits-vp", "digits-edm", "digits-flow")
METRICS = ("rms", "median")
DEFAULT = "abm 3 / vp^2"


class Problem(NamedTuple):
    name: str
    d: Denoiser
    noise: torch.Tensor
    cond: dict[str, torch.Tensor]


class Entry(NamedTuple):
    """``sample_with(problem, calls)`` -> samples and the calls they took; None where the budget is too small."""

    solver: str
    grid: str
    sample_with: Callable[[Problem, int], tuple[torch.Tensor, int] | None]

    @property
    def name(self) -> str:
        return f"{self.solver} / {self.grid}"


def problems(names: list[str], seeds: int) -> Iterator[Problem]:
    for name in names:
        if name in MIXTURES:
            for seed in range(seeds):
                mixture = random_mixture(64, 10, seed)
                noise = torch.randn(
                    128, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
                )
                yield Problem(name, mixture.denoiser(MIXTURES[name]()), noise, {})
        else:
            noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            yield Problem(name, load(name), noise, {"label": torch.arange(20) % 10})


def skipping(path: paths.Path, n: int, exponent: float) -> np.ndarray:
    """``grids.vp`` of n + 1 steps without its first: as if at the second point noise were still all there is."""
    return grids.vp(path, n + 1, exponent=exponent)[1:]


def stopping(path: paths.Path, n: int, exponent: float) -> np.ndarray:
    """``skipping`` down to ``t_min`` and no further: at exponent 1 what diffusers calls "leading"."""
    return grids.vp(path, n + 1, exponent=exponent, t_min=path.t_min, end="t_min")[1:]


# --- ours ----------------------------------------------------------------------------------------------------------


def _ours(solver: Callable, grid: Callable, options: dict, problem: Problem, calls: int):
    path = problem.d.path
    try:
        times = grids.for_calls(solver, path, calls, grid, **options)
    except ValueError:  # one step is more than the budget
        return None
    table = solver(path, times, **options)
    return sample(problem.d, problem.noise, table, cond=problem.cond), table.calls


def _fast(problem: Problem, calls: int):
    """DPM-Solver-fast: blocks of mixed order that spend the budget, on a log-SNR grid of their ends."""
    path, orders = problem.d.path, fast_orders(calls)
    even = grids.logsnr(path, calls)
    table = dpm_single(path, even[np.cumsum([0, *orders])], order=orders)
    return sample(problem.d, problem.noise, table, cond=problem.cond), table.calls


def ours(straight: bool) -> list[Entry]:
    spacings: dict[str, Callable] = {f"vp^{e:g}": partial(grids.vp, exponent=e) for e in (1.5, 2.0, 2.5)}
    usual = {"vp^2": spacings["vp^2"], "logsnr": grids.logsnr, "karras": grids.karras}
    quadratic = {**usual, "quadratic": grids.quadratic}
    skips = {f"vp^{e:g} skipping": partial(skipping, exponent=e) for e in (1.0, 1.5, 2.0)}
    stops = {f"vp^{e:g} stopping": partial(stopping, exponent=e) for e in (1.0, 1.5, 2.0)}
    spacings |= skips
    straight_to = {"uniform": grids.uniform, "shift 3": partial(grids.shifted, shift=3.0)} if straight else {}
    entries = []

    def add(name: str, solver: Callable, on: dict[str, Callable], **options: Any) -> None:
        for key, grid in on.items():
            entries.append(Entry(name, key, partial(_ours, solver, grid, options)))

    for nodes in (2, 3, 4):
        how = {"form": "x0", "variable": "vp", "nodes": nodes}
        add(f"multistep x0/vp {nodes}", multistep, spacings, **how)
        add(f"abm {nodes}", abm, {**spacings, **stops}, nodes=nodes)
    add("ddim", ddim, {**usual, "uniform": grids.uniform})
    for variable in ("t", "rho", "lam"):
        add(f"deis {variable} 3", deis, quadratic, order=3, variable=variable)
    add("deis t 4", deis, quadratic, order=4)
    add("multistep x0/t 3", multistep, usual, form="x0", variable="t", nodes=3)
    add("dpmpp 2", dpmpp, usual)
    add("dpmpp 3 exact", dpmpp, usual, order=3, weight="exact")
    add("dpm 3 exact", dpm, usual, order=3, weight="exact")
    for order in (2, 3):
        for rule in ("bh1", "bh2"):
            on = {**usual, **skips, **stops, **straight_to}
            add(f"unipc {order} {rule}", unipc, on, order=order, rule=rule)
    add("ipndm 4", ipndm, usual)
    add("ipndm_v 3", ipndm_v, usual, order=3)
    add("pndm simple", pndm, usual, variant="simple")
    add("heun", heun, usual)
    add("rk 3kutta", rk, usual)
    entries.append(Entry("dpm_single fast", "logsnr", _fast))
    if straight:
        for nodes in (2, 3):
            on = {**usual, **skips, **straight_to}
            add(f"multistep v/t {nodes}", multistep, on, form="v", variable="t", nodes=nodes)
    return entries


# --- diffusers' ----------------------------------------------------------------------------------------------------


def _theirs(name: str, options: dict, problem: Problem, calls: int):
    scheduler = schedulers.make(name, **options)
    steps = schedulers.steps_for(scheduler, calls)
    if steps is None:
        return None
    run = schedulers.run(
        schedulers.make(name, **options), problem.d, problem.noise.double(), steps, problem.cond
    )
    return run.x, run.calls


def theirs(path: paths.Path) -> list[Entry]:
    """Every ODE solver among diffusers' classes with every spacing that it offers."""
    return _flow_classes() if path.name == "flow" else _vp_classes(path)


def _vp_classes(path: paths.Path) -> list[Entry]:
    low, high = path.rho(path.t_min), path.rho(path.t_max)
    table = {"trained_betas": schedulers.betas_between(low, high)}
    indices = {key: {"timestep_spacing": key} for key in ("linspace", "leading", "trailing")}
    levels = {key: {f"use_{key}_sigmas": True} for key in ("karras", "exponential", "beta")}
    every = {**indices, **levels}
    with_lu = {**every, "lu_lambdas": {"use_lu_lambdas": True}}
    entries = []

    def add(label: str, name: str, spacings: dict[str, dict], **options: Any) -> None:
        for key, spacing in spacings.items():
            arguments = {**options, **spacing}
            entries.append(Entry(label, key, partial(_theirs, f"{name}Scheduler", arguments)))

    add("DDIM", "DDIM", indices, **table)
    add("PNDM", "PNDM", indices, set_alpha_to_one=True, **table)
    add("PNDM plms", "PNDM", indices, set_alpha_to_one=True, skip_prk_steps=True, **table)
    for order in (1, 2, 3):
        add(f"DEIS {order}", "DEISMultistep", every, solver_order=order, **table)
        for rule in ("bh1", "bh2"):  # bh1 is NaN down to sigma = 0
            final = "sigma_min" if rule == "bh1" else "zero"
            how = {"solver_order": order, "solver_type": rule, "final_sigmas_type": final, **table}
            add(f"UniPC {order} {rule}", "UniPCMultistep", every, **how)
        for kind in ("midpoint", "heun")[: 2 if order == 2 else 1]:
            how = {"solver_order": order, "solver_type": kind, **table}
            add(f"DPM++ {order}M {kind}", "DPMSolverMultistep", with_lu, **how)
            how |= {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
            add(f"DPM {order}M {kind}", "DPMSolverMultistep", with_lu, **how)
        if order > 1:
            single = {"default": {}, **levels}
            how = {"solver_order": order, "lower_order_final": True, **table}
            add(f"DPM++ {order}S", "DPMSolverSinglestep", single, **how)
    for name in ("Euler", "Heun", "LMS", "KDPM2"):
        add(name, f"{name}Discrete", every, **table)
    schedules = {key: {"sigma_schedule": key} for key in ("karras", "exponential")}
    span = {"sigma_min": low, "sigma_max": high}
    add("EDMEuler", "EDMEuler", schedules, **span)
    for order in (2, 3):
        add(f"EDMDPM++ {order}M", "EDMDPMSolverMultistep", schedules, solver_order=order, **span)
    return entries


def _flow_classes() -> list[Entry]:
    """Their flows: shifts 1 and 3, and FlowMatchEuler's and UniPC's other sigmas."""
    entries = []

    def add(label: str, name: str, spacings: dict[str, dict], **options: Any) -> None:
        for key, spacing in spacings.items():
            arguments = {**options, **spacing}
            entries.append(Entry(label, key, partial(_theirs, f"{name}Scheduler", arguments)))

    levels = {key: {f"use_{key}_sigmas": True} for key in ("karras", "exponential", "beta")}
    shifts = {f"shift {s:g}": {"shift": s} for s in (1.0, 3.0)}
    add("FlowMatchEuler", "FlowMatchEulerDiscrete", {**shifts, **levels})
    add("FlowMatchHeun", "FlowMatchHeunDiscrete", shifts)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    shifts = {f"flow, shift {s:g}": {"flow_shift": s} for s in (1.0, 3.0)}
    wide = {"trained_betas": schedulers.betas_between(1e-3, 1e3)}
    karras = {"flow, karras": {"use_karras_sigmas": True, **wide}}
    for order in (1, 2, 3):
        add(f"DEIS {order}", "DEISMultistep", shifts, solver_order=order, **flow)
        for rule in ("bh1", "bh2"):
            final = "sigma_min" if rule == "bh1" else "zero"
            how = {"solver_order": order, "solver_type": rule, "final_sigmas_type": final, **flow}
            add(f"UniPC {order} {rule}", "UniPCMultistep", {**shifts, **karras}, **how)
        for kind in ("midpoint", "heun")[: 2 if order == 2 else 1]:
            how = {"solver_order": order, "solver_type": kind, **flow}
            add(f"DPM++ {order}M {kind}", "DPMSolverMultistep", shifts, **how)
        if order > 1:
            add(
                f"DPM++ {order}S",
                "DPMSolverSinglestep",
                shifts,
                solver_order=order,
                lower_order_final=True,
                **flow,
            )
    return entries


# --- measuring -----------------------------------------------------------------------------------------------------


def rmse(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.double() - reference.double()).square().mean().sqrt())


def converged(problem: Problem) -> tuple[torch.Tensor, float]:
    """The solution, and its distance to what another solver on another grid converges to."""
    path = problem.d.path
    best = multistep(path, grids.vp(path, 300, exponent=2.0), form="x0", variable="vp", nodes=4)
    other = dpmpp(path, grids.logsnr(path, 200), order=3, weight="exact")
    x, y = (sample(problem.d, problem.noise, table, cond=problem.cond) for table in (best, other))
    return x, rmse(x, y)


def measure(name: str, calls: tuple[int, ...], seeds: int) -> dict[str, Any]:
    """All errors on one problem: over all samples the root mean square ("rms"), and the median sample's ("median")."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logs: dict[str, dict[str, dict[int, list[torch.Tensor | None]]]] = {"ours": {}, "diffusers": {}}
    floors = []
    for problem in problems([name], seeds):
        reference, floor = converged(problem)
        floors.append(floor)
        path = problem.d.path
        for side, entries in (("ours", ours(path.name in ("flow", "edm"))), ("diffusers", theirs(path))):
            for entry in entries:
                row = logs[side].setdefault(entry.name, {})
                for budget in calls:
                    row.setdefault(budget, []).append(_squares(entry, problem, budget, reference))
    result: dict[str, Any] = {"floor": max(floors)}
    for metric in METRICS:
        result[metric] = {
            side: {key: {str(n): _metric(metric, v) for n, v in row.items()} for key, row in rows.items()}
            for side, rows in logs.items()
        }
    return result


def _metric(metric: str, squares: list[torch.Tensor | None]) -> float | None:
    if any(s is None for s in squares):
        return None
    every = torch.cat(squares)  # type: ignore[arg-type]
    return float((every.mean() if metric == "rms" else every.median()).sqrt())


def measured(
    names: list[str], calls: tuple[int, ...], seeds: int, jobs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and what ``measure`` says, ``jobs`` at a time."""
    if jobs == 1 or len(names) == 1:
        yield from ((name, measure(name, calls, seeds)) for name in names)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from zip(
            names, pool.map(measure, names, [calls] * len(names), [seeds] * len(names)), strict=True
        )


def _squares(entry: Entry, problem: Problem, budget: int, reference: torch.Tensor) -> torch.Tensor | None:
    """Every sample's mean square error; None where the budget is too small or diffusers' class fails."""
    try:
        answer = entry.sample_with(problem, budget)
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError, AssertionError):
        if getattr(entry.sample_with, "func", None) is not _theirs:
            raise
        return None
    if answer is None:
        return None
    x, spent = answer
    if spent > budget:
        raise AssertionError(f"{entry.name} made {spent} calls for a budget of {budget}")
    squares = (x.double() - reference.double()).square().flatten(1).mean(1)
    return squares if bool(torch.isfinite(squares).all()) else None


def best(rows: dict[str, dict[str, float | None]], budget: int, prefix: str = "") -> tuple[str, float]:
    """The entry with the smallest error at a budget."""
    found = [
        (row[str(budget)], key) for key, row in rows.items() if key.startswith(prefix) and row[str(budget)]
    ]
    error, key = min(found)
    return key, error


def contenders(
    results: dict[str, Any], calls: tuple[int, ...], metric: str = "rms"
) -> list[tuple[float, str]]:
    """Ours by the geometric mean of their errors over problems and budgets; entries that miss any are left out."""
    every = [r[metric]["ours"] for r in results.values()]
    ranking = []
    for key in every[0]:
        values = [rows.get(key, {}).get(str(n)) for rows in every for n in calls]
        if all(values):
            ranking.append((math.exp(sum(map(math.log, values)) / len(values)), key))
    return sorted(ranking)


# --- telling -------------------------------------------------------------------------------------------------------


def summary(results: dict[str, Any], calls: tuple[int, ...]) -> list[dict[str, Any]]:
    lines = []
    for name, result in results.items():
        for n in calls:
            line: dict[str, Any] = {"problem": name, "calls": n, "floor": result["floor"]}
            for metric in METRICS:
                mine, other = result[metric]["ours"], result[metric]["diffusers"]
                (our_key, our_error), (their_key, their_error) = best(mine, n), best(other, n)
                default = mine[DEFAULT][str(n)]
                line[metric] = {
                    "default": default, "best": our_error, "best_name": our_key, "diffusers": their_error,
                    "diffusers_name": their_key, "ratio": their_error / our_error,
                    "default_ratio": their_error / default, "ceiling": best(mine, n, "ddim")[1],
                }  # fmt: skip
            lines.append(line)
    return lines


def markdown(results: dict[str, Any], calls: tuple[int, ...], device: str) -> str:
    """The tables for people."""
    text = [
        "# Solvers at a few network calls",
        "",
        f"Distance to the ODE's converged solution from the same noise ({device}; errors do not depend on it):",
        "root mean square over all samples, and that of the median sample. On the mixtures the first is ruled by the",
        "few samples that end at another component, the second by how well the others are drawn. Ratios above 1 say",
        "that ours is ahead. DDIM is on the best of its grids; the floor is what two converged solutions differ by.",
        "Made by `python benchmarks/solvers.py`, whose docstring says how; all numbers are in the JSON beside it.",
        "",
        f"Recommended default: `{DEFAULT}`, that is",
        "",
        "    abm(path, grids.vp(path, n))",
    ]
    for metric in METRICS:
        text += ["", f"## {'Root mean square' if metric == 'rms' else 'The median sample'}", ""]
        text += [
            "| problem | calls | DDIM | best of diffusers | | our default | ratio | our best | | ratio | floor |"
        ]
        text += ["|---|--:|--:|---|--:|--:|--:|---|--:|--:|--:|"]
        for line in summary(results, calls):
            r = line[metric]
            text.append(
                f"| {line['problem']} | {line['calls']} | {r['ceiling']:.4f} | {r['diffusers_name']} | "
                f"{r['diffusers']:.4f} | {r['default']:.4f} | {r['default_ratio']:.2f} | {r['best_name']} | "
                f"{r['best']:.4f} | {r['ratio']:.2f} | {line['floor']:.5f} |"
            )
    medians = {key: value for value, key in contenders(results, calls, "median")}
    text += ["", "## Ours, by the geometric mean over all problems and budgets", ""]
    text += ["| solver / grid | root mean square | median |", "|---|--:|--:|"]
    text += [f"| {key} | {value:.4f} | {medians[key]:.4f} |" for value, key in contenders(results, calls)]
    for name, result in results.items():
        text += ["", f"## {name}: each solver on the best of its grids, root mean square", ""]
        text += ["| | " + " | ".join(map(str, calls)) + " |", "|---|" + "---|" * len(calls)]
        for side, rows in result["rms"].items():
            for solver in dict.fromkeys(key.split(" / ")[0] for key in rows):
                cells = []
                for n in calls:
                    try:
                        key, error = best(rows, n, f"{solver} / ")
                        cells.append(f"{error:.4f} {key.split(' / ')[1]}")
                    except ValueError:
                        cells.append("-")
                text.append(
                    f"| {solver}{' (diffusers)' if side == 'diffusers' else ''} | " + " | ".join(cells) + " |"
                )
    return "\n".join(text) + "\n"


def picture(results: dict[str, Any], calls: tuple[int, ...], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * max(2, len(results)), 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(METRICS), len(results), sharex=True, squeeze=False)
    for row, metric in zip(axes, METRICS, strict=True):
        for axis, (name, result) in zip(row, results.items(), strict=True):
            mine, other = result[metric]["ours"], result[metric]["diffusers"]
            lines = {
                "our default": ([mine[DEFAULT][str(n)] for n in calls], "o-", "#c1121f"),
                "our best": ([best(mine, n)[1] for n in calls], "--", "#c1121f"),
                "diffusers: best of all": ([best(other, n)[1] for n in calls], "s-", "#1d3557"),
                "diffusers: DPM++ 2M, best spacing": (
                    [best(other, n, "DPM++ 2M")[1] for n in calls],
                    "-",
                    "#457b9d",
                ),
                "diffusers: UniPC, best spacing": (
                    [best(other, n, "UniPC")[1] for n in calls],
                    "-",
                    "#8ecae6",
                ),
                "DDIM, best grid": ([best(mine, n, "ddim")[1] for n in calls], ":", "#6c757d"),
            }
            for label, (values, style, colour) in lines.items():
                axis.plot(calls, values, style, color=colour, label=label, markersize=4, linewidth=1.5)
            axis.set(xscale="log", yscale="log", title=name if metric == "rms" else "")
            axis.set_xticks(calls, [str(n) for n in calls])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].set_ylabel("root mean square" if metric == "rms" else "median sample")
    figure.supxlabel("network calls (down: distance to the converged sample)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2 if len(results) < 4 else 6,
        frameon=False,
    )
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*MIXTURES, *NETWORKS]
    parser.add_argument(
        "--problems", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known)
    )
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--seeds", type=int, default=2, help="mixtures drawn for each path")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="problems at a time (2)"
    )
    parser.add_argument("--quick", action="store_true", help="mixture-edm, one seed, 5 and 10 calls")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    options = parser.parse_args(arguments)
    if min(options.calls) < 2 or options.seeds < 1 or options.jobs < 1:
        parser.error("--calls must be at least 2, --seeds and --jobs at least 1")
    if options.quick:
        options.problems, options.calls, options.seeds = ["mixture-edm"], [5, 10], 1
    calls = tuple(sorted(set(options.calls)))
    results: dict[str, Any] = {}
    for name, result in measured(options.problems, calls, options.seeds, options.jobs):
        results[name] = result
        for line in summary({name: result}, calls):
            for metric in METRICS:
                r = line[metric]
                print(
                    f"{name:<13} {line['calls']:>3} calls {metric:<6}  diffusers {r['diffusers']:.4f} "
                    f"({r['diffusers_name']})  default {r['default']:.4f} (x{r['default_ratio']:.2f})  "
                    f"best {r['best']:.4f} ({r['best_name']}, x{r['ratio']:.2f})  ddim {r['ceiling']:.4f}",
                    flush=True,
                )
    ranking = contenders(results, calls)
    print("ours, geometric mean over all:")
    for value, key in ranking[:12]:
        print(f"  {value:.4f}  {key}")
    device = bench.environment()["device"]
    short = "cpu" if not torch.cuda.is_available() else device.lower().replace(" ", "-")
    os.makedirs(options.out, exist_ok=True)
    stem = options.out / f"solvers-{short}"
    whole = {"calls": calls, "default": DEFAULT, "problems": results, "summary": summary(results, calls)}
    whole["contenders"] = [{"name": key, "mean": value} for value, key in ranking]
    bench.save(stem.with_suffix(".json"), whole)
    stem.with_suffix(".md").write_text(markdown(results, calls, device), encoding="utf-8")
    picture(results, calls, stem.with_suffix(".png"))
    print(f"written: {stem}.json, .md, .png")


if __name__ == "__main__":
    sys.exit(main())
