"""Networks of two times: bit-equal to what they were made from until trained, told the right gap, saved and built."""

import pytest
import torch

from fewstep.models import load
from fewstep.models.jumps import has_second_time, jumping, with_second_time
from fewstep.models.load import build, save_checkpoint
from fewstep.samplers import ddim, euler, sample

FLOW = {"path": {"path": "flow"}, "predicts": "flow"}
NETS = {
    "unet": {"type": "unet", "block_out_channels": [8, 8], "norm_num_groups": 4, "num_class_embeds": 11},
    "dit": {"type": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2, "num_class_embeds": 11},
    "mlp": {"type": "mlp", "hidden_size": 16, "depth": 1, "num_class_embeds": 11},
}


def made(kind, second=True):
    torch.manual_seed(0)
    shape = [2] if kind == "mlp" else [1, 8, 8]
    d = build({**FLOW, "shape": shape, "net": {**NETS[kind], "second_time": second}})
    with torch.no_grad():
        for p in d.net.parameters():
            p.normal_(std=0.3)
    return d


@pytest.mark.parametrize("kind", NETS)
def test_a_second_time_starts_silent_and_is_read(kind):
    teacher = made(kind, second=False)
    twin = with_second_time(teacher)
    assert has_second_time(twin) and not has_second_time(teacher)
    x, t = torch.randn(3, *teacher.shape), torch.tensor([0.2, 0.7, 1.0])
    label, gap = torch.tensor([0, 4, 10]), torch.tensor([0.1, 0.7, 0.0])
    plain = teacher.raw(x, t, label=label)[0]
    assert torch.equal(twin.raw(x, t, label=label, gap=gap)[0], plain)
    assert torch.equal(twin.raw(x, t, label=label)[0], plain)
    torch.nn.init.normal_(twin.net.gap_embedding.linear_2.weight)
    told = twin.raw(x, t, label=label, gap=gap)[0]
    assert not torch.allclose(told[0], plain[0]) and not torch.allclose(told[1], plain[1])
    torch.testing.assert_close(told[2], twin.raw(x, t, label=label)[0][2])  # no gap is a gap of 0
    with pytest.raises(ValueError, match="second_time is false"):
        teacher.raw(x, t, gap=gap)


def test_an_embedded_teacher_with_a_second_time_is_the_teacher_to_the_bit():
    teacher = load("digits-flow")
    twin = with_second_time(teacher)
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    assert torch.equal(twin(x, t, label=label, gap=t), teacher(x, t, label=label))
    added = set(twin.net.state_dict()) - set(teacher.net.state_dict())
    assert added == {f"gap_embedding.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")}


def test_each_step_is_told_the_gap_to_its_end():
    d = made("mlp")
    seen = []
    ask = d.call
    times = [1.0, 0.7, 0.2, 0.0]
    jumps = jumping(d, times)
    jumps.call = lambda x, tau, gap, **cond: seen.append(gap) or ask(x, tau, gap=gap, **cond)
    x = torch.randn(2, 2)
    sample(jumps, x, ddim(d.path, times))
    wanted = torch.tensor([[0.3], [0.5], [0.2]]).expand(3, 2)
    torch.testing.assert_close(torch.stack(seen), wanted)
    seen.clear()
    # as tensors too, whatever float32 made of the time
    jumps.raw(torch.randn(3, 2), torch.tensor([1.0, 0.7, 0.2]))
    torch.testing.assert_close(seen[0], wanted[:, 0])


@pytest.mark.parametrize("table", [ddim, euler])
def test_the_few_step_rule_is_a_step_of_euler_with_the_average_velocity(table):
    d, times = made("mlp"), [1.0, 0.6, 0.0]
    x = z = torch.randn(5, 2, dtype=torch.float64)
    d.net.double()
    for t, r in zip(times, times[1:], strict=False):
        z = z - (t - r) * d.raw(z, t, gap=torch.full((5,), t - r, dtype=torch.float64))[0]
    torch.testing.assert_close(sample(jumping(d, times), x, table(d.path, times)), z, rtol=1e-6, atol=1e-6)


def test_jumps_are_saved_and_copied(tmp_path):
    d = jumping(made("unet"), [1.0, 0.5, 0.0])
    save_checkpoint(tmp_path / "a.safetensors", d, d.config)
    x, t = torch.randn(2, 1, 8, 8), 0.8
    again, twin = load(tmp_path / "a.safetensors"), d.copy()
    assert again.ends == twin.ends == (0.0, 0.5, 1.0)
    torch.testing.assert_close(again(x, t), d(x, t))
    torch.testing.assert_close(twin(x, t), d(x, t))
    assert not torch.allclose(d(x, t), jumping(d, [1.0, 0.0])(x, t))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="it predicts x0 on edm"):
        jumping(load("digits-edm"), [1.0, 0.0])
    with pytest.raises(ValueError, match="times must end at 0.0"):
        jumping(made("mlp"), [1.0, 0.5])
    with pytest.raises(ValueError, match="second_time: diffusers' UNet2DModel has one time"):
        made("unet").net.to_diffusers()
