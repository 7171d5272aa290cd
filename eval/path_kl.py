"""How far a tuned model is from its base: the KL divergence of their sampling paths.

Two models that step by one stochastic table from the same noise are Markov chains, and the divergence of what they draw
is at most that of their whole paths,

    KL(tuned | base) = E sum_r  gain_r^2 |D_tuned(x_r) - D_base(x_r)|^2 / (2 std_r^2),       x of the tuned one's paths,

exact for the table, whatever its steps. If each model is the exact denoiser of its own law, fine steps make it the KL
of the two laws themselves, from above. Steps that draw no noise, as the last one to x0, are left out. Of networks the
last noisy steps are most of it: what differs there is finer than anybody sees, and little noise makes much of it. With
``level`` the paths end there, and the divergence bounds that of samples under noise of so much (sigma / alpha).

>>> from fewstep.models import GaussianMixture, paths
>>> from fewstep.samplers import ddim, grids, starting_noise
>>> base, tuned = (GaussianMixture([1.0], [[m]], 1.0).denoiser(paths.vp_linear()) for m in (0.0, 1.0))
>>> table = ddim(base.path, grids.vp(base.path, 400), eta=1.0)
>>> found = path_kl(tuned, base, starting_noise(0, 100, (1,)).double(), table)
>>> round(found.value, 2)                                    # of N(1, 1) from N(0, 1): 1/2
0.51
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..models.denoiser import Denoiser
from ..samplers.loop import init
from ..samplers.noise import STEP, normal
from ..samplers.table import Table
from ..samplers.transitions import transitions


class PathKL(NamedTuple):
    """In nats, with the standard error of the mean; ``steps``: each call's share; ``samples``: the paths' ends."""

    value: float
    error: float
    steps: list[float]
    samples: torch.Tensor


@torch.no_grad()
def path_kl(
    tuned: Denoiser,
    base: Denoiser,
    noise: torch.Tensor,
    table: Table,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    level: float = 0.0,
) -> PathKL:
    """See the module. ``noise`` (B, ...): standard normals; two network calls a step."""
    if not level >= 0:
        raise ValueError(f"level must be a noise level sigma / alpha, 0 or more, got {level!r}")
    cond = cond or {}
    chain = transitions(table.on(tuned, noise.device))
    ends = [float(tuned.path.rho(step.t)) for step in chain[1:]] + [0.0]
    chain = [step for step, end in zip(chain, ends, strict=True) if end >= level * (1 - 1e-9)]
    if not chain:
        raise ValueError(
            f"level must lie below {ends[0]:.4g}, the end of the table's first step, got {level}"
        )
    state = init(table, noise, ids, seed=seed)
    x, shares = state.x, []
    for step in chain:
        x0 = tuned(x, step.t, **cond)
        if step.std > 0:
            shares.append(step.divergence(x0, base(x, step.t, **cond)).double())
        else:
            shares.append(torch.zeros(len(x), dtype=torch.float64, device=x.device))
        x = step.mean(x, x0)
        if step.std > 0:
            x = x + step.std * normal(seed, state.ids, x.shape[1:], step.row + 1, STEP, x.dtype)
    each = torch.stack(shares)
    total = each.sum(0)
    return PathKL(float(total.mean()), float(total.std() / len(total) ** 0.5), each.mean(1).tolist(), x)
