"""EDM's two U-Nets (2206.00364, appendix F): DDPM++ and NCSN++ of 2011.13456 ("song"), ADM of 2105.05233 ("dhariwal").

Both are one walk down and one up over blocks of one kind, which differ in how a block is told the time, in its scales
and in where it attends. Parameters are named as in EDM's checkpoints, so that those load without renaming.

    >>> net = EDMUNet(EDMUNetConfig("song", img_resolution=8, in_channels=1, out_channels=1, label_dim=10,
    ...               model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)))
    >>> net(torch.zeros(2, 1, 8, 8), torch.tensor([-1.0, 0.5]), label=torch.tensor([3, 10])).shape
    torch.Size([2, 1, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import silu

from .attention import attention, check_implementation
from .unet import time_features

CHOICES = {
    "kind": ("song", "dhariwal"),
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


@dataclass(frozen=True)
class EDMUNetConfig:
    """What makes an ``EDMUNet``; names are the checkpoints', which call the last four options of ``song`` alone."""

    kind: str
    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)

    def __post_init__(self):
        for name in ("channel_mult", "attn_resolutions", "resample_filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if len(self.resample_filter) % 2:
            raise ValueError(f"resample_filter must have an even number of taps, got {self.resample_filter}")
        if self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"img_resolution must be halved {len(self.channel_mult) - 1} times (channel_mult has "
                f"{len(self.channel_mult)} levels), got {self.img_resolution}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> EDMUNetConfig:
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


class Style(NamedTuple):
    """How the blocks of one kind of net are made."""

    modulates: bool  # the time scales and shifts the norm; else it is added
    head_width: int | None  # None: one head
    skip_scale: float
    eps: float
    projects: bool  # a 1x1 convolution on the way round wherever the size changes


STYLES = {
    "song": Style(False, None, math.sqrt(0.5), 1e-6, True),
    "dhariwal": Style(True, 64, 1.0, 1e-5, False),
}


class Resample(nn.Module):
    """Half or twice the size with a separable low-pass filter: (1, 1) averages four pixels, or repeats one."""

    def __init__(self, change: str, taps: tuple[int, ...] = (1, 1), padding: int | None = None):
        super().__init__()
        self.change, self.padding = change, (len(taps) - 1) // 2 if padding is None else padding
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("filter", (line[:, None] * line / line.sum() ** 2)[None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = x.shape[1]
        kernel = self.filter.to(x.dtype).expand(c, -1, -1, -1)
        if self.change == "down":
            return functional.conv2d(x, kernel, stride=2, padding=self.padding, groups=c)
        return functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=self.padding, groups=c)


class Conv(nn.Conv2d):
    """A convolution of what has been resampled; ``fused`` convolves first, at full size (2011.13456's NCSN++)."""

    def __init__(
        self, width_in: int, width_out: int, size: int, change: str = "keep", taps=(1, 1), fused=False
    ):
        self_padding = size // 2 + (len(taps) - 1) // 2 if fused else size // 2
        super().__init__(width_in, width_out, size, padding=self_padding)
        self.fused = fused
        self.resample = nn.Identity() if change == "keep" else Resample(change, taps, 0 if fused else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resample(super().forward(x)) if self.fused else super().forward(self.resample(x))


class Fourier(nn.Module):
    """cos and sin of 2 pi f tau, at frequencies drawn once (2006.10739)."""

    def __init__(self, dim: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(dim // 2) * scale)

    def forward(self, tau: torch.Tensor) -> torch.Tensor:
        angles = tau.float()[:, None] * (2 * math.pi * self.freqs.float())
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def norm(width: int, eps: float) -> nn.GroupNorm:
    """Group norm with at most 32 groups of at least four channels."""
    return nn.GroupNorm(min(32, width // 4), width, eps)


def class_weights(label: torch.Tensor | None, classes: int, like: torch.Tensor) -> torch.Tensor:
    """(B, classes): one-hot rows, and rows of zeros for the label ``classes``, which stands for none, or for None."""
    if label is None:
        return like.new_zeros(len(like), classes)
    if label.ndim != 1 or label.is_floating_point():
        raise ValueError(f"label must be integers (B,), got {label.dtype} of shape {tuple(label.shape)}")
    return functional.one_hot(label.long(), classes + 1)[:, :classes].to(like.dtype)


class Block(nn.Module):
    """norm, silu, convolution, time, norm, silu, convolution, beside the way round; then attention beside nothing."""

    def __init__(
        self,
        width_in: int,
        width: int,
        emb: int,
        config: EDMUNetConfig,
        impl: str,
        change="keep",
        attends=False,
    ):
        super().__init__()
        style, taps = STYLES[config.kind], config.resample_filter
        self.style, self.dropout, self.impl = style, config.dropout, impl
        self.heads = (width // style.head_width if style.head_width else 1) if attends else 0
        self.norm0 = norm(width_in, style.eps)
        self.conv0 = Conv(width_in, width, 3, change, taps)
        self.affine = nn.Linear(emb, width * (2 if style.modulates else 1))
        self.norm1 = norm(width, style.eps)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width or (style.projects and change != "keep"):
            self.skip = Conv(width_in, width, 1, change, taps)
        else:
            self.skip = nn.Identity() if change == "keep" else Resample(change, taps)
        if self.heads:
            self.norm2 = norm(width, style.eps)
            self.qkv = nn.Conv2d(width, 3 * width, 1)
            self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h, time = self.conv0(silu(self.norm0(x))), self.affine(emb)[:, :, None, None]
        if self.style.modulates:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + time)
        h = self.conv1(functional.dropout(silu(h), self.dropout, self.training))
        return self.attended((self.skip(x) + h) * self.style.skip_scale)

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        """x and what attention adds to it, in blocks that attend."""
        if not self.heads:
            return x
        # channels are ordered (head, channel, q k v)
        qkv = self.qkv(self.norm2(x)).reshape(len(x), self.heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))
        mixed = attention(q, k, v, self.impl).transpose(2, 3).reshape(x.shape)
        return (self.proj(mixed) + x) * self.style.skip_scale


class EDMUNet(nn.Module):
    """The net; ``attention`` is ``sdpa`` or ``xformers`` and no part of the config, since it changes no number."""

    def __init__(self, config: EDMUNetConfig | Mapping[str, Any], attention: str = "sdpa"):
        super().__init__()
        config = config if isinstance(config, EDMUNetConfig) else EDMUNetConfig.from_dict(config)
        check_implementation(attention)
        self.config, song = config, config.kind == "song"
        base, taps = config.model_channels, config.resample_filter
        widths = [base * mult for mult in config.channel_mult]
        sizes = [config.img_resolution >> level for level in range(len(widths))]
        emb, noise = base * config.channel_mult_emb, base * (config.channel_mult_noise if song else 1)

        self.map_noise = Fourier(noise) if song and config.embedding_type == "fourier" else nn.Identity()
        self.noise_width = noise
        if config.label_dim:
            self.map_label = nn.Linear(config.label_dim, noise if song else emb, bias=song)
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)

        def block(width_in: int, width: int, change: str = "keep", attends: bool = False) -> Block:
            return Block(width_in, width, emb, config, attention, change, attends)

        self.enc, kept = nn.ModuleDict(), []  # kept: the widths that the way up takes back
        here = base if song else widths[0]
        aux = config.in_channels
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv(config.in_channels, here, 3)
            else:
                self.enc[f"{size}x{size}_down"] = block(here, here, "down")
                if song and config.encoder_type == "skip":
                    self.enc[f"{size}x{size}_aux_down"] = Resample("down", taps)
                    self.enc[f"{size}x{size}_aux_skip"] = Conv(aux, here, 1)
                if song and config.encoder_type == "residual":
                    self.enc[f"{size}x{size}_aux_residual"] = Conv(aux, here, 3, "down", taps, fused=True)
                    aux = here
            kept.append(here)
            for k in range(config.num_blocks):
                attends = size in config.attn_resolutions
                self.enc[f"{size}x{size}_block{k}"] = block(here, width, attends=attends)
                here = width
                kept.append(here)

        self.dec = nn.ModuleDict()
        for level, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            lowest = level == len(widths) - 1
            if lowest:
                self.dec[f"{size}x{size}_in0"] = block(here, here, attends=True)
                self.dec[f"{size}x{size}_in1"] = block(here, here)
            else:
                self.dec[f"{size}x{size}_up"] = block(here, here, "up")
            for k in range(config.num_blocks + 1):
                attends = size in config.attn_resolutions and (not song or k == config.num_blocks)
                self.dec[f"{size}x{size}_block{k}"] = block(here + kept.pop(), width, attends=attends)
                here = width
            if song and (config.decoder_type == "skip" or level == 0):
                if not lowest and config.decoder_type == "skip":
                    self.dec[f"{size}x{size}_aux_up"] = Resample("up", taps)
                self.dec[f"{size}x{size}_aux_norm"] = norm(here, 1e-6)
                self.dec[f"{size}x{size}_aux_conv"] = Conv(here, config.out_channels, 3)
        if not song:
            self.out_norm, self.out_conv = norm(here, 1e-5), Conv(here, config.out_channels, 3)
        self._start()

    @property
    def null_label(self) -> int | None:
        """The index that stands for no label. None for an unconditional net."""
        return self.config.label_dim or None

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, C, H, W) with H = W = img_resolution, t (B,) as the net counts time, label (B,) or None."""
        config = self.config
        wanted = (config.in_channels, config.img_resolution, config.img_resolution)
        if x.ndim != 4 or x.shape[1:] != wanted:
            raise ValueError(f"x must be (B, {', '.join(map(str, wanted))}), got {tuple(x.shape)}")
        emb = self._embedding(torch.as_tensor(t, device=x.device).expand(len(x)), label, x)
        x, kept = self._down(x, emb)
        return self._up(x, kept, emb)

    def _embedding(self, t: torch.Tensor, label: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        config, song = self.config, self.config.kind == "song"
        if isinstance(self.map_noise, Fourier):
            features = self.map_noise(t).roll(self.noise_width // 2, dims=1)  # sines first
        else:
            features = time_features(t, self.noise_width, flip_sin_to_cos=not song, freq_shift=int(song))
        emb = features.to(x.dtype)
        if label is not None and not config.label_dim:
            raise ValueError("label was given to an unconditional net (label_dim is 0)")
        if config.label_dim:
            weights = class_weights(label, config.label_dim, x)
        if not song:
            emb = self.map_layer1(silu(self.map_layer0(emb)))
            return silu(emb + self.map_label(weights) if config.label_dim else emb)
        if config.label_dim:
            emb = emb + self.map_label(weights * math.sqrt(config.label_dim))
        return silu(self.map_layer1(silu(self.map_layer0(emb))))

    def _down(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        kept, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                x = kept[-1] = x + layer(aux)
            elif name.endswith("aux_residual"):
                x = kept[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                kept.append(x)
        return x, kept

    def _up(self, x: torch.Tensor, kept: list[torch.Tensor], emb: torch.Tensor) -> torch.Tensor:
        out, normed = None, x
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                out = layer(out)
            elif name.endswith("aux_norm"):
                normed = layer(x)
            elif name.endswith("aux_conv"):
                made = layer(silu(normed))
                out = made if out is None else made + out
            else:
                x = layer(torch.cat([x, kept.pop()], dim=1) if "_block" in name else x, emb)
        return out if self.config.kind == "song" else self.out_conv(silu(self.out_norm(x)))

    def _start(self) -> None:
        """The initial weights of the paper's code: blocks begin as (nearly) nothing beside the way round."""
        song = self.config.kind == "song"
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            last = name.split(".")[-1]
            gain = 1e-5 if last in ("conv1", "proj") or last.endswith(("aux_conv", "out_conv")) else 1.0
            if song:
                nn.init.xavier_uniform_(module.weight, math.sqrt(0.2) if last == "qkv" else gain)
                nn.init.zeros_(module.bias)
            elif gain != 1.0:  # of the others torch's own start is the paper's
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif last == "map_label":
                nn.init.normal_(module.weight)
