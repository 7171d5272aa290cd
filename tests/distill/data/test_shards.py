"""Tar shards: read at random by an index made once, labels in cls or json, and what is wrong with them named."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from fewstep.distill.data import DataRecipe, open_source
from fewstep.distill.data.shards import indexed, shards
from fewstep.distill.draws import Draws


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(red, kind="PNG", size=(6, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, kind)
    return file.getvalue()


def tarred(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(first, n, label="cls"):
    found = {}
    for k in range(first, first + n):
        found[f"{k:06d}.png"] = picture(k)
        if label == "cls":
            found[f"{k:06d}.cls"] = str(k % 5).encode()
        elif label == "json":
            found[f"{k:06d}.json"] = json.dumps({"label": k % 5, "caption": "a"}).encode()
    return found


def two(tmp_path, label="cls"):
    tarred(tmp_path / "s-00.tar", members(0, 4, label))
    tarred(tmp_path / "s-01.tar", members(4, 3, label))
    return tmp_path


@pytest.mark.parametrize("label", ["cls", "json", None])
@pytest.mark.parametrize("name", ["", "s-{00..01}.tar", "s-*.tar"])
def test_all_samples_of_all_shards_at_random(label, name, tmp_path):
    items = shards(str(two(tmp_path, label) / name))
    rows = torch.tensor([6, 0, 3, 4])
    assert items.count == 7 and items.get(rows)[:, 0, 0, 0].tolist() == rows.tolist()
    assert label is None or items.labels.tolist() == [k % 5 for k in range(7)]
    assert (items.labels is None) == (label is None)


def test_the_index_is_made_once_and_read_afterwards(tmp_path, monkeypatch):
    two(tmp_path)
    first = indexed(tmp_path / "s-00.tar")
    assert json.loads((tmp_path / "s-00.tar.index.json").read_text())["labels"] == [0, 1, 2, 3]
    monkeypatch.setattr(tarfile, "open", None)
    assert indexed(tmp_path / "s-00.tar") == first


def test_where_one_may_not_write_the_index_is_in_the_cache(tmp_path, monkeypatch):
    from fewstep.distill.data import shards as module

    two(tmp_path)
    write = module.write_atomically

    def denied(path, content):
        if path.parent == tmp_path:
            raise PermissionError(path)
        write(path, content)

    monkeypatch.setattr(module, "write_atomically", denied)
    indexed(tmp_path / "s-00.tar")
    assert not list(tmp_path.glob("*.json")) and len(list((tmp_path / "cache").rglob("*.index.json"))) == 1
    monkeypatch.setattr(tarfile, "open", None)
    assert len(indexed(tmp_path / "s-00.tar").offsets) == 4


@pytest.mark.parametrize("other", [
    {**members(0, 5)},  # longer
    {**members(0, 3), "000009.png": picture(9), "000009.cls": b"3"},  # as long, another member
])  # fmt: skip
def test_an_index_out_of_date_is_told(other, tmp_path):
    two(tmp_path)
    shards(str(tmp_path))
    tarred(tmp_path / "s-00.tar", other)
    with pytest.raises(
        ValueError, match="s-00.tar has changed since its index was made: remove .*index.json"
    ):
        shards(str(tmp_path))
    (tmp_path / "s-00.tar.index.json").unlink()
    shards(str(tmp_path))


@pytest.mark.parametrize("wrong, said", [
    ({"1.cls": b"0"}, "sample 1 has no picture"),
    ({"1.png": picture(1), "1.cls": b"0", "2.png": picture(2)}, "sample 2 has no label, and others have"),
    ({"1.png": picture(1), "1.cls": b"cat"}, "1.cls must hold a number"),
    ({"1.png": picture(1), "1.cls": b"-1"}, "1.cls must hold a label, an integer from 0 on, got -1"),
    ({"1.png": picture(1), "1.json": b'{"label": "cat"}'}, "1.json must hold a label.*'cat'"),
    ({"1.png": b"none"}, "1.png is not a picture"),
    ({"readme": b""}, "sample readme has no picture"),
])  # fmt: skip
def test_wrong_shards_are_named(wrong, said, tmp_path):
    tarred(tmp_path / "a.tar", wrong)
    with pytest.raises(ValueError, match=said):
        shards(str(tmp_path / "a.tar"))


def test_cut_missing_and_packed_shards_are_named(tmp_path):
    path = tarred(tmp_path / "a.tar", members(0, 3))
    content = path.read_bytes()
    path.write_bytes(content[: 512 + 30])
    with pytest.raises(ValueError, match="a.tar (ends within 000000.png|is not a tar)"):
        shards(str(path))
    with pytest.raises(ValueError, match="b.tar, which is not there"):
        shards(str(tmp_path / "b.tar"))
    with pytest.raises(ValueError, match="matches no file"):
        shards(str(tmp_path / "c-*.tar"))
    (tmp_path / "d.tar").write_bytes(b"\x1f\x8b" + b"packed" * 200)
    with pytest.raises(ValueError, match="d.tar is not a tar"):
        shards(str(tmp_path / "d.tar"))
    (tmp_path / "e.tar.index.json").write_text("{}")
    tarred(tmp_path / "e.tar", members(0, 2))
    with pytest.raises(ValueError, match="e.tar.index.json is not an index"):
        shards(str(tmp_path / "e.tar"))
    tarred(tmp_path / "f-0.tar", members(0, 2))
    tarred(tmp_path / "f-1.tar", members(2, 2, None))
    with pytest.raises(ValueError, match="f-0.tar has labels and .*f-1.tar has none"):
        shards(str(tmp_path / "f-*.tar"))


def test_shards_behind_the_seam_are_read_ahead(tmp_path):
    source = open_source(DataRecipe(str(two(tmp_path)), flip=True))
    plain = open_source(DataRecipe(str(tmp_path), flip=True, ahead=0))
    for k in range(5):
        a, b = (s.read(Draws(0, k, 0, 8, 8)) for s in (source, plain))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert source.classes == 5
