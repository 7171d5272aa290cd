"""Pipelines as denoisers: the same images as the pipeline's own loop, and errors that name what is wrong."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from diffusers.pipelines.wan import pipeline_wan
from PIL import Image

from fewstep import cli
from fewstep.models import Codec, Condition, Denoiser, decode, encode, in_blocks, load
from fewstep.models.pipeline import ask, intercepted, network
from fewstep.models.scheduler_meaning import scheduler_meaning
from fewstep.samplers import FewstepScheduler, cfg, ddim, euler, grids, rlg, sample, search, starting_noise

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
]
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def _load_pipelines():
    file = Path(__file__).parents[1] / "samplers/pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pipelines = _load_pipelines()
NAMES = tuple(pipelines.BUILDERS)
TEXT = ("sd", "sdxl", "sd3", "flux", "wan")
SCALE, PROMPTS, NEGATIVE = 3.0, ["a b", "c d"], "e f"


@pytest.fixture(autouse=True)
def words_as_they_are(monkeypatch):
    """Wan mends its prompts with ftfy, without which some versions of diffusers do not embed any."""
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)


def size_of(name):
    size = {"height": pipelines.PIXELS, "width": pipelines.PIXELS} if name in TEXT else {}
    return {**size, "frames": 5} if name == "wan" else size


def length_of(name):
    return {"max_sequence_length": pipelines.LENGTH} if name in pipelines.FLOWS else {}


@functools.cache
def pipe_of(name):
    return pipelines.build(name)


@functools.cache
def loaded(name):
    return load(pipe_of(name), **size_of(name))


def with_scheduler(name, scheduler):
    """The same networks under another scheduler."""
    twin = copy.copy(pipe_of(name))
    object.__setattr__(twin, "scheduler", scheduler)
    return twin


def condition(name, d, negative=NEGATIVE):
    if name == "ddpm":
        return None
    if name == "dit":
        return {"label": torch.tensor([3, 7])}
    distilled = {"guidance_scale": 2.5} if name == "flux" else {}
    return d.codec.embed(PROMPTS, negative=negative, **distilled, **length_of(name))


def noise_of(d):
    return torch.randn(2, *d.shape, generator=torch.Generator().manual_seed(0))


def pipeline_images(name, pipe, noise, steps, negative=NEGATIVE, output="pt"):
    """What the pipeline makes of this noise, as (B, C, ..) in [0, 1]; or as its loop leaves it."""
    call = {"num_inference_steps": steps, "output_type": output}
    if name in ("ddpm", "dit"):  # these draw their noise themselves
        call |= {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
        call |= {"batch_size": 2} if name == "ddpm" else {"class_labels": [3, 7], "guidance_scale": SCALE}
    else:
        size = {"num_frames" if key == "frames" else key: value for key, value in size_of(name).items()}
        call |= {"prompt": PROMPTS, "latents": noise, "guidance_scale": SCALE, **size, **length_of(name)}
        call |= {"negative_prompt": [negative] * 2} if negative else {}
        if name == "flux":
            call |= {"guidance_scale": 2.5, "true_cfg_scale": SCALE}
    result = pipe(**call)
    if name in ("ddpm", "dit"):
        return torch.as_tensor(result.images).permute(0, 3, 1, 2)
    if output == "latent":
        return result[0]
    return result.frames.transpose(1, 2) if name == "wan" else result.images


def our_images(name, d, noise, table, cond, scale=SCALE, output="pt"):
    x = sample(d if name == "ddpm" else cfg(d, scale), noise, table, cond=cond)
    return x if output == "latent" else decode(d, x).clamp(-1, 1) / 2 + 0.5


# --- the same as the pipeline's loop ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_the_pipeline_with_our_scheduler(name):
    """Latents, where the pipeline gives them away."""
    grid = {"timestep_spacing": "logsnr"} if name in pipelines.FLOWS else {"timestep_spacing": "karras"}
    scheduler = FewstepScheduler.from_config(pipe_of(name).scheduler.config, solver="deis", **grid)
    noise, output = noise_of(loaded(name)), "latent" if name in TEXT else "pt"
    wanted = pipeline_images(name, with_scheduler(name, scheduler), noise, 4, output=output)
    d = load(with_scheduler(name, scheduler), **size_of(name))  # its config is read like any other's
    unit = noise / d.path.sigma(float(scheduler._table.times[0]))  # the pipeline's first sample is not scaled
    cond = condition(name, d)
    found = our_images(name, d, unit, scheduler._table, cond, output=output)
    assert found.shape == wanted.shape and wanted.std() > 0.05
    close = 1e-5 * max(
        1.0, float(wanted.abs().max())
    )  # Wan's latents reach 13, where float32 is as much coarser
    assert (found - wanted).abs().max() <= close
    again = our_images(name, loaded(name), unit, scheduler._table, cond, output=output)
    assert (again - wanted).abs().max() <= close  # as read from the scheduler that it was built with
    if name != "ddpm":
        for other in (0.0, 1.0):  # so the scale, and which of the branches is the null, matters
            far = our_images(name, d, unit, scheduler._table, cond, other, output)
            assert (far - wanted).abs().max() > 1e-3


THEIRS = [
    ("dit", "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, ddim, grids.trailing),
    ("sd", "DDIMScheduler", {"timestep_spacing": "trailing"}, ddim, grids.trailing),
    ("sdxl", "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, ddim, grids.trailing),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {}, euler, None),
    ("flux", "FlowMatchEulerDiscreteScheduler", {}, euler, grids.shifted),  # by the mu of this size
    ("wan", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, euler, None),
]  # fmt: skip


@pytest.mark.parametrize("name, theirs, config, solver, grid", THEIRS)
def test_images_are_those_of_the_same_solver_in_diffusers(name, theirs, config, solver, grid):
    """With no negative prompt: the null is the pipeline's own (of SDXL zeros)."""
    negative = NEGATIVE if name == "flux" else ""
    scheduler = getattr(diffusers, theirs).from_config(pipe_of(name).scheduler.config, **config)
    d = load(with_scheduler(name, scheduler), **size_of(name))
    noise = noise_of(d)
    wanted = pipeline_images(name, with_scheduler(name, scheduler), noise, 5, negative)
    times = grid(d.path, 5) if grid else grids.explicit(d.path, sigmas=scheduler.sigmas[:-1].double().numpy())
    table = solver(d.path, times)
    unit = noise / d.path.sigma(float(table.times[0]))
    found = our_images(name, d, unit, table, condition(name, d, negative))
    assert (found - wanted).abs().max() <= 1e-4


