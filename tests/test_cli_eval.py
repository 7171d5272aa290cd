"""``fewstep eval`` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fewstep import cli
from fewstep.eval import read_statistics, save_folder, save_npz
from fewstep.models.digits import digits


def run(*words, capsys):
    code = cli.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Digits in a folder and in an .npz, and the statistics of others with their features."""
    folder = tmp_path_factory.mktemp("eval")
    images, labels = digits("held_out")
    save_folder(folder / "out", torch.as_tensor(images[:121]))
    save_npz(folder / "out.npz", torch.as_tensor(images[:121]), labels[:121])
    assert (
        cli.main(
            ["eval", "stats", "--data", "digits:train", "--out", str(folder / "s.npz"), "--keep-features"]
        )
        == 0
    )
    assert cli.main(["eval", "stats", "--data", "digits:train", "--out", str(folder / "moments.npz")]) == 0
    return folder


def test_fid_of_a_folder_is_printed_with_its_protocol_and_stored(samples, tmp_path, capsys):
    words = ("eval", "fid", "--samples", samples / "out", "--ref")
    code, out, err = run(
        *words, samples / "s.npz", "--metrics", "fd,kid,prdc", "--out", tmp_path / "n.json", capsys=capsys
    )
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        "fd",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
    ]
    reference = read_statistics(samples / "s.npz")
    assert all(f"num=121 reference={reference.name}" in line and "resize=none" in line for line in lines)
    stored = json.loads((tmp_path / "n.json").read_text())
    assert [record["metric"] for record in stored] == [line.split(" = ")[0] for line in lines]
    assert len(stored[0]["weights"]) == 64 and stored[0]["features"] == "digits"
    # images as the reference are the same number, and moments alone do for FD
    values = [
        float(run(*words, ref, capsys=capsys)[1].split()[2])
        for ref in ("digits:train", samples / "moments.npz")
    ]
    assert values == pytest.approx([stored[0]["value"]] * 2, rel=1e-5)
    jackknifed = run(*words, samples / "moments.npz", "--jackknife", 2, capsys=capsys)
    assert jackknifed[0] == 2 and "more rows than dimensions must be left" in jackknifed[2]


def test_a_model_is_sampled_once_and_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("eval", "fid", "--ref", "digits", "--model", "digits-flow", "--steps", 2, "--batch", 16)
    code, out, err = run(*words, "--num", 64, capsys=capsys)
    assert code == 0 and "num=64 reference=digits seeds=0: 0-63" in out
    (folder,) = (tmp_path / "samples").iterdir()
    assert (
        folder.name.startswith("digits-flow-abm-2-")
        and f"64 samples, 2 calls each: samples/{folder.name}" in err
    )
    made = (folder / "00000.npz").stat().st_mtime_ns
    assert (
        run(*words, "--num", 64, capsys=capsys)[1] == out
        and (folder / "00000.npz").stat().st_mtime_ns == made
    )
    assert run("eval", "fid", "--ref", "digits", "--samples", folder, capsys=capsys)[1] == out
    code, _, err = run(*words, "--num", 64, "--solver", "deis", "--keep", folder, capsys=capsys)
    assert code == 2 and "holds other samples: solver is 'abm' there and 'deis' here" in err
    assert "--num is needed with --model" in run(*words, capsys=capsys)[2]
    assert "either --samples" in run(*words, "--samples", folder, capsys=capsys)[2]
    assert "unknown argument '--ordr'" in run(*words, "--num", 64, "--ordr", 2, capsys=capsys)[2]


def test_what_differs_is_refused_and_named(samples, capsys):
    words = ("eval", "fid", "--samples", samples / "out.npz", "--ref", samples / "moments.npz")
    code, _, err = run(*words, "--resize", "clean", capsys=capsys)
    assert code == 2 and "do not compare: resize is 'clean' in one and 'none' in the other" in err
    code, _, err = run(*words, "--metrics", "kid", capsys=capsys)
    assert code == 2 and "fewstep eval stats --keep-features" in err
    code, _, err = run(*words, "--metrics", "fid", capsys=capsys)
    assert code == 2 and "--metrics must be among fd" in err
    code, _, err = run(*words, "--num", 1000, capsys=capsys)
    assert code == 2 and "num is 1000; expected at most 121" in err
    code, _, err = run("eval", "fdi", capsys=capsys)
    assert code == 2 and "the verb of eval must be one of fid, suite, stats" in err
    code, _, err = run("eval", "stats", "--data", "digits", "--out", "stats.pt", capsys=capsys)
    assert code == 2 and "--out must end in .npz" in err


def test_statistics_of_others_are_taken_at_their_word(samples, tmp_path, capsys):
    with np.load(samples / "s.npz") as file:
        np.savez(tmp_path / "edm.npz", mu=file["mu"], sigma=file["sigma"])
    code, out, err = run(
        "eval", "fid", "--samples", samples / "out", "--ref", tmp_path / "edm.npz", capsys=capsys
    )
    assert code == 0 and "says nothing of its features, weights, resize; taken to be as here" in err
    ours = run("eval", "fid", "--samples", samples / "out", "--ref", samples / "s.npz", capsys=capsys)[1]
    assert out.split()[2] == ours.split()[2]


def test_broken_pictures_are_left_out_where_told(samples, tmp_path, capsys):
    save_folder(tmp_path / "out", torch.as_tensor(digits("held_out")[0][:20]))
    (tmp_path / "out" / "000003.png").write_bytes(b"broken")
    words = ("eval", "stats", "--data", tmp_path / "out", "--out", tmp_path / "s.npz")
    code, _, err = run(*words, capsys=capsys)
    assert code == 2 and "1 of 20 images of out cannot be read" in err and not (tmp_path / "s.npz").exists()
    code, out, err = run(*words, "--skip-bad", capsys=capsys)
    assert code == 0 and "left out, since they could not be read: 1 (" in err and "num=19" in out
    assert read_statistics(tmp_path / "s.npz").gaussian.n == 19


def test_weights_that_are_nowhere_are_asked_for(tmp_path, monkeypatch, capsys):
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip("torch-fidelity does not import")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.delenv("FEWSTEP_INCEPTION", raising=False)
    words = ("eval", "stats", "--data", "digits", "--features", "inception", "--no-download")
    code, _, err = run(*words, "--out", tmp_path / "s.npz", capsys=capsys)
    assert code == 2 and all(
        part in err for part in ("--weights FILE", "FEWSTEP_INCEPTION", "cache", "download from")
    )


def test_without_torch_fidelity_the_hint_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    code, _, err = run("eval", "stats", "--data", "digits", "--features", "inception", capsys=capsys)
    assert code == 2 and "pip install torch-fidelity (or fewstep[eval])" in err


def test_torchrun_gives_what_one_process_gives(samples, tmp_path):
    words = [
        "eval",
        "fid",
        "--samples",
        samples / "out.npz",
        "--ref",
        samples / "moments.npz",
        "--count",
        101,
    ]
    # Both in fresh processes: what other tests left of threads decides how float32 features round.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one", []), ("two", two)):
        given = [sys.executable, *launcher, "-m", "fewstep", *words, "--batch", 16, "--device", "cpu"]
        given += ["--out", tmp_path / f"{name}.json"]
        done = subprocess.run(
            list(map(str, given)), capture_output=True, text=True, env=environment, timeout=110
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("fd = ") == 1
    (one,), (two,) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two.pop("value") == pytest.approx(one.pop("value"), rel=1e-10)
    assert two == one
