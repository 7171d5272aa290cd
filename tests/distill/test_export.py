"""Exported students: diffusers alone, in a fresh process, makes what the student makes, in as many calls."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fewstep.distill.export import NoStockPipeline, bake_times, clock, main, save, stock
from fewstep.distill.methods.meanflow import mean_flow_student
from fewstep.distill.methods.phased import phased_student
from fewstep.distill.run import run
from fewstep.distill.student import few_steps
from fewstep.models import load
from fewstep.models.load import build

pytest.importorskip("diffusers")
NET = {"type": "unet", "sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4,
       "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}  # fmt: skip
LCM4 = [0.999, 0.749, 0.499, 0.249]


def a_net(path, predicts, classes=None, **more):
    config = {"path": {"path": path}, "predicts": predicts, "shape": [1, 8, 8], **more,
              "net": {**NET, "num_class_embeds": classes}}  # fmt: skip
    torch.manual_seed(0)
    return build(config)


def jumps(classes, steps=1):
    student = mean_flow_student(a_net("flow", "flow", classes, time_scale=3.0), steps)
    torch.nn.init.normal_(student.d.net.gap_embedding.linear_2.weight)
    return student


STUDENTS = {
    "edm one step": lambda: few_steps(a_net("edm", "x0", 11, precond="edm", sigma_data=0.7)),
    "embedded edm": lambda: few_steps(load("digits-edm"), t_max=40.0),
    "edm three steps": lambda: few_steps(a_net("edm", "x0", 11, precond="edm", sigma_data=0.7), 3),
    "vp four steps, any clock": lambda: few_steps(load("digits-vp"), 4),
    "flow one step, classes": lambda: few_steps(load("digits-flow")),
    "average velocity, classes": lambda: jumps(11),
    "average velocity, three steps": lambda: jumps(None, 3),
    "flow three steps by the ODE": lambda: few_steps(a_net("flow", "flow"), 3, "ode"),
    "vp one step, any clock": lambda: few_steps(a_net("vp_linear", "eps", 11, time_scale=7.0)),
    "vp four steps": lambda: few_steps(a_net("vp_linear", "eps", 11, time_scale=1000.0), 4, times=LCM4),
    "vp v, no classes": lambda: few_steps(
        a_net("vp_linear", "v", None, time_scale=1000.0), 2, times=LCM4[::2]
    ),
    "flow one step": lambda: few_steps(a_net("flow", "flow", None, time_scale=1000.0)),
    "flow four steps": lambda: few_steps(a_net("flow", "flow", None, time_scale=1000.0), 4),
}
# One process for all, without fewstep: the noise of every step is read from a file, the calls are counted.
ALONE = """
import sys, json, pathlib, numpy, torch, diffusers
for folder in map(pathlib.Path, sys.argv[1:]):
    arguments = json.loads((folder / "call.json").read_text())
    queue = [torch.from_numpy(z) for z in numpy.load(folder / "noise.npy")]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "student")
    calls = []
    ask = pipe.unet.forward
    pipe.unet.forward = lambda *a, ask=ask, **k: calls.append(1) or ask(*a, **k)
    for module in (sys.modules[type(pipe).__module__], sys.modules[type(pipe.scheduler).__module__]):
        # some draw noise for the last step, too, and multiply it by 0
        module.randn_tensor = lambda shape, **k: (queue.pop(0) if queue else torch.ones(shape)).reshape(shape)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**arguments, output_type="np").images
    numpy.savez(folder / "out.npz", images=images, calls=len(calls))
assert "fewstep" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What we make and where the others' images lie, by the student's name."""
    ours, folders = {}, {}
    for name, make in STUDENTS.items():
        folder, student = tmp_path_factory.mktemp("export"), make()
        classes = student.d.net.null_label
        batch = classes or 4
        arguments = {**save(student, folder / "student", "a student", {}).call, "batch_size": batch}
        draws = torch.randn(student.calls, batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        np.save(folder / "noise.npy", draws.numpy())
        if classes is not None:
            arguments["class_labels"] = list(range(classes))
        (folder / "call.json").write_text(json.dumps(arguments))
        cond = {} if classes is None else {"label": torch.arange(classes)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "fewstep.samplers.loop.normal", lambda seed, ids, shape, row, *_, draws=draws: draws[row]
            )
            ours[name], folders[name] = (student, student.sample(draws[0], cond)), folder
    words = [sys.executable, "-c", ALONE, *map(str, folders.values())]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=110, cwd=tmp_path_factory.mktemp("cwd")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, folders


@pytest.mark.parametrize("name", STUDENTS)
def test_diffusers_alone_makes_the_same_images_in_as_many_calls(name, exported):
    (student, x), folder = exported[0][name], exported[1][name]
    theirs = np.load(folder / "out.npz")
    expected = ((x / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy()
    assert int(theirs["calls"]) == student.calls
    # float32 on both sides; the product of a thousand float32 betas adds about 1e-5 of x0 before it is clamped
    assert float(np.abs(theirs["images"] - expected).max()) < 2e-5 + 1e-5 * float(x.abs().max()) / 2
    assert expected.std() > 0.05  # not all clamped to one value
    assert "from_pretrained" in (folder / "student/README.md").read_text()


def test_baked_times_are_the_net_at_those_times():
    d = load("digits-edm")
    x, label = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    for times, asked in (([2.5], [999.0]), ([60.0, 2.5, 0.3], [999.0, 500.0, 7.0])):
        twin = bake_times(d, times, asked)
        for t, told in zip(times, asked, strict=True):
            expected = d.net(x, torch.full((3,), clock(d, t)), label)
            torch.testing.assert_close(
                twin(x, told, class_labels=label).sample, expected, rtol=1e-4, atol=1e-4
            )
    with pytest.raises(NoStockPipeline, match="cannot be told apart"):
        bake_times(d, [60.0, 2.5], [5.0, 5.0])


@pytest.mark.parametrize(
    "student, reason",
    [
        (lambda: few_steps(load("digits-flow"), 2), "class-conditional flow over pixels of 2 calls"),
        (lambda: few_steps(load("digits-edm"), 2, "ode"), "keeps its noise between steps"),
        (lambda: few_steps(a_net("flow", "flow"), 2, times=[1.0, 0.3]), "are not FlowMatchEuler's"),
        (lambda: few_steps(load("digits-vp"), 4, "ode", LCM4), "keeps its noise between steps"),
        (lambda: phased_student(load("digits-edm"), 4), "its network is a ModuleList"),
    ],
)
def test_what_no_stock_pipeline_runs_is_said(student, reason):
    with pytest.raises(NoStockPipeline, match=reason):
        stock(student())


def test_a_run_is_exported_by_the_command_and_its_checkpoint_is_sampled(tmp_path, capsys):
    from fewstep import cli

    quick = [
        "train.iters=1",
        "train.batch=8",
        "train.critic_steps=1",
        "report.exam=20",
        f"out={tmp_path}",
        "threads=1",
    ]
    folder = run("dmd2-digits", quick)
    assert main([str(folder), str(tmp_path / "student")]) == 0
    assert "a ConsistencyModelPipeline of 1 call, for diffusers alone" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="name a new folder"):
        main([str(folder), str(tmp_path / "student")])
    with pytest.raises(FileNotFoundError, match="has no student.safetensors"):
        main([str(tmp_path), str(tmp_path / "other")])
    words = [
        folder / "student.safetensors",
        "--table",
        folder / "table.json",
        "--num",
        4,
        "--out",
        tmp_path / "a.png",
    ]
    assert cli.main(["sample", *map(str, words)]) == 0
