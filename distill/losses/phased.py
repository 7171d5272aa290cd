"""Phased DMD (2510.27684): a student that stops at noise level s, matched to the teacher's marginal p_s.

From s to t > s the forward process is

    x_t = a x_s + sqrt(v) eps,      a = alpha_t / alpha_s,      v = sigma_t^2 - a^2 sigma_s^2.

A critic of the student's marginals can be trained from (x_s, eps) alone, without x0: E[-eps / sqrt(v) | x_t] is the
score at t, and every other target follows from it. The naive target eps - x_s is biased.
"""

from __future__ import annotations

import torch

from ...models.paths import Times, coefficient
from .dmd import dmd_gradient


def phased_kernel(alpha_t: Times, sigma_t: Times, alpha_s: Times, sigma_s: Times) -> tuple[Times, Times]:
    """(a, v) of x_t = a x_s + sqrt(v) eps; the difference of squares is factored, since t may be near s.

    >>> phased_kernel(0.2, 0.8, 0.5, 0.5)                     # flow, from 0.5 to 0.8
    (0.4, 0.6000000000000001)
    """
    a = alpha_t / alpha_s
    return a, (sigma_t - a * sigma_s) * (sigma_t + a * sigma_s)


def phased_target(
    kind: str,
    x_s: torch.Tensor,
    eps: torch.Tensor,
    alpha_t: Times,
    sigma_t: Times,
    alpha_s: Times,
    sigma_s: Times,
) -> torch.Tensor:
    """The regression target at t whose mean given x_t is the marginal's own prediction; x_s, eps (B, ...).

    ``kind``: eps, x0, flow (eps - x0), v (alpha eps - sigma x0) or score. At s = 0 they are the ordinary targets.
    """
    a, v = phased_kernel(alpha_t, sigma_t, alpha_s, sigma_s)
    r = v**0.5
    wide = [coefficient(value, x_s) for value in (a, v, r, alpha_t, sigma_t)]
    a, v, r, alpha, sigma = wide
    noise = sigma / r * eps
    if kind == "eps":
        return noise
    if kind == "score":
        return -eps / r
    x0 = (a * x_s + r * eps * (1 - sigma * sigma / v)) / alpha
    if kind == "x0":
        return x0
    if kind == "flow":
        return noise - x0
    if kind == "v":
        return alpha * noise - sigma * x0
    raise ValueError(f"kind must be eps, x0, flow, v or score, got {kind!r}")


def phased_critic_loss(
    estimate: torch.Tensor,
    x_s: torch.Tensor,
    eps: torch.Tensor,
    alpha_t: Times,
    sigma_t: Times,
    alpha_s: Times,
    sigma_s: Times,
    cap: float = 10.0,
) -> torch.Tensor:
    """mean min(1, cap v) |F - target|^2 for F, the target of the flow eps - x0 given the critic's estimate D of x0.

    The target's variance grows as 1 / v when t nears s; the cap is the paper's clamp of 1 / v at 10. ``estimate`` is D:
    F = (x_t - (alpha_t + sigma_t) D) / sigma_t, so the error is (1 + alpha_t / sigma_t) times that of x0, which has no
    alpha_t in a denominator and stays finite at pure noise.
    """
    a, v = phased_kernel(alpha_t, sigma_t, alpha_s, sigma_s)
    r = v**0.5
    a_, r_, alpha, sigma = (coefficient(value, x_s) for value in (a, r, alpha_t, sigma_t))
    x_t = a_ * x_s + r_ * eps
    flow = (x_t - (alpha + sigma) * estimate) / sigma
    square, level = coefficient(sigma_s, x_s) ** 2, coefficient(alpha_s, x_s)
    # the target times sqrt(v), expanded so that no 1 / alpha_t is left in it
    residual = r_ * flow - (sigma + alpha * square / level**2) * eps + r_ / level * x_s
    weight = 1 / v
    weight = weight.clamp(max=cap) if isinstance(weight, torch.Tensor) else min(weight, cap)
    return (coefficient(weight, residual) * residual.square()).mean()


def phased_gradient(
    x_s: torch.Tensor,
    x_t: torch.Tensor,
    real: torch.Tensor,
    fake: torch.Tensor,
    alpha_t: Times,
    sigma_t: Times,
    alpha_s: Times,
    sigma_s: Times,
    weight: str = "kl",
) -> torch.Tensor:
    """g (B, ...) on x_s, without a graph, from the estimates D_r and D_f of x0 at x_t.

    - ``kl``, the paper's: (alpha_t / alpha_s) (S_f - S_r)(x_t) = (alpha_t / alpha_s) (alpha_t / sigma_t^2) (D_f - D_r).
      x_t is made from sg[x_s]: the factor a is in here and must not come in twice.
    - ``dmd``: DMD with x_s in the place of x0, (E_f - E_r) / mean|x_s - E_r| for E = E[x_s | x_t]
      = (a sigma_s^2 / sigma_t^2) x_t + (alpha_s v / sigma_t^2) D.
    - ``residual``: (D_f - D_r) / mean|D_f - D_r|.
    """
    x_s, x_t, real, fake = (
        u.detach().to(torch.promote_types(u.dtype, torch.float32)) for u in (x_s, x_t, real, fake)
    )
    difference = fake - real
    if weight == "kl":
        return coefficient(alpha_t / alpha_s * (alpha_t / sigma_t**2), difference) * difference
    if weight == "residual":
        size = difference.abs().flatten(1).mean(1).clamp_min(1e-12)
        return difference / coefficient(size, difference)
    if weight != "dmd":
        raise ValueError(f"weight must be 'kl', 'dmd' or 'residual', got {weight!r}")
    a, v = phased_kernel(alpha_t, sigma_t, alpha_s, sigma_s)
    from_noisy, from_clean = (
        coefficient(u, x_s) for u in (a * (sigma_s / sigma_t) ** 2, alpha_s * v / sigma_t**2)
    )
    means = [from_noisy * x_t + from_clean * estimate for estimate in (real, fake)]
    return dmd_gradient(x_s, *means)
