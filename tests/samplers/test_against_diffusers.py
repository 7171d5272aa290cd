"""Ours against diffusers' schedulers: one exact model, one noise, one grid. Where theirs are wrong, ours are not."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from fewstep.eval import schedulers
from fewstep.models import paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import (
    consistency,
    ddim,
    ddpm,
    deis,
    dpm,
    dpm_single,
    dpmpp,
    euler,
    fast_orders,
    grids,
    heun,
    init,
    multistep,
    pndm,
    sa,
    sample,
    sde_dpmpp,
    step,
    unipc,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS = 10
DOUBLE, SINGLE = 1e-10, 1e-5  # SINGLE: classes that cast the sample to float32 inside
RULES = [
    (1, "midpoint", "midpoint"),
    (2, "midpoint", "midpoint"),
    (2, "heun", "exact"),
    (3, "midpoint", "midpoint"),
]
MIXTURE = random_mixture(8, 3, 0)
NOISE = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FRESH = torch.randn(64, 16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@functools.lru_cache(maxsize=1)
def vp() -> paths.Path:
    """Their table and one index more: float32 puts their first sigma a little above the table's last."""
    abar = schedulers.make("DDIMScheduler").alphas_cumprod.double().numpy()
    return paths.vp_discrete(np.append(abar, abar[-1] * 0.98))


def flow() -> paths.Path:
    return paths.flow()


def ours(path, table, noise=NOISE) -> torch.Tensor:
    """Our result, with the same fresh noise as theirs."""
    d = MIXTURE.denoiser(path)
    plan, state = table.on(d, "cpu"), init(table, noise)
    for k in range(table.calls):
        state, _ = step(d, plan, state, z=FRESH[k] if table.stochastic else None)
    return state.x


def compare(
    name, options, solver, path=vp, step_options=None, steps=STEPS, times=None, **ours_options
) -> float:
    path = path()
    scheduler = schedulers.make(name, **options)
    run = schedulers.run(scheduler, MIXTURE.denoiser(path), NOISE, steps, **(step_options or {}))
    table = solver(
        path, schedulers.grid_of(scheduler, path, steps) if times is None else times, **ours_options
    )
    assert table.calls == run.calls
    return float((ours(path, table) - run.x).abs().max())


@pytest.fixture
def fresh(monkeypatch):
    """diffusers draws FRESH[0], FRESH[1], ... in the module that is named."""

    def feed(module: str) -> None:
        drawn = iter(FRESH)
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor",
            lambda shape, **kw: next(drawn).to(kw.get("dtype") or torch.float64),
        )

    return feed


# --- deterministic, on their VP table ----------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(spacing):
    assert compare("DDIMScheduler", {"timestep_spacing": spacing}, ddim) < DOUBLE


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [10, 20])
def test_deis(order, steps):
    final = "lower" if steps < 15 else "auto"
    how = {"order": order, "variable": "lam", "final": final, "steps": steps}
    assert compare("DEISMultistepScheduler", {"solver_order": order}, deis, **how) < DOUBLE


@pytest.mark.parametrize("order, kind, weight", RULES)
@pytest.mark.parametrize("spacing", [{}, {"use_karras_sigmas": True}, {"use_lu_lambdas": True}])
def test_dpm_solver_pp(order, kind, weight, spacing):
    theirs = {"solver_order": order, "solver_type": kind, **spacing}
    how = {"order": order, "weight": weight, "final": "lower"}
    assert compare("DPMSolverMultistepScheduler", theirs, dpmpp, **how) < SINGLE


@pytest.mark.parametrize("order, kind, weight", RULES)
def test_dpm_solver(order, kind, weight):
    theirs = {
        "solver_order": order,
        "solver_type": kind,
        "algorithm_type": "dpmsolver",
        "final_sigmas_type": "sigma_min",
    }
    how = {"order": order, "weight": weight, "final": "lower"}
    assert compare("DPMSolverMultistepScheduler", theirs, dpm, **how) < SINGLE


@pytest.mark.parametrize("steps", [10, 13])
def test_dpm_solver_single_2s(steps):
    """Their stages stand on points of their grid: ours are the same points where it is uniform in log-SNR."""
    scheduler = schedulers.make("DPMSolverSinglestepScheduler", solver_order=2, use_exponential_sigmas=True)
    path = vp()
    run = schedulers.run(scheduler, MIXTURE.denoiser(path), NOISE, steps)
    assert run.calls == steps
    orders = [
        o for k, o in enumerate(scheduler.order_list) if k + 1 == steps or scheduler.order_list[k + 1] == 1
    ]
    times = schedulers.grid_of(scheduler, path, steps)[np.cumsum([0, *orders])]
    table = dpm_single(path, times, order=orders)
    assert table.calls == steps
    assert (ours(path, table) - run.x).abs().max() < SINGLE


