"""First-hitting sampling of masked diffusion models (2409.02908): one token a network call, without a time grid.

Of n tokens that are hidden at time t, each on its own, the first is revealed at

    t' = alpha^{-1}( 1 - (1 - alpha(t)) u^{1/n} ),          u ~ U(0, 1),

at any of the n positions alike; its token is drawn from what the network says just then. That is the reverse process
itself, as ancestral sampling would be with infinitely many steps, in exactly n calls and n categorical draws.

``parallel=K`` reveals K at a call, which takes what K tokens are, given the others, to be independent. ``order=2`` (the
paper's extrapolation) draws the later of them from probabilities that are extrapolated in time through the last two
calls, by a line, cut at 0. The paper also has a predictor-corrector that is not here: its text leaves open what the
network is to say of tokens that it sees.

>>> from fewstep.models.masked import from_joint
>>> model = from_joint(torch.tensor([[0.5, 0.0], [0.0, 0.5]]))    # two bits that are always equal
>>> x, info = first_hitting(model, 1000)
>>> bool((x[:, 0] == x[:, 1]).all()), info.calls
(True, 2)
>>> x, info = first_hitting(model, 1000, parallel=2)              # one call: as if they were independent
>>> bool(((x[:, 0] == x[:, 1]).double().mean() - 0.5).abs() < 0.08), info.calls
(True, 1)
>>> first_hitting(model, torch.tensor([[1, model.mask], [0, 0]]))[0].tolist()
[[1, 1], [0, 0]]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..models.masked import MaskedModel
from .noise import Seed
from .unmasking import Groups, Info, Request, hits, request, unmask


def first_hitting(
    model: MaskedModel,
    prompt: torch.Tensor | int,
    *,
    cond: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    ids: torch.Tensor | None = None,
    parallel: int = 1,
    order: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    progress: bool = False,
) -> tuple[torch.Tensor, Info]:
    """Tokens (B, L), int64, and how they were revealed (``Info``).

    Args:
        prompt: how many samples, or tokens (B, L) of which those that are ``model.mask`` are to be drawn; the others
            stay. Samples without masks are returned as they are; where none has one, no call is made.
        cond: keyword arguments of the model, a row a sample: ``{"label": labels}``.
        seed, ids: key all randomness; ids are 0 .. B - 1 unless given, so a batch may be split freely.
        parallel: tokens a call; B sequences with at most n masks need ceil(n / parallel) calls.
        order: 1, or 2: extrapolate within a call's tokens. Of no effect on one token a call.
        temperature: logits are divided by it. top_p: the smallest set of tokens with that probability is drawn from.
    """
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise ValueError(f"parallel must be an int of 1 or more, got {parallel!r}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    asked = request(model, prompt, seed, ids, cond, temperature, top_p)
    return unmask(model, asked, singly(model, asked, parallel), order, progress)


def singly(model: MaskedModel, asked: Request, parallel: int = 1) -> Groups:
    """Groups of ``parallel`` positions in the order of their times; the network is asked at the first one's."""
    positions, share, n = hits(model, asked)
    times = model.schedule.time(1 - share)
    most = int(n.max()) if len(n) else 0  # the one look at the device
    start = torch.arange(0, most, parallel, device=n.device).expand(len(n), -1)
    count = (n[:, None] - start).clamp(0, parallel)
    width = [min(parallel, most - first) for first in range(0, most, parallel)]
    return Groups(positions, times, start, count, times.gather(1, start), width)
