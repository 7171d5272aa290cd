"""The denoising regression that trains teachers and critics: a weighted error of the estimate of x0.

An error e of x0 is an error -(alpha / sigma) e of eps, and so on for every target, so a choice of target is a weight:

    target    weight on |D - x0|^2
    x0        1
    eps       (alpha / sigma)^2
    flow      (1 + alpha / sigma)^2                    eps - x0
    v         (alpha^2 / sigma + sigma)^2              alpha eps - sigma x0 (2202.00512)
    score     (alpha / sigma^2)^2
    edm       ((sigma / alpha)^2 + sd^2) / (sd sigma / alpha)^2        2206.00364; DMD2's Karras weight
    min_snr   min((alpha / sigma)^2, 5)                2303.09556
"""

from __future__ import annotations

import torch

from ...models.paths import Times, coefficient

WEIGHTS = ("x0", "eps", "flow", "v", "score", "edm", "min_snr")


def x0_weight(name: str, alpha: Times, sigma: Times, sigma_data: float = 0.5) -> Times:
    """The weight that makes an error of x0 one of the target; numbers or one a sample, in what they came in.

    >>> x0_weight("flow", 0.5, 0.5)
    4.0
    """
    if name == "x0":
        return alpha * 0 + 1.0
    if name == "eps":
        return (alpha / sigma) ** 2
    if name == "flow":
        return (1 + alpha / sigma) ** 2
    if name == "v":
        return (alpha * alpha / sigma + sigma) ** 2
    if name == "score":
        return (alpha / sigma**2) ** 2
    if name == "edm":
        rho = sigma / alpha
        return (rho * rho + sigma_data**2) / (rho * sigma_data) ** 2
    if name == "min_snr":
        snr = (alpha / sigma) ** 2
        return snr.clamp(max=5.0) if isinstance(snr, torch.Tensor) else min(snr, 5.0)
    raise ValueError(f"weight must be one of {', '.join(WEIGHTS)}, got {name!r}")


def denoising_loss(
    estimate: torch.Tensor,
    x0: torch.Tensor,
    alpha: Times,
    sigma: Times,
    weight: str = "edm",
    sigma_data: float = 0.5,
) -> torch.Tensor:
    """mean w |D(x_t) - sg[x0]|^2 over samples and elements; D's estimate and x0 (B, ...).

    >>> float(denoising_loss(torch.ones(2, 3), torch.zeros(2, 3), 0.5, 0.5, "eps"))
    1.0
    """
    if estimate.shape != x0.shape:
        raise ValueError(f"estimate must have x0's shape {tuple(x0.shape)}, got {tuple(estimate.shape)}")
    error = (estimate - x0.detach()).square()
    return (coefficient(x0_weight(weight, alpha, sigma, sigma_data), error) * error).mean()
