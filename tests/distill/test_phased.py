"""Phased DMD: targets whose conditional means are the marginals' predictions, and its gradient in closed form."""

import math

import pytest
import torch

from fewstep.distill.losses import (
    denoising_loss,
    dmd_gradient,
    phased_critic_loss,
    phased_gradient,
    phased_kernel,
    phased_target,
    surrogate,
)
from fewstep.models import GaussianMixture, paths

KINDS = ("eps", "x0", "flow", "v", "score")
LEVELS = [
    (paths.flow(), 0.5, 0.8),
    (paths.flow(), 0.3, 0.31),
    (paths.vp_linear(), 0.2, 0.5),
    (paths.edm(), 0.5, 3.0),
]


def scalars(path, s, t):
    return path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)


@pytest.mark.parametrize("path, s, t", LEVELS)
def test_the_targets_means_are_the_marginal_s_predictions(path, s, t):
    alpha, sigma, alpha_s, sigma_s = scalars(path, s, t)
    points = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    mixture = GaussianMixture([0.25] * 4, points[:, None].numpy(), [1e-20] * 4).denoiser(path)
    x_t = torch.linspace(-3, 4, 41, dtype=torch.float64)[:, None]
    # E[x_s | x_t], component by component
    a, v = phased_kernel(alpha, sigma, alpha_s, sigma_s)
    weights = torch.softmax(-0.5 * (x_t - alpha * points) ** 2 / sigma**2, dim=1)
    means = alpha_s * points + a * sigma_s**2 / sigma**2 * (x_t - alpha * points)
    x_s = (weights * means).sum(1, keepdim=True)
    eps = (x_t - a * x_s) / math.sqrt(v)  # targets are linear: their means are the targets of the means
    for kind in KINDS:
        x0, noise = mixture(x_t, t), mixture.eps(x_t, t)
        exact = {
            "x0": x0,
            "eps": noise,
            "flow": noise - x0,
            "v": alpha * noise - sigma * x0,
            "score": -noise / sigma,
        }[kind]
        got = phased_target(kind, x_s, eps, alpha, sigma, alpha_s, sigma_s)
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-8 / v)
    naive = eps - x_s
    assert (naive - (noise - x0)).abs().max() > 0.05


def test_at_s_0_they_are_the_ordinary_targets():
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    for alpha, sigma in ((0.3, 0.7), (1.0, 5.0)):
        ordinary = {
            "x0": x0,
            "eps": eps,
            "flow": eps - x0,
            "v": alpha * eps - sigma * x0,
            "score": -eps / sigma,
        }
        for kind, expected in ordinary.items():
            torch.testing.assert_close(phased_target(kind, x0, eps, alpha, sigma, 1.0, 0.0), expected)


@pytest.mark.parametrize("path, s, t", LEVELS)
def test_kernels_compose(path, s, t):
    u = s / 2
    a_ts, v_ts = phased_kernel(*scalars(path, s, t))
    a_su, v_su = phased_kernel(*scalars(path, u, s))
    a_tu, v_tu = phased_kernel(*scalars(path, u, t))
    assert v_ts > 0
    assert abs(a_ts * a_su / a_tu - 1) < 1e-12
    assert abs((v_ts + a_ts**2 * v_su) / v_tu - 1) < 1e-12


@pytest.mark.parametrize("path, s, t", LEVELS)
def test_the_critic_s_loss_is_the_capped_flow_error(path, s, t):
    alpha, sigma, alpha_s, sigma_s = scalars(path, s, t)
    random = torch.Generator().manual_seed(1)
    x_s, eps, estimate = torch.randn(3, 4, 3, dtype=torch.float64, generator=random).unbind()
    a, v = phased_kernel(alpha, sigma, alpha_s, sigma_s)
    x_t = a * x_s + math.sqrt(v) * eps
    flow = (x_t - alpha * estimate) / sigma - estimate
    target = phased_target("flow", x_s, eps, alpha, sigma, alpha_s, sigma_s)
    got = phased_critic_loss(estimate, x_s, eps, alpha, sigma, alpha_s, sigma_s)
    torch.testing.assert_close(got, min(1.0, 10 * v) * (flow - target).square().mean(), rtol=1e-9, atol=0)
    per_sample = [torch.full((4,), u, dtype=torch.float64) for u in (alpha, sigma, alpha_s, sigma_s)]
    torch.testing.assert_close(phased_critic_loss(estimate, x_s, eps, *per_sample), got)


def test_the_critic_s_loss_at_s_0_is_the_flow_s_and_stays_finite_at_pure_noise():
    random = torch.Generator().manual_seed(2)
    x0, eps, estimate = torch.randn(3, 4, 3, dtype=torch.float64, generator=random).unbind()
    for t in (0.5, 0.9):
        torch.testing.assert_close(
            phased_critic_loss(estimate, x0, eps, 1 - t, t, 1.0, 0.0),
            denoising_loss(estimate, x0, 1 - t, t, "flow"),
        )
    assert torch.isfinite(phased_critic_loss(estimate, x0, eps, 0.0, 1.0, 0.5, 0.5))


@pytest.mark.parametrize("bed, s", [("flow", 0.3), ("vp", 0.2), ("edm", 0.4)], indirect=["bed"])
def test_its_kl_gradient_in_closed_form(bed, s):
    """x_s = A z + b matched to the teacher's marginal at s: the reverse KL at t, carried through the kernel s -> t."""
    alpha, sigma, alpha_s, sigma_s = scalars(bed.path, s, bed.t)
    a_ts, v = phased_kernel(alpha, sigma, alpha_s, sigma_s)
    p = bed.p
    q = a_ts**2 * bed.a @ bed.a.T + v * torch.eye(3, dtype=torch.float64)
    a, b = bed.a.clone().requires_grad_(), bed.b.clone().requires_grad_()
    x_s = bed.z @ a.T + b
    x_t = (a_ts * x_s + math.sqrt(v) * bed.eps).detach()
    score = -(x_t - a_ts * bed.b) @ torch.linalg.inv(q)
    fake = (x_t + sigma**2 * score) / alpha
    g = phased_gradient(x_s, x_t, bed.teacher(x_t, bed.t), fake, alpha, sigma, alpha_s, sigma_s)
    on_a, on_b = torch.autograd.grad(surrogate(x_s, g, reduction="sum"), (a, b))
    difference = torch.linalg.inv(p) - torch.linalg.inv(q)
    torch.testing.assert_close(on_a, a_ts**2 * difference @ bed.a, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        on_b, a_ts * torch.linalg.inv(p) @ (a_ts * bed.b - alpha * bed.m), rtol=1e-8, atol=1e-9
    )


def test_one_phase_down_to_0_is_dmd():
    random = torch.Generator().manual_seed(3)
    x0, x_t, real, fake = torch.randn(4, 4, 3, dtype=torch.float64, generator=random).unbind()
    for ours, theirs in (("kl", "kl"), ("dmd", "dmd")):
        torch.testing.assert_close(
            phased_gradient(x0, x_t, real, fake, 0.4, 0.6, 1.0, 0.0, ours),
            dmd_gradient(x0, real, fake, 0.4, 0.6, theirs),
        )


def test_wrong_input_is_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="kind must be"):
        phased_target("velocity", x, x, 0.5, 0.5, 1.0, 0.0)
    with pytest.raises(ValueError, match="weight must be"):
        phased_gradient(x, x, x, x, 0.5, 0.5, 1.0, 0.0, "paper")
