"""Rewards: what each measures, and the one place that refuses a bad answer."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fewstep.models.reward_models import clip_pixels, clip_score, hps, image_reward, pick_score
from fewstep.models.rewards import RewardError, brightness, checked, compressibility, ink


def test_brightness_weighs_colours_and_agrees_with_ink_on_grey():
    grey = torch.rand(3, 1, 4, 4) * 2 - 1
    assert torch.allclose(brightness()(grey), ink()(grey))
    assert torch.allclose(brightness()(grey.expand(-1, 3, -1, -1)), ink()(grey), atol=1e-6)
    red, green = torch.full((1, 3, 2, 2), -1.0), torch.full((1, 3, 2, 2), -1.0)
    red[:, 0], green[:, 1] = 1.0, 1.0
    assert brightness()(red) < brightness()(green)


@pytest.mark.parametrize("format", ["zlib", "png", "jpeg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_plain_images_compress_better_than_noise(format, channels):
    noise = torch.rand(2, channels, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    flat = torch.zeros(2, channels, 16, 16)
    sizes = compressibility(format)(torch.cat([flat, noise]))
    assert sizes.shape == (4,) and (sizes < 0).all() and sizes[:2].min() > sizes[2:].max()
    assert compressibility(format).differentiable is False
    assert torch.equal(compressibility(format)(3 * noise), compressibility(format)((3 * noise).clamp(-1, 1)))


def test_zlib_is_the_very_number_of_bytes():
    import zlib

    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    pixels = bytes(int(v) for v in (image.flatten() * 127.5 + 127.5).round())
    assert round(-1000 * compressibility()(image).item()) == len(zlib.compress(pixels, 9))


class Doubling:
    def decode(self, z):
        return z.repeat(1, 1, 2, 2)


def test_latents_are_decoded_where_the_reward_wants_images():
    seen = []

    def reward(x):
        seen.append(tuple(x.shape))
        return x.flatten(1).mean(1)

    for space in ("image", "latent"):
        checked(reward, Doubling(), space)(torch.zeros(2, 1, 4, 4))
    assert seen == [(2, 1, 8, 8), (2, 1, 4, 4)]
    assert checked(lambda x: [1.0] * len(x))(torch.zeros(2, 1)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda x: x.flatten(1).mean(1) * float("nan"), "finite, got nan for 3 of 3"),
        (
            lambda x: -torch.tensor([1.0, float("inf"), 1.0]),
            "finite, got -inf for 1 of 3 samples, first for sample 1",
        ),
        (lambda x: x, "one number a sample"),
        (lambda x: torch.tensor(1.0), "one number a sample"),
        (lambda x: {}["a"], "raised KeyError on samples of shape"),
    ],
)
def test_bad_answers_are_named(reward, message):
    with pytest.raises(RewardError, match=message):
        checked(reward)(torch.zeros(3, 1, 4, 4))


def test_bad_input():
    for call, kind, message in (
        (lambda: checked(3), TypeError, "reward must be a function"),
        (lambda: checked(ink(), space="pixels"), ValueError, "reward_space"),
        (lambda: compressibility("gif"), ValueError, "format must be"),
        (lambda: compressibility()(torch.zeros(2, 3)), ValueError, r"\(B, C, H, W\)"),
        (lambda: compressibility("png")(torch.zeros(1, 2, 4, 4)), ValueError, "1 or 3 channels"),
        (lambda: clip_pixels(torch.zeros(2, 3), 8), ValueError, "images must have"),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_learned_rewards_want_a_folder_and_say_what_is_missing(tmp_path):
    for make in (pick_score, hps, image_reward):
        with pytest.raises(FileNotFoundError, match="must be a local folder"):
            make(tmp_path / "none", "a fox")
    with pytest.raises(FileNotFoundError, match=r"ImageReward.pt, med_config.json missing"):
        image_reward(tmp_path, "a fox")
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        image_reward(tmp_path, "a fox")
    with pytest.raises(ImportError, match="pip install image-reward"):
        image_reward(tmp_path, "a fox", allow_pickle=True)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 38, "eos_token_id": 39},
        vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    import json

    letters = "abcdefghijklmnopqr"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|pad|>", "fo</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nf o</w>\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def test_clip_scores_are_scaled_cosines_with_a_gradient(clip_folder):
    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    images.requires_grad_()
    score, cosine = clip_score(clip_folder, "a fo")(images), hps(clip_folder, "a fo")(images)
    assert score.shape == (3,) and cosine.abs().max() <= 1 and len(set(score.tolist())) == 3
    assert torch.allclose(score / cosine, (score / cosine)[0].expand(3)) and torch.allclose(
        score, pick_score(clip_folder, "a fo")(images)
    )
    (slope,) = torch.autograd.grad(score.sum(), images)
    assert slope.abs().sum() > 0
    assert not torch.allclose(score, clip_score(clip_folder, "a b c")(images))


def test_pixels_are_what_the_processor_makes_of_them():
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    theirs = processor(images=pixels, return_tensors="pt").pixel_values
    ours = clip_pixels((image * 255).round() / 127.5 - 1, 16)
    assert (
        ours.shape == theirs.shape and (ours - theirs).abs().mean() < 0.02
    )  # theirs rounds to 8 bits on the way


def test_other_proportions_are_cut_as_the_processor_cuts_them():
    """45 x 34 to 16 on the shorter side: 21.18 rows become 21, of which the middle 16 begin at row 2."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    pixels = torch.rand(45, 34, 3, generator=torch.Generator().manual_seed(0)).mul(255).round().byte()
    theirs = processor(images=pixels.numpy(), return_tensors="pt").pixel_values
    ours = clip_pixels(pixels.permute(2, 0, 1)[None] / 127.5 - 1, 16)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.05
    # nothing beyond black and white, as of 8 bits
    hard = clip_pixels(torch.sign(torch.rand(1, 3, 50, 50) - 0.5), 40)
    black = clip_pixels(-torch.ones(1, 3, 50, 50), 40)
    assert (hard >= black - 1e-6).all()


