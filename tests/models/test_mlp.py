"""The MLP for points: fresh it answers 0, it knows time and label, and a Denoiser over it is saved and copied."""

import pytest
import torch

from fewstep.models import load
from fewstep.models.load import build, save_checkpoint
from fewstep.models.mlp import MLP, MLPConfig

CONFIG = {"path": {"path": "edm"}, "predicts": "x0", "precond": "edm", "sigma_data": 0.5, "shape": [2],
          "net": {"type": "mlp", "dim": 2, "hidden_size": 16, "depth": 2, "num_class_embeds": 4}}  # fmt: skip


def stirred(net):
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=random))
    return net


def test_fresh_it_answers_zero_and_stirred_it_reads_everything():
    net = MLP(MLPConfig(dim=3, hidden_size=16, num_class_embeds=4))
    x, tau, label = torch.randn(5, 3), torch.rand(5), torch.tensor([0, 1, 2, 3, 0])
    assert net(x, tau, label).abs().max() == 0
    out = stirred(net)(x, tau, label)
    assert not torch.allclose(out, net(x, tau + 0.5, label))
    assert torch.equal(net(x, tau), net(x, tau, torch.full((5,), 3)))  # no label is the null label
    assert not torch.allclose(out, net(x, tau))


def test_it_is_saved_loaded_and_copied(tmp_path):
    d = build(CONFIG)
    stirred(d.net)
    save_checkpoint(tmp_path / "mlp.safetensors", d, CONFIG)
    again = load(tmp_path / "mlp.safetensors")
    twin = d.copy()
    x, t, label = torch.randn(5, 2), torch.full((5,), 1.5), torch.zeros(5, dtype=torch.long)
    assert torch.equal(d(x, t, label=label), again(x, t, label=label))
    assert torch.equal(d(x, t, label=label), twin(x, t, label=label))
    with torch.no_grad():
        twin.net.outputs.bias += 1
    assert not torch.allclose(d(x, t, label=label), twin(x, t, label=label))


def test_wrong_config_is_named():
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        MLPConfig(hidden_size=0)
    with pytest.raises(ValueError, match="unknown key width"):
        MLPConfig.from_dict({"width": 3})
    with pytest.raises(ValueError, match="waves must be 0 or more, got -1"):
        MLPConfig(waves=-1)


def test_waves_learn_what_is_narrow():
    """One spike of width 0.05: in as many steps the error with waves is a small part of that without."""
    x = torch.linspace(-1.5, 1.5, 128)[:, None]
    spike = torch.exp(-0.5 * ((x - 0.4) / 0.05) ** 2)
    left = {}
    for waves in (0, 4):
        torch.manual_seed(0)
        net = MLP(MLPConfig(dim=1, hidden_size=32, depth=1, waves=waves))
        adam = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(60):
            loss = (net(x, torch.zeros(len(x))) - spike).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        left[waves] = float(loss.detach()) / float(spike.var())
    assert left[4] < 0.2 * left[0]
