"""Tables that do what diffusers' schedulers do: one exact model, one noise, and the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from fewstep.eval import schedulers
from fewstep.models import paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import sample
from fewstep.samplers.theirs import solver_of, table_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
MIXTURE = random_mixture(8, 3, 0)
NOISE = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DOUBLE, SINGLE = 1e-10, 1e-5  # SINGLE: classes that cast the sample to float32 inside
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

EQUAL = [
    ("DDIMScheduler", {"timestep_spacing": "trailing"}, DOUBLE),
    ("DDIMScheduler", {"steps_offset": 1, "set_alpha_to_one": False}, DOUBLE),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, DOUBLE),
    ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}, DOUBLE),
    ("PNDMScheduler", {"set_alpha_to_one": True}, DOUBLE),
    ("DEISMultistepScheduler", {"solver_order": 3}, DOUBLE),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, SINGLE),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": True}, SINGLE),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, SINGLE),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}, SINGLE),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, SINGLE),
    ("DPMSolverMultistepScheduler",
     {"solver_order": 2, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, SINGLE),
    ("UniPCMultistepScheduler", {"solver_order": 3}, DOUBLE),
    ("UniPCMultistepScheduler", {"solver_order": 2, "disable_corrector": list(range(99))}, DOUBLE),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "predict_x0": False, "final_sigmas_type": "sigma_min"}, DOUBLE),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, SINGLE),
    ("HeunDiscreteScheduler", {}, SINGLE),
    ("LMSDiscreteScheduler", {}, SINGLE),
    ("KDPM2DiscreteScheduler", {}, SINGLE),
    ("EDMEulerScheduler", {}, SINGLE),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, DOUBLE),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, SINGLE),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, SINGLE),
    ("UniPCMultistepScheduler", FLOW, DOUBLE),
]  # fmt: skip


def path_of(name, options):
    if name.startswith("EDM"):
        return paths.edm(sigma_max=81.0)
    if name.startswith("Flow") or "use_flow_sigmas" in options:
        return paths.flow()
    abar = schedulers.make("DDIMScheduler").alphas_cumprod.double().numpy()
    return paths.vp_discrete(
        np.append(abar, abar[-1] * 0.98)
    )  # float32 puts their first sigma above the last


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name, options, bound", EQUAL)
def test_numbers_are_theirs(name, options, bound, steps):
    path = path_of(name, options)
    scheduler = schedulers.make(name, **options)
    before = scheduler.timesteps
    table, _ = table_of(scheduler, path, {"num_inference_steps": steps})
    run = schedulers.run(schedulers.make(name, **options), MIXTURE.denoiser(path), NOISE, steps)
    assert table.calls == run.calls
    assert float((sample(MIXTURE.denoiser(path), NOISE, table) - run.x).abs().max()) < bound
    assert scheduler.timesteps is before  # it was not touched


@pytest.mark.parametrize("name, options, solver", [
    ("DDPMScheduler", {}, ("ddpm", {"variance": "small"})),
    ("DDPMScheduler", {"variance_type": "fixed_large"}, ("ddpm", {"variance": "large"})),
    ("EulerAncestralDiscreteScheduler", {}, ("ddim", {"eta": 1.0})),
    ("LCMScheduler", {}, ("consistency", {})),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, ("consistency", {})),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"},
     ("sde_dpmpp", {"order": 2, "final": "lower"})),
])  # fmt: skip
def test_stochastic_ones_are_named(name, options, solver):
    """That these are equal for equal noise is shown in test_against_diffusers."""
    assert solver_of(schedulers.make(name, **options), 10) == solver


@pytest.mark.parametrize("name, options, said", [
    ("IPNDMScheduler", {}, "IPNDMScheduler has no equal here: give a table"),
    ("PNDMScheduler", {"timestep_spacing": "linspace"}, "linspace"),
    ("SASolverScheduler", {}, "SASolverScheduler has no equal"),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, "linspace"),
    ("DDIMScheduler", {"clip_sample": True}, "clip_sample=True"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, "learned_range"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order=3"),
    ("UniPCMultistepScheduler", {"disable_corrector": [0]}, r"disable_corrector=\[0\]"),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
])  # fmt: skip
def test_what_has_no_equal_is_refused_with_what_to_do(name, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        solver_of(schedulers.make(name, **options), 10)
    assert "table=lambda path, n" in str(caught.value) and "FewstepScheduler.from_config" in str(caught.value)


def test_where_they_start():
    """Unit noise for VP and flows; on the VP path that is sigma noise and a little more, as their pipelines have it."""
    for name, options, wanted in [
        ("DDIMScheduler", {}, 1.0),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 1.0),
        ("FlowMatchEulerDiscreteScheduler", {}, 1.0),
        ("EDMEulerScheduler", {}, (80.0**2 + 1) ** 0.5),
    ]:
        scheduler = schedulers.make(name, **options)
        start = table_of(scheduler, path_of(name, options), {"num_inference_steps": 5}).start
        assert start == pytest.approx(wanted, rel=1e-6), name
