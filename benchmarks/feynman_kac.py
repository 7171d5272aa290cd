"""Feynman-Kac correctors on targets that are known: laws, normalisers, bias, paths, dimensions, and what they cost.

    python benchmarks/feynman_kac.py                       all cells that are missing; a quarter of an hour on one core
    python benchmarks/feynman_kac.py --minutes 3           as many as that, and again until none is missing
    python benchmarks/feynman_kac.py --only law:1          cells whose name begins so
    python benchmarks/feynman_kac.py --out benchmarks/results

Cells go into feynman-kac-<device>.json as they are done; the report and the plot are made of them. A law is judged by
16 ensembles of 2,000 particles: the mass of each mode (the nearest of the mixture's centres), Wasserstein-1 (the mean
over 16 lines beyond one dimension) and unbiased squared MMD (of four ensembles) to draws from the target, beside 2,000
exact draws (the floor), score mixing without weights, and the transport drift with its weights set to zero.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fewstep.eval.files import written_aside
from fewstep.eval.mmd import median_distance
from fewstep.eval.sliced import directions
from fewstep.models import GaussianMixture, load, paths
from fewstep.samplers import cfg, ddim, grids, sample, sde_dpmpp, starting_noise, targets
from fewstep.samplers.feynman_kac import feynman_kac
from fewstep.samplers.feynman_kac_walk import drift_denoiser
from fewstep.samplers.powers import scaled

GROUPS, PARTICLES = 16, 2000
STEPS = {1: 96, 2: 96, 16: 192}  # what the quadrature leaves of log Z grows with the dimension
DRAWS, FEWER, LINES = 40_000, 10_000, 16
DIMS = (1, 2, 16)
EXACT, ROUNDS = 32, 5
PLOT_DIMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SEED = 1
METHODS = ("floor", "transport", "target", "mixed", "zeroed")


class Law(NamedTuple):
    """A target, the mixtures that it is made of, and what is exactly true of it."""

    target: Callable[..., targets.Target]
    mixtures: tuple[GaussianMixture, ...]
    draw: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]  # (n, seed) -> x, log-weights
    log_z: Callable[[], float]


# --- the targets -----------------------------------------------------------------------------------------------------


def mixture(dim: int, weights, first, widths, tilt: float = 0.0) -> GaussianMixture:
    """Three components apart on the first axis, a little on the second; the others are of nearly one width."""
    means, covs = torch.zeros(3, dim), torch.zeros(3, dim)
    means[:, 0], covs[:, 0] = torch.tensor(first), torch.tensor(widths)
    for axis in range(1, dim):
        means[:, axis] = torch.tensor([0.0, 1.0, -0.8]) * (1.0 if axis == 1 else 0.2) + tilt
        covs[:, axis] = torch.tensor([0.36, 0.34, 0.38]) * (1 + 0.3 * math.cos(axis))
    return GaussianMixture(weights, means, covs)


def laws(dim: int) -> dict[str, Law]:
    p = mixture(dim, [0.3, 0.3, 0.4], [-2.0, 0.2, 2.2], [0.16, 0.25, 0.36])
    q = mixture(dim, [0.5, 0.3, 0.2], [-1.4, 0.6, 2.0], [0.5, 0.4, 0.3], tilt=0.1)
    apart = [-2.0, 0.2, 2.2], [0.36, 0.25, 0.49]
    unconditional, conditional = (
        mixture(dim, [0.35, 0.4, 0.25], *apart),
        mixture(dim, [0.08, 0.3, 0.62], *apart),
    )
    slope, bend = torch.zeros(dim), torch.zeros(dim)
    slope[0], bend[0] = -1.0, -0.8
    reward = partial(quadratic, slope=slope, bend=bend)
    tuned = p.tilt(0.6 * slope, 0.5 * bend)
    product = p.product(q)
    both = product.power(2)
    found = {
        "anneal 0.5": geometric(partial(targets.anneal, 0.5), (p,), (0.5,), 0.5),
        "anneal 2": closed(partial(targets.anneal, 2.0), (p,), p.power(2), lambda: p.power(2).log_mass),
        "anneal 4": closed(partial(targets.anneal, 4.0), (p,), p.power(4), lambda: p.power(4).log_mass),
        "product": closed(targets.product, (p, q), product, lambda: product.log_mass),
        "product, squared": closed(
            partial(targets.product, beta=2.0), (p, q), both, lambda: both.log_mass + 2 * product.log_mass
        ),
        "geometric 2": geometric(partial(targets.geometric, 2.0), (unconditional, conditional), (-1.0, 2.0), 1.0),
        "geometric 4": geometric(partial(targets.geometric, 4.0), (unconditional, conditional), (-3.0, 4.0), 1.0),
        "rlg 2": closed(
            lambda: targets.geometric(2.0), (p, tuned), p.tilt(1.2 * slope, bend),
            lambda: p.tilt(1.2 * slope, bend).log_mass - 2 * tuned.log_mass,
        ),
    }  # fmt: skip
    tilted = p.tilt(slope, bend)
    for way in ("none", "half", "full"):
        make = partial(targets.tilt, reward, gradient=way, ramp=(0.02, 3.0))
        found[f"tilt, {way}"] = closed(make, (p,), tilted, lambda: tilted.log_mass)
    return found


def quadratic(x: torch.Tensor, slope: torch.Tensor, bend: torch.Tensor) -> torch.Tensor:
    return x @ slope.to(x) + 0.5 * x.square() @ bend.to(x)


def closed(target, mixtures, exact: GaussianMixture, log_z) -> Law:
    return Law(target, mixtures, lambda n, seed: (exact.sample(n, seed), torch.zeros(n).double()), log_z)


def geometric(target, mixtures, powers, total: float) -> Law:
    """prod p_i^powers of mixtures with the same components: drawn from components of the right masses and widths, with
    weights of a ratio that is bounded."""
    p = mixtures[0]
    logs = sum(b * m.log_weights for b, m in zip(powers, mixtures, strict=True))
    dim = p.dim
    # of N^B: (2 pi)^(d (1 - B) / 2) |C|^((1 - B) / 2) B^(-d / 2), and covariance C / B
    values = p.values.expand(p.components, dim)
    logs = (
        logs
        + 0.5 * (1 - total) * (dim * math.log(2 * math.pi) + values.log().sum(-1))
        - 0.5 * dim * math.log(total)
    )
    proposal = GaussianMixture(logs.softmax(0), p.means, values / total)

    def draw(n: int, seed: int):
        x = proposal.sample(n, seed)
        wanted = sum(b * m.log_prob(x) for b, m in zip(powers, mixtures, strict=True))
        return x, wanted - proposal.log_prob(x)

    def log_z() -> float:
        return float(draw(1_000_000, 99)[1].logsumexp(0) - math.log(1_000_000))

    return Law(target, mixtures, draw, log_z)


# --- distances of weighted samples -----------------------------------------------------------------------------------


def wasserstein(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> float:
    """W1 of weighted samples, averaged over fixed lines."""
    lines = directions(x.shape[1], 1 if x.shape[1] == 1 else LINES, 0)
    total = 0.0
    for line in lines:
        value = torch.cat([x @ line, y @ line])
        mass = torch.cat([w, -v])
        order = value.argsort()
        gap = mass[order].cumsum(0)[:-1].abs()
        total += float((gap * value[order].diff()).sum())
    return total / len(lines)


def mmd(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, v: torch.Tensor, width: float) -> float:
    """Squared MMD under a Gaussian kernel, without the diagonals: its mean is 0 for equal laws (weights held fixed)."""

    def mean(a, p, b, q, same):
        kernel = torch.exp(torch.cdist(a, b).square() / (-2 * width * width))
        total = p @ kernel @ q
        return (total - (p * q).sum()) / (1 - (p * q).sum()) if same else total

    return float(mean(x, w, x, w, True) + mean(y, v, y, v, True) - 2 * mean(x, w, y, v, False))


def masses(x: torch.Tensor, w: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    nearest = torch.cdist(x, centres).argmin(-1)
    return torch.stack([(w * (nearest == k)).sum() for k in range(len(centres))])


# --- the cells -------------------------------------------------------------------------------------------------------


def noise_path():
    return paths.edm(sigma_max=500.0, sigma_min=0.02)  # beside which the data's spread is nothing


def ensembles(law: Law, method: str, dim: int) -> dict[str, Any]:
    """(GROUPS, PARTICLES, D) particles and their weights."""
    path = noise_path()
    ds = [m.to(dtype=torch.float32).denoiser(path) for m in law.mixtures]
    table, quadrature = sde_dpmpp(path, grids.logsnr(path, STEPS[dim]), order=2), "trapezoid"
    target = law.target()
    total = target.bind(tuple(ds)).total
    if (
        method in ("target", "mixed") and total != 1
    ):  # stiff where B is large: as the paper has it, in shorter steps
        table, quadrature = ddim(path, grids.logsnr(path, 192 if total <= 2 else 576), eta=1.0), "left"
    noise = starting_noise(SEED, GROUPS, (dim,))
    exact = "exact" if dim <= 2 else 2
    flat = torch.full((GROUPS, PARTICLES), 1 / PARTICLES, dtype=torch.float64)
    if method in ("transport", "target"):
        _, info = feynman_kac(
            ds, noise, table, target=target, particles=PARTICLES, drift=method, divergence=exact, seed=SEED,
            quadrature=quadrature,
        )  # fmt: skip
        return {"x": info.particles, "w": info.weights, "info": info, "steps": table.calls, "probes": exact}
    if target.tilt is not None:  # plain guidance by the reward's gradient
        half = targets.tilt(target.tilt.reward, gradient="half", ramp=target.tilt.ramp)
        _, info = feynman_kac(ds, noise, table, target=half, particles=PARTICLES, when=0.0, seed=SEED)
        return {"x": info.particles, "w": flat}
    densities = target.bind(tuple(ds))
    root = densities.total**-0.5
    drift = "target" if method == "mixed" else "transport"
    all_noise = starting_noise(SEED, GROUPS * PARTICLES, (dim,))
    table = scaled(table, root, root if drift == "transport" else 1.0)
    x = sample(drift_denoiser(densities, drift), all_noise, table, seed=SEED)
    return {"x": x.reshape(GROUPS, PARTICLES, dim), "w": flat}


def methods(total: float) -> tuple[str, ...]:
    """Where B = 1 the two drifts are one, and so are mixed scores and zeroed weights."""
    return tuple(method for method in METHODS if total != 1 or method not in ("target", "zeroed"))


def law_cell(dim: int, name: str, had: dict[str, Any], chosen: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """One target and the methods that are ``chosen``; those that ``had`` holds are not done again."""
    law = laws(dim)[name]
    y, log_v = law.draw(DRAWS, 5)
    v = log_v.softmax(0)
    centres = law.mixtures[0].means
    truth = masses(y, v, centres)
    few = torch.arange(2000)
    width = median_distance(y[few])
    few_v, fewer_v = log_v[few].softmax(0), log_v[:FEWER].softmax(0)
    x, log_w = zip(*(law.draw(PARTICLES, 100 + g) for g in range(GROUPS)), strict=True)
    floor = {"x": torch.stack(x), "w": torch.stack(log_w).softmax(-1)}
    total = law.target().bind(tuple(m.denoiser(noise_path()) for m in law.mixtures)).total
    out: dict[str, Any] = {"truth": truth.tolist(), "B": total}
    for method in methods(total):
        if method in had:
            out[method] = had[method]
        if method in had or method not in chosen:
            continue
        begun = time.perf_counter()
        run = floor if method == "floor" else ensembles(law, method, dim)
        row: dict[str, Any] = {"seconds": round(time.perf_counter() - begun, 1), "steps": run.get("steps")}
        row["probes"] = run.get("probes")
        clouds = list(zip(run["x"].double(), run["w"], strict=True))
        found = torch.stack([masses(a, w, centres) for a, w in clouds])
        row["mass"], row["mass_se"] = found.mean(0).tolist(), (found.std(0) / GROUPS**0.5).tolist()
        for key, values in (
            ("w1", [wasserstein(a, w, y[:FEWER], fewer_v) for a, w in clouds]),
            ("mmd", [mmd(a, w, y[few], few_v, width) for a, w in clouds[:4]]),
        ):
            row[key], row[f"{key}_se"] = (
                float(np.mean(values)),
                float(np.std(values, ddof=1) / len(values) ** 0.5),
            )
        if "info" in run:
            info = run["info"]
            ratio = (info.log_normaliser - law.log_z()).exp()
            row["z"], row["z_se"] = float(ratio.mean()), float(ratio.std() / GROUPS**0.5)
            row["ess"] = float(info.ess.min(0).values.mean() / PARTICLES)
            row["resampled"] = float(info.resampled.double().sum(0).mean())
            row["distinct"] = float(info.distinct.double().mean())
        out[method] = row
    return out


def bias_cell(kind: str) -> dict[str, Any]:
    """The normaliser and the leftmost mode's mass of anneal 2 in one dimension, at more and more steps."""
    law, path, rows = laws(1)["anneal 2"], noise_path(), []
    truth = float(masses(*_weighted(law), law.mixtures[0].means)[0])
    for steps in (20, 40, 80):
        times = grids.logsnr(path, steps)
        first = kind == "first order"
        table = ddim(path, times, eta=1.0) if first else sde_dpmpp(path, times, order=2)
        _, info = feynman_kac(
            law.mixtures[0].denoiser(path), starting_noise(2, GROUPS, (1,), torch.float64), table,
            target=law.target(), particles=4000, drift="transport", divergence="exact",
            quadrature="left" if first else "trapezoid", when=0.0, seed=2,
        )  # fmt: skip
        z = (info.log_normaliser - law.log_z()).exp()
        left = torch.stack([
            masses(x, w, law.mixtures[0].means)[0] for x, w in zip(info.particles, info.weights, strict=True)
        ])  # fmt: skip
        rows.append({
            "steps": steps, "z": float(z.mean()) - 1, "z_se": float(z.std() / GROUPS**0.5),
            "mass": float(left.mean()) - truth, "mass_se": float(left.std() / GROUPS**0.5),
        })  # fmt: skip
    return {"rows": rows}


