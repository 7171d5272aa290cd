"""DisBack: the path it records, the order it is walked in, and a run that follows it through a resume."""

from __future__ import annotations

import pytest
import torch

from fewstep.distill.data import DataRecipe, open_data
from fewstep.distill.disback import Backtrack, DisBackRecipe, node_at, record
from fewstep.distill.draws import Draws
from fewstep.distill.players import Players
from fewstep.distill.run import run
from fewstep.distill.student import few_steps
from fewstep.models import load

QUICK = ["train.batch=8", "train.critic_steps=1", "report.exam=20", "report.checkpoint=1", "threads=1"]


def test_targets_come_in_reverse_and_end_with_the_teacher():
    for nodes in (1, 3, 5):
        for interval in (1, 4):
            walked = [node_at(i, nodes, interval) for i in range(nodes * interval + 3)]
            assert walked == sorted(walked, reverse=True)
            assert walked[0] == nodes - 1 and walked[-1] == 0
            assert all(walked.count(k) == interval for k in range(1, nodes))


def test_the_recorded_path_leads_from_the_teacher_to_the_student_and_each_target_is_nearer_than_the_teacher():
    teacher = load("digits-edm")
    players = Players(teacher, few_steps(teacher.copy()), teacher.copy())
    data = open_data(DataRecipe("digits"), teacher)
    recipe = DisBackRecipe(nodes=3, record=6, interval=2)
    nodes = record(players, data, recipe, seed=0, batch=16, lr=1e-3)
    assert len(nodes) == 4
    assert all(torch.equal(nodes[0][k], v) for k, v in teacher.net.state_dict().items())
    # how well each node denoises what the untrained student makes
    made = data.batch(Draws(9, 0, 0, 128, 128))
    x0 = made.generate(players.student).detach()
    t = torch.full((128,), 0.5, dtype=torch.float64)
    x_t = teacher.path.add_noise(x0, t, made.draws.normal("forward", made.shape))
    back = Backtrack(teacher, nodes, interval=2)
    answers = []
    for node in nodes:
        back.teacher.net.load_state_dict(node)
        answers.append(back.teacher(x_t, t, **made.cond))
    errors = [float((a - x0).square().mean()) for a in answers]
    assert errors[3] < errors[2] < errors[0] and errors[1] < errors[0]
    # the gap that the student is driven by, at the start: critic S'_N against its first target and against the teacher
    first, far = (float((answers[3] - answers[k]).abs().mean()) for k in (2, 0))
    assert first < 0.7 * far


def test_the_walk_loads_each_target_when_its_turn_comes():
    teacher = load("digits-edm")
    nodes = [{k: v + n for k, v in teacher.net.state_dict().items()} for n in range(3)]
    players = Players(teacher, few_steps(teacher.copy()), teacher.copy())
    back = Backtrack(teacher, nodes, interval=2)
    players = back.begin(players)
    name = next(iter(nodes[0]))
    assert torch.equal(players.critic.net.state_dict()[name], nodes[2][name])
    for iteration, node in enumerate([1, 1, 0, 0]):
        back.at(iteration)
        assert torch.equal(players.teacher.net.state_dict()[name], nodes[node][name])
    assert torch.equal(teacher.net.state_dict()[name], nodes[0][name])


def test_a_run_follows_its_path_through_a_resume(tmp_path):
    def weights(folder):
        return load(folder / "student.safetensors").net.state_dict()

    on = ["disback.nodes=2", "disback.record=1", "disback.interval=1"]
    whole = weights(run("dmd2-digits", [*QUICK, *on, f"out={tmp_path / 'a'}", "train.iters=2"]))
    for iters in (1, 2):
        folder = run("dmd2-digits", [*QUICK, *on, f"out={tmp_path / 'b'}", f"train.iters={iters}"])
    assert all(torch.equal(whole[k], v) for k, v in weights(folder).items())
    plain = weights(run("dmd2-digits", [*QUICK, f"out={tmp_path / 'c'}", "train.iters=2"]))
    assert any(not torch.equal(plain[k], whole[k]) for k in plain)


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="not with lora"):
        run("dmd2-digits", [*QUICK, "disback.nodes=1", "shard=fsdp", f"out={tmp_path}"])
    with pytest.raises(ValueError, match="this one is exact"):
        run("dmd2-mixture", [*QUICK, "disback.nodes=1", "student.warm_up=1", f"out={tmp_path}"])
