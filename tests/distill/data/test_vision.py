"""torchvision's data sets by name, from files that the test writes; where torchvision is missing, from a stand-in."""

from __future__ import annotations

import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.distill.data import DataRecipe, open_source
from fewstep.distill.data.vision import vision
from fewstep.distill.draws import Draws


class Pairs:
    """The interface of torchvision's classes: root, download; (picture, label) by index, targets, classes."""

    classes = ("even", "odd")

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        if root != "here":
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        self.targets = [k % 2 for k in range(6)]
        self.asked = download

    def __len__(self):
        return 6

    def __getitem__(self, row):
        return Image.new("RGB", (4, 4), (row, 0, 0)), self.targets[row]


class ByHand(Pairs):
    def __init__(self, root, split="train"):
        super().__init__(root)


@pytest.fixture
def stand_in(monkeypatch):
    datasets = SimpleNamespace(__all__=("Pairs", "ByHand"), Pairs=Pairs, ByHand=ByHand)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))


def test_a_data_set_by_name(stand_in):
    items = vision("torchvision:Pairs", "here")
    assert items.count == 6 and items.classes == 2 and items.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert items.get(torch.tensor([5, 2]))[:, 0, 0, 0].tolist() == [5, 2]
    source = open_source(DataRecipe("torchvision:ByHand", root="here", size=2))
    assert source.read(Draws(0, 0, 0, 4, 4))[0].shape == (4, 3, 2, 2)


def test_nothing_is_fetched_unless_asked_and_errors_name_things(stand_in):
    with pytest.raises(ValueError, match="data.root = there holds no Pairs .data.download=true fetches it."):
        vision("torchvision:Pairs", "there")
    with pytest.raises(ValueError, match="no data set 'Pair'; did you mean 'Pairs'"):
        vision("torchvision:Pair", "here")
    with pytest.raises(ValueError, match="does not fetch ByHand"):
        vision("torchvision:ByHand", "here", download=True)


def test_without_torchvision_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        vision("torchvision:CIFAR10", "here")


def test_mnist_files_through_torchvision_itself(tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for part in ("train", "t10k"):
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + (7).to_bytes(4, "big") + labels.tobytes()
        )
    items = vision("torchvision:MNIST", str(tmp_path))
    assert items.classes == 10 and items.labels.tolist() == list(range(7))
    assert np.array_equal(items.get(torch.arange(7))[:, 0].numpy(), images)
    with pytest.raises(ValueError, match="holds no CIFAR10"):
        vision("torchvision:CIFAR10", str(tmp_path))


def test_cifar_archives_through_torchvision_itself(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)  # of the real files' sums
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for k in range(1, 6):
        part = {"data": pixels, "labels": [k, 1, 2, 3]}
        (folder / f"data_batch_{k}").write_bytes(pickle.dumps(part))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    items = vision("torchvision:CIFAR10", str(tmp_path))
    assert items.count == 20 and items.classes == 10 and items.labels[4] == 2
    assert np.array_equal(items.get(torch.tensor([6]))[0].numpy(), pixels[2].reshape(3, 32, 32))