def half_cell() -> dict[str, Any]:
    """The normaliser of a tilt by half the reward's gradient, as the paper weighs it and by the ratio of the steps."""
    law, path, rows = laws(1)["tilt, half"], noise_path(), []
    for steps in (48, 96, 192):
        row: dict[str, Any] = {"steps": steps}
        for key, quadrature in (("paper", "left"), ("ratio", "trapezoid")):
            _, info = feynman_kac(
                law.mixtures[0].denoiser(path), starting_noise(2, GROUPS, (1,), torch.float64),
                ddim(path, grids.logsnr(path, steps), eta=1.0), target=law.target(), particles=4000,
                quadrature=quadrature, seed=2,
            )  # fmt: skip
            z = (info.log_normaliser - law.log_z()).exp()
            row[key], row[f"{key}_se"] = float(z.mean()) - 1, float(z.std() / GROUPS**0.5)
        rows.append(row)
    return {"rows": rows}


def probes_cell(probes: int) -> dict[str, Any]:
    """The normaliser of anneal 4 in 16 dimensions, its divergence from random probes."""
    law, path, rows = laws(16)["anneal 4"], noise_path(), []
    d = law.mixtures[0].to(dtype=torch.float32).denoiser(path)
    for steps in (48, 96, 192):
        table = sde_dpmpp(path, grids.logsnr(path, steps), order=2)
        _, info = feynman_kac(
            d, starting_noise(SEED, GROUPS, (16,)), table, target=law.target(), particles=PARTICLES,
            drift="transport", divergence=probes, seed=SEED,
        )  # fmt: skip
        z = (info.log_normaliser - law.log_z()).exp()
        rows.append({"steps": steps, "z": float(z.mean()) - 1, "z_se": float(z.std() / GROUPS**0.5)})
    return {"rows": rows}


