"""Ancestral sampling of masked diffusion models on a grid of times (2107.03006, 2406.07524).

From t to s < t a hidden token stays hidden with probability (1 - alpha(s)) / (1 - alpha(t)), and is drawn from what the
network says at t otherwise; tokens that fall into one step are drawn as if they were independent. With many steps that
is the reverse process, which ``first_hitting`` draws without any. ``draws`` says how the step is drawn:

    exact     when each token is revealed first (that is no matter of the network), then the token, by the draw that is
              exact in the tail. Steps that reveal nothing cost nothing: a sample needs min(T, L) calls at most, also
              in a batch, and also of a model that is told the time.
    float32   as most code does: one draw of a token or the mask, q_k / E_k at its largest, at every step for every
    float64   hidden token, in that precision; see ``race``. In float32 tokens of small probability never win.

>>> from fewstep.models.masked import from_joint
>>> model = from_joint(torch.tensor([[0.5, 0.0], [0.0, 0.5]]))    # two bits that are always equal
>>> equal = lambda steps: float((masked_ancestral(model, 4000, steps)[0].diff(dim=1) == 0).double().mean())
>>> [bool(abs(equal(steps) - (1 - 0.5 / steps)) < 0.04) for steps in (1, 2, 50)]
[True, True, True]
>>> masked_ancestral(model, 4000, 1000)[1].calls
2
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from ..models.masked import MaskedModel
from .noise import Seed
from .race import race
from .unmasking import Groups, Info, Request, hits, request, unmask

DRAWS = ("exact", "float32", "float64")


def masked_ancestral(
    model: MaskedModel,
    prompt: torch.Tensor | int,
    steps: int | Sequence[float] | torch.Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    ids: torch.Tensor | None = None,
    draws: Literal["exact", "float32", "float64"] = "exact",
    temperature: float = 1.0,
    top_p: float = 1.0,
    progress: bool = False,
) -> tuple[torch.Tensor, Info]:
    """Tokens (B, L), int64, and how they were revealed (``Info``); for other arguments see ``first_hitting``.

    Args:
        steps: T equal steps, or T + 1 times that fall from 1 to 0.
    """
    if draws not in DRAWS:
        raise ValueError(f"draws must be one of {', '.join(DRAWS)}, got {draws!r}")
    times = grid(steps)
    asked = request(model, prompt, seed, ids, cond, temperature, top_p)
    if draws == "exact":
        return unmask(model, asked, stepwise(model, asked, times), progress=progress)
    return race(model, asked, times, getattr(torch, draws), progress)


def grid(steps: int | Sequence[float] | torch.Tensor) -> torch.Tensor:
    """T + 1 times in float64, from 1 to 0."""
    if isinstance(steps, int) and not isinstance(steps, bool):
        if steps < 1:
            raise ValueError(f"steps must be 1 or more, or times that fall from 1 to 0, got {steps}")
        return torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    times = torch.as_tensor(steps, dtype=torch.float64)
    good = times.ndim == 1 and len(times) > 1 and times[0] == 1 and times[-1] == 0
    if not good or not bool((times.diff() < 0).all()):
        raise ValueError(f"steps must be 1 or more, or times that fall from 1 to 0, got {steps}")
    return times


def stepwise(model: MaskedModel, asked: Request, times: torch.Tensor) -> Groups:
    """All positions whose times fall into one step are a group; the network is asked at the step's beginning."""
    positions, share, n = hits(model, asked)
    times = times.to(share.device)
    hidden_at = 1 - model.schedule.alpha(times)  # falls from 1 to 0
    place = torch.arange(model.length, device=n.device)
    real = place < n[:, None]
    # step k holds the shares in [hidden_at[k + 1], hidden_at[k])
    step = len(times) - 1 - torch.searchsorted(hidden_at.flip(0).contiguous(), share, right=True)
    step = step.clamp(0, len(times) - 2)
    fresh = real & torch.cat([real[:, :1], step[:, 1:] != step[:, :-1]], 1)
    group = (fresh.cumsum(1) - 1).where(real, model.length)  # those of no group come after all
    count = torch.zeros(len(n), model.length + 1, dtype=torch.int64, device=n.device)
    count = count.scatter_add(1, group, torch.ones_like(group))[:, :-1]
    # the one look at the device
    widest = list(itertools.takewhile(lambda most: most > 0, count.amax(0).tolist() if len(n) else []))
    count = count[:, : len(widest)]
    start = count.cumsum(1) - count
    at = times[step.gather(1, start.clamp(max=model.length - 1))]
    return Groups(positions, times[step + 1], start, count, at, widest)
