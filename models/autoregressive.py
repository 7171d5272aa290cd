"""A small autoregressive model of images: patches as tokens of a codebook, a causal transformer over them.

The class stands before the first place, position i sees the class and the codewords before it, and a head gives the
next token's logits (LlamaGen's layout, 2406.06525). ``Autoregressive.sample`` makes n tokens by n calls, with keys and
values kept and draws counted by (seed, id, place), the same in any batch. ``conditional`` is the same model as a
``Denoiser`` whose estimate is conditional on what went before (2510.21003): a teacher for score distillation.

>>> config = ARConfig(shape=(1, 4, 4), codes=5, width=8, depth=1, heads=2)
>>> net = Autoregressive(config)
>>> net.sample(torch.tensor([3, 10])).shape, net.logits(torch.zeros(2, 1, 4, 4)).shape
(torch.Size([2, 1, 4, 4]), torch.Size([2, 4, 5]))
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ..kernels.gumbel_draw import gumbel_draw
from . import paths
from .codebook import Codebook, codeword_mean
from .denoiser import Denoiser


@dataclass(frozen=True)
class ARConfig:
    """What makes the networks of this file. ``num_class_embeds`` counts the null label, which is the last index."""

    shape: Sequence[int] = (1, 8, 8)
    patch: int = 2
    codes: int = 128
    width: int = 64
    depth: int = 3
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    num_class_embeds: int = 11

    def __post_init__(self):
        for name in ("patch", "width", "depth", "heads", "num_class_embeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.codes < 2:
            raise ValueError(
                f"codes must be at least 2, got {self.codes}: of one codeword there is nothing to predict"
            )
        if self.width % self.heads:
            raise ValueError(f"width must be divisible by heads {self.heads}, got {self.width}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ARConfig:
        """From plain data; ValueError on a key that is not here."""
        known = {field.name for field in fields(cls)}
        if unknown := set(config) - known:
            raise ValueError(
                f"unknown key {', '.join(sorted(unknown))}; an autoregressive net's config has "
                f"{', '.join(sorted(known))}"
            )
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


class Kept(NamedTuple):
    """Keys and values (B, heads, n, head size) of one block; places from ``at`` on are not written yet."""

    keys: torch.Tensor
    values: torch.Tensor
    at: int


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); a place sees itself and what is before it."""

    def __init__(self, config: ARConfig):
        super().__init__()
        width, inner = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, kept: Kept | None = None) -> torch.Tensor:
        """(B, n, width); with ``kept`` the one place x (B, 1, width) at ``kept.at``."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if kept is not None:
            upto = kept.at + 1
            kept.keys[:, :, kept.at : upto], kept.values[:, :, kept.at : upto] = k, v
            k, v = kept.keys[:, :, :upto], kept.values[:, :, :upto]
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=kept is None)
        x = x + self.dropout(self.proj(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    """Features (B, n, width): the i-th is of the class and of the places before i."""

    def __init__(self, config: ARConfig, places: int, dim: int):
        super().__init__()
        width = config.width
        self.start = nn.Embedding(config.num_class_embeds, width)
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))
        self.positions = nn.Parameter(0.02 * torch.randn(places, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    @property
    def null_label(self) -> int:
        """The index that stands for no label: the last one."""
        return self.start.num_embeddings - 1

    def opening(self, batch: int, label: torch.Tensor | None) -> torch.Tensor:
        """What stands before the first place, (B, 1, width)."""
        if label is None:
            label = torch.full((batch,), self.null_label, device=self.positions.device)
        if label.shape != (batch,):
            raise ValueError(f"label must have shape ({batch},), got {tuple(label.shape)}")
        return self.start(label)[:, None]

    def forward(self, before: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """``before`` (B, n, d): vectors at all places, of which the last is not looked at."""
        h = torch.cat([self.opening(len(before), label), self.embed(before[:, :-1])], dim=1) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def step(
        self, vector: torch.Tensor | None, label: torch.Tensor | None, at: int, kept: list[Kept]
    ) -> torch.Tensor:
        """Features (B, width) of place ``at``, given the vector (B, d) of the place before it; ``kept`` is written."""
        h = self.opening(len(kept[0].keys), label) if vector is None else self.embed(vector)[:, None]
        h = h + self.positions[at]
        for block, cache in zip(self.blocks, kept, strict=True):
            h = block(h, cache._replace(at=at))
        return self.norm(h)[:, 0]

    def empty(self, batch: int) -> list[Kept]:
        """Room for the keys and values of ``batch`` samples."""
        places, width = self.positions.shape
        heads = self.blocks[0].heads
        shape = (batch, heads, places, width // heads)
        return [
            Kept(self.positions.new_empty(shape), self.positions.new_empty(shape), 0) for _ in self.blocks
        ]


class Autoregressive(nn.Module):
    """p(token_i | tokens before i, class), over the codewords of ``book``."""

    def __init__(self, config: ARConfig | Mapping[str, Any], codes: torch.Tensor | None = None):
        super().__init__()
        config = config if isinstance(config, ARConfig) else ARConfig.from_dict(config)
        self.config = config
        self.book = Codebook(config.codes if codes is None else codes, config.shape, config.patch)
        if len(self.book) != config.codes:
            raise ValueError(f"codes must be {config.codes} codewords, got {len(self.book)}")
        self.body = Backbone(config, self.book.places, self.book.dim)
        self.head = nn.Linear(config.width, config.codes)

    @property
    def null_label(self) -> int:
        """The index that stands for no label."""
        return self.body.null_label

    def logits(self, before: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """(B, n, V), of samples (B, *shape) or places (B, n, d) that lie on codewords."""
        return self.head(self.body(self.book.split(before), label))

    def forward(self, tokens: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, n, V) of tokens (B, n)."""
        return self.logits(self.book.vectors(tokens), label)

    @torch.no_grad()
    def sample(
        self,
        label: torch.Tensor | None = None,
        seed: int = 0,
        ids: torch.Tensor | None = None,
        row: int = 0,
    ) -> torch.Tensor:
        """Samples (B, *shape) by n calls, of classes ``label`` (B,) or of none.

        ``ids`` (B,): which samples of the seed, 0 .. B - 1 by default; ``row``: other draws of the same seed and ids.
        """
        if label is None and ids is None:
            raise ValueError("label or ids must be given: they say how many samples to make")
        device = self.body.positions.device
        ids = torch.arange(len(label), device=device) if ids is None else ids
        key = torch.full((1,), seed, dtype=torch.int64, device=device)
        kept, vector, tokens = self.body.empty(len(ids)), None, []
        for at in range(self.book.places):
            logits = self.head(self.body.step(vector, label, at, kept))
            token, _ = gumbel_draw(logits, key, ids, row * self.book.places + at)
            tokens.append(token)
            vector = self.book.codes[token]
        return self.book.join(self.book.vectors(torch.stack(tokens, dim=1)))


