"""The figures of the documentation's pages, a function a page, most of them on densities whose truth is known.

python benchmarks/figures.py                  # all of them, into docs/methods
python benchmarks/figures.py deis trees       # these
python benchmarks/figures.py --list
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fewstep import samplers
from fewstep.distill.losses import DIVERGENCES, Divergence, score_distillation_gradient, variational_gradient
from fewstep.eval import sliced_wasserstein
from fewstep.models import Denoiser, GaussianMixture, gaussian, paths
from fewstep.models.paths import Path as NoisePath
from fewstep.models.paths import coefficient
from fewstep.samplers import Table, grids, sample, starting_noise, targets
from fewstep.samplers.operators import dense

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "methods"
DRAWS = 12000  # the distances of laws are not to be their own noise
BUDGETS = (4, 5, 6, 8, 10, 14, 20)

ANGLES = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5)
RING = GaussianMixture(
    [0.1, 0.15, 0.2, 0.25, 0.3], torch.stack([ANGLES.cos(), ANGLES.sin()], 1), [0.01, 0.02, 0.01, 0.03, 0.02]
)
LINE = GaussianMixture([0.3, 0.7], [[-2.0], [1.5]], [0.16, 0.49])


def noise(n: int, dimensions: int = 2, seed: int = 0) -> torch.Tensor:
    return starting_noise(seed, n, (dimensions,), torch.float64)


def plain(make: Callable[..., Table], path: NoisePath, calls: int, **options) -> Table:
    """``make``'s table of ``calls`` network calls on ``grids.vp``."""
    return make(path, grids.for_calls(functools.partial(make, **options), path, calls, grids.vp), **options)


# --- solvers ---------------------------------------------------------------------------------------------------------


def errors(ax: Axes, path: NoisePath, solvers: dict[str, tuple], budgets: Sequence[int] = BUDGETS) -> None:
    """Lines of the distance to the ODE's own solution from the same noise, geometric mean over samples."""
    d, start = RING.denoiser(path), noise(256)
    exact = sample(d, start, samplers.abm(path, grids.vp(path, 300)))
    for name, (make, options) in solvers.items():
        tables = [plain(make, path, n, **options) for n in budgets]
        away = [(sample(d, start, t) - exact).norm(dim=1).clamp_min(1e-12).log().mean().exp() for t in tables]
        ax.plot([t.calls for t in tables], away, marker="o", markersize=3, label=name)
    calls_axis(ax, budgets)
    ax.set(yscale="log", ylabel="distance to the ODE's solution")
    ax.legend(fontsize=8)


def laws(ax: Axes, path: NoisePath, solvers: dict[str, tuple], budgets: Sequence[int]) -> None:
    """Lines of the sliced Wasserstein distance to exact draws, for samplers whose noise is their own; and its floor."""
    d, start = RING.denoiser(path), noise(DRAWS)
    for name, (make, options) in solvers.items():
        tables = [plain(make, path, n, **options) for n in budgets]
        away = [distance(sample(d, start, t)) for t in tables]
        ax.plot([t.calls for t in tables], away, marker="o", markersize=3, label=name)
    ax.axhline(distance(RING.sample(DRAWS, seed=2)), color="0.5", linestyle=":", label="exact draws, as many")
    calls_axis(ax, budgets)
    ax.set(yscale="log", ylabel="sliced Wasserstein distance to the data")
    ax.legend(fontsize=8)


@functools.cache
def _draws() -> torch.Tensor:
    return RING.sample(DRAWS, seed=1)


def distance(x: torch.Tensor) -> float:
    """Sliced Wasserstein distance of samples to draws from the ring."""
    return float(sliced_wasserstein(x, _draws(), projections=32))


