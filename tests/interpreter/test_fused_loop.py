"""Whole trajectories with the fused step, by the interpreter, against the same by torch."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import dispatch, philox, solver_step
from fewstep.models import Denoiser, paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import (
    abm,
    cfg,
    ddim,
    deis,
    ersde,
    fused,
    grids,
    heun,
    init,
    pndm,
    restart,
    sa,
    sample,
    sde_dpmpp,
    starting_noise,
    step,
    take,
    unipc,
)
from fewstep.samplers.fused import Clip
from fewstep.samplers.loop import apply
from fewstep.samplers.stepper import Stepper

PATH = paths.flow()
SHAPE = (2, 3, 5)  # not divisible by 4: noise sample by sample
SOLVERS = {f.__name__: f for f in (abm, deis, ersde, heun, pndm, restart, sa, sde_dpmpp, unipc)}


def network(path=PATH, predicts="x0"):
    return Denoiser(lambda x, tau, shift=0.0: torch.tanh(x + shift) * 0.8, path, predicts=predicts)


@pytest.fixture(autouse=True)
def no_reference(monkeypatch):
    """Whoever answers where nothing is said, it is not the reference."""

    def gone(*args, **kwargs):
        assert dispatch._using and dispatch._using[-1] == "reference"
        return reference(*args, **kwargs)

    reference = philox.reference
    monkeypatch.setattr(philox, "reference", gone)
    monkeypatch.setattr(solver_step, "reference", None)


def both(run):
    fast = run()
    with dispatch.using("reference"):
        slow = run()
    return fast, slow


def close(fast, slow, tolerance=1e-5):
    """Two sums of a few float32 terms, rounded differently at every step of a contracting trajectory."""
    assert float((fast - slow).abs().max()) <= tolerance * float(slow.abs().max())


@pytest.mark.parametrize("name", SOLVERS)
def test_trajectories(name):
    table = SOLVERS[name](PATH, grids.vp(PATH, 4))
    noise = starting_noise(0, 3, SHAPE)
    close(*both(lambda: sample(network(), noise, table, seed=5)))


@pytest.mark.parametrize("shape", [(4,), (3, 8, 8)])
def test_noise_that_is_drawn_for_the_whole_batch_at_once(shape):
    table = sde_dpmpp(PATH, grids.vp(PATH, 3))
    noise = starting_noise(0, 5, shape)
    close(*both(lambda: sample(network(), noise, table, seed=2**63)))


def test_guidance_and_clipping_in_the_same_pass():
    d = cfg(network(predicts="flow"), 3.0, null={"shift": 0.5})
    table, noise = sde_dpmpp(PATH, grids.vp(PATH, 4)), starting_noise(0, 3, SHAPE)
    cond = {"shift": torch.tensor(-1.0)}
    seen = []
    fast, slow = both(
        lambda: sample(d, noise, table, cond=cond, transform=Clip(0.7), callback=lambda i: seen.append(i.x0))
    )
    close(fast, slow)
    assert float(seen[0].abs().max()) == pytest.approx(0.7) and len(seen) == 8
    for one, other in zip(seen[:4], seen[4:]):
        close(one, other)
    free = sample(d, noise, table, cond=cond)
    assert float((free - fast).abs().max()) > 0.05


def test_any_other_transform_is_called():
    table, noise = deis(PATH, grids.vp(PATH, 3)), starting_noise(0, 2, SHAPE)
    close(*both(lambda: sample(network(), noise, table, transform=lambda x0, t: x0.clamp(-0.2, 0.3))))


def test_samples_at_rows_and_lanes_of_their_own():
    import numpy as np

    table = sde_dpmpp(PATH, np.stack([grids.vp(PATH, 4), grids.uniform(PATH, 4)]))
    noise, lane = starting_noise(0, 4, SHAPE), torch.tensor([0, 1, 1, 0])

    def run():
        state = init(table, noise, lane=lane)
        for _ in range(2):
            state, _ = step(network(), table, state, lane=lane, seed=3)
        index = torch.tensor([3, 0, 1, 2])
        state = take(state, index)
        state = state._replace(row=torch.tensor([2, 1, 2, 1]))
        for clip in (None, Clip(0.5)):
            state, _ = step(network(), table, state, lane=lane, seed=3, transform=clip)
        return torch.cat([state.x.flatten(), *(h.flatten() for h in state.d)])

    close(*both(run))


def test_who_calls_the_network_himself():
    d, noise = network(), starting_noise(0, 2, SHAPE)
    plan = sde_dpmpp(PATH, grids.vp(PATH, 3)).on(d)

    def run(z=None):
        state = init(plan, noise)
        for _ in range(3):
            row = plan.row(state.row)
            state = apply(row, state, d.raw(state.y, row.t), z, seed=4)
        return state.x

    close(*both(run))
    close(*both(lambda: run(torch.ones_like(noise))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("clip", [None, Clip(0.6)])
def test_somebody_elses_loop(dtype, clip):
    d = network(paths.vp_linear(), "eps")
    table = sde_dpmpp(d.path, grids.logsnr(d.path, 4))
    noise = starting_noise(0, 2, SHAPE)

    def run():
        x, stepper = noise.to(dtype), Stepper(table, d.path, "eps", clip)
        for t in table.t[:, 0].tolist():
            x = stepper.step(d.raw(x, t)[0], x, 7)
        return x.float()

    close(*both(run), 1e-5 if dtype == torch.float32 else 2e-3)


def test_float64_and_gradients_stay_with_torch():
    d = random_mixture(5, 3, seed=0).denoiser(PATH)
    table = ddim(PATH, grids.vp(PATH, 3))
    noise = starting_noise(0, 2, (5,), torch.float64)
    fast, slow = both(lambda: sample(d, noise, table))
    assert torch.equal(fast, slow) and not fused.takes(init(table, noise), (noise,))
    weight = torch.ones((), requires_grad=True)
    scaled = Denoiser(lambda x, tau: x * weight, PATH, predicts="x0")
    sample(scaled, noise.float(), table, grad="last").sum().backward()
    assert weight.grad is not None
    with dispatch.using("triton"), pytest.raises(ValueError, match="x must be float32, got torch.float64"):
        sample(d, noise, table)