def test_a_time_for_every_token():
    """As Wan's 5B wants it."""
    pipe = copy.copy(pipe_of("wan"))
    pipe._internal_dict = {**pipe.config}
    pipe.register_to_config(expand_timesteps=True)
    object.__setattr__(pipe, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    d = load(pipe, **size_of("wan"))
    noise = noise_of(d)
    wanted = pipeline_images("wan", pipe, noise, 3)
    sigmas = pipe.scheduler.sigmas[:-1].double().numpy()
    table = euler(d.path, grids.explicit(d.path, sigmas=sigmas))
    assert ask(pipe, "a", height=16, width=16, num_frames=5).tau_shape == (2,)
    assert (our_images("wan", d, noise, table, condition("wan", d)) - wanted).abs().max() <= 1e-5
    assert not pipe_of("wan").config.get("expand_timesteps")


def test_a_network_that_is_told_its_guidance():
    """A latent consistency model: one step is its estimate of x0 at the last index."""
    parts = pipe_of("sd").components | {"unet": pipelines.text_unet(time_cond_proj_dim=16)}
    lcm = diffusers.LatentConsistencyModelPipeline(
        **{**parts, "scheduler": diffusers.LCMScheduler(**pipelines.SD_BETAS)}, requires_safety_checker=False
    )
    lcm.set_progress_bar_config(disable=True)
    d = load(lcm, **size_of("sd"))
    noise, table = noise_of(d), ddim(d.path, grids.explicit(d.path, [999.0]))
    call = {"num_inference_steps": 1, "height": 16, "width": 16, "latents": noise, "output_type": "latent"}
    wanted = [lcm(PROMPTS, guidance_scale=scale, **call).images for scale in (8.5, 2.0)]
    told = d.codec.embed(PROMPTS), d.codec.embed(PROMPTS, guidance_scale=2.0)
    for latents, cond in zip(wanted, told):
        x = sample(d, noise / d.path.sigma(999.0), table, cond=cond)
        assert (x - latents).abs().max() < 1e-4 * latents.abs().max()
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    assert d.codec.distilled and d.codec.guidance == 8.5 and told[0].null is None


def test_a_live_network_of_pixels_under_an_edm_scheduler(tmp_path):
    pipe = diffusers.DDPMPipeline(pipe_of("ddpm").unet, diffusers.EDMEulerScheduler(sigma_data=0.7))
    pipe.save_pretrained(tmp_path)
    live, ours = load(pipe), load(tmp_path)  # diffusers' network, and our own with its weights
    x, sigma = 3 * noise_of(live), torch.tensor([2.5, 0.1])
    assert live.codec is None and live.path == ours.path and live.precond == "edm" and live.sigma_data == 0.7
    assert (live(x, sigma) - ours(x, sigma)).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_loaded_as_the_pipeline_is(name, tmp_path):
    pipe_of(name).save_pretrained(tmp_path)
    d, live = load(tmp_path, **size_of(name)), loaded(name)
    assert d.shape == live.shape and d.path == live.path and d.predicts == live.predicts
    assert not any(p.requires_grad for p in d.net.parameters())
    cond = condition(name, d) or {}
    x, t = noise_of(d), 0.6 * d.path.t_max
    assert (d(x, t, **cond) - live(x, t, **(condition(name, live) or {}))).abs().max() <= 1e-5
    images = decode(d, x)
    assert (images - decode(live, x)).abs().max() <= 1e-5 and images.dtype == torch.float32
    latents = encode(d, images)
    assert latents.shape == x.shape and (latents - encode(live, images)).abs().max() <= 1e-4


# --- what a pipeline says when it is asked ------------------------------------------------------------------


def test_guidance_is_read_off():
    asked = ask(pipe_of("sd"), "a", guidance_scale=4.7, guidance_rescale=0.3, height=16, width=16)
    assert (asked.scale, asked.rescale, asked.clock, asked.channels) == (4.7, 0.3, "t", 4)
    positive = ask(pipe_of("sd"), "a", guidance_scale=1.0, height=16, width=16)
    assert positive.null is None and positive.scale == 1
    assert torch.equal(asked.cond["encoder_hidden_states"], positive.cond["encoder_hidden_states"])
    empty = ask(pipe_of("sd"), "", guidance_scale=1.0, height=16, width=16)
    assert torch.equal(asked.null["encoder_hidden_states"], empty.cond["encoder_hidden_states"])


def test_the_null_is_found_first_last_and_apart():
    dit = ask(pipe_of("dit"), [5, 6], guidance_scale=2.5)  # in the second half
    assert dit.cond["class_labels"].tolist() == [5, 6] and dit.null["class_labels"].tolist() == [1000, 1000]
    assert dit.channels == 8 and dit.noise.shape == (2, 4, 8, 8)
    embeds = torch.randn(2, pipelines.LENGTH, pipelines.WIDTH)
    wan = ask(  # in a call of its own
        pipe_of("wan"), prompt_embeds=embeds, negative_prompt_embeds=2 * embeds, guidance_scale=3.5,
        height=16, width=16, num_frames=5,
    )  # fmt: skip
    assert torch.equal(wan.cond["encoder_hidden_states"], embeds) and wan.scale == 3.5
    assert torch.equal(wan.null["encoder_hidden_states"], 2 * embeds)


def test_flux_counts_time_from_0_to_1_and_places_its_tokens():
    asked = ask(pipe_of("flux"), PROMPTS, height=16, width=32, max_sequence_length=pipelines.LENGTH)
    assert asked.clock == "t / T" and asked.shared == {"img_ids", "txt_ids"} and asked.null is None
    assert asked.cond["guidance"].tolist() == [3.5, 3.5] and asked.cond["img_ids"].shape == (1, 32, 3)
    assert asked.schedule["mu"] > 0 and asked.noise.shape == (2, 32, 16)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_all_is_as_it_was_whatever_happens(name, monkeypatch):
    pipe = pipe_of(name)
    ask(pipe, "a", height=16, width=16)  # diffusers' own hooks are there after a first call
    net, scheduler, config = network(pipe), pipe.scheduler, dict(pipe.config)
    kept, bar = dict(net.__dict__), dict(pipe._progress_bar_config)

    def fails(asked):
        assert "forward" not in net.__dict__  # the network itself
        raise KeyError("in the middle")

    with pytest.raises(KeyError), intercepted(pipe, fails):
        pipe("a", height=16, width=16)
    with pytest.raises(ValueError, match="prompt"):
        ask(pipe, 3)
    net.forward = held = type(net).forward.__get__(net)  # as offloading leaves it, and torch.compile in place
    net._compiled_call_impl = compiled = lambda *_, **__: pytest.fail("a stand-in is not compiled")
    try:
        load(pipe, height=16, width=16)
        assert net.forward is held and net._compiled_call_impl is compiled
    finally:
        del net.forward, net._compiled_call_impl
    assert net.__dict__ == kept and pipe.scheduler is scheduler and dict(pipe.config) == config
    assert pipe._progress_bar_config == bar


def test_inside_the_block_a_call_is_one_step_and_its_result_is_ours():
    pipe, seen = pipe_of("dit"), []

    def step(asked):
        seen.append(asked)
        return torch.zeros_like(asked.noise)

    with intercepted(pipe, step):
        one = pipe([1, 2], num_inference_steps=30, output_type="pt").images
        two = pipe([3], num_inference_steps=7, output_type="pt").images
    blank = pipe.vae.decode(torch.zeros(1, 4, 8, 8)).sample / 2 + 0.5
    assert torch.allclose(one, blank.clamp(0, 1).expand(2, -1, -1, -1), atol=1e-5) and len(two) == 1
    assert [asked.schedule["num_inference_steps"] for asked in seen] == [30, 7]


def test_a_pipeline_that_does_otherwise_is_refused(monkeypatch):
    pipe = pipe_of("sd")
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "guidance_scale", property(lambda self: torch.tensor(float("nan"))))
        with pytest.raises(ValueError, match="infinities or NaN"):
            ask(pipe, "a", height=16, width=16)
        patch.setattr(type(pipe), "guidance_scale", property(lambda self: torch.randn(1, 4, 8, 8)))
        with pytest.raises(ValueError, match="weighted sum"):
            ask(pipe, "a", height=16, width=16)
    inpaint = diffusers.StableDiffusionInpaintPipeline(
        **{**pipe.components, "unet": pipelines.text_unet(in_channels=9)}, requires_safety_checker=False
    )
    inpaint.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (16, 16))
    with pytest.raises(ValueError, match="the latents and nothing beside them"):
        ask(inpaint, "a", image=picture, mask_image=picture, height=16, width=16, num_inference_steps=4)


