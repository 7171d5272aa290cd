"""f-distill's weights against the quadrature of the divergences themselves."""

import math

import numpy as np
import pytest
import torch

from fewstep.distill.losses import (
    DIVERGENCES,
    Divergence,
    LevelMeans,
    batch_level_means,
    density_ratio,
    divergence_weight,
    dmd_gradient,
    level_means,
    surrogate,
)

SIGMA, TEACHER = 0.7, (0.3, 1.2)  # noise level; mean and variance of the teacher's data
VARIANCE = TEACHER[1] + SIGMA**2
STUDENT = (0.9, -0.4)  # x0 = a z + c


def log_p(x):
    return -0.5 * (x - TEACHER[0]) ** 2 / VARIANCE - 0.5 * math.log(2 * math.pi * VARIANCE)


def log_q(x, a, c):
    variance = a**2 + SIGMA**2
    return -0.5 * (x - c) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)


def quadrature(n=80):
    """Nodes (z, eps) and weights of a two-dimensional standard normal."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(n))
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    weights = weights / weights.sum()
    return z.reshape(-1), eps.reshape(-1), torch.outer(weights, weights).reshape(-1)


def exact_gradient(f):
    x = torch.linspace(-14, 14, 40001, dtype=torch.float64)
    a, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in STUDENT)
    q = log_q(x, a, c)
    divergence = (q.exp() * f((log_p(x) - q).exp())).sum() * (x[1] - x[0])
    return torch.stack(torch.autograd.grad(divergence, (a, c)))


def weighted_gradient(weight, ratio_of=None):
    """The distiller's way: the score difference, weighted, dotted into x0."""
    z, eps, w = quadrature()
    a, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in STUDENT)
    x0 = a * z + c
    x_t = (x0 + SIGMA * eps).detach()
    with torch.no_grad():
        ratio = (log_p(x_t) - log_q(x_t, a, c)).exp() if ratio_of is None else ratio_of(x_t)
        real = x_t - SIGMA**2 * (x_t - TEACHER[0]) / VARIANCE
        fake = x_t - SIGMA**2 * (x_t - c) / (a**2 + SIGMA**2)
        g = dmd_gradient(x0[:, None], real[:, None], fake[:, None], 1.0, SIGMA, "kl", scale=weight(ratio))[
            :, 0
        ]
    return torch.stack(torch.autograd.grad((w * g * x0).sum(), (a, c)))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weighted_score_difference_is_the_divergence_s_gradient(name):
    divergence = DIVERGENCES[name]
    torch.testing.assert_close(
        weighted_gradient(divergence.weight), exact_gradient(divergence.f), rtol=1e-9, atol=1e-10
    )


def test_the_ratio_upside_down_is_another_gradient():
    kl = DIVERGENCES["kl"]
    wrong = weighted_gradient(lambda r: kl.weight(1 / r))
    assert (wrong - exact_gradient(kl.f)).norm() > 0.1 * wrong.norm()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_closed_weights_are_f_s_second_derivative(name):
    r = torch.linspace(0.2, 5, 30, dtype=torch.float64)
    by_autograd = Divergence(DIVERGENCES[name].f)
    torch.testing.assert_close(DIVERGENCES[name].weight(r), by_autograd.weight(r), rtol=1e-10, atol=1e-12)
    one = torch.ones(1, dtype=torch.float64)
    assert abs(float(DIVERGENCES[name].f(one))) < 1e-15


def test_an_optimal_discriminator_s_logit_is_the_log_ratio():
    # between two Gaussians the optimal logit is a quadratic: handed to density_ratio it gives the exact gradient
    a, c = (torch.tensor(v, dtype=torch.float64) for v in STUDENT)

    def ratio(x):
        return density_ratio((log_p(x) - log_q(x, a, c)).float(), clamp=80.0, low=0.0, high=math.inf).double()

    got = weighted_gradient(DIVERGENCES["js"].weight, ratio)
    torch.testing.assert_close(got, exact_gradient(DIVERGENCES["js"].f), rtol=1e-6, atol=1e-7)


