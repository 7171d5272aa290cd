"""Distribution matching distillation, DMD (2311.18828) and DMD2 (2405.14867): the gradient of a reverse KL.

    grad_x0 KL(q_t || p_t) = alpha (S_f - S_r)(x_t) = (alpha / sigma)^2 (D_f - D_r)

with S the scores of student (f: the critic's) and teacher (r). DMD takes the schedule's factor out and normalises every
sample by the teacher's own error, g = (D_f - D_r) / mean|x0 - D_r|.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...models.paths import Times, coefficient

Weight = Callable[[torch.Tensor, torch.Tensor, Times, Times], torch.Tensor]


def dmd_gradient(
    x0: torch.Tensor,
    real: torch.Tensor,
    fake: torch.Tensor,
    alpha: Times = 1.0,
    sigma: Times = 1.0,
    weight: str | Weight = "dmd",
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """g (B, ...) = w (D_f - D_r), without a graph.

    ``real`` is D_r after guidance, ``fake`` is D_f without. ``scale`` (B,) multiplies the weight: f-distill's h.

    ``weight`` says w, one number a sample:

    - ``dmd``: 1 / max(mean|x0 - D_r|, rms(x0) / 1000). The others' divisor without its blow-up where x0 is near D_r.
    - ``dmd2``: 1 / mean|x0 - D_r|, non-finite entries of g set to 0 or the largest float, as its released code does.
    - ``fastgen``: 1 / (mean|x0 - D_r| + 1e-6).
    - ``printed``: alpha times that of ``dmd2``: what DMD's printed formula comes to. The released code has no alpha.
    - ``kl``: (alpha / sigma)^2, the reverse KL itself.
    - or your own ``w(x0, D_r, alpha, sigma)``.

    >>> g = dmd_gradient(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 3.0]]))
    >>> g                                                   # D_f - D_r = (1, 0), mean|x0 - D_r| = 2
    tensor([[0.5000, 0.0000]])
    """
    if not x0.shape == real.shape == fake.shape:
        shapes = ", ".join(str(tuple(v.shape)) for v in (x0, real, fake))
        raise ValueError(f"x0, real and fake must have one shape, got {shapes}")
    x0, real, fake = (v.detach().to(torch.promote_types(v.dtype, torch.float32)) for v in (x0, real, fake))
    difference = fake - real
    if callable(weight):
        w = weight(x0, real, alpha, sigma)
    elif weight == "kl":
        w = (alpha / sigma) ** 2
    elif weight in ("dmd", "dmd2", "fastgen", "printed"):
        error = (x0 - real).abs().flatten(1).mean(1)
        if weight == "dmd":
            error = torch.maximum(error, x0.square().flatten(1).mean(1).sqrt() * 1e-3).clamp_min(1e-12)
        elif weight == "fastgen":
            error = error + 1e-6
        w = 1 / error
        if weight == "printed":
            w = w * alpha
    else:
        raise ValueError(
            f"weight must be 'dmd', 'dmd2', 'fastgen', 'printed', 'kl' or a function, got {weight!r}"
        )
    if scale is not None:
        w = w * scale.detach()
    gradient = difference * coefficient(w, difference)
    return torch.nan_to_num(gradient) if weight == "dmd2" else gradient
