"""Pairs of samples: made from a reward as it says, the same every time; kept in a file; what is wrong is named."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from fewstep.distill.data import DataRecipe, open_data
from fewstep.distill.draws import Draws
from fewstep.distill.make_pairs import main
from fewstep.distill.methods import DPO
from fewstep.distill.pairs import (
    Groups,
    Pairs,
    check_pairs,
    make_pairs,
    open_pairs,
    paired,
    read_pairs,
    write_pairs,
)
from fewstep.distill.parallel import Ranks
from fewstep.distill.schema import read as read_recipe
from fewstep.distill.student import Student, many_steps
from fewstep.models import GaussianMixture, load, paths
from fewstep.models.checkpoint import read


def right(x):
    """A reward of points: how far to the right they lie."""
    return x[:, 0]


@pytest.fixture(scope="module")
def points():
    """Two clouds with their exact denoiser, and no conditions."""
    d = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [0.05, 0.1]).denoiser(paths.edm())
    d.shape = (2,)
    return many_steps(d, "euler", 6), open_data(DataRecipe("unconditional"), d)


@pytest.fixture(scope="module")
def digits():
    return many_steps(load("digits-edm"), "euler", 3)


def some(n=6, shape=(2,), **more):
    fields = {"winner": torch.ones(n, *shape), "loser": torch.zeros(n, *shape), **more}
    return Pairs(**fields)


def test_the_best_of_a_group_against_its_worst(points):
    base, data = points
    groups = Groups(count=40, size=5)
    pairs = make_pairs(base, right, data, groups)
    assert pairs.winner.shape == pairs.loser.shape == (40, 2) and pairs.scores.shape == (40, 2)
    torch.testing.assert_close(pairs.scores[:, 0], right(pairs.winner))
    torch.testing.assert_close(pairs.scores[:, 1], right(pairs.loser))
    draws = Draws(0 ^ 0xBA15, 0, 0, 200, 200)
    with torch.no_grad():
        x = base.sample(draws.normal("start", (2,)), {}, draws.seed, draws.ids).reshape(40, 5, 2)
    torch.testing.assert_close(pairs.scores[:, 0], right(x.flatten(0, 1)).reshape(40, 5).max(1).values)
    torch.testing.assert_close(pairs.scores[:, 1], right(x.flatten(0, 1)).reshape(40, 5).min(1).values)


def test_pairs_are_decided_by_the_seed_and_not_by_how_many_groups_are_made_at_once(points, monkeypatch):
    base, data = points
    one = make_pairs(base, right, data, Groups(count=12, size=4), seed=3)
    monkeypatch.setattr("fewstep.distill.pairs.AT_ONCE", 4)
    two = make_pairs(base, right, data, Groups(count=12, size=4), seed=3)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    other = make_pairs(base, right, data, Groups(count=12, size=4), seed=4)
    assert not torch.equal(one.winner, other.winner)
    assert torch.equal(two.winner, make_pairs(base, right, data, Groups(count=12, size=4), seed=3).winner)


def test_ranks_share_the_groups(points, monkeypatch):
    base, data = points
    groups = Groups(count=9, size=4)
    monkeypatch.setattr("fewstep.distill.pairs.AT_ONCE", 8)
    whole = make_pairs(base, right, data, groups)
    monkeypatch.setattr("fewstep.distill.pairs.gather_rows", lambda rows, ranks: rows)
    shares = [make_pairs(base, right, data, groups, ranks=Ranks(rank, 2)) for rank in range(2)]
    assert [len(pairs.winner) for pairs in shares] == [6, 3]
    for one, two in zip(whole[:4], zip(*(pairs[:4] for pairs in shares), strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(two))


def test_a_group_in_pairs_as_it_comes(points):
    base, data = points
    pairs = make_pairs(base, right, data, Groups(count=10, size=5, choose="random"))
    assert len(pairs.winner) == 20  # two pairs a group; the fifth sample is alone
    assert (pairs.scores[:, 0] > pairs.scores[:, 1]).all()
    assert len({tuple(x) for x in torch.cat([pairs.winner, pairs.loser]).tolist()}) == 40


def test_labels_by_bradley_terry_are_as_often_wrong_as_they_should_be(points):
    base, data = points
    groups = Groups(count=1500, size=2, choose="random", noise="bradley_terry", temperature=0.7)
    scores = make_pairs(base, right, data, groups).scores.double()
    gap = scores[:, 0] - scores[:, 1]
    right_way = (gap > 0).double()  # the better one has won
    expected = (gap.abs() / (0.7 * gap.square().mean().sqrt())).sigmoid()
    spread = math.sqrt(float((expected * (1 - expected)).mean()) / len(gap))
    assert abs(float((right_way - expected).mean())) < 4 * spread
    assert 0.55 < float(right_way.mean()) < 0.9  # and neither always nor by chance
    certain = make_pairs(base, right, data, Groups(count=1500, size=2, choose="random"))
    assert (certain.scores[:, 0] > certain.scores[:, 1]).all()


def test_pairs_that_are_equal_are_left_out_and_a_constant_reward_is_refused(points):
    base, data = points
    side = make_pairs(base, lambda x: (x[:, 0] > 0).float(), data, Groups(count=40, size=2))
    assert 0 < len(side.winner) < 40 and (side.scores == torch.tensor([1.0, 0.0])).all()
    with pytest.raises(ValueError, match="the same for all samples of every group of 2"):
        make_pairs(base, lambda x: torch.ones(len(x)), data, Groups(count=4, size=2))


def test_both_of_a_pair_have_one_class_and_the_batch_says_which(digits):
    data = open_data(DataRecipe("labels"), digits.d)
    seen = []

    class Watched(type(digits.d)):
        def __init__(self, inner):
            self.__dict__ = inner.__dict__

        def raw(self, x, t, **cond):
            seen.append(cond["label"])
            return super().raw(x, t, **cond)

    pairs = make_pairs(
        Student(Watched(digits.d), digits.table), lambda x: x.flatten(1).mean(1), data, Groups(6, 3)
    )
    assert torch.equal(seen[0], pairs.labels.repeat_interleave(3)) and len(set(pairs.labels.tolist())) > 1
    batch = paired(data, pairs).batch(Draws(0, 1, 0, 8, 8))
    where = [int((pairs.winner == x).flatten(1).all(1).nonzero()) for x in batch.pairs.winner]
    assert torch.equal(batch.cond["label"], pairs.labels[where]) and (batch.null["label"] == 10).all()
    assert torch.equal(batch.pairs.loser, pairs.loser[where]) and batch.real is None


def test_halves_on_disk_are_float32_in_a_batch(digits):
    data, pairs = open_data(DataRecipe("unconditional"), digits.d), some(4, (1, 8, 8))
    half = pairs._replace(winner=pairs.winner.half(), loser=pairs.loser.bfloat16())
    batch = paired(data, half).batch(Draws(0, 1, 0, 8, 8))
    assert batch.pairs.winner.dtype == batch.pairs.loser.dtype == torch.float32


def test_the_unconditional_model_takes_pairs_of_any_class(digits):
    data = open_data(DataRecipe("unconditional"), digits.d)
    found = paired(data, some(4, (1, 8, 8), labels=torch.arange(4)))
    assert (found.batch(Draws(0, 1, 0, 8, 8)).cond["label"] == 10).all()


def test_a_file_is_read_as_it_was_written_and_opened_again_where_it_was_made(points, tmp_path, monkeypatch):
    base, data = points
    monkeypatch.setitem(
        __import__("sys").modules, "their.rewards", type("m", (), {"right": staticmethod(right)})
    )
    method = DPO(reward="their.rewards:right", groups=Groups(8, 4))
    made = open_pairs(method, base, data, tmp_path / "pairs.safetensors").pairs
    again = open_pairs(
        method, base, data, tmp_path / "pairs.safetensors", seed=5
    ).pairs  # there: not made anew
    file = open_pairs(DPO(pairs=str(tmp_path / "pairs.safetensors")), base, data, tmp_path / "none").pairs
    for one, two, three in zip(made, again, file, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert (
        read(tmp_path / "pairs.safetensors")[1]["passes"] == 8 * 4 * 6 and len(list(tmp_path.iterdir())) == 1
    )


def test_a_file_of_anybody_s_will_do(tmp_path):
    save_file(
        {"winner": torch.ones(3, 2), "loser": torch.zeros(3, 2), "more": torch.ones(1)},
        tmp_path / "a.safetensors",
    )
    assert read_pairs(tmp_path / "a.safetensors", (2,)).scores is None


def test_the_shell_makes_a_file_that_a_run_can_be_given(tmp_path, capsys):
    file = tmp_path / "ink.safetensors"
    options = ["reward=ink", "student.steps=2", "method.groups={count: 6, size: 3, noise: none}", "threads=1"]
    assert main(["dpo-digits", *options, "--out", str(file)]) == 0
    assert "6 pairs" in capsys.readouterr().out
    pairs = read_pairs(file, (1, 8, 8))
    assert len(pairs.winner) == 6 and (pairs.scores[:, 0] > pairs.scores[:, 1]).all()
    with pytest.raises(FileExistsError, match="must name a new file"):
        main(["dpo-digits", "reward=ink", "--out", str(file)])
    with pytest.raises(ValueError, match="dmd2 learns from no pairs"):
        main(["dmd2-digits", "--out", str(tmp_path / "b.safetensors")])
    with pytest.raises(ValueError, match="give reward=NAME"):
        main(["dpo-digits", "reward=null", "--out", str(tmp_path / "b.safetensors")])


NAN = torch.ones(6, 2)
NAN[4, 1] = float("nan")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (some(loser=torch.zeros(6, 3)), r"one shape, got \(2,\) and \(3,\)"),
        (some(loser=torch.zeros(5, 2)), "6 winners and 5 losers"),
        (some(0), "is empty"),
        (some(6, (3,)), r"shape \(3,\), and the teacher makes \(2,\)"),
        (some(winner=NAN), "winner holds NaN or infinity, first in pair 4"),
        (some(scores=torch.full((6, 2), float("inf"))), "scores holds NaN"),
        (some(scores=torch.ones(6)), r"scores must have shape \(6, 2\)"),
        (some(labels=torch.ones(6)), "labels must be integers"),
        (some(winner=torch.ones(6, 2, dtype=torch.uint8)), "winner must be floating-point"),
    ],
    ids=lambda value: None if isinstance(value, Pairs) else value[:20],
)
def test_pairs_that_nothing_can_be_learned_from_are_named(pairs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_pairs(pairs, (2,))
    write_pairs(tmp_path / "p.safetensors", pairs)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "p.safetensors", (2,))


def test_files_that_are_none(tmp_path, points, digits):
    base, data = points
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_pairs(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("winner")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_pairs(tmp_path / "text.safetensors")
    save_file({"winner": torch.ones(2, 2), "chosen": torch.ones(2, 2)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="must hold loser, it has chosen, winner"):
        read_pairs(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="give pairs=FILE.safetensors or reward=NAME"):
        open_pairs(DPO(), base, data, tmp_path / "pairs.safetensors")
    labelled = open_data(DataRecipe("labels"), digits.d)
    with pytest.raises(ValueError, match="pairs have no labels, and the model has 10 conditions"):
        paired(labelled, some(3, (1, 8, 8)))
    with pytest.raises(ValueError, match=r"labels of pairs must lie in 0 \.\. 9, got 10"):
        paired(labelled, some(3, (1, 8, 8), labels=torch.tensor([0, 10, 1])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1}, "groups.size 2 or more"),
        ({"count": 0}, "groups.count must be 1 or more"),
        ({"choose": "best"}, "groups.choose"),
        ({"noise": "some"}, "groups.noise"),
        ({"temperature": 0.0}, "groups.temperature"),
    ],
)
def test_groups_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        Groups(**options)


def test_pairs_of_a_file_bring_their_reward_and_not_the_recipe_s(tmp_path):
    two = Pairs(torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    write_pairs(tmp_path / "ink.safetensors", two, {"reward": "-ink"})
    write_pairs(tmp_path / "people.safetensors", two)
    named = {
        name: read_recipe("dpo-digits", [f"pairs={tmp_path / name}.safetensors"])[1].reward
        for name in ("ink", "people", "none")
    }
    assert named == {"ink": "-ink", "people": None, "none": None}
    both = [f"pairs={tmp_path / 'people.safetensors'}", "reward=ink"]
    assert read_recipe("dpo-digits", both)[1].reward == "ink"
    assert read_recipe("dpo-digits")[1].reward == "class:7"
