"""Classifier-free guidance of masked diffusion models, in their logits (2412.10193):

    log p(x_i | seen)  =  (1 - scale) log p(x_i | seen, null)  +  scale log p(x_i | seen, cond)  +  const.

As with ``cfg``, scale 0 is the unconditional model and 1 the conditional one. The answer is a model like any other.
What is drawn beyond scale 1 is no power of the joint probabilities: each conditional is sharpened, not the whole.

>>> from fewstep.models.masked import MaskedModel
>>> bias = lambda tokens, shift: shift[:, None, None] * torch.tensor([0.0, 1.0]).expand(*tokens.shape, 2)
>>> model = masked_cfg(MaskedModel(bias, 2, 3, null={"shift": 0}), 2.0)
>>> odds = model(model.masks(1), shift=torch.ones(1)).diff(dim=-1)    # those of the condition, squared
>>> odds.flatten().tolist()
[2.0, 2.0, 2.0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..models.masked import MaskedModel
from .blend import filled


def masked_cfg(model: MaskedModel, scale: float, null: Mapping[str, Any] | None = None) -> MaskedModel:
    """The guided model; both halves run as one batch.

    Args:
        null: the keywords that are the condition, and what each is without one; by default the model's own.
    """
    if not isinstance(model, MaskedModel):
        raise TypeError(f"model must be a MaskedModel, got {type(model).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    null = model.null if null is None else null
    if null is None:
        raise ValueError("null must say what the condition is replaced by: this model has no null of its own")
    if scale == 1:
        return model

    def call(tokens: torch.Tensor, *t: torch.Tensor, **cond: Any) -> torch.Tensor:
        bare = filled(null, tokens, cond)
        if scale == 0:
            return model.call(tokens, *t, **bare)
        both = {key: _twice(bare[key], value) for key, value in cond.items() if key in bare}
        logits = model.call(tokens.repeat(2, 1), *(u.repeat(2) for u in t), **both)
        away, main = logits.log_softmax(-1).chunk(2)
        return torch.lerp(away, main, scale)

    return MaskedModel(
        call, model.vocabulary, model.length, model.schedule,
        timed=model.timed, null=null, net=model.net, config=model.config,
    )  # fmt: skip


def _twice(bare: Any, full: Any) -> Any:
    return torch.cat([bare, full]) if isinstance(full, torch.Tensor) else full