def conditional(net: Autoregressive, path: paths.Path | None = None) -> Denoiser:
    """The model as a Denoiser, ``d(x, t, prefix=x0, label=...)``: E[x0_i | x_t,i, x0 before i] at every place i.

    x and ``prefix`` are samples or places (B, n, d); t may be one number a place, (B, n). One pass for all places, no
    network of its own: the closed form of ``codeword_mean`` with the next token's logits.

    >>> d = conditional(Autoregressive(ARConfig(shape=(1, 4, 4), codes=5, width=8, depth=1, heads=2)))
    >>> d(torch.randn(3, 4, 4), torch.full((3, 4), 0.5), prefix=torch.zeros(3, 4, 4)).shape
    torch.Size([3, 4, 4])
    """
    path = paths.flow() if path is None else path
    return Denoiser(
        functools.partial(_estimate, net, path), path, predicts="x0", net=net, shape=net.config.shape
    )


def _estimate(
    net: Autoregressive,
    path: paths.Path,
    x: torch.Tensor,
    t: torch.Tensor,
    label: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
) -> torch.Tensor:
    if prefix is None:
        raise ValueError(
            "prefix must be given: an autoregressive model's estimate is of one place after another. For samples, ask "
            "net.sample(label)"
        )
    alpha, sigma = path.alpha(t), path.sigma(t)
    places = net.book.split(x)
    found = codeword_mean(places, net.logits(prefix, label), net.book.codes, alpha, sigma)
    return found if places is x else net.book.join(found)
