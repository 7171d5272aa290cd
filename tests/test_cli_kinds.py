"""``fewstep sample`` of masked models and flows: the samplers' own samples, in any batch; what does not fit is said."""

import numpy as np
import pytest
import torch

from fewstep import cli
from fewstep.models import load_flow, load_masked
from fewstep.models.pixel_tokens import to_images
from fewstep.samplers import first_hitting, gs_jacobi, starting_noise


def made(tmp_path, capsys, *words):
    file = tmp_path / "made.npz"
    assert cli.main(["sample", *map(str, words), "--out", str(file)]) == 0, capsys.readouterr().err
    with np.load(file) as content:
        return content["arr_0"], content["arr_1"], capsys.readouterr().out


def bytes_of(x):
    return ((x.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)).numpy()


def test_a_masked_model_is_sampled_as_from_python_in_any_batch(tmp_path, capsys):
    words = ("digits-masked", "--num", 12, "--seed", 3, "--parallel", 8, "--order", 2)
    pictures, labels, said = made(tmp_path, capsys, *words, "--batch", 5)
    label = torch.arange(12) % 10
    tokens, _ = first_hitting(
        load_masked("digits-masked"), 12, cond={"label": label}, seed=3, parallel=8, order=2
    )
    expected = bytes_of(to_images(tokens, (1, 8, 8), 17))
    # a network's own sums round by the batch: of 768 draws a few may lie that near to a border
    assert (pictures == expected).mean() > 0.99 and labels.tolist() == label.tolist()
    assert "by first_hitting, 8 calls each at most" in said


def test_ancestral_steps_and_guidance(tmp_path, capsys):
    words = ("digits-masked", "--solver", "masked_ancestral", "--steps", 3, "--num", 4, "--label", 7)
    plain, labels, said = made(tmp_path, capsys, *words)
    guided, _, _ = made(tmp_path, capsys, *words, "--guidance", 3)
    assert labels.tolist() == [7] * 4 and "3 calls" in said and (plain != guided).any()


def test_a_flow_is_inverted_and_denoised(tmp_path, capsys):
    pictures, _, _ = made(tmp_path, capsys, "digits-tarflow", "--num", 3, "--seed", 1)
    flow = load_flow()
    x, _ = gs_jacobi(flow, starting_noise(1, 3, flow.shape), torch.arange(3))
    expected = bytes_of(flow.denoise(x, torch.arange(3)))
    assert abs(pictures.astype(int) - expected).max() <= 1
    sequential, _, said = made(
        tmp_path, capsys, "digits-tarflow", "--num", 3, "--seed", 1, "--solver", "sequential"
    )
    assert abs(sequential.astype(int) - expected).max() <= 1 and "189 calls" in said
    guided, _, _ = made(tmp_path, capsys, "digits-tarflow", "--num", 3, "--seed", 1, "--guidance", 2)
    assert (guided != pictures).any()


@pytest.mark.parametrize(
    "words, said",
    [
        (("digits-masked", "--solver", "deis"), "first_hitting, masked_ancestral"),
        (("digits-masked", "--parallel", "0"), "parallel must be"),
        (("digits-masked", "--prompt", "x"), "--prompt is of no use"),
        (("digits-masked", "--out", "x.gif"), "must end in .png or .npz"),
        (("digits-tarflow", "--label", "11"), "--label must lie in 0 .. 9"),
        (("digits-tarflow", "--order", "3"), "--tolerance"),
    ],
)
def test_what_does_not_fit_is_said(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