def _weighted(law: Law) -> tuple[torch.Tensor, torch.Tensor]:
    x, log_w = law.draw(1_000_000, 7)
    return x, log_w.softmax(0)


def path_cell() -> dict[str, Any]:
    """One noise, one grid of log-SNR, three paths: how far particles and weights are apart."""
    out = {}
    rho = np.append(np.geomspace(100.0, 0.02, 24), 0.0)
    for name, law in laws(2).items():
        for drift in ("target", "transport"):
            if drift == "transport" and name.split()[0] not in ("anneal", "product", "product,"):
                continue
            seen = []
            for path in (paths.edm(sigma_max=100.0), paths.vp_linear(), paths.flow()):
                times = np.append(path.time_of_rho(rho[:-1]), path.t_clean)
                predicts = {"edm": "x0", "vp_linear": "v", "flow": "flow"}[path.name]
                ds = [m.denoiser(path, predicts) for m in law.mixtures]
                _, info = feynman_kac(
                    ds, starting_noise(3, 2, (2,), torch.float64), ddim(path, times, eta=0.8), target=law.target(),
                    particles=32, drift=drift, divergence="exact",
                )  # fmt: skip
                seen.append(info)
            gaps = [
                max(
                    float((a.particles - b.particles).abs().max()), float((a.weights - b.weights).abs().max())
                )
                for a, b in zip(seen[:-1], seen[1:], strict=True)
            ]
            out[f"{name}, {drift}"] = max(gaps)
    return out


