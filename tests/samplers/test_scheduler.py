"""FewstepScheduler: inside real pipelines, beside diffusers' schedulers, and equal to our own loop."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from fewstep.models import Denoiser, paths
from fewstep.models.mixture import random_mixture
from fewstep.samplers import FewstepScheduler, ddim, deis, dpmpp, grids, sample, unipc
from fewstep.samplers.catalogue import solvers

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
]
diffusers.utils.logging.set_verbosity_error()


def _load_pipelines():
    file = Path(__file__).with_name("pipelines.py")
    spec = importlib.util.spec_from_file_location("tiny_pipelines", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pipelines = _load_pipelines()
PIPES = tuple(pipelines.BUILDERS)
MULTISTEP = {
    "multistep": {}, "deis": {"variable": "t"}, "dpmpp": {}, "dpm": {}, "unipc": {}, "ipndm": {}, "ipndm_v": {},
    "ddim": {}, "euler": {}, "sa": {}, "sde_dpmpp": {}, "ddpm": {}, "pndm": {"variant": "simple"}, "ersde": {},
}  # fmt: skip
MIXTURE = random_mixture(8, 3, 0)
NOISE = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


@functools.cache
def pipe(name):
    """One of each is enough: only its scheduler changes."""
    return pipelines.build(name)


def images(name, scheduler, **call):
    tiny = pipe(name)
    before, tiny.scheduler = tiny.scheduler, scheduler
    try:
        return pipelines.run(name, tiny, **call)
    finally:
        tiny.scheduler = before


def ours(name, **options):
    return FewstepScheduler.from_config(pipe(name).scheduler.config, **options)


def denoiser_of(scheduler, mixture=MIXTURE):
    path, predicts = scheduler._path, PREDICTIONS[scheduler.config.prediction_type]
    return mixture.denoiser(path, predicts=predicts)


def loop(scheduler, noise, d=None, **step):
    """What a pipeline does, with an exact network."""
    d = denoiser_of(scheduler) if d is None else d
    scale = 1000.0 if scheduler._path.name == "flow" else 1.0
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(d.raw(x, t.double() / scale)[0], t, x, return_dict=False, **step)[0]
    return x


def unit(scheduler, noise):
    """The unit noise of which the pipeline's first sample is sigma times."""
    return noise / scheduler._path.sigma(float(scheduler._table.times[0]))


# --- in pipelines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPES)
def test_every_multistep_solver_runs(name):
    seen = {}
    for solver, options in MULTISTEP.items():
        scheduler = ours(name, solver=solver, solver_options=options, timestep_spacing="logsnr", seed=1)
        seen[solver] = images(name, scheduler)
        assert np.isfinite(seen[solver]).all() and seen[solver].std() > 0
        assert scheduler.step_index == len(scheduler.timesteps)
    distance = {solver: np.abs(seen[solver] - seen["ddim"]).max() for solver in MULTISTEP}
    assert distance.pop("ddim") == 0 and distance.pop("euler") < 1e-6  # one method
    assert min(distance.values()) > 1e-5  # and the others are others


@pytest.mark.parametrize("name", PIPES)
def test_solvers_that_call_more_than_once_a_step_run(name):
    calls = []
    tiny = pipe(name)
    network = tiny.unet if hasattr(tiny, "unet") else tiny.transformer
    hook = network.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        scheduler = ours(name, solver="heun")
        assert scheduler.order == 2
        result = images(name, scheduler, steps=3)
    finally:
        hook.remove()
    assert np.isfinite(result).all() and len(scheduler.timesteps) == 5
    assert len(calls) == (10 if name == "wan" else 5)  # Wan calls it apart for the prompt and without


