"""What policy gradients are made of: advantages within groups, PPO's surrogate, matching losses as log-likelihoods.

Samples of one condition are a *group*: runs of ``group`` neighbours of a batch (B,). What makes a sample better than
its group is its advantage, and a policy that is moved along  A grad log p  gets more of such samples.

    group_advantages     (r - mean of the group) / standard deviation of the group, of all, or nothing      GRPO
    win_rates            the share of its group that a sample beats, to be standardised like rewards        Pref-GRPO
    clipped_surrogate    max(-A rho, -A clip(rho)), whose gradient at rho = 1 is  -A grad log p             PPO
    matching_loss        of a sample at one noise level; minus it stands for log p                          AWM

A group whose rewards are all the same says nothing, and divided by the rounding of its rewards it would say that
loudly (2508.20751 calls advantages of next to nothing illusory): ``flat_groups`` finds them, and their advantages are
0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from ...models.paths import Times, coefficient
from .denoising import x0_weight

Scale = Literal["group", "global", "none"]
SCALES = ("group", "global", "none")
MATCHING = ("uniform", "t", "t2")


def in_groups(values: torch.Tensor, group: int, name: str = "rewards") -> torch.Tensor:
    """(B,) as (groups, group); ``ValueError`` unless there are whole groups of two or more."""
    if values.ndim != 1:
        raise ValueError(f"{name} must be one number a sample, (B,), got {tuple(values.shape)}")
    if isinstance(group, bool) or not isinstance(group, int) or group < 2:
        raise ValueError(f"group must be 2 or more, or there is nothing to compare with, got {group!r}")
    if len(values) == 0 or len(values) % group:
        raise ValueError(
            f"{name} must be whole groups of {group}, got {len(values)} samples"
            + (": a group is empty" if len(values) == 0 else "")
        )
    return values.reshape(-1, group)


def flat_groups(rewards: torch.Tensor, group: int, least_spread: float = 1e-6) -> torch.Tensor:
    """(groups,) bools: whose rewards' standard deviation is at most ``least_spread`` (and 1e-6 of them: rounding).

    >>> flat_groups(torch.tensor([1.0, 2.0, 5.0, 5.0]), 2)
    tensor([False,  True])
    """
    r = in_groups(rewards, group).double()
    return r.std(1, correction=0) <= least_spread + 1e-6 * r.abs().amax(1)


def group_advantages(
    rewards: torch.Tensor,
    group: int,
    scale: Scale = "group",
    clip: float | None = 5.0,
    least_spread: float = 1e-6,
    spread: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B,) advantages: the reward less the group's mean, in units of a standard deviation, within ``clip`` of 0.

    ``scale``: the ``group``'s own (GRPO), ``global``: that of all rewards (``spread``, where they are more than these;
    Flow-GRPO's released configurations), ``none`` (2503.20783). Flat groups have 0. Released code adds 1e-4 to the
    standard deviation instead, which turns rewards that differ by 1e-4 into advantages of one half.

    >>> group_advantages(torch.tensor([0.0, 2.0, 7.0, 7.0]), 2)
    tensor([-1.,  1.,  0.,  0.])
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip!r}")
    flat = flat_groups(rewards, group, least_spread)
    r = in_groups(rewards, group).double()
    gap = r - r.mean(1, keepdim=True)
    if scale == "group":
        gap = gap / r.std(1, correction=0, keepdim=True).where(~flat[:, None], 1.0)
    elif scale == "global":
        whole = r.std(correction=0) if spread is None else spread.to(r)
        gap = gap / whole.where(~flat.all() & (whole > 0), 1.0)
    advantages = torch.where(flat[:, None], 0.0, gap)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages.flatten().to(rewards.dtype)


def win_rates(rewards: torch.Tensor, group: int, tie: float = 0.0) -> torch.Tensor:
    """(B,): the share of the others in its group that a sample beats, half a win where they are within ``tie``.

    >>> win_rates(torch.tensor([1.0, 3.0, 3.0]), 3)
    tensor([0.0000, 0.7500, 0.7500])
    """
    r = in_groups(rewards, group)
    gap = r[:, :, None] - r[:, None, :]
    wins = (gap > tie).to(r.dtype) + 0.5 * (gap.abs() <= tie)
    return ((wins.sum(2) - 0.5) / (group - 1)).flatten()


def judged_win_rates(
    judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, group: int
) -> torch.Tensor:
    """(B,) win rates by a judge of pairs: ``judge(a, b)`` answers 1 where a wins, 0 where b does, between at a tie.

    Each of the group (group - 1) / 2 pairs is judged once, first the one that stands first, as released code does.

    >>> judged_win_rates(lambda a, b: (a > b)[:, 0].float(), torch.tensor([[2.0], [0.0], [1.0]]), 3)
    tensor([1.0000, 0.0000, 0.5000])
    """
    places = in_groups(torch.arange(len(x), device=x.device), group, "x")
    first, second = torch.triu_indices(group, group, 1, device=x.device)
    one, other = places[:, first].flatten(), places[:, second].flatten()
    won = judge(x[one], x[other])
    if won.shape != one.shape or not bool(((won >= 0) & (won <= 1)).all()):
        raise ValueError(
            f"judge must answer a number from 0 to 1 for each of {len(one)} pairs, got shape {tuple(won.shape)}"
            + (f", {float(won.min()):g} to {float(won.max()):g}" if won.numel() else "")
        )
    won = won.to(torch.float32)
    total = torch.zeros(len(x), device=x.device).index_add(0, one, won).index_add(0, other, 1 - won)
    return total / (group - 1)


def rank_advantages(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """(B,): ranks within the group from -1 (last) to 1 (first), ties at their middle: bounded whatever the reward.

    They are 2 win_rates - 1: with a reward for a judge, wins are these divided by their standard deviation, 0.58 to
    0.71 without ties.

    >>> rank_advantages(torch.tensor([0.0, 1e9, 3.0]), 3)
    tensor([-1.,  1.,  0.])
    """
    return 2 * win_rates(rewards, group) - 1


def clipped_surrogate(ratio: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """PPO's loss (1707.06347) a sample: max(-A rho, -A clip(rho, 1 - clip, 1 + clip)).

    No gradient flows where the ratio has left the interval on the side that A drives it to.

    >>> rho = torch.tensor([1.0, 1.5, 1.5], requires_grad=True)
    >>> clipped_surrogate(rho, torch.tensor([2.0, 2.0, -2.0]), 0.2).sum().backward(); rho.grad
    tensor([-2.,  0.,  2.])
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip!r}")
    advantage = advantage.detach()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def flow_level(alpha: Times, sigma: Times) -> Times:
    """t of the flow that is as noisy: sigma / (alpha + sigma)."""
    return sigma / (alpha + sigma)


