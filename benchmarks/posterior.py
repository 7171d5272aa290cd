"""Ensemble posterior sampling: against closed forms on mixtures, and beside DPS on digits.

    python benchmarks/posterior.py                           everything that is not in the results yet, then the tables
    python benchmarks/posterior.py --seconds 200             stop after so long; the next run goes on from there
    python benchmarks/posterior.py --table                   print the tables from the results as they are

Mixtures: a linear observation of a Gaussian mixture has a Gaussian mixture as its posterior. 16 runs of 1,000
particles (4 of the other weightings): how many standard errors of the runs' mean the worst coordinate of the posterior
mean is off, and the covariance's error (Frobenius norm, mean over runs) over that of 1,000 exact draws. Digits:
held-out digits, observed with noise 0.1, the unconditional teacher as the prior. 48 particles in independent ensembles,
beside 16 draws of DPS, whose differentiated calls count as three: PSNR of the mean and of single draws, means over the
images with their standard errors; the lead in PSNR of the mean, image by image, over the strength of DPS that is
best on average; and how many of the hidden pixels lie within the central 90 % of the draws, with the width of that
interval. The guess is by the Gaussian of the training digits, or isotropic.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.eval.cells import command
from fewstep.models import digits, gaussian, load, paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import ddim, dps, grids, sde_dpmpp, starting_noise
from fewstep.samplers.ensemble_posterior import ensemble_posterior
from fewstep.samplers.operators import Operator, blur, dense, downsample, inpaint

RESULTS = Path(__file__).parent / "results" / "posterior-cpu.json"
RUNS, FEWER, PARTICLES, STEPS = 16, 4, 1000, 200
PROBLEMS = {
    "4 numbers, 2 seen": (4, 2, 0.4, 3),
    "8 numbers, half of them seen": (8, 4, 0.3, 4),
    "2 numbers, 1 seen": (2, 1, 0.2, 5),
}
WEIGHTINGS = ("twisted", "twisted, isotropic guess", "paper", "weights thrown away")
NOISE, BLOCK, CALLS = 0.1, 4, 40
IMAGES = {"left half seen": 16, "blurred": 4, "2 x 2 means": 4}


def problem(name: str):
    dim, seen, noise, seed = PROBLEMS[name]
    prior, generator = random_mixture(dim, 3, seed), torch.Generator().manual_seed(seed)
    matrix = torch.randn(seen, dim, generator=generator, dtype=torch.float64) * 0.7
    if "half" in name:
        matrix = torch.eye(dim, dtype=torch.float64)[:seen]
    y = prior.sample(1, seed=seed) @ matrix.mT + noise * torch.randn(
        1, seen, generator=generator, dtype=torch.float64
    )
    exact = prior.tilt(matrix.mT @ y[0] / noise**2, -matrix.mT @ matrix / noise**2)
    centres, spread = prior.means @ matrix.mT, matrix @ prior.covs @ matrix.mT + noise**2 * torch.eye(seen)
    evidence = torch.distributions.MultivariateNormal(centres, spread).log_prob(y)
    return prior, dense(matrix, (dim,)), y, noise, exact, float((prior.log_weights + evidence).logsumexp(0))


def mixture_run(name: str, weighting: str, seed: int) -> dict:
    prior, operator, y, noise, exact, evidence = problem(name)
    d = prior.denoiser(paths.edm())
    grid = grids.karras(d.path, STEPS, t_max=20.0, t_min=0.01)
    table = sde_dpmpp(d.path, grid, order=2) if weighting != "paper" else ddim(d.path, grid, eta=1.0)
    prior_std = float(prior.cov.diagonal().mean().sqrt())
    _, info = ensemble_posterior(
        d, starting_noise(seed, 1, (prior.dim,), torch.float64), table, operator=operator, observation=y, seed=seed,
        noise_std=noise, particles=PARTICLES,
        data=gaussian(prior.sample(20_000, seed=9)) if weighting == "twisted" else prior_std,
        weighting="paper" if weighting == "paper" else "twisted",
        when=0.0 if weighting == "weights thrown away" else 0.5,
    )  # fmt: skip
    x, w = info.particles[0], info.weights[0]
    if weighting == "weights thrown away":
        w = torch.full_like(w, 1 / len(w))
    mean = w @ x
    draws = exact.sample(PARTICLES, seed=1000 + seed)
    return {
        "mean": (mean - exact.mean).tolist(), "cov": float((_cov(x, w) - exact.cov).norm()),
        "exact": float((_cov(draws, torch.full((PARTICLES,), 1 / PARTICLES, dtype=torch.float64)) - exact.cov).norm()),
        "log_evidence": float(info.log_evidence) - evidence, "ess": float(info.ess[-1]),
    }  # fmt: skip


def _cov(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    away = x - w @ x
    return away.mT @ (w[:, None] * away)


def operators() -> dict[str, Operator]:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    return {
        "left half seen": inpaint(mask),
        "blurred": blur((1, 8, 8), 1.0),
        "2 x 2 means": downsample((1, 8, 8), 2),
    }


def digits_block(task: str, method: str, block: int) -> dict:
    d, operator = load("digits-edm"), operators()[task]
    images = torch.as_tensor(digits("held_out")[0])[::22][block * BLOCK : (block + 1) * BLOCK]
    generator = torch.Generator().manual_seed(block)
    clean = operator(images)
    y = clean + NOISE * torch.randn(clean.shape, generator=generator)
    table = ddim(d.path, grids.karras(d.path, CALLS, t_max=20.0, t_min=0.02), eta=1.0)
    null = d.net.null_label
    if "ensembles" in method:
        many, each = (int(word) for word in method.partition(",")[0].split()[::3])
        rows = y.repeat_interleave(many, 0)
        _, info = ensemble_posterior(
            d, starting_noise(block, len(rows), d.shape), table, operator=operator, observation=rows, noise_std=NOISE,
            particles=each, data=0.75 if "isotropic" in method else gaussian(torch.as_tensor(digits("train")[0])),
            seed=block, cond={"label": torch.full((len(rows),), null)},
        )  # fmt: skip
        x = info.particles.reshape(BLOCK, many * each, *d.shape)
        weights = (info.weights / many).reshape(BLOCK, many * each)
    else:
        many = 16
        rows = y.repeat_interleave(many, 0)
        x, _ = dps(
            d, starting_noise(block, len(rows), d.shape), table, mode="paper", scale=float(method.split()[-1]),
            reward=lambda x: -(rows - operator(x)).square().flatten(1).sum(1), seed=block,
            cond={"label": torch.full((len(rows),), null)},
        )  # fmt: skip
        x, weights = x.reshape(BLOCK, many, *d.shape), torch.full((BLOCK, many), 1 / many)
    hidden = (
        ~operator.values.bool().expand(images.shape)
        if task == "left half seen"
        else torch.ones_like(images).bool()
    )
    weights = weights.double()
    mean = (weights[..., None, None, None] * x).sum(1)
    inside, width = [], []
    for image, draws, w, where in zip(images, x, weights, hidden):
        values, order = draws.flatten(1)[:, where.flatten()].double().sort(0)
        upto = w[order].cumsum(0)
        low, high = (
            values.gather(0, (upto < level).sum(0, keepdim=True).clamp_max(len(values) - 1))[0]
            for level in (0.05, 0.95)
        )
        truth = image.flatten()[where.flatten()]
        inside.append(float(((truth >= low - NOISE / 10) & (truth <= high + NOISE / 10)).double().mean()))
        width.append(float((high - low).mean()))
    pixels = hidden.flatten(1).sum(1)
    square = ((x - images[:, None]) ** 2 * hidden[:, None]).flatten(2).sum(-1) / pixels[:, None]
    of_mean = ((mean - images) ** 2 * hidden).flatten(1).sum(1) / pixels
    return {
        "mean": of_mean.tolist(), "draw": (weights * square).sum(1).tolist(), "inside": inside, "width": width
    }  # fmt: skip


METHODS = (
    "16 ensembles of 3",
    "6 ensembles of 8",
    "6 ensembles of 8, isotropic guess",
    "DPS 1.0",
    "DPS 4.0",
    "DPS 8.0",
)


def jobs():
    """Names and functions of the results, what matters most first."""
    tasks = list(operators())
    for weighting, runs in zip(WEIGHTINGS, (RUNS, FEWER, FEWER, FEWER)):
        for seed in range(runs):
            for name in PROBLEMS:
                yield (
                    f"mixture|{name}|{weighting}|{seed}",
                    lambda known, a=(name, weighting, seed): mixture_run(*a),
                )
        if weighting != WEIGHTINGS[0]:
            continue
        for task, block in sorted(
            ((t, b) for t in tasks for b in range(IMAGES[t] // BLOCK)), key=lambda at: at[1]
        ):
            for method in METHODS:
                yield (
                    f"digits|{task}|{method}|{block}",
                    lambda known, a=(task, method, block): digits_block(*a),
                )


def tables(known: dict) -> str:
    lines = ["# Ensemble posterior sampling", "", "`python benchmarks/posterior.py`, on a CPU.", ""]
    lines += [" ".join(__doc__.split("\n\n")[2].split()), ""]
    lines += [
        "| mixture | weighting | runs | mean, s.e. off | covariance, over exact draws | log evidence off | ESS |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name in PROBLEMS:
        for weighting in WEIGHTINGS:
            runs = [v for k, v in known.items() if k.startswith(f"mixture|{name}|{weighting}|")]
            if len(runs) < 2:
                continue
            means = torch.tensor([r["mean"] for r in runs])
            off = (means.mean(0) / (means.std(0) / len(runs) ** 0.5)).abs().max()
            ratio = sum(r["cov"] for r in runs) / sum(r["exact"] for r in runs)
            logs = torch.tensor([r["log_evidence"] for r in runs])
            size = sum(r["ess"] for r in runs) / len(runs)
            evidence = f"{logs.mean():.3f} +- {logs.std():.3f}"
            lines.append(
                f"| {name} | {weighting} | {len(runs)} | {off:.1f} | {ratio:.2f} | {evidence} | {size:.0f} |"
            )
    lines += [
        "", "| digits | method | images | PSNR of the mean | lead over the best DPS | of a draw | hidden pixels "
        "inside 90 % | width |", "|---|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for task in operators():
        strengths = {m: _together(known, task, m, "mean") for m in METHODS if m.startswith("DPS")}
        strengths = {m: values for m, values in strengths.items() if len(values)}
        tuned = max(strengths, key=lambda m: float((1 / strengths[m]).log().mean()), default=None)
        plain = strengths.get(tuned, torch.empty(0))
        for method in METHODS:
            mean, draw, inside, width = (
                _together(known, task, method, key) for key in ("mean", "draw", "inside", "width")
            )
            if len(mean) < 2:
                continue
            both = min(len(mean), len(plain))
            lead = _said(10 * (plain[:both] / mean[:both]).log10()) if method != tuned and both > 1 else ""
            lines.append(
                f"| {task} | {method} | {len(mean)} | {_said(10 * (4 / mean).log10())} | {lead} | "
                f"{10 * (4 / draw).log10().mean():.2f} | {_said(inside, 3)} | {width.mean():.2f} |"
            )
    return "\n".join([*lines, ""])


def _together(known: dict, task: str, method: str, key: str) -> torch.Tensor:
    """A number of every image, block after block."""
    blocks = (known.get(f"digits|{task}|{method}|{block}") for block in range(IMAGES[task] // BLOCK))
    return torch.tensor([v for found in blocks if found for v in found[key]], dtype=torch.float64)


def _said(values: torch.Tensor, digits: int = 2) -> str:
    return f"{values.mean():.{digits}f} +- {values.std() / len(values) ** 0.5:.{digits}f}"


if __name__ == "__main__":
    command(__doc__, RESULTS, jobs(), tables)
