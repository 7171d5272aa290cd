"""Particles weighed and resampled by kernels, by the interpreter, against the same by torch."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.kernels import dispatch, resample, solver_step
from fewstep.models import Denoiser, paths
from fewstep.samplers import (
    cfg,
    ddim,
    feynman_kac,
    feynman_kac_walk,
    grids,
    sde_dpmpp,
    smc,
    starting_noise,
    targets,
)

PATH = paths.edm()
SHAPE = (3, 5)


def network(shift=0.0, predicts="x0"):
    return Denoiser(lambda x, tau, shift=shift: torch.tanh(x + shift) * 0.8, PATH, predicts=predicts)


def both(run, monkeypatch):
    """By kernels, where nobody else may resample or square anything, and by torch."""
    with dispatch.using("reference"):
        slow = run()
    monkeypatch.setattr(resample, "reference", None)
    monkeypatch.setattr(solver_step, "reference", None)
    monkeypatch.setattr(smc, "resample", None)
    monkeypatch.setattr(feynman_kac_walk, "log_rate", None)
    return run(), slow


@pytest.mark.parametrize("when", [0.5, 1.0, (0, 2)])
def test_a_step_of_particles(when, monkeypatch):
    draw = torch.Generator().manual_seed(3)
    potentials = 1.5 * torch.randn(3, 4 * 33, generator=draw, dtype=torch.float64)
    potentials[:, 33:66] = -2.5  # a group of equal weights

    def run():
        move = lambda x, row: (x + 1, potentials[row])  # noqa: E731
        return smc.run(move, torch.arange(132.0)[:, None], 3, particles=33, when=when, seed=5)

    (fast, seen), (slow, wanted) = both(run, monkeypatch)
    assert torch.equal(seen.resampled, wanted.resampled) and torch.equal(seen.index, wanted.index)
    assert torch.equal(fast.state, slow.state) and torch.equal(fast.ancestors, slow.ancestors)
    assert torch.allclose(seen.ess, wanted.ess, rtol=1e-6) and torch.allclose(
        fast.log_z, slow.log_z, rtol=1e-6
    )
    assert torch.equal(fast.log_weights, slow.log_weights)
    assert wanted.resampled.any() and (isinstance(when, tuple) or not wanted.resampled[:, 1].any())


TARGETS = {
    "anneal": (targets.anneal(1.5), lambda: network()),
    "cfg": (None, lambda: cfg(network(predicts="flow"), 3.0, null={"shift": 0.5})),
    "product": (targets.product(), lambda: [network(), network(0.3, "eps")]),
    "three": (targets.product(powers=(1.5, 1.0, -1.5)), lambda: [network(), network(0.3), network(0.6)]),
    "tilt": (targets.tilt(lambda x: x.flatten(1).sum(1), gradient="half"), lambda: network()),
}


@pytest.mark.parametrize("name", TARGETS)
def test_weights_of_the_steps_own_pass(name, monkeypatch):
    target, make = TARGETS[name]
    cond = {"shift": torch.tensor(-1.0)} if name == "cfg" else None
    noise, times = starting_noise(0, 2, SHAPE), grids.logsnr(PATH, 3, t_max=5.0, t_min=0.1)
    table = ddim(PATH, times, eta=1.0)

    def run():
        _, info = feynman_kac(make(), noise, table, target=target, particles=4, when=0.97, seed=4, cond=cond)
        return info

    if name == "tilt":  # of one density there is nothing to square
        monkeypatch.setattr(feynman_kac_walk, "log_rate", lambda *a: torch.zeros(8, dtype=torch.float64))
        with dispatch.using("reference"):
            slow = run()
        fast = run()
    else:
        fast, slow = both(run, monkeypatch)
    assert torch.equal(fast.ancestors, slow.ancestors) and torch.equal(fast.resampled, slow.resampled)
    assert torch.allclose(fast.particles, slow.particles, atol=2e-5 * float(slow.particles.abs().max()))
    assert torch.allclose(fast.weights, slow.weights, rtol=2e-4)
    assert torch.allclose(fast.log_normaliser, slow.log_normaliser, atol=2e-3)
    assert slow.weights.std() > 1e-3 and (name == "tilt" or slow.resampled.any())


def test_the_transport_drift_and_multistep_rows(monkeypatch):
    noise, times = starting_noise(0, 2, SHAPE), grids.logsnr(PATH, 3, t_max=5.0, t_min=0.1)
    table = sde_dpmpp(PATH, times, order=2)

    def run():
        models = [network(), network(0.3)]
        options = {"target": targets.product(), "drift": "transport", "divergence": 2}
        return feynman_kac(models, noise, table, particles=4, when=0.9, seed=4, batch=3, **options)[1]

    fast, slow = both(run, monkeypatch)
    assert torch.allclose(fast.particles, slow.particles, atol=2e-5 * float(slow.particles.abs().max()))
    assert torch.allclose(fast.weights, slow.weights, rtol=2e-4) and slow.weights.std() > 1e-3


def test_a_rate_of_too_many_squares_is_taken_by_torch():
    noise, table = starting_noise(0, 1, SHAPE), ddim(PATH, grids.logsnr(PATH, 3, t_max=5.0), eta=1.0)
    models = [network(0.1 * k) for k in range(3)]
    target = targets.product(powers=(1.0, 0.5, 0.5))  # three gaps and a sum

    def run():
        return feynman_kac(models, noise, table, target=target, particles=3, when=math.nextafter(1, 0))[1]

    fast = run()
    with dispatch.using("reference"):
        slow = run()
    assert torch.allclose(fast.weights, slow.weights, rtol=2e-4)
