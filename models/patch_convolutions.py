"""Fused forwards of convolutional blocks for ``patch``: GroupNorm with SiLU, and what the time adds or scales.

Of diffusers' ``ResnetBlock2D`` (U-Nets, AutoencoderKL), of our ``UNet`` and ``EDMUNet``, and every other GroupNorm.
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from ..kernels.group_norm_silu import group_norm_silu
from .patch import altered, replaces

RESNET = "diffusers.models.resnet"
TWO = {"norm1": nn.GroupNorm, "norm2": nn.GroupNorm}


def normed(norm: nn.GroupNorm, x, activation: str = "silu", **more):
    """GroupNorm and SiLU of x, with the norm's parameters."""
    return group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation=activation, **more
    )


@replaces("group_norm_silu", sources={})
def group_norm(self, input):
    return normed(self, input, "none") if input.ndim > 2 else NotImplemented


def _resnet(module: nn.Module) -> str | None:
    reason = altered(module.nonlinearity, nn.SiLU)
    return reason and f"nonlinearity {reason}"


@replaces(
    "group_norm_silu",
    inner=TWO,
    check=_resnet,
    sources={f"{RESNET}:ResnetBlock2D.forward": ("987d53cefdc4c8bf", "2f935d1a457ab647")},
)
def resnet_block(self, input_tensor, temb, *args, **kwargs):
    x = input_tensor
    if args or kwargs or (temb is not None and (self.time_emb_proj is None or temb.ndim != 2)):
        return NotImplemented
    modulates = self.time_embedding_norm == "scale_shift"
    timed = modulates or self.time_embedding_norm == "default"
    if (temb is None and (modulates or self.time_emb_proj is not None)) or (temb is not None and not timed):
        return NotImplemented
    h = normed(self.norm1, x)
    resample = self.upsample or self.downsample
    if resample is not None:
        if self.upsample is not None and h.shape[0] >= 64:
            x, h = x.contiguous(), h.contiguous()
        x, h = resample(x), resample(h)
    h, more = self.conv1(h), {}
    if temb is not None:
        time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        more = dict(zip(("scale", "shift"), time.chunk(2, dim=1))) if modulates else {"add": time}
    h = self.conv2(self.dropout(normed(self.norm2, h, **more)))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x.contiguous() if self.training else x)
    # dividing by 1 would read and write the whole map once more
    return x + h if self.output_scale_factor == 1 else (x + h) / self.output_scale_factor


@replaces("group_norm_silu", inner=TWO)
def our_res_block(self, x, emb):
    h = self.conv1(normed(self.norm1, x))
    time = self.time_emb_proj(functional.silu(emb))
    more = dict(zip(("scale", "shift"), time.chunk(2, dim=1))) if self.modulates else {"add": time}
    return self.conv_shortcut(x) + self.conv2(self.dropout(normed(self.norm2, h, **more)))


@replaces("group_norm_silu", inner={"norm0": nn.GroupNorm, "norm1": nn.GroupNorm})
def edm_block(self, x, emb):
    h, time = self.conv0(normed(self.norm0, x)), self.affine(emb)
    more = dict(zip(("scale", "shift"), time.chunk(2, dim=1))) if self.style.modulates else {"add": time}
    h = functional.dropout(normed(self.norm1, h, **more), self.dropout, self.training)
    return self.attended((self.skip(x) + self.conv1(h)) * self.style.skip_scale)


RULES = {
    f"{RESNET}.ResnetBlock2D": resnet_block,
    f"{__package__}.unet.ResBlock": our_res_block,
    f"{__package__}.edm_unet.Block": edm_block,
    "torch.nn.modules.normalization.GroupNorm": group_norm,
}
