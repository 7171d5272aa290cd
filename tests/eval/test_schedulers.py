"""Running diffusers' schedulers on a Denoiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from fewstep.eval import schedulers
from fewstep.models import GaussianMixture, paths

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
MIXTURE = GaussianMixture([0.4, 0.6], [[-1.0, 0.5], [1.0, 0.0]], 0.1)
NOISE = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_betas_span_the_noise_levels_that_were_asked_for():
    abar = np.cumprod(1 - schedulers.betas_between(0.01, 150.0, count=500))
    rho = np.sqrt((1 - abar) / abar)
    assert len(rho) == 500 and abs(rho[0] / 0.01 - 1) < 1e-8 and abs(rho[-1] / 150 - 1) < 1e-8


@pytest.mark.parametrize("name, calls, steps", [("DPMSolverMultistepScheduler", 8, 8), ("HeunDiscreteScheduler", 8, 4),
                                                ("PNDMScheduler", 5, None)])  # fmt: skip
def test_steps_for_a_budget(name, calls, steps):
    assert schedulers.steps_for(schedulers.make(name), calls) == steps


@pytest.mark.parametrize(
    "kind", ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "HeunDiscrete", "EDMEuler"]
)
def test_a_run_does_not_depend_on_the_path_of_the_denoiser(kind):
    runs = []
    for path in (paths.edm(sigma_max=200.0), paths.flow()):
        calls = []
        d = MIXTURE.denoiser(path)
        inner = d.call
        d.call = lambda x, tau, inner=inner, calls=calls: calls.append(1) or inner(x, tau)
        run = schedulers.run(schedulers.make(f"{kind}Scheduler"), d, NOISE, 6)
        assert len(calls) == run.calls == len(run.levels)
        runs.append(run.x)
    assert (runs[0] - runs[1]).abs().max() < 1e-6


def test_a_second_run_of_the_same_scheduler_is_the_same():
    scheduler, d = schedulers.make("DEISMultistepScheduler"), MIXTURE.denoiser(paths.edm(sigma_max=200.0))
    first, second = (schedulers.run(scheduler, d, NOISE, 7).x for _ in range(2))
    assert torch.equal(first, second)


def test_a_prediction_type_that_is_not_known():
    scheduler = schedulers.make("DDIMScheduler", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type must be"):
        schedulers.run(scheduler, MIXTURE.denoiser(paths.edm()), NOISE, 3)
