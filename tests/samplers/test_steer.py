"""``steer``: any method in real pipelines, built small and offline; and off again."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from fewstep.models import load
from fewstep.models.load_diffusers import denoiser_of
from fewstep.models.pipeline import ask, network
from fewstep.samplers import (
    Blend,
    FewstepScheduler,
    Guide,
    abm,
    autoguidance,
    cfg,
    ddim,
    grids,
    minority,
    rlg,
    sample,
    steer,
)
from fewstep.samplers.adapters import adapted
from fewstep.samplers.best_of_n import best_of_n
from fewstep.samplers.dps import dps
from fewstep.samplers.smc_steering import smc_steering
from fewstep.samplers.svdd import svdd
from fewstep.samplers.tree_search import tree_search

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
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
# Their own schedulers that have an equal here; Wan's cuts the network's times to whole numbers.
OWN = {
    "ddpm": lambda: diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=2.0),
    "dit": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "wan": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@functools.cache
def shared(name):
    tiny = pipelines.build(name)
    if name in OWN:
        tiny.scheduler = OWN[name]()
    return tiny


def fresh(name="sd", **scheduler):
    return pipelines.build(name, **scheduler)


def close(a, b, bound=1e-4):
    return np.isfinite(a).all() and a.std() > 0.01 and np.abs(a - b).max() <= bound


def counting(pipe):
    """How often the network itself is called: what stands in for it counts no hooks of its submodules."""
    calls, net = [], network(pipe)
    last = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))][-1]
    return calls, last.register_forward_hook(lambda *_: calls.append(1))


# --- the trivial method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("name", PIPES)
def test_sample_changes_nothing(name, ours):
    """The decisive one: images of the plain pipeline, from the same generator, with as many forwards or fewer."""
    pipe = shared(name)
    before = pipe.scheduler
    if ours:
        pipe.scheduler = FewstepScheduler.from_config(
            before.config, solver="unipc", timestep_spacing="logsnr"
        )
    calls, hook = counting(pipe)
    try:
        plain, once = pipelines.run(name, pipe, steps=5), len(calls)
        calls.clear()
        with steer(pipe, sample) as handle:
            steered = pipelines.run(name, pipe, steps=5)
        assert close(plain, steered)
        assert len(calls) == handle.info.calls == handle.info.table.calls == 5
        assert once == (10 if name == "wan" else 5)  # Wan calls it apart for the prompt and without
        assert handle.info.scale == (
            None if name in ("ddpm", "flux") else 2.0 if name in ("dit", "wan") else 3.0
        )
        assert np.array_equal(pipelines.run(name, pipe, steps=5), plain)
    finally:
        hook.remove()
        pipe.scheduler = before


def test_all_of_a_call_is_the_pipelines_own():
    """Negative prompts, several images a prompt, rescaled guidance, latents given and taken, two generators."""
    pipe = shared("sd")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=2)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    generators = [torch.Generator().manual_seed(k) for k in (3, 4)]
    for call in (
        {"negative_prompt": ["x", "y"], "num_images_per_prompt": 2, "guidance_rescale": 0.6},
        {"latents": latents, "output_type": "latent", "guidance_scale": 1.0},
        {"generator": generators, "timesteps": None},
        {"num_inference_steps": 17, "return_dict": True},
    ):
        states = [g.get_state() for g in generators]
        plain = pipelines.run("sd", pipe, steps=4, **call)
        for g, state in zip(generators, states):
            g.set_state(state)
        with steer(pipe, sample):
            assert close(pipelines.run("sd", pipe, steps=4, **call), plain)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))  # through several calls
    plain = [pipelines.run("sd", pipe, generator=one) for _ in range(2)]
    with steer(pipe, sample):
        assert all(close(pipelines.run("sd", pipe, generator=other), image) for image in plain)
    assert torch.equal(one.get_state(), other.get_state())
    with steer(pipe, sample):
        pictures, flagged = pipe("a", num_inference_steps=2, height=16, width=16, return_dict=False)
    assert pictures[0].size == (16, 16) and flagged is None


def test_networks_in_edms_preconditioning_and_lcms():
    pipe = fresh("sd")
    for scheduler in (
        diffusers.EDMDPMSolverMultistepScheduler(),
        FewstepScheduler.from_config(diffusers.EDMEulerScheduler().config, solver="deis"),
    ):
        pipe.scheduler = scheduler
        plain = pipelines.run("sd", pipe, steps=5)
        with steer(pipe, sample) as handle:
            assert close(pipelines.run("sd", pipe, steps=5), plain)
        assert handle.info.table.path["path"] == "edm"
    parts = {**pipe.components, "unet": pipelines.text_unet(time_cond_proj_dim=8)}
    parts["scheduler"] = diffusers.LCMScheduler(**pipelines.SD_BETAS)
    lcm = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    for scheduler in (
        lcm.scheduler,
        FewstepScheduler.from_config(lcm.scheduler.config, solver="consistency"),
    ):
        lcm.scheduler = scheduler
        call = {"height": 16, "width": 16, "output_type": "np", "original_inference_steps": 20}
        made = []
        for how in ((), (sample,)):
            with steer(lcm, *how) if how else contextlib.nullcontext() as handle:
                generator = torch.Generator().manual_seed(0)
                made.append(lcm("a b", num_inference_steps=1, generator=generator, **call).images)
        assert close(*made) and handle.info.table.solver == "consistency" and handle.info.calls == 1


def test_sigmas_and_timesteps_of_a_call_are_the_tables():
    pipe = shared("sd3")
    sigmas = [1.0, 0.8, 0.4]
    plain = pipelines.run("sd3", pipe, steps=3, sigmas=sigmas)
    with steer(pipe, sample) as handle:
        assert close(pipelines.run("sd3", pipe, steps=3, sigmas=sigmas), plain)
    assert handle.info.table.t[:, 0].tolist() == pytest.approx([1.0, 0.8 * 3 / 2.6, 0.4 * 3 / 1.8])


def test_stochastic_tables_draw_from_the_calls_generator():
    pipe = fresh("ddpm")
    assert isinstance(pipe.scheduler, diffusers.DDPMScheduler)
    with steer(pipe, sample) as handle:
        first, second, again = (pipelines.run("ddpm", pipe, steps=4, seed=seed) for seed in (0, 1, 0))
        assert handle.info.table.solver == "ddpm" and handle.info.table.stochastic
        seed = handle.info.seed
    assert np.array_equal(first, again) and not np.allclose(first, second, atol=1e-2)
    with steer(pipe, sample, seed=seed):
        assert np.array_equal(pipelines.run("ddpm", pipe, steps=4), first)
    with steer(pipe, functools.partial(sample, seed=9)):
        assert not np.allclose(pipelines.run("ddpm", pipe, steps=4), first, atol=1e-3)


def test_a_schedulers_own_seed_is_the_methods():
    """Then stochastic solvers, too, make the plain pipeline's images: noise is counted, not drawn."""
    pipe = shared("flux")
    before = pipe.scheduler
    try:
        pipe.scheduler = FewstepScheduler.from_config(before.config, solver="consistency", seed=5)
        plain = pipelines.run("flux", pipe, steps=3)
        with steer(pipe, sample) as handle:
            assert close(pipelines.run("flux", pipe, steps=3), plain) and handle.info.seed == 5
        with steer(pipe, sample, seed=6):
            assert not np.allclose(pipelines.run("flux", pipe, steps=3), plain, atol=1e-2)
    finally:
        pipe.scheduler = before