# --- what a scheduler's config says -------------------------------------------------------------------------


def test_a_flow_is_known_by_its_keys_and_shifted_as_it_says():
    wan = scheduler_meaning(pipe_of("wan").scheduler.config)
    assert wan["predicts"] == "flow" and wan["path"].shift == 3.0 and wan["time"](0.25) == 250
    assert load(pipe_of("flux"), height=16, width=16).path.shift == pytest.approx(np.exp(0.459375), 1e-6)
    with pytest.raises(ValueError, match="mu must be given"):
        scheduler_meaning({"shift": 3.0, "use_dynamic_shifting": True})
    with pytest.raises(ValueError, match="invert_sigmas"):
        scheduler_meaning({"shift": 3.0, "invert_sigmas": True})
    ours = FewstepScheduler.from_config(pipe_of("wan").scheduler.config)
    assert scheduler_meaning(ours.config)["path"] == wan["path"]


def test_a_folder_with_our_scheduler_is_loaded_where_nobody_imported_it(tmp_path, monkeypatch):
    """diffusers imports no module because a folder names it."""
    scheduler = FewstepScheduler.from_config(pipe_of("sd3").scheduler.config)
    with_scheduler("sd3", scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["fewstep.samplers.scheduler", "FewstepScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.delitem(sys.modules, "fewstep.samplers.scheduler")
    d = load(tmp_path, **size_of("sd3"))
    assert d.path == loaded("sd3").path and d.predicts == "flow"


def test_dtypes_and_variants(tmp_path):
    pipe_of("sd").save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="does not load from safetensors"):
        load(tmp_path, **size_of("sd"))
    d = load(tmp_path, dtype=torch.bfloat16, variant="fp16", **size_of("sd"))
    assert d.dtype == torch.bfloat16 and d.codec.vae.dtype == torch.bfloat16
    cond = d.codec.embed("a b")
    x = sample(cfg(d, 2.0), noise_of(d), ddim(d.path, grids.trailing(d.path, 2)), cond=cond)
    wanted = sample(
        cfg(loaded("sd"), 2.0), noise_of(d), ddim(d.path, grids.trailing(d.path, 2)),
        cond=loaded("sd").codec.embed("a b"),
    )  # fmt: skip
    assert x.dtype == torch.float32 and decode(d, x).dtype == torch.float32
    assert 1e-4 < (x - wanted).abs().max() < 0.1 * wanted.abs().max()  # 8 bits of mantissa
    for param in loaded("sd").net.parameters():
        assert param.dtype == torch.float32


# --- conditions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan"])
def test_guidance_in_one_batch_is_guidance_in_two(name):
    d = loaded(name)
    cond, x, t = condition(name, d), noise_of(d), 0.5 * d.path.t_max
    one, two = (cfg(d, SCALE, forwards=forwards)(x, t, **cond) for forwards in ("one", "two"))
    assert (one - two).abs().max() < 1e-5
    without, with_ = (part(x, t, **cond) for part in cfg(d, SCALE).parts())
    assert (with_ - without).abs().max() > 1e-3  # and both are seen by who asks for the parts
    assert ((1 - SCALE) * without + SCALE * with_ - two).abs().max() < 1e-5
    single = d.codec.embed(PROMPTS[0], negative=NEGATIVE, **length_of(name))  # one row for all samples
    wide = cfg(d, SCALE)(x, t, **single)
    assert (wide - cfg(d, SCALE)(x, t, **single.repeat(2))).abs().max() < 1e-6
    assert (in_blocks(d, 1)(x, t, **cond) - d(x, t, **cond)).abs().max() < 1e-5


def test_guidance_nests_with_conditions_that_carry_their_null():
    d = loaded("sd")
    cond, x = condition("sd", d), noise_of(d)
    shifted = Denoiser(
        lambda y, tau, **c: d.call(y, tau, **c) * 1.1, d.path, d.predicts, net=d.net, codec=d.codec
    )
    both = cfg(rlg(d, shifted, 2.0), 3.0)(x, 500.0, **cond)
    apart = rlg(cfg(d, 3.0), cfg(shifted, 3.0), 2.0)(x, 500.0, **cond)
    assert (both - apart).abs().max() < 1e-4
    inner = cfg(cfg(d, 1.5), 2.0)(x, 500.0, **cond)  # the outer null goes to both branches of the inner
    without, with_ = (part(x, 500.0, **cond) for part in cfg(d, 1.0).parts())
    assert (inner - (without + 3.0 * (with_ - without))).abs().max() < 1e-4


def test_rows_follow_their_samples():
    cond = Condition({"a": torch.arange(3), "b": {"c": torch.arange(6).reshape(3, 2)}}, {"a": torch.zeros(3)})
    assert cond.repeat(2)["a"].tolist() == [0, 0, 1, 1, 2, 2]
    assert cond.take([2, 0])["b"]["c"].tolist() == [[4, 5], [0, 1]] and cond.take([2, 0]).null["a"].shape == (
        2,
    )
    assert list(cond) == ["a", "b", "null"] and list(Condition({"a": 1})) == ["a"]
    d = loaded("sd")
    three = d.codec.embed(["a", "b", "c"])
    with pytest.raises(ValueError, match="3 rows and the batch 2 samples"):
        d(noise_of(d), 500.0, **three)
    assert torch.equal(three.take([1])["encoder_hidden_states"], three["encoder_hidden_states"][1:2])


def test_what_the_autoencoder_says_of_its_latents_is_undone():
    class Linear(torch.nn.Module):
        def __init__(self, **config):
            super().__init__()
            self.weight, self.config = torch.nn.Parameter(torch.ones(1)), SimpleNamespace(**config)

        def encode(self, x, return_dict):
            return (SimpleNamespace(mode=lambda: self.weight * x),)

        def decode(self, z, return_dict):
            return (self.weight * z,)

    images = torch.randn(3, 4, 8, 12)
    plain = Codec(Linear(scaling_factor=0.5, shift_factor=0.25))
    assert torch.allclose(plain.encode(images), (images - 0.25) * 0.5)
    moments = Codec(Linear(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0]))
    assert torch.allclose(moments.encode(images)[:, 2], (images[:, 2] - 3.0) / 2.0)
    video = images[:, :, None].expand(-1, -1, 5, -1, -1)
    packed = Codec(Linear(scaling_factor=2.0), grid=(4, 6), batch=2)
    assert packed.encode(images).shape == (3, 24, 16)
    theirs = diffusers.FluxPipeline._pack_latents(2 * images, 3, 4, 8, 12)
    assert torch.allclose(packed.encode(images), theirs)
    for codec, x in (
        (plain, images),
        (moments, images),
        (moments, video),
        (packed, images),
        (Codec(), images),
    ):
        assert torch.allclose(codec.decode(codec.encode(x)), x, atol=1e-6)
    wanted = images.clone().requires_grad_()
    assert plain.decode(wanted).requires_grad and not plain.decode(images).requires_grad
    with pytest.raises(ValueError, match="24, 4 x channels"):
        packed.decode(torch.zeros(1, 23, 16))
    half = Codec(Linear(force_upcast=True).half())
    assert torch.equal(half.decode(images), images) and half.vae.weight.dtype == torch.float16


