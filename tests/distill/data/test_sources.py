"""The seam: items, crops and flips follow from (seed, turn, id), reading ahead changes nothing, bad input is named."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewstep.distill.data import DataRecipe, open_data, open_source
from fewstep.distill.data.ahead import ReadAhead
from fewstep.distill.data.source import Items, of_items
from fewstep.distill.draws import Draws

ROWS = torch.arange(50 * 6 * 5, dtype=torch.float32).reshape(50, 1, 6, 5)


def items(**more):
    return Items("fifty", 50, (1, 6, 5), lambda rows: ROWS[rows], torch.arange(50) % 7, **more)


def turn(k, first=0, count=64, total=64, seed=3):
    return Draws(seed, k, first, count, total)


@pytest.mark.parametrize("options", [{}, {"crop": 3, "flip": True}])
def test_ranks_split_a_batch_and_a_turn_is_the_same_whenever_it_is_asked_for(options):
    source = of_items(items(), **options)
    whole, labels = source.read(turn(5))
    source.read(turn(6))
    again = of_items(items(), **options)
    halves = [again.read(turn(5, first, 32)) for first in (32, 0)]
    assert torch.equal(torch.cat([halves[1][0], halves[0][0]]), whole)
    assert torch.equal(torch.cat([halves[1][1], halves[0][1]]), labels)
    assert not torch.equal(source.read(turn(6))[0], whole)
    assert not torch.equal(source.read(turn(5, seed=4))[0], whole)


def test_every_item_comes_as_often_as_any_other():
    source = of_items(items())
    rows = torch.cat([source.read(turn(k, count=500, total=500))[0][:, 0, 0, 0] / 30 for k in range(20)])
    counts = torch.bincount(rows.long(), minlength=50).double()
    # multinomial: chi^2 of 49 degrees has mean 49, standard deviation 9.9
    assert ((counts - 200) ** 2 / 200).sum() < 49 + 5 * 9.9


def test_crops_are_squares_of_the_item_and_flips_are_half():
    source = of_items(items(), crop=3, flip=True)
    x, _ = source.read(turn(0, count=4000, total=4000))
    assert source.shape == (1, 3, 3) and x.shape == (4000, 1, 3, 3)
    step = x[:, 0, 0, 1] - x[:, 0, 0, 0]
    assert set(step.tolist()) == {1.0, -1.0}
    assert ((x[:, 0, 1] - x[:, 0, 0]) == 5).all()
    assert abs((step < 0).double().mean() - 0.5) < 5 * 0.5 / 4000**0.5
    place = torch.minimum(x[:, 0, 0, 0], x[:, 0, 0, 2]) % 30
    for wanted in (0, 1, 2, 5, 15, 17):  # all 4 x 3 corners are as likely
        assert abs((place == wanted).double().mean() - 1 / 12) < 5 * (1 / 12 / 4000) ** 0.5


def test_what_is_mirrored_by_itself_is_taken_from_there():
    twice = items(mirrored=lambda rows: -ROWS[rows] - 1)
    x, _ = of_items(twice, flip=True).read(turn(0))
    plain, _ = of_items(items()).read(turn(0))
    flipped = (x < 0).flatten(1).all(1)
    assert 10 < flipped.sum() < 54
    assert torch.equal(x[~flipped], plain[~flipped]) and torch.equal(x[flipped], -plain[flipped] - 1)


def test_reading_ahead_gives_the_same_and_is_ahead():
    asked, on = [], set()

    def read(draws):
        asked.append(draws.turn)
        on.add(threading.current_thread().name)
        return draws.normal("data", (2,)), None

    ahead = ReadAhead(read, 3)
    for k in (7, 0, 1, 2, 3):  # a single one, as an exam takes it, starts nothing
        assert torch.equal(ahead(turn(k))[0], turn(k).normal("data", (2,)))
    limit = time.monotonic() + 10
    while len(asked) < 8 and time.monotonic() < limit:
        time.sleep(0.001)
    assert sorted(asked) == [0, 1, 2, 3, 4, 5, 6, 7] and asked[:2] == [7, 0]
    assert any(name.startswith("fewstep-data") for name in on)
    ahead(turn(40))  # elsewhere: what was guessed is let go
    assert not ahead._under_way


def test_two_parts_of_a_batch_are_read_ahead_each_by_itself():
    ahead = ReadAhead(lambda draws: (draws.normal("data", (2,)), None), 2)
    for k in range(4):
        for first in (0, 32):
            draws = turn(k, first, 32)
            assert torch.equal(ahead(draws)[0], draws.normal("data", (2,)))
    assert {(d.turn, d.first) for d in ahead._under_way} == {(4, 0), (5, 0), (4, 32), (5, 32)}


def test_a_broken_item_is_told_when_its_turn_comes():
    def read(draws):
        if draws.turn == 3:
            raise ValueError("b.png is not a picture")
        return torch.zeros(1), None

    ahead = ReadAhead(read, 4)
    for k in range(3):
        ahead(turn(k))
    with pytest.raises(ValueError, match="b.png"):
        ahead(turn(3))


def teacher(shape, classes=None):
    return SimpleNamespace(shape=shape, net=SimpleNamespace(null_label=classes), codec=None)


def test_bytes_become_floats_and_labels_conditions(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 4)
    data = open_data(DataRecipe(str(tmp_path / "a.npz")), teacher((3, 4, 4), 5))
    batch = data.batch(turn(0))
    assert batch.real.dtype == torch.float32 and -1 <= batch.real.min() < batch.real.max() <= 1
    assert batch.cond["label"].max() == 3 and (batch.null["label"] == 5).all()
    assert open_data(DataRecipe(str(tmp_path / "a.npz")), teacher((3, 4, 4))).batch(turn(0)).cond == {}


@pytest.mark.parametrize("recipe, who, said", [
    (DataRecipe("digits"), teacher((3, 8, 8), 10), r"shape \(1, 8, 8\), and the teacher makes \(3, 8, 8\)"),
    (DataRecipe("digits"), teacher((1, 8, 8), 9), "labels up to 9, and the teacher knows 9 classes: 0 .. 8"),
    (DataRecipe("digits", labels=False), teacher((1, 8, 8), 10), "no labels, and the teacher knows 10"),
    (DataRecipe("digits", crop=9), teacher((1, 9, 9)), "data.crop must lie in 1 .. 8"),
    (DataRecipe("digits", size=4), teacher((1, 4, 4)), "data.size is for pictures"),
    (DataRecipe("glyphs", flip=True), teacher((3, 32, 32)), "not for glyphs"),
    (DataRecipe("nowhere/at/all"), teacher((1, 8, 8)), "digits, mixture, labels, unconditional, glyphs, .*not there"),
    (DataRecipe("labels"), teacher(None), "knows its shape"),
])  # fmt: skip
def test_data_that_a_teacher_cannot_use_are_named(recipe, who, said):
    with pytest.raises(ValueError, match=said):
        open_data(recipe, who)


def test_labels_out_of_range_and_empty_sets_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, -1])
    with pytest.raises(ValueError, match="labels of a.npz must lie in 0 .. 0, got -1"):
        open_source(DataRecipe(str(tmp_path / "a.npz")))
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match="none of these"):
        open_source(DataRecipe(str(tmp_path / "b.txt")))
