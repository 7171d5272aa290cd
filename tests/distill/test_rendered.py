"""Score distillation over a renderer: closed forms for Gaussian teachers, and the equivalences between methods."""

import numpy as np
import pytest
import torch

from fewstep.distill.losses import (
    cds_gradient,
    classifier_gradient,
    invert,
    score_distillation_gradient,
    variational_gradient,
)
from fewstep.models import GaussianMixture, paths


def gaussian(path, mean, variance):
    return GaussianMixture([1.0], np.asarray([mean]), np.asarray([variance])).denoiser(path)


PATHS = [paths.edm(), paths.vp_linear(), paths.flow()]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_sds_of_a_gaussian_teacher(path):
    """E_eps[g] = w sigma alpha (alpha^2 S + sigma^2)^-1 (x - m); antithetic noise makes the mean exact."""
    t = 0.5
    alpha, sigma = path.alpha(t), path.sigma(t)
    d = gaussian(path, [1.0, -2.0], 0.7)
    x = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    eps = torch.tensor([[0.5, -1.1]], dtype=torch.float64)
    gradients = [
        score_distillation_gradient(d.eps(alpha * x + sigma * e, t), torch.zeros_like(x), e, weight=sigma**2)
        for e in (eps, -eps)
    ]
    expected = sigma**2 * sigma * alpha / (alpha**2 * 0.7 + sigma**2) * (x - torch.tensor([[1.0, -2.0]]))
    torch.testing.assert_close(sum(gradients) / 2, expected)


def test_sds_is_vsd_with_the_noise_for_a_critic_and_csd_its_derivative_in_the_scale():
    random = torch.Generator().manual_seed(0)
    conditional, unconditional, eps = torch.randn(3, 2, 4, dtype=torch.float64, generator=random).unbind()
    sds = score_distillation_gradient(conditional, unconditional, eps, 7.5, 0.3)
    guided = unconditional + 7.5 * (conditional - unconditional)
    torch.testing.assert_close(sds, variational_gradient(guided, eps, 0.3))
    slope = score_distillation_gradient(conditional, unconditional, eps, 8.5, 0.3) - sds
    torch.testing.assert_close(slope, classifier_gradient(conditional, unconditional, 0.3))
    difference = score_distillation_gradient(conditional, unconditional, eps, 1.0, 0.3)
    torch.testing.assert_close(sds, difference + 6.5 * classifier_gradient(conditional, unconditional, 0.3))


def test_csd_between_two_means_is_a_constant_drift():
    path, t = paths.vp_linear(), 0.4
    alpha, sigma = path.alpha(t), path.sigma(t)
    one, other = gaussian(path, [1.0, 0.0], 0.5), gaussian(path, [-1.0, 2.0], 0.5)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = classifier_gradient(one.eps(x, t), other.eps(x, t))
    drift = sigma * alpha / (alpha**2 * 0.5 + sigma**2) * torch.tensor([-2.0, 2.0])
    torch.testing.assert_close(got, drift.double().expand(5, 2))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_inversion_is_the_ode_run_backwards(path):
    """N(m, S) under the ODE: deviations from alpha m grow with sqrt(alpha^2 S + sigma^2)."""
    mean, variance = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.7
    d = gaussian(path, mean.numpy(), variance)
    start, end = 0.02, 0.6
    x = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    spread = [path.alpha(t) ** 2 * variance + path.sigma(t) ** 2 for t in (start, end)]
    exact = path.alpha(end) * mean + (spread[1] / spread[0]) ** 0.5 * path.alpha(start) * (x - mean)
    errors = []
    for n in (100, 200):
        got = invert(d, x, torch.linspace(start, end, n + 1, dtype=torch.float64))
        assert torch.equal(got, invert(d, x, torch.linspace(start, end, n + 1, dtype=torch.float64)))
        errors.append(float((got - exact).abs().max()))
    assert errors[1] < 0.05 and 1.7 < errors[0] / errors[1] < 2.3  # first order


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_cds_is_a_finite_difference_along_the_ode(path):
    mean, variance, rho, below = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.7, 0.6, 0.4
    d = gaussian(path, mean.numpy(), variance)
    x, noise = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind()

    def eps(z, level):
        return level * (z - mean) / (variance + level**2)

    z = x + rho * noise
    above = eps(z, rho)
    under = eps(z + (below - rho) * above, below)
    torch.testing.assert_close(cds_gradient(d, x, noise, rho, below), above - under, rtol=1e-9, atol=1e-10)
    other = cds_gradient(d, x, noise, rho, below, sign="loss")
    torch.testing.assert_close(other, below * (under - above), rtol=1e-9, atol=1e-10)
    assert float(cds_gradient(d, x, noise, rho, below, clip=0.01).abs().max()) <= 0.01


def test_a_point_mass_has_nothing_to_say_to_cds():
    d = gaussian(paths.edm(), [0.5, 0.5], 1e-16)
    x, noise = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).unbind()
    assert cds_gradient(d, x, noise, 0.7, 0.5).abs().max() < 1e-12


def test_wrong_input_is_named():
    d, x = gaussian(paths.edm(), [0.0], 1.0), torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="rho must exceed rho_below"):
        cds_gradient(d, x, x, 0.5, 0.5)
    with pytest.raises(ValueError, match="sign must be"):
        cds_gradient(d, x, x, 0.6, 0.5, sign="paper")
    with pytest.raises(ValueError, match="times must rise"):
        invert(d, x, torch.tensor([0.5, 0.1]))
