"""How a teacher is trained: the regression of its network's own target, one step at a time.

The network F_theta is asked for F* = g_x x0 + g_e eps at x = alpha(t) x0 + sigma(t) eps, and

    loss = E | F_theta(x, t, label) - F* |^2,          t drawn as the recipe's ``times`` says,

which for EDM preconditioning is the weighting of 2206.00364, for ``eps`` that of 2006.11239, for ``flow`` that of
2210.02747. Some labels are replaced by the null label, so that guidance has its unconditional half.

A step's random numbers follow from its number (``draws``), so all that a run must keep is networks and optimizer.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.denoiser import Denoiser
from ..models.unet import UNet, time_frequencies
from .data import Data
from .draws import Draws
from .levels import time_at
from .parallel import ALONE, Ranks, average_gradients
from .precision import autocast

if TYPE_CHECKING:
    from .teacher import TeacherRecipe


def target(
    d: Denoiser, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, F*): the network's input before any scaling, and what it should answer: solves  x0 = P x + Q F*  for F*."""
    wide = t.reshape(-1, *[1] * (x0.ndim - 1))
    x = d.path.alpha(wide) * x0 + d.path.sigma(wide) * eps
    # x0's equation loses its Q where sigma = 0 is near, eps' where alpha = 0 is; take the better of the two
    answers = []
    for form, value in (("x0", x0), ("eps", eps)):
        p, (q,) = d.affine(wide, form)
        q = torch.as_tensor(q, dtype=torch.float64, device=x0.device)
        answers.append((q.expand_as(wide), (value - p * x) / q))
    (q_x, f_x), (q_e, f_e) = answers
    return x.float(), torch.where(q_x.abs() > q_e.abs(), f_x, f_e).float()


def denoising_loss(
    d: Denoiser, x0: torch.Tensor, cond: dict[str, Any], eps: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """| F_theta - F* |^2, one number a sample; x0 and eps (B, ...), t (B,) in float64."""
    x, wanted = target(d, x0.double(), eps.double(), t)
    (output,) = d.raw(x, t, **cond)
    return (output.float() - wanted).square().flatten(1).mean(dim=1)


class Regression:
    """A teacher in training: its network, the average of it, and the optimizer."""

    def __init__(self, recipe: TeacherRecipe, d: Denoiser, data: Data, ranks: Ranks = ALONE):
        if recipe.batch % ranks.world:
            raise ValueError(f"batch = {recipe.batch} must be a multiple of the {ranks.world} ranks")
        self.recipe, self.d, self.data, self.ranks = recipe, d, data, ranks
        self.done = 0
        self.net: nn.Module = d.to(ranks.device).net.train()  # type: ignore[union-attr]
        gpu = ranks.device.type == "cuda"
        if gpu and len(data.shape) == 3:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[no-matching-overload]
        if recipe.time_cutoff is not None:
            without_fast_frequencies(self.net, recipe.time_cutoff / recipe.time_scale)
        self.averaged = copy.deepcopy(self.net)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), recipe.lr, tuple(recipe.betas), weight_decay=recipe.weight_decay, fused=gpu
        )  # type: ignore[bad-argument-type]

    def step(self) -> torch.Tensor:
        """One update; the batch's loss, on the device."""
        recipe, ranks, step = self.recipe, self.ranks, self.done
        count = recipe.batch // ranks.world
        draws = Draws(recipe.seed, step, ranks.rank * count, count, recipe.batch, ranks.device)
        torch.manual_seed(((recipe.seed << 32) + step * ranks.world + ranks.rank) % 2**63)  # for dropout
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * learning_rate(step, recipe.steps, recipe.warmup)
        batch = self.data.batch(draws)
        if batch.real is None:
            raise ValueError("a teacher is trained on samples, and these data have none")
        cond = null_some(batch.cond, batch.null, recipe.label_dropout, draws)
        t = time_at(recipe.times, self.d.path, draws.stratified("level").clamp(1e-6, 1 - 1e-6))
        with autocast(recipe.precision, ranks.device):
            loss = denoising_loss(
                self.d, batch.real, cond, draws.normal("forward", self.data.shape), t
            ).mean()
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.net.parameters(), ranks)
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip)
        self.optimizer.step()
        average(self.averaged, self.net, step, recipe.ema_share)
        self.done += 1
        return ranks.sum(loss.detach()) / ranks.world

    def finish(self) -> Denoiser:
        """The Denoiser with its averaged weights, frozen."""
        self.net.load_state_dict(self.averaged.state_dict())
        self.net.eval().requires_grad_(False)
        return self.d

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold, as nested dicts of tensors; loading fills these very tensors."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return {
            "net": self.net.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer),
            "done": torch.tensor(self.done),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` told, after its tensors were filled."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        self.net.load_state_dict(state["net"])
        self.averaged.load_state_dict(state["averaged"])
        set_optimizer_state_dict(self.net, self.optimizer, state["optimizer"])
        self.done = int(state["done"])


def null_some(
    cond: dict[str, Any], null: dict[str, Any] | None, share: float, draws: Draws
) -> dict[str, Any]:
    """Conditions with a share of them replaced by their null."""
    if null is None:
        return cond
    dropped = draws.uniform("null") < share
    return {key: torch.where(dropped, null[key], value) for key, value in cond.items()}


def without_fast_frequencies(net: nn.Module, cutoff: float) -> None:
    """Set to 0, and keep there, what the time embedding reads at frequencies above ``cutoff`` radians per unit of tau.

    With tau = 1000 t the fastest wave turns 160 times between t = 0 and 1. Nothing in the data does; the network
    averages it away, but not to nothing, and what is left makes the ODE rough: solvers stop converging at 1e-3.
    """
    if not isinstance(net, UNet):
        raise ValueError(f"time_cutoff is for net.type = unet, got a {type(net).__name__}")
    config, linear = net.config, net.time_embedding.linear_1
    frequencies = time_frequencies(config.block_out_channels[0], config.freq_shift)
    keep = (frequencies <= cutoff).repeat(2).to(linear.weight)  # sines and cosines
    with torch.no_grad():
        linear.weight.mul_(keep)
    linear.weight.register_hook(lambda gradient: gradient * keep)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Linear up, then half a cosine down to 0."""
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def average(averaged: nn.Module, net: nn.Module, step: int, share: float) -> None:
    """An average whose memory grows with the run (2312.02696): it looks back over ``share`` of the steps so far.

    >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> average(a, b, step=0, share=0.1); bool(a.weight == b.weight)
    True
    """
    weight = max(1 / (step + 1), 1 - (1 - 1 / (step + 1)) ** (1 / share))
    torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), min(1.0, weight))