def dims_cell(dim: int) -> dict[str, Any]:
    """The spread of log-weights without resampling, anneal 2, of a mixture that is as far apart in every dimension."""
    draw = torch.Generator().manual_seed(dim)
    line = torch.randn(dim, generator=draw).double()
    means = torch.tensor([-2.0, 0.2, 2.0]).double()[:, None] * line / line.norm()
    covs = 0.4 * torch.exp(0.15 * torch.randn(3, dim, generator=draw).double())
    p = GaussianMixture([0.3, 0.3, 0.4], means, covs)
    path = paths.edm()
    table, out = sde_dpmpp(path, grids.logsnr(path, 64, t_min=0.01), order=2), {}
    for name, drift, divergence in (
        ("target", "target", "exact"), ("transport", "transport", "exact"), ("hutchinson", "transport", 1),
    ):  # fmt: skip
        if name == "transport" and dim > EXACT:  # a pass a dimension
            continue
        _, info = feynman_kac(
            p.denoiser(path), starting_noise(0, 2, (dim,), torch.float64), table, target=targets.anneal(2.0),
            particles=256, drift=drift, divergence=divergence, when=0.0,
        )  # fmt: skip
        out[name] = float(info.weights.log().std(-1).mean())
    return out


def cost_cell() -> dict[str, Any]:
    """Whole runs on the digits teacher, 8 groups of 8 particles, beside the plain sampler on 64 samples."""
    d = load("digits")
    table = ddim(d.path, grids.vp(d.path, 10), eta=1.0)
    labels = torch.arange(8)
    noise, group_noise = starting_noise(0, 64, d.shape), starting_noise(0, 8, d.shape)
    wide, narrow = {"label": labels.repeat_interleave(8)}, {"label": labels}
    guided = cfg(d, 2.0)
    one_half = {"target": targets.anneal(1.5), "cond": narrow, "particles": 8, "when": 1.0}
    found = {}
    for name, runs in {
        "guidance": {
            "plain": lambda: sample(guided, noise, table, cond=wide),
            "corrected": lambda: feynman_kac(guided, group_noise, table, cond=narrow, particles=8, when=1.0),
        },
        "annealing": {
            "plain": lambda: sample(d, noise, table, cond=wide),
            "target drift": lambda: feynman_kac(d, group_noise, table, **one_half),
            "transport drift, 1 probe": lambda: feynman_kac(d, group_noise, table, drift="transport", **one_half),
        },
    }.items():  # fmt: skip
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(
            ROUNDS + 1
        ):  # interleaved; of one thread's own time, which other programs do not take from
            for key, run in runs.items():
                begun = time.process_time()
                run()
                seconds[key].append(time.process_time() - begun)
        plain = np.array(seconds["plain"][1:])
        ratios = {key: np.array(values[1:]) / plain for key, values in seconds.items()}
        found[name] = {
            key: {"median": float(np.median(r)), "low": float(r.min()), "high": float(r.max())}
            for key, r in ratios.items()
        }
    return {"ratios": found}


