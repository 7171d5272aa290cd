"""Tiny models with random weights that ``patch`` knows, each with a call: used with and without the interpreter."""

from __future__ import annotations

import torch

from fewstep.kernels.cases import randn
from fewstep.models import DiT, DiTConfig, UNet, UNetConfig
from fewstep.models.edm_unet import EDMUNet, EDMUNetConfig

TIMES = torch.tensor([3.0, 700.0])
LABELS = torch.tensor([1, 2])


def our_dit():
    net = DiT(DiTConfig(sample_size=8, hidden_size=16, depth=2, num_heads=2, num_class_embeds=5))
    return net, lambda m, x: m(x(2, 1, 8, 8), x.of(TIMES), label=LABELS)


def our_unet(modulation="default"):
    widths = dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4)
    net = UNet(UNetConfig(**widths, resnet_time_scale_shift=modulation, layers_per_block=1))
    return net, lambda m, x: m(x(2, 1, 8, 8), x.of(TIMES))


def our_modulated_unet():
    return our_unet("scale_shift")


def edm_unet(kind="song"):
    sizes = dict(img_resolution=8, in_channels=1, out_channels=1, model_channels=16, channel_mult=(1, 2))
    net = EDMUNet(EDMUNetConfig(kind, **sizes, num_blocks=1, attn_resolutions=(4,), dropout=0.0))
    return net, lambda m, x: m(x(2, 1, 8, 8), x.of(TIMES / 700))


def adm_unet():
    return edm_unet("dhariwal")


def dit():
    from diffusers import DiTTransformer2DModel

    sizes = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2)
    net = DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    return net, lambda m, x: m(x(2, 4, 8, 8), timestep=LABELS, class_labels=LABELS).sample


def flux():
    from diffusers import FluxTransformer2DModel

    sizes = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16)
    dims = dict(num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32)
    net = FluxTransformer2DModel(**sizes, **dims, axes_dims_rope=[4, 4, 8])

    def call(m, x):
        text = dict(encoder_hidden_states=x(1, 3, 32), pooled_projections=x(1, 32), txt_ids=x(3, 3))
        return m(hidden_states=x(1, 6, 4), **text, timestep=x.of(TIMES[:1] / 10), img_ids=x(6, 3)).sample

    return net, call


def sd3(**more):
    from diffusers import SD3Transformer2DModel

    sizes = dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8
    )
    dims = dict(num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16)
    net = SD3Transformer2DModel(**sizes, **dims, pooled_projection_dim=32, pos_embed_max_size=8, **more)

    def call(m, x):
        text = dict(encoder_hidden_states=x(2, 3, 16), pooled_projections=x(2, 32))
        return m(hidden_states=x(2, 4, 4, 4), **text, timestep=x.of(TIMES)).sample

    return net, call


def sd35():
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def conditional_unet():
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return net, lambda m, x: m(x(2, 4, 8, 8), x.of(TIMES), x(2, 3, 8)).sample


def unet():
    """With residual blocks that change the size, and modulated norms."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        layers_per_block=1,
    )
    return net, lambda m, x: m(x(2, 1, 8, 8), x.of(TIMES)).sample


def autoencoder():
    from diffusers import AutoencoderKL

    net = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    return net, lambda m, x: m(x(1, 3, 16, 16)).sample


OURS = (our_dit, our_unet, our_modulated_unet, edm_unet, adm_unet)
THEIRS = (dit, flux, sd3, sd35, conditional_unet, unet, autoencoder)


class Inputs:
    """Normals of a dtype: ``x(2, 3)``; ``x.of`` casts."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return randn(*shape, seed=len(shape)).to(self.dtype)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype)


def made(factory, dtype=torch.float64):
    """The net with weights such that nothing in it is off, and a function of it alone."""
    net, call = factory()
    net = net.to(dtype).eval()
    for k, p in enumerate(net.parameters()):
        with torch.no_grad():
            p.copy_(0.15 * randn(*p.shape, seed=k))
    return net, lambda m: call(m, Inputs(dtype))


def gradients(net, call):
    """What it answers, and the gradients of all its parameters."""
    y = call(net)
    found = torch.autograd.grad(y.sin().sum(), list(net.parameters()), allow_unused=True)
    return y.detach(), [None if g is None else g.detach() for g in found]


def apart(one, other):
    """The largest difference of outputs, and of gradients, in units of the largest of each."""
    (y, g), (z, h) = one, other
    assert [v is None for v in g] == [v is None for v in h]
    largest = max(float(v.abs().max()) for v in h if v is not None)
    gap = max(float((v - w).abs().max()) for v, w in zip(g, h, strict=True) if v is not None)
    return float((y - z).abs().max() / z.abs().max()), gap / largest
