"""LoRA players on one network: each turn's gradients reach its own adapter, with and without recomputation."""

from __future__ import annotations

import pytest
import torch

from fewstep.distill.draws import Draws
from fewstep.distill.lora import CRITIC, STUDENT, merged_state, recomputing, share_network
from fewstep.distill.methods import DMD2, SIM
from fewstep.distill.players import Batch, Players, frozen
from fewstep.distill.run import run
from fewstep.distill.student import few_steps
from fewstep.models import load

pytest.importorskip("peft")


def cast(checkpoint=False, targets=("conv1", "to_q", "time_emb_proj")):
    torch.manual_seed(0)
    base = load("digits-edm")
    plain = base.copy()
    teacher, student, critic, own = share_network(base, rank=2, targets=targets)
    if checkpoint:
        student, critic = recomputing(student), recomputing(critic)
    with torch.no_grad():
        for p in (*own[0], *own[1]):  # the second factors start at 0
            p.add_(0.05 * torch.randn_like(p))
    return plain, Players(teacher, few_steps(teacher)._replace(d=student), critic, adapters=own)


def a_batch(count=4):
    draws = Draws(0, 1, 0, count, count)
    return Batch(draws, (1, 8, 8), {"label": torch.arange(count)}, None, None)


def counted(players):
    """How many parameters of student, critic and base have a gradient that is not 0."""

    def touched(parameters):
        return sum(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)

    own = {id(p) for module in players.adapters for p in module}
    rest = [p for p in players.teacher.net.parameters() if id(p) not in own]
    return touched(players.adapters[0]), touched(players.adapters[1]), touched(rest)


@pytest.mark.parametrize("method", [DMD2(), SIM()], ids=["dmd2", "sim"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_by_role(method, checkpoint):
    _, players = cast(checkpoint)
    student, critic = players.adapters
    with frozen(critic):
        method.student_loss(players, a_batch())[0].backward()
    assert counted(players) == (len(student), 0, 0)
    players.teacher.net.zero_grad()
    with frozen(student):
        method.critic_loss(players, a_batch())[0].backward()
    assert counted(players) == (0, len(critic), 0)


def test_recomputation_changes_no_gradient():
    gradients = []
    for checkpoint in (False, True):
        _, players = cast(checkpoint)
        with frozen(players.adapters[1]):
            SIM().student_loss(players, a_batch())[0].backward()
        gradients.append([p.grad for p in players.adapters[0]])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-8)


def test_choosing_the_adapter_outside_the_recomputed_call_gives_wrong_gradients():
    """The control: the recomputed forward finds the other adapter, and nobody complains."""
    from torch.utils.checkpoint import checkpoint as recomputed

    from fewstep.samplers.adapters import adapter_layers, switched

    _, players = cast()
    net, layers = players.teacher.net, adapter_layers(players.teacher.net)
    x, tau, label = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.tensor([1, 2])

    def gradients(later):
        net.zero_grad()
        with switched(layers, [STUDENT]):
            out = recomputed(net, x, tau, label, use_reentrant=False)
        with switched(layers, [later]):
            out.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in players.adapters[0]])

    right, wrong = gradients(STUDENT), gradients(CRITIC)
    assert (right - wrong).norm() > 0.05 * right.norm()


def test_the_teacher_stays_what_it_was_and_a_merged_student_is_the_student():
    plain, players = cast()
    x, t, label = torch.randn(3, 1, 8, 8), torch.full((3,), 0.7), torch.tensor([1, 2, 3])
    assert torch.equal(players.teacher(x, t, label=label), plain(x, t, label=label))
    ours = players.student.d(x, t, label=label)
    assert not torch.allclose(ours, plain(x, t, label=label))
    plain.net.load_state_dict(merged_state(players.teacher.net, STUDENT))
    torch.testing.assert_close(plain(x, t, label=label), ours, rtol=1e-5, atol=1e-5)


def test_a_run_with_adapters_resumes_and_leaves_a_plain_student(tmp_path):
    quick = ["lora.rank=2", "lora.targets=[conv1]", "train.batch=4", "train.critic_steps=1", "report.exam=20"]
    whole = run("dmd2-digits", [*quick, f"out={tmp_path / 'a'}", "train.iters=2"])
    for iters in (1, 2):
        parts = run("dmd2-digits", [*quick, f"out={tmp_path / 'b'}", f"train.iters={iters}"])
    a, b = (load(folder / "student.safetensors").net.state_dict() for folder in (whole, parts))
    assert all(torch.equal(a[k], b[k]) for k in a)
    teacher = load("digits-edm").net.state_dict()
    moved = {k for k in a if not torch.equal(a[k], teacher[k])}
    assert moved and all("conv1.weight" in k for k in moved)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="nowhere"):
        share_network(load("digits-edm"), targets=["nowhere"])
