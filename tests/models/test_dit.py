"""The small transformer."""

from __future__ import annotations

import pytest
import torch

from fewstep.models.dit import DiT, DiTConfig, position_features


def small(**changes) -> DiT:
    torch.manual_seed(0)
    return DiT(DiTConfig(**{"hidden_size": 16, "depth": 2, "num_heads": 2, **changes}))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_fresh_net_answers_zero_and_an_opened_one_does_not(patch):
    net = small(patch_size=patch, in_channels=3, out_channels=2, num_class_embeds=11)
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([3, 10])
    assert torch.equal(net(x, t, label), torch.zeros(2, 2, 8, 8))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    out = net(x, t, label)
    assert out.std() > 1e-3
    for other in (net(x, t.flip(0), label), net(x, t, label.flip(0)), net(x + 0.1, t, label)):
        assert (out - other).abs().max() > 1e-4
    assert torch.equal(net(x, t), net(x, t, torch.tensor([10, 10])))


def test_patches_keep_their_place():
    """With the output layer reading nothing but the tokens, a change in one patch alone moves only that patch."""
    net = small(depth=1)
    with torch.no_grad():
        torch.nn.init.normal_(net.out.weight)  # blocks are still switched off by their gates
    x = torch.randn(1, 1, 8, 8)
    y = x.clone()
    y[..., 2:4, 4:6] += 1
    moved = (net(x, 1.0) - net(y, 1.0)).abs()[0, 0] > 1e-6
    assert moved[2:4, 4:6].all() and moved.sum() == 4


def test_every_parameter_gets_a_gradient():
    net = small(num_class_embeds=3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    net(
        torch.randn(3, 1, 8, 8), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2])
    ).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_positions_differ():
    rows = position_features(4, 16)
    assert rows.shape == (16, 16) and torch.cdist(rows, rows).add(torch.eye(16)).min() > 0.1


def test_bad_configs_and_inputs_say_what_is_wrong():
    for wrong, named in [
        ({"patch_size": 3}, "patch_size"),
        ({"hidden_size": 18, "num_heads": 2}, "hidden_size"),
        ({"num_heads": 5}, "num_heads"),
        ({"depth": 0}, "depth"),
        ({"width": 8}, "width"),
    ]:
        with pytest.raises(ValueError, match=named):
            DiTConfig.from_dict(wrong)
    assert DiTConfig.from_dict(DiTConfig(depth=5).to_dict()) == DiTConfig(depth=5)
    with pytest.raises(ValueError, match="x must be"):
        small()(torch.zeros(1, 1, 4, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="unconditional"):
        small()(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="attention"):
        DiT({}, attention="flash")
