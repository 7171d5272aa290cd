"""MeanFlow, sCM and ECT where the answer is known: Gaussian data, whose ODE is solved in closed form, in float64.

    consistency function   f(x, t) = m + sqrt(S / (alpha^2 S + sigma^2)) (x - alpha m)
    denoiser               D(x, t) = m + alpha S / (alpha^2 S + sigma^2) (x - alpha m)
    average velocity       (x - x_r) / (t - r),   x_r = mean_r + sqrt(var_r / var_t) (x - mean_t)

A student is one of these, and parameters by which it is off; at 0 it is exact, and loss and gradient must be 0.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from fewstep.distill.draws import Draws
from fewstep.distill.forward_mode import jvp
from fewstep.distill.levels import Times
from fewstep.distill.losses import consistency_tangent, mean_flow_target, next_level, trig_output
from fewstep.distill.losses.trigflow import angle_of, stretch, time_of, trig_velocity
from fewstep.distill.methods import ECT, SCM, MeanFlow
from fewstep.distill.methods.meanflow import mean_flow_student
from fewstep.distill.players import Batch, Players
from fewstep.distill.student import Student, few_steps
from fewstep.models import load, paths
from fewstep.models.denoiser import Denoiser
from fewstep.models.jumps import jumping
from fewstep.models.load import build
from fewstep.samplers import ddim, sample

PATHS = {"edm": paths.edm(), "vp": paths.vp_linear(), "flow": paths.flow()}
M = torch.tensor([0.7, -1.1, 0.2], dtype=torch.float64)
S = torch.tensor([0.3, 1.5, 0.8], dtype=torch.float64)
EXACT, OFF = {}, {"shift": 0.1, "bend": 0.2}


class Off(nn.Module):
    """How far from exact: a shift, and a share of a nonlinear function."""

    def __init__(self, shift: float = 0.0, bend: float = 0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.full((3,), shift, dtype=torch.float64))
        self.bend = nn.Parameter(torch.tensor(bend, dtype=torch.float64))

    def forward(self, x):
        return self.shift + self.bend * torch.tanh(x + 0.3 * x.flip(1))


def moments(path, t, s=S):
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    return alpha * M, alpha * alpha * s + sigma * sigma


def consistency_function(path, s, net, x, t):
    mean, var = moments(path, t, s)
    return M + torch.sqrt(s / var) * (x - mean) + path.sigma(t)[:, None] * net(x)


def posterior_mean(path, s, net, x, t):
    mean, var = moments(path, t, s)
    return M + path.alpha(t)[:, None] * s / var * (x - mean) + path.sigma(t)[:, None] * net(x)


def average_velocity(path, s, net, x, t, gap=None):
    gap = torch.zeros_like(t) if gap is None else gap
    (mean, var), (_, var_r) = moments(path, t, s), moments(path, t - gap, s)
    # (sqrt(var) - sqrt(var_r)) / gap as a quotient that knows its limit at r = t
    change = ((2 * t - gap)[:, None] - (2 - 2 * t + gap)[:, None] * s) / (var.sqrt() + var_r.sqrt())
    return -M + change / var.sqrt() * (x - mean) + net(x)


def made(function, path, predicts="x0", s=S, **off):
    net = Off(**off)
    call = functools.partial(_ask, net, function, path, s)
    return Denoiser(call, path, predicts=predicts, sigma_data=0.7, net=net, shape=(3,))


def _ask(net, function, path, s, x, t, **more):
    return function(path, s, net, x, t, **more)


def bed(student, teacher=None):
    table = few_steps(student, 1).table
    return Players(teacher or made(posterior_mean, student.path), Student(student, table))


def a_batch(count=16, first=0, total=None, turn=0, s=S):
    draws = Draws(3, turn, first, count, total or count)
    return Batch(draws, (3,), {}, None, M + s.sqrt() * draws.normal("data", (3,)).double())


def loss_and_gradient(method, student, batch=None, teacher=None):
    loss, _ = method.student_loss(bed(student, teacher), batch or a_batch())
    gradient = torch.autograd.grad(loss, list(student.net.parameters()))
    return float(loss.detach()), max(float(g.abs().max()) for g in gradient)


def matched(n=64):
    """z and eps (2 n, 3): means 0, second moments the identity, jointly: expectations of quadratics are exact."""
    random = torch.Generator().manual_seed(5)
    draws = torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64, generator=random))[0] * math.sqrt(n)
    draws = torch.cat([draws, -draws])
    draws = draws / draws.square().mean(0).sqrt()
    return draws[:, :3], draws[:, 3:]


# --- fixed points ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_scm_rests_at_the_consistency_function_and_nowhere_else(path):
    method = SCM(warmup=0)
    loss, gradient = loss_and_gradient(method, made(consistency_function, path))
    assert loss < 1e-20 and gradient < 1e-10
    loss, gradient = loss_and_gradient(method, made(consistency_function, path, **OFF))
    assert loss > 1e-2 and gradient > 1e-2
    loss, gradient = loss_and_gradient(
        method, made(posterior_mean, path)
    )  # the teacher is no consistency function
    assert loss > 1e-2


def test_mean_flow_rests_at_the_average_velocity_and_nowhere_else():
    path, method = PATHS["flow"], MeanFlow(share=1.0)
    loss, gradient = loss_and_gradient(method, made(average_velocity, path, "flow"))
    assert loss < 1e-20 and gradient < 1e-10
    loss, gradient = loss_and_gradient(method, made(average_velocity, path, "flow", **OFF))
    assert loss > 1e-2 and gradient > 1e-2


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("source", ["data", "teacher", "teacher_heun"])
def test_ect_rests_at_the_only_point_of_its_data(path, source):
    point = torch.zeros_like(S)  # then every trajectory is straight, and Euler's step exact
    exact = {"teacher": made(posterior_mean, path, s=point), "batch": a_batch(s=point)}
    for turn in (0, 3):  # denoising, and steps
        exact["batch"] = a_batch(s=point, turn=turn)
        method = ECT(source=source, stage=1, k=3.0, weight="x0", c=1e-3)
        loss, gradient = loss_and_gradient(method, made(consistency_function, path, s=point), **exact)
        assert loss < 1e-10 and gradient < 1e-10
        loss, gradient = loss_and_gradient(method, made(consistency_function, path, s=point, **OFF), **exact)
        assert loss > 1e-3 and gradient > 1e-2


@pytest.mark.parametrize("source, order", [("teacher", 2), ("teacher_heun", 3)])
def test_the_exact_consistency_function_leaves_ect_its_solver_s_local_error(source, order):
    path, batch = PATHS["edm"], a_batch(turn=8)
    sizes = []
    for q in (32.0, 64.0, 128.0):  # a step is a share 1 / q of rho
        times = Times(
            "lognormal", mean=-1.1, std=2.0, low=0.2
        )  # below t_min a step goes to the end, of any length
        method = ECT(source=source, q=q, k=0.0, stages=1, weight="x0", c=1e-12, times=times)
        sizes.append(loss_and_gradient(method, made(consistency_function, path), batch)[0])
    for a, b in zip(sizes, sizes[1:], strict=False):
        assert abs(math.log2(a / b) - order) < 0.15


def test_data_alone_hold_scm_at_the_consistency_function_in_the_mean():
    # the velocity of data enters linearly: its mean given x is the ODE's, so E[g (1, x)] is 0 where f is exact
    path, (z, eps) = PATHS["edm"], matched()
    t = torch.full((len(z),), 0.9, dtype=torch.float64)
    means = {}
    for name, off in (("exact", EXACT), ("off", OFF)):
        d = made(consistency_function, path, **off)
        s = angle_of(path, t, d.sigma_data)
        cos, sin, x0, noise = s.cos()[:, None], s.sin()[:, None], M + S.sqrt() * z, d.sigma_data * eps
        x, v = cos * x0 + sin * noise, cos * noise - sin * x0
        scale = s.cos() * s.sin()
        output, change = jvp(lambda x, s, d=d: trig_output(d, x, s), (x, s), (scale[:, None] * v, scale))
        g = consistency_tangent(x, s, output, change, v, d.sigma_data)
        means[name] = max(float(g.mean(0).abs().max()), float((g.T @ x / len(x)).abs().max()))
    assert means["exact"] < 1e-12 < 1e-2 < means["off"]


def test_data_alone_hold_mean_flow_at_the_average_velocity_in_the_mean():
    path, (z, eps) = PATHS["flow"], matched()
    t, gap = (torch.full((len(z),), v, dtype=torch.float64) for v in (0.8, 0.5))
    x0 = M + S.sqrt() * z
    x, v, ones = path.add_noise(x0, t, eps), eps - x0, torch.ones_like(t)
    means = {}
    for name, off in (("exact", EXACT), ("off", OFF)):
        d = made(average_velocity, path, "flow", **off)
        u, change = jvp(lambda x, t, g, d=d: d.raw(x, t, gap=g)[0], (x, t, gap), (v, ones, ones))
        error = u - mean_flow_target(v, change, gap)
        means[name] = max(float(error.mean(0).abs().max()), float((error.T @ x / len(x)).abs().max()))
    assert means["exact"] < 1e-12 < 1e-2 < means["off"]


# --- equivalences and limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_mean_flow_at_r_equal_t_is_flow_matching(source):
    path, method = PATHS["flow"], MeanFlow(source=source, share=0.0, power=0.0)
    d, batch = made(average_velocity, path, "flow", **OFF), a_batch()
    loss, _ = method.student_loss(bed(d), batch)
    t, gap, apart = method.pairs(d, batch)
    assert not apart and bool((gap == 0).all())
    eps = batch.draws.normal("forward", (3,)).double()
    x_t = path.add_noise(batch.real, t, eps)
    v = eps - batch.real if source == "data" else made(posterior_mean, path).velocity(x_t, t)
    torch.testing.assert_close(loss, (d.velocity(x_t, t) - v).square().sum(1).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_tangent_is_the_limit_of_discrete_steps_at_first_order(path):
    d, teacher = made(consistency_function, path, **OFF), made(posterior_mean, path)
    t = torch.linspace(0.2, 0.9, 8, dtype=torch.float64) * (3 if path.name == "edm" else 1)
    s = angle_of(path, t, d.sigma_data)
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    velocity = trig_velocity(x, teacher(stretch(path, t, d.sigma_data)[:, None] * x, t), s)

    def f(x, s):
        return s.cos()[:, None] * x - d.sigma_data * s.sin()[:, None] * trig_output(d, x, s)

    scale = s.cos() * s.sin()
    output, change = jvp(lambda x, s: trig_output(d, x, s), (x, s), (scale[:, None] * velocity, scale))
    g = consistency_tangent(x, s, output, change, velocity, d.sigma_data)
    gaps = []
    for h in (1e-3, 5e-4, 2.5e-4):  # of |f(x, s) - sg f(x - h v, s - h)|^2 / (2 h), weighted as in the paper
        discrete = (f(x, s) - f(x - h * velocity, s - h).detach()).square() / (2 * h)
        weighted = (discrete / (d.sigma_data * s.tan()[:, None])).sum()
        wanted = torch.autograd.grad(-(trig_output(d, x, s) * g).sum(), list(d.net.parameters()))
        got = torch.autograd.grad(weighted, list(d.net.parameters()))
        gaps.append(max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)))
    assert all(abs(math.log2(a / b) - 1) < 0.1 for a, b in zip(gaps, gaps[1:], strict=False)), gaps


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_circle_is_every_path(path):
    t = torch.linspace(0.1, 0.95, 7, dtype=torch.float64)
    s = angle_of(path, t, 0.7)
    torch.testing.assert_close(time_of(path, s, 0.7), t, rtol=1e-12, atol=1e-12)
    k = stretch(path, t, 0.7)
    torch.testing.assert_close(k * s.cos(), path.alpha(t))
    torch.testing.assert_close(k * s.sin() * 0.7, path.sigma(t))
    d, x = made(consistency_function, path, **OFF), torch.ones(7, 3, dtype=torch.float64)
    f = s.cos()[:, None] * x - 0.7 * s.sin()[:, None] * trig_output(d, x, s)
    torch.testing.assert_close(f, d(k[:, None] * x, t))


def test_while_it_warms_up_scm_is_led_by_the_velocity_alone():
    x, s = torch.ones(2, 3), torch.tensor([0.3, 1.2])
    v = torch.randn(2, 3)
    g = consistency_tangent(x, s, v / 0.7, torch.full_like(x, 9.0), v, 0.7, share=0.0)
    assert g.abs().max() < 1e-6  # sd F = dx/ds is the teacher's own output
    assert consistency_tangent(x, s, v / 0.7, torch.full_like(x, 9.0), v, 0.7).abs().max() > 1


def test_scm_s_adaptive_weight_is_one_over_the_mean_of_the_level():
    d = made(consistency_function, PATHS["edm"], **OFF)

    def loss(method):
        return method.student_loss(bed(d), a_batch(64, turn=99))[0]

    method = SCM(warmup=0, c=0.0, bins=1)
    for turn in range(3):
        method.student_loss(bed(d), a_batch(64, turn=turn))
    state = {k: v.clone() for k, v in method.state().items()}
    plain, weighted = loss(SCM(warmup=0, c=0.0, bins=0)), loss(method)
    total, count = (float(v) for v in method.means)
    torch.testing.assert_close(weighted, plain * (count + 8) / (total + 8), rtol=1e-6, atol=0)
    assert total / count < 0.5  # of which the weights above are to make 1
    again = SCM(warmup=0, c=0.0, bins=1)
    again.load_state(state)
    assert torch.equal(loss(again), weighted)


def test_ect_begins_by_denoising_and_shortens_its_steps():
    rho = torch.tensor([0.05, 1.0, 80.0], dtype=torch.float64)
    assert next_level(rho, 1)[0] == 0
    steps = [1 - next_level(rho, stage, q=2.0) / rho for stage in range(4, 9)]
    for a, b in zip(steps, steps[1:], strict=False):
        torch.testing.assert_close(a, 2 * b)
    torch.testing.assert_close(steps[0][2], torch.tensor(1 / 16, dtype=torch.float64))
    d, method = made(consistency_function, PATHS["edm"], **OFF), ECT(k=1e12, stage=5, weight="x0")
    batch = a_batch(turn=4)
    t, _ = batch.level(method.times, d)
    x_t = d.path.add_noise(batch.real, t, batch.draws.normal("forward", (3,)).double())
    wanted = (d(x_t, t) - batch.real).norm(dim=1).mean()
    assert float(t.max()) < 20  # with k so large every first step from there ends at the data
    torch.testing.assert_close(method.student_loss(bed(d), batch)[0], wanted, rtol=1e-5, atol=0)


# --- whose gradients, whose random numbers -----------------------------------------------------------------------


METHODS = {
    "meanflow": (MeanFlow(share=0.5), average_velocity, "flow", "flow"),
    "scm": (SCM(warmup=0, bins=0), consistency_function, "x0", "edm"),
    "ect": (ECT(stage=1), consistency_function, "x0", "edm"),
    "ect-teacher": (ECT(source="teacher_heun", stage=1), consistency_function, "x0", "vp"),
}


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_student_and_pass_through_one_call_of_it(name):
    method, function, predicts, path = METHODS[name]
    student, teacher = (made(function, PATHS[path], predicts, **OFF) for _ in range(2))
    teacher = made(posterior_mean, PATHS[path])
    calls = []
    ask = student.call
    student.call = lambda *a, **k: calls.append(torch.is_grad_enabled()) or ask(*a, **k)
    batch = a_batch(turn=5)
    loss, numbers = method.student_loss(bed(student, teacher), batch)
    assert calls.count(True) == 1 and len(calls) == 2
    assert not any(v.requires_grad for v in numbers.values())
    loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in student.net.parameters())
    assert all(p.grad is None for p in teacher.net.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_make_the_loss_of_one(name):
    method, function, predicts, path = METHODS[name]
    p = bed(made(function, PATHS[path], predicts, **OFF))
    whole = method.student_loss(p, a_batch(turn=5))[0]
    halves = [method.student_loss(p, a_batch(8, 8 * k, 16, turn=5))[0] for k in range(2)]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=1e-9, atol=0)


def test_mean_flow_takes_its_share_of_pairs_wherever_the_batch_is_cut():
    method, d = MeanFlow(share=0.25), made(average_velocity, PATHS["flow"], "flow")
    t, gap, apart = method.pairs(d, a_batch(16))
    assert len(apart) == 4 and int((gap > 0).sum()) == 4
    assert bool((gap <= t).all()) and bool((gap >= 0).all())
    assert [len(method.pairs(d, a_batch(4, 4 * k, 16))[2]) for k in range(4)] == [1, 1, 1, 1]


def test_both_calls_of_ect_drop_out_the_same_units():
    torch.manual_seed(0)
    config = {"path": {"path": "edm"}, "predicts": "x0", "precond": "edm", "sigma_data": 0.5, "shape": [1, 8, 8],
              "net": {"type": "unet", "block_out_channels": [8, 8], "norm_num_groups": 4, "dropout": 0.5}}  # fmt: skip
    d = build(config)
    d.net.train()
    p = Players(d, few_steps(d, 1))
    draws = Draws(0, 0, 0, 8, 8)
    batch = Batch(draws, (1, 8, 8), {}, None, draws.normal("data", (1, 8, 8)))
    near = ECT(q=1e6, k=0.0, stages=1)
    gap = float(near.student_loss(p, batch)[1]["gap"])
    x = batch.real + 1.0
    other = float((d(x, torch.ones(8)) - d(x, torch.ones(8))).abs().mean().detach())
    assert gap < 1e-3 * other


def test_guidance_from_data_drops_some_labels_and_moves_the_rest():
    torch.manual_seed(0)
    d = mean_flow_student(load("digits-flow")).d
    draws = Draws(0, 0, 0, 64, 64)
    label = torch.arange(64) % 10
    batch = Batch(
        draws, d.shape, {"label": label}, {"label": torch.full_like(label, 10)}, torch.randn(64, *d.shape)
    )
    p, t, eps = (
        Players(d, Student(d, few_steps(d, 1).table)),
        torch.full((64,), 0.6),
        torch.randn(64, *d.shape),
    )
    x_t = d.path.add_noise(batch.real, t, eps)
    plain = eps - batch.real
    cond, v = MeanFlow(source="data", guidance=2.0, null=0.5).velocity(p, batch, x_t, t, eps)
    dropped = cond["label"] == 10
    assert abs(int(dropped.sum()) - 32) < 5 * 4  # binomial(64, 1/2)
    assert torch.equal(cond["label"][~dropped], label[~dropped])
    assert torch.equal(v[dropped], plain[dropped]) and not torch.isclose(v, plain)[~dropped].any(1).all()
    u, u0 = d.raw(x_t, t, gap=torch.zeros(64), label=label)[0], d.raw(x_t, t, gap=torch.zeros(64))[0]
    wanted = 1.0 * plain + 0.5 * u + (1 - 1.0 - 0.5) * u0  # omega = (1 - mix) guidance = 1, kappa = 1/2
    torch.testing.assert_close(v[~dropped], wanted[~dropped].detach(), rtol=1e-4, atol=1e-4)


# --- derivatives of networks, and students -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "dit", "mlp"])
def test_forward_mode_passes_through_the_networks_as_they_are_trained(kind):
    torch.manual_seed(0)
    net = {
        "unet": {"block_out_channels": [8, 16], "norm_num_groups": 4, "num_class_embeds": 11, "sample_size": 8},
        "dit": {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_class_embeds": 11},
        "mlp": {"hidden_size": 16, "depth": 1, "num_class_embeds": 11},
    }[kind]  # fmt: skip
    shape = [2] if kind == "mlp" else [1, 8, 8]
    d = build({"path": {"path": "flow"}, "predicts": "flow", "shape": shape, "time_scale": 10.0,
               "net": {"type": kind, "second_time": True, **net}})  # fmt: skip
    with torch.no_grad():
        for p in d.net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    d.net.train()
    x, t, gap = torch.randn(4, *shape), torch.rand(4, dtype=torch.float64), torch.rand(4)
    along = (torch.randn_like(x), torch.ones_like(t), torch.ones_like(gap))

    def ask(x, t, gap):
        return d.raw(x, t, gap=gap, label=torch.arange(4))[0]

    _, change = jvp(ask, (x, t, gap), along)
    assert not change.requires_grad
    inputs = [v.clone().requires_grad_() for v in (x, t, gap)]
    out = ask(*inputs)
    ray = torch.randn_like(out)
    back = torch.autograd.grad((out * ray).sum(), inputs)  # <ray, J along> = <J^T ray, along>
    dot = sum(float((g * a).sum()) for g, a in zip(back, along, strict=True))
    assert abs(float((ray * change).sum()) - dot) < 1e-4 * max(1, abs(dot))


def test_jumps_by_the_average_velocity_are_exact_however_few():
    path, d = PATHS["flow"], made(average_velocity, PATHS["flow"], "flow")
    x = torch.randn(6, 3, dtype=torch.float64)
    exact = M + S.sqrt() * x  # the flow's map from N(0, 1) at t = 1
    for times in ([1.0, 0.0], [1.0, 0.6, 0.25, 0.0]):
        torch.testing.assert_close(
            sample(jumping(d, times), x, ddim(path, times)), exact, rtol=1e-6, atol=1e-6
        )
    plain = sample(made(posterior_mean, path), x, ddim(path, [1.0, 0.6, 0.25, 0.0]))
    assert (plain - exact).abs().max() > 0.05


@pytest.mark.parametrize("sampler, ends", [("ode", (0.0, 0.5, 1.0)), ("sde", (0.0, 1.0))])
def test_a_mean_flow_student_starts_as_its_teacher_and_says_where_it_jumps(sampler, ends):
    teacher = load("digits-flow")
    student = mean_flow_student(teacher, 2, sampler)
    assert student.d.ends == ends and student.calls == 2
    x = torch.randn(3, 1, 8, 8)
    twin = few_steps(teacher, 2, sampler)
    assert torch.equal(student.sample(x, seed=1), twin.sample(x, seed=1))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="it predicts x0 on edm"):
        mean_flow_student(load("digits-edm"))
    for make in (MeanFlow, SCM, ECT):
        with pytest.raises(ValueError, match="source must be"):
            make(source="noise")
        d = made(consistency_function, PATHS["edm"])
        with pytest.raises(ValueError, match="the batch has none"):
            make().student_loss(bed(d), a_batch()._replace(real=None))
    with pytest.raises(ValueError, match="guidance is of a teacher"):
        SCM(source="data", guidance=2.0)
    with pytest.raises(ValueError, match="stage must be 1 or more"):
        next_level(torch.ones(1), 0)
    with pytest.raises(ValueError, match="share must lie in"):
        MeanFlow(share=1.5)
