"""Preference losses: pure functions of denoising errors, one number a sample, of the winner and the loser of a pair.

    e = |F(x_t) - F*|^2                                            F: what the network answers, F*: what it should have
    u = -(beta / 2) [(e_w - e_l) - (b_w - b_l)]                    b: the errors of the reference, at the same x_t and t

    Diffusion-DPO  2311.12908    -log sigmoid(u)                   x_t: the same noise for both
    DDIM-InPO      2503.18454    -log sigmoid(u)                   x_t: each by inversion; F* is made of its own noise
    SmPO           2506.02698    -log sigmoid(10 (2 p - 1) u)      p: how sure the preference is
    MaPO           2406.06424    e_w - beta log sigmoid(T [h(e_w) - h(e_l)]),  h(e) = k e / (exp(k e) - 1)

Papers sum the squares over a sample's elements; their code takes the mean, and betas such as 5000 are for the mean: a
sum's is smaller by the number of elements.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from ...models.denoiser import Denoiser
from ...models.paths import Times, coefficient

Reduce = Literal["mean", "sum"]
Labels = Literal["geometric", "expected"]


def output_weight(d: Denoiser, t: Times) -> Times:
    """What makes |D - x0|^2 the squared error of the network's own output, 1 / Q^2 where D = P x + Q F.

    >>> from fewstep.models import paths
    >>> output_weight(Denoiser(lambda x, tau: x, paths.flow(), predicts="flow"), 0.5)
    4.0
    """
    scalars = d.affine(t, "x0")
    if scalars is None or len(scalars[1]) != 1:
        raise ValueError(f"d must be one network, whose answer is affine in x0, got a {type(d).__name__}")
    return 1 / scalars[1][0] ** 2


def network_error(
    estimate: torch.Tensor, x0: torch.Tensor, weight: Times, reduce: Reduce = "mean"
) -> torch.Tensor:
    """weight |D - x0|^2 (B,): the mean over a sample's elements, or the sum; float32, or float64 where x0 is.

    The noise that x_t is x0 and is asked to be denoised by, eps* = (x_t - alpha x0) / sigma, is made of x0: so this is
    the error of the noise too, drawn or inverted, whatever x_t is.
    """
    if estimate.shape != x0.shape:
        raise ValueError(f"estimate must have x0's shape {tuple(x0.shape)}, got {tuple(estimate.shape)}")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")
    wide = torch.promote_types(x0.dtype, torch.float32)
    squares = (estimate.to(wide) - x0.to(wide)).square().flatten(1)
    return coefficient(weight, squares[:, 0]) * (squares.mean(1) if reduce == "mean" else squares.sum(1))


def preference_logit(
    winner: torch.Tensor,
    loser: torch.Tensor,
    base_winner: torch.Tensor,
    base_loser: torch.Tensor,
    beta: float = 5000.0,
) -> torch.Tensor:
    """u (B,), see the module: how much better than the reference the winner is denoised, and how much worse the loser.

    >>> one = torch.ones(1)
    >>> preference_logit(0.9 * one, 1.2 * one, one, one, beta=10.0)
    tensor([1.5000])
    """
    shapes = {tuple(e.shape) for e in (winner, loser, base_winner, base_loser)}
    if len(shapes) > 1:
        raise ValueError(
            f"errors must be one a pair, of one shape, got {', '.join(map(str, sorted(shapes)))}"
        )
    return -0.5 * beta * ((winner - base_winner) - (loser - base_loser))


def dpo_loss(logit: torch.Tensor) -> torch.Tensor:
    """Diffusion-DPO (2311.12908) and DDIM-InPO (2503.18454): the mean of -log sigmoid(u).

    >>> dpo_loss(torch.zeros(3))
    tensor(0.6931)
    """
    return functional.softplus(-logit).mean()


def smpo_loss(
    logit: torch.Tensor, p: torch.Tensor, labels: Labels = "geometric", sharpness: float = 10.0
) -> torch.Tensor:
    """SmPO (2506.02698): a pair that is preferred with probability p (B,) in [0, 1].

    ``geometric``: -log sigmoid(s (2 p - 1) u), the likelihoods of both weighed by p in the exponent, with the code's
    sharpness s = 10. ``expected``: -p log sigmoid(u) - (1 - p) log sigmoid(-u), the mean of DPO's loss under the label,
    least where sigmoid(u) = p. At u = 0 their gradients differ by s alone; p = 1/2 has none there.

    >>> u = torch.zeros(1, requires_grad=True)
    >>> smpo_loss(u, torch.tensor([0.5]), "expected").backward()
    >>> u.grad
    tensor([0.])
    """
    if p.shape != logit.shape:
        raise ValueError(
            f"p must be one number a pair, {tuple(logit.shape)} as the logits, got {tuple(p.shape)}"
        )
    if labels == "geometric":
        return dpo_loss(sharpness * (2 * p - 1) * logit)
    if labels == "expected":
        return (functional.softplus(-logit) + (1 - p) * logit).mean()
    raise ValueError(f"labels must be 'geometric' or 'expected', got {labels!r}")


def smoothed_labels(
    winner: torch.Tensor,
    loser: torch.Tensor,
    low: float | torch.Tensor = 0.0,
    high: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """p (B,) of SmPO: the softmax of both scores after ``low`` .. ``high`` was put on 0 .. 1, so at most 0.73.

    Its code has low = 0.1154 and high = 0.2820, PickScore's least and most on its data.

    >>> smoothed_labels(torch.tensor([1.0, 0.3]), torch.tensor([0.0, 0.3]))
    tensor([0.7311, 0.5000])
    """
    width = high - low
    if isinstance(
        width, torch.Tensor
    ):  # not looked at, which would wait for a device: equal scores are as likely
        width = width.clamp_min(torch.finfo(width.dtype).tiny)
    elif not width > 0:
        raise ValueError(f"high must exceed low, got low = {low}, high = {high}")
    return ((winner - loser) / width).sigmoid()


def mapo_score(error: torch.Tensor, k: float = 0.5) -> torch.Tensor:
    """h(e) = k e / (exp(k e) - 1), falling from 1 at e = 0: MaPO's likelihood of a sample by its error.

    >>> mapo_score(torch.tensor([0.0, 2.0])).round(decimals=4)
    tensor([1.0000, 0.5820])
    """
    x = k * error
    small = x < 1e-3  # there the series is right to a part in 1e15
    away = torch.where(small, 1.0, x)
    return torch.where(small, 1 - x / 2 + x * x / 12, away * torch.exp(-away) / -torch.expm1(-away))


def mapo_loss(
    winner: torch.Tensor, loser: torch.Tensor, beta: float = 0.1, k: float = 0.5, horizon: float = 1000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """MaPO (2406.06424): (loss, u (B,)), u = T [h(e_w) - h(e_l)]: supervised on winners, and a margin; no reference.

    >>> loss, u = mapo_loss(torch.ones(1), torch.ones(1))
    >>> round(loss.item(), 4), u.item()                                         # 1 + 0.1 log 2
    (1.0693, 0.0)
    """
    u = horizon * (mapo_score(winner, k) - mapo_score(loser, k))
    return winner.mean() + beta * dpo_loss(u), u
