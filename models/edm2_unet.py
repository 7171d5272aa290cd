"""EDM2's U-Net (2312.02696, configuration G): every layer preserves the magnitude of what passes through it.

Weights are normalised a row at a time where they are used, so that only their direction counts; sums, concatenations
and silu are divided by what they would grow by; there are no biases and no group norms. Parameters are named as in
EDM2's checkpoints.

    >>> net = EDM2UNet(EDM2UNetConfig(img_resolution=8, img_channels=1, label_dim=10, model_channels=16,
    ...                channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16))
    >>> net(torch.zeros(2, 1, 8, 8), torch.tensor([-1.0, 0.5]), label=torch.tensor([3, 10])).shape
    torch.Size([2, 1, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .attention import attention, check_implementation
from .edm_unet import Resample, class_weights

EPS = 1e-4


@dataclass(frozen=True)
class EDM2UNetConfig:
    """What makes an ``EDM2UNet``; names are the checkpoints', balances and ``clip_act`` the paper's."""

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    resample_filter: tuple[int, ...] = (1, 1)
    channels_per_head: int = 64
    dropout: float = 0.0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0

    def __post_init__(self):
        for name in ("channel_mult", "attn_resolutions", "resample_filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0 .. 1, got {getattr(self, name)!r}")
        if self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"img_resolution must be halved {len(self.channel_mult) - 1} times (channel_mult has "
                f"{len(self.channel_mult)} levels), got {self.img_resolution}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> EDM2UNetConfig:
        """From plain data; ``ValueError`` on a key that is none."""
        known = {field.name for field in fields(cls)}
        if unknown := set(config) - known:
            raise ValueError(
                f"unknown key {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
            )
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def unit(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """x divided by its root mean square over ``dims`` (eq. 67, with the code's epsilon).

    >>> unit(torch.tensor([[3.0, -3.0]]), (1,)).round(decimals=3)
    tensor([[ 1., -1.]])
    """
    size = math.prod(x.shape[d] for d in dims)
    length = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (EPS + length / math.sqrt(size)).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """silu, divided by the magnitude that it gives unit normals (eq. 81)."""
    return functional.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)  (eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Channels of a and of b with shares 1 - t and t of the magnitude, however many there are (eq. 103)."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n)), b * (scale * t / math.sqrt(m))], dim=1)


class MPFourier(nn.Module):
    """sqrt(2) cos(f tau + phase), frequencies and phases drawn once (eq. 75)."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(dim))
        self.register_buffer("phases", 2 * math.pi * torch.rand(dim))

    def forward(self, tau: torch.Tensor) -> torch.Tensor:
        angles = tau.float()[:, None] * self.freqs.float() + self.phases.float()
        return angles.cos() * math.sqrt(2)


class MPConv(nn.Module):
    """A convolution (a linear map where ``size`` is 0) by rows of unit length (eq. 47).

    While it trains, the weight itself is put back to unit magnitude before each use (forced normalisation, eq. 66).
    """

    def __init__(self, width_in: int, width_out: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_out, width_in, *[size] * (2 if size else 0)))

    def forward(self, x: torch.Tensor, gain: float | torch.Tensor = 1.0) -> torch.Tensor:
        dims = tuple(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(self.weight.float(), dims))
        w = self.weight.float()
        w = (unit(w, dims) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return functional.linear(x, w) if w.ndim == 2 else functional.conv2d(x, w, padding=w.shape[-1] // 2)


class Block(nn.Module):
    """A residual block of the encoder ("enc": it normalises every pixel) or decoder ("dec"), then attention."""

    def __init__(
        self,
        flavor: str,
        width_in: int,
        width: int,
        emb: int,
        config: EDM2UNetConfig,
        impl: str,
        change: str = "keep",
        attends: bool = False,
    ):
        super().__init__()
        self.flavor, self.config, self.impl = flavor, config, impl
        self.heads = width // config.channels_per_head if attends else 0
        self.resample = nn.Identity() if change == "keep" else Resample(change, config.resample_filter)
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(width if flavor == "enc" else width_in, width, 3)
        self.emb_linear = MPConv(emb, width, 0)
        self.conv_res1 = MPConv(width, width, 3)
        self.conv_skip = MPConv(width_in, width, 1) if width_in != width else nn.Identity()
        if self.heads:
            self.attn_qkv, self.attn_proj = MPConv(width, 3 * width, 1), MPConv(width, width, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        config = self.config
        x = self.resample(x)
        if self.flavor == "enc":
            x = unit(self.conv_skip(x), (1,))
        h = self.conv_res0(mp_silu(x))
        time = self.emb_linear(emb, gain=self.emb_gain) + 1
        h = mp_silu(h * time[:, :, None, None].to(h.dtype))
        h = self.conv_res1(functional.dropout(h, config.dropout, self.training))
        x = mp_sum(x if self.flavor == "enc" else self.conv_skip(x), h, config.res_balance)
        if self.heads:
            x = mp_sum(x, self._attend(x), config.attn_balance)
        return x if config.clip_act is None else x.clamp(-config.clip_act, config.clip_act)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        # channels are ordered (head, channel, q k v)
        qkv = self.attn_qkv(x).reshape(len(x), self.heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = (part.transpose(2, 3) for part in unit(qkv, (2,)).unbind(3))
        return self.attn_proj(attention(q, k, v, self.impl).transpose(2, 3).reshape(x.shape))


class EDM2UNet(nn.Module):
    """The net; ``attention`` is ``sdpa`` or ``xformers`` and no part of the config, since it changes no number."""

    def __init__(self, config: EDM2UNetConfig | Mapping[str, Any], attention: str = "sdpa"):
        super().__init__()
        config = config if isinstance(config, EDM2UNetConfig) else EDM2UNetConfig.from_dict(config)
        check_implementation(attention)
        self.config = config
        base = config.model_channels
        widths = [base * mult for mult in config.channel_mult]
        sizes = [config.img_resolution >> level for level in range(len(widths))]
        noise = base * config.channel_mult_noise if config.channel_mult_noise else widths[0]
        emb = base * config.channel_mult_emb if config.channel_mult_emb else max(widths)

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, emb, 0)
        if config.label_dim:
            self.emb_label = MPConv(config.label_dim, emb, 0)

        def block(
            flavor: str, width_in: int, width: int, change: str = "keep", attends: bool = False
        ) -> Block:
            return Block(flavor, width_in, width, emb, config, attention, change, attends)

        self.enc, kept = nn.ModuleDict(), []  # kept: the widths that the way up takes back
        here = widths[0]
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            if level == 0:  # one more channel of ones in place of a bias
                self.enc[f"{size}x{size}_conv"] = MPConv(config.img_channels + 1, here, 3)
            else:
                self.enc[f"{size}x{size}_down"] = block("enc", here, here, "down")
            kept.append(here)
            for k in range(config.num_blocks):
                attends = size in config.attn_resolutions
                self.enc[f"{size}x{size}_block{k}"] = block("enc", here, width, attends=attends)
                here = width
                kept.append(here)

        self.dec = nn.ModuleDict()
        for level, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block("dec", here, here, attends=True)
                self.dec[f"{size}x{size}_in1"] = block("dec", here, here)
            else:
                self.dec[f"{size}x{size}_up"] = block("dec", here, here, "up")
            for k in range(config.num_blocks + 1):
                attends = size in config.attn_resolutions
                self.dec[f"{size}x{size}_block{k}"] = block("dec", here + kept.pop(), width, attends=attends)
                here = width
        self.out_conv = MPConv(here, config.img_channels, 3)

    @property
    def null_label(self) -> int | None:
        """The index that stands for no label. None for an unconditional net."""
        return self.config.label_dim or None

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, C, H, W) with H = W = img_resolution, t (B,) as the net counts time, label (B,) or None."""
        config = self.config
        wanted = (config.img_channels, config.img_resolution, config.img_resolution)
        if x.ndim != 4 or x.shape[1:] != wanted:
            raise ValueError(f"x must be (B, {', '.join(map(str, wanted))}), got {tuple(x.shape)}")
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        emb = self.emb_noise(self.emb_fourier(t).to(x.dtype))
        if config.label_dim:
            weights = class_weights(label, config.label_dim, x) * math.sqrt(config.label_dim)
            emb = mp_sum(emb, self.emb_label(weights), config.label_balance)
        elif label is not None:
            raise ValueError("label was given to an unconditional net (label_dim is 0)")
        emb = mp_silu(emb)

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        kept = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            kept.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, kept.pop(), config.concat_balance) if "_block" in name else x, emb)
        return self.out_conv(x, gain=self.out_gain)