def complete(cell: dict[str, Any]) -> bool:
    return bool(cell) and ("B" not in cell or all(method in cell for method in methods(cell["B"])))


def cells(chosen: tuple[str, ...] = METHODS) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    found: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"paths": lambda had: path_cell()}
    for kind in ("first order", "second order"):
        found[f"bias:{kind}"] = lambda had, kind=kind: bias_cell(kind)
    found["bias:half a gradient"] = lambda had: half_cell()
    for probes in (1, 2):
        found[f"bias:{probes} in 16"] = lambda had, probes=probes: probes_cell(probes)
    for dim in PLOT_DIMS:
        found[f"dims:{dim}"] = lambda had, dim=dim: dims_cell(dim)
    found["cost"] = lambda had: cost_cell()
    for dim in DIMS:
        for name in laws(dim):
            found[f"law:{dim}:{name}"] = partial(law_cell, dim, name, chosen=chosen)
    return found


# --- the report ------------------------------------------------------------------------------------------------------


def worst_mass(cell: dict[str, Any], method: str, allowed: float) -> tuple[float, float, bool]:
    """The largest error of a mode's mass, its standard error, and whether all stay within ``allowed`` + 3 of these."""
    row, truth = cell[method], cell["truth"]
    errors = [abs(a - b) for a, b in zip(row["mass"], truth, strict=True)]
    k = int(np.argmax(errors))
    good = all(e <= allowed + 3 * s for e, s in zip(errors, row["mass_se"], strict=True))
    return errors[k], row["mass_se"][k], good


