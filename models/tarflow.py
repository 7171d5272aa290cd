"""TarFlow (2412.06329): a normalising flow whose blocks are causal transformers over an image's patches.

A block takes T tokens, in raster order or against it by turns, and is affine in each with what those before it say:

    z_1 = x_1,    z_t = (x_t - m_t(x_<t)) exp(-a_t(x_<t)),    log |det dz/dx| = - sum_t a_t     all tokens at once
    x_1 = z_1,    x_t = exp(a_t(x_<t)) z_t + m_t(x_<t)                                          one after the other

The sign of a is that of the released code, where the network's output is ``xa``, and exp(-xa) leads to z. The last
layer is zero at the start, so a fresh flow is the identity. ``inverse`` goes token by token with keys and values kept;
``samplers.gs_jacobi`` makes the same image in fewer calls.

    >>> flow = TarFlow(TarFlowConfig(hidden_size=16, blocks=2, depth=1, num_heads=2, num_class_embeds=11))
    >>> x = torch.randn(3, 1, 8, 8)
    >>> z, log_det = flow(x, torch.tensor([3, 1, 10]))
    >>> torch.equal(z, x), log_det.tolist()
    (True, [0.0, 0.0, 0.0])
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from . import checkpoint

EMBEDDED = ("digits-tarflow",)
INIT = (
    0.5  # of positions and classes: with the paper's 0.01, beside tokens of size 1, classes are learned late
)
Cache = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class TarFlowConfig:
    """What makes a ``TarFlow``. ``num_class_embeds`` counts the null label, which is the last index.

    ``noise``: the standard deviation of what was added to the training images; the density is that of noisy ones.
    """

    sample_size: int = 8
    in_channels: int = 1
    patch_size: int = 2
    hidden_size: int = 48
    blocks: int = 4
    depth: int = 2
    num_heads: int = 4
    mlp_ratio: float = 4.0
    num_class_embeds: int | None = None
    noise: float = 0.0

    def __post_init__(self):
        for name in "sample_size in_channels patch_size hidden_size blocks depth num_heads".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sample_size % self.patch_size or self.sample_size == self.patch_size:
            raise ValueError(
                f"patch_size must divide sample_size {self.sample_size} into two or more, got {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be divisible by num_heads {self.num_heads}, got {self.hidden_size}"
            )
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a standard deviation, 0 or more, got {self.noise}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TarFlowConfig:
        """From plain data; ValueError on a key that is not here."""
        known = {field.name for field in fields(cls)}
        if unknown := set(config) - known:
            raise ValueError(
                f"unknown key {', '.join(sorted(unknown))}; a TarFlow's config has {', '.join(sorted(known))}"
            )
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


class Layer(nn.Module):
    """Attention to oneself and what came before, then an MLP, both on normalised input and added to it."""

    def __init__(self, config: TarFlowConfig):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.heads = config.num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        kept: tuple[torch.Tensor, torch.Tensor] | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """x (B, n, width): the tokens from ``start`` on; ``kept``: keys and values of all, these written in place."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if kept is None:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            stop = start + x.shape[1]
            kept[0][:, :, start:stop], kept[1][:, :, start:stop] = k, v
            k, v = kept[0][:, :, :stop], kept[1][:, :, :stop]
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class FlowBlock(nn.Module):
    """One autoregressive affine map of T tokens of C numbers; ``backward``: in the other order."""

    def __init__(self, config: TarFlowConfig, backward: bool):
        super().__init__()
        self.tokens = (config.sample_size // config.patch_size) ** 2
        size, width = config.in_channels * config.patch_size**2, config.hidden_size
        self.backward_order = backward
        self.heads = config.num_heads
        self.inp = nn.Linear(size, width)
        self.positions = nn.Parameter(INIT * torch.randn(self.tokens - 1, width))
        classes = config.num_class_embeds
        self.classes = None if classes is None else nn.Parameter(INIT * torch.randn(classes, width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.out = nn.Linear(width, 2 * size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        causal = torch.ones(self.tokens - 1, self.tokens - 1, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, C) from the image's order into the block's, and back."""
        return x.flip(1) if self.backward_order else x

    def condition(self, label: torch.Tensor | None) -> torch.Tensor | None:
        """What a label (B,) adds to every token, (B, 1, width)."""
        return None if self.classes is None or label is None else self.classes[label][:, None]

    def cache(self, batch: int) -> Cache:
        """Room for every layer's keys and values."""
        like = self.inp.weight
        shape = (batch, self.heads, self.tokens - 1, like.shape[0] // self.heads)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers]

    def after(
        self,
        x: torch.Tensor,
        condition: torch.Tensor | None,
        start: int = 0,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, m) of tokens start + 1 .. start + n, given x (B, n, C), which are tokens start .. start + n - 1.

        Those before them are known by the keys and values in ``cache``, where these leave theirs, too.
        """
        stop, dtype = start + x.shape[1], x.dtype
        h = self.inp(x.to(self.inp.weight.dtype)) + self.positions[start:stop]
        if condition is not None:
            h = h + condition
        mask = None if cache is None or stop - start == 1 else self.causal[start:stop, :stop]
        for i, layer in enumerate(self.layers):
            h = layer(h, mask, None if cache is None else cache[i], start)
        a, m = self.out(h).to(dtype).chunk(2, dim=-1)  # the exponential is taken in the state's precision
        return a, m

    def forward(
        self, x: torch.Tensor, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, T, C) in the image's order -> (z alike, log |det dz/dx| (B,))."""
        x = self.ordered(x)
        a, m = self.after(x[:, :-1], self.condition(label))
        z = torch.cat([x[:, :1], (x[:, 1:] - m) * (-a).exp()], dim=1)
        return self.ordered(z), -a.flatten(1).sum(1)


class TarFlow(nn.Module):
    """The flow: ``flow(x, label)`` is (z, log |det dz/dx|), ``flow.inverse(z, label)`` the way back.

    A label outside 0 .. num_class_embeds - 1 is an error; None stands for the null label, an embedding of its own (the
    released code takes the mean of the classes').
    """

    def __init__(self, config: TarFlowConfig | Mapping[str, Any]):
        super().__init__()
        self.config = config if isinstance(config, TarFlowConfig) else TarFlowConfig.from_dict(config)
        self.blocks = nn.ModuleList(FlowBlock(self.config, i % 2 == 1) for i in range(self.config.blocks))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image, and of its noise."""
        return (self.config.in_channels, self.config.sample_size, self.config.sample_size)

    @property
    def tokens(self) -> int:
        """T, how many a block goes through."""
        return (self.config.sample_size // self.config.patch_size) ** 2

    @property
    def null_label(self) -> int | None:
        """The index that stands for no label: the last one. None for an unconditional flow."""
        return None if self.config.num_class_embeds is None else self.config.num_class_embeds - 1

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> tokens (B, T, C p^2)."""
        p = self.config.patch_size
        return (
            x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        )

    def image(self, tokens: torch.Tensor) -> torch.Tensor:
        """The way back of ``patches``."""
        channels, side, p = self.config.in_channels, self.config.sample_size, self.config.patch_size
        grid = tokens.reshape(-1, side // p, side // p, channels, p, p)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, side, side)

    def forward(
        self, x: torch.Tensor, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) -> (z of the same shape, log |det dz/dx| (B,))."""
        label = self.check(x, label, "x")
        h, log_det = self.patches(x), x.new_zeros(x.shape[0])
        for block in self.blocks:
            h, more = block(h, label)
            log_det = log_det + more
        return self.image(h), log_det

    def log_prob(self, x: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x | label) in nats, (B,): log N(z; 0, 1) + log |det dz/dx|."""
        z, log_det = self(x, label)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)

    @torch.no_grad()
    def inverse(
        self,
        z: torch.Tensor,
        label: torch.Tensor | None = None,
        guidance: float = 0.0,
        anneal: str = "none",
    ) -> torch.Tensor:
        """The image of noise z (B, C, H, W), token by token: T - 1 calls a block, with keys and values kept.

        Args:
            guidance: w in (1 + w) f(label) - w f(null), for f both a and m; doubles the batch.
            anneal: ``none``, or ``linear``: w t / (T - 1) for the token t = 0 .. T - 1.
        """
        step = Conditioned(self, z, label, guidance, anneal)
        x = self.patches(z)
        for block in reversed(self.blocks):
            x, cache = block.ordered(x).clone(), step.cache(block)
            for t in range(self.tokens - 1):
                a, m = step(block, x[:, t : t + 1], t, cache)
                x[:, t + 1 : t + 2].mul_(a.exp()).add_(m)
            x = block.ordered(x)
        if not x.isfinite().all():
            raise FloatingPointError("the inverse is not finite: z lies where the flow's scales overflow")
        return self.image(x)

    def denoise(self, x: torch.Tensor, label: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        """x + scale noise^2 grad log p(x): the mean of the clean image given the noisy one, if p is right (Tweedie).

        ``noise`` is the config's; 1 is what theory says of ``scale``, the paper tunes it between 0.9 and 1.4.
        """
        if self.config.noise == 0:
            raise ValueError("denoise is for a flow trained with noise, and this one's config has noise = 0")
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(y, label).sum(), y)
        return x + scale * self.config.noise**2 * score

    def check(self, x: torch.Tensor, label: torch.Tensor | None, name: str) -> torch.Tensor | None:
        """The labels to use; ValueError where shapes or labels do not fit."""
        if x.ndim != 4 or x.shape[1:] != self.shape or not x.is_floating_point():
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"{name} must be floats (B, {wanted}), got {x.dtype} {tuple(x.shape)}")
        if self.null_label is None:
            if label is not None:
                raise ValueError("label was given to an unconditional flow (num_class_embeds is None)")
            return None
        if label is None:
            return torch.full((x.shape[0],), self.null_label, device=x.device)
        if label.shape != (x.shape[0],) or label.is_floating_point():
            raise ValueError(
                f"label must be {x.shape[0]} integers, got {label.dtype} of shape {tuple(label.shape)}"
            )
        return label


class Conditioned:
    """A flow's blocks under one batch of labels, with or without guidance: what ways back call for each step."""

    def __init__(
        self,
        flow: TarFlow,
        z: torch.Tensor,
        label: torch.Tensor | None,
        guidance: float = 0.0,
        anneal: str = "none",
    ):
        if anneal not in ("none", "linear"):
            raise ValueError(f"anneal must be none or linear, got {anneal!r}")
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance must be 0 or more, got {guidance}")
        if guidance and (label is None or flow.null_label is None):
            raise ValueError(f"guidance = {guidance} needs a class-conditional flow and labels")
        label = flow.check(z, label, "z")
        self.batch, self.guided = z.shape[0], guidance > 0
        if self.guided:
            assert label is not None and flow.null_label is not None
            label = torch.cat([label, torch.full_like(label, flow.null_label)])
            last = flow.tokens - 1
            place = torch.arange(1, last + 1, dtype=z.dtype, device=z.device)[:, None]
            self.weight = guidance * (place / last if anneal == "linear" else torch.ones_like(place))
        self.conditions = {block: block.condition(label) for block in flow.blocks}

    def cache(self, block: FlowBlock) -> Cache:
        """Room for keys and values."""
        return block.cache(self.batch * (1 + self.guided))

    def __call__(
        self, block: FlowBlock, x: torch.Tensor, start: int, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``block.after``, guided where that was asked for."""
        if not self.guided:
            return block.after(x, self.conditions[block], start, cache)
        both = block.after(torch.cat([x, x]), self.conditions[block], start, cache)
        weight = self.weight[start : start + x.shape[1]]
        (a, a_null), (m, m_null) = (f.chunk(2) for f in both)
        return a + weight * (a - a_null), m + weight * (m - m_null)


def save_flow(path: str | os.PathLike, flow: TarFlow, training: Mapping[str, Any] | None = None) -> None:
    """Weights and config in one safetensors file."""
    meta = {"kind": "tarflow", "net": flow.config.to_dict(), "training": dict(training or {})}
    checkpoint.write(path, flow.state_dict(), meta)


def load_flow(name_or_path: str | os.PathLike = "digits-tarflow") -> TarFlow:
    """The flow that ships with the package, or a file of ``save_flow``: frozen, in evaluation mode."""
    name = os.fspath(name_or_path)
    path = checkpoint.DATA / f"{name}.safetensors" if name in EMBEDDED else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"name_or_path must be {', '.join(EMBEDDED)} or a file of save_flow, got {name!r}")
    tensors, meta = checkpoint.read(path)
    if meta.get("kind") != "tarflow":
        raise ValueError(f"name_or_path must be a flow's checkpoint, got one of a {meta.get('kind')}")
    flow = TarFlow(meta["net"])
    flow.load_state_dict(tensors)
    return flow.eval().requires_grad_(False)
