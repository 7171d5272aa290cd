"""The figure of docs/methods/preferences.md, drawn by ``python benchmarks/figures.py preferences``."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fewstep.distill.losses import dpo_loss, invert, network_error, preference_logit, smpo_loss
from fewstep.models import GaussianMixture, paths

CALLS = (4, 8, 16, 32, 64)
BETAS = (0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def page(figure: Figure) -> None:
    """The optimum of DPO on a Gaussian; how far labels pull; the way back of an inversion."""
    tilted, pull, back = figure.subplots(1, 3)
    exact = torch.linspace(0.2, 3.2, 60)
    tilted.plot(exact, 1 / exact, color="0.6", label="p0 exp(r / beta)")
    tilted.plot(BETAS, [_found(beta) for beta in BETAS], "o", markersize=4, label="DPO's, 4,000 pairs")
    tilted.set(xlabel="beta", ylabel="mean of the tuned model", title="N(0, 1), reward x")
    tilted.legend()

    u = torch.linspace(-4, 6, 200, requires_grad=True)
    for name, loss in {
        "DPO": lambda u, p: dpo_loss(u),
        "SmPO, geometric": lambda u, p: smpo_loss(u, p, sharpness=2.0),
        "SmPO, expected": lambda u, p: smpo_loss(u, p, "expected"),
    }.items():
        (slope,) = torch.autograd.grad(loss(u, torch.full_like(u, 0.8)) * len(u), u)
        pull.plot(u.detach(), -slope, label=name)
    pull.axhline(0, color="0.8", linewidth=0.8)
    pull.set(xlabel="u", ylabel="pull on u", title="A label of p = 0.8 (sharpness 2)")
    pull.legend()

    for refine, told in ((0, "then"), (0, "now"), (1, "then"), (1, "now")):
        name = f"told {told}" + (", re-noised" if refine else "")
        back.loglog(CALLS, [_missed(n // (1 + refine), refine, told) for n in CALLS], ".-", label=name)
    back.set_xticks(CALLS, [str(n) for n in CALLS])
    back.xaxis.set_minor_locator(NullLocator())
    back.set(
        xlabel="network calls of the inversion", ylabel="distance to the ODE's", title="Inverted latents"
    )
    back.legend()


def _found(beta: float) -> float:
    """The mean that DPO finds on pairs labelled by Bradley and Terry's law: sigma = 1 on the EDM path, errors of x0."""
    random = torch.Generator().manual_seed(0)
    x, y, eps = torch.randn(3, 4000, 1, dtype=torch.float64, generator=random)
    wins = torch.rand(4000, dtype=torch.float64, generator=random) < (x - y)[:, 0].sigmoid()
    winner, loser = torch.where(wins[:, None], x, y), torch.where(wins[:, None], y, x)
    mean = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([mean], max_iter=50, line_search_fn="strong_wolfe")

    def errors(m: torch.Tensor) -> list[torch.Tensor]:
        return [network_error(m + 0.5 * (x0 + eps - m), x0, 1.0) for x0 in (winner, loser)]

    def loss() -> torch.Tensor:
        solver.zero_grad()
        # (1 - alpha K)^2 = 1/4 of an error is the mean's: beta is 4 times what it is for log densities
        value = dpo_loss(preference_logit(*errors(mean), *errors(torch.zeros_like(mean)), beta=4 * beta))
        value.backward()
        return value

    solver.step(loss)
    return mean.item()


def _missed(steps: int, refine: int, told: str) -> float:
    """How far from the ODE's latents an inversion ends, from rho = 0.05 to 1."""
    path = paths.vp_linear()
    d = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.6]], [0.05, 0.1]).denoiser(path)
    x = torch.tensor([[-0.9, 0.3], [0.7, -0.2]], dtype=torch.float64)

    def ends(n: int, refine: int, told: str) -> torch.Tensor:
        times = path.time_of_rho(torch.linspace(0.05, 1.0, n + 1, dtype=torch.float64))
        return invert(d, x, times, refine, told)  # type: ignore[arg-type]

    return float((ends(steps, refine, told) - ends(512, 1, "now")).abs().max())