# --- tables -------------------------------------------------------------------------------------------------------


def test_tables_of_ones_own():
    pipe = shared("sd")
    d = load(pipe, height=16, width=16)
    table = abm(d.path, grids.vp(d.path, 4))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    cond = d.codec.embed(["a b", "c d"])
    wanted = sample(cfg(d, 3.0), latents, table, cond=cond)  # unit noise, as it is
    for given in (table, lambda path, n: abm(path, grids.vp(path, n))):
        with steer(pipe, sample, table=given) as handle:
            got = pipelines.run("sd", pipe, steps=4, latents=latents, output_type="latent")
        assert close(got, wanted.numpy(), 1e-5) and handle.info.table.solver == "abm"
    with steer(pipe, sample, table=table, interval=(0.5, 5.0)):
        got = pipelines.run("sd", pipe, steps=4, latents=latents, output_type="latent")
    within = sample(cfg(d, 3.0, interval=(0.5, 5.0)), latents, table, cond=cond)
    assert close(got, within.numpy(), 1e-5) and not np.allclose(got, wanted.numpy(), atol=1e-3)

    with steer(pipe, sample, interval=(0.5, 5.0)), pytest.raises(ValueError, match="interval must be None"):
        pipelines.run("sd", pipe, guidance_scale=1.0)
    other = abm(load("digits-flow").path, [1.0, 0.5, 0.0])
    with steer(pipe, sample, table=other), pytest.raises(ValueError, match="path"):
        pipelines.run("sd", pipe)
    pipe = fresh("sd")
    pipe.scheduler = diffusers.SASolverScheduler.from_config(pipe.scheduler.config)
    with (
        steer(pipe, sample),
        pytest.raises(ValueError, match="SASolverScheduler has no equal here: give a table"),
    ):
        pipelines.run("sd", pipe)
    pipe.scheduler = diffusers.PNDMScheduler(**pipelines.SD_BETAS, skip_prk_steps=True, steps_offset=1)
    plain = pipelines.run("sd", pipe)  # as Stable Diffusion 1.5 comes
    with steer(pipe, sample) as handle:
        assert close(pipelines.run("sd", pipe), plain) and handle.info.calls == 5


