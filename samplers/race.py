"""The draw of common code for masked diffusion, in the precision it is given: what ``exact`` is held against.

At every step, for every hidden token, the tokens and the mask race: with q = ((1 - stay) p, stay) the winner is the
largest q_k / E_k, E_k = -log u_k. In float32 u is a multiple of 2^-24 below 1, so E is about a multiple of e = 2^-24
and never less than e. Against a mask of probability near 1 a token of probability q then wins with probability

    sum_{j >= 1} e exp(-j e / q) = e / (exp(e / q) - 1)          ( q - e / 2  for q >> e,  nothing for q << e )

The more steps, the smaller q = (1 - stay) p, and the more of the rare tokens are lost: a lower temperature that no one
asked for (2409.02908, section 5). That paper's closed form has E = e + Exp(1) in the place of the lattice, which loses
twice as much: q - e.

>>> q = torch.tensor([1e-9, 5e-8, 1e-6], dtype=torch.float64)
>>> [round(x, 3) for x in (lattice_odds(q) / q).tolist()]
[0.0, 0.52, 0.97]
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ..models.masked import MaskedModel
from .noise import words
from .unmasking import Info, Request, bar, nucleus

STREAM = 11  # of the noise; float64 takes its lower bits from the stream after it
LATTICE = 2.0**-24  # of uniforms in float32


def lattice_odds(q: torch.Tensor, spacing: float = LATTICE) -> torch.Tensor:
    """With what probability a token of probability q wins against near certainty, where E has that spacing."""
    return spacing / torch.expm1(spacing / q.clamp_min(1e-300)).clamp_min(1e-300) * (q > 0)


def uniforms(asked: Request, count: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, count), in [0, 1): multiples of 2^-24 in float32, of 2^-53 in float64, as ``torch.rand`` has them."""

    def bits(stream: int) -> torch.Tensor:
        drawn = words(asked.seed, asked.ids, -(-count // 4), step, stream)
        return torch.stack(drawn, dim=-1).flatten(1)[:, :count]

    if dtype == torch.float32:
        return (bits(STREAM) >> 8).float() * LATTICE
    return ((bits(STREAM) >> 5).double() * 2**26 + (bits(STREAM + 1) >> 6).double()) * 2.0**-53


def winners(q: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """argmax of q / -log u over the last axis, in their precision."""
    return (q / -u.log()).argmax(-1)


@torch.no_grad()
def race(
    model: MaskedModel, asked: Request, times: torch.Tensor, dtype: torch.dtype, progress: bool = False
) -> tuple[torch.Tensor, Info]:
    """Ancestral sampling by that draw. The network is asked for the samples that the last step changed, which takes a
    look at the device every step, and every step draws for all."""
    tokens, cond = asked.tokens, asked.cond
    alpha = model.schedule.alpha(times.to(tokens.device))
    chances = torch.zeros(*tokens.shape, model.vocabulary, dtype=dtype, device=tokens.device)
    when = torch.ones(tokens.shape, dtype=torch.float64, device=tokens.device)
    log_probs = torch.zeros(tokens.shape, dtype=dtype, device=tokens.device)
    needed = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    changed, calls = (tokens == model.mask).any(1), 0
    for step in bar(list(range(len(times) - 1)), progress):
        rows = (changed if not model.timed else (tokens == model.mask).any(1)).nonzero()[:, 0]
        if len(rows):
            some = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in cond.items()}
            logits = model(tokens[rows], times[step], **some).to(dtype) / asked.temperature
            chances[rows] = (nucleus(logits, asked.top_p) if asked.top_p < 1 else logits).softmax(-1)
            needed[rows] += 1
            calls += 1
        stay = ((1 - alpha[step + 1]) / (1 - alpha[step])).to(dtype)
        q = functional.pad((1 - stay) * chances, (0, 1), value=float(stay))
        u = uniforms(asked, model.length * (model.vocabulary + 1), step, dtype).view_as(q)
        pick = winners(q, u)
        new = (tokens == model.mask) & (pick != model.mask)
        chance = chances.gather(-1, pick.clamp(max=model.vocabulary - 1)[..., None])[..., 0]
        log_probs = torch.where(new, chance.log(), log_probs)
        when = torch.where(new, times[step + 1], when)
        tokens = torch.where(new, pick, tokens)
        changed = new.any(1) & (tokens == model.mask).any(1)
        if not bool((tokens == model.mask).any()):
            break
    if not bool(log_probs.isfinite().all()):
        raise ValueError("the model's logits are NaN or leave no token")
    return tokens, Info(calls, needed, when, log_probs.float())
