"""Whole pipelines distilled by the shipped recipes but for sizes: prompts, bf16, recomputation, LoRA, two ranks."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import CheckpointError

from fewstep.distill.cast import cast
from fewstep.distill.export import main as export
from fewstep.distill.lora import recomputing, share_network
from fewstep.distill.methods import SIM
from fewstep.distill.opening import check_guidance, open_batches, open_teacher
from fewstep.distill.parallel import units
from fewstep.distill.players import frozen
from fewstep.distill.run import main as distill
from fewstep.distill.run import run
from fewstep.distill.saved import open_student
from fewstep.distill.schema import read
from fewstep.distill.training import Trainer
from fewstep.models import load
from fewstep.samplers import starting_noise

pytest.importorskip("peft")
PROMPTS = ["a fox", "two hares", "a b c"]
QUICK = [
    "teacher.height=16", "teacher.width=16", "train.batch=4", "train.critic_steps=1", "report.exam=4", "threads=1",
    "optim.warmup=0", "report.grid=2", "report.checkpoint=1", "report.validate=2", "report.teacher_calls=3",
]  # fmt: skip
FLOW = ["prompts.options.max_sequence_length=16"]
# what each of the shipped recipes is run with, beside a tiny teacher; sdxl's LoRA is its README's
RUNS = {
    "sd": ("dmd2-sd15", ["data.path={data}/latents.npz", "prompts.path={data}/prompts.txt"]),
    "sdxl": ("dmd2-sdxl", ["data.path={data}/prompts.jsonl", "method.gan.student=0", "lora.rank=2"]),
    "sd3": ("dmd2-sd3", ["data.path={data}/latents.npz", "prompts.path={data}/prompts.txt", "lora.rank=2", *FLOW,
                         "method.gan={{student: 0.01, layers: ['transformer_blocks.0[1]']}}"]),
    "flux": ("dmd2-flux", ["data.path={data}/prompts.txt", "lora.rank=0", "prompts.scale=2.5", *FLOW]),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(pipelines, tmp_path_factory):
    """Pipelines' folders, prompts and latents; a latent's label is its prompt's number."""
    import diffusers

    folder = tmp_path_factory.mktemp("data")
    for name in RUNS:
        pipe = pipelines.build(name)
        if name == "sd3":  # blocks after the last have no text to answer with
            pipe.transformer = type(pipe.transformer).from_config(
                {**pipe.transformer.config, "num_layers": 2}
            )
        pipe.save_pretrained(folder / name)
    inpaint = pipelines.build("sd")  # of a family that is not supported: its network sees a mask, too
    inpaint.unet = pipelines.text_unet(in_channels=9)
    diffusers.StableDiffusionInpaintPipeline(**inpaint.components).save_pretrained(folder / "inpaint")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"caption": p}) + "\n" for p in PROMPTS))
    (folder / "empty.txt").write_text("\n\n")
    latents = np.random.default_rng(0).standard_normal((6, 4, 8, 8)).astype(np.float32)
    np.savez(folder / "latents.npz", images=latents, labels=np.arange(6) % 3)
    return folder


def words(name, data, out, *more):
    recipe, options = RUNS[name]
    given = [o.format(data=data) for o in options]
    place = [f"teacher.path={data / name}", f"out={out}", f"prompts.cache={data / 'cache'}"]
    return recipe, [*QUICK, *given, *place, *more]


