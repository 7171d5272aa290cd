"""The bound that masked diffusion models are trained by (2406.07524), and two ways to estimate it.

With the share of hidden tokens as the variable, r = 1 - alpha(t), the continuous-time bound on -log p(x) is

    L(x) = int_0^1 dr/r  E_{each token hidden with probability r}  sum_{hidden i} -log p(x_i | what is seen),

whatever the schedule, for a model that is not told the time. Grouped by how many are hidden it is a finite sum
(2409.02908, eq. 7), which an exact model brings to -log p(x) on average over x:

    L(x) = sum_{n=1}^{L} 1/n  E_{n of L hidden}  sum_{hidden i} -log p(x_i | what is seen).

``hidden`` draws what an unbiased estimate of either needs:

>>> u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
>>> out, share, weight = hidden("count", u, torch.rand(1000, 4))
>>> (out.sum(1) == (share * 4).round()).all().item(), (weight * out.sum(1)).unique().tolist()
(True, [4.0])
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from ...models.masked import MaskedModel

MASKINGS = ("count", "time")


class Hidden(NamedTuple):
    """Which tokens are hidden, (B, L) bools; the share that is hidden at that time, and the loss' weight, (B,)."""

    where: torch.Tensor
    share: torch.Tensor
    weight: torch.Tensor


def hidden(masking: Literal["count", "time"], u: torch.Tensor, places: torch.Tensor) -> Hidden:
    """What to hide, of uniforms ``u`` (B,) and ``places`` (B, L) in (0, 1).

    ``time``: each token with probability r = u, the loss weighs 1 / r. ``count``: exactly n, uniform in 1 .. L; weight
    L / n. Their means are the same. The variance of ``time`` has no bound (it is an integral of 1 / r down to 0, which
    others cut off by an epsilon), that of ``count`` has one.
    """
    if masking not in MASKINGS:
        raise ValueError(f"masking must be one of {', '.join(MASKINGS)}, got {masking!r}")
    if places.ndim != 2 or u.shape != places.shape[:1]:
        raise ValueError(f"u must be (B,) and places (B, L), got {tuple(u.shape)} and {tuple(places.shape)}")
    if masking == "time":
        return Hidden(places < u[:, None], u, 1 / u)
    length = places.shape[1]
    n = (u * length).ceil().clamp(1, length)
    return Hidden(places.argsort(1).argsort(1) < n[:, None], n / length, length / n)


def masked_nelbo(model: MaskedModel, tokens: torch.Tensor, out: Hidden, **cond: Any) -> torch.Tensor:
    """An unbiased estimate of L(x) in nats, (B,): the cross-entropy of the hidden tokens, weighted."""
    t = model.schedule.time(1 - out.share.double()) if model.timed else None
    logits = model(torch.where(out.where, model.mask, tokens), t, **cond)
    log_p = logits.float() if logits.dtype != torch.float64 else logits
    log_p = log_p.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return -(log_p.where(out.where, 0.0).sum(1) * out.weight.to(log_p.dtype))