def matching_loss(
    estimate: torch.Tensor,
    x0: torch.Tensor,
    alpha: Times,
    sigma: Times,
    weight: str = "uniform",
    power: float = 1.0,
) -> torch.Tensor:
    """(B,): the flow matching loss of each sample at its noise level, w(t) ((m + e)^p - e^p) / p, e = 1e-10.

    m = mean |v - (eps - x0)|^2 over elements, written in estimates of x0 and so for any path: an error of x0 is one of
    the flow's v over t, t = sigma / (alpha + sigma). ``weight``: 1, t or t^2, which leaves the bare error of x0.
    ``power`` p < 1 is AWM's released choice (0.25, with weight t): where m is large its gradient is not, which bounds
    the push of negative advantages, whose loss has no minimum.

    >>> wrong, right = torch.full((1, 3), 2.0), torch.zeros(1, 3)
    >>> [matching_loss(wrong, right, 0.5, 0.5, w).item() for w in ("uniform", "t", "t2")]
    [16.0, 8.0, 4.0]
    """
    if estimate.shape != x0.shape:
        raise ValueError(f"estimate must have x0's shape {tuple(x0.shape)}, got {tuple(estimate.shape)}")
    if weight not in MATCHING:
        raise ValueError(f"weight must be one of {', '.join(MATCHING)}, got {weight!r}")
    if not 0 < power <= 1:
        raise ValueError(f"power must lie in (0, 1], got {power!r}")
    error = velocity_gap(estimate, x0, alpha, sigma)
    if power != 1:
        error = ((error + 1e-10) ** power - 1e-10**power) / power
    degree = MATCHING.index(weight)
    return error if degree == 0 else coefficient(flow_level(alpha, sigma) ** degree, error) * error


def velocity_gap(estimate: torch.Tensor, other: torch.Tensor, alpha: Times, sigma: Times) -> torch.Tensor:
    """(B,): mean |v - v'|^2 over elements, of the flow's velocities behind two estimates of x0."""
    error = (estimate - other).square().flatten(1).mean(1)
    return coefficient(x0_weight("flow", alpha, sigma), error) * error
