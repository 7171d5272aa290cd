"""Samples made once: the same bytes however often the making was broken off, and by however many processes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.eval.generate import generate
from fewstep.eval.shards import claim, shard_file
from fewstep.eval.sources import open_images

SCRIPT = Path(__file__).with_name("broken_off.py")
spec = importlib.util.spec_from_file_location("broken_off", SCRIPT)
broken_off = importlib.util.module_from_spec(spec)
spec.loader.exec_module(broken_off)
make, TOLD = broken_off.make, broken_off.TOLD


def digest(folder) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def in_a_process(*words) -> list[str]:
    """What the script prints, run by itself."""
    words = [sys.executable, SCRIPT, *words]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    images = generate(make, folder, 2000, TOLD, per_shard=100, batch=32)
    assert images.count == 2000 and images.seeds == "3: 0-1999" and images.rounding == "nearest"
    return folder


def test_killed_five_times_at_random_the_bytes_are_the_same(unbroken, tmp_path):
    done = [int(count) for count in in_a_process("killed", tmp_path)]
    assert len(done) == 5 and done == sorted(set(done)) and done[-1] < 20, "each got on, none got to the end"
    generate(make, tmp_path, 2000, TOLD, per_shard=100, batch=32)
    assert digest(tmp_path) == digest(unbroken)


def test_what_is_there_is_not_made_again_and_what_is_broken_is(unbroken, tmp_path):
    generate(make, tmp_path, 300, TOLD, per_shard=100, batch=32)
    broken = shard_file(tmp_path, 1)
    content = bytearray(broken.read_bytes())
    content[200] ^= 1
    broken.write_bytes(bytes(content))
    asked = []

    def counted(ids):
        asked.extend(ids.tolist())
        return make(ids)

    generate(counted, tmp_path, 300, TOLD, per_shard=100, batch=32)
    assert asked == list(range(100, 200))
    assert shard_file(tmp_path, 1).read_bytes() == shard_file(unbroken, 1).read_bytes()


def test_more_may_be_asked_for_later(unbroken, tmp_path):
    generate(make, tmp_path, 250, TOLD, per_shard=100, batch=32)
    images = generate(make, tmp_path, 400, TOLD, per_shard=100, batch=32)
    assert images.count == 400
    assert shard_file(tmp_path, 2).read_bytes() == shard_file(unbroken, 2).read_bytes()
    assert generate(make, tmp_path, 100, TOLD, per_shard=100, batch=32).count == 400


def test_two_ranks_make_what_one_makes(unbroken, tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    in_a_process("ranks", tmp_path, port)
    assert digest(tmp_path) == digest(unbroken)


def test_samples_are_images_with_labels_and_names(unbroken):
    images = open_images(unbroken)
    wanted = ((make(torch.tensor([1234]))[0][0] + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(images.read(1234), wanted)
    assert images.labels.tolist() == [i % 10 for i in range(2000)]
    assert images.called(1234).endswith("00012.npz[34]")


def test_other_samples_are_refused_by_what_differs(tmp_path):
    claim(tmp_path / "a", TOLD, 10)
    with pytest.raises(ValueError, match="seed is 3 there and 4 here"):
        claim(tmp_path / "a", {**TOLD, "seed": 4}, 10)
    with pytest.raises(ValueError, match="per_shard is 500 there and 20 here"):
        claim(tmp_path / "a", TOLD, 10, per_shard=20)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and has no plan.json"):
        generate(make, tmp_path / "b", 10, TOLD)
    (tmp_path / "a" / "plan.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(ValueError, match="version 9"):
        open_images(tmp_path / "a")


def test_unfinished_samples_are_not_measured(tmp_path):
    claim(tmp_path, TOLD, 10)
    with pytest.raises(ValueError, match="has 0 of 1 shards"):
        open_images(tmp_path)


def test_what_a_model_makes_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"samples 4 to 7: x has NaN or infinity"):
        generate(lambda ids: (torch.zeros(4, 1, 2, 2) / (ids[0] != 4), None), tmp_path / "a", 8, {}, batch=4)
    with pytest.raises(ValueError, match=r"make gave \(4, 2\) for 4 samples"):
        generate(lambda ids: (torch.zeros(4, 2), None), tmp_path / "b", 8, {}, batch=4)


def test_the_bar_says_images_a_second(tmp_path, capsys):
    generate(make, tmp_path, 10, TOLD, progress=True)
    assert "image/s" in capsys.readouterr().err
    generate(make, tmp_path / "quiet", 10, TOLD)
    assert capsys.readouterr().err == ""
