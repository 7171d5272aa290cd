"""sCM (2410.11081): consistency in continuous time on the circle, x_s = cos(s) x0 + sin(s) z with z ~ N(0, sd^2).

Every Gaussian path is this one on another clock and another scale: tan(s) = sigma / (sd alpha), x_t = k x_s with
k^2 = alpha^2 + (sigma / sd)^2. The consistency function is written f = cos(s) x_s - sin(s) sd F; with EDM's
preconditioning, F is the network's output but for its sign. Along the ODE, whose velocity is dx/ds,

    df/ds = - cos(s) (sd F - dx/ds) - sin(s) (x_s + sd dF/ds)

must vanish, and F is moved against it:

    loss = w |F - sg[F + g]|^2,      g = cos(s) df/ds, its second term faded in, normalised to g / (|g| + c)
"""

from __future__ import annotations

from typing import Any

import torch

from ...models.denoiser import Denoiser
from ...models.paths import Path, Times, coefficient


def angle_of(path: Path, t: Times, sigma_data: float) -> torch.Tensor:
    """s in (0, pi/2) of a path's time, float64.

    >>> from fewstep.models import paths
    >>> round(float(angle_of(paths.edm(), 0.5, 0.5)), 6)                # pi / 4
    0.785398
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    return torch.atan2(path.sigma(t), path.alpha(t) * sigma_data)


def time_of(path: Path, s: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """The path's time of an angle, float64, differentiable along s."""
    return path.time(-torch.log(sigma_data * torch.tan(s.double())))


def stretch(path: Path, t: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """k in x_t = k x_s, float64."""
    alpha, sigma = path.alpha(t), path.sigma(t) / sigma_data
    return torch.sqrt(alpha * alpha + sigma * sigma)


def trig_output(d: Denoiser, x: torch.Tensor, s: torch.Tensor, **cond: Any) -> torch.Tensor:
    """F of a Denoiser on any path, at x_s (B, ...) and s (B,): f = cos(s) x_s - sin(s) sd F is its estimate of x0.

    >>> from fewstep.models import paths
    >>> d = Denoiser(lambda x, tau: x + 7, paths.edm(), predicts="x0", precond="edm")
    >>> trig_output(d, torch.ones(1, 1), torch.tensor([0.3])).round(decimals=4)     # - network(x_s / sd)
    tensor([[-9.]])
    """
    s, sd = s.double(), d.sigma_data
    t = time_of(d.path, s, sd)
    k = stretch(d.path, t, sd)
    affine = d.affine(t, "x0")
    if affine is None:
        raise TypeError(f"d must be a Denoiser over one network, got {type(d).__name__}")
    p, (q,) = affine
    across = sd * torch.sin(s)
    (output,) = d.raw(coefficient(k, x) * x, t, **cond)
    # the two terms of x_s cancel at small s: in float64, before they meet x_s
    own = coefficient((torch.cos(s) - p * k) / across, x)
    return own * x - coefficient(q / across, x) * output.to(x.dtype)


def trig_velocity(x: torch.Tensor, x0: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """dx/ds = (cos(s) x_s - x0) / sin(s) of the ODE whose estimate of x0 is given; of data, cos(s) z - sin(s) x0."""
    return (coefficient(torch.cos(s), x) * x - x0) / coefficient(torch.sin(s), x)


def consistency_tangent(
    x: torch.Tensor,
    s: torch.Tensor,
    output: torch.Tensor,
    change: torch.Tensor,
    velocity: torch.Tensor,
    sigma_data: float,
    share: float = 1.0,
) -> torch.Tensor:
    """g = cos(s) df/ds (B, ...), for F (``output``) and its derivative along the ODE times cos(s) sin(s) (``change``).

    So scaled, the derivative stays finite at both ends of the circle. ``share`` of the second term (the warm-up): at 0
    F is led to the velocity, at 1 to consistency.
    """
    if not x.shape == output.shape == change.shape == velocity.shape:
        shapes = ", ".join(str(tuple(v.shape)) for v in (x, output, change, velocity))
        raise ValueError(f"x, output, change and velocity must have one shape, got {shapes}")
    cos, sin = coefficient(torch.cos(s), x), coefficient(torch.sin(s), x)
    first = -cos * cos * (sigma_data * output - velocity)
    return first - share * (cos * sin * x + sigma_data * change)


def normalised(g: torch.Tensor, c: float = 0.1) -> torch.Tensor:
    """g / (|g| + c), the norm a root mean square over a sample, so that c means the same in every dimension.

    >>> normalised(torch.tensor([[3.0, 3.0]]), c=1.0)
    tensor([[0.7500, 0.7500]])
    """
    size = g.flatten(1).square().mean(1).sqrt()
    return g / (coefficient(size, g) + c)


def scm_loss(output: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """|F - sg[F + g]|^2 / n, one number a sample (B,): its value is |g|^2 / n, its gradient - 2 g / n."""
    if output.shape != tangent.shape:
        raise ValueError(
            f"tangent must have output's shape {tuple(output.shape)}, got {tuple(tangent.shape)}"
        )
    return (output - (output + tangent).detach()).square().flatten(1).mean(1)
