"""Latents kept in a file: what the autoencoder makes, as it makes it, with its name and hash; and their decoding."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from PIL import Image
from safetensors.torch import load_file

from fewstep.cli import main
from fewstep.distill.data import DataRecipe, open_data, open_source
from fewstep.distill.data.batches import as_float, open_items
from fewstep.distill.draws import Draws
from fewstep.models.latent_codec import LatentCodec, open_vae
from fewstep.models.load import build, load, save_checkpoint

NET = {"type": "unet", "in_channels": 2, "out_channels": 2, "sample_size": 4, "num_class_embeds": 4,
       "block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": None}  # fmt: skip


def tiny_vae(seed, **config):
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, sample_size=8, **config,
    )  # fmt: skip
    return vae.eval()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Pictures of two classes, an autoencoder, and the latents that the command makes of them."""
    root = tmp_path_factory.mktemp("latents")
    random = torch.Generator().manual_seed(0)
    for k in range(7):
        folder = root / "pictures" / ("a", "b")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    tiny_vae(0, scaling_factor=0.5, shift_factor=0.1).save_pretrained(root / "tiny-vae")
    words = [str(root / "pictures"), "--vae", str(root / "tiny-vae"), "--out", str(root / "c.safetensors")]
    assert main(["latents", *words, "--flip", "--batch", "3", "--device", "cpu"]) == 0
    return root


def test_the_file_holds_what_the_autoencoder_says_of_each_picture_and_its_mirror_image(here):
    vae = diffusers.AutoencoderKL.from_pretrained(here / "tiny-vae")
    pictures = open_items(DataRecipe(str(here / "pictures")))
    kept = load_file(here / "c.safetensors")
    x = as_float(pictures.get(torch.arange(7)))
    for name, images in (("latents", x), ("mirrored", x.flip(-1))):
        with torch.no_grad():
            wanted = (vae.encode(images).latent_dist.mode() - 0.1) * 0.5
        # float16 has 11 bits
        assert (kept[name].float() - wanted).abs().max() <= 2**-11 * wanted.abs().max()
    assert kept["labels"].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_training_reads_them_as_it_reads_pictures_through_the_autoencoder(here):
    """The cache is a cache: the same items, labels and mirrored ones as encoding on the way."""
    codec = open_vae(str(here / "tiny-vae"))
    direct = open_source(DataRecipe(str(here / "pictures"), flip=True), codec)
    cached = open_source(DataRecipe(str(here / "c.safetensors"), flip=True))
    draws = Draws(0, 3, 0, 12, 12)
    (a, la), (b, lb) = direct.read(draws), cached.read(draws)
    assert direct.shape == cached.shape == (2, 4, 4) and torch.equal(la, lb)
    assert (a - b).abs().max() <= 2**-11 * a.abs().max()
    assert cached.latents == codec.about and cached.latents["name"] == "tiny-vae"
    assert cached.classes == 2


def test_a_checkpoint_holds_its_autoencoder_and_decodes_elsewhere(here, tmp_path):
    codec = open_vae(str(here / "tiny-vae"))
    config = {
        "path": {"path": "flow"},
        "predicts": "flow",
        "shape": [2, 4, 4],
        "net": NET,
        "latents": codec.about,
    }
    d = build(config)
    d.codec.vae = codec.vae
    save_checkpoint(tmp_path / "a.safetensors", d, config)
    again = load(tmp_path / "a.safetensors")
    assert isinstance(again.codec, LatentCodec) and again.codec.null == {"label": 3}
    y = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = codec.vae.decode(y / 0.5 + 0.1).sample
    assert torch.equal(again.codec.decode(y), wanted)
    student = again.copy()
    assert student.codec is again.codec
    label = torch.tensor([0, 1, 3])
    assert torch.allclose(again(y, 0.5, label=label), d(y, 0.5, label=label), atol=1e-6)


def test_latents_of_another_autoencoder_are_refused(here, tmp_path):
    tiny_vae(1).save_pretrained(tmp_path / "other")
    codec = open_vae(str(tmp_path / "other"))
    config = {
        "path": {"path": "flow"},
        "predicts": "flow",
        "shape": [2, 4, 4],
        "net": NET,
        "latents": codec.about,
    }
    with pytest.raises(ValueError, match="'tiny-vae', and the teacher was trained in those of 'other'"):
        open_data(DataRecipe(str(here / "c.safetensors")), build(config))


def test_bad_input_is_named(here, tmp_path, capsys):
    for words, said in [
        (["--vae", str(here), "--out", str(tmp_path / "a.safetensors")], "folder that diffusers saved"),
        (["--vae", str(here / "tiny-vae"), "--out", str(tmp_path / "a.npz")], "kept in a .safetensors"),
        (["--vae", str(here / "tiny-vae"), "--out", str(here / "c.safetensors")], "exists already"),
    ]:
        assert main(["latents", str(here / "pictures"), *words]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(ValueError, match="b.safetensors is not a safetensors file"):
        open_source(DataRecipe(str(tmp_path / "b.safetensors")))
    other = tmp_path / "digits.safetensors"
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, other, {"fewstep": json.dumps({"kind": "denoiser"})})
    with pytest.raises(ValueError, match="holds no latents"):
        open_source(DataRecipe(str(other)))
    config = json.loads((here / "tiny-vae" / "config.json").read_text())
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="Autoencoder classes, got 'UNet2DModel'"):
        open_vae(str(tmp_path / "vae"))
