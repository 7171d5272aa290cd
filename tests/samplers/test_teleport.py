"""Teleportation: exact on Gaussians, orders with and without a seeded history, calls, and what is refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from fewstep.models import Denoiser, GaussianMixture, gaussian, paths
from fewstep.samplers import (
    ddim,
    deis,
    dpm_single,
    grids,
    heun,
    multistep,
    pndm,
    sample,
    sde_dpmpp,
    skip,
    starting_noise,
    teleport,
    unipc,
)
from fewstep.samplers.teleport import skipped_steps

SOLVERS = {
    "ddim": ddim,
    "heun": heun,
    "deis": partial(deis, order=3),
    "unipc": partial(unipc, order=3),
    "multistep": multistep,
    "pndm": pndm,
    "dpm": partial(dpm_single, order=2),
    "sde": sde_dpmpp,
}
ALL = [paths.vp_linear(), paths.edm(), paths.flow()]


def stats_of(dim=3, **options):
    g = torch.Generator().manual_seed(0)
    data = (
        torch.randn(400, dim, generator=g, dtype=torch.float64) * torch.linspace(2.0, 0.3, dim).double() + 1.0
    )
    return gaussian(data, **options)


def counted(d):
    seen: list[float] = []

    def call(x, tau, **cond):
        seen.append(float(tau[0]))
        return d.call(x, tau, **cond)

    return Denoiser(call, d.path, predicts=d.predicts, shape=d.shape), seen


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.name)
def test_teleported_to_the_clean_end_gaussian_data_are_sampled_exactly(path):
    stats = stats_of()
    noise = starting_noise(0, 20_000, (3,), torch.float64)
    begin = path.sigma(path.t_max) * noise
    x = teleport(stats, path, begin, path.t_max, path.t_clean)
    # the opening noise lacks alpha_T mu and has sigma_T^2 where the marginal has alpha_T^2 L + sigma_T^2: both known
    var = (
        path.alpha(path.t_max) ** 2 * stats.covariance() + path.sigma(path.t_max) ** 2 * torch.eye(3).double()
    )
    short = path.sigma(path.t_max) / var.diagonal().sqrt().max().item()
    assert short > 0.999
    # 20000 samples: standard errors of 2 / 141 for the mean and 4 sqrt(2 / 20000) for the variance; four of them
    assert (x.mean(0) - stats.mean[0]).abs().max() < 0.06 + (1 - short)
    assert ((x - x.mean(0)).mT @ (x - x.mean(0)) / len(x) - stats.covariance()).abs().max() < 0.16
    # and to the digits the one that the solver's last point would be
    d = stats.denoiser(path)
    assert torch.equal(x[:5], skip(stats, d, noise[:5], ddim, grids.vp(path, 4), steps=4))
    fine = sample(d, noise[:5], multistep(path, grids.vp(path, 400)))
    assert torch.allclose(x[:5], fine, atol=2e-3)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("seeded", [True, False])
def test_no_step_skipped_is_the_plain_solver_and_calls_fall_by_those_of_the_skipped_steps(name, seeded):
    path, solver = paths.edm(), SOLVERS[name]
    d, seen = counted(GaussianMixture([0.5, 0.5], torch.randn(2, 3), 0.2).denoiser(path))
    noise, times, stats = starting_noise(1, 4, (3,)), grids.karras(path, 8), stats_of()
    plain = sample(d, noise, solver(path, times), seed=3)
    calls = len(seen)
    assert torch.equal(plain, skip(stats, d, noise, solver, times, steps=0, seed_history=seeded, seed=3))
    seen.clear()
    x = skip(stats, d, noise, solver, times, steps=4, seed_history=seeded, seed=3)
    assert torch.isfinite(x).all() and len(seen) < calls
    assert max(seen) == pytest.approx(times[4], rel=1e-6)  # the network hears nothing of the skipped levels
    if not (name == "pndm" and not seeded):  # which begins anew with its four-call steps
        first = {"heun": 8, "dpm": 8, "pndm": 13}.get(name, 4)
        assert calls - len(seen) == first


@pytest.mark.parametrize("name,orders", [("deis", (3, 2)), ("multistep", (3, 2)), ("unipc", (4, 3))])
def test_a_seeded_history_removes_the_cold_start(name, orders):
    path, stats = paths.edm(), stats_of()
    solver = {
        "deis": partial(deis, order=3, variable="rho"),
        "multistep": partial(multistep, form="x0", variable="vp", nodes=3),
        "unipc": partial(unipc, order=3, final="auto"),
    }[name]
    d, noise = stats.denoiser(path), starting_noise(0, 20, (3,), torch.float64)
    for seeded, order in zip((True, False), orders):
        errors = []
        for n in (96, 192):
            times = grids.vp(path, n, t_max=20.0, t_min=0.1, end="t_min")
            x = skip(stats, d, noise, solver, times, steps=n // 4, seed_history=seeded)
            errors.append(float((x - teleport(stats, path, 20.0 * noise, 20.0, 0.1)).square().mean()))
        assert np.log2(errors[0] / errors[1]) / 2 == pytest.approx(order, abs=0.4)


def test_on_a_mixture_skipping_the_noisy_levels_changes_little_and_all_levels_much():
    path = paths.edm()
    mixture = GaussianMixture([0.3, 0.3, 0.4], [[-1.0, 0.0], [1.0, 0.5], [0.0, 1.0]], 0.05)
    d, stats = mixture.denoiser(path), gaussian(mixture.sample(20_000, seed=1))
    noise, times = starting_noise(0, 200, (2,), torch.float64), grids.karras(path, 36)
    truth = sample(d, noise, multistep(path, grids.vp(path, 300)))
    plain = float((sample(d, noise, heun(path, times)) - truth).square().mean().sqrt())

    def error(until):
        x = skip(stats, d, noise, heun, times, until=until)
        return float((x - truth).square().mean().sqrt())

    assert error(20.0) < 1.05 * plain and error(5.0) < 1.2 * plain
    assert error(0.5) > 5 * plain


def test_how_many_steps_a_level_skips():
    path = paths.edm()
    times = grids.karras(path, 18)
    assert skipped_steps(path, times, 80.0) == 0
    assert skipped_steps(path, times, 19.0) == 4  # 57.6, 40.8, 28.4, 19.4
    assert skipped_steps(paths.flow(), np.array([1.0, 0.5, 0.25, 0.0]), 1.0) == 1
    d, stats, noise = stats_of().denoiser(path), stats_of(), starting_noise(0, 2, (3,))
    a = skip(stats, d, noise, heun, times, until=19.0)
    assert torch.equal(a, skip(stats, d, noise, heun, times, steps=4))


def test_a_gaussian_a_class_follows_the_label_and_other_conditions_pass_by():
    g = torch.Generator().manual_seed(0)
    data = torch.cat([torch.randn(200, 2, generator=g) - 4, 0.5 * torch.randn(200, 2, generator=g) + 4])
    labels = torch.arange(400) // 200
    stats, path = gaussian(data, labels), paths.edm()
    heard = []

    def call(x, tau, label=None, prompt=None):
        heard.append(prompt)
        return stats.denoiser(path).call(x, tau, label=label)

    d = Denoiser(call, path, predicts="x0")
    cond = {"label": torch.tensor([0, 1, 1]), "prompt": "two"}
    x = skip(stats, d, starting_noise(0, 3, (2,)), deis, grids.karras(path, 10), steps=4, cond=cond)
    assert (x[0] < 0).all() and (x[1:] > 2).all() and heard == ["two"] * 6


def test_churn_goes_on_from_a_cold_start_only_and_samples_are_their_own():
    path, stats = paths.edm(), stats_of()
    d, times = stats.denoiser(path), grids.karras(path, 8)
    noise = starting_noise(0, 6, (3,))
    churned = partial(heun, s_churn=10.0, s_max=30.0)
    with pytest.raises(ValueError, match="steps cannot be told apart"):
        skip(stats, d, noise, churned, times, steps=2)
    x = skip(stats, d, noise, churned, times, steps=2, seed_history=False, seed=4)
    one = skip(
        stats, d, noise[3:4], churned, times, steps=2, seed_history=False, seed=4, ids=torch.tensor([3])
    )
    assert torch.equal(one, x[3:4])
    x = skip(stats, d, noise, sde_dpmpp, times, steps=2, seed=4)
    assert torch.equal(
        x[1:2], skip(stats, d, noise[1:2], sde_dpmpp, times, steps=2, seed=4, ids=torch.tensor([1]))
    )


def test_bad_input_is_refused_by_name():
    path, stats = paths.edm(), stats_of()
    d, noise, times = stats.denoiser(path), starting_noise(0, 2, (3,)), grids.karras(path, 5)
    for steps in (-1, 6, 1.5, True):
        with pytest.raises(ValueError, match="steps must be an integer in 0 .. 5"):
            skip(stats, d, noise, ddim, times, steps=steps)
    for options in ({}, {"steps": 1, "until": 2.0}):
        with pytest.raises(ValueError, match="either steps= .* or until="):
            skip(stats, d, noise, ddim, times, **options)
    with pytest.raises(ValueError, match="until must be a positive noise level"):
        skip(stats, d, noise, ddim, times, until=0.0)
    with pytest.raises(TypeError, match="stats must be a GaussianStats"):
        skip(stats.covariance(), d, noise, ddim, times, steps=1)
    with pytest.raises(ValueError, match="stats must be of samples"):
        skip(stats_of(4), d, noise, ddim, times, steps=1)
    with pytest.raises(TypeError, match="one grid for all samples"):
        skip(stats, d, noise, ddim, np.stack([times, times]), steps=1)
    broken = Denoiser(lambda x, tau: x / 0, path, predicts="x0")
    with pytest.raises(ValueError, match="not finite at step 2"):
        skip(stats, broken, noise, ddim, times, steps=2)
