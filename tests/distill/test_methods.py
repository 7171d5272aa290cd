"""The methods on a two-dimensional mixture with the exact teacher: fixed points, equivalences, whose gradients flow."""

from __future__ import annotations

import pytest
import torch

from fewstep.distill.discriminator import discriminator_on
from fewstep.distill.draws import Draws
from fewstep.distill.methods import DMD2, SIM, FDistill, PhasedDMD
from fewstep.distill.methods.dmd2 import Gan
from fewstep.distill.methods.phased import phased_student
from fewstep.distill.players import Batch, Players, frozen
from fewstep.distill.student import few_steps
from fewstep.models import GaussianMixture, paths
from fewstep.models.load import build

CONFIG = {"path": {"path": "edm"}, "predicts": "x0", "precond": "edm", "sigma_data": 1.0, "shape": [2],
          "net": {"type": "mlp", "dim": 2, "hidden_size": 16, "depth": 2}}  # fmt: skip
LAYER = "blocks.1"


def a_net(seed):
    torch.manual_seed(seed)
    d = build(CONFIG)
    with torch.no_grad():
        d.net.outputs.weight.normal_(std=0.3)
    return d


def mixture():
    return GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [0.05, 0.1]).denoiser(paths.edm())


def players(method, steps=1, teacher=None, critic=None):
    teacher = teacher or mixture()
    if isinstance(method, PhasedDMD):
        student = phased_student(a_net(1), steps=4, phases=method.phases)
    else:
        student = few_steps(a_net(1), steps)
    critic = critic or a_net(2)
    gan = getattr(method, "gan", None)
    if gan is None or not (gan.student or isinstance(method, FDistill)):
        return Players(teacher, student, critic)
    torch.manual_seed(3)
    heads = discriminator_on(critic, [LAYER], torch.zeros(2, 2), {})
    return Players(teacher, student, critic, heads, critic)


def a_batch(turn=0, first=0, count=16, total=16, seed=0):
    draws = Draws(seed, turn, first, count, total)
    return Batch(draws, (2,), {}, None, draws.normal("data", (2,)))


METHODS = {
    "dmd2": DMD2(),
    "dmd2-gan": DMD2(gan=Gan(student=0.1, layers=[LAYER])),
    "fdistill": FDistill(divergence="js", gan=Gan(student=0.1, layers=[LAYER])),
    "sim": SIM(),
    "sid": SIM(distance="sid"),
    "phased": PhasedDMD(),
}


def touched(net):
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_each_turn_reaches_its_own_networks_alone(name):
    method = METHODS[name]
    p = players(method, teacher=a_net(4))
    everyone = {"teacher": p.teacher.net, "student": p.student.d.net, "critic": p.critic.net}
    if p.discriminator is not None:
        everyone["discriminator"] = p.discriminator
    p.teacher.net.requires_grad_(False)
    with frozen(*p.critic_modules()):
        loss, _ = method.student_loss(p, a_batch())
        loss.backward()
    assert {k for k, net in everyone.items() if touched(net)} == {"student"}
    for net in everyone.values():
        net.zero_grad()
    with frozen(p.student.d.net):
        loss, _ = method.critic_loss(p, a_batch())
        loss.backward()
    expected = {"critic", "discriminator"} & set(everyone)
    assert {k for k, net in everyone.items() if touched(net)} == expected
    assert all(q.requires_grad for k, net in everyone.items() if k != "teacher" for q in net.parameters())


@pytest.mark.parametrize(
    "method", [DMD2(), FDistill(gan=Gan(student=0.0, layers=[LAYER])), SIM(), PhasedDMD()]
)
def test_a_critic_equal_to_the_teacher_moves_nothing(method):
    def largest(p):
        loss, _ = method.student_loss(p, a_batch())
        gradients = torch.autograd.grad(loss, list(p.student.d.net.parameters()), allow_unused=True)
        return max(float(g.abs().max()) for g in gradients if g is not None)

    net = a_net(5)
    # SIM's two halves cancel as numbers of float32 do
    assert largest(players(method, teacher=net, critic=net)) < 1e-5 * largest(players(method, teacher=net))


@pytest.mark.parametrize("divergence", ["rkl", "kl", "pearson"])
def test_f_distill_with_heads_that_know_nothing_is_dmd2(divergence):
    f = FDistill(divergence=divergence, gan=Gan(student=0.0, layers=[LAYER]), bins=0)
    p = players(f)
    with torch.no_grad():
        for q in p.discriminator.parameters():
            q.zero_()
    ours, plain = f.student_loss(p, a_batch())[0], DMD2().student_loss(p, a_batch())[0]
    if divergence == "rkl":
        assert torch.equal(ours, plain)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_only_the_last_call_has_a_graph_and_its_input_is_the_student_s_own(sampler):
    student = few_steps(a_net(1), 3, sampler=sampler)
    seen = []
    ask = student.d.call
    student.d.call = lambda x, tau: seen.append((x.detach(), torch.is_grad_enabled())) or ask(x, tau)
    noise, ids = torch.randn(4, 2), torch.arange(4)
    x0 = student.generate(noise, last=2, seed=7, ids=ids)
    assert [graph for _, graph in seen] == [False, False, True]
    assert x0.requires_grad
    inputs = [x for x, _ in seen]
    seen.clear()
    sampled = student.sample(noise, seed=7, ids=ids)
    assert all(torch.equal(a, b) for a, (b, _) in zip(inputs, seen, strict=True))
    torch.testing.assert_close(sampled, x0.detach())