def calls_axis(ax: Axes, ticks: Sequence[int]) -> None:
    ax.set(xscale="log", xlabel="network calls")
    ax.set_xticks(list(ticks), [str(n) for n in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)


def first_order(figure: Figure) -> None:
    """DDIM from the ODE to ancestral sampling, and DDPM's two variances."""
    solvers = {f"ddim, eta = {eta}": (samplers.ddim, {"eta": eta}) for eta in (0.0, 0.5, 1.0)}
    solvers |= {f"ddpm, {v}": (samplers.ddpm, {"variance": v}) for v in ("small", "large")}
    laws(figure.subplots(), paths.vp_linear(), solvers, (5, 10, 20, 40))


def deis_page(figure: Figure) -> None:
    """DEIS: the variable of the interpolant, and its order."""
    left, right = figure.subplots(1, 2)
    named = {"t": "tAB", "rho": "rhoAB", "lam": "log-rho"}
    errors(
        left, paths.vp_linear(), {f"{w}, order 3": (samplers.deis, {"variable": v}) for v, w in named.items()}
    )
    errors(right, paths.vp_linear(), {f"tAB, order {k}": (samplers.deis, {"order": k}) for k in (1, 2, 3, 4)})


def dpmpp_page(figure: Figure) -> None:
    """DPM-Solver in eps, DPM-Solver++ in x0, multistep and single-step."""
    solvers = {
        "dpmpp, order 2": (samplers.dpmpp, {"order": 2}),
        "dpmpp, order 3": (samplers.dpmpp, {"order": 3}),
        "dpmpp, order 3, exact weights": (samplers.dpmpp, {"order": 3, "weight": "exact"}),
        "dpm, order 2": (samplers.dpm, {"order": 2}),
        "single-step, order 2": (samplers.dpm_single, {"order": 2}),
    }
    errors(figure.subplots(), paths.vp_linear(), solvers, (4, 6, 8, 10, 14, 20))


def unipc_page(figure: Figure) -> None:
    """UniPC with and without its corrector."""
    solvers = {
        f"order {k}{'' if c else ', predictor alone'}": (samplers.unipc, {"order": k, "corrector": c})
        for k in (2, 3)
        for c in (True, False)
    }
    errors(figure.subplots(), paths.vp_linear(), solvers)


def abm_page(figure: Figure) -> None:
    """The default beside the best of diffusers' schedulers and the best of ours, from the committed comparison."""
    found = json.loads((HERE / "results" / "solvers-cpu.json").read_text())["results"]
    axes, problems = figure.subplots(1, 3), ("digits-edm", "digits-vp", "digits-flow")
    for ax, problem in zip(axes, problems, strict=True):
        rms = found["problems"][problem]["rms"]
        for whose, style in (("diffusers", "0.5"), ("ours", "C1")):
            best = [
                min(filter(None, (row.get(str(n)) for row in rms[whose].values()))) for n in found["calls"]
            ]
            ax.plot(found["calls"], best, color=style, marker="o", markersize=3, label=f"best of {whose}")
        ours = rms["ours"][found["default"]]
        ax.plot(found["calls"], [ours[str(n)] for n in found["calls"]], color="C0", marker="o", label="abm")
        calls_axis(ax, found["calls"])
        ax.set(yscale="log", title=problem)
    axes[0].set_ylabel("distance to the ODE's solution")
    axes[0].legend(fontsize=8)


def heun_page(figure: Figure) -> None:
    """Euler, Heun and Heun with churn: by the ODE, and by the law."""
    left, right = figure.subplots(1, 2)
    errors(
        left, paths.edm(), {"euler": (samplers.euler, {}), "heun": (samplers.heun, {})}, (5, 9, 15, 25, 41)
    )
    churn = {
        f"heun, s_churn = {c}": (samplers.heun, {"s_churn": c, "s_min": 0.05, "s_max": 50.0})
        for c in (0, 3, 10)
    }
    laws(right, paths.edm(), churn, (9, 15, 25, 41))


def stochastic(figure: Figure) -> None:
    """Stochastic multistep solvers beside ancestral sampling."""
    solvers = {
        "ddim, eta = 1": (samplers.ddim, {"eta": 1.0}),
        "sde_dpmpp, order 2": (samplers.sde_dpmpp, {}),
        "sa": (samplers.sa, {}),
        "ersde": (samplers.ersde, {}),
    }
    laws(figure.subplots(), paths.vp_linear(), solvers, (5, 8, 12, 20, 40))


def consistency_page(figure: Figure) -> None:
    """Re-noised steps of an exact consistency function: gamma = 1 gains nothing from more steps, and loses nothing."""
    path = paths.edm()
    d = RING.denoiser(path)

    def to_the_end(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = float(torch.as_tensor(t).max())  # one for all
        if level <= path.t_min:
            return d(x, t)
        times = grids.karras(path, 24, t_max=level)
        return sample(d, x / path.sigma(times[0]), samplers.abm(path, times))

    model = Denoiser(to_the_end, path, predicts="x0")
    ax, start = figure.subplots(), noise(DRAWS)
    steps = (1, 2, 3, 4, 6)
    for gamma in (0.0, 0.3, 1.0):
        made = [
            sample(model, start, samplers.consistency(path, grids.karras(path, n), gamma=gamma))
            for n in steps
        ]
        away = [distance(x) for x in made]
        ax.plot(steps, away, marker="o", markersize=3, label=f"gamma = {gamma}")
    away = [distance(sample(d, start, samplers.ddim(path, grids.karras(path, n)))) for n in steps]
    ax.plot(steps, away, color="0.5", linestyle="--", label="the teacher's own Euler")
    calls_axis(ax, steps)
    ax.set(yscale="log", ylabel="sliced Wasserstein distance to the data")
    ax.legend(fontsize=8)


def restart_page(figure: Figure) -> None:
    """Heun, and Heun with restarts, with an exact score but for the high noise, where it is off."""
    path, ax = paths.edm(), figure.subplots()
    exact = RING.denoiser(path)

    def off(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return exact(x, t) + 0.5 * (coefficient(t, x) > 2.0)

    d, start = Denoiser(off, path, predicts="x0"), noise(DRAWS)
    for times in (0, 2, 6):
        tables = [samplers.heun(path, grids.karras(path, n)) if not times
                  else samplers.restart(path, grids.karras(path, n), intervals=((0.1, 2.0, 6, times),))
                  for n in (8, 12, 18)]  # fmt: skip
        name = f"{times} restarts" if times else "heun alone"
        ax.plot(
            [t.calls for t in tables], [distance(sample(d, start, t)) for t in tables], marker="o", label=name
        )
    calls_axis(ax, (15, 25, 40, 60, 100))
    ax.set(yscale="log", ylabel="sliced Wasserstein distance to the data")
    ax.legend(fontsize=8)


def time_shift_page(figure: Figure) -> None:
    """The labels that samples are given, from their variance, along ten steps in 192 dimensions."""
    means = torch.randn(8, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5
    path = paths.vp_linear()
    d, times = (
        GaussianMixture([1 / 8] * 8, means, 0.02).denoiser(path, predicts="eps"),
        grids.uniform(path, 10),
    )
    ax = figure.subplots()
    for match, colour in (("noise", "C0"), ("marginal", "C1")):
        variance = 0.27 if match == "marginal" else None
        _, labels = samplers.time_shift(
            d,
            noise(24, 192),
            samplers.ddim,
            times,
            match=match,
            data_variance=variance,
            cutoff=0.0,
            window=100.0,
            return_labels=True,
        )
        shift = (labels - torch.as_tensor(times[:-1])) * 1000
        ax.plot(np.asarray(times[:-1]) * 1000, shift.T, color=colour, alpha=0.25)
        ax.plot([], [], color=colour, label=f'match="{match}"')
    ax.invert_xaxis()
    ax.set(xlabel="grid time, thousandths", ylabel="label minus grid time, thousandths")
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.legend(fontsize=8)


def teleport_page(figure: Figure) -> None:
    """What remains wrong at the end when the first steps of ten are made in closed form."""
    path, ax, start = paths.edm(), figure.subplots(), noise(256)
    d = RING.denoiser(path)
    stats, times = gaussian(RING.sample(20000).float()), grids.vp(path, 10)
    exact = sample(d, start, samplers.abm(path, grids.vp(path, 300)))
    for name, seeded in (("history seeded", True), ("beginning anew", False)):
        made = [
            samplers.skip(stats, d, start, samplers.abm, times, steps=k, seed_history=seeded)
            for k in range(7)
        ]
        ax.plot(range(7), [(x - exact).norm(dim=1).log().mean().exp() for x in made], marker="o", label=name)
    ax.set(xlabel="steps of ten in closed form", ylabel="distance to the ODE's solution", yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def search_page(figure: Figure) -> None:
    """Searched schedules beside the best by hand, from the committed results."""
    cases = json.loads((HERE / "results" / "search-cpu.json").read_text())["rows"]
    axes = figure.subplots(1, 2)
    for ax, model in zip(axes, ("mixture", "digits"), strict=True):
        rows = sorted((r for r in cases if r["problem"] == model), key=lambda r: r["calls"])
        calls = [r["calls"] for r in rows]
        ax.plot(calls, [r["error_by_hand"] for r in rows], marker="o", label="the best by hand")
        ax.plot(calls, [r["error"] for r in rows], marker="o", label="searched")
        calls_axis(ax, calls)
        ax.set(yscale="log", ylabel="distance to the ODE's solution", title=model)
        ax.legend(fontsize=8)


# --- control ---------------------------------------------------------------------------------------------------------


def guidance_page(figure: Figure) -> None:
    """Classifier-free guidance and autoguidance: one class of two, and what a scale does to it."""
    path = paths.edm()
    one = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [-0.3, 0.8]], [0.03, 0.06])
    both = GaussianMixture([0.25, 0.25, 0.5], [[-1.0, 0.0], [-0.3, 0.8], [1.0, 0.3]], [0.03, 0.06, 0.05])
    blurred = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [-0.3, 0.8]], [0.13, 0.16])
    good, bad = one.denoiser(path), blurred.denoiser(path)

    def call(x: torch.Tensor, t: torch.Tensor, known: bool) -> torch.Tensor:
        return (one if known else both).denoiser(path)(x, t)

    conditional = Denoiser(call, path, predicts="x0")
    table, start = samplers.abm(path, grids.vp(path, 24)), noise(800)
    cond = {"known": True}
    made = {
        "the class": one.sample(800, seed=3),
        "cfg, scale 3": sample(
            samplers.cfg(conditional, 3.0, null={"known": False}, forwards="two"), start, table, cond=cond
        ),
        "autoguidance, scale 3": sample(samplers.autoguidance(good, bad, 3.0), start, table),
    }
    scatter(figure, made)


def scatter(figure: Figure, made: dict[str, torch.Tensor]) -> None:
    axes = figure.subplots(1, len(made), sharex=True, sharey=True)
    for ax, (name, x) in zip(axes, made.items(), strict=True):
        ax.plot(*x.T.numpy(), ".", markersize=2)
        ax.set_title(name, fontsize=9)
        ax.set_aspect("equal")


def rlg_page(figure: Figure) -> None:
    """RL guidance of two Gaussians of one covariance: the mean that each scale gives, and theory's."""
    path, ax = paths.flow(), figure.subplots()
    base, tuned = (GaussianMixture([1.0], [[m]], 0.25).denoiser(path) for m in (0.0, 0.6))
    scales = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    made = [
        sample(samplers.rlg(base, tuned, w), noise(4000, 1), samplers.abm(path, grids.vp(path, 24)))
        for w in scales
    ]
    ax.plot(scales, [0.6 * w for w in scales], color="0.5", label="KL coefficient divided by the scale")
    ax.errorbar(
        scales,
        [float(x.mean()) for x in made],
        [2 * float(x.std()) / 4000**0.5 for x in made],
        fmt="o",
        label="sampled, two standard errors",
    )
    ax.set(xlabel="scale", ylabel="mean of the samples")
    ax.legend(fontsize=8)


def minority_page(figure: Figure) -> None:
    """Minority scores of data, and samples guided to the class of highest ones."""
    path = paths.vp_linear()
    rare = GaussianMixture([0.9, 0.1], [[0.0], [3.0]], [0.1, 0.1])
    d, data = rare.denoiser(path, predicts="eps"), rare.sample(2000)
    scores = samplers.minority_score(d, data, t=0.5, draws=16)
    left, right = figure.subplots(1, 2)
    left.plot(data[:, 0], scores, ".", markersize=2)
    left.set(xlabel="x", ylabel="minority score")
    classes = samplers.minority_classes(scores, 2)
    share = [
        float((classes[data[:, 0] > 1.5] == 1).double().mean()),
        float((classes[data[:, 0] < 1.5] == 1).double().mean()),
    ]

    def classifier(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Exact log-probabilities of the two classes, as far as the mode decides them."""
        mode = rare.responsibilities(x, path, t)
        unusual = mode[:, 1] * share[0] + mode[:, 0] * share[1]
        return torch.stack([1 - unusual, unusual], -1).clamp_min(1e-9).log()

    table = samplers.ddim(path, grids.vp(path, 60))
    for scale in (0.0, 2.0, 6.0):
        x = sample(samplers.minority(d, classifier, scale), noise(3000, 1), table)
        right.hist(
            x[:, 0].numpy(), bins=80, range=(-2, 5), histtype="step", density=True, label=f"scale {scale:g}"
        )
    right.set(xlabel="x", ylabel="density of the samples")
    right.legend(fontsize=8)


def feynman_kac_page(figure: Figure) -> None:
    """p^2 in one dimension: the score times two leaves the modes' masses wrong, weighted particles do not."""
    path = paths.edm()
    d, truth = LINE.denoiser(path), LINE.power(2.0)
    table = samplers.ddim(path, grids.logsnr(path, 80), eta=1.0)
    _, info = samplers.feynman_kac(
        d, noise(1, 1), table, target=targets.anneal(2.0), particles=4000, drift="transport"
    )
    line = torch.linspace(-3.5, 4.5, 400, dtype=torch.float64)[:, None]
    ax = figure.subplots()
    ax.plot(line[:, 0], LINE.log_prob(line).exp(), color="0.7", label="p")
    ax.plot(line[:, 0], truth.log_prob(line).exp(), color="k", label="p squared, normalised")
    ax.hist(
        info.particles[0, :, 0].numpy(),
        bins=90,
        range=(-3.5, 4.5),
        density=True,
        alpha=0.5,
        weights=info.weights[0].numpy(),
        label="weighted particles",
    )
    plain_mix = sample(
        _times_two(d, path), noise(4000, 1), samplers.ddim(path, grids.logsnr(path, 80), eta=1.0)
    )
    ax.hist(
        plain_mix[:, 0].numpy(),
        bins=90,
        range=(-3.5, 4.5),
        density=True,
        histtype="step",
        color="C3",
        label="the score times two",
    )
    ax.set(xlabel="x", ylabel="density")
    ax.legend(fontsize=8)


def _times_two(d: Denoiser, path: NoisePath) -> Denoiser:
    def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 2 * d(x, t) - x / coefficient(path.alpha(t), x)  # x + sigma^2 2 s, over alpha

    return Denoiser(call, path, predicts="x0")


def rewards_page(figure: Figure) -> None:
    """The best reward that a budget of calls finds: a tree's and best-of-n's, means of 24 seeds."""
    path, ax = paths.edm(), figure.subplots()
    d = GaussianMixture([1.0], torch.zeros(1, 8), 1.0).denoiser(path)
    table = samplers.ddim(path, grids.karras(path, 12), eta=1.0)

    def reward(x: torch.Tensor) -> torch.Tensor:
        return -(x - 1.5).square().sum(1)

    budgets = (60, 120, 240, 480, 960)
    found = {"tree_search": [], "best_of_n": []}
    for budget in budgets:
        tree = [
            float(samplers.tree_search(d, table, reward, budget=budget, seed=s).best()[1]) for s in range(12)
        ]
        many, _ = samplers.best_of_n(d, noise(12, 8), table, reward=reward, n=budget // 12)
        found["tree_search"].append(np.mean(tree))
        found["best_of_n"].append(float(reward(many).mean()))
    for name, means in found.items():
        ax.plot(budgets, means, marker="o", label=name)
    calls_axis(ax, budgets)
    ax.set(ylabel="reward of the best, mean of 12 seeds")
    ax.legend(fontsize=8)


def trees_page(figure: Figure) -> None:
    """The law that a tree samples from, with a reward that asks for the rare mode."""
    path, ax = paths.edm(), figure.subplots()
    p = GaussianMixture([0.9, 0.1], [[-1.0], [1.0]], 0.1)
    table = samplers.sde_dpmpp(path, grids.vp(path, 16))
    tree = samplers.tree_sample(
        p.denoiser(path), table, lambda x: 2 * x[:, 0], budget=16_000, dtype=torch.float64
    )
    line = torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None]
    ax.plot(line[:, 0], p.log_prob(line).exp(), color="0.7", label="p")
    ax.plot(line[:, 0], p.tilt([2.0]).log_prob(line).exp(), color="k", label="p exp(2 x), normalised")
    ax.hist(
        tree.samples(4000)[:, 0].numpy(),
        bins=80,
        range=(-3, 3),
        density=True,
        alpha=0.5,
        label="tree.samples",
    )
    ax.set(xlabel="x", ylabel="density")
    ax.legend(fontsize=8)


def posterior_page(figure: Figure) -> None:
    """One number measured of a ring: the exact posterior, weighted particles, and guidance by a guess."""
    path = paths.edm()
    d, operator = RING.denoiser(path), dense(torch.tensor([[1.0, 0.6]], dtype=torch.float64), (2,))
    y, std = torch.tensor([[0.4]], dtype=torch.float64), 0.2
    exact = RING.tilt([0.4 / 0.04, 0.24 / 0.04], [[-1 / 0.04, -0.6 / 0.04], [-0.6 / 0.04, -0.36 / 0.04]])
    table = samplers.ddim(path, grids.karras(path, 60, t_max=20.0), eta=1.0)
    _, info = samplers.ensemble_posterior(
        d, noise(1), table, operator=operator, observation=y, noise_std=std, particles=800
    )
    chosen = torch.multinomial(
        info.weights[0], 800, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    weighted = info.particles[0, chosen]
    guided, _ = samplers.dps(
        d, noise(800), table, reward=lambda x: -(operator(x) - y).square().sum(1) / (2 * std**2)
    )
    scatter(figure, {"exact": exact.sample(800), "ensemble_posterior": weighted, "dps": guided})


# --- distillation ----------------------------------------------------------------------------------------------------


def f_distill_page(figure: Figure) -> None:
    """The weights of f-divergences, and where exact gradients lead a Gaussian that starts near one mode of two."""
    left, right = figure.subplots(1, 2)
    names = ("rkl", "softened_rkl", "js", "hellinger", "kl")
    ratio = torch.logspace(-1.5, 1.5, 200, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    x = torch.linspace(-5, 5, 500, dtype=torch.float64)
    modes = GaussianMixture([0.5, 0.5], [[-1.5], [1.5]], 0.3**2)
    right.fill_between(x, modes.log_prob(x[:, None]).exp(), color="0.85", label="teacher")
    styles = ("-", (0, (5, 5)), "-", (0, (6, 4)), (3, (2, 4)))  # some lines coincide
    dashes = dict(zip(names, styles, strict=True))
    for name in names:
        divergence = DIVERGENCES[name]
        left.plot(ratio, divergence.weight(ratio) / divergence.weight(one), label=name)
        a, b = _led(modes, divergence, a=0.5, b=0.7)
        density = torch.distributions.Normal(b, a).log_prob(x).exp()
        right.plot(x, density, linestyle=dashes[name], label=f"{name}: {b:.2f} ± {a:.2f}")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="density ratio r, teacher over student",
        ylabel="weight h(r) / h(1)",
    )
    right.set(xlabel="x", ylabel="density")
    left.legend(fontsize=8)
    right.legend(fontsize=7)


def _led(modes: GaussianMixture, divergence: Divergence, a: float, b: float) -> tuple[float, float]:
    """(a, b) of the student x0 = a z + b after gradient descent; expectations are sums over a line."""
    path, x = paths.edm(), torch.linspace(-9, 9, 901, dtype=torch.float64)
    d = modes.denoiser(path)
    for k in range(240):
        sigma = (0.1, 0.3)[k % 2]
        law = torch.distributions.Normal(b, math.sqrt(a * a + sigma * sigma))
        log_q, spread = law.log_prob(x), a * a + sigma * sigma
        real, fake = d(x[:, None], sigma)[:, 0], x - sigma**2 * (x - b) / spread
        weight = divergence.weight((modes.log_prob(x[:, None], path, sigma) - log_q).exp())
        g = log_q.exp() * 0.02 * weight * (fake - real) / sigma**2
        rate = 0.15 * spread * min(1.0, 2 * (1 - k / 240))
        on_a, on_b = float((g * a * (x - b) / spread).sum()), float(g.sum())
        a, b = a - rate * max(-2.0, min(2.0, on_a)), b - rate * max(-2.0, min(2.0, on_b))
    return abs(a), b


def score_distillation_page(figure: Figure) -> None:
    """Points moved by SDS, and by VSD whose critic is the exact score of the points' own kernel estimate."""
    path, points, sigmas = paths.edm(), noise(400) * 1.5, torch.logspace(0, -1, 300)
    d, width = RING.denoiser(path), 0.05
    sds = vsd = points
    for k, sigma in enumerate(sigmas.tolist()):
        eps = noise(400, seed=k + 1)
        guess = d.eps(sds + sigma * eps, sigma)
        sds = sds - 0.1 * sigma * score_distillation_gradient(guess, guess, eps)
        at = vsd + sigma * eps
        square = sigma**2 + width**2
        near = torch.softmax(-torch.cdist(at, vsd).square() / (2 * square), dim=1)
        critic = sigma * (at - near @ vsd) / square
        vsd = vsd - 0.1 * sigma * variational_gradient(d.eps(at, sigma), critic)
    scatter(figure, {"data": RING.sample(400, seed=3), "SDS": sds, "VSD": vsd})


def trained(figure: Figure, names: Sequence[str]) -> None:
    """FD of students while they train, a line a seed, from the committed runs on digits; the teacher beside them."""
    found = json.loads((HERE / "results" / "distillation-digits-curves.json").read_text())
    ax = figure.subplots()
    for index, name in enumerate(names):
        for which, line in enumerate(found[name].values()):
            ax.plot(
                *zip(*line, strict=True),
                color=f"C{index}",
                marker="o",
                markersize=3,
                label="" if which else name,
            )
    ax.set(xlabel="iterations", ylabel="Fréchet distance to the teacher", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)


def dmd2_page(figure: Figure) -> None:
    """DMD2 in one call and in four."""
    trained(figure, ("DMD2, 1 call", "DMD2, 4 calls"))


def sim_page(figure: Figure) -> None:
    """SIM beside DMD2, both of one call."""
    trained(figure, ("DMD2, 1 call", "SIM, 1 call"))


def phased_page(figure: Figure) -> None:
    """Two experts of two calls beside DMD2's one network of four."""
    trained(figure, ("DMD2, 4 calls", "phased DMD, 2 x 2 calls"))


def elsewhere(script: str) -> Callable[[Figure], None]:
    """The ``page`` of a script beside this one: a figure with a file of its own, or that of its benchmark."""
    return lambda figure: runpy.run_path(str(HERE / script))["page"](figure)


FIGURES: dict[str, Callable[[Figure], None]] = {
    "first-order": first_order, "deis": deis_page, "dpmpp": dpmpp_page, "unipc": unipc_page, "abm": abm_page,
    "heun": heun_page, "stochastic": stochastic, "consistency": consistency_page, "restart": restart_page,
    "time-shift": time_shift_page, "teleport": teleport_page, "search": search_page, "guidance": guidance_page,
    "rlg": rlg_page, "minority": minority_page, "feynman-kac": feynman_kac_page, "rewards": rewards_page,
    "trees": trees_page, "posterior": posterior_page, "f-distill": f_distill_page,
    "preferences": elsewhere("figures_preferences.py"), "alignment": elsewhere("figures_alignment.py"),
    "score-distillation": score_distillation_page, "dmd2": dmd2_page, "sim": sim_page, "phased-dmd": phased_page,
    "dd2": elsewhere("dd2.py"), "masked": elsewhere("masked.py"), "gs-jacobi": elsewhere("gs_jacobi.py"),
}  # fmt: skip
WIDE = (
    "deis",
    "abm",
    "heun",
    "search",
    "guidance",
    "minority",
    "posterior",
    "f-distill",
    "score-distillation",
    "preferences",
    "alignment",
    "dd2",
    "masked",
    "gs-jacobi",
)


def draw(name: str, folder: Path = PAGES) -> Path:
    """The figure of the page ``name``; the file it was written to."""
    figure = Figure(figsize=(9 if name in WIDE else 5.5, 3.4), layout="constrained", dpi=110)
    FIGURES[name](figure)
    file = folder / f"{name}.png"
    figure.savefig(file)
    return file


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="pages; all of them if none")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder (default: docs/methods)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown:
        parser.error(f"there is no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    if args.list:
        print("\n".join(FIGURES))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or FIGURES:
        print(draw(name, args.out))


if __name__ == "__main__":
    main()
