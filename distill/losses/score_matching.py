"""Score implicit matching, SIM (2410.16794), and score identity distillation, SiD (2404.04057).

SIM's gradient is that of  E_{x_t ~ sg[q_t]} d(S_f - S_r)  for a distance d of scores, by way of the loss

    L = - E[ d'(y)^T (S_f - grad log q(x_t | x0)) ],        y = S_f - S_r,

where the networks' parameters are constants while x_t carries the student's graph *through both networks' inputs*:
D_r and D_f must be computed with gradients to x_t. In x0 form both factors are (alpha / sigma^2) times (D_f - D_r) and
(D_f - x0); the powers of alpha / sigma^2 belong to the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...models.paths import Times, coefficient

Distance = Callable[[torch.Tensor], torch.Tensor]


def distance_slope(y: torch.Tensor, distance: str | Distance = "huber", c: float = 0.03) -> torch.Tensor:
    """d'(y), (B, ...); the graph through y is kept.

    ``l2``: d = |y|^2. ``huber``: d = sqrt(|y|^2 + C^2) - C, the paper's choice, C = c sqrt(n) for n elements a
    sample. ``log``: d = log(1 + |y|^2 / C^2) / 2. Or a function (B, n) -> (B,), differentiated by autograd.
    """
    flat = y.flatten(1)
    width = c * math.sqrt(flat.shape[1])
    if callable(distance):
        point = flat if flat.requires_grad else flat.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(distance(point).sum(), point, create_graph=True)
        return slope.reshape(y.shape)
    if distance == "l2":
        return 2 * y
    if distance == "huber":
        return y / coefficient((flat.square().sum(1) + width**2).sqrt(), y)
    if distance == "log":
        return y / coefficient(flat.square().sum(1) + width**2, y)
    raise ValueError(f"distance must be 'l2', 'huber', 'log' or a function (B, n) -> (B,), got {distance!r}")


def sim_loss(
    x0: torch.Tensor,
    real: torch.Tensor,
    fake: torch.Tensor,
    distance: str | Distance = "huber",
    c: float = 0.03,
    weight: Times | None = None,
) -> torch.Tensor:
    """- mean_B w d'(D_f - D_r)^T (D_f - x0), a sum over each sample's elements; all (B, ...), with their graphs.

    ``weight`` (B,): None is 1 in x0 units. With ``l2`` and w = (alpha / sigma^2)^2 the gradient is exactly that of the
    squared score difference. The value may be negative.

    >>> x0, real, fake = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> float(sim_loss(x0, real, fake, "l2"))               # -2 (D_f - D_r) (D_f - x0) = -2 * 1 * 2
    -4.0
    """
    _same_shape(x0, real, fake)
    terms = -(distance_slope(fake - real, distance, c) * (fake - x0)).flatten(1).sum(1)
    if weight is not None:
        terms = coefficient(weight, terms) * terms
    return terms.mean()


def sid_loss(
    x0: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, alpha: float = 1.2, weight: str | Times = "sid"
) -> torch.Tensor:
    """SiD's loss, mean_B w (D_r - D_f)^T ((D_r - x0) - alpha (D_r - D_f)), with the graphs of D_r and D_f.

    At alpha = 1 it is half of ``sim_loss(distance="l2")``. Weight ``sid``: 1 / max(mean|x0 - D_r|, 1e-5), as released.

    >>> x0, real, fake = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> float(sid_loss(x0, real, fake, alpha=1.0, weight=1.0))
    -2.0
    """
    _same_shape(x0, real, fake)
    if isinstance(weight, str):
        if weight != "sid":
            raise ValueError(f"weight must be 'sid' or numbers, got {weight!r}")
        weight = 1 / (x0 - real).detach().abs().float().flatten(1).mean(1).clamp_min(1e-5)
    terms = ((real - fake) * ((real - x0) - alpha * (real - fake))).flatten(1).sum(1)
    return (coefficient(weight, terms) * terms).mean()


def _same_shape(x0: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> None:
    if not x0.shape == real.shape == fake.shape:
        shapes = ", ".join(str(tuple(v.shape)) for v in (x0, real, fake))
        raise ValueError(f"x0, real and fake must have one shape, got {shapes}")
