import numpy as np
import pytest

from fewstep.models import paths
from fewstep.samplers import ddim, dpm_single, grids, heun, restart, rk

INTEGER = ("linspace", "leading", "trailing")


def test_every_grid_begins_at_t_max_falls_and_ends_at_sigma_zero(all_paths):
    for path in all_paths:
        for name in grids.NAMES:
            if name in INTEGER and path.name != "vp_discrete":
                with pytest.raises(ValueError, match="vp_discrete"):
                    getattr(grids, name)(path, 5)
                continue
            for n in (1, 2, 3, 10, 100, 1000):
                times = getattr(grids, name)(path, n)
                what = f"{name} on {path.name}, n = {n}"
                assert times.shape == (n + 1,) and times.dtype == np.float64, what
                assert (np.diff(times) < 0).all(), what
                assert times[0] == path.t_max or name == "leading", what
                assert times[-1] == path.t_clean and path.sigma(times)[-1] == 0.0, what


def test_grids_are_even_in_what_they_say(all_paths):
    for path in all_paths:
        level = (lambda t: t) if path.name == "flow" else path.rho
        # the second time is where a grid that begins at infinity has come down to
        for name, measure in (
            ("uniform", lambda t: t),
            ("quadratic", lambda t, zero=path.t_clean: np.sqrt(t - zero)),
            ("logsnr", path.lam),
            ("karras", lambda t: level(t) ** (1 / 7)),  # noqa: B023
            ("exponential", lambda t: np.log(level(t))),  # noqa: B023
        ):
            steps = np.diff(measure(getattr(grids, name)(path, 12)[1:-1]))
            assert np.ptp(steps) < 1e-9 * np.abs(steps).max(), (name, path.name)


def test_a_part_of_the_way(all_paths):
    for path in all_paths:
        high, low = path.time(-1.0), path.time(2.0)
        for name in set(grids.NAMES) - set(INTEGER):
            times = getattr(grids, name)(path, 6, t_max=high, t_min=low, end="t_min")
            assert len(times) == 7 and times[0] == high and times[-1] == low, name
            times = getattr(grids, name)(path, 6, t_max=high, t_min=low)
            assert len(times) == 7 and times[-2] == low and times[-1] == path.t_clean, name


def test_beta_quantiles():
    stats = pytest.importorskip("scipy.stats")
    p = np.linspace(0, 1, 201)
    for a, b in (
        (0.6, 0.6),
        (0.5, 2.0),
        (3.0, 0.7),
        (5.0, 5.0),
        (1.0, 1.0),
        (10.0, 0.3),
        (0.05, 0.05),
        (10.0, 10.0),
    ):
        assert np.abs(grids.beta_quantile(p, a, b) - stats.beta.ppf(p, a, b)).max() < 1e-12, (a, b)


# --- against diffusers ---------------------------------------------------------------------------------------------


def scheduler_sigmas(name, n, **config):
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = getattr(schedulers, name)(**config)
    scheduler.set_timesteps(n)
    return scheduler


@pytest.mark.parametrize("n", [1, 5, 10, 25])
@pytest.mark.parametrize("spread", ["karras", "exponential", "beta"])
def test_noise_levels_are_those_of_diffusers(spread, n):
    path = paths.vp_discrete(paths.ddpm_alphas_cumprod())
    theirs = scheduler_sigmas(
        "DPMSolverMultistepScheduler", n, **{f"use_{spread}_sigmas": True}
    ).sigmas.numpy()
    ours = path.rho(getattr(grids, spread)(path, n))
    # theirs spreads from sqrt(1 / alphas_cumprod - 1) in float32, off by 8e-5 of itself at its smallest, 0.01
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("n", [1, 4, 10, 30])
@pytest.mark.parametrize("spacing", INTEGER)
def test_integer_spacings_are_those_of_diffusers(spacing, n):
    path = paths.vp_discrete(paths.ddpm_alphas_cumprod())
    ddim_like = scheduler_sigmas(
        "DDIMScheduler", n, timestep_spacing=spacing, steps_offset=0
    ).timesteps.tolist()
    dpm_like = scheduler_sigmas("DPMSolverMultistepScheduler", n, timestep_spacing=spacing).timesteps.tolist()
    grid = getattr(grids, spacing)
    if (spacing, n) != ("linspace", 1):  # theirs begins at index 0, where there is hardly any noise
        assert grid(path, n)[:-1].tolist() == ddim_like
    if spacing != "trailing":
        assert grid(path, n, like="dpm")[:-1].tolist() == dpm_like
    else:
        assert grid(path, n)[:-1].tolist() == dpm_like
    if spacing == "leading":
        one = scheduler_sigmas(
            "DDIMScheduler", n, timestep_spacing=spacing, steps_offset=1
        ).timesteps.tolist()
        assert grid(path, n, offset=1)[:-1].tolist() == one


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_shift_is_that_of_the_pipelines(shift):
    schedulers = pytest.importorskip("diffusers.schedulers")
    path = paths.flow(shift=shift)
    for n in (1, 4, 28):
        scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n, n))
        assert grids.shifted(path, n) == pytest.approx(scheduler.sigmas.numpy(), abs=2e-7)
    assert np.array_equal(grids.shifted(paths.flow(), 7, shift=shift), grids.shifted(path, 7))


