"""Discrete consistency (CM, 2303.01469) as it is tuned easily (ECT, 2406.14548): f(x_t, t) = sg[f(x_r, r)], r < t.

x_t and x_r lie on one trajectory: they share their noise (from data), or x_r is a step of a teacher's ODE away. The
step is long at first, r = 0, where this is denoising, and shortens stage by stage, in the noise level rho:

    rho_r = rho_t (1 - n(rho_t) / q^stage),        n(rho) = 1 + k sigmoid(- b rho),        stage = 1, 2, ...
"""

from __future__ import annotations

import torch

from ...models.paths import Times, coefficient


def next_level(rho: torch.Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> torch.Tensor:
    """rho_r of rho_t, 0 where the step would lead below it; k = 0 is a constant ratio.

    >>> next_level(torch.tensor([1.0, 80.0]), stage=2, k=0.0)
    tensor([ 0.7500, 60.0000])
    >>> next_level(torch.tensor([0.1, 80.0]), stage=1)            # n is large at small rho: the first stage denoises
    tensor([ 0., 40.])
    """
    if stage < 1:
        raise ValueError(f"stage must be 1 or more, got {stage!r}")
    if not q > 1:
        raise ValueError(f"q must be greater than 1, got {q!r}")
    return rho * (1 - (1 + k * torch.sigmoid(-b * rho)) / q**stage).clamp_min(0)


def ode_step(
    x: torch.Tensor,
    eps: torch.Tensor,
    alpha: Times,
    sigma: Times,
    alpha_r: Times,
    sigma_r: Times,
) -> torch.Tensor:
    """x_r = (alpha_r / alpha) x + (sigma_r - sigma alpha_r / alpha) eps: Euler in rho where eps is the one at x_t.

    With the mean of that and the one at where Euler leads it is Heun's step, the paper's.

    >>> ode_step(torch.tensor([[5.0]]), torch.tensor([[2.0]]), 1.0, 2.0, 1.0, 0.0)       # x0 = x - sigma eps
    tensor([[1.]])
    """
    ratio = alpha_r / alpha
    return coefficient(ratio, x) * x + coefficient(sigma_r - sigma * ratio, x) * eps


def consistency_loss(
    late: torch.Tensor, early: torch.Tensor, weight: Times = 1.0, c: float = 1e-6
) -> torch.Tensor:
    """mean_B w (sqrt(|f_t - sg f_r|^2 + c^2) - c), squares summed over a sample; f_t = ``late``, f_r = ``early``.

    For c far below the error it is ECT's norm, and iCT's pseudo-Huber (2310.14189) at c = 0.00054 sqrt(n). c = 0 has no
    gradient where the two agree.

    >>> float(consistency_loss(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), c=12.0))
    1.0
    """
    if late.shape != early.shape:
        raise ValueError(f"early must have late's shape {tuple(late.shape)}, got {tuple(early.shape)}")
    if not c > 0:
        raise ValueError(f"c must be positive, got {c!r}")
    square = (late - early.detach()).square().flatten(1).sum(1)
    terms = (square + c * c).sqrt() - c
    return (coefficient(weight, terms) * terms).mean()
