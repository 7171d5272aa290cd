"""Folders and zips of pictures: EDM's dataset.json, class folders, none; and whatever may be wrong with them, named."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.distill.data.folder import folder
from fewstep.distill.data.pictures import as_bytes, decoded


def picture(value, size=(6, 6), mode="RGB", kind="PNG", **options):
    file = io.BytesIO()
    Image.new(mode, size, value).save(file, kind, **options)
    return file.getvalue()


def laid(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def labels_json(pairs):
    return json.dumps({"labels": pairs}).encode()


EDM = {f"0000{k // 2}/img{k}.png": picture((k, 0, 0)) for k in range(4)}
EDM["dataset.json"] = labels_json([[name, 9 - k] for k, name in enumerate(EDM)])
BY_FOLDER = {
    f"{name}/{k}.png": picture((10 * c + k, 0, 0)) for c, name in enumerate(["cat", "dog"]) for k in (0, 1)
}
FLAT = {f"{k}.png": picture((k, 0, 0)) for k in range(3)}


@pytest.mark.parametrize("shared", ["", "all/"])
@pytest.mark.parametrize("how", ["folder", "zip"])
@pytest.mark.parametrize("files, red, labels, classes", [
    (EDM, [0, 1, 2, 3], [9, 8, 7, 6], None),
    (BY_FOLDER, [0, 1, 10, 11], [0, 0, 1, 1], 2),
    (FLAT, [0, 1, 2], None, None),
])  # fmt: skip
def test_each_layout_in_a_folder_and_a_zip(files, red, labels, classes, how, shared, tmp_path):
    files = {f"{shared}{name}": content for name, content in files.items()}
    files["__MACOSX/._0.png" if how == "zip" else ".cache/0.png"] = b"none of ours"
    items = folder(laid(tmp_path, files) if how == "folder" else zipped(tmp_path / "a.zip", files))
    assert items.count == len(red) and items.shape == (3, 6, 6) and items.slow
    assert items.get(torch.arange(items.count))[:, 0, 0, 0].tolist() == red
    assert (None if items.labels is None else items.labels.tolist()) == labels
    assert items.classes == classes


def test_a_dataset_json_without_labels_gives_none(tmp_path):
    assert folder(laid(tmp_path, {**FLAT, "dataset.json": labels_json(None)})).labels is None


def test_pictures_are_decoded_as_they_are(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(random).save(file, "PNG")
    assert np.array_equal(decoded(file.getvalue(), "a.png").permute(1, 2, 0).numpy(), random)
    grey = picture(7, mode="L")
    assert decoded(grey, "g").shape == (1, 6, 6) and decoded(grey, "g", channels=3).shape == (3, 6, 6)
    assert decoded(picture((9, 8, 7, 0), mode="RGBA"), "t")[:, 0, 0].tolist() == [9, 8, 7]
    jpeg = decoded(picture((200, 100, 50), (16, 16), kind="JPEG", quality=95), "j").double()
    assert (jpeg.mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 2


def test_size_scales_the_short_side_and_keeps_the_middle():
    wide = Image.new("RGB", (40, 10), (255, 0, 0))
    wide.paste((0, 0, 255), (15, 0, 25, 10))
    x = as_bytes(wide, "wide", size=5)
    assert x.shape == (3, 5, 5) and x[2, :, 1:4].min() > 250 and x[0, :, 1:4].max() < 5


@pytest.mark.parametrize("files, said", [
    ({}, "holds no pictures"),
    ({"a.txt": b"words"}, "holds no pictures"),
    ({**FLAT, "cat/9.png": FLAT["0.png"]}, "0.png in none"),
    ({**FLAT, "dataset.json": b"[1"}, "dataset.json must be"),
    ({**FLAT, "dataset.json": labels_json([["0.png", 1]])}, "no label for 1.png"),
    ({**FLAT, "dataset.json": labels_json([[n, 0] for n in [*FLAT, "7.png"]])}, "labels 7.png, which is not there"),
    ({**FLAT, "dataset.json": labels_json([[n, 0.5] for n in FLAT])}, "integers from 0 on, dataset.json has 0.5"),
    ({**FLAT, "dataset.json": labels_json([[n, -1] for n in FLAT])}, "dataset.json has -1 for 0.png"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["folder", "zip"])
def test_wrong_layouts_are_named(files, said, how, tmp_path):
    with pytest.raises(ValueError, match=said):
        folder(laid(tmp_path, files) if how == "folder" else zipped(tmp_path / "a.zip", files))


@pytest.mark.parametrize("bad, said", [
    (FLAT["1.png"][:60], "1.png is not a picture that can be read"),
    (FLAT["1.png"][:50] + b"?" + FLAT["1.png"][51:], "1.png is not a picture that can be read"),
    (b"", "1.png is not a picture"),
    (picture((1, 1, 1), (7, 6)), "1.png is 7 x 6 pixels, and .*0.png is 6 x 6: data.size"),
    (picture(7000, mode="I;16"), "1.png has pixels of kind I;16"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["folder", "zip"])
def test_a_bad_picture_is_named_when_its_turn_comes_and_never_skipped(bad, said, how, tmp_path):
    files = {**FLAT, "1.png": bad}
    items = folder(laid(tmp_path, files) if how == "folder" else zipped(tmp_path / "a.zip", files))
    items.get(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=said):
        items.get(torch.tensor([2, 1]))


def test_colours_among_grey_and_damaged_zips_are_named(tmp_path):
    items = folder(laid(tmp_path / "a", {"0.png": picture(1, mode="L"), "1.png": picture((1, 2, 3))}))
    with pytest.raises(ValueError, match="1.png is in colour"):
        items.get(torch.tensor([1]))
    (tmp_path / "b.zip").write_bytes(b"PK no zip at all")
    with pytest.raises(ValueError, match="b.zip is not a zip"):
        folder(tmp_path / "b.zip")
    hurt = zipped(tmp_path / "c.zip", FLAT)
    content = bytearray(hurt.read_bytes())
    place = content.find(FLAT["1.png"]) + 40
    content[place] ^= 255
    hurt.write_bytes(content)
    with pytest.raises(ValueError, match="1.png is damaged"):
        folder(hurt).get(torch.tensor([1]))
