"""f-distill (2502.15681): the gradient of any f-divergence is DMD's, weighted by a function of the density ratio.

With r = p_t(x_t) / q_t(x_t), teacher over student,

    grad D_f(p_t || q_t) = E[ h(r) (S_f - S_r)(x_t) alpha dx0 ],      h(r) = f''(r) r^2,

so h = 1 (reverse KL) is DMD. The ratio comes from a discriminator's logits, high for real: r = exp(logit).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

Function = Callable[[torch.Tensor], torch.Tensor]


class Divergence(NamedTuple):
    """f, convex with f(1) = 0, and h = f'' r^2 where it is known in closed form."""

    f: Function
    h: Function | None = None

    def weight(self, ratio: torch.Tensor) -> torch.Tensor:
        """h(r), by two derivatives of f where no closed form is given."""
        if self.h is not None:
            return self.h(ratio)
        with torch.enable_grad():
            r = ratio.detach().clone().requires_grad_()
            (first,) = torch.autograd.grad(self.f(r).sum(), r, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), r)
        return second * ratio.detach().square()


DIVERGENCES: dict[str, Divergence] = {
    "rkl": Divergence(lambda r: -torch.log(r), torch.ones_like),
    "softened_rkl": Divergence(lambda r: (r + 1) * torch.log((r + 1) / (2 * r)), lambda r: 1 / (1 + r)),
    "js": Divergence(lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2), lambda r: r / (1 + r)),
    "hellinger": Divergence(lambda r: (1 - r.sqrt()) ** 2, lambda r: r.sqrt() / 2),
    "kl": Divergence(lambda r: r * torch.log(r), lambda r: r),
    "softened_kl": Divergence(lambda r: r * torch.log(2 * r / (r + 1)), lambda r: r / (1 + r) ** 2),
    "jeffreys": Divergence(lambda r: (r - 1) * torch.log(r), lambda r: 1 + r),
    "neyman": Divergence(lambda r: (1 - r) ** 2 / r, lambda r: 2 / r),
    "pearson": Divergence(lambda r: (r - 1) ** 2, lambda r: 2 * r**2),
}
"""From mode-seeking to mode-covering: neyman, rkl, softened_rkl, js, hellinger, softened_kl, kl, jeffreys, pearson."""


def density_ratio(
    logits: torch.Tensor, clamp: float = 10.0, low: float = 0.1, high: float = 20.0
) -> torch.Tensor:
    """r (B,) = exp(mean logit) in float32, without a graph; several heads or positions (B, ...) are averaged first.

    The clips are FastGen's. The logits must be those of the very x_t and t at which D_f and D_r were taken.

    >>> density_ratio(torch.tensor([[0.0], [100.0]]))
    tensor([ 1., 20.])
    """
    mean = logits.detach().float().flatten(1).mean(1) if logits.ndim > 1 else logits.detach().float()
    return mean.clamp(-clamp, clamp).exp().clamp(low, high)


def is_clipped(ratio: torch.Tensor, low: float = 0.1, high: float = 20.0) -> torch.Tensor:
    """Where ``density_ratio`` stands at one of its ends, and so says only that it is far: (B,) of booleans.

    >>> is_clipped(density_ratio(torch.tensor([0.0, 100.0, -100.0])))
    tensor([False,  True,  True])
    """
    return (ratio <= low) | (ratio >= high)


class LevelMeans(NamedTuple):
    """Weighted sums of r and their weights in bins of the noise level, (bins,) each."""

    total: torch.Tensor
    count: torch.Tensor

    @classmethod
    def start(cls, bins: int = 10, device: torch.device | str | None = None) -> LevelMeans:
        """Nothing seen yet."""
        return cls(torch.zeros(bins, device=device), torch.zeros(bins, device=device))


def level_means(
    state: LevelMeans,
    ratio: torch.Tensor,
    level: torch.Tensor,
    memory: float = 256.0,
    prior: float = 8.0,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda v: v,
) -> tuple[LevelMeans, torch.Tensor]:
    """(state', m): the mean of r at each sample's noise level, (B,). E_q[r] = 1, so r / m is self-normalised.

    ``level`` (B,) in [0, 1] is the quantile of t under the law that t is drawn from, so all bins fill alike
    (equal widths in sigma put two thirds of EDM's draws into one bin). A bin remembers about ``memory`` samples, and
    starts with ``prior`` samples at the theory's mean of 1: one sample alone in its bin must not be divided by itself,
    which would erase the ratio in small batches. ``reduce`` sums over ranks. A ratio that is not finite leaves no trace
    in the state: the batch is lost, and those that come after it are not.

    >>> state, m = level_means(LevelMeans.start(2), torch.tensor([2.0, 2.0]), torch.tensor([0.1, 0.2]), prior=2.0)
    >>> m                                                   # two samples at 2, two of the prior at 1
    tensor([1.5000, 1.5000])
    """
    bins = len(state.count)
    index = (level * bins).long().clamp(0, bins - 1)
    ratio, seen = ratio.detach(), ratio.isfinite()
    here = reduce(torch.zeros_like(state.count).index_add_(0, index, seen.to(ratio.dtype)))
    total = reduce(torch.zeros_like(state.total).index_add_(0, index, torch.where(seen, ratio, 0)))
    keep = torch.exp(-here / memory)  # a bin forgets by what it sees, not by the clock
    state = LevelMeans(state.total * keep + total, state.count * keep + here)
    return state, ((state.total + prior) / (state.count + prior))[index]


def batch_level_means(
    means: torch.Tensor,
    ratio: torch.Tensor,
    index: torch.Tensor,
    ema: float = 0.0,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda v: v,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(means', m), FastGen's way: a bin (of ``index`` (B,)) that the batch hits takes the batch's mean of it.

    With ``ema`` = 0 and one sample in a bin that sample's ratio is divided by itself: ``level_means`` is the remedy.

    >>> batch_level_means(torch.ones(2), torch.tensor([2.0, 4.0]), torch.tensor([0, 0]))[0].round(decimals=4)
    tensor([3., 1.])
    """
    count = reduce(torch.zeros_like(means).index_add_(0, index, torch.ones_like(ratio)))
    total = reduce(torch.zeros_like(means).index_add_(0, index, ratio.detach()))
    new = torch.where(count > 0, ema * means + (1 - ema) * total / (count + 1e-6), means)
    return new, new[index] + 1e-6


def divergence_weight(
    ratio: torch.Tensor,
    divergence: str | Divergence,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda v: v,
    margin: float = 0.0,
) -> torch.Tensor:
    """h(r) (B,) with mean 1 over the batch (and over ranks by ``reduce``, a sum), for ``dmd_gradient``'s scale.

    Mean 1 keeps DMD's learning rate and GAN weight. Reverse KL gives ones exactly: f-distill is then DMD. ``margin`` is
    added to the mean before it divides; FastGen's is 1e-6.

    >>> divergence_weight(torch.tensor([1.0, 3.0]), "kl")
    tensor([0.5000, 1.5000])
    """
    if isinstance(divergence, str):
        if divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence must be one of {', '.join(DIVERGENCES)}, or a Divergence(f), got {divergence!r}"
            )
        if divergence == "rkl":
            return torch.ones_like(ratio)
        divergence = DIVERGENCES[divergence]
    elif not isinstance(divergence, Divergence):
        divergence = Divergence(divergence)
    h = divergence.weight(ratio.detach())
    total, count = reduce(h.sum()), reduce(h.new_tensor(float(h.numel())))
    return h / (total / count + margin).clamp_min(math.ulp(1.0))
