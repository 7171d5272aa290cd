"""DMD's gradient against the closed form of a Gaussian reverse KL, its normalisers, and its surrogates."""

import pytest
import torch

from fewstep.distill.losses import dmd_gradient, surrogate


def reverse_kl_loss(bed, weight="kl", **kw):
    def loss(x0, x_t):
        real, fake = (net(x_t.detach(), bed.t) for net in (bed.teacher, bed.critic))
        return surrogate(
            x0, dmd_gradient(x0, real, fake, bed.alpha, bed.sigma, weight), reduction="sum", **kw
        )

    return loss


def test_the_kl_weight_gives_the_gradient_of_the_reverse_kl(bed, student_gradients):
    on_a, on_b = student_gradients(bed, reverse_kl_loss(bed))
    # KL(N(alpha b, q) || N(alpha m, p)), by hand
    inverse_p, inverse_q = torch.linalg.inv(bed.p), torch.linalg.inv(bed.q)
    torch.testing.assert_close(on_a, bed.alpha**2 * (inverse_p - inverse_q) @ bed.a, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(on_b, bed.alpha**2 * inverse_p @ (bed.b - bed.m), rtol=1e-10, atol=1e-11)


def test_without_alpha_it_is_not(bed, student_gradients):
    if bed.alpha == 1:
        pytest.skip("alpha is 1 on this path")
    on_a, _ = student_gradients(
        bed, reverse_kl_loss(bed, weight=lambda x, real, alpha, sigma: torch.ones(len(x)))
    )
    inverse = torch.linalg.inv(bed.p) - torch.linalg.inv(bed.q)
    assert (on_a - bed.alpha**2 * inverse @ bed.a).norm() > 0.05 * on_a.norm()


def test_the_score_difference_from_every_prediction(bed):
    """(alpha / sigma^2)(D_f - D_r): an estimate of x0 enters with one sign, of the noise or velocity with the other."""
    x_t = bed.alpha * (bed.z @ bed.a.T + bed.b) + bed.sigma * bed.eps
    alpha, sigma = bed.alpha, bed.sigma
    fall = sigma * bed.path.alpha_prime(bed.t) - alpha * bed.path.sigma_prime(bed.t)

    def gap(form):  # critic minus teacher
        return getattr(bed.critic, form)(x_t, bed.t) - getattr(bed.teacher, form)(x_t, bed.t)

    scores = gap("score")
    for same in (
        alpha / sigma**2 * gap("__call__"),
        -gap("eps") / sigma,
        alpha / (sigma * fall) * gap("velocity"),
    ):
        torch.testing.assert_close(same, scores, rtol=1e-12, atol=1e-12)
    assert (gap("eps") / sigma - scores).abs().max() > 0.1


def test_equal_teacher_and_critic_give_nothing():
    x0, estimate = torch.randn(4, 5), torch.randn(4, 5)
    for weight in ("dmd", "dmd2", "fastgen", "printed", "kl"):
        assert dmd_gradient(x0, estimate, estimate, 0.5, 0.5, weight).abs().max() == 0


def test_normalisers_are_what_they_say():
    x0, real, fake = torch.randn(
        3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).unbind()
    x0, real, fake = x0[:, None], real[:, None], fake[:, None]
    error = (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    for weight, expected in {
        "dmd": (fake - real) / error,
        "dmd2": (fake - real) / error,
        "fastgen": (fake - real) / (error + 1e-6),
        "printed": 0.3 * (fake - real) / error,
    }.items():
        torch.testing.assert_close(
            dmd_gradient(x0, real, fake, 0.3, 0.9, weight), expected, rtol=1e-12, atol=0
        )


def test_the_normalised_gradient_knows_no_scale():
    random = torch.Generator().manual_seed(1)
    x0, real, fake = torch.randn(3, 4, 6, dtype=torch.float64, generator=random).unbind()
    torch.testing.assert_close(
        dmd_gradient(7 * x0, 7 * real, 7 * fake), dmd_gradient(x0, real, fake), rtol=1e-12, atol=0
    )


def test_a_perfect_student_does_not_blow_the_default_up():
    x0 = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    fake = x0 + 1e-3
    ours = dmd_gradient(x0, x0.clone(), fake)
    theirs = dmd_gradient(x0, x0.clone(), fake, weight="dmd2")
    assert ours.abs().max() < 2.5  # 1e-3 over a thousandth of x0's root mean square
    assert theirs.abs().max() > 1e30


def test_no_gradient_reaches_the_networks():
    nets = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    x0 = torch.randn(2, 3, requires_grad=True)
    surrogate(x0, dmd_gradient(x0, *nets)).backward()
    assert x0.grad is not None and all(net.grad is None for net in nets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_both_surrogates_have_the_same_gradient(reduction):
    random = torch.Generator().manual_seed(3)
    x, g = torch.randn(2, 4, 5, dtype=torch.float64, generator=random).unbind()
    answers = []
    for kind in ("dot", "mse"):
        point = x.clone().requires_grad_()
        surrogate(point, g, kind, reduction).backward()
        answers.append(point.grad)
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(answers[0], g / (g.numel() if reduction == "mean" else len(g)))


def test_in_bfloat16_only_the_product_keeps_small_gradients():
    random = torch.Generator().manual_seed(4)
    x = torch.randn(1, 4096, generator=random).bfloat16()
    g = (1e-3 * torch.randn(1, 4096, generator=random)).bfloat16()
    lost = {}
    for kind in ("dot", "mse"):
        point = x.clone().requires_grad_()
        surrogate(point, g, kind, "sum").backward()
        lost[kind] = float((point.grad - g).float().norm() / g.float().norm())
    assert lost["dot"] < 1e-2 and lost["mse"] > 0.5


def test_wrong_input_is_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one shape"):
        dmd_gradient(x, x, x[:1])
    with pytest.raises(ValueError, match="weight must be .*'kl' or a function, got 'vsd'"):
        dmd_gradient(x, x, x, weight="vsd")
    with pytest.raises(ValueError, match="gradient must have x's shape"):
        surrogate(x, x[:, :2])
    with pytest.raises(ValueError, match="kind must be"):
        surrogate(x, x, kind="l2")
    with pytest.raises(ValueError, match="reduction must be"):
        surrogate(x, x, reduction="none")
