"""The U-Net against diffusers' UNet2DModel, weight for weight."""

from __future__ import annotations

import pytest
import torch

from fewstep.models.attention import attention, versions
from fewstep.models.unet import UNet, UNetConfig, time_features

CONFIGS = {
    "small": dict(block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=11, sample_size=8),
    "unconditional": dict(block_out_channels=(8, 16), norm_num_groups=4),
    "plain": dict(
        block_out_channels=(8, 8, 16),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
        layers_per_block=2,
    ),
    "ddpm": dict(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        layers_per_block=2,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ),
    "scale_shift": dict(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
        time_embedding_dim=24,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        num_class_embeds=3,
    ),
    "scale_shift_mid_norm": dict(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=2,
    ),
}


def random_net(name: str, dtype: torch.dtype) -> UNet:
    torch.manual_seed(0)
    net = UNet(CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():  # norms and biases too, or a swapped pair would go unseen
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.5 / max(1, p[0].numel()) ** 0.5) + (0.5 if p.ndim == 1 else 0.0))
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name, dtype):
    pytest.importorskip("diffusers")
    net = random_net(name, dtype)
    x = torch.randn(3, net.config.in_channels, 8, 8, dtype=dtype)
    t = torch.tensor([0.25, 3.0, 997.5])
    label = torch.tensor([0, 1, 2]) if net.config.num_class_embeds else None
    twin = net.to_diffusers()
    assert list(twin.state_dict()) and set(twin.state_dict()) == set(net.state_dict())
    with torch.no_grad():
        ours, theirs = net(x, t, label), twin(x, t, label).sample
        back = UNet.from_diffusers(twin)(x, t, label)
    assert ours.std() > 0.01
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))
    assert torch.equal(ours, back)


def test_label_time_and_null_label_matter():
    net = random_net("small", torch.float32)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 400.0])
    with torch.no_grad():
        null = net(x, t)
        assert torch.equal(null, net(x, t, torch.tensor([10, 10])))
        assert (null - net(x, t, torch.tensor([3, 3]))).abs().max() > 1e-3
        assert (null - net(x, t.flip(0))).abs().max() > 1e-3
        assert torch.allclose(net(x, 5.0), net(x, torch.tensor([5.0, 5.0])))


def test_config_survives_a_dict_and_refuses_what_is_not_here():
    config = UNetConfig(**CONFIGS["ddpm"])
    assert UNetConfig.from_dict(config.to_dict()) == config
    assert (
        UNetConfig.from_dict({**config.to_dict(), "act_fn": "silu", "_class_name": "UNet2DModel"}) == config
    )
    for wrong, named in [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"widths": (8,)}, "widths"),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, "SkipDownBlock2D"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"attention_head_dim": 5}, "attention_head_dim"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
    ]:
        with pytest.raises(ValueError, match=named):
            UNetConfig.from_dict(wrong)


def test_bad_inputs_say_what_is_wrong():
    net = random_net("unconditional", torch.float32)
    with pytest.raises(ValueError, match="x must be"):
        net(torch.zeros(2, 1, 7, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="unconditional"):
        net(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_time_features_are_sines_of_geometric_frequencies():
    f = time_features(torch.tensor([2.0]), 5)
    expected = torch.tensor([[2.0, 0.02]])
    assert torch.allclose(f, torch.cat([expected.cos(), expected.sin(), torch.zeros(1, 1)], dim=1))


def test_attention_names_both_versions_when_xformers_is_missing():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="sdpa, xformers"):
        attention(q, q, q, "flash")
    try:
        out = attention(q, q, q, "xformers")
    except (ImportError, RuntimeError) as error:
        assert "xformers" in str(error) and torch.__version__ in str(error) and versions() in str(error)
    else:
        assert torch.allclose(out, attention(q, q, q), atol=1e-5)