def built(name, data, *more):
    recipe, method = read(*words(name, data, "runs", *more))
    teacher = open_teacher(recipe)
    batches = open_batches(recipe, teacher)
    check_guidance(method, teacher, batches)
    players = cast(recipe, method, teacher, batches)
    return Trainer(recipe, method, players, batches)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["sd", *(pytest.param(name, marks=slow) for name in ("sdxl", "sd3", "flux"))]
)
def test_a_shipped_recipe_is_trained_resumed_and_exported(name, data, tmp_path, capsys):
    for iters in (1, 2):
        folder = run(*words(name, data, tmp_path, f"train.iters={iters}", "optim.lr=0.001"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2] and lines[-1]["bad"] == 0
    assert list((folder / "grids").iterdir())
    student, recipe, _ = open_student(folder)
    before = load(data / name).net.state_dict()
    tensors = load_file(folder / "student.safetensors")
    assert set(tensors) == set(before)
    trained = {k: t for k, t in tensors.items() if t.dtype == torch.float32}
    assert trained if recipe.lora.rank else len(trained) == len(tensors)
    assert any(not torch.equal(t, before[k].bfloat16().float()) for k, t in trained.items())
    assert export([str(folder), str(tmp_path / "student")]) == 0
    assert "for diffusers alone" in capsys.readouterr().out
    again = load(tmp_path / "student", height=16, width=16)
    options = {"max_sequence_length": 16} if "max_sequence_length" in recipe.prompts.options else {}
    if again.codec.distilled:
        options["guidance_scale"] = recipe.prompts.scale
    cond = again.codec.embed("a b", None, **options)
    noise = starting_noise(0, 2, again.shape)
    ours, theirs = (s.sample(noise, cond) for s in (student, student._replace(d=again)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@slow
def test_a_run_that_stopped_is_the_unbroken_one(data, tmp_path):
    options = ["optim.lr=0.001", "train.precision=fp32", "teacher.dtype=fp32", "report.exam=2"]
    whole = run(*words("sd", data, tmp_path / "a", "train.iters=2", *options))
    for iters in (1, 2):
        parts = run(*words("sd", data, tmp_path / "b", f"train.iters={iters}", *options))
    a, b = (load_file(folder / "student.safetensors") for folder in (whole, parts))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_masters_are_float32_and_the_teacher_is_not(data):
    trainer = built("sd", data)
    players = trainer.players
    assert {p.dtype for p in players.teacher.net.parameters()} == {torch.bfloat16}
    before = [p.detach().clone() for p in players.student.d.net.parameters()]
    trainer.turn()
    trained = [*players.student.d.net.parameters(), *players.critic.net.parameters()]
    assert {p.dtype for p in trained} == {torch.float32}
    moved = [not torch.equal(a, b) for a, b in zip(before, players.student.d.net.parameters(), strict=True)]
    # the last times of a step have gradients though the steps before it were made without
    assert sum(moved) > 0.9 * len(moved)


def test_of_the_teacher_s_graph_nothing_is_kept_but_where_the_method_goes_through_it(data):
    kept = {}
    for name, method in (("dmd2", None), ("sim", SIM(guidance=1.75))):
        trainer = built("sd", data, "method.gan.student=0", "train.checkpoint=false")
        inside, count = [False], [0]
        net = trainer.players.teacher.net
        net.register_forward_pre_hook(lambda *_, inside=inside: inside.__setitem__(0, True))
        net.register_forward_hook(lambda *_, inside=inside: inside.__setitem__(0, False))

        def pack(tensor, inside=inside, count=count):
            count[0] += inside[0]
            return tensor

        batch = trainer.data.batch(trainer_draws(trainer))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), frozen(trainer.trained["critic"]):
            with torch.autocast("cpu", torch.bfloat16):
                (method or trainer.method).student_loss(trainer.players, batch)[0].backward()
        kept[name] = count[0]
    assert kept["dmd2"] == 0 and kept["sim"] > 50


def trainer_draws(trainer, count=2):
    from fewstep.distill.draws import Draws

    return Draws(0, 1, 0, count, count)


@pytest.mark.parametrize("name", [pytest.param("sdxl", marks=slow), "sd3"])
def test_adapters_and_their_recomputed_blocks_by_role(name, data):
    """Gradients with and without recomputation, to their own adapter alone; and the control without its memory."""
    gradients = {}
    for how in ("kept", "recomputed", "diffusers' own"):
        trainer = built(name, data, "lora.rank=0", "method.gan.student=0", "train.precision=fp32",
                        "teacher.dtype=fp32", "train.checkpoint=false")  # fmt: skip
        torch.manual_seed(0)
        teacher, student, critic, own = share_network(trainer.players.teacher, rank=2)
        with torch.no_grad():  # the second factors start at 0
            for p in (*own[0], *own[1]):
                p.add_(0.1 * torch.randn_like(p))
        if how == "recomputed":
            student, critic = recomputing(student), recomputing(critic)
        elif how == "diffusers' own":
            teacher.net.enable_gradient_checkpointing()
        players = trainer.players._replace(
            teacher=teacher, student=trainer.players.student._replace(d=student), critic=critic, adapters=own
        )
        batch = trainer.data.batch(trainer_draws(trainer))
        # the control: recomputed with the adapters as they are by then, off
        wrong = pytest.raises(CheckpointError) if how == "diffusers' own" else contextlib.nullcontext()
        with frozen(own[1]), wrong:
            trainer.method.student_loss(players, batch)[0].backward()
        if how == "diffusers' own":
            continue
        assert all(p.grad is None for p in own[1])
        rest = {id(p) for module in own for p in module}
        assert all(p.grad is None for p in teacher.net.parameters() if id(p) not in rest)
        gradients[how] = torch.cat([p.grad.flatten() for p in own[0] if p.grad is not None])
    torch.testing.assert_close(gradients["recomputed"], gradients["kept"], rtol=1e-4, atol=1e-7)


def test_what_is_sharded_as_one(data):
    sizes = {}
    for name in ("sd", "sd3", "flux"):
        net = load(data / name).net
        sizes[name] = sorted({type(unit).__name__ for unit in units(net)})
        order = {id(m): k for k, m in enumerate(units(net))}
        for unit in units(net):  # inner ones first, or the outer would take their parameters
            assert all(order.get(id(m), -1) <= order[id(unit)] for m in unit.modules())
    assert {"BasicTransformerBlock", "ResnetBlock2D"} <= set(sizes["sd"])
    assert sizes["sd3"] == ["JointTransformerBlock"]
    assert sizes["flux"] == ["FluxSingleTransformerBlock", "FluxTransformerBlock"]


# Forked where what they share is imported and no other thread runs, as there are in a test's process.
RANKS = """
import json, os, sys
import diffusers, peft, torch, transformers
from fewstep.distill.run import run

port, calls = json.loads(sys.argv[1])
torch.set_num_threads(1)
children = []
for rank in range(2):
    children.append(os.fork())
    if not children[-1]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            for call in calls:
                run(*call)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 on a CPU came with torch 2.7")
# sd3 and sd with a GAN: a loss of features alone, which no gradient of the root's output announces
@pytest.mark.parametrize(
    "name, lora, parts",
    [
        ("sd3", 2, [2]),
        *(pytest.param(*case, [1, 2], marks=slow) for case in (("flux", 0), ("sdxl", 2), ("sd", 0))),
    ],
)
def test_two_ranks_with_a_sharded_pipeline_make_the_losses_of_one(name, lora, parts, data, tmp_path):
    options = [
        f"lora.rank={lora}",
        "shard=fsdp",
        "train.precision=fp32",
        "teacher.dtype=fp32",
        "optim.lr=0.001",
    ]
    alone = run(*words(name, data, tmp_path / "one", "train.iters=2", *options))
    calls = [words(name, data, tmp_path / "two", f"train.iters={n}", *options) for n in parts]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = json.dumps([port, calls])
    done = subprocess.run([sys.executable, "-c", RANKS, told], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    both = tmp_path / "two" / alone.name
    for a, b in zip(*(map(json.loads, (f / "metrics.jsonl").open()) for f in (alone, both)), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4 * max(1, abs(a["loss"]))
    theirs = load_file(both / "student.safetensors")
    for key, tensor in load_file(alone / "student.safetensors").items():
        torch.testing.assert_close(
            theirs[key], tensor, rtol=0, atol=2.5e-3
        )  # Adam's first steps are of size lr


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("flux", "method.guidance=3.5", "guidance distilled: say method.guidance=1 prompts.scale=3.5"),
        ("flux", "prompts.negative=blurry", "prompts.negative must be ''"),
        ("sd", "prompts.scale=3.0", "prompts.scale = 3.0 is told to networks with guidance distilled"),
        ("sd", "method.gan.layers=[nowhere]", "names must be submodules of UNet2DConditionModel; it has no nowhere"),
        ("sd3", "method.gan.layers=['transformer_blocks.0[7]']", r"transformer_blocks.0\[7\] gave nothing"),
        ("sd", "data.path={data}/prompts.txt", "both hold prompts: give one"),
        ("sdxl", "data.path={data}/empty.txt", "empty.txt holds no prompts"),
        ("sdxl", "data.path={data}/nowhere.txt", "nowhere.txt is no file"),
        ("sdxl", "data.path=labels", "takes text: data.path .* must be a .txt or .jsonl of prompts"),
        ("sdxl", "method.gan.student=0.1", "needs real samples, and data.path = .*prompts.jsonl has none"),
        ("sdxl", "train.precision=fp32", "teacher.dtype = bf16 is for train.precision = bf16"),
        ("sd", "student.times=[1200]", "times must"),
        ("sd", "teacher.path={data}", "has no model_index.json"),
        ("sd", "teacher.path={data}/inpaint", "InpaintPipeline, asked for .*prompt.* alone: .*what can be"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(name, override, message, data, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        built(name, data, override.format(data=data))


def test_a_teacher_without_text_takes_no_prompts(data):
    recipe, _ = read("dmd2-digits", [f"data.path={data / 'prompts.txt'}"])
    with pytest.raises(ValueError, match="holds prompts, and the teacher digits-edm takes no text"):
        open_batches(recipe, open_teacher(recipe))


def test_a_dry_run_says_what_it_would_train(data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, options = words("sdxl", data, tmp_path / "runs")
    assert distill([recipe, "--dry-run", *options]) == 0
    assert "4 calls at [999." in capsys.readouterr().out and list(tmp_path.iterdir()) == []
