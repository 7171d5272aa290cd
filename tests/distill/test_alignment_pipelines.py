"""RL fine-tuning of whole pipelines by the shipped recipes but for sizes: prompts, decoded rewards, LoRA."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fewstep.distill.cast import cast
from fewstep.distill.draws import Draws
from fewstep.distill.opening import open_batches, open_teacher
from fewstep.distill.rollouts import grouped
from fewstep.distill.run import run
from fewstep.distill.saved import open_student
from fewstep.distill.schema import read
from fewstep.distill.training import Trainer

pytest.importorskip("peft")
QUICK = [
    "teacher.height=16", "teacher.width=16", "lora.rank=2", "train.batch=4", "train.accumulate=2", "threads=1",
    "report.exam=2", "report.grid=2", "report.checkpoint=1", "report.validate=2", "report.teacher_calls=3",
    "prompts.options.max_sequence_length=16", "method.group=2", "method.rollout.steps=3", "student.steps=3",
    "train.iters=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pipelines.build("sd3").save_pretrained(folder / "sd3")
    (folder / "prompts.txt").write_text("a fox\ntwo hares\na b c\n")
    return folder


def words(data, out):
    return [f"teacher.path={data / 'sd3'}", f"data.path={data / 'prompts.txt'}", f"out={out}",
            f"prompts.cache={data / 'cache'}", *QUICK]  # fmt: skip


@pytest.mark.parametrize(
    "recipe, more",
    [
        ("awm-sd3", ["method.repeats=1", "method.beta=0.1"]),
        ("grpo-sd3", ["method.each=1"]),
        (
            "raft-digits",
            ["method.base=0.5", "train.precision=bf16", "teacher.dtype=bf16", "method.updates=1"],
        ),
    ],
)
def test_a_pipeline_is_tuned_by_a_reward_of_its_pictures(recipe, more, data, tmp_path):
    given = [word for word in words(data, tmp_path) if recipe != "raft-digits" or "accumulate" not in word]
    folder = run(recipe, [*given, *more, "reward=brightness", "method.least_spread=0"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["bad"] == 0 and lines[-1]["flat_groups"] < 1 and 0 <= lines[-1]["reward"] <= 1
    student, told, _ = open_student(folder)
    before = open_teacher(told).net.state_dict()
    tuned = load_file(folder / "student.safetensors")
    assert any(not torch.equal(tuned[k].float(), before[k].float()) for k in tuned)


def test_a_group_s_prompt_is_one_and_the_base_is_the_network_without_its_adapter(data):
    recipe, method = read("awm-sd3", words(data, "runs"))
    teacher = open_teacher(recipe)
    batches = open_batches(recipe, teacher)
    trainer = Trainer(recipe, method, cast(recipe, method, teacher, batches), batches)
    seen = []
    trainer.players = trainer.players._replace(reward=lambda x: seen.append(x) or x.flatten(1).mean(1))
    numbers = trainer.turn()
    assert [tuple(x.shape) for x in seen] == [(2, 4, 8, 8)] * 2 and numbers["kl"] == 0
    assert trainer.turn()["kl"] > 0  # the adapter has moved, and the base has not
    made = grouped(batches.batch(Draws(3, 1, 0, 4, 4)), 2).cond
    for value in made.values():
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            assert torch.equal(value[0], value[1]) and torch.equal(value[2], value[3])
    assert any(
        not torch.equal(v[0], v[2]) for v in made.values() if isinstance(v, torch.Tensor) and v.ndim > 1
    )
