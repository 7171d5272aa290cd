"""Trees round unmodified pipelines of two prompts, built small and offline: whose images, at what cost."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fewstep.samplers import ddim, grids, sample, steer, tree_sample, tree_search

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS = 3
NAMES = ["sd", "sdxl", "sd3", "flux"]


@functools.cache
def tiny():
    spec = importlib.util.spec_from_file_location("tiny_pipelines", Path(__file__).with_name("pipelines.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def shared(name):
    return tiny().build(name)


def call(name, pipe, **options):
    if name != "flux":  # its guidance was distilled into it
        options.setdefault("guidance_scale", 1.0)
    return tiny().run(name, pipe, steps=STEPS, output_type="latent", **options)


def noisy(path, steps):
    return ddim(path, grids.uniform(path, steps), eta=1.0)


def counted(method, rows):
    """The method on a denoiser whose calls write down how many samples each was asked for."""

    def wrapped(d, noise, table, **options):
        for leaf in d.parts():
            inner = leaf.call
            leaf.call = lambda x, tau, inner=inner, **cond: rows.append(len(x)) or inner(x, tau, **cond)
        return method(d, noise, table, **options)

    return wrapped


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_gain_is_the_plain_pipeline(name):
    """By the pipeline's own schedule; among equals the first that was found is kept, and that is the pipeline's."""
    pipe, rows = shared(name), []
    plain = call(name, pipe)
    method = functools.partial(tree_search, reward=lambda x: 0 * x.flatten(1).sum(1), budget=3 * STEPS)
    with steer(pipe, counted(method, rows)) as handle:
        same = call(name, pipe)
    assert np.allclose(plain, same, atol=2e-4)  # the schedulers' own rounding
    trees = handle.info.info
    assert [tree.calls for tree in trees] == [3 * STEPS] * 2 and sum(rows) == 2 * 3 * STEPS
    assert [len(tree.leaves) for tree in trees] == [3, 3]
    assert handle.info.calls == len(rows) == STEPS  # six samples side by side, whatever the prompt
    with steer(pipe, counted(method, rows)):
        other = call(name, pipe, prompt=["c d", "a b"])
    assert not np.allclose(other, same, atol=1e-4)  # and whose prompt it is matters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [tree_sample, tree_search], ids=["sample", "search"])
def test_trees_find_more_reward_within_their_budget(name, make):
    pipe, rows, budget = shared(name), [], 24

    def reward(images):
        return images.flatten(1).mean(1)

    with steer(pipe, sample, table=noisy, seed=7):
        plain = call(name, pipe)
    found = {}
    for memory in (None, 0):
        rows.clear()
        method = functools.partial(make, reward=reward, budget=budget, scale=50.0, batch=4, memory=memory)
        with steer(pipe, counted(method, rows), table=noisy, seed=7) as handle:
            found[memory] = call(name, pipe)
        trees = handle.info.info
        assert sum(rows) == sum(tree.calls for tree in trees) <= 2 * budget and handle.info.calls == len(rows)
        assert all(tree.calls > budget - STEPS - 1 and len(tree.leaves) >= 4 for tree in trees)
        for tree, image in zip(trees, plain):  # the pipeline's own sample is the first leaf
            assert np.allclose(tree.leaf_states([0])[0].reshape(image.shape), image, atol=1e-5)
        if memory == 0:  # every latent on the host, and nothing else changes
            assert all(tree.store.on_device == 0 < tree.store.on_host for tree in trees)
    assert np.array_equal(found[None], found[0]) and found[0].shape == plain.shape
    if make is tree_search:
        assert not np.array_equal(found[0], plain)
        assert all(tree.best()[1] > tree.rewards[0] for tree in trees)


def test_guided_pipelines_count_both_branches():
    pipe, rows = shared("sd"), []
    method = functools.partial(tree_search, reward=lambda x: x.flatten(1).mean(1), budget=12, batch=4)
    with steer(pipe, counted(method, rows), table=noisy) as handle:
        call("sd", pipe, guidance_scale=4.0)
    trees = handle.info.info
    assert sum(rows) == 2 * sum(tree.calls for tree in trees) and handle.info.scale == 4.0
