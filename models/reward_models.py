"""Learned rewards of text and image, from local folders: PickScore, HPS and other CLIPs, and ImageReward.

Nothing is downloaded and nothing is unpickled without being told to. Each is a reward for one prompt:

    reward = pick_score("PickScore_v1", "a photo of a fox")                (2305.01569; a CLIP, needs transformers)
    reward = hps("hps-v2.1-hf", "a photo of a fox")                        (2306.09341; its CLIP in transformers' form)
    reward = image_reward("ImageReward", "a photo of a fox", allow_pickle=True)   (2304.05977; needs image-reward)

All three are differentiable in the image. What their authors' code does to images in 8 bits (bicubic to 224 pixels on
the shorter side, the centre cut, CLIP's mean and standard deviation) is done in floating point here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .rewards import Reward

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pick_score(folder: str | os.PathLike, prompt: str, device: Any = None) -> Reward:
    """PickScore: the scaled cosine of prompt and image, by a CLIP that learned human choices."""
    return clip_score(folder, prompt, device)


def hps(folder: str | os.PathLike, prompt: str, device: Any = None) -> Reward:
    """Human preference score, the cosine alone as its authors give it (their CLIP, in transformers' layout)."""
    return clip_score(folder, prompt, device, scaled=False)


def clip_score(folder: str | os.PathLike, prompt: str, device: Any = None, scaled: bool = True) -> Reward:
    """The cosine of a CLIP's embeddings of prompt and image, times its own scale: (B, 3, H, W) -> (B,).

    Args:
        folder: what ``save_pretrained`` wrote of a CLIPModel and its processor (or tokenizer).
        scaled: times exp(logit_scale), as PickScore is defined.
    """
    folder = _folder(folder, "a CLIPModel and its tokenizer")
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise ImportError(f"rewards by CLIP need transformers ({error}): pip install transformers") from error
    net = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        # transformers 5 would make an empty one
        raise FileNotFoundError(
            f"folder must hold the CLIP's tokenizer, too, and {folder} does not: save that of the CLIP which was tuned "
            "into it, of PickScore and HPS laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    longest = net.config.text_config.max_position_embeddings
    tokens = tokenizer([prompt], truncation=True, max_length=longest, padding=True, return_tensors="pt")
    with torch.no_grad():
        text = _features(net.get_text_features(**tokens.to(net.device)))
    size = net.config.vision_config.image_size
    scale = float(net.logit_scale.exp()) if scaled else 1.0

    def reward(images: torch.Tensor) -> torch.Tensor:
        pixels = clip_pixels(images, size).to(net.device, net.dtype)
        return scale * (_features(net.get_image_features(pixel_values=pixels)) @ text[0]).float()

    return reward


def _features(answer: Any) -> torch.Tensor:
    # transformers 5 wraps the features, 4 answers them bare
    answer = answer if isinstance(answer, torch.Tensor) else answer.pooler_output
    return torch.nn.functional.normalize(answer, dim=-1)


def clip_pixels(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 1 or 3, H, W) in [-1, 1] as CLIP wants them: the shorter side to ``size``, the centre cut, normalised.

    >>> clip_pixels(torch.zeros(2, 3, 32, 48), 16).shape
    torch.Size([2, 3, 16, 16])
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (B, 1 or 3, H, W), got {tuple(images.shape)}")
    images = (images.float().clamp(-1, 1) + 1) / 2
    images = images.expand(-1, 3, -1, -1)
    height, width = images.shape[-2:]
    shorter = min(height, width)
    target = (height * size // shorter, width * size // shorter)
    images = torch.nn.functional.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(v).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def image_reward(
    folder: str | os.PathLike, prompt: str, device: Any = None, allow_pickle: bool = False
) -> Reward:
    """ImageReward (2304.05977) by its own package, from a folder with ``ImageReward.pt`` and ``med_config.json``.

    Its weights are a pickle, which can run anything when it is opened: ``allow_pickle=True`` says that you trust it.
    Its text encoder's tokenizer, bert-base-uncased, is asked for by that name: it must be in transformers' cache.
    """
    folder = _folder(folder, "ImageReward.pt and med_config.json")
    missing = [name for name in ("ImageReward.pt", "med_config.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"folder must hold ImageReward.pt and med_config.json; {', '.join(missing)} missing"
        )
    if not allow_pickle:
        raise ValueError(
            "ImageReward.pt is a pickle: allow_pickle=True says that you trust where it came from"
        )
    try:
        import ImageReward  # pyrefly: ignore[missing-import]
        from transformers import BertTokenizer
    except ImportError as error:
        raise ImportError(
            f"image_reward needs its authors' package ({error}): pip install image-reward, which was written for "
            "transformers 4"
        ) from error
    try:
        BertTokenizer.from_pretrained("bert-base-uncased", local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            "image_reward needs the tokenizer bert-base-uncased in transformers' cache, and nothing is downloaded here "
            f"({error})"
        ) from error
    net = ImageReward.load(str(folder / "ImageReward.pt"), device=str(device or "cpu"),
                           med_config=str(folder / "med_config.json")).requires_grad_(False)  # fmt: skip
    tokens = net.blip.tokenizer(
        prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    tokens = tokens.to(net.device)

    def reward(images: torch.Tensor) -> torch.Tensor:
        pixels = clip_pixels(images, 224).to(net.device)
        rows = len(pixels)
        return net.score_gard(
            tokens.input_ids.expand(rows, -1), tokens.attention_mask.expand(rows, -1), pixels
        ).reshape(rows)

    return reward


def _folder(folder: str | os.PathLike, what: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be a local folder with {what}; there is none at {folder}")
    return folder