def test_reverse_kl_and_a_discriminator_that_knows_nothing_are_dmd():
    random = torch.Generator().manual_seed(0)
    x0, real, fake = torch.randn(3, 8, 5, generator=random).unbind()
    plain = dmd_gradient(x0, real, fake)
    wild = density_ratio(torch.randn(8, generator=random))
    assert torch.equal(dmd_gradient(x0, real, fake, scale=divergence_weight(wild, "rkl")), plain)
    for name in DIVERGENCES:
        flat = divergence_weight(density_ratio(torch.full((8, 3), 0.4)), name)
        torch.testing.assert_close(dmd_gradient(x0, real, fake, scale=flat), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weights_have_mean_one(name):
    ratio = density_ratio(2 * torch.randn(64, generator=torch.Generator().manual_seed(1)))
    assert abs(float(divergence_weight(ratio, name).mean()) - 1) < 1e-6


def test_two_ranks_weigh_as_one():
    ratio = density_ratio(torch.randn(8, generator=torch.Generator().manual_seed(2)))
    sums = iter([DIVERGENCES["kl"].weight(ratio).sum(), torch.tensor(8.0)])
    half = divergence_weight(ratio[:4], "kl", reduce=lambda mine: next(sums))
    torch.testing.assert_close(half, divergence_weight(ratio, "kl")[:4])


def test_no_gradient_passes_the_ratio():
    logits = torch.zeros(4, requires_grad=True)
    x0 = torch.randn(4, 3, requires_grad=True)
    weight = divergence_weight(density_ratio(logits), "kl")
    surrogate(x0, dmd_gradient(x0, torch.randn(4, 3), torch.randn(4, 3), scale=weight)).backward()
    assert logits.grad is None


def test_one_sample_a_bin_keeps_most_of_its_ratio():
    state = LevelMeans.start(10)
    ratio, level = torch.tensor([0.2, 5.0, 1.0]), torch.tensor([0.05, 0.55, 0.95])
    _, mean = level_means(state, ratio, level)
    assert (ratio / mean)[0] < 0.25 and (ratio / mean)[1] > 3  # the batch's own mean would make all of them 1


def test_a_ratio_that_is_not_finite_leaves_no_trace_in_the_means():
    level = torch.tensor([0.05, 0.55, 0.55])
    bad, _ = level_means(LevelMeans.start(10), torch.tensor([2.0, float("nan"), 3.0]), level)
    good, _ = level_means(LevelMeans.start(10), torch.tensor([2.0, 3.0]), level[[0, 2]])
    assert all(torch.equal(a, b) for a, b in zip(bad, good, strict=True))


def test_the_running_mean_finds_each_level_s_own():
    random = torch.Generator().manual_seed(3)
    state, means = LevelMeans.start(4), []
    truth = torch.tensor([0.5, 1.0, 2.0, 4.0])
    for step in range(400):
        level = torch.rand(16, generator=random)
        noisy = truth[(level * 4).long()] * torch.empty(16).exponential_(
            generator=random
        )  # relative spread 1
        state, mean = level_means(state, noisy, level, memory=256.0)
        if step >= 200:
            means.append(state.total / state.count)
    # a bin averages over about 2 x 256 / 2 samples: 5 standard errors of spread 1 over sqrt(256), and more by averaging
    torch.testing.assert_close(torch.stack(means).mean(0), truth, rtol=5 / 16, atol=0)


def test_fastgen_s_bins_erase_the_ratio_of_a_sample_that_is_alone_in_one():
    ratio, index = torch.tensor([0.2, 5.0, 1.0, 3.0]), torch.tensor([0, 1, 2, 2])
    means, mean = batch_level_means(torch.ones(4), ratio, index)
    torch.testing.assert_close(ratio / mean, torch.tensor([1.0, 1.0, 0.5, 1.5]), rtol=1e-5, atol=0)
    torch.testing.assert_close(means, torch.tensor([0.2, 5.0, 2.0, 1.0]), rtol=1e-5, atol=0)
    half, _ = batch_level_means(means, ratio, index, ema=0.5)
    torch.testing.assert_close(half, means, rtol=1e-5, atol=0)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="divergence must be one of rkl, .* got 'fkl'"):
        divergence_weight(torch.ones(2), "fkl")
