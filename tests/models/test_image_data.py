"""Images come in batches in [-1, 1] from the digits, from files of arrays and from folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.models import digits
from fewstep.models.image_data import image_batches


def test_digits():
    batches = list(image_batches("digits", size=500))
    images, labels = digits("train")
    assert [len(x) for x, _ in batches] == [500, 500, 437]
    assert np.array_equal(torch.cat([x for x, _ in batches]), images)
    assert np.array_equal(torch.cat([y for _, y in batches]), labels)


def test_arrays_of_bytes_and_of_floats(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", data, np.arange(5))
    (x, y), *_ = image_batches(tmp_path / "a.npz")
    assert x.shape == (5, 3, 4, 6) and y.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(x[2, 1], torch.as_tensor(data[2, :, :, 1]).float() / 127.5 - 1)
    np.savez(tmp_path / "b.npz", images=x.numpy())
    ((again, none),) = image_batches(tmp_path / "b.npz")
    assert torch.equal(again, x) and none is None


def test_folders(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    for k, name in enumerate(("b.png", "deep/c.PNG", "a.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(data[k]).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    batches = list(image_batches(tmp_path, size=2))
    assert [len(x) for x, _ in batches] == [2, 1]
    got = ((torch.cat([x for x, _ in batches]) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(got, data[[2, 0, 1]])
    Image.new("RGB", (7, 7)).save(tmp_path / "z.png")
    with pytest.raises(ValueError, match="resize them first"):
        list(image_batches(tmp_path))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data must be 'digits'"):
        list(image_batches(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no pictures"):
        list(image_batches(tmp_path))
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="must hold images as arr_0 or images, it has x"):
        list(image_batches(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", np.zeros((3, 2, 2)))
    with pytest.raises(ValueError, match="must be bytes"):
        list(image_batches(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="size must be"):
        list(image_batches("digits", size=0))