def far(cell: dict[str, Any], method: str) -> float:
    """By how many standard errors its W1 lies above the floor's."""
    a, b = cell[method], cell["floor"]
    return (a["w1"] - b["w1"]) / math.hypot(a["w1_se"], b["w1_se"])


def claims(cells: dict[str, Any]) -> list[str]:
    """What should hold of every law, of how many it does, and where it does not."""
    rows: tuple[tuple[str, str, tuple[int, ...], Callable[[dict[str, Any]], bool]], ...] = (
        ("mass, transport or corrected: within 0.02 + 3 s.e.", "transport", DIMS,
         lambda c: worst_mass(c, "transport", 0.02)[2]),
        ("mass, target drift, 1 and 2 dimensions: within 0.05 + 3 s.e.", "target", (1, 2),
         lambda c: worst_mass(c, "target", 0.05)[2]),
        ("normaliser, transport or corrected: within 3 s.e. of 1", "transport", DIMS,
         lambda c: abs(c["transport"]["z"] - 1) < 3 * c["transport"]["z_se"]),
        ("W1 and MMD, transport or corrected: below mixed scores'", "mixed", DIMS,
         lambda c: c["transport"]["w1"] < c["mixed"]["w1"] and c["transport"]["mmd"] < c["mixed"]["mmd"]),
        ("W1, mixed scores: more than 10 s.e. above the floor's", "mixed", DIMS, lambda c: far(c, "mixed") > 10),
        ("W1, weights zeroed: more than 10 s.e. above the floor's", "zeroed", DIMS, lambda c: far(c, "zeroed") > 10),
        ("target drift fails in 16: W1 more than 5 s.e. above the floor's, of 2,000 ancestors fewer than 20 left",
         "target", (16,), lambda c: far(c, "target") > 5 and c["target"]["distinct"] < 20),
    )  # fmt: skip
    lines = ["| | holds | but for |", "|---|--:|---|"]
    for what, method, dims, holds in rows:
        chosen = {key.removeprefix("law:"): cell for key, cell in cells.items() if key.startswith("law:")}
        chosen = {key: c for key, c in chosen.items() if int(key.split(":")[0]) in dims and method in c}
        missed = [key for key, cell in chosen.items() if not holds(cell)]
        lines.append(f"| {what} | {len(chosen) - len(missed)} of {len(chosen)} | {'; '.join(missed)} |")
    return lines