# --- guidance -----------------------------------------------------------------------------------------------------


@functools.cache
def with_adapter():
    peft = pytest.importorskip("peft")
    pipe = fresh("sd")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="preferred")
    return pipe


def test_rl_guidance_of_a_lora_is_the_single_models_at_0_and_1():
    pipe = with_adapter()
    trainable = [p.requires_grad for p in pipe.unet.parameters()]
    switches = [
        (m._disable_adapters, m._active_adapter)
        for m in pipe.unet.modules()
        if hasattr(m, "_disable_adapters")
    ]
    made = {}
    for scale in (0.0, 1.0, 1.6):
        with steer(pipe, rlg("preferred", scale=scale)) as handle:
            made[scale] = pipelines.run("sd", pipe)
        assert handle.info.calls == (8 if scale == 1.6 else 4)
    for scale, adapter in ((0.0, None), (1.0, "preferred")):
        with steer(pipe, Guide(lambda d, adapter=adapter: adapted(d, adapter))):
            assert np.array_equal(pipelines.run("sd", pipe), made[scale])  # bit for bit
    pipe.unet.disable_adapters()
    assert close(pipelines.run("sd", pipe), made[0.0])
    pipe.unet.enable_adapters()
    assert close(pipelines.run("sd", pipe), made[1.0])
    assert min(np.abs(made[a] - made[b]).max() for a, b in ((0.0, 1.0), (1.0, 1.6))) > 1e-3
    assert trainable == [p.requires_grad for p in pipe.unet.parameters()]
    after = [
        (m._disable_adapters, m._active_adapter)
        for m in pipe.unet.modules()
        if hasattr(m, "_disable_adapters")
    ]
    assert after == switches