def test_search_runs_on_a_pipeline():
    d = loaded("sd3")
    cond, guided = condition("sd3", d), cfg(d, SCALE)
    table = search(guided, 2, budget=420, batch=2, reference=20, cond=cond)
    assert table.calls == 2 and sample(guided, noise_of(d), table, cond=cond).isfinite().all()


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run, said",
    [
        (lambda: loaded("sd")(noise_of(loaded("sd")), 500.0), "cond must hold encoder_hidden_states: d.codec.embed"),
        (lambda: loaded("dit")(noise_of(loaded("dit")), 500.0), "cond must hold 'label'"),
        (lambda: loaded("dit").codec.embed("a"), "takes no text; cond={'label'"),
        (lambda: loaded("sd").codec.embed(None), "prompt must be a text"),
        (lambda: loaded("sd").codec.embed(["a", 3]), "prompt must be a text"),
        (lambda: loaded("sd").codec.embed("a", height=32), "chosen when the model is loaded: load\\(.., height"),
        (lambda: loaded("sd").codec.embed("a", strength=0.5), "has no option 'strength'"),
        (lambda: cfg(loaded("sd"), 2.0)(noise_of(loaded("sd")), 5.0, **loaded("sd").codec.embed("a", None)),
         "cond must hold null"),
        (lambda: cfg(loaded("flux"), 2.0)(noise_of(loaded("flux")), 0.5, **condition("flux", loaded("flux"), "")),
         "distilled .Flux. want no cfg"),
        (lambda: loaded("sd")(noise_of(loaded("sd")), 5.0, **loaded("sd").codec.embed("a"), label=torch.zeros(2)),
         "holds label, which this UNet2DConditionModel does not take"),
        (lambda: load(pipe_of("dit"), height=16), "height cannot be chosen"),
        (lambda: load(pipe_of("sd"), variant="fp16"), "variant is of files"),
        (lambda: load("digits", frames=5), "frames is for folders and pipelines"),
        (lambda: load(torch.nn.Linear(2, 2)), "a name, a path or a diffusers pipeline"),
        (lambda: load(with_scheduler("sd", diffusers.KarrasVeScheduler()), height=16, width=16), "KarrasVeScheduler"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(run, said):
    with pytest.raises((ValueError, TypeError), match=said):
        run()


def test_folders_that_cannot_be_loaded_are_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(ValueError, match="NoSuchPipeline with no unet.*what can be loaded"):
        load(tmp_path)
    pipe = copy.copy(pipe_of("sd"))
    object.__setattr__(pipe, "text_encoder", None)
    with pytest.raises(ValueError, match="cannot embed a prompt: it has no text_encoder"):
        load(pipe, **size_of("sd"))
    two = copy.copy(pipe_of("wan"))
    object.__setattr__(two, "transformer_2", two.transformer)
    with pytest.raises(ValueError, match="must have one network"):
        load(two)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(pipeline_wan, "prompt_clean", lambda text: ftfy.fix_text(text))  # noqa: F821
    with pytest.raises(ImportError, match="pip install ftfy"):
        load(pipe_of("wan"), **size_of("wan"))


# --- from the shell -----------------------------------------------------------------------------------------


def run(*words, capsys):
    code = cli.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err.strip().rpartition("\n")[2]


def test_prompts_from_the_shell(tmp_path, capsys):
    folder = tmp_path / "sdxl"
    pipe_of("sdxl").save_pretrained(folder)
    words = ["sample", folder, "--prompt", "a b", "--prompt", "c d", "--negative", "e", "--guidance", 3, "--height", 16,
             "--width", 16, "--steps", 3, "--solver", "ddim", "--grid", "trailing", "--num", 3, "--out"]  # fmt: skip
    assert run(*words, tmp_path / "a.npz", capsys=capsys)[0] == 0
    assert run(*words, tmp_path / "b.npz", "--batch", 2, capsys=capsys)[0] == 0
    found, again = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert np.array_equal(found, again)
    d = loaded("sdxl")
    cond = d.codec.embed(["a b", "c d"], "e").take([0, 1, 0])
    table = ddim(d.path, grids.trailing(d.path, 3))
    x = sample(cfg(d, 3.0), starting_noise(0, 3, d.shape), table, cond=cond)
    wanted = (decode(d, x).clamp(-1, 1) + 1) * 127.5
    assert np.abs(wanted.permute(0, 2, 3, 1).numpy() - found).max() < 1  # rounded
    for more, said in (
        (["--prompt", "a", "--negative", "b", "--guidance", 1], "--negative needs a --guidance"),
        ([], "--prompt is needed"),
        (["--prompt", "a", "--label", 3], "takes no --label"),
        (["--prompt", "a", "--frames", 3], "frames cannot be chosen"),
    ):
        code, _, error = run("sample", folder, *more, "--out", tmp_path / "c.png", capsys=capsys)
        assert code == 2 and said in error, error
    code, _, error = run("sample", "digits", "--prompt", "a", "--out", tmp_path / "c.png", capsys=capsys)
    assert code == 2 and "takes no text, but --label" in error
    assert not (tmp_path / "c.png").exists()


def test_videos_classes_and_distilled_guidance_from_the_shell(tmp_path, capsys):
    for name in ("wan", "dit", "flux"):
        pipe_of(name).save_pretrained(tmp_path / name)
    size = ["--height", 16, "--width", 16, "--steps", 2, "--num", 2, "--out"]
    wan = ["sample", tmp_path / "wan", "--prompt", "a", "--frames", 5, *size]
    for out in ("a.gif", "a.png", "a.npz", "folder"):
        assert run(*wan, tmp_path / out, capsys=capsys)[0] == 0
    assert Image.open(tmp_path / "a.gif").n_frames == 5 and Image.open(tmp_path / "a.png").size == (
        5 * 16,
        2 * 16,
    )
    frames = np.load(tmp_path / "a.npz")["arr_0"]
    assert frames.shape == (2, 5, 16, 16, 3)
    last = np.asarray(Image.open(tmp_path / "folder/000001/000004.png"))
    assert np.array_equal(last, frames[1, 4])
    dit = ["sample", tmp_path / "dit", "--steps", 2, "--num", 2, "--out", tmp_path / "d.npz"]
    assert run(*dit, "--label", 999, capsys=capsys)[0] == 0
    assert np.load(tmp_path / "d.npz")["arr_1"].tolist() == [999, 999]
    assert "0 .. 999" in run(*dit, "--label", 1000, capsys=capsys)[2]
    flux = ["sample", tmp_path / "flux", "--prompt", "a", *size, tmp_path / "f.npz", "--guidance"]
    made = []
    for scale in (1.5, 9.0):
        assert run(*flux, scale, capsys=capsys)[0] == 0
        made.append(np.load(tmp_path / "f.npz")["arr_0"].astype(int))
    assert np.abs(made[0] - made[1]).max() > 0  # the network was told
    assert "no second branch" in run(*flux, 2, "--negative", "b", capsys=capsys)[2]
    assert ".png or .npz" in run(*flux[:-2], tmp_path / "f.gif", capsys=capsys)[2]
