"""Streamed moments against those of the whole sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.eval import Stats, gaussian_stats, moments, stream_stats


def sample(count: int, dim: int = 6, offset: float = 0.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    mix = torch.randn(dim, dim, dtype=torch.float64, generator=draw)
    return torch.randn(count, dim, dtype=torch.float64, generator=draw) @ mix + offset


def assert_same(ours, theirs, relative: float) -> None:
    assert ours.n == theirs.n
    assert torch.allclose(ours.mean, theirs.mean, rtol=relative, atol=relative)
    assert torch.allclose(ours.cov, theirs.cov, rtol=0, atol=relative * float(theirs.cov.abs().max()))


def test_the_whole_sample_against_numpy():
    x = sample(100)
    ours = gaussian_stats(x)
    assert np.allclose(ours.cov.numpy(), np.cov(x.numpy(), rowvar=False), rtol=0, atol=1e-13)
    assert np.allclose(ours.mean.numpy(), x.numpy().mean(axis=0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_streaming_equals_batch(size, offset):
    x = sample(500, offset=offset)
    stats = Stats()
    for batch in x.split(size):
        stats = stats.update(batch)
    assert_same(stats.finish(), gaussian_stats(x), 1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("size", [1, 33, 500])
def test_a_stream_equals_the_whole(monkeypatch, size, offset):
    monkeypatch.setattr(moments, "BLOCK", 64)
    monkeypatch.setattr(moments, "PANEL", 4)
    x = sample(500, offset=offset)
    ours = stream_stats(x.split(size))
    assert_same(ours.finish(), gaussian_stats(x), 1e-10)
    assert torch.equal(ours.scatter, ours.scatter.T)
    assert stream_stats(iter([])) == Stats() == stream_stats([x[:0]])
    with pytest.raises(ValueError, match="batch has 5 dimensions; expected 6"):
        stream_stats([x, x[:, :5]])


def test_a_far_origin_costs_no_digits():
    # The naive E[x x^T] - mean mean^T would be off by about offset^2 eps = 2e-4 here.
    x, offset = sample(400), 2.0**20
    stats = Stats()
    for batch in (x + offset).split(50):
        stats = stats.update(batch)
    shifted = (x + offset) - offset  # what float64 kept of x at that offset
    ours, theirs = stats.finish(), gaussian_stats(shifted)
    assert torch.allclose(ours.cov, theirs.cov, rtol=0, atol=1e-10 * float(theirs.cov.abs().max()))
    assert torch.allclose(ours.mean - offset, theirs.mean, rtol=0, atol=8 * offset * 2.3e-16)


def test_batches_whose_means_drift():
    x = sample(600) + torch.arange(600, dtype=torch.float64)[:, None] * 10
    parts = [Stats().update(batch) for batch in x.split(20)]
    total = Stats()
    for part in parts:
        total = total.merge(part)
    assert_same(total.finish(), gaussian_stats(x), 1e-10)


def test_uneven_merges_in_any_grouping_and_empty_ones():
    x = sample(100)
    one, few, many = Stats().update(x[:1]), Stats().update(x[1:8]), Stats().update(x[8:])
    whole = gaussian_stats(x)
    assert_same(one.merge(few).merge(many).finish(), whole, 1e-13)
    assert_same(many.merge(few.merge(one)).finish(), whole, 1e-13)
    assert_same(Stats().merge(many).merge(few).merge(Stats()).merge(one).finish(), whole, 1e-13)
    assert Stats().merge(Stats()) == Stats()
    assert many.update(x[:0]) is many
    assert Stats().update(x[:0]) == Stats()


def test_update_leaves_the_old_one_alone():
    first = Stats().update(sample(10))
    before = first.scatter.clone()
    first.update(sample(20))
    assert first.n == 10 and torch.equal(first.scatter, before)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="Stats has seen 1 samples; a covariance needs at least 2"):
        Stats().update(sample(1)).finish()
    with pytest.raises(ValueError, match="Stats has seen 0 samples"):
        Stats().finish()
    with pytest.raises(ValueError, match="batch has 5 dimensions; expected 6"):
        Stats().update(sample(4)).update(sample(4, dim=5))
    with pytest.raises(ValueError, match="other has 5 dimensions; expected 6"):
        Stats().update(sample(4)).merge(Stats().update(sample(4, dim=5)))
    with pytest.raises(TypeError, match="other is a tuple; expected a Stats"):
        Stats().merge((0, None, None))
    with pytest.raises(ValueError, match="x has 1 rows; this needs at least 2"):
        gaussian_stats(sample(1))
    with pytest.raises(ValueError, match="batch has NaN or infinity in 4 of 4 rows"):
        Stats().update(sample(4) / 0)
