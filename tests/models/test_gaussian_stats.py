"""Gaussian statistics of data: streaming, ranks and tails, classes, the ODE in closed form, files."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from fewstep.models import GaussianMixture, GaussianStats, digits, gaussian, gaussian_fit, paths

ALL = [
    paths.vp_linear(),
    paths.vp_cosine(),
    paths.vp_discrete(paths.ddpm_alphas_cumprod()),
    paths.edm(),
    paths.flow(),
]


def correlated(count=400, dim=12, seed=0, floor=0.1):
    g = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]
    scales = torch.linspace(2.0, floor, dim, dtype=torch.float64)
    return torch.randn(count, dim, generator=g, dtype=torch.float64) * scales @ mix.mT + 3.0


# --- from data -------------------------------------------------------------------------------------------------------


def test_mean_and_covariance_are_numpys_and_survive_a_large_mean():
    data = correlated() + 1e6
    stats = gaussian(data)
    assert torch.allclose(stats.mean[0], data.mean(0), rtol=1e-14)
    # rounding of the data themselves, 1e-10 each, not of squares of 1e6
    assert np.allclose(stats.covariance().numpy(), np.cov(data.numpy(), rowvar=False, bias=True), atol=1e-8)
    assert (stats.values[0].diff() <= 0).all() and stats.rest.item() == 0


@pytest.mark.parametrize("dense", [True, False])
def test_streamed_batches_are_the_whole_whatever_their_sizes(dense, monkeypatch):
    data = correlated(300).reshape(300, 3, 2, 2)
    whole = gaussian(data, rank=5)
    if not dense:  # 2 rank + 20 rows hold these 12 dimensions: nothing is lost there
        monkeypatch.setattr(gaussian_fit, "DENSE", 4)
    for sizes in (9, 299):
        streamed = gaussian(data.split(sizes), rank=5)
        assert torch.allclose(streamed.covariance(), whole.covariance(), atol=1e-12)
        assert torch.allclose(streamed.mean, whole.mean, atol=1e-13)
        assert streamed.count == (300,) and streamed.shape == (3, 2, 2)
    assert torch.allclose(
        gaussian([b.numpy() for b in data.split(50)], rank=5).values, whole.values, atol=1e-12
    )


def test_the_factor_finds_the_leading_directions_of_data_too_wide_for_a_covariance(monkeypatch):
    g = torch.Generator().manual_seed(1)
    scales = 10.0 * 0.6 ** torch.arange(200, dtype=torch.float64)
    data = torch.randn(2000, 200, generator=g, dtype=torch.float64) * scales + 0.01 * torch.randn(
        2000, 200, generator=g, dtype=torch.float64
    )
    exact = gaussian(data, rank=8)
    monkeypatch.setattr(gaussian_fit, "DENSE", 100)
    sketched = gaussian(data.split(100), rank=8)
    # what is dropped at each cut is the noise, 1e-4, beside kept eigenvalues down to 7.8
    assert torch.allclose(sketched.values, exact.values, rtol=1e-4)
    assert torch.allclose(sketched.rest, exact.rest, rtol=0.05)
    overlap = torch.linalg.svdvals(sketched.vectors[0].mT @ exact.vectors[0])
    assert (1 - overlap).abs().max() < 1e-6


def test_tails():
    data = correlated()
    full, mean, zero = gaussian(data), gaussian(data, rank=4), gaussian(data, rank=4, tail="zero")
    assert mean.rest.item() == pytest.approx(full.values[0, 4:].mean().item(), rel=1e-12)
    assert zero.rest.item() == 0
    assert torch.allclose(mean.values, full.values[:, :4])
    assert torch.trace(mean.covariance()).item() == pytest.approx(
        torch.trace(full.covariance()).item(), rel=1e-12
    )


def test_mirror_images_make_the_law_symmetric():
    data = torch.randn(50, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(
        -1
    )
    stats = gaussian(data, flip=True)
    both = gaussian(torch.cat([data, data.flip(-1)]))
    assert torch.allclose(stats.covariance(), both.covariance(), atol=1e-13) and stats.count == (50,)
    turned = torch.arange(12).reshape(3, 4).flip(-1).flatten()
    assert torch.allclose(stats.mean[0], stats.mean[0][turned], atol=1e-14)


def test_a_gaussian_a_class():
    images, labels = digits("train")
    stats = gaussian(images, labels, rank=10)
    assert stats.classes == 10 and sum(stats.count) == len(images)
    three = gaussian(images[labels == 3], rank=10)
    assert torch.allclose(stats.mean[3], three.mean[0]) and torch.allclose(stats.values[3], three.values[0])
    pairs = [(images[i::4], labels[i::4]) for i in range(4)]
    assert torch.allclose(gaussian(pairs, rank=10).covariance(7), stats.covariance(7), atol=1e-12)
    x, label = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.tensor([3, 1, 3, 0, 9, 3])
    path = paths.edm()
    moved = stats.transport(path, x, 20.0, 1.0, label)
    assert torch.equal(moved[label == 3], three.transport(path, x[label == 3], 20.0, 1.0))
    assert not torch.allclose(moved[1], three.transport(path, x, 20.0, 1.0)[1], atol=1e-2)


# --- the closed form -------------------------------------------------------------------------------------------------


def integrated(d, x, t_from, t_to, steps=700):
    """The PF-ODE by classical Runge-Kutta of order 4 in t."""
    h = (t_to - t_from) / steps
    for i in range(steps):
        t = t_from + i * h
        k1 = d.velocity(x, t)
        k2 = d.velocity(x + h / 2 * k1, t + h / 2)
        k3 = d.velocity(x + h / 2 * k2, t + h / 2)
        k4 = d.velocity(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("path,t_from,t_to", [
    (paths.vp_linear(), 0.9, 0.2), (paths.edm(), 8.0, 0.5), (paths.flow(), 1.0, 0.1), (paths.vp_cosine(), 0.2, 0.9),
], ids=lambda p: getattr(p, "name", str(p)))  # fmt: skip
def test_the_jump_is_where_many_small_steps_lead(path, t_from, t_to):
    stats = gaussian(correlated(), rank=4)
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = path.alpha(t_from) * 3.0 + (path.sigma(t_from) + 1) * x
    # RK4: errors of (8 / 700)^4 = 2e-8 x constants below 1
    assert (
        integrated(stats.denoiser(path), x, t_from, t_to) - stats.transport(path, x, t_from, t_to)
    ).abs().max() < 1e-7


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.name)
def test_jumps_compose_and_carry_the_marginals_into_one_another(path):
    stats = gaussian(correlated(), rank=4)
    times = [path.t_max, path.time(-1.0), path.time(0.5), path.t_clean]
    x = torch.randn(5, 12, dtype=torch.float64)
    one_by_one = x
    for s, n in zip(times, times[1:]):
        one_by_one = stats.transport(path, one_by_one, s, n)
    direct = stats.transport(path, x, times[0], times[-1])
    assert torch.allclose(one_by_one, direct, rtol=1e-12, atol=1e-12)
    assert torch.allclose(
        stats.transport(path, direct, times[-1], times[0]), x, rtol=1e-9, atol=1e-9
    )  # and back
    assert stats.transport(path, x, times[0], times[0]) is x
    cov, s, n = stats.covariance(), times[0], times[2]
    # the jump as a matrix, from where it sends the origin and the axes
    axes = stats.transport(path, torch.cat([torch.zeros(1, 12), torch.eye(12)]).double(), s, n)
    matrix = (axes[1:] - axes[0]).mT

    def marginal(t):
        return path.alpha(t) ** 2 * cov + path.sigma(t) ** 2 * torch.eye(12, dtype=torch.float64)

    assert torch.allclose(matrix @ marginal(s) @ matrix.mT, marginal(n), rtol=1e-10, atol=1e-10)
    centre = stats.transport(path, path.alpha(s) * stats.mean, s, n)
    assert torch.allclose(centre, path.alpha(n) * stats.mean, atol=1e-12)


def test_from_pure_noise_of_a_flow():
    path, stats = paths.flow(), gaussian(correlated())
    x, t = torch.randn(4, 12, dtype=torch.float64), 0.3
    u = stats.vectors[0]
    want = 0.7 * stats.mean + (0.49 * stats.values + 0.09).sqrt() * (x @ u) @ u.mT
    assert torch.allclose(stats.transport(path, x, 1.0, t), want, atol=1e-12)


def test_low_rank_and_tail_are_the_full_covariance_where_the_discarded_eigenvalues_are_equal():
    u = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    values, mean = (
        torch.tensor([4.0, 2.0, 0.3, 0.3, 0.3, 0.3], dtype=torch.float64),
        torch.ones(1, 6).double(),
    )
    full = GaussianStats(mean, u[None], values[None], torch.zeros(1).double(), (9,), (6,))
    low = GaussianStats(
        mean, u[None, :, :2], values[None, :2], torch.full((1,), 0.3, dtype=torch.float64), (9,), (6,)
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    for path in ALL:
        t = path.time(0.2)
        assert torch.allclose(
            full.transport(path, x, path.t_max, t), low.transport(path, x, path.t_max, t), atol=1e-12
        )
        assert torch.allclose(full.denoiser(path)(x, t), low.denoiser(path)(x, t), atol=1e-12)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.name)
def test_the_denoiser_is_that_of_a_mixture_of_one(path):
    stats = gaussian(correlated(), rank=4)
    mixture = GaussianMixture([1.0], stats.mean, stats.covariance()[None])
    x, t = torch.randn(5, 12, dtype=torch.float64), path.time(torch.linspace(-3.0, 3.0, 5).double())
    assert torch.allclose(stats.denoiser(path)(x, t), mixture.denoiser(path)(x, t), rtol=1e-9, atol=1e-9)
    flat = gaussian(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).denoiser(
        path
    )  # no variance in the second direction
    assert torch.isfinite(flat(torch.ones(1, 2), path.t_clean)).all()


def test_float32_and_batches():
    stats = gaussian(correlated(), rank=4)
    x = 80 * torch.randn(33, 12)
    whole = stats.transport(paths.edm(), x, 80.0, 2.0)
    assert whole.dtype == torch.float32
    assert torch.equal(whole[7:8], stats.transport(paths.edm(), x[7:8], 80.0, 2.0))


# --- files and errors ------------------------------------------------------------------------------------------------


def test_saved_and_loaded_again_to_the_bit(tmp_path):
    images, labels = digits("train")
    stats = gaussian(images, labels, rank=6)
    stats.save(tmp_path / "deep" / "stats.npz")
    again = GaussianStats.load(tmp_path / "deep" / "stats.npz")
    for name in ("mean", "vectors", "values", "rest"):
        assert torch.equal(getattr(stats, name), getattr(again, name))
    assert again.shape == (1, 8, 8) and again.count == stats.count
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["stats.npz"]
    with pytest.raises(ValueError, match="must end in .npz"):
        stats.save(tmp_path / "stats.pt")


def test_files_that_are_something_else_are_refused(tmp_path):
    file = tmp_path / "a.npz"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no Gaussian statistics"):
        GaussianStats.load(file)
    np.savez(file, mean=np.zeros(3))
    with pytest.raises(ValueError, match="count, fewstep_gaussian, rest, shape, values, vectors missing"):
        GaussianStats.load(file)
    stats = gaussian(correlated())
    stats.save(file)
    arrays = dict(np.load(file))
    for name, value, message in (
        ("fewstep_gaussian", 7, "format 7"),
        ("values", -arrays["values"], "must not be negative"),
        ("mean", arrays["mean"][:, :3], "mean must be finite and of shape"),
    ):
        np.savez(file, **{**arrays, name: value})
        with pytest.raises(ValueError, match=message):
            GaussianStats.load(file)
    content = io.BytesIO()
    np.save(content, np.array([{"a": 1}], dtype=object))  # a pickle inside
    file.write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="holds no Gaussian statistics"):
        GaussianStats.load(file)


def test_bad_data_are_refused_by_name():
    data = correlated()
    for bad, message in (
        (data[:1], "at least two samples, got 1"), ([], "got none"), (data.long(), "must be floats"),
        (data[0], "must be floats of shape"), (data / 0, "must be finite"), ([data, data[:, :3]], "batches alike"),
        ([(data, torch.zeros(400).long()), data], "batches alike"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            gaussian(bad)
    for options, message in (
        ({"rank": 0}, "rank must be a positive integer"), ({"rank": 13}, "rank must be at most 12"),
        ({"tail": "max"}, "tail must be"), ({"labels": torch.zeros(3).long()}, "labels must be integers"),
        ({"labels": 2 * torch.arange(400).remainder(2)}, "too few of \\[1\\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            gaussian(data, **options)
    with pytest.raises(ValueError, match="rank is needed beyond 4096"):
        gaussian(torch.zeros(3, 5000))
    stats, path = gaussian(data), paths.edm()
    for t in (-1.0, 81.0, "late", True):
        with pytest.raises(ValueError, match="t_from must lie in"):
            stats.transport(path, data, t, 1.0)
    with pytest.raises(ValueError, match="x must have shape"):
        stats.transport(path, data[:, :3], 2.0, 1.0)
    with pytest.raises(ValueError, match="t_from must lie where sigma > 0"):
        gaussian(data, rank=4, tail="zero").transport(path, data, 0.0, 1.0)
    classes = gaussian(data, torch.arange(400) % 2)
    for label in (None, torch.zeros(3).long(), torch.zeros(400)):
        with pytest.raises(ValueError, match="label must be integers of shape"):
            classes.transport(path, data, 2.0, 1.0, label)
    with pytest.raises(ValueError, match="label must lie in 0 .. 1"):
        classes.transport(path, data, 2.0, 1.0, torch.full((400,), 2))
