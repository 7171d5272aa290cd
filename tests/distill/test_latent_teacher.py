"""A teacher in the latents of an autoencoder: cached once, trained, decoded by its own checkpoint, distilled from."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from PIL import Image

from fewstep.distill.data import latents as made
from fewstep.distill.run import run as distill
from fewstep.distill.teacher import main, run
from fewstep.models.codec import decode
from fewstep.models.load import load

NET = ["net={type: dit, patch_size: 2, hidden_size: 16, depth: 1, num_heads: 2}"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    root = tmp_path_factory.mktemp("latent-teacher")
    random = torch.Generator().manual_seed(0)
    for k in range(6):
        folder = root / "pictures" / ("a", "b")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    for seed, name in enumerate(("tiny", "other")):
        torch.manual_seed(seed)
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, sample_size=8,
        ).save_pretrained(root / name)  # fmt: skip
    return root


def words(root, *more):
    options = ["steps=3", "batch=4", "exam=8", "warmup=1", "checkpoint=0", "precision=fp32"]
    where = [f"data.path={root / 'pictures'}", f"latents.vae={root / 'tiny'}", f"out={root / 'out'}"]
    return [*NET, *options, *where, *more]


def test_a_teacher_in_latents_is_cached_trained_decoded_and_distilled(here, monkeypatch):
    file = run("latent-flow", words(here))
    d = load(file)
    assert d.shape == (2, 4, 4) and d.net.null_label == 2 and d.codec.about["name"] == "tiny"
    y = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    vae = diffusers.AutoencoderKL.from_pretrained(here / "tiny")
    with torch.no_grad():
        wanted = vae.decode(y / vae.config.scaling_factor).sample
    assert torch.allclose(decode(d, y), wanted, atol=1e-6)
    card = file.with_suffix(".md").read_text()
    assert "| autoencoder | tiny |" in card and "data fd" in card and file.with_suffix(".png").is_file()
    assert str(here) not in card and str(here).encode() not in file.read_bytes()

    monkeypatch.setattr(made, "keep", None)  # the cache is there: nothing is encoded again
    assert run("latent-flow", words(here, "steps=1", "exam=0")) == file
    with pytest.raises(ValueError, match="holds latents of something else.*\n  flip: True -> False"):
        run("latent-flow", words(here, "data.flip=false"))
    with pytest.raises(ValueError, match="holds latents of something else.*\n  vae: "):
        run("latent-flow", words(here, f"latents.vae={here / 'other'}"))

    folder = distill("dmd2-digits", [
        f"teacher.path={file}", f"data.path={here / 'out/latent-flow-latents.safetensors'}", f"out={here / 'runs'}",
        "train.iters=1", "train.batch=4", "train.critic_steps=1", "report.exam=8", "report.grid=1", "threads=1",
    ])  # fmt: skip
    student = load(folder / "student.safetensors")
    assert student.shape == (2, 4, 4) and torch.allclose(decode(student, y), wanted, atol=1e-6)
    assert (folder / "grids/00000001.png").is_file()


def test_a_dry_run_encodes_what_it_needs_and_writes_nothing(here, tmp_path, capsys):
    assert main(["latent-flow", *words(here, f"out={tmp_path}"), "--dry-run"]) == 0
    assert "samples of 2 x 4 x 4, 2 classes" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_cache_made_by_hand_needs_the_autoencoder_that_made_it(here, tmp_path):
    from fewstep.distill.data import DataRecipe
    from fewstep.models.latent_codec import open_vae

    cache = tmp_path / "hand.safetensors"
    made.cached(cache, DataRecipe(str(here / "pictures"), flip=True), open_vae(str(here / "tiny")), 4)
    given = [f"data.path={cache}", f"out={tmp_path}", "steps=1", "exam=0"]
    assert load(run("latent-flow", words(here, *given))).codec.decodes
    with pytest.raises(ValueError, match="latents of another autoencoder than latents.vae"):
        run("latent-flow", words(here, *given, f"latents.vae={here / 'other'}"))
    without = load(run("latent-flow", words(here, *given, "latents.vae=null")))
    assert without.codec.about["name"] == "tiny" and not without.codec.decodes
    with pytest.raises(ValueError, match="the weights of autoencoder .tiny. are not here"):
        decode(without, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="they are not cropped"):
        run("latent-flow", words(here, *given, "data.crop=2"))
