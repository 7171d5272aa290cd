"""The flow: its way there and back, its determinant, its order, its guidance and its denoising."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.models import checkpoint
from fewstep.models.tarflow import TarFlow, TarFlowConfig, load_flow, save_flow


def opened(seed: int = 0, std: float = 0.15, **config) -> TarFlow:
    """A small flow in float64 that is not the identity."""
    torch.manual_seed(seed)
    flow = TarFlow(
        TarFlowConfig(**{"hidden_size": 16, "blocks": 3, "depth": 2, "num_heads": 2, **config})
    ).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=std)
    return flow.eval().requires_grad_(False)


def images(flow: TarFlow, n: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, *flow.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_there_and_back_in_float64():
    flow = opened(num_class_embeds=11)
    x, label = images(flow), torch.tensor([0, 3, 9, 10])
    z, _ = flow(x, label)
    assert (z - x).abs().max() > 0.1
    # rounding is magnified by what the blocks stretch, here some tens
    assert (flow.inverse(z, label) - x).abs().max() < 1e-12
    assert (flow(flow.inverse(x, label), label)[0] - x).abs().max() < 1e-12
    assert (flow.inverse(z, label.flip(0)) - x).abs().max() > 1e-3


@pytest.mark.parametrize(
    "config", [{"patch_size": 1, "sample_size": 3}, {"sample_size": 4, "in_channels": 2}]
)
def test_the_determinant_is_the_jacobians(config):
    flow = opened(**config)
    x = images(flow, 3)
    _, log_det = flow(x)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda y: flow(y[None])[0][0].flatten(), x[i])
        assert log_det[i] == pytest.approx(
            float(torch.linalg.slogdet(jacobian.reshape(x[i].numel(), -1))[1]), abs=1e-12
        )
    normal = torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(flow.log_prob(x), normal.log_prob(flow(x)[0]).flatten(1).sum(1) + log_det)


def test_a_token_is_moved_by_those_before_it_alone_and_orders_alternate():
    flow = opened(patch_size=1, sample_size=3)
    for i, block in enumerate(flow.blocks):
        tokens = torch.randn(1, 9, 1, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda t, f=block: f(t)[0], tokens).reshape(9, 9)
        triangle = jacobian.T if i % 2 else jacobian
        assert torch.equal(triangle, triangle.tril()) and (triangle.tril(-1) != 0).sum() == 36
        assert (triangle.diagonal() > 0).all() and triangle[
            (-1 if i % 2 else 0,) * 2
        ] == 1  # the first is passed on


def test_patches_and_back():
    flow = opened(sample_size=6, in_channels=2)
    x = images(flow)
    tokens = flow.patches(x)
    assert tokens.shape == (4, 9, 8) and torch.equal(flow.image(tokens), x)
    assert torch.equal(tokens[:, 5].reshape(4, 2, 2, 2), x[:, :, 2:4, 4:6])


def test_no_label_is_the_null_label():
    flow = opened(num_class_embeds=11)
    x = images(flow)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x, torch.full((4,), flow.null_label)))
    assert torch.equal(flow.inverse(x), flow.inverse(x, torch.full((4,), 10)))


def test_guidance_goes_away_from_no_label():
    """On one block, token by token by hand: every weight is w, or w t / (T - 1)."""
    flow = opened(sample_size=2, patch_size=1, blocks=1, num_class_embeds=3)
    z, label = images(flow), torch.tensor([0, 1, 0, 1])
    (block,) = flow.blocks
    assert torch.equal(flow.inverse(z, label, guidance=0.0), flow.inverse(z, label))
    tokens = flow.patches(z)
    for anneal, weights in (("none", (0.7, 0.7, 0.7)), ("linear", (0.7 / 3, 1.4 / 3, 0.7))):
        x = tokens[:, :1]
        for t, w in enumerate(weights):
            (a, m), (a0, m0) = (
                block.after(x, block.condition(c)) for c in (label, torch.full_like(label, 2))
            )
            a, m = ((f + w * (f - f0))[:, -1:] for f, f0 in ((a, a0), (m, m0)))
            x = torch.cat([x, tokens[:, t + 1 : t + 2] * a.exp() + m], dim=1)
        assert torch.allclose(flow.patches(flow.inverse(z, label, 0.7, anneal)), x, atol=1e-13)
    assert torch.allclose(flow.inverse(z, torch.full((4,), 2), 0.7), flow.inverse(z), atol=1e-13)


def test_denoising_is_tweedies_formula():
    """The identity's density is N(0, 1): N(0, 1 - s^2) with noise s, and the mean of the clean is (1 - s^2) x."""
    flow = TarFlow(TarFlowConfig(hidden_size=8, blocks=1, depth=1, num_heads=1, noise=0.6)).double()
    x = images(flow)
    assert torch.allclose(flow.denoise(x), 0.64 * x) and torch.allclose(flow.denoise(x, scale=0.5), 0.82 * x)
    assert not flow.denoise(x).requires_grad
    with pytest.raises(ValueError, match="noise = 0"):
        opened().denoise(x)


