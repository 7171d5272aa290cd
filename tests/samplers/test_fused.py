"""What happens on a GPU, as far as shapes and devices tell: whole loops on tensors that pretend to be on one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.kernels import dispatch
from fewstep.models import Denoiser, paths
from fewstep.samplers import abm, cfg, deis, grids, heun, init, sample, sde_dpmpp, step
from fewstep.samplers.fused import Clip
from fewstep.samplers.stepper import Stepper

PATH = paths.flow()
SOLVERS = {f.__name__: f for f in (abm, deis, heun, sde_dpmpp)}
SHAPE = (3, 4, 8, 8)


class Ops(TorchDispatchMode):
    """Collects the names of what runs."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "available", lambda: True)
    return FakeTensorMode(allow_non_fake_inputs=True)


GPU = torch.device("cuda", 0)


def network(predicts="x0"):
    return Denoiser(lambda x, tau, shift=0.0: x * 0.5 + shift, PATH, predicts=predicts)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_step_is_one_kernel(gpu, name):
    plan = SOLVERS[name](PATH, grids.vp(PATH, 4)).on(network(), GPU)
    with gpu:
        noise = torch.randn(SHAPE, device=GPU)
        sample(network(), noise, plan, check="off")  # uploads the table
        with Ops() as ops:
            x = sample(network(), noise, plan, check="off")
    assert x.shape == noise.shape and x.device == GPU
    table = plan.table
    assert ops.names.count("fewstep::solver_step") == table.calls
    kinds = set(ops.names) - {"fewstep::solver_step"}
    # the network's own, its time, a seed's bits, and views: no arithmetic of ours
    assert kinds <= {"aten::mul.Tensor", "aten::add.Tensor", "aten::full", "aten::slice.Tensor", "aten::arange",
                     "prim::device"}  # fmt: skip
    assert ops.names.count("aten::mul.Tensor") == table.calls + 1  # the opening row scales the noise


def test_a_wait_would_be_seen(gpu):
    asks = Denoiser(lambda x, tau: x * float(x.sum()), PATH, predicts="x0")
    table = deis(PATH, grids.vp(PATH, 3))
    with (
        gpu,
        pytest.raises((DataDependentOutputException, RuntimeError)),
    ):  # the latter in builds without CUDA
        sample(asks, torch.randn(SHAPE, device=GPU), table, check="off")


def test_guidance_clipping_and_noise(gpu):
    d = cfg(network("flow"), 3.0, null={"shift": 0.0})
    table = sde_dpmpp(PATH, grids.vp(PATH, 4))
    with gpu, Ops() as ops:
        noise, shift = torch.randn(SHAPE, device=GPU), torch.ones((), device=GPU)
        sample(d, noise, table, cond={"shift": shift}, transform=Clip(1.0), check="off")
    assert ops.names.count("fewstep::solver_step") == table.calls
    assert "aten::clamp" not in ops.names and "fewstep::philox" not in ops.names


def test_samples_apart(gpu):
    plan = sde_dpmpp(PATH, grids.vp(PATH, 4)).on(network(), GPU)
    with gpu, Ops() as ops:
        state = init(plan, torch.randn(SHAPE, device=GPU))
        state = state._replace(row=torch.zeros(3, dtype=torch.int64, device=GPU))
        for _ in range(plan.table.calls):
            state, _ = step(network(), plan, state, lane=torch.zeros(3, dtype=torch.int64, device=GPU))
    assert ops.names.count("fewstep::solver_step") == plan.table.calls and state.x.device == GPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_somebody_elses_loop(gpu, dtype):
    table = sde_dpmpp(PATH, grids.vp(PATH, 4))
    stepper = Stepper(table, PATH, "flow", Clip(1.0))
    with gpu, Ops() as ops:
        x = torch.randn(SHAPE, device=GPU, dtype=dtype)
        for _ in range(table.calls):
            x = stepper.step(x * 0.5, x, 3)
    assert ops.names.count("fewstep::solver_step") == table.calls and x.dtype == dtype


def test_the_reference_on_request(gpu):
    table = deis(PATH, grids.vp(PATH, 3))
    with gpu, Ops() as ops, dispatch.using("reference"):
        sample(network(), torch.randn(SHAPE, device=GPU), table, check="off")
    assert not [name for name in ops.names if name.startswith("fewstep")]
