"""The Frechet distance against closed forms, and its two routes against each other."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.eval import Gaussian, frechet, frechet_distance, gaussian_stats
from fewstep.eval.frechet import covariance_factor

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rotation(dim: int) -> torch.Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=7))[0]


@pytest.mark.parametrize("count", [5, 12, 40])
def test_equal_gaussians_are_at_zero(count):
    x = normal(count, 12)
    # Rounding: a sum of D singular values, each within D eps of the largest eigenvalue.
    bound = 12 * 12 * 2.3e-16 * float(x.square().sum())
    assert frechet_distance(x, x.clone()) <= bound
    assert frechet_distance(gaussian_stats(x), x) <= bound


def test_diagonal_closed_form():
    a, b = torch.tensor([4.0, 9.0, 1e-6, 0.0], dtype=F64), torch.tensor([1.0, 16.0, 4e-6, 0.0], dtype=F64)
    shift = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    ours = frechet_distance(Gaussian(torch.zeros(4, dtype=F64), a.diag()), Gaussian(shift, b.diag()))
    exact = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert ours == pytest.approx(exact, abs=1e-13)


def test_commuting_covariances_closed_form():
    q, dim = rotation(20), 20
    a, b = torch.logspace(-8, 1, dim, dtype=F64), torch.logspace(0, -3, dim, dtype=F64)
    zero = torch.zeros(dim, dtype=F64)
    ours = frechet_distance(Gaussian(zero, q * a @ q.T), Gaussian(zero, q * b @ q.T))
    assert ours == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-11)


def test_two_dimensions_that_do_not_commute():
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=F64)
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=F64)
    # For 2 x 2, tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det A det B)).
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(a.det() * b.det())))
    zero = torch.zeros(2, dtype=F64)
    assert frechet_distance(Gaussian(zero, a), Gaussian(zero, b)) == pytest.approx(
        float(a.trace() + b.trace()) - 2 * root, abs=1e-13
    )


@pytest.mark.parametrize("counts", [(6, 9), (6, 200), (200, 6), (2, 2)])
def test_few_samples_agree_with_the_dense_product(counts):
    dim = 12
    xa, xb = normal(counts[0], dim, seed=1), 2 * normal(counts[1], dim, seed=2) @ rotation(dim) + 0.3
    a, b = gaussian_stats(xa), gaussian_stats(xb)
    values, vectors = torch.linalg.eigh(a.cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # Beyond the rank that N samples can have, eigenvalues are rounding, and their roots are about 1e-8.
    rank = min(counts[0] - 1, counts[1] - 1, dim)
    overlap = torch.linalg.eigvalsh(root @ b.cov @ root)[-rank:].sqrt().sum()
    dense = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * overlap)
    assert frechet_distance(xa, xb) == pytest.approx(dense, rel=1e-11)
    assert frechet_distance(a, b) == pytest.approx(dense, rel=1e-11)
    assert frechet_distance(xa, b) == pytest.approx(dense, rel=1e-11)


def test_symmetric_and_invariant_to_rotation():
    xa, xb, q = normal(50, 8, seed=1), normal(60, 8, seed=2) * 1.5 + 0.2, rotation(8)
    here = frechet_distance(xa, xb)
    assert frechet_distance(xb, xa) == pytest.approx(here, rel=1e-12)
    assert frechet_distance(xa @ q, xb @ q) == pytest.approx(here, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_features_are_widened_first(dtype):
    xa, xb = normal(64, 4, seed=1).to(dtype), normal(64, 4, seed=2).to(dtype)
    assert frechet_distance(xa, xb) == frechet_distance(xa.double(), xb.double())
    assert frechet_distance(xa.float().numpy(), xb) == frechet_distance(xa, xb)


def test_eigenvalues_are_taken_where_they_are_good_enough_and_singular_values_where_not(monkeypatch):
    q, zero = rotation(20), torch.zeros(20, dtype=F64)
    taken = []
    real = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: taken.append(1) or real(x))
    for low, expected in ((-3, 0), (-14, 1)):
        a = torch.logspace(0, low, 20, dtype=F64)
        ours = frechet_distance(Gaussian(zero, q * a @ q.T), Gaussian(zero, torch.diag(a.flip(0))))
        assert len(taken) == expected
        root = q * a.sqrt() @ q.T
        exact = float(2 * a.sum() - 2 * real(root * a.flip(0).sqrt()).sum())
        assert ours == pytest.approx(exact, abs=1e-11)


def test_a_triangular_factor_is_multiplied_as_the_whole_one_is(monkeypatch):
    monkeypatch.setattr(frechet, "PANEL", 7)
    lower, b = normal(20, 20).tril(), normal(20, 20, seed=1)
    b = b + b.T
    assert torch.allclose(
        frechet._congruent(lower, b).tril(), (lower.T @ b @ lower).tril(), rtol=0, atol=1e-13
    )


def test_slightly_negative_eigenvalues_are_clipped_and_others_refused():
    q = rotation(3)
    nearly = q * torch.tensor([-1e-8, 1.0, 2.0], dtype=F64) @ q.T
    factor = covariance_factor(nearly)
    assert torch.allclose(factor @ factor.T, nearly, atol=2e-8)
    zero = torch.zeros(3, dtype=F64)
    with pytest.raises(ValueError, match="b: cov has an eigenvalue -0.5.*positive semi-definite"):
        frechet_distance(Gaussian(zero, nearly), Gaussian(zero, torch.diag(torch.tensor([-0.5, 1.0, 1.0]))))
    with pytest.raises(ValueError, match="a: cov is not symmetric"):
        frechet_distance(Gaussian(zero, normal(3, 3)), Gaussian(zero, nearly))


def test_bad_input_is_named():
    x = normal(10, 3)
    with pytest.raises(ValueError, match="a has 1 rows; this needs at least 2"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="b has 2 dimensions; expected 3"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="b has NaN or infinity in 1 of 10 rows, first in row 4"):
        frechet_distance(x, x.index_fill(0, torch.tensor([4]), float("nan")))
    with pytest.raises(ValueError, match=r"a has shape \(10, 3, 1\); expected \(N, D\)"):
        frechet_distance(x[..., None], x)
    with pytest.raises(TypeError, match="a has dtype torch.int64; expected a float dtype"):
        frechet_distance(x.long(), x)
    with pytest.raises(TypeError, match="b is a str"):
        frechet_distance(x, "stats.npz")
    with pytest.raises(ValueError, match=r"a has a mean of shape \(2,\) and a cov of shape \(3, 3\)"):
        frechet_distance(Gaussian(torch.zeros(2), torch.eye(3)), x)
