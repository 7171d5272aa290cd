"""Samplers as words: what they run, what they cost, and what is wrong with others."""

from __future__ import annotations

import pytest
import torch

from fewstep.eval.contestants import contestant, separate
from fewstep.models import GaussianMixture, gaussian, paths
from fewstep.samplers import abm, ddim, deis, grids, heun, sample, skip, starting_noise, time_shift

MIXTURE = GaussianMixture([0.4, 0.6], [[-1.0] * 12, [1.0] * 12], 0.1)
PATH = paths.vp_linear()
D = MIXTURE.denoiser(PATH, predicts="eps")
NOISE, IDS = starting_noise(0, 6, (12,), torch.float64), torch.arange(6)


def drawn(text: str, calls: int) -> torch.Tensor:
    return contestant(text).draw(D, NOISE, calls, None, 0, IDS)


def test_words_are_the_functions_they_name():
    assert torch.equal(drawn("deis:order=4,variable=rho@karras", 6),
                       sample(D, NOISE, deis(PATH, grids.karras(PATH, 6), order=4, variable="rho")))  # fmt: skip
    assert torch.equal(drawn("abm", 5), sample(D, NOISE, abm(PATH, grids.vp(PATH, 5))))
    shifted = time_shift(
        D, NOISE, ddim, grids.uniform(PATH, 8), match="marginal", data_variance=1.1, window=60.0
    )
    assert torch.equal(
        drawn("ddim@uniform+time_shift:match=marginal,data_variance=1.1,window=60.0", 8), shifted
    )


def test_a_budget_is_of_calls_whatever_a_step_costs():
    for calls, taken in ((5, 5), (6, 5), (9, 9)):
        assert contestant("heun@karras").calls(PATH, calls) == taken
    assert contestant("heun@karras").table(PATH, 9).calls == heun(PATH, grids.karras(PATH, 5)).calls


def test_teleported_steps_are_not_calls(tmp_path):
    stats = gaussian(MIXTURE.sample(2000).float())
    stats.save(tmp_path / "s.npz")
    text = f"abm+teleport:stats={tmp_path / 's.npz'},steps=3"
    assert contestant(text).calls(PATH, 6) == 6
    assert torch.equal(drawn(text, 6), skip(stats, D, NOISE, abm, grids.vp(PATH, 9), steps=3))


def test_saved_tables_one_a_budget(tmp_path):
    for calls in (4, 7):
        abm(PATH, grids.logsnr(PATH, calls)).save(tmp_path / f"found-{calls}.json")
    found = contestant(f"{tmp_path}/found-{{nfe}}.json")
    assert found.name == "found" and [found.calls(PATH, n) for n in (4, 7)] == [4, 7]
    with pytest.raises(ValueError, match="no table .*found-5.json, of 5 calls"):
        found.table(PATH, 5)
    with pytest.raises(ValueError, match="is a table of 4 calls, not of 7"):
        contestant(f"{tmp_path}/found-4.json").table(PATH, 7)


def test_lists_are_separated_where_samplers_begin():
    text = "deis:order=4,variable=t@karras, abm+teleport:stats=a.npz,steps=2,unipc"
    assert separate(text) == ["deis:order=4,variable=t@karras", "abm+teleport:stats=a.npz,steps=2", "unipc"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dies", "deis"),
        ("deis:ordr=3", "deis has no option 'ordr'; its options are order"),
        ("deis:order", "options are written key=value"),
        ("deis@karas", "karras"),
        ("abm+shift", "after \\+ must come time_shift or teleport, got 'shift'"),
        ("abm+teleport", "teleport needs stats=FILE.npz"),
        ("abm+time_shift:windw=3", "time_shift has no option 'windw'"),
        ("", "a sampler must be some words"),
    ],
)
def test_what_is_wrong_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        contestant(text)
