"""MeanFlow (2505.13447): an average velocity u(x_t, r, t) that obeys its own identity, without integrating anything.

The average velocity from t down to r of a flow with velocity v satisfies

    u(x_t, r, t) = v(x_t, t) - (t - r) d/dt u(x_t, r, t),            d/dt u = (v . grad_x) u + partial_t u    (r fixed)

and is regressed onto the right hand side, all of it held fixed. At r = t this is flow matching. The velocity may be a
teacher's, or the conditional eps - x0 of data, whose mean it is: the identity is linear in it.
"""

from __future__ import annotations

import torch

from ...models.paths import Times, coefficient


def mean_flow_target(velocity: torch.Tensor, change: torch.Tensor, gap: Times) -> torch.Tensor:
    """v - (t - r) du/dt: what u is to be; v and du/dt (B, ...), gap = t - r one for all or one a sample.

    >>> mean_flow_target(torch.ones(1, 2), torch.full((1, 2), 4.0), 0.25)
    tensor([[0., 0.]])
    """
    if velocity.shape != change.shape:
        raise ValueError(
            f"change must have velocity's shape {tuple(velocity.shape)}, got {tuple(change.shape)}"
        )
    return (velocity - coefficient(gap, change) * change).detach()


def guided_velocity(
    velocity: torch.Tensor,
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    guidance: float,
    mix: float = 0.0,
) -> torch.Tensor:
    """omega v + kappa u_c + (1 - omega - kappa) u_0: data's velocity with guidance in it, by the student's own answers.

    u_c and u_0 are u(x_t, t, t) with and without the condition; kappa = ``mix`` of the field learnt so far, and omega =
    (1 - kappa) ``guidance``, so that the field guided by ``guidance`` is the fixed point for every kappa.

    >>> v, u0 = torch.tensor([2.0]), torch.tensor([1.0])
    >>> guided = 1 + 3.0 * (v - u0)
    >>> [float(guided_velocity(v, guided, u0, 3.0, mix)) for mix in (0.0, 0.5)]
    [4.0, 4.0]
    """
    if not 0 <= mix < 1:
        raise ValueError(f"mix must lie in [0, 1), got {mix!r}")
    omega = (1 - mix) * guidance
    return omega * velocity + mix * conditional + (1 - omega - mix) * unconditional


def mean_flow_loss(
    average: torch.Tensor, target: torch.Tensor, power: float = 1.0, c: float = 1e-3
) -> torch.Tensor:
    """mean_B sg[w] |u - sg[target]|^2,  w = 1 / (|u - target|^2 + c)^power, squares summed over a sample's elements.

    ``power``: 0 is least squares, 1/2 about a Huber norm; the paper's choice is 1 on ImageNet and 0.75 on CIFAR-10.

    >>> float(mean_flow_loss(torch.full((1, 4), 3.0), torch.zeros(1, 4), power=0.0))
    36.0
    """
    if average.shape != target.shape:
        raise ValueError(
            f"target must have average's shape {tuple(average.shape)}, got {tuple(target.shape)}"
        )
    square = (average - target.detach()).square().flatten(1).sum(1)
    return (square / (square.detach() + c) ** power).mean()
