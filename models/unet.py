"""A small U-Net (1505.04597, 2006.11239) that is a strict subset of diffusers' ``UNet2DModel``.

Its configuration uses diffusers' names and its state dict diffusers' keys, so a net goes over and back without any
conversion of weights (``to_diffusers``, ``from_diffusers``), and a student trained here needs nothing but diffusers.

    >>> net = UNet(UNetConfig(sample_size=8, block_out_channels=(8, 16), num_class_embeds=11, norm_num_groups=4))
    >>> net(torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 500.0]), label=torch.tensor([3, 10])).shape
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

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")

# diffusers' further options, with the only value that this net has for each
_FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "class_embed_type": None,
    "num_train_timesteps": None,
}


@dataclass(frozen=True)
class UNetConfig:
    """What makes a ``UNet``; names and meanings are diffusers'.

    ``num_class_embeds`` counts the null label, which is the last index: 11 for ten classes. ``attention_head_dim``
    None means one head. Tuples may be given as lists. ``second_time`` is not diffusers': the net is also told how far
    a step leads (see ``jumps``).
    """

    sample_size: int | None = None
    in_channels: int = 1
    out_channels: int = 1
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (16, 32)
    layers_per_block: int = 1
    attention_head_dim: int | None = 8
    add_attention: bool = True
    norm_num_groups: int = 8
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    dropout: float = 0.0
    resnet_time_scale_shift: str = "default"
    downsample_padding: int = 1
    time_embedding_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    num_class_embeds: int | None = None
    second_time: bool = False

    def __post_init__(self):
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        widths = self.block_out_channels
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            kinds = getattr(self, name)
            if len(kinds) != len(widths) or not widths:
                raise ValueError(f"{name} must have one entry per block_out_channels {widths}, got {kinds}")
            if unknown := set(kinds) - set(known):
                raise ValueError(
                    f"{name} may hold {' and '.join(known)}, got {', '.join(sorted(map(str, unknown)))}"
                )
        if self.layers_per_block < 1:
            raise ValueError(f"layers_per_block must be at least 1, got {self.layers_per_block}")
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            raise ValueError(
                f"resnet_time_scale_shift must be 'default' or 'scale_shift', got {self.resnet_time_scale_shift!r}"
            )
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding must be 0 or 1, got {self.downsample_padding}")
        attentive = {
            w for w, kind in zip(widths, self.down_block_types, strict=True) if kind.startswith("Attn")
        }
        attentive |= {
            w for w, kind in zip(widths[::-1], self.up_block_types, strict=True) if kind.startswith("Attn")
        }
        attentive |= {widths[-1]} if self.add_attention else set()
        for width in widths:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} must divide every width of {widths}"
                )
            if self.attention_head_dim and width in attentive and width % self.attention_head_dim:
                raise ValueError(
                    f"attention_head_dim {self.attention_head_dim} must divide the width {width}"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """From a dict such as ``UNet2DModel.config``; keys that start with _ are skipped.

        Raises ValueError on an option that this net does not have.
        """
        known = {field.name for field in fields(cls)}
        kept = {}
        for key, value in config.items():
            if key in known:
                kept[key] = value
            elif key in _FIXED:
                if value != _FIXED[key]:
                    raise ValueError(f"{key}={value!r} is not in this U-Net, which has only {_FIXED[key]!r}")
            elif not key.startswith("_"):
                raise ValueError(f"unknown key {key!r}; a U-Net's config has {', '.join(sorted(known))}")
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def time_frequencies(dim: int, freq_shift: int = 0) -> torch.Tensor:
    """10000^{-i / (dim/2 - freq_shift)}, i < dim/2: radians per unit of the network's time, in float32."""
    half = dim // 2
    # rounded in diffusers' order: at tau = 1000 one bit of a frequency is 1e-5 of an angle
    return torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / (half - freq_shift))


def time_features(
    tau: torch.Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: int = 0
) -> torch.Tensor:
    """Cosines and sines of tau x ``time_frequencies``: (B,) -> (B, dim), in float32; sines first unless flipped.

    >>> time_features(torch.zeros(1), 4)
    tensor([[1., 1., 0., 0.]])
    """
    angles = tau.float()[:, None] * time_frequencies(dim, freq_shift).to(tau.device)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return functional.pad(torch.cat(waves, dim=-1), (0, dim % 2))


