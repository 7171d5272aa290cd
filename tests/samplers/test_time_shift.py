"""Time shift: nothing to shift leaves the plain solver's bits; labels are those of a second, plain implementation."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from fewstep.models import Denoiser, GaussianMixture, paths
from fewstep.samplers import (
    ddim,
    ddpm,
    deis,
    dpm_single,
    dpmpp,
    grids,
    heun,
    pndm,
    sample,
    starting_noise,
    unipc,
)
from fewstep.samplers.openings import openings
from fewstep.samplers.time_shift import data_variance, from_units, shifts, time_shift, to_units

VP = paths.vp_linear()
DISCRETE = paths.vp_discrete(paths.ddpm_alphas_cumprod())
SOLVERS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "fast pndm": pndm,
    "simple pndm": partial(pndm, variant="simple"),
    "deis": partial(deis, order=3),
    "dpm": partial(dpm_single, order=2, form="eps"),
    "dpmpp": dpmpp,
    "unipc": partial(unipc, order=3),
    "heun": heun,
}


def toy(path=VP, seen=None):
    """A nonlinear eps network, elementwise: what it says of a sample knows nothing of the batch."""

    def call(x, tau):
        if seen is not None:
            seen.append(tau.clone())
        return 0.8 * x + 0.3 * torch.sin(2 * x) + 0.05 * tau.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    return Denoiser(call, path, predicts="eps")


def noisy(path, t, v0, batch=4, size=64, seed=0):
    """x_t whose variance over each sample's elements is exactly alpha^2 v0 + sigma^2."""
    a, e = torch.randn(2, batch, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = a - a.mean(1, keepdim=True)
    e = e - e.mean(1, keepdim=True)
    e = e - a * (a * e).sum(1, keepdim=True) / (a * a).sum(1, keepdim=True)
    a, e = (v / v.var(1, keepdim=True).sqrt() for v in (a, e))
    return path.alpha(t) * v0**0.5 * a + path.sigma(t) * e


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("path", [VP, paths.edm(), DISCRETE], ids=lambda p: p.name)
def test_without_a_window_or_above_the_cutoff_alone_it_is_the_plain_solver_to_the_bit(name, path):
    solver, d, times = SOLVERS[name], toy(path), grids.vp(path, 6)
    noise = starting_noise(3, 5, (1, 4, 4))
    plain = sample(d, noise, solver(path, times), seed=2)
    for compat in ("paper", "pnm", "adm", "deis"):
        assert torch.equal(plain, time_shift(d, noise, solver, times, window=0, compat=compat, seed=2))
    assert torch.equal(plain, time_shift(d, noise, solver, times, window=50, cutoff=1000, seed=2))
    assert not torch.equal(plain, time_shift(d, noise, solver, times, window=50, seed=2))


@pytest.mark.parametrize("path", [VP, paths.flow(), paths.edm(), DISCRETE], ids=lambda p: p.name)
def test_exact_samples_keep_their_labels_where_the_marginal_is_matched(path):
    times = grids.vp(path, 10)
    made = shifts(path, ddim, times, window=30, cutoff=300)
    levels = made.to("cpu")
    assert sum(made.on) >= 4
    for index in np.flatnonzero(made.on):
        y = noisy(path, times[index], 0.25)
        assert levels.nearest(index, y, 0.25).tolist() == [0] * 4
        # and a sample that is really elsewhere in the window is found there
        t = made.labels[index, 3]
        found = levels.nearest(index, noisy(path, t, 0.25), torch.full((4,), 0.25))
        assert levels.labels[index][found].tolist() == pytest.approx([t] * 4)


def test_matching_the_noise_shifts_exact_samples_upwards_by_what_theory_says():
    # abar v0 + 1 - abar = 1 - abar_s, so log(abar_s / abar) = log(1 - v0), and log abar = -(20 - .1) t^2 / 2 - .1 t
    v0, times = 0.25, np.array([0.9, 0.7, 0.5, 0.3, 0.0])
    made = shifts(VP, ddim, times, window=300, cutoff=100)
    levels = made.to("cpu")
    for index, t in ((1, 0.7), (2, 0.5), (3, 0.3)):
        log_abar = -19.9 * t * t / 2 - 0.1 * t + np.log(1 - v0)
        shifted = (-0.1 + np.sqrt(0.01 - 2 * 19.9 * log_abar)) / 19.9
        found = levels.labels[index][levels.nearest(index, noisy(VP, t, v0))]
        assert (found - shifted).abs().max() <= 0.5e-3 + 1e-9  # the candidates stand 1e-3 apart
        assert shifted - t > 0.015


def reference(d, noise, times, window, cutoff, compat, v0=0.0):
    """DDIM with time shift on a VP path, one sample at a time, straight from the words."""
    path, out, told = d.path, [], []
    for x in noise.double():
        x, label, labels = x[None] * path.sigma(times[0]), None, []
        for i in range(len(times) - 1):
            s, n = times[i], times[i + 1]
            offsets = (
                np.arange(-window, window + 1)
                if compat == "deis"
                else np.arange(-window // 2, window // 2 + 1)
            )
            if compat in ("pnm", "adm") and s > cutoff / 1000 and n > 0:
                taus = (n if compat == "pnm" else s) + offsets / 1000
                taus = taus[taus <= 1]
                best = taus[
                    np.argmin(np.abs(float(x.var()) - path.sigma(taus) ** 2 - path.alpha(taus) ** 2 * v0))
                ]
                n = best if compat == "pnm" else best + n - s
            net = s if label is None else label
            labels.append(net)
            eps = d.eps(x, net)
            start = s if compat != "paper" or label is None else label
            x0 = (x - path.sigma(start) * eps) / path.alpha(start)
            x = path.alpha(n) * x0 + path.sigma(n) * eps
            label = None
            if compat in ("paper", "deis") and s > cutoff / 1000 and n > 0:
                taus = n + offsets / 1000
                label = taus[
                    np.argmin(np.abs(float(x.var()) - path.sigma(taus) ** 2 - path.alpha(taus) ** 2 * v0))
                ]
        out.append(x)
        told.append(labels)
    return torch.cat(out), torch.tensor(np.array(told))


@pytest.mark.parametrize("compat", ["paper", "pnm", "adm", "deis"])
def test_ddim_agrees_with_a_second_implementation_sample_by_sample(compat):
    times = grids.uniform(VP, 8)
    noise = starting_noise(1, 6, (48,), torch.float64)
    d = GaussianMixture(
        [0.5, 0.5], torch.randn(2, 48, generator=torch.Generator().manual_seed(5)), 0.1
    ).denoiser(VP, predicts="eps")
    options = dict(window=60, cutoff=250, compat=compat, match="marginal", data_variance=0.5)
    x, labels = time_shift(d, noise, ddim, times, **options, return_labels=True)
    want, told = reference(d, noise, times, 60, 250, compat, 0.5)
    assert torch.allclose(x, want, atol=1e-10)
    assert torch.allclose(labels, told, atol=1e-12)
    moved = (labels - torch.as_tensor(times[:-1])).abs() > 1e-9
    assert moved.any() == (compat in ("paper", "deis"))  # pnm and adm tell the network the grid's times
    if moved.any():
        assert any(len(column.unique()) > 1 for column in labels.T)  # labels of one batch differ
    others = [
        time_shift(d, noise, ddim, times, **{**options, "compat": c}) for c in ("paper", "pnm", "adm", "deis")
    ]
    assert sum(torch.allclose(x, other, atol=1e-6) for other in others) == 1


def test_rows_of_a_lane_are_those_of_the_solver_on_a_grid_with_that_time():
    times = grids.uniform(VP, 6)
    for solver in SOLVERS.values():
        made = shifts(VP, solver, times, window=40, cutoff=0)
        assert openings(made.table.lane(0)) == list(made.opens)
        index, lane = 4, 3
        moved = times.copy()
        moved[index] = made.labels[index, lane]
        alone, last = solver(VP, moved), (*made.opens, made.table.calls)[index + 1]
        rows = slice(made.opens[index] + 1, last + 1)
        for name in ("a", "b", "c"):
            got, want = getattr(made.table, name)[rows, lane], getattr(alone, name)[rows, 0]
            assert np.allclose(got, want, rtol=1e-12, atol=1e-14)
        assert made.table.t[made.opens[index], lane] == moved[index]
        assert np.array_equal(made.table.b[:, 0], solver(VP, times).b[:, 0])


@pytest.mark.parametrize("name", ["ddim", "ddpm", "fast pndm", "deis"])
def test_a_sample_is_its_own_whatever_the_batch_and_calls_stay_what_they_were(name):
    seen: list[torch.Tensor] = []
    d, times = toy(seen=seen), grids.uniform(VP, 8)
    noise, solver = starting_noise(0, 6, (1, 4, 4)), SOLVERS[name]
    x, labels = time_shift(d, noise, solver, times, seed=9, return_labels=True)
    assert len(seen) == solver(VP, times).calls
    opens = openings(solver(VP, times))
    assert torch.allclose(torch.stack([seen[r] for r in opens], 1), labels.float(), atol=1e-7)
    assert any(len(column.unique()) > 1 for column in labels.T)
    one = time_shift(d, noise[2:3], solver, times, seed=9, ids=torch.tensor([2]), return_labels=True)
    assert torch.equal(one[0], x[2:3]) and torch.equal(one[1], labels[2:3])


def test_labels_stay_between_the_grid_points_however_wide_the_window():
    times = grids.uniform(DISCRETE, 50)
    made = shifts(DISCRETE, ddim, times, window=400, cutoff=0)
    inner = made.labels[1:]
    assert (
        (inner < times[:-2, None]).all() and (inner > times[2:, None]).all() and inner.min() >= DISCRETE.t_min
    )
    for path in (VP, paths.flow(), paths.edm(), DISCRETE):
        t = np.linspace(path.t_min, 0.99 * path.t_max, 7)
        assert np.allclose(from_units(path, to_units(path, t)), t, rtol=1e-9)


def test_the_variance_of_data_is_within_images():
    images = torch.tensor([[[0.0, 2.0]], [[5.0, 5.0]]])
    assert data_variance(images) == 1.0  # the images' own means do not count


def test_bad_input_is_refused_by_name():
    d, times, noise = toy(), grids.uniform(VP, 5), starting_noise(0, 3, (4,))
    for bad in (-1, 1001, float("nan"), True, "wide"):
        with pytest.raises(ValueError, match="window must lie in 0 .. 1000"):
            time_shift(d, noise, ddim, times, window=bad)
    with pytest.raises(ValueError, match="cutoff must lie"):
        time_shift(d, noise, ddim, times, cutoff=-3)
    with pytest.raises(ValueError, match="match must be one of noise, marginal"):
        time_shift(d, noise, ddim, times, match="both")
    with pytest.raises(ValueError, match="compat must be one of paper, pnm, adm, deis"):
        time_shift(d, noise, ddim, times, compat="dpm")
    with pytest.raises(ValueError, match="data_variance goes with match='marginal'"):
        time_shift(d, noise, ddim, times, match="marginal")
    with pytest.raises(ValueError, match="data_variance goes with match='marginal'"):
        time_shift(d, noise, ddim, times, data_variance=0.2)
    with pytest.raises(ValueError, match="one for each of 3 samples"):
        time_shift(d, noise, ddim, times, match="marginal", data_variance=torch.ones(2))
    with pytest.raises(ValueError, match="one grid for all samples"):
        time_shift(d, noise, ddim, np.stack([times, times]))
    with pytest.raises(ValueError, match="heun opens 0 steps at grid point 1"):
        time_shift(toy(paths.edm()), noise, partial(heun, s_churn=5.0), grids.karras(paths.edm(), 4))
    with pytest.raises(TypeError, match="d must be a Denoiser"):
        time_shift(lambda x, t: x, noise, ddim, times)
    with pytest.raises(TypeError, match="solver must be a function"):
        time_shift(d, noise, lambda path, times: 3, times)
    with pytest.raises(ValueError, match="images must be floats"):
        data_variance(torch.zeros(3, 1))
    broken = Denoiser(lambda x, tau: x / 0, VP)
    with pytest.raises(ValueError, match="not finite at step 0"):
        time_shift(broken, noise, ddim, times)