@pytest.mark.parametrize("name", ["dmd2", "sim"])
def test_many_steps_of_which_the_first_is_drawn_are_one_step(name):
    method, one = METHODS[name], players(METHODS[name], steps=1)
    three = one._replace(student=few_steps(one.student.d, 3, times=[*one.student.table.times[:1], 2.0, 0.5]))
    batches = [a_batch(turn) for turn in range(12)]
    chosen = [batch.draws.choice("step", 3) for batch in batches]
    assert set(chosen) == {0, 1, 2}
    for batch, k in zip(batches, chosen, strict=True):
        ours, plain = (method.student_loss(p, batch)[0] for p in (three, one))
        assert torch.equal(ours, plain) == (k == 0)


@pytest.mark.parametrize("name", ["dmd2", "sim", "phased"])
def test_two_ranks_make_the_loss_of_one(name):
    method = METHODS[name]
    p = players(method, steps=2)
    for loss_of in (method.student_loss, method.critic_loss):
        whole = loss_of(p, a_batch(turn=5))[0]
        halves = [loss_of(p, a_batch(turn=5, first=8 * k, count=8))[0] for k in range(2)]
        torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bins", [0, 10])
def test_a_batch_in_parts_has_the_weights_of_the_whole(bins):
    def method():
        return FDistill(divergence="kl", gan=Gan(student=0.1, layers=[LAYER]), bins=bins)

    whole, cut, blind = method(), method(), method()
    p = players(whole)
    for turn in (3, 7):  # the running means are those of the whole batch as well
        expected, numbers = whole.student_loss(p, a_batch(turn))
        halves = [a_batch(turn, first=8 * k, count=8) for k in range(2)]
        with torch.no_grad():
            weighed = cut.weigh(p, halves)
        losses = torch.stack([cut.student_loss(p, batch)[0] for batch in weighed])
        torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            torch.cat([b.scale for b in weighed]).square().mean(), numbers["weight_square"]
        )
        alone = torch.stack([blind.student_loss(p, batch)[0] for batch in halves]).mean()
        assert abs(alone - expected) > 1e-4 * abs(
            expected
        )  # each half with mean 1 of its own is another loss


def test_draws_cover_every_level_once_and_never_repeat():
    draws = Draws(0, 3, 0, 64, 64)
    share = draws.stratified("level")
    assert sorted((share * 64).long().tolist()) == list(range(64))
    assert torch.equal(Draws(0, 3, 32, 32, 64).stratified("level"), share[32:])
    assert not torch.equal(draws.stratified("level"), Draws(0, 4, 0, 64, 64).stratified("level"))
    counts = torch.bincount(torch.tensor([Draws(0, turn, 0, 1, 1).choice("step", 4) for turn in range(400)]))
    assert (counts - 100).abs().max() < 5 * 75**0.5  # binomial(400, 1/4)


def test_a_phased_student_runs_its_experts_in_turn():
    teacher = a_net(1)
    student = phased_student(teacher, steps=4, phases=2)
    calls = []
    for k, expert in enumerate(student.d.experts):
        ask = expert.call
        expert.call = lambda x, tau, k=k, ask=ask: calls.append(k) or ask(x, tau)
    student.sample(torch.randn(3, 2))
    assert calls == [0, 0, 1, 1]
    method = PhasedDMD()
    calls.clear()
    x_s = method.rollout(student, a_batch())
    assert calls == [0, 0] and x_s.requires_grad
    method.phase = 1
    calls.clear()
    method.rollout(student, a_batch()).sum().backward()
    assert calls == [0, 0, 1, 1]
    assert touched(student.d.experts[1].net) and not touched(student.d.experts[0].net)


def test_wrong_input_is_named():
    p = players(DMD2())
    with pytest.raises(ValueError, match="guidance = 2 needs a null condition"):
        DMD2(guidance=2).student_loss(p, a_batch())
    with pytest.raises(ValueError, match="needs real data"):
        method = METHODS["dmd2-gan"]
        method.critic_loss(players(method), a_batch()._replace(real=None))
    with pytest.raises(ValueError, match="sampler must be 'sde' or 'ode'"):
        few_steps(a_net(1), 2, sampler="ddim")
    with pytest.raises(ValueError, match="last must lie in 0 .. 1"):
        few_steps(a_net(1), 2).generate(torch.zeros(1, 2), last=2)
    with pytest.raises(ValueError, match="multiple of phases"):
        phased_student(a_net(1), steps=3, phases=2)
    with pytest.raises(ValueError, match="purpose must be one of"):
        Draws(0, 0, 0, 1, 1).normal("noise", (2,))
