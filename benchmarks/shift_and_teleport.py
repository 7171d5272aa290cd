"""Time shift (2305.15583) and teleportation (2412.09726) on the digits networks and on a mixture with an exact score.

    python benchmarks/shift_and_teleport.py                         everything, four minutes on one thread
    python benchmarks/shift_and_teleport.py --quick                 the mixture alone; seconds
    python benchmarks/shift_and_teleport.py --out benchmarks/results      keeps what lies there of other problems

Every solver starts from the same noise. "fd" is the Frechet distance of classifier features to the digits; for the
mixture it is 1000 times the sliced W2 to fresh samples. "rms" is the distance, root mean square a number, to the
converged solution of the probability-flow ODE from that noise. The floor is that solution itself; all of "fd" is
biased upwards by the number of samples, alike for all. "mixture-wide" is time shift on 3072 numbers a sample, as many
as CIFAR-10 has, where the variance of one sample says much more than on the digits' 64; its "fd" is 1000 times how far
the mean log-density of samples, a number, is from that of the data.

Time shift: plain, then with labels matched to the noise (the paper's) and to the marginal, with the paper's window and
cutoff, on the grid that is uniform in the linear VP path's time. Teleportation: the first steps of one grid skipped,
histories seeded or begun anew, by a Gaussian a class (and by one for all), with what that costs in fd from the same
noise and the standard error of the cost; beside it the plain solver on a new grid of
as many calls as are left.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewstep.eval import bench, frechet_distance, sliced_wasserstein
from fewstep.models import (
    Denoiser,
    GaussianMixture,
    GaussianStats,
    digits,
    gaussian,
    load,
    load_classifier,
    paths,
)
from fewstep.samplers import (
    abm,
    ddim,
    ddpm,
    deis,
    grids,
    heun,
    multistep,
    pndm,
    sample,
    skip,
    starting_noise,
    time_shift,
    unipc,
)
from fewstep.samplers.noise import USER, uniform
from fewstep.samplers.time_shift import data_variance

PAPER = {5: (40, 200), 10: (40, 200), 20: (30, 300)}  # steps: window, cutoff
SHIFTED: dict[str, Callable] = {"DDPM": ddpm, "DDIM": ddim, "F-PNDM": pndm, "DEIS": partial(deis, order=3)}
SKIPPED: dict[str, Callable] = {
    "Heun": heun,
    "DEIS": partial(deis, order=3),
    "UniPC": partial(unipc, order=3),
    "abm": abm,  # the default
}
STEPS = 10
NETWORKS = ("digits-vp", "digits-edm", "digits-flow")


@dataclass(frozen=True, eq=False)
class Problem:
    """A denoiser, the noise that all start from, where it leads, and a judge of samples."""

    name: str
    d: Denoiser
    noise: torch.Tensor
    cond: dict[str, Any]
    truth: torch.Tensor
    judge: Callable[[torch.Tensor], float]
    stats: dict[str, GaussianStats]
    variance: float

    def row(self, x: torch.Tensor) -> dict[str, float]:
        """fd and rms of samples."""
        return {"fd": self.judge(x), "rms": float((x - self.truth).square().mean().sqrt())}


def converged(d: Denoiser, noise: torch.Tensor, cond: dict[str, Any]) -> torch.Tensor:
    return sample(
        d, noise, multistep(d.path, grids.vp(d.path, 60), form="x0", variable="vp", nodes=4), cond=cond
    )


def of_digits(name: str, num: int) -> Problem:
    """A digits network, class-conditional, the classes drawn."""
    d, classifier = load(name), load_classifier()
    images, labels = digits("train")
    real = classifier.features(torch.as_tensor(digits("all")[0]))
    noise = starting_noise(0, num, d.shape)
    cond = {"label": (uniform(0, torch.arange(num), 1, stream=USER)[:, 0] * 10).long()}
    stats = {"a class": gaussian(images, labels), "for all": gaussian(images)}

    def judge(x: torch.Tensor) -> float:
        return frechet_distance(classifier.features(x.clamp(-1, 1)), real)

    return Problem(name, d, noise, cond, converged(d, noise, cond), judge, stats, data_variance(images))


def of_mixture(num: int) -> Problem:
    """Six Gaussians in 16 dimensions on the linear VP path, the network being the exact score."""
    g = torch.Generator().manual_seed(1)
    means, variances = torch.randn(6, 16, generator=g), 0.05 + 0.35 * torch.rand(6, 16, generator=g)
    mixture = GaussianMixture(torch.ones(6), means, variances)
    d = mixture.denoiser(paths.vp_linear(), predicts="eps")
    data = mixture.sample(4000, seed=2)
    noise = starting_noise(0, num, (16,))

    def judge(x: torch.Tensor) -> float:
        return 1000 * sliced_wasserstein(x, data.float(), projections=64)

    return Problem(
        "mixture-vp",
        d,
        noise,
        {},
        converged(d, noise, {}),
        judge,
        {"for all": gaussian(data)},
        data_variance(data),
    )


def of_wide(num: int) -> Problem:
    """Eight Gaussians in 3072 dimensions with the pixel variance of photographs, exact."""
    g = torch.Generator().manual_seed(0)
    means, variances = 0.4 * torch.randn(8, 3072, generator=g), 0.02 + 0.16 * torch.rand(8, 3072, generator=g)
    mixture = GaussianMixture(torch.ones(8), means, variances)
    d, data = mixture.denoiser(paths.vp_linear(), predicts="eps"), mixture.sample(2000, seed=2)
    noise = starting_noise(0, num, (3072,))

    def density(x: torch.Tensor) -> float:
        return float(mixture.log_prob(x.double()).mean()) / 3072

    real = density(data)
    return Problem("mixture-wide", d, noise, {}, converged(d, noise, {}), lambda x: 1000 * abs(density(x) - real), {},
                   data_variance(data))  # fmt: skip


def shift_rows(problem: Problem) -> list[dict[str, Any]]:
    """Plain and time-shifted, by solver and number of steps."""
    rows = []
    d, noise, cond = problem.d, problem.noise, problem.cond
    for name, solver in SHIFTED.items():
        for steps, (window, cutoff) in PAPER.items():
            times = grids.vp(d.path, steps, exponent=1.0)
            shifted = partial(time_shift, d, noise, solver, times, window=window, cutoff=cutoff, cond=cond)
            row = {
                "problem": problem.name,
                "solver": name,
                "steps": steps,
                "calls": solver(d.path, times).calls,
            }
            row["plain"] = problem.row(sample(d, noise, solver(d.path, times), cond=cond))
            row["noise"] = problem.row(shifted())
            row["marginal"] = problem.row(shifted(match="marginal", data_variance=problem.variance))
            rows.append(row)
    return rows


def loss(problem: Problem, x: torch.Tensor, plain: torch.Tensor, blocks: int = 10) -> dict[str, float]:
    """fd of x less that of ``plain``, which start from the same noise, and its standard error by the jackknife."""
    ids = torch.arange(len(x)) % blocks
    without = [problem.judge(x[ids != k]) - problem.judge(plain[ids != k]) for k in range(blocks)]
    spread = (blocks - 1) * torch.tensor(without, dtype=torch.float64).var(unbiased=False)
    return {"loss": problem.judge(x) - problem.judge(plain), "loss_se": float(spread.sqrt())}


def skip_rows(problem: Problem) -> list[dict[str, Any]]:
    """By solver and number of steps skipped."""
    rows = []
    d, noise, cond = problem.d, problem.noise, problem.cond
    times = grids.vp(d.path, STEPS)
    for name, solver in SKIPPED.items():
        whole = solver(d.path, times).calls
        plain = sample(d, noise, solver(d.path, times), cond=cond)
        for steps in range(6):
            left = solver(d.path, times[steps:]).calls
            row: dict[str, Any] = {"problem": problem.name, "solver": name, "skipped": steps, "calls": left}
            row["share"] = 1 - left / whole
            row["rho"] = float(d.path.rho(times[steps])) if steps else None
            for kind, stats in problem.stats.items():
                seeded = partial(skip, stats, d, noise, solver, times, steps=steps, cond=cond)
                x = seeded()
                row[f"seeded, {kind}"] = problem.row(x)
                if kind == next(iter(problem.stats)):
                    row[f"seeded, {kind}"] |= loss(problem, x, plain)
                if steps and kind == next(iter(problem.stats)) and name != "Heun":  # which has no history
                    row["cold"] = problem.row(seeded(seed_history=False))
                if not steps:
                    break
            if steps:
                fewer = grids.for_calls(solver, d.path, left, grid=grids.vp)
                row["fewer"] = problem.row(sample(d, noise, solver(d.path, fewer), cond=cond))
            rows.append(row)
    return rows


def lossless(rows: list[dict[str, Any]], tolerance: float = 0.01) -> list[dict[str, Any]]:
    """Of every problem and solver: the most calls skipped with fd within ``tolerance`` of none skipped."""
    found = []
    for problem, solver in dict.fromkeys((row["problem"], row["solver"]) for row in rows):
        some = [row for row in rows if (row["problem"], row["solver"]) == (problem, solver)]
        key = next(key for key in some[0] if key.startswith("seeded"))
        plain = some[0][key]
        best = some[0]
        for row in some[1:]:
            if row[key]["fd"] > (1 + tolerance) * plain["fd"]:
                break
            best = row
        found.append({"problem": problem, "solver": solver, "share": best["share"], "calls": best["calls"],
                      "fd": best[key]["fd"], "rms": best[key]["rms"], "plain": plain})  # fmt: skip
    return found


def markdown(results: dict[str, Any]) -> str:
    """The tables that people read."""

    def pair(cell: dict[str, float] | None) -> str:
        text = f"{cell['fd']:.2f} / {cell['rms']:.3f}" if cell else ""
        return text + (f" ({cell['loss']:+.2f} ± {cell['loss_se']:.2f})" if cell and cell.get("loss") else "")

    lines = [f"{results['num']} samples a cell, four times as many of the mixture, 96 of the wide one; fd / rms. "
             "Floors: " + ", ".join(f"{name} {value:.2f}" for name, value in results["floor"].items()) + ".", "",
             "Time shift (rms says nothing of DDPM, which follows no ODE)", "",
             "| model | solver | steps | calls | plain | match noise | match marginal |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in results["shift"]:
        cells = " | ".join(pair(row[key]) for key in ("plain", "noise", "marginal"))
        lines.append(f"| {row['problem']} | {row['solver']} | {row['steps']} | {row['calls']} | {cells} |")
    heads = ["seeded, a class", "seeded, for all", "cold", "fewer"]
    lines += ["", f"Teleportation: {STEPS} steps, the first of them skipped", "",
              "| model | solver | calls | skipped | to rho | seeded, a class | seeded, for all | cold | fewer |",
              "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in results["skip"]:
        cells = " | ".join(pair(row.get(key)) for key in heads)
        rho = f"{row['rho']:.1f}" if row["skipped"] else ""
        lines.append(
            f"| {row['problem']} | {row['solver']} | {row['calls']} | {100 * row['share']:.0f} % | {rho} | {cells} |"
        )
    lines += ["", "The most that is skipped while fd stays within 1 % of skipping nothing", "",
              "| model | solver | calls skipped | fd | rms | fd, none skipped | rms, none skipped |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in results["lossless"]:
        plain = row["plain"]
        lines.append(f"| {row['problem']} | {row['solver']} | {100 * row['share']:.0f} % | {row['fd']:.2f} | "
                     f"{row['rms']:.3f} | {plain['fd']:.2f} | {plain['rms']:.3f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ["mixture-vp", "mixture-wide", *NETWORKS]
    parser.add_argument(
        "--problems", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known)
    )
    parser.add_argument("--num", type=int, default=300, help="samples a cell (default: 300)")
    parser.add_argument("--quick", action="store_true", help="the mixture alone, 200 samples")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.problems, options.num = ["mixture-vp"], 200
    if options.num < 100:
        parser.error(f"--num must be at least 100, so that distances mean something; got {options.num}")
    torch.set_num_threads(1)
    started = time.perf_counter()
    file = options.out / "shift-and-teleport-cpu.json"
    results: dict[str, Any] = {"num": options.num, "floor": {}, "shift": [], "skip": []}
    if file.exists() and (kept := json.loads(file.read_text())["results"])["num"] == options.num:
        results = kept
    for name in options.problems:
        if name == "mixture-wide":
            problem = of_wide(96)
        else:
            problem = of_mixture(4 * options.num) if name == "mixture-vp" else of_digits(name, options.num)
        results["floor"][name] = problem.judge(problem.truth)
        for kind, rows in (
            ("shift", shift_rows(problem)),
            ("skip", skip_rows(problem) if problem.stats else []),
        ):
            others = [row for row in results[kind] if row["problem"] != name]
            results[kind] = sorted([*others, *rows], key=lambda row: known.index(row["problem"]))
        print(f"{name}: done after {time.perf_counter() - started:.0f} s", flush=True)
    results["lossless"] = lossless(results["skip"])
    text = markdown(results)
    print(text)
    bench.save(file, results)
    (options.out / "shift-and-teleport-cpu.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
