"""Losses of conditional score distillation: values by hand, gradients, and where none may pass."""

from __future__ import annotations

import pytest
import torch

from fewstep.distill.losses import sid_loss
from fewstep.distill.losses.conditional_score import (
    conditional_critic_loss,
    conditional_distillation_loss,
    conditional_score,
)
from fewstep.models.codebook import codeword_log_density, codeword_mean


def places(count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, 2, generator=random, dtype=torch.float64) for _ in range(count)]


def test_the_score_is_the_gradient_of_the_teachers_log_density():
    (x,) = places(1)
    logits, codes = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    sigma = 0.2 + 0.8 * torch.rand(4, 5, dtype=torch.float64)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(codeword_log_density(x, logits, codes, 1 - sigma, sigma).sum(), x)
    mean = codeword_mean(x, logits, codes, 1 - sigma, sigma)
    torch.testing.assert_close(conditional_score(mean, x, 1 - sigma, sigma), slope, rtol=0, atol=1e-10)


def test_the_critics_loss_is_the_weighted_error_with_a_level_of_each_place_and_its_minimiser_is_the_mean():
    estimate, target, _ = places()
    t = 0.1 + 0.8 * torch.rand(4, 5, dtype=torch.float64)
    by_hand = (
        (estimate - target).square() / t[..., None] ** 2
    ).mean()  # an error of dx/dt of the straight path
    torch.testing.assert_close(conditional_critic_loss(estimate, target, 1 - t, t), by_hand)
    for shape in (t[:, 0], 0.5):  # one level a sample, one for all
        each = (
            shape[:, None].expand(4, 5)
            if isinstance(shape, torch.Tensor)
            else torch.full((4, 5), shape).double()
        )
        same = conditional_critic_loss(estimate, target, 1 - each, each)
        torch.testing.assert_close(conditional_critic_loss(estimate, target, 1 - shape, shape), same)
    guess = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    mean = target.mean((0, 1))
    loss = conditional_critic_loss(mean + guess.expand_as(target), target, 0.5, 0.5)
    (slope,) = torch.autograd.grad(loss, guess)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-14)
    target.requires_grad_()
    conditional_critic_loss(guess.expand_as(target), target, 0.5, 0.5).backward()
    assert target.grad is None


@pytest.mark.parametrize("groups", ["place", "sample"])
def test_the_gradient_of_the_dmd_form_points_from_teacher_to_critic_and_is_nought_where_they_agree(groups):
    x0, real, fake = places()
    for value in (x0, real, fake):
        value.requires_grad_()
    conditional_distillation_loss(x0, real, fake, "dmd", groups=groups).backward()
    assert real.grad is None and fake.grad is None
    error = (x0 - real).abs().mean(2 if groups == "place" else (1, 2), keepdim=True)
    wanted = (fake - real) / error / x0.numel()
    torch.testing.assert_close(x0.grad, wanted.detach())
    x0.grad = None
    conditional_distillation_loss(x0, real, real, "dmd", groups=groups).backward()
    assert (x0.grad == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_the_sid_form_is_that_of_independent_samples_a_place_each(alpha):
    x0, real, fake = places()
    flat = [value.flatten(0, 1) for value in (x0, real, fake)]
    found = conditional_distillation_loss(x0, real, fake, "sid", alpha)
    torch.testing.assert_close(
        found, sid_loss(*flat, alpha) / 2
    )  # a mean over the d = 2 elements, not their sum
    weight = 1 / (x0 - real).abs().mean(-1, keepdim=True)
    by_hand = weight * (real - fake) * ((real - x0) - alpha * (real - fake))
    torch.testing.assert_close(found, by_hand.mean())


def test_a_place_at_the_teachers_estimate_has_a_bounded_weight():
    x0 = torch.ones(1, 1, 2, requires_grad=True)
    loss = conditional_distillation_loss(x0, torch.ones(1, 1, 2), torch.full((1, 1, 2), 1.1), "sid")
    assert loss.isfinite() and abs(loss.item()) < 10  # 0.01 / 0.01 of |x0|


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: conditional_distillation_loss(x, x[:, :2], x), r"one shape \(B, n, d\)"),
        (lambda x: conditional_distillation_loss(x[0], x[0], x[0]), r"one shape \(B, n, d\)"),
        (lambda x: conditional_distillation_loss(x, x, x, "l2"), "distance must be one of sid, dmd"),
        (lambda x: conditional_distillation_loss(x, x, x, groups="batch"), "groups must be"),
        (lambda x: conditional_critic_loss(x, x[..., :1], 0.5, 0.5), r"one shape \(B, n, d\)"),
        (lambda x: conditional_score(x, x, 1.0, 0.0), "sigma must be positive"),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(places(1)[0])