class TimeMLP(nn.Module):
    """Two linear layers over the time features."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(functional.silu(self.linear_1(features)))


class GapMLP(TimeMLP):
    """What a second time adds to the time's embedding: an MLP of the gap between them, (B,) -> (B, width); at first 0.

    The gap is in the path's own time, at most 1, and no wave of its features is faster than 1 radian: what is
    differentiated along time must be smooth in it.
    """

    def __init__(self, dim: int, width: int):
        super().__init__(dim, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, gap: torch.Tensor) -> torch.Tensor:
        weight = self.linear_1.weight
        return super().forward(time_features(gap, weight.shape[1]).to(weight.dtype))


class ResBlock(nn.Module):
    """norm, silu, conv, time, norm, silu, conv, and the way round (a 1x1 convolution where the width changes)."""

    def __init__(self, width_in: int, width_out: int, config: UNetConfig, time_width: int):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.modulates = config.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(groups, width_in, eps)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, width_out * (2 if self.modulates else 1))
        self.norm2 = nn.GroupNorm(groups, width_out, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        time = self.time_emb_proj(functional.silu(emb))[:, :, None, None]
        if self.modulates:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        return self.conv_shortcut(x) + self.conv2(self.dropout(functional.silu(h)))


class SelfAttention(nn.Module):
    """Attention over the pixels of a feature map, added to it."""

    def __init__(self, width: int, head_dim: int | None, groups: int | None, eps: float, impl: str):
        super().__init__()
        self.heads, self.impl = width // (head_dim or width), impl
        self.group_norm = nn.GroupNorm(groups, width, eps) if groups else nn.Identity()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = attention(q, k, v, self.impl).transpose(1, 2).flatten(2)
        return x + self.to_out[0](mixed).transpose(1, 2).reshape(x.shape)


class Resample(nn.Module):
    """Half or twice the size by a 3x3 convolution; padding 0 pads on the right and below only, as DDPM did."""

    def __init__(self, width: int, direction: str, padding: int = 1):
        super().__init__()
        self.direction, self.padding = direction, padding
        down = direction == "down"
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=padding if down else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.direction == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.padding == 0:
            x = functional.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Stage(nn.Module):
    """The blocks at one size: residual blocks (each with attention or none), then perhaps a change of size."""

    def __init__(
        self, widths_in: list[int], width: int, attends: bool, config: UNetConfig, time_width: int, impl: str
    ):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(w, width, config, time_width) for w in widths_in)
        self.attentions = nn.ModuleList(
            SelfAttention(width, config.attention_head_dim, config.norm_num_groups, config.norm_eps, impl)
            if attends
            else nn.Identity()
            for _ in widths_in
        )


class DownStage(Stage):
    """Every feature map that it makes is kept for the way up."""

    def __init__(self, *args, halve: bool, padding: int, **kwargs):
        super().__init__(*args, **kwargs)
        width = self.resnets[0].conv1.out_channels
        self.downsamplers = nn.ModuleList([Resample(width, "down", padding)] if halve else [])

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        kept = []
        for resnet, attend in zip(self.resnets, self.attentions, strict=True):
            x = attend(resnet(x, emb))
            kept.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            kept.append(x)
        return x, kept


class UpStage(Stage):
    """Every residual block first takes back a feature map of the way down, the newest first."""

    def __init__(self, *args, double: bool, **kwargs):
        super().__init__(*args, **kwargs)
        width = self.resnets[0].conv1.out_channels
        self.upsamplers = nn.ModuleList([Resample(width, "up")] if double else [])

    def forward(self, x: torch.Tensor, kept: list[torch.Tensor], emb: torch.Tensor) -> torch.Tensor:
        # nothing is taken out of the list: sharded modules are handed a copy of it
        for resnet, attend, old in zip(self.resnets, self.attentions, reversed(kept), strict=True):
            x = attend(resnet(torch.cat([x, old], dim=1), emb))
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MidStage(nn.Module):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, config: UNetConfig, time_width: int, impl: str):
        super().__init__()
        width, groups = config.block_out_channels[-1], config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        self.resnets = nn.ModuleList(ResBlock(width, width, config, time_width) for _ in range(2))
        self.attentions = nn.ModuleList(
            [SelfAttention(width, config.attention_head_dim, groups, config.norm_eps, impl)]
            if config.add_attention
            else [nn.Identity()]
        )

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, emb)), emb)


def with_gap(embedding: torch.Tensor, mlp: GapMLP | None, gap: torch.Tensor | None) -> torch.Tensor:
    """The time embedding (B, width) of a net that may have a second time: as it is where there is none."""
    if mlp is None:
        if gap is not None:
            raise ValueError("gap was given to a net of one time (second_time is false)")
        return embedding
    return embedding + mlp(embedding.new_zeros(len(embedding)) if gap is None else gap)


class UNet(nn.Module):
    """The net; ``attention`` is ``sdpa`` or ``xformers`` and no part of the config, since it changes no number."""

    def __init__(self, config: UNetConfig | Mapping[str, Any], attention: str = "sdpa"):
        super().__init__()
        config = config if isinstance(config, UNetConfig) else UNetConfig.from_dict(config)
        check_implementation(attention)
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        time_width = config.time_embedding_dim or 4 * widths[0]
        shared: dict[str, Any] = dict(config=config, time_width=time_width, impl=attention)

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeMLP(widths[0], time_width)
        self.gap_embedding = GapMLP(widths[0], time_width) if config.second_time else None
        self.class_embedding = (
            nn.Embedding(config.num_class_embeds, time_width) if config.num_class_embeds else None
        )

        kept = [widths[0]]  # widths of the feature maps on the way down, newest last
        self.down_blocks = nn.ModuleList()
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            # diffusers' AttnDownBlock2D and DownBlock2D both leave the last stage at its size
            halve = i < len(widths) - 1
            ins = [kept[-1]] + [width] * (layers - 1)
            attends = kind == "AttnDownBlock2D"
            stage = DownStage(ins, width, attends, halve=halve, padding=config.downsample_padding, **shared)
            self.down_blocks.append(stage)
            kept += [width] * (layers + halve)

        self.mid_block = MidStage(**shared)

        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for i, (width, kind) in enumerate(zip(widths[::-1], config.up_block_types, strict=True)):
            ins = [(before if j == 0 else width) + kept.pop() for j in range(layers + 1)]
            double = i < len(widths) - 1
            self.up_blocks.append(UpStage(ins, width, kind == "AttnUpBlock2D", double=double, **shared))
            before = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def null_label(self) -> int | None:
        """The index that stands for no label: the last one. None for an unconditional net."""
        return self.config.num_class_embeds - 1 if self.config.num_class_embeds else None

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        label: torch.Tensor | None = None,
        gap: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, C, H, W) with sides divisible by 2^(stages - 1), t (B,) as the net counts time, label (B,) or None.

        ``gap`` (B,): of a net with a second time, how far below t that lies; None is 0.
        """
        config = self.config
        step = 2 ** (len(config.block_out_channels) - 1)
        if x.ndim != 4 or x.shape[1] != config.in_channels or x.shape[2] % step or x.shape[3] % step:
            raise ValueError(f"x must be (B, {config.in_channels}, {step} m, {step} n), got {tuple(x.shape)}")
        t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        features = time_features(t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        emb = with_gap(self.time_embedding(features.to(x.dtype)), self.gap_embedding, gap)
        if self.class_embedding is not None:
            if label is None:
                label = torch.full((x.shape[0],), self.null_label, device=x.device)
            emb = emb + self.class_embedding(label)
        elif label is not None:
            raise ValueError("label was given to an unconditional net (num_class_embeds is None)")

        h = self.conv_in(x)
        kept = [h]
        for down in self.down_blocks:
            h, made = down(h, emb)
            kept += made
        h = self.mid_block(h, emb)
        for up in self.up_blocks:
            first = len(kept) - len(up.resnets)
            h, kept = up(h, kept[first:], emb), kept[:first]
        return self.conv_out(functional.silu(self.conv_norm_out(h)))

    def to_diffusers(self):
        """The same net as a ``diffusers.UNet2DModel`` (its ``class_labels`` are our ``label``, never None)."""
        if self.config.second_time:
            raise ValueError("second_time: diffusers' UNet2DModel has one time")
        from diffusers import UNet2DModel

        config = {k: v for k, v in self.config.to_dict().items() if k != "second_time"}
        first = next(self.parameters())
        # nn.Module's own ``to``: diffusers' override logs a warning about modules that it does not have
        twin = nn.Module.to(UNet2DModel(**config), device=first.device, dtype=first.dtype)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)

    @classmethod
    def from_diffusers(cls, twin, attention: str = "sdpa") -> UNet:
        """From a ``diffusers.UNet2DModel``; ValueError where it has an option that is not here."""
        first = next(twin.parameters())
        net = cls(UNetConfig.from_dict(dict(twin.config)), attention).to(
            device=first.device, dtype=first.dtype
        )
        net.load_state_dict(twin.state_dict())
        return net.train(twin.training)
