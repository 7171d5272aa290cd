"""The GAN beside a distribution-matching loss (DMD2, 2405.14867), and R1 penalties on its discriminator.

    L_G = softplus(-l(x_t)),     L_D = softplus(l(fake_t)) + softplus(-l(real_t))

with logits l that are high for real data, taken at a noise level t of both. At its optimum l = log p_t - log q_t, which
f-distill reads as a density ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import softplus


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """mean softplus(-l); logits of any shape.

    >>> round(float(generator_loss(torch.zeros(3))), 4)
    0.6931
    """
    return softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """mean softplus(l_fake) + mean softplus(-l_real); log 4 where it knows nothing."""
    return softplus(fake_logits.float()).mean() + softplus(-real_logits.float()).mean()


def approximate_r1(
    discriminator: Callable[[torch.Tensor], torch.Tensor],
    x_t: torch.Tensor,
    scale: float = 0.01,
    noise: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """mean (l(x_t + scale noise) - l(x_t))^2: R1 by a finite difference (2501.08316), no second derivatives.

    Both logits are of the *noised* real data at one level t, so the penalty vanishes with ``scale``. (FastGen perturbs
    the clean data and calls that x_t: its penalty does not.) Divided by scale^2 it tends to the mean of |grad l|^2.
    """
    noise = torch.randn_like(x_t) if noise is None else noise
    logits = discriminator(x_t) if logits is None else logits
    return (discriminator(x_t + scale * noise) - logits).float().square().mean()


def gradient_r1(discriminator: Callable[[torch.Tensor], torch.Tensor], x_t: torch.Tensor) -> torch.Tensor:
    """mean_B |grad_x l(x_t)|^2 (1801.04406), with a graph for the discriminator's parameters.

    >>> float(gradient_r1(lambda x: 3 * x.sum(1), torch.zeros(4, 2)))          # gradient (3, 3)
    18.0
    """
    point = x_t.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(discriminator(point).float().sum(), point, create_graph=True)
    return slope.flatten(1).square().sum(1).mean()
