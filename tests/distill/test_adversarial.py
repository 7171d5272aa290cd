"""GAN losses and R1 penalties: values at chance, optimum, and a penalty that vanishes with its noise."""

import math

import pytest
import torch

from fewstep.distill.losses import approximate_r1, discriminator_loss, generator_loss, gradient_r1


def test_at_chance_the_losses_are_log_2_and_log_4():
    zero = torch.zeros(5, 2)
    assert abs(float(generator_loss(zero)) - math.log(2)) < 1e-7
    assert abs(float(discriminator_loss(zero, zero)) - math.log(4)) < 1e-7


def test_the_best_logit_is_the_log_density_ratio():
    """On two discrete laws the discriminator's loss is least, with gradient 0, at log p - log q."""
    p, q = (
        torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64),
    )
    logit = (p / q).log().requires_grad_()
    softplus = torch.nn.functional.softplus
    loss = (q * softplus(logit)).sum() + (p * softplus(-logit)).sum()
    assert torch.autograd.grad(loss, logit)[0].abs().max() < 1e-15
    # the same as our function, with draws in those proportions
    counts = [int(10 * float(v)) for v in p], [int(10 * float(v)) for v in q]
    real, fake = (logit.detach().repeat_interleave(torch.tensor(c)) for c in counts)
    torch.testing.assert_close(discriminator_loss(real, fake), loss.float(), rtol=1e-6, atol=0)


def test_the_generator_is_driven_towards_real():
    logit = torch.zeros(4, requires_grad=True)
    generator_loss(logit).backward()
    assert (logit.grad < 0).all()  # descent raises the logit


def test_approximate_r1_vanishes_with_its_noise_and_tends_to_the_gradient_s_norm():
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=random)
    x = torch.randn(512, 6, dtype=torch.float64, generator=random)

    def discriminator(x):
        return torch.tanh(x @ matrix).sum(1)

    noise = torch.randn(512, 6, dtype=torch.float64, generator=random)
    assert float(approximate_r1(discriminator, x, scale=0.0, noise=noise)) == 0
    exact = gradient_r1(discriminator, x)
    # along one Gaussian direction E (g . n)^2 = |g|^2; the standard error over 512 samples is at most sqrt(2/512) of it
    # times the spread of |g|^2 between samples, measured here
    slopes = []
    for scale in (1e-3, 1e-4):
        slopes.append(float(approximate_r1(discriminator, x, scale, noise)) / scale**2)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(point).sum(), point)
    along = (slope * noise).sum(1).square()
    error = float(along.std() / math.sqrt(len(x)))
    assert abs(slopes[0] - float(along.mean())) < 0.01 * float(along.mean())
    assert abs(slopes[1] - float(exact.detach())) < 3 * error


def test_a_penalty_on_clean_data_does_not_vanish():
    # what one released code does: the perturbed logits are of x0 + noise, the plain ones of x_t
    x0, eps = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(1)).unbind()
    x_t = x0 + 2.0 * eps
    discriminator = lambda x: x.square().sum(1)  # noqa: E731
    assert float(approximate_r1(discriminator, x0, 0.0, logits=discriminator(x_t))) > 1


def test_gradient_r1_trains_the_discriminator():
    weight = torch.ones(3, requires_grad=True)
    gradient_r1(lambda x: x @ weight, torch.randn(5, 3)).backward()
    torch.testing.assert_close(weight.grad, 2 * torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_raised_to_float32(dtype):
    assert generator_loss(torch.full((2,), -30.0, dtype=dtype)).dtype == torch.float32
