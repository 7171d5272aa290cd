"""Conditional score distillation, Distilled Decoding 2 (2510.21003): one score a place, given the places before it.

A sample is n places x_1 .. x_n of d numbers, and a teacher knows E[x_i | x_i at noise, x_<i] at each (for an
autoregressive model of codewords in closed form, ``models.codebook.codeword_mean``): D_r. A critic D_f learns the same
of the student's samples. With s = (alpha D - x_t) / sigma^2 the paper's loss is

    E sum_i d(s_r(x_t,i; sg x_<i) - s_f(x_t,i; sg x_<i)),

SiD's d, no gradient to what stands before. Where all conditionals agree the joint laws do, by the chain rule.

Everything here takes places (B, n, d) and levels of one number a place (B, n), one a sample, or one for all. That
places are normalised one by one, rather than a sample as a whole, is a choice of ours: what the paper does was not to
be found out, and its code was not released.
"""

from __future__ import annotations

import torch

from ...models.codebook import check_sigma
from ...models.paths import Times, coefficient
from .denoising import denoising_loss
from .dmd import dmd_gradient
from .score_matching import sid_loss
from .surrogate import surrogate

DISTANCES = ("sid", "dmd")


def conditional_score(estimate: torch.Tensor, x_t: torch.Tensor, alpha: Times, sigma: Times) -> torch.Tensor:
    """(alpha D - x_t) / sigma^2, the gradient of log p(x_t,i | x_<i) at every place.

    >>> conditional_score(torch.ones(1, 2, 1), torch.zeros(1, 2, 1), 0.5, 0.5).flatten()
    tensor([2., 2.])
    """
    _check(estimate, x_t)
    sigma = coefficient(check_sigma(sigma), x_t)
    return (coefficient(alpha, x_t) * estimate - x_t) / sigma**2


def conditional_critic_loss(
    estimate: torch.Tensor, target: torch.Tensor, alpha: Times, sigma: Times, weight: str = "flow"
) -> torch.Tensor:
    """mean w |D(x_t,i; x_<i) - sg target|^2 over samples, places and their elements, w as in ``x0_weight``.

    The target is the student's x0 for a critic (the paper's FCS loss), and the teacher's D_r for the start of critic
    and student (its GTS loss, the same regression without the noise of x0).
    """
    _check(estimate, target)
    places = estimate.flatten(0, 1)
    alpha, sigma = _each(alpha, estimate), _each(sigma, estimate)
    return denoising_loss(places, target.flatten(0, 1), alpha, sigma, weight)


def conditional_distillation_loss(
    x0: torch.Tensor,
    real: torch.Tensor,
    fake: torch.Tensor,
    distance: str = "sid",
    alpha: float = 1.0,
    groups: str = "place",
) -> torch.Tensor:
    """The student's loss, a mean over samples, places and elements.

    ``sid``: w (D_r - D_f)^T ((D_r - x0) - alpha (D_r - D_f)), the paper's form, whose D_r and D_f carry graphs to x_t;
    ``dmd``: the scalar with the gradient w (D_f - D_r), which needs none. w = 1 / mean|x0 - D_r|, the mean over each
    place (``groups="place"``) or each sample (``"sample"``).

    >>> x0 = torch.zeros(1, 1, 2, requires_grad=True)
    >>> real, fake = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 3.0]]])
    >>> conditional_distillation_loss(x0, real, fake, "dmd").backward()
    >>> x0.grad                                             # (D_f - D_r) / mean|x0 - D_r| / 2 elements
    tensor([[[0.2500, 0.0000]]])
    """
    _check(x0, real)
    _check(x0, fake)
    if groups not in ("place", "sample"):
        raise ValueError(f"groups must be 'place' or 'sample', got {groups!r}")
    if groups == "place":
        x0, real, fake = (value.flatten(0, 1) for value in (x0, real, fake))
    if distance == "sid":
        return sid_loss(x0, real, fake, alpha, _steady(x0, real)) / x0[0].numel()
    if distance == "dmd":
        return surrogate(x0, dmd_gradient(x0, real, fake))
    raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")


def _steady(x0: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """1 / mean|x0 - D_r|, without its blow-up where a place is at the teacher's estimate already, as DMD's here."""
    error = (x0 - real).detach().abs().flatten(1).mean(1)
    return 1 / torch.maximum(error, x0.detach().square().flatten(1).mean(1).sqrt() * 1e-2).clamp_min(1e-6)


def _each(value: Times, places: torch.Tensor) -> Times:
    """A level of every place, flat: (B, n) -> (B n,)."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    value = value if value.ndim == 2 else value[:, None]
    return value.expand(places.shape[:2]).flatten()


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(
            f"estimates, samples and targets must have one shape (B, n, d), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
