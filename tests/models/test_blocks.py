"""Blocks of one size: the same answers, whatever the batch, to the last bit."""

from __future__ import annotations

import pytest
import torch

from fewstep.models import Denoiser, load, paths
from fewstep.models.blocks import in_blocks
from fewstep.samplers import ddim, grids, sample, starting_noise


def test_sample_17_of_a_network_is_the_same_bits_alone_in_a_batch_and_reversed():
    d = in_blocks(load("digits"), 16)
    table, label = ddim(d.path, grids.logsnr(d.path, 2), eta=1.0), torch.arange(64) % 10
    noise, ids = starting_noise(0, 64, d.shape), torch.arange(64)

    def draw(some):
        return sample(d, noise[some], table, seed=1, ids=ids[some], cond={"label": label[some]})

    whole = draw(ids)
    assert torch.equal(whole[17:18], draw(ids[17:18]))
    assert torch.equal(whole, draw(ids.flip(0)).flip(0))
    plain = sample(load("digits"), noise, table, seed=1, ids=ids, cond={"label": label})
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-4)


def test_conditions_are_cut_along_and_tuples_stay_tuples():
    shapes = []

    def call(x, tau, label, shared, gain):
        shapes.append((x.shape, tau.shape, label.shape, shared.shape, gain))
        return x + label[:, None], x * tau[:, None]

    x, label = torch.randn(10, 2, generator=torch.Generator().manual_seed(0)), torch.arange(10.0)
    d = in_blocks(Denoiser(call, paths.flow(), predicts="x0"), 4)
    cond = {"label": label, "shared": torch.zeros(3), "gain": 2.0}
    one, two = d.raw(x, 0.5, **cond)
    assert torch.equal(one, x + label[:, None]) and torch.equal(two, x * 0.5)
    assert shapes == [((4, 2), (4,), (4,), (3,), 2.0)] * 3


def test_gradients_pass_and_empty_batches_too():
    d = in_blocks(Denoiser(lambda x, tau: x**2, paths.flow(), predicts="x0"), 4)
    x = torch.ones(6, 2, requires_grad=True)
    d(x, 0.5).sum().backward()
    assert torch.equal(x.grad, torch.full((6, 2), 2.0))
    assert d(torch.zeros(0, 2), 0.5).shape == (0, 2)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="size must be a positive integer"):
        in_blocks(Denoiser(lambda x, tau: x, paths.flow()), size)
