"""The closed form of a codeword seen through noise, against brute force, autograd and its limits; and the codebook."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.models import paths
from fewstep.models.codebook import (
    LEAST_SIGMA,
    Codebook,
    codeword_log_density,
    codeword_mean,
    codeword_shares,
    kmeans,
)


def setting(count: int = 7, dim: int = 3, places: tuple[int, ...] = (5, 4), dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(count, dim, generator=random, dtype=dtype)
    logits = 2 * torch.randn(*places, count, generator=random, dtype=dtype)
    x = torch.randn(*places, dim, generator=random, dtype=dtype)
    return x, logits, codes


def brute_force(x, logits, codes, alpha, sigma):
    """One codeword after another, densities and all."""
    p = logits.softmax(-1)
    dim = codes.shape[1]
    weights = []
    for j, c in enumerate(codes):
        square = (x - alpha * c).square().sum(-1)
        weights.append(
            p[..., j] * torch.exp(-square / (2 * sigma**2)) / (2 * math.pi * sigma**2) ** (dim / 2)
        )
    total = sum(weights)
    mean = sum(w[..., None] * c for w, c in zip(weights, codes, strict=True)) / total[..., None]
    return mean, total.log()


PATHS = {"flow": paths.flow(), "vp": paths.vp_linear(), "edm": paths.edm()}


@pytest.mark.parametrize("name", PATHS)
def test_mean_and_density_are_those_of_brute_force_on_every_path(name):
    x, logits, codes = setting()
    path = PATHS[name]
    t = 0.4 if name != "edm" else 1.3
    alpha, sigma = path.alpha(t), path.sigma(t)
    mean, density = brute_force(x, logits, codes, alpha, sigma)
    torch.testing.assert_close(codeword_mean(x, logits, codes, alpha, sigma), mean, rtol=0, atol=1e-12)
    found = codeword_log_density(x, logits, codes, alpha, sigma)
    torch.testing.assert_close(found, density, rtol=0, atol=1e-11)


def test_the_score_is_the_gradient_of_the_log_density_with_a_level_a_place():
    x, logits, codes = setting()
    sigma = torch.linspace(0.2, 1.0, 20, dtype=torch.float64).reshape(5, 4)
    alpha = 1 - sigma
    x.requires_grad_()
    (slope,) = torch.autograd.grad(codeword_log_density(x, logits, codes, alpha, sigma).sum(), x)
    mean = codeword_mean(x, logits, codes, alpha, sigma)
    score = (alpha[..., None] * mean - x) / sigma[..., None] ** 2
    torch.testing.assert_close(score, slope, rtol=0, atol=1e-11)


def test_one_codeword_is_the_answer_whatever_is_seen():
    x, _, codes = setting()
    found = codeword_mean(1e3 * x, torch.zeros(5, 4, 1).double(), codes[:1], 0.7, 0.1)
    assert torch.equal(found, codes[0].expand_as(found))


def test_without_noise_it_is_the_nearest_codeword_and_with_nothing_but_noise_the_mean():
    x, logits, codes = setting()
    nearest = codes[torch.cdist(x, codes.expand(5, -1, -1)).argmin(-1)]
    assert torch.equal(codeword_mean(x, logits, codes, 1.0, 1e-9), nearest)  # below LEAST_SIGMA
    assert torch.equal(codeword_mean(x, logits, codes, 1.0, LEAST_SIGMA), nearest)
    torch.testing.assert_close(codeword_mean(x, logits, codes, 0.0, 1.0), logits.softmax(-1) @ codes)


def test_tokens_that_cannot_be_are_left_out_without_a_nan():
    x, logits, codes = setting()
    logits[..., 3:] = -math.inf
    found = codeword_mean(x, logits, codes, 0.5, 1e-3)
    torch.testing.assert_close(found, codeword_mean(x, logits[..., :3], codes[:3], 0.5, 1e-3))
    assert found.isfinite().all()
    assert (codeword_shares(x, logits, codes, 0.5, 0.5)[..., 3:] == 0).all()


def test_logits_far_from_nought_and_half_precision_lose_nothing_to_speak_of():
    x, logits, codes = setting()
    exact = codeword_mean(x, logits, codes, 0.6, 0.4)
    torch.testing.assert_close(codeword_mean(x, logits + 1e4, codes, 0.6, 0.4), exact, rtol=0, atol=1e-10)
    single = codeword_mean(x.float(), (logits + 300).float(), codes.float(), 0.6, 0.4)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=3e-4)  # 300 has steps of 3e-5 in float32
    half = codeword_mean(x.bfloat16(), logits.bfloat16(), codes.float(), 0.6, 0.4)
    assert half.dtype == torch.bfloat16 and (half.double() - exact).abs().max() < 0.1


@pytest.mark.parametrize("sigma", [0.0, -1.0, torch.tensor([0.5, 0.0])])
def test_a_sigma_that_is_not_positive_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be positive"):
        codeword_mean(torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(3, 1), 1.0, sigma)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="logits"):
        codeword_mean(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(5, 3), 1.0, 1.0)
    with pytest.raises(ValueError, match="codes must have shape"):
        codeword_mean(torch.zeros(2, 3), torch.zeros(2, 0), torch.zeros(0, 3), 1.0, 1.0)


def test_a_codebook_cuts_joins_and_rounds():
    codes = torch.tensor([[0.0] * 4, [1.0] * 4, [0.0, 0.0, 1.0, 1.0]])
    book = Codebook(codes, (1, 4, 6), 2)
    assert (book.places, book.dim, len(book)) == (6, 4, 3)
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    places = book.split(x)
    assert places[0, 1].tolist() == [2, 3, 8, 9]  # row by row, as it is read
    assert torch.equal(book.join(places), x) and book.split(places) is places
    tokens = torch.tensor([[0, 1, 2, 2, 1, 0]])
    drawn = book.join(book.vectors(tokens))
    assert torch.equal(book.tokens(drawn + 0.1), tokens)
    assert torch.equal(book.rounded(drawn - 0.2), drawn)
    assert torch.equal(book.rounded(book.split(drawn)), book.vectors(tokens))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda book: book.vectors(torch.tensor([[0, 3]])), r"tokens must lie in 0 \.\. 2, got 3"),
        (lambda book: book.vectors(torch.tensor([[-1]])), r"tokens must lie in 0 \.\. 2, got -1"),
        (lambda book: book.vectors(torch.zeros(1, 5).long()), "n <= 4"),
        (lambda book: book.split(torch.zeros(2, 1, 4, 5)), "x must be"),
        (lambda book: book.join(torch.zeros(2, 5, 4)), "places must be"),
        (lambda book: Codebook(3, (1, 5, 4), 2), "patch must divide"),
        (lambda book: Codebook(3, (4,), 2), "shape must be"),
        (lambda book: Codebook(torch.zeros(3, 5), (1, 4, 4), 2), r"codes must have shape \(V, 4\)"),
        (lambda book: kmeans(torch.zeros(9, 2), 2), r"1 \.\. 1, the distinct points"),
    ],
)
def test_what_a_codebook_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(Codebook(3, (1, 4, 4), 2))


def test_kmeans_leaves_no_point_nearer_to_another_centre_and_more_centres_are_nearer():
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    errors = []
    for size in (4, 16, 64):
        centres = kmeans(points, size, rounds=100)
        mine = torch.cdist(points, centres).argmin(1)
        means = torch.stack([points[mine == k].mean(0) for k in range(size)])
        torch.testing.assert_close(centres, means, rtol=0, atol=2e-2)  # Lloyd's fixed point, nearly
        errors.append(float((points - centres[mine]).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