# --- by hand, by budget, and wrong ---------------------------------------------------------------------------------


def test_explicit():
    path = paths.vp_discrete(paths.ddpm_alphas_cumprod())
    assert grids.explicit(path, times=[999, 500, 20]).tolist() == [999.0, 500.0, 20.0, -1.0]
    by_level = grids.explicit(path, sigmas=path.rho(np.array([999.0, 500.5, 20.0])))
    assert by_level == pytest.approx([999.0, 500.5, 20.0, -1.0], abs=1e-9)
    assert grids.explicit(paths.flow(), sigmas=[1.0, 0.5, 0.0]).tolist() == [1.0, 0.5, 0.0]
    for wrong in ({}, {"times": [1.0], "sigmas": [1.0]}, {"times": [0.2, 0.5]}, {"times": [2.0, 0.5]}, {"times": []},
                  {"times": [0.5, float("nan")]}, {"sigmas": [0.5, -0.1]}, {"times": [0.0]}):  # fmt: skip
        with pytest.raises(ValueError, match="times|sigmas"):
            grids.explicit(paths.flow(), **wrong)


@pytest.mark.parametrize(
    "solver, options, a_step",
    [(ddim, {}, 1), (heun, {}, 2), (rk, {"method": "4"}, 4), (dpm_single, {"order": 3}, 3)],
)
def test_for_calls_spends_the_budget(solver, options, a_step):
    path = paths.vp_linear()
    for calls in (1, 2, 7, 10, 35):
        times = grids.for_calls(solver, path, calls, grids.logsnr, **options)
        table = solver(path, times, **options)
        assert calls - a_step < table.calls <= calls


def test_for_calls_counts_what_a_solver_adds_to_its_steps():
    path = paths.edm()
    times = grids.for_calls(restart, path, 40, "karras")
    assert restart(path, times).calls in (39, 40)
    with pytest.raises(ValueError, match="calls must be at least"):
        grids.for_calls(lambda *a: rk(*a, method="4"), path, 3, lambda p, n: grids.karras(p, n, end="t_min"))


def test_bad_input_is_named():
    path = paths.edm()
    for n in (0, -1, 2.0, True, "5"):
        for name in ("uniform", "logsnr", "karras", "beta"):
            with pytest.raises(ValueError, match="n, the number of steps"):
                getattr(grids, name)(path, n)
    discrete = paths.vp_discrete(paths.ddpm_alphas_cumprod())
    for call, match in (
        (lambda: grids.karras(path, 5, exponent=0.0), "exponent"),
        (lambda: grids.beta(path, 5, a=-1.0), "a of a beta"),
        (lambda: grids.shifted(path, 5, shift=0.0), "shift"),
        (lambda: grids.uniform(path, 5, t_max=100.0), "t_max"),
        (lambda: grids.uniform(path, 5, t_max=1.0, t_min=2.0), "t_min"),
        (lambda: grids.uniform(path, 5, end="zero"), "end"),
        (lambda: grids.logsnr(path, 5, t_min=0.0), "t_min"),
        (lambda: grids.linspace(discrete, 1001), "n must be at most 1000"),
        (lambda: grids.leading(discrete, 10, offset=200), "offset"),
        (lambda: grids.linspace(discrete, 10, like="euler"), "like"),
        (lambda: grids.for_calls(ddim, path, 0), "calls"),
        (lambda: grids.for_calls(ddim, path, 5, "cubic"), "grid"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
