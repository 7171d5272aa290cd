"""Students of whole pipelines, exported: diffusers alone draws their own samples, in as many calls."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.distill.data import DataRecipe, open_data
from fewstep.distill.draws import Draws
from fewstep.distill.export import save, stock
from fewstep.distill.methods.phased import phased_student
from fewstep.distill.stock import NoStockPipeline
from fewstep.distill.stock_pipelines import stock_pipeline, stretched
from fewstep.distill.student import few_steps
from fewstep.models import load

LCM4 = [999.0, 749.0, 499.0, 249.0]
STUDENTS = {
    "sd, four steps": ("sd", {"steps": 4, "times": LCM4}, "LCMScheduler"),
    "sd, three times of its own": ("sd", {"times": [999.0, 400.0, 100.0], "steps": 3}, "LCMScheduler"),
    "sd, one step at 399": ("sd", {"times": [399.0]}, "LCMScheduler"),
    "sdxl, three steps": ("sdxl", {"steps": 3}, "LCMScheduler"),
    "dit, two steps": ("dit", {"steps": 2}, "LCMScheduler"),
    "sd3, four steps, shifted": ("sd3", {"steps": 4}, "FlowMatchEulerDiscreteScheduler"),
    "sd3, times of its own": ("sd3", {"steps": 2, "times": [1.0, 0.3]}, "FlowMatchEulerDiscreteScheduler"),
    "flux, four steps": ("flux", {"steps": 4}, "FlowMatchEulerDiscreteScheduler"),
}
# held against their tables alone, without a process of their own
MORE = [
    ("sd", {"steps": 4, "sampler": "ode"}, "DDIMScheduler"),
    ("sdxl", {"steps": 1}, "DDIMScheduler"),
    ("sd3", {"steps": 1}, "FlowMatchEulerDiscreteScheduler"),
    ("sd3", {"steps": 4, "sampler": "ode"}, "FlowMatchEulerDiscreteScheduler"),
    ("flux", {"steps": 2, "sampler": "ode"}, "FlowMatchEulerDiscreteScheduler"),
]
# One process for all, without fewstep: noise is read from a file, calls of the network are counted.
ALONE = """
import sys, json, pathlib, numpy, torch, diffusers
for folder in map(pathlib.Path, sys.argv[1:]):
    arguments = json.loads((folder / "call.json").read_text())
    queue = [torch.from_numpy(z) for z in numpy.load(folder / "noise.npy")]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "student")
    net, calls = getattr(pipe, "transformer", None) or pipe.unet, []
    ask = net.forward
    net.forward = lambda *a, ask=ask, **k: calls.append(1) or ask(*a, **k)
    # some draw noise for the last step, too, and multiply it by 0
    draw = lambda shape, **k: (queue.pop(0) if queue else torch.ones(shape)).reshape(shape)
    sys.modules[type(pipe.scheduler).__module__].randn_tensor = draw
    if "latents" in type(pipe).__call__.__annotations__:
        arguments["latents"] = queue.pop(0)
    else:
        sys.modules[type(pipe).__module__].randn_tensor = draw
    pipe.set_progress_bar_config(disable=True)
    vae, found = pipe.vae, []
    decode = vae.decode
    vae.decode = lambda z, *a, decode=decode, **k: found.append(z) or decode(z, *a, **k)
    pipe(**arguments, output_type="np")
    numpy.savez(folder / "out.npz", latents=found[0], calls=len(calls))