def test_block_orders_of_the_single_step_solver():
    for calls in (3, 6, 7, 9, 10):
        scheduler = schedulers.make("DPMSolverSinglestepScheduler", solver_order=3, lower_order_final=True)
        theirs = scheduler.get_order_list(calls)
        ends = [o for k, o in enumerate(theirs) if k + 1 == calls or theirs[k + 1] == 1]
        assert ends == fast_orders(calls)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("rule", ["bh1", "bh2"])
@pytest.mark.parametrize("form", ["x0", "eps"])
def test_unipc(order, rule, form):
    theirs = {
        "solver_order": order,
        "solver_type": rule,
        "predict_x0": form == "x0",
        "final_sigmas_type": "sigma_min",
    }
    assert compare("UniPCMultistepScheduler", theirs, unipc, order=order, rule=rule, form=form) < DOUBLE


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_down_to_zero(order):
    assert compare("UniPCMultistepScheduler", {"solver_order": order}, unipc, order=order) < DOUBLE


def test_unipc_without_its_corrector():
    theirs = {"solver_order": 3, "disable_corrector": list(range(STEPS))}
    assert compare("UniPCMultistepScheduler", theirs, unipc, order=3, corrector=False) < DOUBLE


@pytest.mark.parametrize("name, solver, options", [
    ("EulerDiscreteScheduler", euler, {}),
    ("HeunDiscreteScheduler", heun, {}),
    ("KDPM2DiscreteScheduler", dpm_single, {"order": 2, "form": "eps"}),
    ("LMSDiscreteScheduler", multistep, {"form": "eps", "variable": "rho", "nodes": 4}),
])  # fmt: skip
def test_variance_exploding_classes(name, solver, options):
    assert compare(name, {}, solver, **options) < SINGLE


def test_fast_pndm():
    theirs = {"skip_prk_steps": False, "set_alpha_to_one": True}
    assert compare("PNDMScheduler", theirs, pndm, times=grids.leading(vp(), STEPS), variant="fast") < DOUBLE


@pytest.mark.parametrize("steps, variant", [(2, "simple"), (2, "plms"), (STEPS, "plms")])
def test_plms(steps, variant):
    """S-PNDM is theirs until its order rises."""
    theirs = {"skip_prk_steps": True, "set_alpha_to_one": True}
    how = {"steps": steps, "times": grids.leading(vp(), steps), "variant": variant}
    assert compare("PNDMScheduler", theirs, pndm, **how) < DOUBLE


# --- EDM and flows -------------------------------------------------------------------------------------------------


def edm() -> paths.Path:
    return paths.edm(sigma_max=81.0)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_edm_classes(schedule):
    theirs = {"sigma_schedule": schedule}
    assert compare("EDMEulerScheduler", theirs, euler, path=edm) < SINGLE
    for order in (1, 2, 3):
        how = {"order": order, "final": "lower"}
        assert (
            compare(
                "EDMDPMSolverMultistepScheduler", {"solver_order": order, **theirs}, dpmpp, path=edm, **how
            )
            < DOUBLE
        )


@pytest.mark.parametrize(
    "options", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}]
)
def test_flow_euler(options):
    if "use_beta_sigmas" in options:
        pytest.importorskip("scipy")
    assert compare("FlowMatchEulerDiscreteScheduler", options, euler, path=flow, form="v") < SINGLE
    assert compare("FlowMatchEulerDiscreteScheduler", options, ddim, path=flow) < SINGLE


def test_flow_heun():
    assert compare("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, heun, path=flow, form="v") < SINGLE


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_multistep_on_flows(shift):
    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    for order in (1, 2, 3):
        theirs = {"solver_order": order, **flows}
        assert compare("UniPCMultistepScheduler", theirs, unipc, path=flow, order=order) < DOUBLE
        how = {"path": flow, "order": order, "final": "lower"}
        assert compare("DPMSolverMultistepScheduler", theirs, dpmpp, **how) < SINGLE


# --- stochastic: the same fresh noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise(eta):
    options = {"eta": eta, "variance_noise": iter(FRESH).__next__}
    assert compare("DDIMScheduler", {}, ddim, step_options=options, eta=eta) < DOUBLE


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance, fresh):
    fresh("scheduling_ddpm")
    assert compare("DDPMScheduler", {"variance_type": f"fixed_{variance}"}, ddpm, variance=variance) < DOUBLE


def test_euler_ancestral(fresh):
    fresh("scheduling_euler_ancestral_discrete")
    assert compare("EulerAncestralDiscreteScheduler", {}, ddim, eta=1.0) < SINGLE


@pytest.mark.parametrize("order, kind, weight", RULES[:3])
def test_sde_dpm_solver_pp(order, kind, weight):
    theirs = {"solver_order": order, "solver_type": kind, "algorithm_type": "sde-dpmsolver++"}
    how = {"order": order, "weight": weight, "final": "lower"}
    options = {"variance_noise": iter(FRESH).__next__}
    assert compare("DPMSolverMultistepScheduler", theirs, sde_dpmpp, step_options=options, **how) < SINGLE


