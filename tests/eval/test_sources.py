"""Images from every kind of place are the same bytes; what is wrong with them is named."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.eval import extractor, open_images, save_folder, save_npz, see
from fewstep.eval.sources import batches


def pictures(count: int, channels: int = 3, side: int = 8) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=draw)


def everything(source, size: int = 4) -> torch.Tensor:
    images = open_images(source)
    return torch.cat([batch.images for batch in batches(images, range(images.count), size)])


def zipped(folder, target) -> None:
    with zipfile.ZipFile(target, "w") as archive:
        for file in folder.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_zip_npz_and_tensor_are_the_same_bytes(tmp_path, channels):
    x = pictures(11, channels)
    save_folder(tmp_path / "out", x)
    save_npz(tmp_path / "out.npz", x, labels=torch.arange(11))
    zipped(tmp_path / "out", tmp_path / "out.zip")
    np.savez(tmp_path / "floats.npz", images=x.float().numpy() / 127.5 - 1)
    for source in (tmp_path / "out", tmp_path / "out.npz", tmp_path / "out.zip", tmp_path / "floats.npz", x):
        assert torch.equal(everything(source), x)
    assert open_images(tmp_path / "out.npz").labels.tolist() == list(range(11))
    assert open_images(tmp_path / "out").rounding is None
    assert open_images(tmp_path / "floats.npz").rounding == "nearest"
    already = open_images(x)
    assert open_images(already) is already


def test_labels_of_edm(tmp_path):
    save_folder(tmp_path / "data" / "00000", pictures(3))
    names = [f"00000/{i:06d}.png" for i in (2, 0, 1)]
    (tmp_path / "data" / "dataset.json").write_text(
        json.dumps({"labels": [[n, i] for i, n in enumerate(names)]})
    )
    zipped(tmp_path / "data", tmp_path / "data.zip")
    for source in (tmp_path / "data", tmp_path / "data.zip"):
        assert open_images(source).labels.tolist() == [1, 2, 0]
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"labels": [[names[0], 0]]}))
    with pytest.raises(ValueError, match="dataset.json does not label every picture"):
        open_images(tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_text('{"labels": null}')
    assert open_images(tmp_path / "data").labels is None


def test_kinds_of_pictures(tmp_path):
    x = pictures(1)[0].permute(1, 2, 0).numpy()
    Image.fromarray(np.dstack([x, np.full((8, 8), 9, np.uint8)])).save(tmp_path / "rgba.png")
    Image.fromarray(x).save(tmp_path / "plain.bmp")
    (tmp_path / "notes.txt").write_text("no picture")
    assert torch.equal(everything(tmp_path)[0], everything(tmp_path)[1])
    Image.fromarray(x).convert("P").save(tmp_path / "palette.png")
    assert everything(tmp_path).shape == (3, 3, 8, 8)


def test_a_broken_picture_among_a_thousand_is_named_and_counted(tmp_path):
    folder = tmp_path / "out"
    save_folder(folder, pictures(1000, 1))
    whole = (folder / "000500.png").read_bytes()
    (folder / "000500.png").write_bytes(whole[: len(whole) // 2])
    (folder / "000700.png").write_bytes(b"")
    zipped(folder, tmp_path / "out.zip")
    judge = extractor("digits")
    for source in (folder, tmp_path / "out.zip"):
        with pytest.raises(
            ValueError, match=r"2 of 1000 images of out.* cannot be read: .*000500.png, .*000700.png"
        ):
            see(source, judge, batch=256)
        seen = see(source, judge, batch=256, skip_bad=True)
        assert seen.protocol.num == seen.stats.n == len(seen.features) == 998
        assert [name[-10:] for name in seen.skipped] == ["000500.png", "000700.png"]
    (folder / "000500.png").unlink()
    (folder / "000700.png").unlink()
    assert torch.equal(see(folder, judge).features, seen.features)
    # Damage in the zip itself, past its directory, is a broken picture too.
    content = bytearray((tmp_path / "out.zip").read_bytes())
    content[60:64] = b"\0\0\0\0"
    (tmp_path / "out.zip").write_bytes(content)
    with pytest.raises(ValueError, match="3 of 1000 images of out.zip cannot be read"):
        see(tmp_path / "out.zip", judge)


def test_two_sizes_are_refused(tmp_path):
    save_folder(tmp_path, pictures(3))
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(
        ValueError, match=r"wide.png is 8 x 9 of 3 channels and .*000000.png 8 x 8 of 3 channels"
    ):
        everything(tmp_path)


def test_one_image_is_no_distribution(tmp_path):
    save_folder(tmp_path, pictures(1, 1))
    with pytest.raises(ValueError, match="has 1 image; a distribution needs at least 2"):
        see(tmp_path, extractor("digits"))
    with pytest.raises(ValueError, match="num is 3; expected at most 2, the images of tensor"):
        see(pictures(2, 1), extractor("digits"), num=3)
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="1 of 2 images of .* could be read; expected at least 2"):
        see(tmp_path, extractor("digits"), skip_bad=True)


def test_colour_is_taken_as_grey_only_where_it_is(tmp_path):
    judge, grey = extractor("digits"), pictures(5, 1)
    assert torch.equal(see(grey.expand(-1, 3, -1, -1), judge).features, see(grey, judge).features)
    with pytest.raises(ValueError, match="images are in colour, and the features are of grey ones"):
        see(pictures(5), judge)
    with pytest.raises(ValueError, match="images are 9 x 9, the network takes 8 x 8, and resize is 'none'"):
        see(pictures(5, 1, 9), judge)


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no pictures"):
        open_images(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="a.zip is no zip"):
        open_images(tmp_path / "a.zip")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="it must hold images as arr_0 or images, it has x"):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((3, 8, 8, 3), np.int64))
    with pytest.raises(ValueError, match="arr_0 of .* must be bytes"):
        open_images(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"labels of c.npz have shape \(2,\)"):
        open_images(tmp_path / "c.npz")
    with pytest.raises(TypeError, match="source is a int"):
        open_images(3)
    with pytest.raises(ValueError, match="digits come as train, held_out, all, got 'test'"):
        open_images("digits:test")
    with pytest.raises(ValueError, match="NaN or infinity"):
        see(torch.full((3, 1, 8, 8), float("nan")), extractor("digits"))