def report(done: dict[str, Any], command: str, missing: list[str]) -> str:
    lines = [
        "# Feynman-Kac correctors on targets that are known", "", f"`{command}`, {done['device']}.", "",
        f"{GROUPS} ensembles of {PARTICLES:,} particles, SDE-DPM-Solver++ 2M, 96 steps (192 in 16 dimensions). *mass*: "
        "the largest error of a mode's mass, with its standard error, and ✗ where one is beyond 0.02 (target drift: "
        "0.05) + 3 of these. *W1*, *MMD²*: to the exact target. *z*: by how many standard errors W1 lies above the "
        "floor's. *normaliser*: mean over the truth. The divergence is exact in 1 and 2 dimensions, from two probes in "
        "16. The target drift and mixed scores, where B is not 1: ancestral, left-point weights, 192 steps or as many "
        "as are said.",
        "", "## What holds", "", *claims(done["cells"]), "",
    ]  # fmt: skip
    for dim in DIMS:
        lines += [f"## {dim} dimension{'s' if dim > 1 else ''}", ""]
        lines += ["| target | method | mass | W1 | z | MMD² x 1000 | normaliser | least ESS | ancestors |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|"]
        for key, cell in done["cells"].items():
            if not key.startswith(f"law:{dim}:"):
                continue
            for method in ("floor", "transport", "target", "mixed", "zeroed"):
                if method not in cell:
                    continue
                row = cell[method]
                error, se, good = worst_mass(cell, method, {"target": 0.05}.get(method, 0.02))
                z = "" if method == "floor" else f"{far(cell, method):.0f}"
                norm = f"{row['z']:.3f} ± {row['z_se']:.3f}" if "z" in row else ""
                ess = f"{row['ess']:.2f} | {row['distinct']:.0f}" if "ess" in row else "|"
                label = {"mixed": "scores mixed", "zeroed": "weights zeroed"}.get(method, method)
                label = "corrected" if cell["B"] == 1 and method == "transport" else label
                if method == "target" and row.get("steps", 192) != 192:
                    label += f", {row['steps']} steps"
                if method == "transport" and cell["B"] != 1 and row.get("probes") == 1:
                    label += ", one probe"
                lines.append(
                    f"| {key.split(':')[2]} | {label} | {error:.3f} ± {se:.3f}{'' if good else ' ✗'} | {row['w1']:.3f} "
                    f"± {row['w1_se']:.3f} | {z} | {1000 * row['mmd']:.2f} | {norm} | {ess} |"
                )
        lines.append("")
    lines += [
        "## What is left halves with the step",
        "",
        "Annealing by 2 in one dimension, transport drift.",
        "",
    ]
    lines += ["| | steps | normaliser - 1 | mass of the left mode - truth |", "|---|--:|--:|--:|"]
    for kind in ("first order", "second order"):
        for row in done["cells"].get(f"bias:{kind}", {}).get("rows", []):
            lines.append(
                f"| {kind} | {row['steps']} | {row['z']:+.4f} ± {row['z_se']:.4f} | {row['mass']:+.4f} ± "
                f"{row['mass_se']:.4f} |"
            )
    lines += [
        "",
        "First order is ancestral sampling with left-point weights, second is SDE-DPM-Solver++ 2M with trapezoids.",
        "",
    ]
    if rows := done["cells"].get("bias:half a gradient", {}).get("rows"):
        lines += ["A tilt by half the reward's gradient, ancestral, in one dimension: normaliser - 1.", "",
                  "| steps | weights of proposition 3.4 | ratio of the steps |", "|--:|--:|--:|"]  # fmt: skip
        for row in rows:
            lines.append(
                f"| {row['steps']} | {row['paper']:+.4f} ± {row['paper_se']:.4f} | {row['ratio']:+.4f} ± "
                f"{row['ratio_se']:.4f} |"
            )
        lines.append("")
    one, two = (done["cells"].get(f"bias:{probes} in 16", {}).get("rows") for probes in (1, 2))
    if one and two:
        lines += ["Annealing by 4 in 16 dimensions, transport drift, its divergence from random probes (two tell their "
                  "own variance, which is taken off the weights): normaliser - 1.", "",
                  "| steps | one probe | two probes |", "|--:|--:|--:|"]  # fmt: skip
        for a, b in zip(one, two, strict=True):
            lines.append(
                f"| {a['steps']} | {a['z']:+.4f} ± {a['z_se']:.4f} | {b['z']:+.4f} ± {b['z_se']:.4f} |"
            )
    if "paths" in done["cells"]:
        worst = max(done["cells"]["paths"].values())
        lines += ["", "## Paths", "", "The same noise on VE (x0-prediction), VP (v) and flow, one grid of log-SNR: "
                  f"particles and weights are the same within {worst:.1e}, over {len(done['cells']['paths'])} targets "
                  "and drifts."]  # fmt: skip
    lines += ["", "## Dimensions", "", "Standard deviation of the log-weights, annealing by 2, no resampling; "
              "![](feynman-kac-dimensions.png)", "", "| dimension | target drift | transport, exact | one probe |",
              "|--:|--:|--:|--:|"]  # fmt: skip
    for dim in PLOT_DIMS:
        if row := done["cells"].get(f"dims:{dim}"):
            exact = f"{row['transport']:.2f}" if "transport" in row else ""
            lines.append(f"| {dim} | {row['target']:.2f} | {exact} | {row['hutchinson']:.2f} |")
    if "cost" in done["cells"]:
        lines += ["", "## Cost", "", "Whole runs on the digits teacher, 8 groups of 8 particles, 10 steps, resampling "
                  "at every one; time over the plain sampler's on 64 samples, median of rounds (least .. most).", "",
                  "| | | ratio |", "|---|---|--:|"]  # fmt: skip
        for name, rows in done["cells"]["cost"]["ratios"].items():
            for method, ratio in rows.items():
                lines.append(
                    f"| {name} | {method} | {ratio['median']:.3f} ({ratio['low']:.3f} .. {ratio['high']:.3f}) |"
                )
    if missing:
        lines += ["", f"Not run yet, or in part: {'; '.join(name.removeprefix('law:') for name in missing)}."]
    return "\n".join(lines) + "\n"


