"""The figure of docs/methods/alignment.md: how much of the reward a gradient sees, and what each method aims at."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure

from fewstep.models import GaussianMixture, paths
from fewstep.samplers import ddim, grids, init, noise
from fewstep.samplers.transitions import transitions

COUNT, DIM = 20_000, 16


def page(figure: Figure) -> None:
    """Left: the squared correlation of the reward with what each gradient weighs it by. Right: densities."""
    left, right = figure.subplots(1, 2)
    seen(left)
    aims(right)


def seen(ax) -> None:
    """The reward is a linear one of N(0, I): of a rollout each step sees a part, and x0 given x_t the most."""
    path = paths.edm()
    d = GaussianMixture([1.0], [[0.0] * DIM], 1.0).denoiser(path)
    for index, calls in enumerate((10, 40)):
        table = ddim(path, grids.vp(path, calls), eta=1.0)
        chain = transitions(table.on(d))
        x = init(table, torch.randn(COUNT, DIM, generator=torch.Generator().manual_seed(0))).x
        drawn, levels = [], []
        for step in chain[:-1]:
            z = noise.normal(1, torch.arange(COUNT), (DIM,), step.row + 1, noise.STEP)
            x = step.mean(x, d(x, step.t)) + step.std * z
            drawn.append(z[:, 0])
            levels.append(step.t)
        reward = chain[-1].mean(x, d(x, chain[-1].t))[:, 0]
        share = [float(torch.corrcoef(torch.stack([reward, z]))[0, 1]) ** 2 for z in drawn]
        ax.plot(
            levels, share, "o-", markersize=3, color=f"C{index + 1}", label=f"a step of a rollout of {calls}"
        )
    rho = np.geomspace(0.02, 80, 100)
    ax.plot(rho, rho**2 / (1 + rho**2), color="C0", label="AWM's error of x0 at x_t")
    ax.set(
        xlabel="noise level",
        ylabel="share of the reward's variance",
        xscale="log",
        xlim=(0.02, 80),
        ylim=(0, 1.03),
    )
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(0.0, 0.6))
    ax.grid(alpha=0.3)


def aims(ax) -> None:
    """Optima for the reward r(x) = x on a mixture: the tilted law of a KL, and what the best of K draws have."""
    grid = np.linspace(-4, 4, 801)
    step = grid[1] - grid[0]
    base = sum(w * np.exp(-((grid - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
               for w, m, v in ((0.5, -1.5, 0.25), (0.35, 0.3, 0.25), (0.15, 2.0, 0.16)))  # fmt: skip
    ax.fill_between(grid, base, color="0.85", label="base")
    below = np.cumsum(base) * step
    for index, (label, law) in enumerate((
        ("base exp(r / 1)", base * np.exp(grid)),
        ("best of 4 (RAFT, one round)", 4 * below**3 * base),
        ("best of 4, two rounds", 16 * (below**4) ** 3 * below**3 * base),
    )):  # fmt: skip
        ax.plot(grid, law / (law.sum() * step), color=f"C{index}", label=label)
    ax.set(xlabel="x, and its reward", yticks=[])
    ax.legend(fontsize=7, loc="upper left")