@pytest.mark.parametrize("predictor, corrector", [(1, 1), (2, 2), (3, 3), (3, 4)])
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_sa_solver(predictor, corrector, tau, fresh):
    fresh("scheduling_sasolver")
    theirs = {"predictor_order": predictor, "corrector_order": corrector, "tau_func": lambda t: tau}
    how = {"predictor": predictor, "corrector": corrector, "tau": tau}
    assert compare("SASolverScheduler", theirs, sa, **how) < DOUBLE


def test_lcm(fresh):
    fresh("scheduling_lcm")
    # at the default scaling of 10 the skip connection still adds 1e-5 of the sample
    assert compare("LCMScheduler", {"timestep_scaling": 1e9}, consistency, steps=4) < DOUBLE


# --- where theirs are wrong ----------------------------------------------------------------------------------------


def solution(path, t_max) -> torch.Tensor:
    times = grids.vp(path, 200, exponent=2.0, t_max=t_max)
    return sample(MIXTURE.denoiser(path), NOISE, multistep(path, times, variable="vp", nodes=4))


def rmse(x, reference) -> float:
    return float((x - reference).square().mean().sqrt())


@pytest.mark.parametrize("options, path, left", [
    ({"use_karras_sigmas": True}, vp, 0.01),
    ({"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, flow, 0.05),
])  # fmt: skip
def test_deis_leaves_noise_where_its_last_sigma_stands_twice(options, path, left):
    path, steps = path(), 20
    scheduler = schedulers.make("DEISMultistepScheduler", solver_order=3, **options)
    run = schedulers.run(scheduler, MIXTURE.denoiser(path), NOISE, steps)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2] > 0.9 * left
    times = schedulers.grid_of(scheduler, path, steps)
    # their last call changes nothing: one call less, and the noise of the last sigma still there
    assert rmse(ours(path, deis(path, times, order=3, variable="lam")), run.x) < DOUBLE
    table = deis(path, np.append(times, path.t_clean), order=3, variable="lam")
    assert table.calls == run.calls and table.times[-1] == path.t_clean
    if left > 0.02:  # above what the integration itself misses
        reference = solution(path, times[0])
        assert rmse(ours(path, table), reference) < 0.5 * rmse(run.x, reference)


def test_their_linspace_ddim_steps_beside_its_own_grid():
    """They go down by K // n indices, while the next call is made where linspace says."""
    assert compare("DDIMScheduler", {"timestep_spacing": "linspace"}, ddim) > 0.01


def test_their_third_order_sde_has_a_wrong_sign():
    """The second moment's weight is alpha (1/2 - phi_2(-2h)); they have -1/2. Equal noise should make 2 and 3 agree."""
    path, options = vp(), {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    scheduler = schedulers.make("DPMSolverMultistepScheduler", **options)
    run = schedulers.run(scheduler, MIXTURE.denoiser(path), NOISE, 40, variance_noise=iter(FRESH).__next__)
    times = schedulers.grid_of(scheduler, path, 40)
    second, third = (ours(path, sde_dpmpp(path, times, order=order)) for order in (2, 3))
    assert rmse(third, second) < 0.5 * rmse(run.x, second)


@pytest.mark.parametrize("options, form", [
    ({"solver_type": "bh1"}, "x0"),
    ({"predict_x0": False}, "eps"),
    ({"lower_order_final": False}, "x0"),
    ({"solver_type": "bh1", "solver_order": 3}, "x0"),
    ({"predict_x0": False, "solver_order": 3}, "eps"),
    ({"lower_order_final": False, "solver_order": 3}, "x0"),
])  # fmt: skip
def test_unipc_is_finite_at_sigma_zero(options, form):
    path = vp()
    scheduler = schedulers.make("UniPCMultistepScheduler", **options)
    try:
        theirs = schedulers.run(scheduler, MIXTURE.denoiser(path), NOISE, STEPS).x
        assert not torch.isfinite(theirs).all()
    except RuntimeError as error:  # a singular system
        assert "singular" in str(error)
    times = schedulers.grid_of(scheduler, path, STEPS)
    assert times[-1] == path.t_clean
    order, rule = options.get("solver_order", 2), options.get("solver_type", "bh2")
    final = "lower" if options.get("lower_order_final", True) else "auto"
    x = ours(path, unipc(path, times, order=order, rule=rule, form=form, final=final))
    reference = solution(path, times[0])
    assert torch.isfinite(x).all() and rmse(x, reference) < rmse(ours(path, ddim(path, times)), reference)


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"]
)
def test_times_on_flows_are_not_rounded(name):
    """Their network would be asked at up to 1/1000 beside the noise level; ours is asked at it."""
    scheduler = schedulers.make(name, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(STEPS)
    asked, held = scheduler.timesteps.double().numpy() / 1000, scheduler.sigmas.double().numpy()[:STEPS]
    assert not scheduler.timesteps.is_floating_point() and np.abs(asked - held).max() > 5e-4
    path = paths.flow(shift=3.0)
    table = dpmpp(path, grids.explicit(path, sigmas=held))
    assert np.abs(table.t[:, 0] - held).max() < 1e-15
