"""Score distillation into whatever can be rendered, x = render(theta): SDS, VSD, CSD/CSM and CDS, as gradients on x.

They answer g (B, ...), without a graph, for ``surrogate(x, g)``. eps_c and eps_u are the teacher's noise predictions at
x_t with and without the condition; w is the weight of the noise level, e.g. sigma_t^2.
"""

from __future__ import annotations

import torch

from ...models.denoiser import Denoiser
from ...models.paths import Times, coefficient


def score_distillation_gradient(
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    eps: torch.Tensor,
    guidance: float = 1.0,
    weight: Times = 1.0,
) -> torch.Tensor:
    """SDS (2209.14988): w (eps_u + s (eps_c - eps_u) - eps): a VSD whose critic knows the noise that was added.

    >>> one = torch.ones(1, 2)
    >>> score_distillation_gradient(2 * one, one, one, guidance=3.0)
    tensor([[3., 3.]])
    """
    return variational_gradient(unconditional + guidance * (conditional - unconditional), eps, weight)


def variational_gradient(guided: torch.Tensor, critic: torch.Tensor, weight: Times = 1.0) -> torch.Tensor:
    """VSD (2305.16213): w (eps_teacher - eps_critic), teacher after guidance, critic fitted to the renders."""
    return (coefficient(weight, guided) * (guided - critic)).detach()


def classifier_gradient(
    conditional: torch.Tensor, unconditional: torch.Tensor, weight: Times = 1.0
) -> torch.Tensor:
    """CSD (2310.19415): w (eps_c - eps_u), SDS without its noise; CSM (2410.21299) with x_t from ``invert``.

    For two classes that differ in their mean only, it is a constant drift: nothing in it says where to stop.
    """
    return variational_gradient(conditional, unconditional, weight)


@torch.no_grad()
def cds_gradient(
    d: Denoiser,
    x: torch.Tensor,
    noise: torch.Tensor,
    rho: float,
    rho_below: float,
    clip: float | None = None,
    sign: str = "code",
    **cond,
) -> torch.Tensor:
    """Consistency distillation sampling (Consistent3D, 2401.09050): one ODE step from *fixed* noise.

        z = x + rho noise,   z' = z + (rho' - rho) eps(z),   g = -(eps(z', rho') - eps(z, rho))

    in the variance-exploding scale, rho = sigma / alpha > rho'; ``noise`` is drawn once for all views and iterations.
    ``sign="code"`` is the released code's. The gradient of the consistency loss 1/2 |D - sg D'|^2 without the network's
    Jacobian is ``"loss"``: rho' (eps' - eps), of the opposite sign.
    """
    if not rho > rho_below > 0:
        raise ValueError(f"rho must exceed rho_below, and that 0, got {rho} and {rho_below}")

    def eps_at(z: torch.Tensor, level: float) -> torch.Tensor:
        t = float(d.path.time_of_rho(level))
        return d.eps(z * d.path.alpha(t), t, **cond)

    z = x + rho * noise
    above = eps_at(z, rho)
    below = eps_at(z + (rho_below - rho) * above, rho_below)
    if sign == "code":
        gradient = above - below
    elif sign == "loss":
        gradient = rho_below * (below - above)
    else:
        raise ValueError(f"sign must be 'code' or 'loss', got {sign!r}")
    return gradient if clip is None else gradient.clamp(-clip, clip)
