"""IdealDenoiser against a mixture of vanishing components, brute force, and its two limits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.models import GaussianMixture, IdealDenoiser, paths

ALL = {name: paths.by_name(name) for name in paths.NAMES}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DATA = 0.7 * normals(50, 3) + torch.tensor([1.0, -2.0, 0.5])
LABELS = torch.arange(50) % 4


@every_path
def test_it_is_a_mixture_whose_components_have_shrunk(path):
    mixture = GaussianMixture(torch.ones(50), DATA, 1e-18)
    ideal, narrow, x = IdealDenoiser(DATA, path), mixture.denoiser(path), 1.5 * normals(7, 3, seed=1)
    for lam in (-2.0, 0.0, 2.0):
        t = path.time(lam)
        # what 1e-18 adds is below rounding; logits of up to 1e3 round by 1e-13
        torch.testing.assert_close(ideal(x, t), narrow(x, t), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ideal.log_prob(x, t), mixture.log_prob(x, path, t), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ideal.score(x, t), mixture.score(x, path, t), rtol=1e-10, atol=1e-10)
    each = torch.tensor(
        [path.time(lam) for lam in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 2.5)], dtype=torch.float64
    )
    torch.testing.assert_close(ideal(x, each), narrow(x, each), rtol=1e-10, atol=1e-10)
    # negative control: components that have not shrunk are told apart
    wide = GaussianMixture(torch.ones(50), DATA, 1e-4).denoiser(path)
    assert (ideal(x, each) - wide(x, each)).abs().max() > 1e-6


@every_path
def test_it_is_the_softmax_that_it_says(path):
    x, t = normals(7, 3, seed=1), path.time(0.4)
    distance = (x[:, None] - path.alpha(t) * DATA).square().sum(-1)
    wanted = (-distance / (2 * path.sigma(t) ** 2)).softmax(-1) @ DATA
    torch.testing.assert_close(IdealDenoiser(DATA, path)(x, t), wanted, rtol=1e-12, atol=1e-12)


@every_path
@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 51])
def test_chunks_agree(path, chunk):
    x = normals(9, 3, seed=1)
    inner = [path.time(lam) for lam in (5.0, 3.0, 1.0, 0.0, -1.0, -3.0)]
    t = torch.tensor([path.t_clean, *inner, path.t_max, path.t_min], dtype=torch.float64)
    whole, parts = (
        IdealDenoiser(DATA, path, labels=LABELS),
        IdealDenoiser(DATA, path, labels=LABELS, chunk=chunk),
    )
    label = torch.tensor([0, 1, 2, 3, -1, 0, 1, 2, 3])
    for cond in ({}, {"label": label}):
        torch.testing.assert_close(parts(x, t, **cond), whole(x, t, **cond), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            parts.log_prob(x[1:], t[1:], **{k: v[1:] for k, v in cond.items()}),
            whole.log_prob(x[1:], t[1:], **{k: v[1:] for k, v in cond.items()}), rtol=1e-12, atol=1e-10)  # fmt: skip


@every_path
def test_small_sigma_gives_the_nearest_row(path):
    x, ideal = DATA[::5] + 0.05 * normals(10, 3, seed=2), IdealDenoiser(DATA, path, chunk=13)
    nearest = DATA[torch.cdist(x, DATA).argmin(-1)]
    torch.testing.assert_close(ideal(x, path.t_clean), nearest, rtol=1e-15, atol=1e-15)
    near = path.time(9.0)  # sigma / alpha = 1e-4, far below every gap
    torch.testing.assert_close(ideal(path.alpha(near) * x, near), nearest, rtol=1e-12, atol=1e-12)


def test_large_sigma_gives_the_mean():
    ideal = IdealDenoiser(DATA, paths.edm(sigma_max=1e8))
    eps, radius = normals(6, 3), float((DATA - DATA.mean(0)).norm(dim=-1).max())
    for sigma in (1e3, 1e5):
        # logits span at most 2 radius |eps| / sigma + radius^2 / sigma^2, and so move the mean by radius times that
        bound = radius * (2 * radius * eps.norm(dim=-1).max() + radius**2 / sigma) / sigma
        assert (ideal(sigma * eps, sigma) - DATA.mean(0)).abs().max() < bound
    flow = IdealDenoiser(DATA, paths.flow())
    torch.testing.assert_close(flow(eps, 1.0), DATA.mean(0).expand(6, 3), rtol=1e-14, atol=1e-14)


@every_path
def test_a_label_keeps_the_rows_of_its_class(path):
    x, t = normals(5, 3, seed=1), path.time(0.2)
    ideal = IdealDenoiser(DATA, path, labels=LABELS, chunk=3)
    label = torch.tensor([2, 0, -1, 3, 1])
    got, density = ideal(x, t, label=label), ideal.log_prob(x, t, label=label)
    for i, k in enumerate(label.tolist()):
        alone = IdealDenoiser(DATA if k < 0 else DATA[k == LABELS], path)
        torch.testing.assert_close(got[i], alone(x[i : i + 1], t)[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(density[i], alone.log_prob(x[i : i + 1], t)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ideal(x, t), IdealDenoiser(DATA, path)(x, t), rtol=1e-12, atol=1e-12)


def test_gradients():
    path, t = paths.vp_linear(), 0.3
    ideal, x = IdealDenoiser(DATA, path, chunk=11), normals(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ideal(x, t), x)
    (slope,) = torch.autograd.grad(ideal.log_prob(x, t).sum(), x)
    torch.testing.assert_close(slope, ideal.score(x, t), rtol=1e-10, atol=1e-10)
    assert torch.isfinite(torch.autograd.grad(ideal(x, 0.3, **{}).sum(), x)[0]).all()


def test_float32_far_from_the_origin():
    """The data are centred before anything is squared: an offset of 1000 spreads costs no more than its rounding."""
    path, t = paths.edm(), 0.5
    x = normals(6, 3, seed=3)
    wanted = IdealDenoiser(DATA, path)(x, t)
    for offset in (0.0, 1000.0):
        low = IdealDenoiser(DATA + offset, path, dtype=torch.float32)
        got = low((x + offset).float(), t)
        assert got.dtype == torch.float32
        # x itself is rounded by 6e-8 (1 + offset), and the denoiser's slope is at most 2 radius^2 / sigma^2 < 50
        assert (got.double() - offset - wanted).abs().max() < 1e-5 + 50 * 6e-8 * offset


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.numel = max(self.numel, out.numel())
        return out


def test_memory_does_not_grow_with_the_set():
    sizes = []
    for n in (1000, 4000):
        ideal = IdealDenoiser(normals(n, 3), paths.flow(), labels=torch.arange(n) % 3, chunk=64)
        with Largest() as largest:
            ideal(normals(10, 3), 0.5, label=torch.zeros(10, dtype=torch.long))
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1] <= 10 * 64


def test_images():
    images = normals(20, 1, 4, 4)
    ideal = IdealDenoiser(images, paths.edm())
    assert ideal.shape == (1, 4, 4)
    assert torch.equal(ideal(images[:3], 0.0), ideal(images[:3], 0.0)) and ideal(images[:3], 0.1).shape == (
        3,
        1,
        4,
        4,
    )
    torch.testing.assert_close(ideal(images[:3], 0.0), images[:3], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: IdealDenoiser([[0.0]], paths.flow()), "dataset must be a tensor"),
        (lambda: IdealDenoiser(torch.zeros(3), paths.flow()), "dataset must be a tensor"),
        (lambda: IdealDenoiser(torch.zeros(0, 3), paths.flow()), "dataset must be a tensor"),
        (lambda: IdealDenoiser(torch.full((2, 3), torch.nan), paths.flow()), "dataset must be finite"),
        (lambda: IdealDenoiser(DATA, paths.flow(), chunk=0), "chunk must be at least 1"),
        (lambda: IdealDenoiser(DATA, paths.flow(), dtype=torch.float16), "dtype must be"),
        (lambda: IdealDenoiser(DATA, paths.flow(), labels=LABELS[:3]), "labels must be 50"),
        (lambda: IdealDenoiser(DATA, paths.flow(), labels=LABELS.float()), "labels must be 50"),
        (lambda: IdealDenoiser(DATA, paths.flow())(DATA[:2], 0.5, label=LABELS[:2]), "labels="),
        (lambda: IdealDenoiser(DATA, paths.flow(), labels=LABELS)(DATA[:2], 0.5, label=LABELS), r"shape \(2,\)"),
        (lambda: IdealDenoiser(DATA, paths.flow(), labels=LABELS)(DATA[:1], 0.5, label=torch.tensor([9])), "got 9"),
        (lambda: IdealDenoiser(DATA, paths.flow())(DATA[:2, :2], 0.5), r"\(B, 3\)"),
        (lambda: IdealDenoiser(DATA, paths.flow())(DATA[:2], torch.full((2, 3), 0.5)), "one a sample"),
        (lambda: IdealDenoiser(DATA, paths.flow()).log_prob(DATA[:2], 0.0), "sigma > 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_path_is_a_path():
    with pytest.raises(TypeError, match="path must be"):
        IdealDenoiser(DATA, "flow")
