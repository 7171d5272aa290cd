"""Masked diffusion models: what a token is, given those that are seen (2406.07524, 2406.04329).

Tokens are numbers 0 .. V - 1, and V is the mask. Going forward in time each token is hidden once, at a time of its own,
and stays hidden; a model answers  p(x_i | what is seen)  for all i at once. The best such model does not depend on the
time (2409.02908), and so ours are not told it unless ``timed``.

    >>> even = torch.tensor([[0.5, 0.0], [0.0, 0.5]])                 # two bits that are always equal
    >>> model = from_joint(even)
    >>> model(torch.tensor([[2, 2], [1, 2]])).exp().tolist()          # nothing seen; the first bit is 1
    [[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.0, 1.0]]]

A model learned from the digits is in the package; its tokens are pixels of 17 levels (``models.pixel_tokens``).

    >>> model = load_masked("digits-masked")
    >>> model.vocabulary, model.length, model(model.masks(2), label=torch.tensor([3, 4])).shape
    (17, 64, torch.Size([2, 64, 17]))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .mask_schedules import MaskSchedule, mask_schedule
from .pixel_tokens import PixelTokens

EMBEDDED = ("digits-masked",)
LARGEST_TABLE = 2**22  # contexts times length of an exact model


class MaskedModel:
    """A function of tokens (B, L) that answers logits (B, L, V), and what they are logits of.

    Args:
        call: ``call(tokens, **cond)``, or ``call(tokens, t, **cond)`` where ``timed``, with t (B,) in float64. It is
            given masks as the token V; what it says of tokens that are seen is not looked at.
        vocabulary: V, how many tokens there are beside the mask. length: L.
        schedule: ``linear``, ``cosine`` or a ``MaskSchedule``.
        null: the keywords that are the condition, and what each is without one, as ``cfg`` takes them.
        net: the module behind ``call``, if there is one. config: plain data that ``build_masked`` makes it from.
    """

    def __init__(
        self,
        call: Callable[..., torch.Tensor],
        vocabulary: int,
        length: int,
        schedule: str | MaskSchedule = "linear",
        *,
        timed: bool = False,
        null: Mapping[str, Any] | None = None,
        net: nn.Module | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        if isinstance(vocabulary, bool) or not isinstance(vocabulary, int) or vocabulary < 2:
            raise ValueError(
                f"vocabulary must be an int of 2 or more, or there is nothing to draw: got {vocabulary!r}"
            )
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"length must be an int of 1 or more, got {length!r}")
        self.call, self.vocabulary, self.length = call, vocabulary, length
        self.schedule, self.timed, self.null = mask_schedule(schedule), timed, null
        self.net, self.config = net, None if config is None else dict(config)

    @property
    def mask(self) -> int:
        """The token that hides one: V."""
        return self.vocabulary

    @property
    def device(self) -> torch.device:
        """Where its tokens belong."""
        return torch.device("cpu") if self.net is None else next(self.net.parameters()).device

    def __call__(
        self, tokens: torch.Tensor, t: torch.Tensor | float | None = None, **cond: Any
    ) -> torch.Tensor:
        """Logits (B, L, V); ``t``: one for all or (B,), and of no account unless the model is ``timed``."""
        if not self.timed:
            logits = self.call(tokens, **cond)
        elif t is None:
            raise ValueError("t must be given: this model is told the time")
        else:
            t = torch.as_tensor(t, dtype=torch.float64, device=tokens.device).expand(len(tokens))
            logits = self.call(tokens, t, **cond)
        if logits.shape != (*tokens.shape, self.vocabulary):
            raise ValueError(
                f"the model must answer logits of shape {(*tokens.shape, self.vocabulary)} to tokens of shape "
                f"{tuple(tokens.shape)}, got {tuple(logits.shape)}"
            )
        return logits

    def masks(self, n: int) -> torch.Tensor:
        """n sequences of nothing but masks."""
        return torch.full((n, self.length), self.mask, dtype=torch.int64, device=self.device)

    def check(self, tokens: torch.Tensor, name: str = "tokens") -> torch.Tensor:
        """Tokens and masks, (B, L) int64; else ValueError or TypeError."""
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(f"{name} must be an int64 tensor, got {type(tokens).__name__}")
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise ValueError(
                f"{name} must be int64 of shape (B, {self.length}), got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= self.mask:
            raise ValueError(
                f"{name} must lie in 0 .. {self.vocabulary - 1}, or be {self.mask}, the mask; got "
                f"{int(tokens.min())} .. {int(tokens.max())}"
            )
        return tokens

    def to(self, device: torch.device | str) -> MaskedModel:
        """Move the network, in place."""
        if self.net is not None:
            self.net.to(device)
        return self


def from_joint(table: torch.Tensor, schedule: str | MaskSchedule = "linear") -> MaskedModel:
    """The exact model of a joint table (V, .., V), one axis a token: the truth that samplers are held against.

    With each axis widened by its own sum, the entry at any tokens and masks is the probability of those that are seen,
    and a posterior is a quotient of two entries. Logits are log-probabilities in float64, NaN where what is seen has
    probability 0.
    """
    sizes = set(table.shape)
    if table.ndim < 1 or len(sizes) != 1 or not table.is_floating_point():
        raise ValueError(
            f"table must be floating point of shape (V, .., V), an axis a token, got {table.dtype} of shape "
            f"{tuple(table.shape)}"
        )
    size, length = sizes.pop(), table.ndim
    if size < 2:
        raise ValueError(
            f"table must have a vocabulary of 2 or more, or there is nothing to draw: got {size}"
        )
    if (size + 1) ** length * length > LARGEST_TABLE:
        raise ValueError(
            f"table must be small: {length} tokens of {size} have {(size + 1) ** length} contexts"
        )
    if not bool(torch.isfinite(table).all() & (table >= 0).all() & (table.sum() > 0)):
        raise ValueError("table must hold probabilities: finite, not negative, not all 0")
    wide = table.double() / table.double().sum()
    for axis in range(length):
        wide = torch.cat([wide, wide.sum(axis, keepdim=True)], axis)
    wide = wide.flatten().log()
    strides = (size + 1) ** torch.arange(length - 1, -1, -1)

    def call(tokens: torch.Tensor) -> torch.Tensor:
        entries, stride = wide.to(tokens.device), strides.to(tokens.device)
        here = (tokens * stride).sum(-1)
        hidden = here[:, None] + (size - tokens) * stride  # the entry with the i-th token masked
        filled = hidden[..., None] + (torch.arange(size, device=tokens.device) - size) * stride[:, None]
        return entries[filled] - entries[hidden][..., None]

    return MaskedModel(call, size, length, schedule)


def build_masked(config: Mapping[str, Any], attention: str = "sdpa") -> MaskedModel:
    """A model of pixels' tokens, fresh, from plain data: ``vocabulary``, ``schedule``, ``timed`` and ``net``."""
    known = {"vocabulary", "schedule", "timed", "net"}
    if unknown := set(config) - known:
        raise ValueError(
            f"unknown key {', '.join(sorted(unknown))}; a masked model's config has {', '.join(sorted(known))}"
        )
    net = PixelTokens(config["net"], config["vocabulary"], attention)
    timed = config.get("timed", False)

    def call(tokens: torch.Tensor, t: torch.Tensor | None = None, label: torch.Tensor | None = None):
        return net(tokens, t, label)

    return MaskedModel(
        call,
        config["vocabulary"],
        net.side**2,
        config.get("schedule", "linear"),
        timed=timed,
        null=None if net.null_label is None else {"label": net.null_label},
        net=net,
        config=config,
    )


def save_masked(
    path: str | os.PathLike, model: MaskedModel, training: Mapping[str, Any] | None = None
) -> None:
    """Write the network's weights, what ``build_masked`` makes it from, and a record of its training."""
    if model.net is None or model.config is None:
        raise ValueError("model must have a net and a config to be saved: build_masked makes such a one")
    document = {"kind": "masked", "config": model.config, "training": dict(training or {})}
    checkpoint.write(path, model.net.state_dict(), document)


def load_masked(name_or_path: str | os.PathLike, attention: str = "sdpa") -> MaskedModel:
    """``digits-masked``, or a file that ``save_masked`` wrote: frozen, in evaluation mode."""
    name = os.fspath(name_or_path)
    path = checkpoint.DATA / f"{name}.safetensors" if name in EMBEDDED else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"name_or_path must be {', '.join(EMBEDDED)} or a fewstep checkpoint (.safetensors), got {name!r}"
        )
    tensors, meta = checkpoint.read(path)
    if meta.get("kind") != "masked":
        raise ValueError(f"{name} holds a {meta.get('kind')}, not a masked model")
    model = build_masked(meta["config"], attention)
    assert model.net is not None
    model.net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    model.net.eval().requires_grad_(False)
    return model
