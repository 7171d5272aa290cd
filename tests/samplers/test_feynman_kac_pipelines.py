"""Feynman-Kac correctors round unmodified pipelines, built small and offline."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fewstep.samplers import ddim, feynman_kac, grids, steer, targets

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def build(name):
    spec = importlib.util.spec_from_file_location("tiny_pipelines", Path(__file__).with_name("pipelines.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(name)


def call(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a fox", num_inference_steps=3, output_type="latent", generator=generator, **options).images


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_the_trivial_target_is_the_pipelines_own_and_guidance_is_corrected(name):
    pipe = build(name)
    method = functools.partial(
        feynman_kac, target=targets.tilt(lambda x: 0 * x.flatten(1).sum(1)), particles=1
    )
    options = {"guidance_scale": 1.0} if name != "flux" else {}
    plain = call(pipe, **options)
    with steer(pipe, method) as handle:
        same = call(pipe, **options)
    # the schedulers' own rounding; two of a kind would be equal to the bit
    assert torch.allclose(plain.float(), same.float(), atol=2e-4) and handle.info.calls == 3

    def noisy(path, steps):
        return ddim(path, grids.uniform(path, steps), eta=1.0)

    guided = functools.partial(feynman_kac, target=targets.cfg(), particles=4, when=1.0)
    with steer(pipe, guided, table=noisy) as handle:
        if name == "flux":  # its guidance was distilled into it: one branch
            with pytest.raises(ValueError, match="scale must be given"):
                call(pipe)
            return
        x = call(pipe, guidance_scale=4.0)
    run = handle.info
    assert x.shape == plain.shape and torch.isfinite(x).all() and not torch.equal(x, plain)
    assert run.calls == 3 and run.info.calls == 3 * 2 * 4  # a call holds both branches of all particles
    assert run.info.weights.shape == (1, 4)


def test_a_distilled_model_is_refused_for_guidance_by_name():
    pipe = build("flux")
    target = targets.cfg(scale=3.0)
    with steer(pipe, functools.partial(feynman_kac, target=target, particles=2)):
        with pytest.raises(ValueError, match="target cfg needs a model with an unconditional branch"):
            call(pipe)