def test_long_prompts_are_cut_and_a_folder_without_a_tokenizer_is_named(clip_folder, tmp_path):
    images = torch.zeros(1, 3, 16, 16)
    long = clip_score(clip_folder, "a b c " * 40)(images)
    assert torch.isfinite(long).all() and torch.equal(long, clip_score(clip_folder, "a b c " * 50)(images))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="must hold the CLIP's tokenizer"):
        clip_score(tmp_path, "a fo")


class Tokens(dict):
    """What a tokenizer answers."""

    __getattr__ = dict.__getitem__

    def to(self, device):
        return self


def stand_in(told):
    """The part of the package ImageReward 1.5 that is called, with its names, orders and shapes."""

    def tokenizer(prompt, padding, truncation, max_length, return_tensors):
        told["tokens"] = (prompt, padding, truncation, max_length, return_tensors)
        ids = torch.zeros(1, max_length, dtype=torch.long)
        return Tokens(input_ids=ids + len(prompt), attention_mask=ids + 1)

    class Net(torch.nn.Module):
        def __init__(self, device):
            super().__init__()
            self.device, self.blip = device, types.SimpleNamespace(tokenizer=tokenizer)
            self.weight = torch.nn.Parameter(torch.ones(1))

        def score_gard(self, prompt_ids, prompt_attention_mask, image):
            assert prompt_ids.shape == prompt_attention_mask.shape == (len(image), 35)
            assert image.shape[1:] == (3, 224, 224)
            return (self.weight * image.mean((1, 2, 3)) * prompt_ids[:, 0])[:, None]

    def load(name="ImageReward-v1.0", device="cpu", download_root=None, med_config=None):
        told["load"] = (name, device, download_root, med_config)
        return Net(device).eval()

    return types.SimpleNamespace(load=load)


def test_image_reward_speaks_to_its_package(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    told = {}
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_text("")
    monkeypatch.setitem(sys.modules, "ImageReward", stand_in(told))

    def missing(*_, **options):
        assert options == {"local_files_only": True}
        raise OSError("not in the cache")

    monkeypatch.setattr(transformers.BertTokenizer, "from_pretrained", missing)
    with pytest.raises(FileNotFoundError, match="bert-base-uncased in transformers' cache"):
        image_reward(tmp_path, "a fox", allow_pickle=True)
    monkeypatch.setattr(transformers.BertTokenizer, "from_pretrained", lambda *_, **__: None)
    reward = checked(image_reward(tmp_path, "a fox", allow_pickle=True))
    assert told["load"] == (str(tmp_path / "ImageReward.pt"), "cpu", None, str(tmp_path / "med_config.json"))
    assert told["tokens"] == ("a fox", "max_length", True, 35, "pt")
    images = torch.stack([torch.full((3, 40, 60), v) for v in (-1.0, 0.0, 1.0)]).requires_grad_()
    scores = reward(images)
    assert scores.shape == (3,) and (scores.diff() > 0).all()
    (slope,) = torch.autograd.grad(scores.sum(), images)
    assert slope.abs().sum() > 0
