"""The shipped digit classifier and the rewards that rest on it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from fewstep.models.classifier import DigitClassifier, load_classifier
from fewstep.models.digits import digits
from fewstep.models.rewards import class_probability, ink


def test_accuracy_on_digits_that_it_never_saw():
    images, labels = (torch.from_numpy(a) for a in digits("held_out"))
    judge = load_classifier()
    features, logits = judge(images)
    assert features.shape == (360, 64) and not features.requires_grad
    assert (logits.argmax(-1) == labels).float().mean() >= 0.97
    assert (logits[torch.randperm(360)].argmax(-1) == labels).float().mean() < 0.3


def test_class_probability_is_high_for_its_class_and_differentiable():
    images, labels = (torch.from_numpy(a) for a in digits("held_out"))
    reward = class_probability(3)
    p = reward(images)
    assert p.shape == (360,) and p.min() >= 0 and p.max() <= 1
    assert p[labels == 3].mean() > 0.9 and p[labels != 3].mean() < 0.02
    x = images[labels != 3][:8].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(class_probability(3, log=True)(x).sum(), x)
    step = x + 1e-3 * gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    assert (reward(step) > reward(x)).all()


def test_log_probability_is_the_log():
    x = torch.randn(4, 1, 8, 8)
    judge = DigitClassifier()
    assert torch.allclose(
        class_probability(0, judge, log=True)(x), class_probability(0, judge)(x).log(), atol=1e-6
    )


def test_ink_is_linear():
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    assert torch.allclose(ink()(x), (x.mean(dim=(1, 2, 3)) + 1) / 2)


def test_bad_input():
    with pytest.raises(ValueError, match="label"):
        class_probability(10)
    with pytest.raises(ValueError, match="label"):
        class_probability(1.0)
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\)"):
        load_classifier()(torch.zeros(2, 8, 8))