SAME = [
    ("sd", "DDIMScheduler", {"timestep_spacing": "trailing"}, "ddim", {}),
    ("sd", "DDIMScheduler", {"timestep_spacing": "leading"}, "ddim", {}),
    ("dit", "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, "ddim", {}),
    ("ddpm", "DPMSolverMultistepScheduler", {}, "dpmpp", {"final": "lower"}),
    ("sd", "DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}, "dpmpp", {"final": "lower"}),
    ("sd", "DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, "dpmpp", {"final": "lower"}),
    ("sd", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp", {"final": "lower"}),
    ("sd", "UniPCMultistepScheduler", {"timestep_spacing": "linspace"}, "unipc", {}),
    ("sdxl", "UniPCMultistepScheduler", {"timestep_spacing": "trailing", "solver_order": 3}, "unipc", {}),
    ("sdxl", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}, "euler", {}),
    ("sd", "DEISMultistepScheduler", {"timestep_spacing": "linspace"}, "deis", {"final": "lower", "variable": "lam"}),
]  # fmt: skip


@pytest.mark.parametrize("name, theirs, config, solver, options", SAME)
def test_images_are_those_of_the_same_solver_in_diffusers(name, theirs, config, solver, options):
    base = pipe(name).scheduler.config
    reference = getattr(diffusers, theirs).from_config(base, **config)
    handed = dict(reference.config)
    if theirs == "DEISMultistepScheduler":  # ends at index 0
        handed["final_sigmas_type"] = "sigma_min"
    handed.setdefault("solver_order", 2)
    handed.pop("_use_default_values", None)
    scheduler = FewstepScheduler.from_config(handed, solver=solver, solver_options=options)
    expected, got = (images(name, s, steps=5) for s in (reference, scheduler))
    assert np.abs(expected - got).max() < 1e-4


@pytest.mark.parametrize("name, call", [
    ("sd3", {"sigmas": np.linspace(1, 1 / 6, 6).tolist()}), ("flux", {}), ("wan", {}),
])  # fmt: skip
def test_flow_euler_is_diffusers(name, call):
    reference = pipe(name).scheduler
    if name == "wan":  # takes no sigmas, and both spread Karras' in the same way
        reference = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    expected = images(name, reference, steps=6, **call)
    for solver in ("euler", "ddim"):
        scheduler = FewstepScheduler.from_config(reference.config, solver=solver)
        assert np.abs(images(name, scheduler, steps=6, **call) - expected).max() < 1e-6
        assert torch.allclose(scheduler.timesteps, reference.timesteps, rtol=1e-6)


def test_sd3_is_given_the_grid_that_was_meant():
    """diffusers shifts what it has shifted: 1, .858, .602, .009."""
    scheduler = ours("sd3")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000.0, 900.0, 750.0, 500.0]
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


EDITS = [
    ("StableDiffusionImg2ImgPipeline", "sd", "DDIMScheduler", "ddim", {"strength": 0.6}),
    ("StableDiffusionImg2ImgPipeline", "sd", "DPMSolverMultistepScheduler", "dpmpp", {"strength": 0.6}),
    ("StableDiffusionInpaintPipeline", "sd", "DDIMScheduler", "ddim", {"strength": 0.6}),
    ("StableDiffusionXLImg2ImgPipeline", "sdxl", "DDIMScheduler", "ddim", {"denoising_start": 0.5}),
    ("StableDiffusion3Img2ImgPipeline", "sd3", "FlowMatchEulerDiscreteScheduler", "euler", {"strength": 0.6}),
    ("FluxImg2ImgPipeline", "flux", "FlowMatchEulerDiscreteScheduler", "euler", {"strength": 0.6}),
    ("FluxInpaintPipeline", "flux", "FlowMatchEulerDiscreteScheduler", "euler", {"strength": 0.6}),
]


@pytest.mark.parametrize("kind, name, theirs, solver, call", EDITS)
def test_edits_begin_midway_with_a_start_of_their_own(kind, name, theirs, solver, call):
    """Image to image and inpainting, whose pipelines change the samples between steps."""
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    call = {**call, "num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "np", "image": pixels}
    if "Inpaint" in kind:
        call["mask_image"] = (pixels[:, :1] > 0.5).float()
    if name in pipelines.FLOWS or "Inpaint" in kind:
        call |= {"height": 16, "width": 16}
    if name in pipelines.FLOWS:
        call["max_sequence_length"] = pipelines.LENGTH
    extra = {"sd": {"requires_safety_checker": False}, "sdxl": {"add_watermarker": False}}.get(name, {})
    base = pipe(name).scheduler.config
    if name == "sd3":  # their own default grid is another one
        config = {"use_karras_sigmas": True, "shift": 1.0}
    elif name == "flux":
        config = {}
    else:
        config = {"timestep_spacing": "trailing", "clip_sample": False, "solver_order": 2, "steps_offset": 1}
    options = {"solver_options": {"final": "lower"}} if solver == "dpmpp" else {}
    made = []
    for scheduler in (
        getattr(diffusers, theirs).from_config(base, **config),
        FewstepScheduler.from_config(base, solver=solver, **config, **options),
    ):
        tiny = getattr(diffusers, kind)(**{**pipe(name).components, "scheduler": scheduler}, **extra)
        tiny.set_progress_bar_config(disable=True)
        made.append(tiny(prompt=["a", "b"], generator=torch.Generator().manual_seed(0), **call).images)
    assert scheduler.begin_index == (5 if "denoising_start" in call else 4)
    assert np.abs(made[0] - made[1]).max() < 1e-4


# --- EDM's networks and LCMs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs, config, solver, options", [
    ("EDMEulerScheduler", {}, "euler", {}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_data": 0.8, "sigma_max": 20.0}, "euler", {}),
    ("EDMDPMSolverMultistepScheduler", {"rho": 5.0}, "dpmpp", {"final": "lower"}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "sigma_min": 0.01}, "dpmpp", {"final": "lower"}),
])  # fmt: skip
def test_networks_in_edms_preconditioning(theirs, config, solver, options):
    reference = getattr(diffusers, theirs)(**config)
    order = {"solver_order": reference.config.get("solver_order", 1)}
    scheduler = FewstepScheduler.from_config(reference.config, solver=solver, solver_options=options, **order)
    assert scheduler.init_noise_sigma == pytest.approx(float(reference.init_noise_sigma))
    expected, got = (images("sd", s, steps=6) for s in (reference, scheduler))
    assert torch.allclose(scheduler.timesteps, reference.timesteps.float(), atol=1e-5)
    assert torch.allclose(scheduler.sigmas, reference.sigmas, rtol=1e-5)
    assert np.abs(expected - got).max() < 1e-4 < 1e-2 < expected.std()
    x, noise, at = torch.ones(2, 4, 8, 8), torch.randn(2, 4, 8, 8), reference.timesteps[[1, 3]]
    assert torch.allclose(scheduler.add_noise(x, noise, at), reference.add_noise(x, noise, at), rtol=1e-4)
    back = type(reference).from_config(scheduler.config)
    kept = ("sigma_data", "sigma_min", "sigma_max", "sigma_schedule", "rho", "prediction_type")
    assert {k: back.config[k] for k in kept} == {k: reference.config[k] for k in kept}


def test_edm_configs_are_saved_and_begin_midway(tmp_path):
    scheduler = FewstepScheduler.from_config(
        diffusers.EDMEulerScheduler(sigma_max=50.0).config, solver="deis"
    )
    scheduler.save_pretrained(tmp_path)
    again = FewstepScheduler.from_pretrained(tmp_path)
    assert again._path == paths.edm(sigma_max=50.0) and again.config.sigma_data == 0.5
    again.set_timesteps(8)
    later = again.timesteps[3:]  # as image to image cuts them
    sigma = float(again.sigmas[3])
    assert again.scale_model_input(torch.ones(1), later[0]).item() == pytest.approx(
        1 / (sigma**2 + 0.25) ** 0.5
    )
    x = torch.randn(2, 1, 2, 2)
    state = sigma * x
    for t in later:
        state = again.step(torch.sin(again.scale_model_input(state, t)), t, state).prev_sample
    d = Denoiser(lambda x, tau: torch.sin(x), again._path, "x0", precond="edm")
    table = deis(d.path, grids.karras(d.path, 8)[3:])
    assert again.begin_index == 3 and torch.allclose(state, sample(d, x, table), atol=1e-5)


@functools.cache
def lcm():
    tokenizer = pipelines.clip_tokenizer()
    torch.manual_seed(0)
    tiny = diffusers.LatentConsistencyModelPipeline(
        vae=pipelines.vae(), text_encoder=pipelines.clip(tokenizer), tokenizer=tokenizer,
        unet=pipelines.text_unet(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler(**pipelines.SD_BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    tiny.set_progress_bar_config(disable=True)
    return tiny


def test_latent_consistency_models():
    """On the times that they were made for; at the last step the sample is the estimate that the pipeline decodes."""
    tiny = lcm()
    theirs = tiny.scheduler
    ours_ = FewstepScheduler.from_config(theirs.config, solver="consistency")
    for n, original in [(4, 50), (4, None), (1, 50), (7, 20), (4, 4), (3, 1000)]:
        theirs.set_timesteps(n, original_inference_steps=original)
        ours_.set_timesteps(n, original_inference_steps=original)
        assert ours_.timesteps.tolist() == theirs.timesteps.tolist(), (n, original)
    made = []
    for scheduler in (
        theirs,
        ours_,
        FewstepScheduler.from_config(theirs.config, solver="dpmpp", solver_order=2),
    ):
        tiny.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        call = {"generator": generator, "height": 16, "width": 16, "output_type": "np"}
        made.append(tiny(["a b", "c d"], num_inference_steps=1, **call).images)
        images_ = tiny(["a b", "c d"], num_inference_steps=4, original_inference_steps=20, **call).images
        assert np.isfinite(images_).all()
    tiny.scheduler = theirs
    assert np.abs(made[0] - made[1]).max() < 1e-4 < 1e-3 < made[0].std()  # one step draws no noise
    x = torch.randn(1, 4, 8, 8)
    ours_.set_timesteps(4, original_inference_steps=None)
    following, x0 = ours_.step(torch.zeros_like(x), ours_.timesteps[0], x, return_dict=False)
    assert torch.allclose(x0, x / ours_._path.alpha(999.0)) and not torch.equal(following, x0)
    ours_.set_timesteps(4)
    assert len(ours_.step(torch.zeros_like(x), ours_.timesteps[0], x, return_dict=False)) == 1
    for wrong in (3, 1001, 2.5):
        with pytest.raises(ValueError, match="original_inference_steps must be an integer from"):
            ours_.set_timesteps(4, original_inference_steps=wrong)
    with pytest.raises(ValueError, match="models with betas"):
        ours("sd3").set_timesteps(4, original_inference_steps=50)


class Unrounded(UniPCMultistepScheduler):
    """Theirs, but for the network's times on a flow, which they cut to whole numbers."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1] * 1000


@pytest.mark.parametrize("name", ["wan", "sd3"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_on_flows_is_diffusers(name, order):
    theirs = Unrounded(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=order
    )
    config = {key: value for key, value in theirs.config.items() if key[0] != "_"}  # as a file has it
    scheduler = FewstepScheduler.from_config(config, solver="unipc")
    for s in (theirs, scheduler):
        s.set_timesteps(6)
    assert torch.allclose(scheduler.sigmas, theirs.sigmas.float(), rtol=1e-6, atol=2e-6)
    # theirs begins at sigma = 1 - 1e-6, and its weights depend on this number; ours have the limit at 1
    table = unipc(paths.flow(), theirs.sigmas.double().numpy(), order=order)
    scheduler = FewstepScheduler.from_config(config, table=table)
    expected, got = (images(name, s, steps=6) for s in (theirs, scheduler))
    assert np.abs(expected - got).max() < 1e-4


@pytest.mark.parametrize("solver", ["multistep", "heun", "unipc", "dpm_single"])
@pytest.mark.parametrize("told", [True, False])
def test_beginning_midway_is_the_table_of_the_times_left(solver, told):
    """A pipeline that cuts timesteps short without saying so is understood too."""
    scheduler = FewstepScheduler(solver=solver, solver_order=2, timestep_spacing="logsnr")
    scheduler.set_timesteps(8)
    begin = 3 * scheduler.order
    if told:
        scheduler.set_begin_index(begin)
    d, x = denoiser_of(scheduler), NOISE
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(d.raw(x, t.double())[0], t, x).prev_sample
    assert scheduler.begin_index == begin and scheduler.step_index == len(scheduler.timesteps)
    times = grids.logsnr(d.path, 8)[3:]
    options = {"nodes" if solver == "multistep" else "order": 2} if solver != "heun" else {}
    table = solvers()[solver](d.path, times, **options)
    assert (x - sample(d, NOISE / d.path.sigma(times[0]), table)).abs().max() < 1e-5  # times are float32
    with pytest.raises(ValueError, match="all .* steps are done"):
        scheduler.step(x, 0, x)


def test_half_precision_goes_on_where_it_stopped():
    """bfloat16 in and out, float32 between: as near to float32 as the last rounding, while samples are untouched."""
    scheduler = FewstepScheduler(prediction_type="sample", solver="dpmpp")
    scheduler.set_timesteps(20)
    x, y = NOISE.float(), NOISE.bfloat16()
    other = copy.deepcopy(scheduler)
    target = torch.linspace(-1, 1, 8).expand(4, 8)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(target, t, x).prev_sample
        y = other.step(target, t, y).prev_sample
        assert y.dtype == torch.bfloat16
        if k == 10:  # changed by a pipeline: taken as it is
            y = y + 1
            other_x = other._stepper._taken_in(y).y
            assert torch.equal(other_x, y.float())
            y = y - 1
    assert (y.float() - x).abs().max() < 0.01


def test_half_precision_in_inference_mode():
    scheduler = FewstepScheduler(prediction_type="sample", solver="dpmpp")
    scheduler.set_timesteps(5)
    with torch.inference_mode():
        x = NOISE.half()
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    assert x.dtype == torch.float16 and not x.any()


# --- the same as our own loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_run_is_that_of_sample(prediction):
    for name, solver in solvers().items():
        grid = "vp" if name != "restart" else "karras"
        try:
            scheduler = FewstepScheduler(
                prediction_type=prediction, solver=name, solver_order=2, timestep_spacing=grid
            )
            scheduler.set_timesteps(6)
        except ValueError as error:
            assert "alpha = 0" in str(error) or "flow" in str(error), (name, error)
            continue
        scheduler.set_noise(5)
        d = denoiser_of(scheduler)
        # the pipeline hands the network float32 times; they are given back as float64 here
        expected = sample(d, unit(scheduler, NOISE), scheduler._table, seed=5)
        scheduler.timesteps = torch.as_tensor(scheduler._table.t[:, 0].copy()) * (
            1000.0 if prediction[0] == "f" else 1.0
        )
        assert len(scheduler.timesteps) == scheduler._table.calls
        assert (loop(scheduler, NOISE, d) - expected).abs().max() < 1e-6, name
        assert solver.entry.name == scheduler._table.solver


def test_clipping_is_the_loops_transform():
    scheduler = FewstepScheduler(solver="dpmpp", clip_sample=True, clip_sample_range=0.3)
    scheduler.set_timesteps(6)
    d = denoiser_of(scheduler)
    expected = sample(
        d, unit(scheduler, NOISE), scheduler._table, transform=lambda x0, t: x0.clamp(-0.3, 0.3)
    )
    assert (loop(scheduler, NOISE, d) - expected).abs().max() < 1e-6
    assert expected.abs().max() <= 0.3 + 1e-6


def test_thresholding_is_diffusers():
    config = {"thresholding": True, "timestep_spacing": "trailing", "clip_sample": False}
    theirs = diffusers.DDIMScheduler(**config, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    mine = FewstepScheduler.from_config(theirs.config, solver="ddim")
    output, x, y = 3 * torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), None
    y = x.clone()
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(4)
    for t in theirs.timesteps:
        x = theirs.step(output, t, x, use_clipped_model_output=True).prev_sample
        y = mine.step(output, t, y).prev_sample
    assert torch.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_the_variance_of_ddpm_is_diffusers(kind):
    """With the same generator. Index 0 comes last: elsewhere their large variance adds noise in the last step too."""
    theirs = diffusers.DDPMScheduler(
        variance_type=f"fixed_{kind}", timestep_spacing="leading", clip_sample=False
    )
    mine = FewstepScheduler.from_config(theirs.config, solver="ddpm")
    expected, got = (images("ddpm", s, steps=6) for s in (theirs, mine))
    assert np.abs(expected - got).max() < 1e-4


def test_a_variance_beside_the_prediction_is_left_out():
    mine = FewstepScheduler.from_config(
        diffusers.DDPMScheduler(variance_type="learned_range").config, solver="ddpm"
    )
    x, generator = torch.randn(2, 3, 4, 4), torch.Generator()
    results = []
    for output in (x, torch.cat([x, 5 * x], dim=1)):
        mine.set_timesteps(4)
        results.append(mine.step(output, 999, x, generator=generator.manual_seed(0)).prev_sample)
    assert torch.equal(*results)


# --- times --------------------------------------------------------------------------------------------------


def test_times_given_by_hand():
    flow = FewstepScheduler(prediction_type="flow_prediction", shift=3.0)
    flow.set_timesteps(sigmas=[1.0, 0.5])
    assert flow.timesteps.tolist() == [1000.0, 750.0]  # shifted, as pipelines count on
    flow.set_timesteps(timesteps=[1000.0, 500.0])
    assert flow.timesteps.tolist() == [1000.0, 500.0]  # never shifted
    plain = FewstepScheduler(prediction_type="flow_prediction", shift=3.0, shift_custom=False)
    plain.set_timesteps(sigmas=[1.0, 0.5])
    assert plain.timesteps.tolist() == [1000.0, 500.0]
    moved = FewstepScheduler(prediction_type="flow_prediction", use_dynamic_shifting=True)
    moved.set_timesteps(sigmas=[1.0, 0.5], mu=np.log(3.0))
    assert moved.timesteps.tolist() == pytest.approx([1000.0, 750.0])
    end = FewstepScheduler(prediction_type="flow_prediction", shift_terminal=0.1)
    end.set_timesteps(5)
    assert end.sigmas.tolist()[-2:] == pytest.approx([0.1, 0.0])
    vp = FewstepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    vp.set_timesteps(sigmas=[14.615, 1.0, 0.1, 0.0])
    assert vp.sigmas.tolist() == pytest.approx([14.6146, 1.0, 0.1, 0.0], rel=1e-4) and vp.timesteps[0] == 999
    vp.set_timesteps(timesteps=[999, 400, 33.5])
    assert vp.timesteps.tolist() == [999.0, 400.0, 33.5]


def test_a_grid_of_ours_stands_where_a_pipeline_always_passes_even_sigmas():
    scheduler = ours("flux", timestep_spacing="logsnr")
    images("flux", scheduler)
    assert scheduler.timesteps.tolist() == pytest.approx((1000 * grids.logsnr(paths.flow(), 4)[:-1]).tolist())
    images("flux", scheduler, sigmas=[1.0, 0.6, 0.5, 0.1])
    assert scheduler.sigmas[1] > 0.6  # shifted, but his


def test_every_number_of_steps_is_made():
    for spacing in ("trailing", "leading", "linspace", "logsnr", "vp"):
        scheduler = FewstepScheduler(solver="ddim", timestep_spacing=spacing)
        for n in (1, 2, 3, 7, 27, 95, 100):
            scheduler.set_timesteps(n)
            assert (
                len(scheduler.timesteps) == n and len(scheduler.sigmas) == n + 1 and scheduler.sigmas[-1] == 0
            )


def test_zero_terminal_snr_and_other_betas():
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        theirs = diffusers.DDIMScheduler(beta_schedule=kind, rescale_betas_zero_snr=True)
        mine = FewstepScheduler.from_config(theirs.config)
        assert torch.allclose(mine.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], rtol=1e-3, atol=1e-6)
        assert 0 < mine.alphas_cumprod[-1] < 1e-7
    scheduler = FewstepScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler.set_timesteps(5)
    assert torch.isfinite(loop(scheduler, NOISE)).all()


# --- noise --------------------------------------------------------------------------------------------------


def test_generators_one_an_image():
    scheduler = ours("sd", solver="sde_dpmpp")
    both = images("sd", scheduler, generator=[torch.Generator().manual_seed(s) for s in (3, 4)])
    again = images("sd", scheduler, generator=[torch.Generator().manual_seed(s) for s in (3, 5)])
    assert np.array_equal(both[0], again[0]) and not np.array_equal(both[1], again[1])
    with pytest.raises(ValueError, match="generator must be one or a list of 4"):
        scheduler.set_timesteps(3)
        scheduler.step(NOISE, 999, NOISE, generator=[torch.Generator()] * 3)


def test_where_the_pipeline_passes_no_generator():
    scheduler = ours("flux", solver="sde_dpmpp")

    def run():
        return images("flux", scheduler, latents=torch.ones(2, 16, 16))

    torch.manual_seed(0)
    first, second = run(), run()
    torch.manual_seed(0)
    assert not np.array_equal(first, second) and np.array_equal(first, run())
    scheduler.set_noise(7)
    assert np.array_equal(run(), run())
    scheduler.set_noise([torch.Generator().manual_seed(s) for s in (1, 2)])
    assert not np.array_equal(run(), run())  # they go on
    fixed = ours("flux", solver="sde_dpmpp", seed=7)
    scheduler.set_noise(7)
    assert np.array_equal(run(), images("flux", fixed, latents=torch.ones(2, 16, 16)))


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    scheduler = FewstepScheduler(solver="sde_dpmpp", seed=3)
    d = denoiser_of(scheduler)
    scheduler.set_timesteps(5)
    whole = loop(scheduler, NOISE, d)
    scheduler.set_timesteps(5)
    scheduler.set_noise(3, ids=torch.arange(2, 4))
    assert torch.equal(loop(scheduler, NOISE[2:], d), whole[2:])


def test_adding_noise_is_diffusers():
    x, noise, t = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0, 500, 999])
    theirs = diffusers.DDPMScheduler()
    mine = FewstepScheduler.from_config(theirs.config)
    assert torch.allclose(mine.add_noise(x, noise, t), theirs.add_noise(x, noise, t), atol=1e-5)
    assert torch.allclose(mine.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t), atol=1e-5)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    mine = FewstepScheduler.from_config(theirs.config)
    t = theirs.timesteps[[0, 100, 900]]
    assert torch.allclose(mine.timesteps, theirs.timesteps, rtol=1e-6)
    assert torch.allclose(mine.scale_noise(x, t, noise), theirs.scale_noise(x, t, noise), atol=1e-6)


# --- configs, files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs, config", [
    ("DDIMScheduler", {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "euler_at_final": True}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "base_shift": 0.4, "time_shift_type": "linear"}),
])  # fmt: skip
@pytest.mark.parametrize("by_file", [False, True])
def test_there_and_back(theirs, config, by_file, tmp_path):
    kind = getattr(diffusers, theirs)
    first = kind(**config)
    mine = FewstepScheduler.from_config(first.config, solver="deis", timestep_spacing="logsnr")
    again = FewstepScheduler.from_config(mine.config)
    if by_file:
        mine.save_pretrained(tmp_path)
        again = FewstepScheduler.from_pretrained(tmp_path)
    for key in ("solver", "grid", "prediction_type", "shift"):
        assert again.config[key] == mine.config[key]
    flow = "Flow" in theirs or config.get("use_flow_sigmas")
    assert mine.config.prediction_type == (
        "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    )
    assert not flow or mine.config.shift == config.get("shift", config.get("flow_shift", 1.0))
    back = kind.from_config(again.config)
    kept = {k: v for k, v in first.config.items() if k in config}
    assert {k: back.config[k] for k in kept} == kept
    if not by_file:  # a file does not tell defaults from choices; in memory nothing at all is lost
        assert {k: back.config[k] for k in first.config if k[0] != "_"} == {
            k: v for k, v in first.config.items() if k[0] != "_"
        }
    if not config.get("use_dynamic_shifting"):
        back.set_timesteps(5)


def test_a_flow_config_is_recognised_and_said(caplog):
    with caplog.at_level(logging.INFO, "fewstep"):
        FewstepScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config)
    assert "flow_prediction" in caplog.text


def test_karras_flag_is_understood_and_overridden():
    theirs = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    path = FewstepScheduler()._path
    for options, grid in (({}, grids.karras), ({"timestep_spacing": "trailing"}, grids.trailing)):
        scheduler = FewstepScheduler.from_config(theirs.config, **options)
        scheduler.set_timesteps(6)
        assert scheduler.timesteps.tolist() == pytest.approx(grid(path, 6)[:-1].tolist(), rel=1e-6)


def test_a_saved_pipeline_is_loaded_once_we_are_imported(tmp_path):
    tiny = pipelines.build("ddpm")
    tiny.scheduler = FewstepScheduler.from_config(
        tiny.scheduler.config, solver="unipc", timestep_spacing="vp"
    )
    tiny.save_pretrained(tmp_path / "pipe")
    expected = pipelines.run("ddpm", tiny)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is FewstepScheduler and loaded.scheduler.config.solver == "unipc"
    assert np.array_equal(pipelines.run("ddpm", loaded), expected)
    other = diffusers.DDIMScheduler()
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", scheduler=other).scheduler is other


def test_a_table_in_place_of_a_solver(tmp_path):
    base = pipe("sd").scheduler.config
    path = ours("sd")._path
    table = dpmpp(path, grids.logsnr(path, 5), order=2)
    table.save(tmp_path / "found.json")
    expected = images("sd", ours("sd", solver="dpmpp", solver_order=2, timestep_spacing="logsnr"), steps=5)
    for given in (table, str(tmp_path / "found.json"), json.loads(table.to_json())):
        scheduler = FewstepScheduler.from_config(base, table=given)
        assert np.array_equal(images("sd", scheduler, steps=5), expected)
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert {f.name for f in (tmp_path / "scheduler").iterdir()} == {"scheduler_config.json", "table.json"}
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["table"] == "table.json"
    for again in (
        FewstepScheduler.from_pretrained(tmp_path / "scheduler"),
        FewstepScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        FewstepScheduler.from_config(diffusers.DDIMScheduler.from_config(scheduler.config).config),
    ):
        assert np.array_equal(images("sd", again, steps=5), expected)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    assert scheduler._stepper.calls == 3
    found = FewstepScheduler.from_config(base, table=dataclasses.replace(table, solver="found"))
    found.set_timesteps(5)
    with pytest.raises(ValueError, match="begin_index must be 0"):
        found.set_begin_index(2)
    flux = ours("flux", table=dpmpp(paths.flow(), grids.vp(paths.flow(), 4)))
    assert np.isfinite(images("flux", flux)).all()  # its sigmas say no more than how many steps


# --- compiled, copied, light --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, options", [
    ("heun", {}), ("unipc", {"clip_sample": True}), ("sde_dpmpp", {"seed": 0}),
])  # fmt: skip
def test_a_step_compiles_without_a_break(solver, options):
    """And four graphs do for all steps: the first, the second, one with a counter in it, and the last."""
    torch.compiler.reset()
    scheduler = FewstepScheduler(solver=solver, solver_order=2, **options)
    d, noise = denoiser_of(scheduler), NOISE.float()
    scheduler.set_timesteps(10)
    expected = loop(scheduler, noise, d)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(scheduler.step, fullgraph=True, backend=count)
    for _ in range(2):
        scheduler.set_timesteps(10)
        x = noise
        for t in scheduler.timesteps:
            x = compiled(d.raw(x, t)[0], t, x, return_dict=False)[0]
        assert (x - expected).abs().max() < 1e-5
        assert len(graphs) <= 4


def test_no_value_is_read_on_the_way():
    """On the meta device there are no values: whatever reads one fails."""
    scheduler = FewstepScheduler(solver="unipc", timestep_spacing="vp")
    scheduler.set_timesteps(5, device="meta")
    x = torch.empty(2, 3, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    assert x.shape == (2, 3)
    with pytest.raises((NotImplementedError, RuntimeError)):
        scheduler.timesteps[0].item()


def test_only_the_four_names_come_from_diffusers():
    text = Path(sys.modules[FewstepScheduler.__module__].__file__).read_text()
    lines = [
        line for line in text.splitlines() if line.strip().startswith(("from diffusers", "import diffusers"))
    ]
    names = {name.strip() for line in lines for name in line.split("import")[1].split(",")}
    assert names == {"ConfigMixin", "SchedulerMixin", "register_to_config", "SchedulerOutput"}
    module = sys.modules[FewstepScheduler.__module__]
    assert module.SchedulerMixin and module.ConfigMixin  # looked up here by whoever loads a pipeline


def test_without_diffusers_the_rest_is_there():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import fewstep.samplers as s; s.ddim\n"
        "try: s.FewstepScheduler\n"
        "except ImportError as error: assert 'fewstep[diffusers]' in str(error); print('hint')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "hint", done.stderr


# --- what is refused ----------------------------------------------------------------------------------------


def flow_table():
    return ddim(paths.flow(), grids.uniform(paths.flow(), 4))


@pytest.mark.parametrize("options, message", [
    ({"solver": "deiss"}, "did you mean deis"),
    ({"solver_options": {"colour": 1}, "solver": "deis"}, "its options are"),
    ({"solver": "deis", "solver_order": 9}, "order must be"),
    ({"prediction_type": "noise"}, "prediction_type must be one of epsilon"),
    ({"beta_schedule": "round"}, "beta_schedule must be one of"),
    ({"timestep_spacing": "wide"}, "timestep_spacing must be one of leading"),
    ({"final_sigmas_type": "one"}, "final_sigmas_type must be"),
    ({"table": flow_table()}, "made for path 'flow'"),
    ({"prediction_type": "flow_prediction", "shift": 0.0}, "shift must be positive"),
    ({"prediction_type": "flow_prediction", "use_dynamic_shifting": True}, "mu must be passed"),
    ({"prediction_type": "flow_prediction", "final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
])  # fmt: skip
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        FewstepScheduler(**options).set_timesteps(4)


@pytest.mark.parametrize("call, message", [
    ({"num_inference_steps": 0}, "num_inference_steps must be a positive integer, got 0"),
    ({"num_inference_steps": -1}, "num_inference_steps must be"),
    ({"num_inference_steps": 2.0}, "num_inference_steps must be"),
    ({}, "num_inference_steps must be"),
    ({"num_inference_steps": 2000}, "num_inference_steps = 2000"),
    ({"sigmas": [3.0, 1.0], "timesteps": [999, 10]}, "pass one of them"),
    ({"num_inference_steps": 3, "sigmas": [3.0, 1.0]}, "the number of sigmas or timesteps, 2"),
    ({"sigmas": [1.0, 3.0]}, "sigmas do not make a grid"),
    ({"sigmas": [700.0, 3.0]}, "sigmas do not make a grid"),
    ({"timesteps": [1200, 3]}, "timesteps do not make a grid"),
])  # fmt: skip
def test_bad_times(call, message):
    with pytest.raises(ValueError, match=message):
        FewstepScheduler(solver="ddim").set_timesteps(**call)


def test_bad_calls():
    scheduler = FewstepScheduler(solver="heun")
    with pytest.raises(ValueError, match="before step"):
        scheduler.step(NOISE, 999, NOISE)
    with pytest.raises(ValueError, match="before set_begin_index"):
        scheduler.set_begin_index(0)
    scheduler.set_timesteps(3)
    for begin in (-1, 5, 1.0, True):
        with pytest.raises(ValueError, match="begin_index must be an integer in 0 .. 4"):
            scheduler.set_begin_index(begin)
    with pytest.raises(ValueError, match="call 1 of 5 is none"):
        scheduler.set_begin_index(1)  # inside a step
    with pytest.raises(ValueError, match="model_output must have the shape of sample"):
        scheduler.step(NOISE[:, :3], 999, NOISE)
    for _ in range(5):
        scheduler.step(NOISE, 999, NOISE)
    with pytest.raises(ValueError, match="all 5 steps are done"):
        scheduler.step(NOISE, 999, NOISE)
    with pytest.raises(TypeError, match="noise must be a seed"):
        scheduler.set_noise("seven")
    with pytest.raises(ValueError, match="noise must be a tensor"):
        scheduler.scale_noise(NOISE, 10)
    with pytest.raises(TypeError, match="did you mean solver_order"):
        ours("sd", solver_ordre=3)
    with pytest.raises(TypeError, match="config must be a scheduler's config"):
        FewstepScheduler.from_config(None)
    for other, said in [
        (diffusers.KarrasVeScheduler(), "must be that of a scheduler with betas"),
        (
            diffusers.CMStochasticIterativeScheduler(),
            "consistency model, .* CMStochasticIterativeScheduler runs it",
        ),
        (
            diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
            "prediction_type='epsilon' beside sigma_data",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            FewstepScheduler.from_config(other.config)
    with pytest.raises(ValueError, match="timestep_type='continuous'"):
        FewstepScheduler.from_config(diffusers.EulerDiscreteScheduler(timestep_type="continuous").config)
    with pytest.raises(ValueError, match="invert_sigmas"):
        FewstepScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)
    fixed = FewstepScheduler(prediction_type="flow_prediction", table=flow_table())
    with pytest.raises(ValueError, match="num_inference_steps must be 4"):
        fixed.set_timesteps(5)
    with pytest.raises(ValueError, match="beside a table"):
        fixed.set_timesteps(timesteps=[900, 100])