def test_guidances_are_those_of_the_denoiser():
    """Each, and several at once, beside the same put together by hand."""
    pipe = with_adapter()
    asked = ask(pipe, ["a b", "c d"], height=16, width=16, guidance_scale=3.0)
    d = denoiser_of(pipe, asked)
    weak = denoiser_of(shared("sd"), asked)
    table = ddim(d.path, grids.trailing(d.path, 4))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    cond = {**asked.cond, "null": asked.null}

    def classifier(x, t):
        return torch.stack([-x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1) / 50

    def guided(inner, outer=lambda d: d):
        return outer(cfg(inner, 3.0, null=asked.null))

    def bright(outer):
        return minority(outer, classifier, 2.0)

    cases = [
        ((rlg("preferred", scale=1.6),), guided(rlg(d, "preferred", 1.6))),
        ((rlg(tuned=weak, scale=0.5),), guided(rlg(d, weak, 0.5))),
        ((autoguidance(bad=weak, scale=2.0),), guided(autoguidance(d, weak, 2.0))),
        ((minority(classifier=classifier, scale=2.0),), guided(d, bright)),
        ((Guide(lambda d: Blend((weak, d), (0.3, 0.7))),), guided(Blend((weak, d), (0.3, 0.7)))),
        ((minority(classifier=classifier, scale=2.0), rlg("preferred", scale=1.6), sample),
         guided(rlg(d, "preferred", 1.6), bright)),
    ]  # fmt: skip
    seen = []
    for how, by_hand in cases:
        with steer(pipe, *how, table=table):
            got = pipelines.run("sd", pipe, latents=latents, output_type="latent")
        assert close(got, sample(by_hand, latents, table, cond=cond).numpy(), 2e-4), how
        seen.append(got)
    assert min(np.abs(a - b).max() for k, a in enumerate(seen) for b in seen[:k]) > 1e-3


# --- methods ------------------------------------------------------------------------------------------------------


def test_a_method_gets_what_sample_gets_and_its_info_is_kept():
    pipe, seen = shared("sd"), {}

    def method(d, noise, table, *, cond=None, seed=0, tries=1):
        seen.update(d=d, noise=noise, table=table, cond=cond, seed=seed, tries=tries)
        x = sample(d, noise, table, cond=cond, seed=seed)
        images = d.codec.decode(x)
        return -x, {"shape": tuple(images.shape)}

    with steer(pipe, functools.partial(method, tries=3), seed=11) as handle:
        mirrored = pipelines.run("sd", pipe, output_type="latent")
    with steer(pipe, sample):
        assert np.array_equal(pipelines.run("sd", pipe, output_type="latent"), -mirrored)
    assert handle.info.info == {"shape": (2, 3, 16, 16)} and handle.info.seed == seen["seed"] == 11
    assert seen["tries"] == 3 and seen["noise"].dtype == torch.float32
    assert set(seen["cond"]) == {"encoder_hidden_states", "null"} and len(seen["cond"].repeat(2).cond) == 1
    assert len(seen["d"].parts()) == 2 and seen["d"].path.name == "vp_discrete"

    for wrong, said in [
        (lambda d, noise, table, **_: noise[:1], r"\(1, 4, 8, 8\)"),
        (lambda *_, **__: None, "NoneType"),
    ]:
        with steer(pipe, wrong), pytest.raises(ValueError, match=f"one sample a row of noise.*{said}"):
            pipelines.run("sd", pipe)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_methods_of_control_run_in_pipelines(name):
    """Each in the pipeline's latents, packed or not, with rewards of decoded images."""
    pipe = shared(name)

    def reward(images):
        return images.flatten(1).mean(1)

    def noisy(path, n):
        return ddim(path, grids.uniform(path, n), eta=0.7)

    with steer(pipe, sample, table=noisy):
        plain = pipelines.run(name, pipe, steps=3)
    for method, options in [
        (best_of_n, {"n": 8}), (svdd, {"width": 2}), (smc_steering, {"particles": 3, "scale": 20.0}),
        (tree_search, {"budget": 30}), (dps, {"scale": 300.0}),
    ]:  # fmt: skip
        with steer(pipe, functools.partial(method, reward=reward, **options), table=noisy) as handle:
            made = pipelines.run(name, pipe, steps=3)
        assert made.shape == plain.shape and np.isfinite(made).all() and handle.info.info is not None
        gain = (made - plain).mean((1, 2, 3))
        if method in (best_of_n, dps):  # the plain one is among the candidates; a gradient step is a step up
            assert (gain > -1e-6).all() and gain.max() > 1e-4, (method, gain)
    assert all(p.grad is None for p in network(pipe).parameters())


def test_pipelines_may_be_asked_loaded_and_moved_while_they_are_steered():
    pipe = fresh("sd")
    plain = pipelines.run("sd", pipe)
    with steer(pipe, sample) as handle:
        d = load(pipe, height=16, width=16)
        assert d.codec.embed("a b")["encoder_hidden_states"].shape[0] == 1 and handle.info is None
        pipe.to(torch.bfloat16)
        assert np.abs(pipelines.run("sd", pipe) - plain).max() < 0.2
        pipe.to(torch.float32)
        pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config)
        pipelines.run("sd", pipe)
        assert handle.info.table.solver == "abm"
    assert isinstance(pipe.scheduler, FewstepScheduler) and not close(pipelines.run("sd", pipe), plain)


# --- on and off ---------------------------------------------------------------------------------------------------


def everything(pipe):
    """Who is who in a pipeline, its class and its networks' own attributes."""
    parts = {name: id(value) for name, value in pipe.__dict__.items() if not name.startswith("_num")}
    for name in (
        "_guidance_scale",
        "_guidance_rescale",
        "_clip_skip",
        "_cross_attention_kwargs",
        "_interrupt",
    ):
        parts.pop(name, None)
    inner = {
        name: dict(part.__dict__) for name, part in pipe.components.items() if hasattr(part, "parameters")
    }
    weights = {
        name: [id(p) for p in part.parameters()] for name, part in pipe.components.items() if name in inner
    }
    return type(pipe), parts, inner, weights, dict(pipe.config)


