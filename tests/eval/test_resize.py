"""The resizes against values that the tools themselves gave, and against one another."""

from __future__ import annotations

import pytest
import torch

from fewstep.eval.resize import METHODS, resize

# Of IMAGE at 299 x 299: three values (channel, row, column), mean and standard deviation, as computed by
# torch-fidelity 0.4.0 (tensorflow), clean-fid 0.1.35 (clean; its legacy_pytorch for pytorch), EDM2's call (bicubic) and
# Pillow 13 (pillow); `python benchmarks/eval_against_others.py --resizes` computes them anew.
PLACES = ((0, 5, 7), (1, 150, 200), (2, 298, 298))
RECORDED = {
    "tensorflow": ([34.0605, 94.0577, 114.0], 128.01343, 49.05311),
    "clean": ([0.0, 59.4048, 101.0656], 127.52747, 59.53144),
    "pytorch": ([0.0, 73.5333, 114.0], 127.46673, 49.25336),
    "bicubic": ([-1.5429, 59.4049, 101.0656], 127.4515, 59.97778),
    "pillow": ([0.0, 59.0, 101.0], 127.54122, 59.41311),
}


def image() -> torch.Tensor:
    i = torch.arange(3 * 20 * 14)
    return ((i * i * 7 + i * 13) % 256).to(torch.uint8).reshape(1, 3, 20, 14)


@pytest.mark.parametrize("method", RECORDED)
def test_each_is_what_its_tool_computes(method):
    values, mean, std = RECORDED[method]
    ours = resize(image(), 299, 299, method)
    assert ours.dtype == torch.float32 and ours.shape == (1, 3, 299, 299)
    assert [float(ours[0, c, i, j]) for c, i, j in PLACES] == pytest.approx(values, abs=1e-4)
    assert float(ours.double().mean()) == pytest.approx(mean, abs=2e-5)
    assert float(ours.double().std()) == pytest.approx(std, abs=2e-5)


def test_no_two_agree():
    means = [RECORDED[method][1:] for method in RECORDED]
    assert len(set(means)) == len(means)


@pytest.mark.parametrize("method", METHODS)
def test_the_right_size_is_left_alone(method):
    # Bicubic weights at whole pixels are 0 and 1 to float32's rounding.
    assert torch.allclose(resize(image(), 20, 14, method), image().float(), atol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_a_constant_stays_one_and_images_do_not_mix(method):
    two = torch.cat(
        [torch.full((1, 3, 5, 9), 7, dtype=torch.uint8), torch.full((1, 3, 5, 9), 200, dtype=torch.uint8)]
    )
    ours = resize(two, 4, 31, method)
    assert torch.allclose(ours[0], torch.tensor(7.0), atol=1e-4)
    assert torch.allclose(ours[1], torch.tensor(200.0), atol=1e-4)


def test_tensorflow_takes_rows_at_multiples_of_the_ratio():
    ramp = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 4, 1) * 60
    ours = resize(ramp, 6, 1, "tensorflow")[0, 0, :, 0]
    assert torch.allclose(ours, torch.tensor([0.0, 40.0, 80.0, 120.0, 160.0, 180.0]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="resize must be one of tensorflow, pytorch, clean.*got 'bilinear'"):
        resize(image(), 8, 8, "bilinear")
    with pytest.raises(ValueError, match="images are 20 x 14, the network takes 8 x 8, and resize is 'none'"):
        resize(image(), 8, 8, "none")
    with pytest.raises(ValueError, match="images must be bytes"):
        resize(image().float(), 8, 8, "clean")