def test_a_network_in_half_precision_keeps_the_state_in_float32():
    flow, small = opened(std=0.1).float(), opened(std=0.1).bfloat16()
    z = images(flow).float()
    x = small.inverse(z)
    assert x.dtype == torch.float32
    # 8 bits: 2^-9 a rounding, a few tens of them
    assert 1e-6 < (x - flow.inverse(z)).abs().max() < 0.1


def test_saved_and_loaded(tmp_path):
    flow = opened(num_class_embeds=11, noise=0.1)
    save_flow(tmp_path / "flow.safetensors", flow, {"steps": 3})
    again = load_flow(tmp_path / "flow.safetensors")
    assert again.config == flow.config and not any(p.requires_grad for p in again.parameters())
    for name, tensor in flow.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float())
    checkpoint.write(tmp_path / "other.safetensors", {}, {"kind": "classifier"})
    with pytest.raises(ValueError, match="got one of a classifier"):
        load_flow(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="digits-tarflow or a file of save_flow, got 'nothing'"):
        load_flow("nothing")


def test_what_ships_is_what_its_card_says():
    """Better than Gaussians on digits that it has not seen, by its own likelihood; and its samples are digits."""
    pytest.importorskip("sklearn")
    from fewstep.models.classifier import load_classifier
    from fewstep.models.digits import digits

    flow = load_flow()
    assert (checkpoint.DATA / "digits-tarflow.safetensors").stat().st_size <= 1_000_000
    metrics = checkpoint.read(checkpoint.DATA / "digits-tarflow.safetensors")[1]["training"]["metrics"]
    x, label = (torch.from_numpy(a) for a in digits("held_out"))
    noisy = x + flow.config.noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    nll = -flow.log_prob(noisy, label) / 64
    # the card's noise was another: the mean over 360 digits strays by its standard error
    error = float(nll.std()) / math.sqrt(len(nll))
    assert abs(float(nll.mean()) - metrics["nll_held_out"]) < 4 * error
    assert float(nll.mean()) + 4 * error < metrics["nll_held_out_of_gaussians"]
    wrong = -flow.log_prob(noisy, (label + 1) % 10) / 64
    assert (wrong > nll).float().mean() > 0.97
    z = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    label = torch.arange(100) % 10
    _, logits = load_classifier()(flow.denoise(flow.inverse(z, label), label))
    # four standard errors of a share of 100 below the card's
    p = metrics["label_accuracy"]
    assert (logits.argmax(-1) == label).float().mean() > p - 4 * math.sqrt(p * (1 - p) / 100) - 0.01


def test_bad_input_is_named():
    flow = opened(num_class_embeds=11)
    x = images(flow)
    for wrong, call in [
        ("x must be floats \\(B, 1, 8, 8\\), got torch.float64 \\(4, 1, 8, 4\\)", lambda: flow(x[..., :4])),
        ("z must be floats .* got torch.int64", lambda: flow.inverse(x.long())),
        ("label must be 4 integers, got torch.int64 of shape \\(3,\\)", lambda: flow(x, torch.arange(3))),
        ("label must be 4 integers, got torch.float32", lambda: flow(x, torch.ones(4))),
        ("guidance must be 0 or more, got -1", lambda: flow.inverse(x, torch.arange(4), -1.0)),
        ("guidance = 1.0 needs a class-conditional flow and labels", lambda: flow.inverse(x, None, 1.0)),
        ("anneal must be none or linear, got 'cosine'", lambda: flow.inverse(x, None, 0.0, "cosine")),
        ("label was given to an unconditional flow", lambda: opened()(x, torch.arange(4))),
        ("patch_size must divide sample_size 8 into two or more, got 3", lambda: TarFlowConfig(patch_size=3)),
        ("into two or more, got 8", lambda: TarFlowConfig(patch_size=8)),
        ("hidden_size must be divisible by num_heads 3, got 16", lambda: opened(num_heads=3)),
        ("blocks must be at least 1, got 0", lambda: opened(blocks=0)),
        ("noise must be a standard deviation, 0 or more, got -0.1", lambda: opened(noise=-0.1)),
        ("unknown key layers; a TarFlow's config has blocks", lambda: TarFlow({"layers": 3})),
    ]:
        with pytest.raises(ValueError, match=wrong):
            call()


def test_an_overflow_is_not_passed_on():
    flow = opened(std=3.0).float()
    with pytest.raises(FloatingPointError, match="not finite"):
        flow.inverse(100 * images(flow).float())
