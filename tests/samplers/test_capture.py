"""The captured loop: on a CPU it is ``sample``; recorded, it answers anew from its buffers and remembers nothing else.

A recording by ``make_fx`` stands for the CUDA graph where there is none: like one it replays the same operations on the
same tensors, with everything that Python decided burnt in.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fewstep.models import Denoiser, paths
from fewstep.samplers import abm, capture, cfg, deis, grids, heun, sample, sde_dpmpp, starting_noise
from fewstep.samplers.fused import Clip

module = importlib.import_module("fewstep.samplers.capture")  # its name is the function's, in the package

PATH = paths.flow()
SHAPE = (3, 2, 4)
CUDA = torch.cuda.is_available()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.8))

    def forward(self, x, tau, label=None, extra=None):
        out = torch.tanh(x * self.weight + tau.reshape(-1, 1, 1))
        if label is not None:
            out = out + 0.1 * label.reshape(-1, 1, 1)
        return out if extra is None else out * extra["scale"][0]


def network(predicts="x0"):
    net = Net()
    return Denoiser(net, PATH, predicts=predicts, net=net)


@pytest.fixture
def recorded(monkeypatch):
    """Record on a CPU, too."""

    def record(body, device):
        body()
        traced = make_fx(lambda nothing: body())(torch.zeros(0))
        return lambda: traced(torch.zeros(0))

    monkeypatch.setattr(module, "_records", lambda device: True)
    monkeypatch.setattr(module, "_record", record)


TABLES = {
    "abm": abm(PATH, grids.vp(PATH, 4)),
    "heun": heun(PATH, grids.vp(PATH, 3)),
    "deis": deis(PATH, grids.vp(PATH, 5)),
    "sde_dpmpp": sde_dpmpp(PATH, grids.vp(PATH, 3)),
}


def check(d, table, device="cpu"):
    cond = {"label": torch.arange(3, device=device), "extra": {"scale": [torch.tensor(0.5, device=device)]}}
    fast = capture(d, table, SHAPE, cond, device=device)
    for seed, ids in ((0, None), (1, None), (2**63, torch.tensor([7, 1, 2**32 - 1]))):
        noise = starting_noise(seed, 3, SHAPE[1:]).to(device)
        fresh = {
            "label": cond["label"] + seed % 7,
            "extra": {"scale": [torch.tensor(0.5 + seed % 3, device=device)]},
        }
        ids = ids if ids is None else ids.to(device)
        expected = sample(d, noise, table, cond=fresh, seed=seed, ids=ids)
        found = fast(noise, fresh, seed=seed, ids=ids)
        assert torch.equal(found, expected)
        again = fast(noise, fresh, seed=seed, ids=ids)
        assert torch.equal(again, expected) and again.data_ptr() != found.data_ptr()
    return fast


@pytest.mark.parametrize("name", TABLES)
def test_on_a_cpu_it_is_sample(name):
    fast = check(network(), TABLES[name])
    assert (
        fast.report()
        == f"{TABLES[name].calls} calls of {name} on (3, 2, 4), one by one: there is no CUDA graph on cpu"
    )


@pytest.mark.parametrize("name", TABLES)
def test_a_recording_answers_to_its_arguments_alone(name, recorded):
    assert "as one CUDA graph" in check(network(), TABLES[name]).report()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("name", TABLES)
def test_a_graph_answers_to_its_arguments_alone(name):
    d = network()
    d.to("cuda")
    assert "as one CUDA graph" in check(d, TABLES[name], "cuda").report()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_graph_copies_nothing_to_the_host():
    d = network()
    d.to("cuda")
    fast, noise = capture(d, TABLES["sde_dpmpp"], SHAPE), starting_noise(0, 3, SHAPE[1:]).to("cuda")
    fast(noise)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fast(noise, seed=1, check="off")
        torch.cuda.synchronize()
    assert not [e.name for e in profile.events() if "DtoH" in e.name]


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_what_a_graph_cannot_hold():
    asks = Denoiser(lambda x, tau: x * float(x.sum()), PATH, predicts="x0")
    with pytest.raises(RuntimeError, match="a CUDA graph cannot hold aten::_local_scalar_dense"):
        capture(asks, TABLES["deis"], SHAPE, device="cuda")


def test_the_parameters_are_read_where_they_stand(recorded):
    d, table, noise = network(), TABLES["deis"], starting_noise(0, 3, SHAPE[1:])
    fast = capture(d, table, SHAPE)
    before = fast(noise)
    with torch.no_grad():
        d.net.weight.mul_(1.5)
    assert torch.equal(fast(noise), sample(d, noise, table)) and not torch.equal(fast(noise), before)


def test_guidance_lanes_and_transforms(recorded):
    import numpy as np

    d = cfg(network("flow"), 2.5, null={"label": torch.zeros(3)})
    table = sde_dpmpp(PATH, np.stack([grids.vp(PATH, 3), grids.uniform(PATH, 3)]))
    noise, cond = starting_noise(0, 3, SHAPE[1:]), {"label": torch.arange(3)}
    for lane in (1, torch.tensor([0, 1, 1])):
        options = dict(lane=lane, transform=Clip(0.9))
        fast = capture(d, table, SHAPE, cond, **options)
        for seed in (0, 3):
            expected = sample(d, noise, table, cond=cond, seed=seed, **options)
            torch.testing.assert_close(fast(noise, cond, seed=seed), expected, rtol=1e-6, atol=1e-6)


def test_outputs_that_are_not_finite(recorded):
    d, noise = network(), starting_noise(0, 3, SHAPE[1:])
    fast = capture(d, TABLES["deis"], SHAPE, {"label": torch.zeros(3)})
    with pytest.raises(ValueError, match="not finite at step 0 of 5"):
        fast(noise, {"label": torch.full((3,), float("nan"))})
    assert fast(noise, {"label": torch.full((3,), float("nan"))}, check="off").isnan().all()


def test_what_was_captured_is_what_may_come():
    noise = starting_noise(0, 3, SHAPE[1:])
    fast = capture(network(), TABLES["deis"], SHAPE, {"label": torch.zeros(3), "extra": None})
    for changed, message in (
        (
            dict(noise=noise[:2]),
            "noise must be torch.float32 of shape \\(3, 2, 4\\), as captured, got torch.float32 of shape",
        ),
        (dict(noise=noise.double()), "noise must be torch.float32"),
        (
            dict(cond={"label": torch.zeros(3)}),
            "cond must hold label, extra, as captured; what differs: extra",
        ),
        (dict(cond={"label": torch.zeros(3), "extra": None, "mask": 1}), "what differs: mask"),
        (
            dict(cond={"label": torch.zeros(2), "extra": None}),
            "cond\\[label\\] must be torch.float32 of shape \\(3,\\)",
        ),
        (
            dict(cond={"label": torch.zeros(3), "extra": 2}),
            "cond\\[extra\\] must be None, which is part of what was",
        ),
        (dict(check="each"), "check must be 'end' or 'off', got 'each'"),
    ):
        call = dict(noise=noise, cond={"label": torch.zeros(3), "extra": None}) | changed
        with pytest.raises(ValueError, match=message):
            fast(**call)


def test_what_cannot_be_captured():
    table = TABLES["deis"]
    with pytest.raises(ValueError, match="shape must be \\(batch, ...\\), got \\(3,\\)"):
        capture(network(), table, (3,))
    with pytest.raises(TypeError, match="d must be a Denoiser, got Net"):
        capture(Net(), table, SHAPE)
    with pytest.raises(TypeError, match="table must be a Table, e.g. abm"):
        capture(network(), [1.0, 0.0], SHAPE)
    with pytest.raises(ValueError, match="dtype must be float32 or float64, got torch.float16"):
        capture(network(), table, SHAPE, dtype=torch.float16)


@pytest.mark.parametrize(
    "asks",
    [lambda x: x * float(x.sum()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.sum().item()],
)
def test_waiting_is_seen_before_a_recording_fails(asks):
    with (
        pytest.raises(RuntimeError, match="a CUDA graph cannot hold aten::"),
        module.Watch(torch.device("cpu")),
    ):
        asks(torch.ones(4))
    with module.Watch(torch.device("cuda")):  # what stands on the CPU may be read
        asks(torch.ones(4))
