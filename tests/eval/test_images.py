"""Bytes, grids and files of images."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.eval import images


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_byte_survives_the_round_trip(dtype):
    levels = torch.arange(256, dtype=torch.float64)
    assert images.to_uint8((levels / 127.5 - 1).to(dtype)).tolist() == list(range(256))


def test_rounding_keeps_the_mean():
    x = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = images.to_uint8(x).double() - (x + 1) * 127.5
    # Uniform on [-1/2, 1/2]: standard deviation 1 / sqrt(12); truncation would give a mean of -1/2.
    assert abs(float(error.mean())) < 4 / np.sqrt(12 * 100_000)
    assert float(error.abs().max()) <= 0.5


def test_what_lies_outside():
    x = torch.tensor([-1.5, 1.5])
    assert images.to_uint8(x).tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"x spans \[-1.5, 1.5\]; expected \[-1, 1\]"):
        images.to_uint8(x, outside="refuse")
    for wrong in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="x has NaN or infinity in 1 of 2 values"):
            images.to_uint8(torch.tensor([0.0, wrong]))
    with pytest.raises(TypeError, match="x has dtype torch.int64; expected floats"):
        images.to_uint8(torch.tensor([0, 255]))
    with pytest.raises(ValueError, match="outside is 'wrap'; expected 'clamp' or 'refuse'"):
        images.to_uint8(x, outside="wrap")


def test_tile_is_row_by_row():
    x = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    assert images.tile(x, 3)[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 0]]


def test_grid_shows_every_pixel_in_its_place():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    cells = colours[:, :, None, None].expand(3, 3, 4, 6)
    picture = np.asarray(
        images.grid(cells, 2, labels_rows=["one", "two"], labels_columns=["left", "right"], scale=5)
    )
    where = [np.argwhere((picture == colour.numpy()).all(axis=2)) for colour in colours]
    for spots in where:
        assert len(spots) == 4 * 6 * 25
        assert (spots.max(axis=0) - spots.min(axis=0) + 1).tolist() == [20, 30]
    red, green, blue = (spots.min(axis=0) for spots in where)
    assert red[0] == green[0] < blue[0] and red[1] == blue[1] < green[1]
    # Labels: ink left of the images and above them, and none beyond the picture's edge.
    ink = picture.max(axis=2) < 128
    assert ink[red[0] :, : red[1]].any() and ink[: red[0], red[1] :].any()
    assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any()


def test_grid_magnifies_small_images_only():
    plain = images.grid(torch.zeros(1, 1, 8, 8))
    large = images.grid(torch.zeros(1, 1, 300, 300))
    assert 64 <= min(plain.size) < 100 and 300 <= min(large.size) < 340


def test_long_labels_do_not_run_into_each_other():
    words = ["a label much wider than its image", "another label much wider than its image"]
    narrow = images.grid(torch.zeros(2, 1, 8, 8), labels_columns=["a", "b"])
    wide = images.grid(torch.zeros(2, 1, 8, 8), labels_columns=words)
    top = np.asarray(wide.convert("L"))[:14]
    gaps = np.flatnonzero((top > 128).all(axis=0))
    assert wide.width > 2 * narrow.width and any(wide.width // 3 < g < 2 * wide.width // 3 for g in gaps)


def test_png_npz_and_folder_hold_the_same_bytes(tmp_path):
    x = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = images.to_uint8(x).permute(0, 2, 3, 1).numpy()
    images.save_npz(tmp_path / "x.npz", x, labels=torch.tensor([3, 1, 2]))
    with np.load(tmp_path / "x.npz") as back:
        assert np.array_equal(back["arr_0"], expected) and back["arr_1"].tolist() == [3, 1, 2]
    images.save_folder(tmp_path / "folder", x)
    assert sorted(os.listdir(tmp_path / "folder")) == ["000000.png", "000001.png", "000002.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / "000001.png")), expected[1])
    images.save_png(tmp_path / "x.png", x[2])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), expected[2])
    images.save_png(tmp_path / "grey.png", x[:, :1])
    assert Image.open(tmp_path / "grey.png").size == (14, 10)
    images.save_png(tmp_path / "grid.png", images.grid(x))
    assert sorted(os.listdir(tmp_path)) == ["folder", "grey.png", "grid.png", "x.npz", "x.png"]


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    images.save_folder(tmp_path / "folder", torch.zeros(1, 1, 4, 4))
    with pytest.raises(FileExistsError, match="exists; expected a new or an empty folder"):
        images.save_folder(tmp_path / "folder", torch.zeros(2, 1, 4, 4))
    assert os.listdir(tmp_path / "folder") == ["000000.png"]


def test_a_folder_that_fails_half_way_is_not_there(tmp_path, monkeypatch):
    made = []

    def failing(image, real=images._picture):
        made.append(image)
        if len(made) == 2:
            raise OSError("disk full")
        return real(image)

    monkeypatch.setattr(images, "_picture", failing)
    with pytest.raises(OSError, match="disk full"):
        images.save_folder(tmp_path / "folder", torch.zeros(3, 1, 4, 4))
    assert os.listdir(tmp_path) == []


def test_bad_input_is_named(tmp_path):
    x = torch.zeros(4, 1, 8, 8)
    for wrong in (x[0], x.expand(4, 2, 8, 8), x[:0]):
        with pytest.raises(ValueError, match=r"images has shape .*; expected \(N, C, H, W\)"):
            images.grid(wrong)
    with pytest.raises(ValueError, match="labels_rows is .*; expected 2 labels"):
        images.grid(x, 2, labels_rows=["one"])
    with pytest.raises(ValueError, match="labels_columns is 'ab'; expected 2 labels"):
        images.grid(x, 2, labels_columns="ab")
    with pytest.raises(ValueError, match="columns is 0; expected a whole number"):
        images.grid(x, 0)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); expected \(4,\)"):
        images.save_npz(tmp_path / "x.npz", x, labels=[1, 2, 3])
    assert os.listdir(tmp_path) == []
