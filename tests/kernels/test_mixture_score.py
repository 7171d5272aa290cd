"""The mixture's posterior and density where no kernel runs: closed forms, brute force, registration, errors."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.kernels import cases
from fewstep.kernels.mixture_score import CASES, backward_op, mixture_score, op, reference

small = pytest.mark.parametrize("case", [c for c in CASES if not c.real], ids=lambda c: c.name)


def brute(x, alpha, sigma, rows, log_weights=None, variances=None, label=None, labels=None):
    """With nothing left out, Q x K x D numbers."""
    dim = rows.shape[1]
    v = alpha[:, None] ** 2 * (0 if variances is None else variances) + (sigma**2)[:, None] + 0 * rows[:, 0]
    apart = x[:, None] - alpha[:, None, None] * rows
    logits = (0 if log_weights is None else log_weights) - 0.5 * (
        apart.square().sum(-1) / v + dim * torch.log(2 * math.pi * v)
    )
    if labels is not None:
        logits = logits.where((label[:, None] == labels) | (label[:, None] == -1), -math.inf)
    gain = 0 * v if variances is None else alpha[:, None] * variances / v
    each = rows + gain[..., None] * apart
    return (logits.softmax(-1)[..., None] * each).sum(1), logits.logsumexp(-1)


@small
@pytest.mark.parametrize("chunk", [7, 4096])
def test_the_reference(case, chunk):
    arguments = cases.exact(case.make("cpu"))
    assert cases.error(reference(**arguments, chunk=chunk), brute(**arguments)) < 1e-11


def test_one_gaussian_is_known():
    x, alpha, sigma = (
        torch.randn(5, 3, dtype=torch.float64),
        torch.full((5,), 0.6).double(),
        torch.full((5,), 0.8).double(),
    )
    centre, s = torch.tensor([[1.0, -2.0, 0.5]]).double(), torch.tensor([0.3]).double()
    mean, density = mixture_score(x, alpha, sigma, centre, variances=s)
    v = 0.36 * 0.3 + 0.64
    torch.testing.assert_close(mean, centre + 0.6 * 0.3 / v * (x - 0.6 * centre))
    torch.testing.assert_close(
        density, torch.distributions.Normal(0.6 * centre, math.sqrt(v)).log_prob(x).sum(-1)
    )


@pytest.mark.parametrize("name", ["mixture", "labels", "empty"])
def test_opcheck(name):
    arguments = next(c for c in CASES if c.name == name).make("cpu")
    arguments["x"].requires_grad_()
    torch.library.opcheck(op, (), arguments)


def test_gradients_of_the_op():
    for case in (CASES[1], CASES[2], CASES[3]):
        arguments = cases.exact(case.make("cpu"))
        x = arguments.pop("x")[:2].requires_grad_()
        arguments |= {k: arguments[k][:2] for k in ("alpha", "sigma", "label") if k in arguments}
        assert torch.autograd.gradcheck(lambda x: op(x, **arguments), x, fast_mode=True)  # noqa: B023
    slope = torch.ones_like(x)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        found = torch.autograd.grad(op(x, **arguments)[0], x, slope, create_graph=True)[0]
        torch.autograd.grad(found.sum(), x)


def test_the_clean_end():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    x, one, zero = torch.tensor([[0.6, 5.0], [-1.0, 0.1]], requires_grad=True), torch.ones(2), torch.zeros(2)
    mean, density = mixture_score(x, one, zero, rows)
    assert torch.equal(mean, torch.tensor([[1.0, 0.0], [0.0, 0.0]])) and density.isnan().all()
    assert torch.equal(torch.autograd.grad(mean.sum(), x)[0], torch.zeros(2, 2))
    wide = mixture_score(x, 0.5 * one, zero, rows, variances=torch.ones(3))[0]
    torch.testing.assert_close(wide, 2 * x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": torch.zeros(0, 2)}, r"rows must have shape \(K, D\) with K >= 1"),
        ({"x": torch.zeros(3, 4)}, r"x must have shape \(Q, 2\) as rows does, got \(3, 4\)"),
        ({"label": torch.zeros(3)}, "label and labels go together"),
        ({"alpha": torch.ones(1)}, r"alpha must have shape \(3,\), got \(1,\)"),
        ({"variances": torch.ones(3)}, r"variances must have shape \(5,\), got \(3,\)"),
    ],
)
def test_errors(change, words):
    good = {"x": torch.zeros(3, 2), "alpha": torch.ones(3), "sigma": torch.ones(3), "rows": torch.zeros(5, 2)}
    mixture_score(**good)
    with pytest.raises(ValueError, match=words):
        mixture_score(**good | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": torch.zeros(5, 2).double()}, "tensors must be float32, got torch.float64"),
        (
            {"rows": torch.zeros(5, 200), "x": torch.zeros(3, 200)},
            "x must have at most 128 dimensions, got 200",
        ),
        ({"sigma": torch.ones(3, requires_grad=True)}, "the kernel's gradient goes to x alone"),
    ],
)
def test_what_the_kernel_does_not_take(change, words):
    good = {"x": torch.zeros(3, 2), "alpha": torch.ones(3), "sigma": torch.ones(3), "rows": torch.zeros(5, 2)}
    with pytest.raises(ValueError, match=f"mixture_score cannot run there: {words}"):
        mixture_score(**good | change, impl="triton")


def test_the_backward_op_is_the_references_gradient():
    arguments = cases.exact(CASES[2].make("cpu"))
    x = arguments["x"].requires_grad_()
    found = reference(**arguments)
    slopes = (torch.ones_like(found[0]), torch.full_like(found[1], 0.3))
    (wanted,) = torch.autograd.grad(found, x, slopes)
    mixture = [
        arguments.get(k) for k in ("alpha", "sigma", "rows", "log_weights", "variances", "label", "labels")
    ]
    torch.testing.assert_close(
        backward_op(x.detach(), *mixture, *(f.detach() for f in found), *slopes), wanted
    )