def plot(done: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dims = [dim for dim in PLOT_DIMS if f"dims:{dim}" in done["cells"]]
    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for key, label, style in (
        ("target", "target drift", "o-"), ("transport", "transport drift, exact divergence", "s-"),
        ("hutchinson", "transport drift, one probe", "^--"),
    ):  # fmt: skip
        have = [dim for dim in dims if key in done["cells"][f"dims:{dim}"]]
        axes.loglog(have, [done["cells"][f"dims:{dim}"][key] for dim in have], style, label=label, base=2)
    axes.axhline(1.0, color="0.7", lw=0.8, zorder=0)
    axes.set(xlabel="dimension", ylabel="standard deviation of log-weights", xticks=dims)
    axes.set_xticklabels(map(str, dims))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="the beginning of the names of cells")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no new cell after this long")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="of the laws")
    parser.add_argument("--again", action="store_true", help="do cells anew that are there")
    parser.add_argument("--out", default="benchmarks/results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cpu"
    file = options.out / f"feynman-kac-{device}.json"
    done = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    done["device"] = f"{device}, torch {torch.__version__}"
    order, begun = cells(tuple(options.methods)), time.perf_counter()
    for name, cell in order.items():
        late = time.perf_counter() - begun > 60 * options.minutes
        had = dict(done["cells"].get(name, {}))
        if options.again and name.startswith(options.only):
            had = {key: value for key, value in had.items() if "B" in had and key not in options.methods}
        if late or not name.startswith(options.only) or complete(had):
            continue
        at = time.perf_counter()
        done["cells"][name] = cell(had)
        print(f"{name}: {time.perf_counter() - at:.0f} s", flush=True)
        done["cells"] = {key: done["cells"][key] for key in order if key in done["cells"]}
        options.out.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as aside:
            aside.write_text(json.dumps(done, indent=1))
    missing = [name for name in order if not complete(done["cells"].get(name, {}))]
    with written_aside(options.out / f"feynman-kac-{device}.md") as aside:
        aside.write_text(report(done, "python benchmarks/feynman_kac.py", missing))
    if not any(name.startswith("dims") for name in missing):
        plot(done, options.out / "feynman-kac-dimensions.png")
    print(f"{len(missing)} cells to go" if missing else "all cells are done")


if __name__ == "__main__":
    main()
