"""SIM against its closed form, and against what it must not be; SiD beside it."""

import math

import numpy as np
import pytest
import torch

from fewstep.distill.losses import sid_loss, sim_loss


def sim_on(bed, stop_x_t=False, **kw):
    """SIM(L2) of the score difference: the weight (alpha / sigma^2)^2 turns x0 units into scores."""

    def loss(x0, x_t):
        x_t = x_t.detach() if stop_x_t else x_t
        real, fake = (net(x_t, bed.t) for net in (bed.teacher, bed.critic))
        return sim_loss(x0, real, fake, "l2", weight=(bed.alpha / bed.sigma**2) ** 2)

    return loss


def test_l2_gives_the_closed_gradient(bed, student_gradients):
    on_a, on_b = student_gradients(bed, sim_on(bed))
    inverse_p, inverse_q = torch.linalg.inv(bed.p), torch.linalg.inv(bed.q)
    shift = bed.alpha * (bed.b - bed.m)
    # E[u y'] = q p^-1 - 1 for u = x_t - alpha b, and S_f moves with A by q^-1 dq q^-1 u
    both = (inverse_p - inverse_q) @ inverse_q
    torch.testing.assert_close(on_a, 2 * bed.alpha**2 * (both + both.T) @ bed.a, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(on_b, 2 * bed.alpha * inverse_q @ inverse_p @ shift, rtol=1e-9, atol=1e-10)
    # the Fisher divergence whose sampling law is not stopped has another gradient
    assert (on_b - 2 * bed.alpha * inverse_p @ inverse_p @ shift).norm() > 0.1 * on_b.norm()


def test_it_needs_the_graph_through_the_networks_inputs(bed, student_gradients):
    _, right = student_gradients(bed, sim_on(bed))
    _, cut = student_gradients(bed, sim_on(bed, stop_x_t=True))
    assert (right - cut).norm() > 0.1 * right.norm()


def test_the_score_projection_identity(bed):
    # E[u(x_t)^T (S_f - grad log q(x_t | x0))] = 0 for the critic's score and any linear u
    x0 = bed.z @ bed.a.T + bed.b
    x_t = bed.alpha * x0 + bed.sigma * bed.eps
    matrix = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    residual = bed.critic(x_t, bed.t) - x0
    assert abs(float((x_t @ matrix.T * residual).sum(1).mean())) < 1e-9


@pytest.mark.parametrize("distance", ["l2", "huber", "log"])
def test_one_dimension_by_quadrature(distance):
    """The gradient of the divergence E_sg[q] d(S_f - S_r), for any d, the critic moving with the student."""
    sigma, mean, variance, c = 0.7, 0.3, 1.2**2, 0.3
    slope = {
        "l2": lambda y: y**2,
        "huber": lambda y: (y**2 + c**2).sqrt() - c,
        "log": lambda y: 0.5 * torch.log1p((y / c) ** 2),
    }[distance]
    x = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.9, -0.4))
    spread = a**2 + sigma**2
    law = (torch.exp(-0.5 * (x - b) ** 2 / spread) / torch.sqrt(2 * math.pi * spread)).detach()
    # in x0 units: D_f - D_r = sigma^2 (S_f - S_r)
    y = sigma**2 * (-(x - b) / spread + (x - mean) / (variance + sigma**2))
    exact = torch.stack(torch.autograd.grad((law * slope(y)).sum() * (x[1] - x[0]), (a, b)))

    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(80))
    w = torch.outer(weights, weights).reshape(-1) / weights.sum() ** 2
    z, eps = (v.reshape(-1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.9, -0.4))
    x0 = a * z + b
    x_t = x0 + sigma * eps
    fake = x_t - sigma**2 * (x_t - b.detach()) / (a.detach() ** 2 + sigma**2)
    real = x_t - sigma**2 * (x_t - mean) / (variance + sigma**2)
    loss = len(w) * sim_loss(x0[:, None], real[:, None], fake[:, None], distance, c=c, weight=w)
    got = torch.stack(torch.autograd.grad(loss, (a, b)))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def test_sid_at_alpha_one_is_half_of_l2():
    random = torch.Generator().manual_seed(1)
    x0, real, fake = torch.randn(3, 4, 5, dtype=torch.float64, generator=random).unbind()
    torch.testing.assert_close(sid_loss(x0, real, fake, 1.0, 1.0), sim_loss(x0, real, fake, "l2") / 2)
    more = sid_loss(x0, real, fake, 1.2, 1.0)
    torch.testing.assert_close(
        more, sid_loss(x0, real, fake, 1.0, 1.0) - 0.2 * (real - fake).square().sum(1).mean()
    )


def test_huber_lies_between_l2_and_the_unit_direction():
    random = torch.Generator().manual_seed(2)
    x0, real, fake = torch.randn(3, 4, 5, dtype=torch.float64, generator=random).unbind()
    wide, c = sim_loss(x0, real, fake, "huber", c=1e4), 1e4 * math.sqrt(5)
    torch.testing.assert_close(wide * 2 * c, sim_loss(x0, real, fake, "l2"), rtol=1e-6, atol=0)
    y = fake - real
    unit = -(y / y.norm(dim=1, keepdim=True) * (fake - x0)).sum(1).mean()
    torch.testing.assert_close(sim_loss(x0, real, fake, "huber", c=1e-6), unit, rtol=1e-6, atol=0)


def test_a_user_s_distance_is_differentiated():
    random = torch.Generator().manual_seed(3)
    tensors = torch.randn(3, 4, 5, dtype=torch.float64, generator=random).unbind()
    answers = []
    for distance in ("l2", lambda y: y.square().sum(1)):
        x0, real, fake = (v.clone().requires_grad_() for v in tensors)
        loss = sim_loss(x0, real, fake, distance)
        answers.append(
            torch.stack([loss.detach().expand(4, 5), *torch.autograd.grad(loss, (x0, real, fake))])
        )
    torch.testing.assert_close(*answers)


def test_equal_networks_give_nothing_whatever_x0():
    x0 = torch.randn(4, 5, requires_grad=True)
    estimate = torch.randn(4, 5)
    for loss in (sim_loss(x0, estimate, estimate), sid_loss(x0, estimate, estimate, weight=1.0)):
        assert torch.autograd.grad(loss, x0)[0].abs().max() == 0


def test_wrong_input_is_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="distance must be"):
        sim_loss(x, x, x, "l1")
    with pytest.raises(ValueError, match="one shape"):
        sim_loss(x, x, x[:1])
    with pytest.raises(ValueError, match="weight must be"):
        sid_loss(x, x, x, weight="dmd")