assert "fewstep" not in sys.modules
"""


@pytest.fixture(scope="module")
def built(pipelines):
    return {name: pipelines.build(name) for name in {kind for kind, _, _ in STUDENTS.values()}}


def denoiser(pipe):
    return load(pipe) if "DiT" in type(pipe).__name__ else load(pipe, height=16, width=16)


@pytest.fixture(scope="module")
def exported(built, tmp_path_factory):
    folders, ours, kinds = {}, {}, {}
    for name, (kind, options, _) in STUDENTS.items():
        folder, d = tmp_path_factory.mktemp("pipelines"), denoiser(built[kind])
        with torch.no_grad():  # another network than the teacher's: the student
            d = d.copy()
            for p in d.net.parameters():
                p.mul_(1.1)
        student = few_steps(d, **options)
        found = save(student, folder / "student", "a student", {})
        draws = torch.randn(student.calls, 2, *d.shape, generator=torch.Generator().manual_seed(1))
        if kind == "dit":
            call, cond = {"class_labels": [1, 7]}, {"label": torch.tensor([1, 7])}
        else:
            call = {"prompt": ["a b", "c d"]}
            told = {"guidance_scale": found.call["guidance_scale"]} if d.codec.distilled else {}
            cond = d.codec.embed(call["prompt"], None, **told).cond
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "fewstep.samplers.loop.normal", lambda seed, ids, shape, row, *_, draws=draws: draws[row]
            )
            x = student.sample(draws[0], cond)
        np.save(folder / "noise.npy", draws.numpy())
        (folder / "call.json").write_text(json.dumps({**found.call, **call}))
        ours[name], folders[name], kinds[name] = (student, x), folder, type(found.pipeline.scheduler).__name__
    words = [sys.executable, "-c", ALONE, *map(str, folders.values())]
    cwd = tmp_path_factory.mktemp("cwd")
    done = subprocess.run(words, capture_output=True, text=True, timeout=110, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, folders, kinds


@pytest.mark.parametrize("name", STUDENTS)
def test_diffusers_alone_draws_the_student_s_samples_in_as_many_calls(name, exported):
    ours, folders, kinds = exported
    student, x = ours[name]
    theirs = np.load(folders[name] / "out.npz")
    codec = student.d.codec
    mean, std, scale = codec._moments(x)
    z = codec._unpacked(x) / scale * std + mean  # what the autoencoder is given
    assert kinds[name] == STUDENTS[name][2]
    assert int(theirs["calls"]) == student.calls
    # float32 on both sides, and a scheduler's float32 alphas beside our float64 ones
    assert float((torch.from_numpy(theirs["latents"]) - z).abs().max()) <= 1e-4 * float(z.abs().max())
    assert float(z.std()) > 0.05
    card = (folders[name] / "student/README.md").read_text()
    assert "from_pretrained" in card and f"{student.calls} network calls" in card


def test_what_is_saved_steps_as_the_student_does_and_nothing_else(built):
    d = denoiser(built["sd"])
    with pytest.raises(NoStockPipeline, match=r"its times are \[999.*500.5"):
        stock_pipeline(few_steps(d, 2, times=[999.0, 500.5]))
    with pytest.raises(NoStockPipeline, match="DDIMScheduler calls the network at"):
        stock_pipeline(few_steps(d, 2, "ode", times=[999.0, 300.0]))


@pytest.mark.parametrize("kind, options, scheduler", MORE)
def test_schedulers_are_chosen_by_their_steps(kind, options, scheduler, built):
    found = stock(few_steps(denoiser(built[kind]), **options))
    assert type(found.pipeline.scheduler).__name__ == scheduler


def test_experts_are_no_pipeline(built):
    with pytest.raises(NoStockPipeline, match="its experts take turns, and a pipeline has one network"):
        stock(phased_student(denoiser(built["sd"]), 4, 2))


def test_weights_are_stored_in_what_is_asked_for(built, tmp_path):
    student = few_steps(denoiser(built["sd"]).copy())
    save(student, tmp_path / "half", "a student", {}, "fp16")
    tensors = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, fp16, got 'int8'"):
        save(student, tmp_path / "other", "a student", {}, "int8")


def test_classes_of_a_pipeline_and_their_null_are_data(built):
    batch = open_data(DataRecipe("labels"), denoiser(built["dit"])).batch(Draws(0, 0, 0, 8, 8))
    assert int(batch.cond["label"].max()) < 1000 and set(batch.null["label"].tolist()) == {1000}


@pytest.mark.parametrize("shift, calls", [(1.0, 4), (3.0, 4), (3.0, 2), (5.0, 8)])
def test_a_stretched_grid_is_the_shifted_one(shift, calls):
    from diffusers import FlowMatchEulerDiscreteScheduler

    own, end = stretched(shift, calls)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=own, shift_terminal=end)
    scheduler.set_timesteps(calls)
    u = 1 - torch.arange(calls, dtype=torch.float64) / calls
    wanted = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), wanted, rtol=0, atol=1e-6)
    plain = FlowMatchEulerDiscreteScheduler(
        shift=shift
    )  # the control: shifted twice, and a last step at next to 0
    plain.set_timesteps(calls)
    assert float((plain.sigmas[:-1].double() - wanted).abs().max()) > 0.1