class Stop(Exception):
    pass


def test_undo_leaves_every_object_as_it_was():
    pipe = fresh("sd")
    pipelines.run("sd", pipe)
    before, scheduler = everything(pipe), pipe.scheduler

    def stops(d, noise, table, **_):
        d(noise, 5.0, **_["cond"])
        raise Stop

    handle = steer(pipe, sample)
    assert type(pipe).__name__ == "StableDiffusionPipeline" and isinstance(
        pipe, diffusers.StableDiffusionPipeline
    )
    assert pipe.scheduler is scheduler and "forward" not in pipe.unet.__dict__
    pipelines.run("sd", pipe)
    handle.undo()
    handle.undo()
    assert everything(pipe) == before
    with pytest.raises(Stop), steer(pipe, stops):
        pipelines.run("sd", pipe)
    assert everything(pipe) == before
    with steer(pipe, sample):  # an error of the pipeline's own
        with pytest.raises(ValueError):
            pipe(prompt=3)
        assert pipe.scheduler is scheduler and "forward" not in pipe.unet.__dict__
        assert np.isfinite(pipelines.run("sd", pipe)).all()
    assert everything(pipe) == before


def test_a_steered_pipeline_is_saved_as_itself(tmp_path):
    pipe = fresh("ddpm")
    with steer(pipe, sample, seed=0):
        pipe.save_pretrained(tmp_path)
    assert '"DDPMPipeline"' in (tmp_path / "model_index.json").read_text()
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is diffusers.DDPMPipeline


def test_no_steering_on_top_of_steering():
    pipe = fresh("ddpm")
    with steer(pipe, sample):
        with pytest.raises(ValueError, match="steered already: undo"):
            steer(pipe, sample)
    steer(pipe, sample).undo()
    other = fresh("ddpm")
    with steer(pipe, sample), steer(other, sample):  # two pipelines are two
        assert type(pipe) is not type(other)


def test_bad_arguments_are_named():
    pipe, d = shared("sd"), load("digits")
    for wrong, said in [
        ((d,), "at most one method of sampling"),
        ((sample, sample), "at most one method"),
        ((), "got nothing"),
        (("rlg",), "got str"),
        ((rlg(d, d, 1.0),), "got Blend"),
    ]:
        with pytest.raises(TypeError, match=said):
            steer(pipe, *wrong)
    for thing in (d, object(), pipe.unet):
        with pytest.raises(TypeError, match="pipe must be a diffusers pipeline"):
            steer(thing, sample)
    with pytest.raises(TypeError, match="table must be a Table or a function"):
        steer(pipe, sample, table="ddim")
    parts = {**pipe.components, "feature_extractor": None, "safety_checker": None}
    editing = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="begins with an image. FewstepScheduler"):
        steer(editing, sample)
    assert type(pipe) is diffusers.StableDiffusionPipeline and type(editing).__call__ is not None

    with steer(pipe, sample):
        for name, value in [("callback_on_step_end", lambda *_: {}), ("eta", 0.5)]:
            with pytest.raises(ValueError, match=f"{name} is of no use to a steered pipeline"):
                pipelines.run("sd", pipe, **{name: value})
        pipelines.run("sd", pipe, eta=0.0, callback_on_step_end=None, steps=1)
    with steer(pipe, Guide(lambda d: None)), pytest.raises(TypeError, match="made a NoneType"):
        pipelines.run("sd", pipe)


def test_guides_are_checked_when_they_are_made():
    d = load("digits")
    for make, said in [
        (lambda: rlg("adapter", scale=None), "scale must be a finite number"),
        (lambda: rlg("adapter"), "scale must be a finite number"),
        (lambda: rlg(d, scale=1.0), "tuned must be a Denoiser or the name of an adapter"),
        (lambda: rlg(3, d, 1.0), "base must be a Denoiser"),
        (lambda: autoguidance(scale=1.0), "bad must be a Denoiser"),
        (lambda: minority(scale=1.0), "classifier must be a function"),
        (lambda: Guide(3), "make must be a function"),
        (lambda: Guide(lambda d: d, around="images"), "around must be"),
    ]:
        with pytest.raises((TypeError, ValueError), match=said):
            make()
