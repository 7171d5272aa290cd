"""Guidance by the gradient of a reward of the denoised estimate: DPS (2209.14687) and what it stands for.

    score    x0_hat + scale (sigma^2 / alpha) grad_x r(x0_hat(x_t)),   the score of  p_t(x) exp(scale r(x0_hat(x)))
    paper    the sampler's own step, then  x' + scale grad_x r / sqrt(-r)  for r = -|y - A x0_hat|^2:  the paper's
             step of length ``scale`` over the residual

E[exp(r(x0)) | x_t] is not exp(r(E[x0 | x_t])), so both are off, by how far r is from linear where x0 is undecided.
A differentiated call costs about three.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids, starting_noise
    >>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
    >>> table, noise = ddim(d.path, grids.karras(d.path, 40)), starting_noise(0, 500, (1,), torch.float64)
    >>> x, _ = dps(d, noise, table, reward=lambda x: 2 * x[:, 0])           # a linear reward: N(2, 1), exactly
    >>> bool((x.mean() - 2).abs() < 0.15)
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from ..models.denoiser import Denoiser, Form, convert
from ..models.paths import Times, coefficient
from ..models.rewards import Reward, Space, checked
from .blend import Composite, as_time
from .guidance import check_denoiser, number
from .loop import init, sample, step
from .table import Table


class Guided(NamedTuple):
    """``rewards`` (B,) of the samples; ``calls``: differentiated network calls a sample."""

    rewards: torch.Tensor
    calls: int


def dps(
    d: Denoiser,
    noise: torch.Tensor,
    table: Table,
    *,
    reward: Reward,
    scale: float = 1.0,
    mode: Literal["score", "paper"] = "score",
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    reward_space: Space = "image",
) -> tuple[torch.Tensor, Guided]:
    """Samples (B, ...) guided by the reward's gradient through the network."""
    check_denoiser("d", d)
    if mode not in ("score", "paper"):
        raise ValueError(f"mode must be 'score' or 'paper', got {mode!r}")
    score = checked(reward, d.codec, reward_space)
    guided = RewardGuided(d, score, number("scale", scale))
    if mode == "score":
        x = sample(guided, noise, table, cond=cond, seed=seed, ids=ids)
        return x, Guided(score(x).detach(), table.calls)
    state, plan = init(table, noise, ids, seed=seed), table.on(d, noise.device)
    for _ in range(table.calls):
        at, t = state.y, float(table.t[state.row, 0])  # type: ignore[call-overload]
        value, slope = guided.slope(at, t, dict(cond or {}))
        with torch.no_grad():
            state, _ = step(d, plan, state, cond=cond, seed=seed)
            length = value.clamp_max(0).neg().sqrt().clamp_min(1e-12)
            moved = state.x + coefficient(scale / length, at) * slope
            state = state._replace(x=moved, y=moved)
    return state.x, Guided(score(state.x).detach(), table.calls)


class RewardGuided(Composite):
    """``d`` with  x0 + scale (sigma^2 / alpha) grad r(x0(x)).  Not affine; any solver runs it."""

    def __init__(self, d: Denoiser, score: Reward, scale: float):
        super().__init__((d,), ("d",))
        if not getattr(score, "differentiable", True):
            raise ValueError(
                "reward must be differentiable for guidance by its gradient; this one says it is not"
            )
        self.reward, self.scale = score, scale

    def affine(self, t: Times, form: Form = "x0") -> None:
        """None: the gradient is no linear function of outputs."""
        return None

    def slope(self, x: torch.Tensor, t: Times, cond: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """r(x0(x)) (B,) and its gradient in x."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = self.reward(self.children[0](point, t, **cond))
            if not value.requires_grad:
                raise ValueError(
                    "reward must be differentiable for guidance by its gradient: its answer has none"
                )
            (slope,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), slope

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        t = as_time(x, t)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            x0 = self.children[0](point, t, **cond)
            value = self.reward(x0)
            if not value.requires_grad:
                raise ValueError(
                    "reward must be differentiable for guidance by its gradient: its answer has none"
                )
            (slope,) = torch.autograd.grad(value.sum(), point)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        if isinstance(alpha, torch.Tensor):
            gain: Any = torch.where(alpha > 0, sigma * sigma / alpha.clamp_min(1e-300), 0.0)
        else:
            gain = sigma * sigma / alpha if alpha > 0 else 0.0
        x0 = x0.detach() + coefficient(self.scale * gain, x) * slope.to(x.dtype)
        p, q = convert(self.path, t, "x0", "flow" if form == "v" else form)
        return coefficient(p, x) * x + coefficient(q, x) * x0
