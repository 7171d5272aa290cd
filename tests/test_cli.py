"""The command as a user types it: in processes of its own where that matters, in this one where it does not."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fewstep import cli, samplers
from fewstep.samplers import Table


def run(*words, capsys):
    code = cli.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_is_installed_and_lists_its_verbs():
    shown = subprocess.run(
        [sys.executable, "-m", "fewstep", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(verb in shown for verb in ("sample", "solvers", "table", "teleport-stats", "teacher", "demo"))


def test_solvers_lists_every_exported_solver_with_its_paper(capsys):
    from fewstep.samplers import catalogue

    code, out, _ = run("solvers", capsys=capsys)
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert code == 0
    assert len(catalogue.solvers()) >= 15
    for name, function in catalogue.solvers().items():
        assert function.entry.paper in lines[name]
        assert function.entry.summary, name


def test_solvers_explains_one(capsys):
    _, out, _ = run("solvers", "deis", capsys=capsys)
    assert "2204.13902" in out and "order" in out


def test_table_prints_the_coefficients_and_saves_them(tmp_path, capsys):
    file, picture = tmp_path / "deis.json", tmp_path / "deis.png"
    code, out, _ = run(
        "table", "deis", "--steps", 6, "--path", "vp_linear", "--out", file, "--plot", picture, capsys=capsys
    )
    assert code == 0
    table = Table.load(file)
    assert table.calls == 6 and f"{table.b[2, 0, 0, 0]:+.5g}".lstrip("+") in out.replace("+", "")
    assert Image.open(picture).size[0] > 300


def test_an_autoregressive_model_makes_its_samples_itself_alike_in_any_batch(tmp_path, capsys):
    made = []
    for batch in (12, 5):
        file = tmp_path / f"{batch}.npz"
        words = ("sample", "digits-ar", "--num", 12, "--seed", 3, "--batch", batch, "--out", file)
        code, out = run(*words, capsys=capsys)[:2]
        assert code == 0 and "itself, one place after another" in out
        made.append(np.load(file))
    assert (made[0]["arr_0"] == made[1]["arr_0"]).all()
    assert made[0]["arr_0"].shape == (12, 8, 8, 1) and made[0]["arr_1"].tolist() == [*range(10), 0, 1]


def test_samples_come_as_a_picture_an_archive_or_a_folder(tmp_path, capsys):
    words = (
        "sample",
        "digits",
        "--solver",
        "deis",
        "--order",
        "3",
        "--steps",
        4,
        "--num",
        12,
        "--seed",
        0,
        "--out",
    )
    assert run(*words, tmp_path / "a.npz", capsys=capsys)[0] == 0
    assert run(*words, tmp_path / "a.png", capsys=capsys)[0] == 0
    assert run(*words, tmp_path / "folder", "--batch", 5, capsys=capsys)[0] == 0
    archive = np.load(tmp_path / "a.npz")
    assert archive["arr_0"].shape == (12, 8, 8, 1) and archive["arr_1"].tolist() == [*range(10), 0, 1]
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names[0] == "000000.png" and len(names) == 12
    # a sample is the same alone, in a batch, and in another file
    eighth = np.asarray(Image.open(tmp_path / "folder" / names[7]))
    assert np.array_equal(eighth, archive["arr_0"][7, :, :, 0])
    assert Image.open(tmp_path / "a.png").size[0] >= 300


def test_guidance_is_cfg_at_that_scale_and_1_is_none(tmp_path, capsys):
    import torch

    from fewstep.models import load
    from fewstep.samplers import abm, cfg, grids, sample, starting_noise

    words = ("sample", "digits", "--steps", 3, "--num", 8, "--label", 3, "--grid", "karras", "--out")
    for name, more in {
        "a": (),
        "b": ("--guidance", 1),
        "c": ("--guidance", 2.5),
        "d": ("--guidance", 2.5, "--batch", 3),
    }.items():
        assert run(*words, tmp_path / f"{name}.npz", *more, capsys=capsys)[0] == 0
    a, b, c, d = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in "abcd")
    assert (a == b).all() and (c == d).all() and np.abs(a - c).max() > 20
    guided = cfg(load("digits"), 2.5)
    table = abm(guided.path, grids.karras(guided.path, 3))
    x = sample(guided, starting_noise(0, 8, guided.shape), table, cond={"label": torch.full((8,), 3)})
    wanted = ((x.clamp(-1, 1) + 1) * 127.5)[:, 0].numpy()
    assert np.abs(wanted - c[..., 0]).max() < 1  # rounded to grey levels


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smaple"], "verb must be one of"),
        (["sample", "digits", "--solver", "dies"], "did you mean deis"),
        (["sample", "digitz"], "did you mean"),
        (["sample", "digits", "--solver", "deis", "--order", "9"], "order must be"),
        (["sample", "digits", "--solver", "deis", "--order", "two"], "must be an integer"),
        (["sample", "digits", "--solver", "deis", "--ordre", "2"], "the options of deis are"),
        (["sample", "digits", "--steps", "0"], "positive integer"),
        (["sample", "digits", "--grid", "lgsnr"], "did you mean logsnr"),
        (["sample", "digits", "--num", "0"], "--num"),
        (["sample", "digits", "--label", "10"], "--label must lie in 0 .. 9"),
        (["sample", "digits", "--guidance", "nan"], "scale must be a finite number"),
        (["sample", "digits", "--out", "x.jpg"], ".png or .npz"),
        (["sample", "digits", "--seed", "-1"], "seed must be"),
        (["table", "deis", "--path", "vp"], "path must be one of"),
    ],
)
def test_wrong_input_ends_with_one_clear_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words, capsys=capsys)
    assert code == 2
    assert said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_not_there_is_named_with_how_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, _, err = run("table", "ddim", "--plot", tmp_path / "t.png", capsys=capsys)
    assert code == 2 and "pip install matplotlib" in err and err.count("\n") == 1


def test_a_table_saved_by_the_command_is_plain_json(tmp_path, capsys):
    file = tmp_path / "t.json"
    run("table", "ddim", "--steps", 3, "--out", file, capsys=capsys)
    assert json.loads(file.read_text())["solver"] == "ddim"


def test_teleport_stats_writes_what_skip_takes(tmp_path, capsys):
    from fewstep.models import GaussianStats

    file = tmp_path / "stats.npz"
    words = ["teleport-stats", "--data", "digits", "--rank", 16, "--by-class", "--out", file]
    code, out, _ = run(*words, capsys=capsys)
    assert code == 0 and "1437 images of 1 x 8 x 8, rank 16, 10 classes" in out
    stats = GaussianStats.load(file)
    assert stats.classes == 10 and stats.rank == 16 and stats.shape == (1, 8, 8)
    np.savez(tmp_path / "images.npz", np.zeros((4, 2, 2, 1), dtype=np.uint8))
    words = ["teleport-stats", "--data", tmp_path / "images.npz", "--out", file]
    code, out, _ = run(*words, capsys=capsys)
    assert code == 0 and "rank 4" in out  # as many as there are
    for extra, message in (
        (["--by-class"], "needs labels"),
        (["--out", "a.pt"], "must end in .npz"),
        (["--rank", 0], "rank"),
    ):
        code, _, error = run(*words, *extra, capsys=capsys)
        assert code == 2 and message in error


def test_a_search_by_a_metric(tmp_path, capsys, monkeypatch):
    quick = functools.partial(samplers.search, reference=20, metric_batches=3)
    monkeypatch.setattr(samplers, "search", quick)
    words = ["digits-vp", "--nfe", 2, "--budget", 520, "--batch", 4, "--out", tmp_path / "found.json"]
    code, said, _ = run("search", *words, "--metric", "fd", capsys=capsys)
    assert code == 0 and "its fd is" in said
    assert samplers.Table.load(tmp_path / "found.json").options["search"]["metric"] == "fd"


def test_a_searched_table_is_saved_and_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(samplers, "search", functools.partial(samplers.search, reference=20))  # to be quick
    out = tmp_path / "found.json"
    words = ["digits-flow", "--nfe", 2, "--budget", 400, "--batch", 2, "--out", out]
    code, said, _ = run("search", *words, capsys=capsys)
    assert code == 0 and "on fresh noise its error is" in said and "its fd is" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]
    words = ["sample", "digits-flow", "--table", out, "--num", 2, "--out", tmp_path / "two.png"]
    code, said, _ = run(*words, capsys=capsys)
    assert code == 0 and "by usf, 2 calls each" in said
    code, _, said = run(*words, "--order", 3, capsys=capsys)
    assert code == 2 and "it takes no --order 3" in said
