"""Rewards: functions from images (B, C, H, W) in [-1, 1] to one number a sample, (B,); more is better.

Any function of that kind will do. ``differentiable = False`` on it says that no gradient flows, and methods that want
one refuse it by that. ``checked`` is how samplers call a reward: it decodes latents, and turns a NaN, a wrong shape or
an exception into an error that says whose it is.

>>> reward = class_probability(3)
>>> reward(torch.zeros(2, 1, 8, 8)).shape
torch.Size([2])
>>> checked(lambda x: x.flatten(1).mean(1))(torch.ones(2, 1, 8, 8))
tensor([1., 1.])
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .classifier import load_classifier

Reward = Callable[[torch.Tensor], torch.Tensor]
Space = Literal["image", "latent"]
LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue, Rec. 709


def class_probability(label: int, classifier: nn.Module | None = None, log: bool = False) -> Reward:
    """p(label | x0) by the digit classifier (or its log, which has a gradient where p is close to 0 or 1)."""
    if not isinstance(label, int) or not 0 <= label < 10:
        raise ValueError(f"label must be an integer from 0 to 9, got {label!r}")
    judge = load_classifier() if classifier is None else classifier

    def reward(x0: torch.Tensor) -> torch.Tensor:
        log_p = judge(x0.float())[1].log_softmax(dim=-1)[:, label]
        return log_p if log else log_p.exp()

    return reward


def ink() -> Reward:
    """The mean darkness, (1 + x0) / 2 averaged over pixels: 0 for an empty image, 1 for a full one.

    >>> ink()(torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 8, 8))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return lambda x0: (1 + x0.float()).flatten(1).mean(dim=1) / 2


def brightness() -> Reward:
    """The mean luminance, 0 (black) to 1 (white): of three channels by Rec. 709's weights, else their mean.

    >>> green = torch.full((1, 3, 2, 2), -1.0).index_fill(1, torch.tensor([1]), 1.0)
    >>> brightness()(green)
    tensor([0.7152])
    """

    def reward(x0: torch.Tensor) -> torch.Tensor:
        x0 = x0.float()
        if x0.ndim >= 4 and x0.shape[1] == 3:
            weights = x0.new_tensor(LUMA).reshape(1, 3, *([1] * (x0.ndim - 2)))
            x0 = (weights * x0).sum(1)
        return (1 + x0.flatten(1).mean(1)) / 2

    return reward


def compressibility(format: Literal["zlib", "png", "jpeg"] = "zlib", quality: int = 95) -> Reward:
    """Minus the size of each image, in kilobytes, after it was compressed: smooth, plain images score high.

    ``"jpeg"`` is the reward of 2305.13301; ``"png"`` and ``"zlib"`` (of the bare 8-bit pixels, without a header) lose
    nothing. Images are clipped to [-1, 1] and rounded to 8 bits first, so no gradient flows.

    >>> flat, noisy = torch.zeros(1, 1, 8, 8), torch.linspace(-1, 1, 64).sin().reshape(1, 1, 8, 8)
    >>> bool(compressibility()(flat) > compressibility()(noisy)), compressibility().differentiable
    (True, False)
    """
    if format not in ("zlib", "png", "jpeg"):
        raise ValueError(f"format must be 'zlib', 'png' or 'jpeg', got {format!r}")

    def size(pixels: np.ndarray) -> int:
        if format == "zlib":
            return len(zlib.compress(pixels.tobytes(), 9))
        from PIL import Image

        if pixels.shape[-1] not in (1, 3):
            raise ValueError(f"x0 must have 1 or 3 channels to be a {format}, got {pixels.shape[-1]}")
        file = io.BytesIO()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        image.save(file, format=format, **({"quality": quality} if format == "jpeg" else {"optimize": True}))
        return file.tell()

    def reward(x0: torch.Tensor) -> torch.Tensor:
        if x0.ndim != 4:
            raise ValueError(f"x0 must have shape (B, C, H, W), got {tuple(x0.shape)}")
        pixels = (x0.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        pixels = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return torch.tensor([-size(one) / 1000 for one in pixels], device=x0.device)

    return _fixed(reward)


def _fixed(reward: Reward) -> Reward:
    reward.differentiable = False  # type: ignore[attr-defined]
    return reward


class RewardError(ValueError):
    """A reward raised, or answered something that is no reward."""


def checked(reward: Reward, codec: Any = None, space: Space = "image") -> Reward:
    """``reward`` as samplers call it, on samples: decoded by ``codec`` first where it wants images.

    What it answers must be finite and of shape (B,), else ``RewardError``; so must an exception of its own be told
    from one of ours. A reward that forbids a sample says so by a large negative number.

    >>> checked(lambda x: x)(torch.zeros(2, 1, 8, 8))
    Traceback (most recent call last):
    ...
    fewstep.models.rewards.RewardError: reward must answer one number a sample, (2,), got (2, 1, 8, 8)
    """
    if not callable(reward):
        raise TypeError(f"reward must be a function of images (B, C, H, W), got {type(reward).__name__}")
    if space not in ("image", "latent"):
        raise ValueError(f"reward_space must be 'image' or 'latent', got {space!r}")

    def scores(x: torch.Tensor) -> torch.Tensor:
        seen = codec.decode(x) if codec is not None and space == "image" else x
        try:
            answer = reward(seen)
        except Exception as error:
            shape = tuple(seen.shape)
            raise RewardError(
                f"reward raised {type(error).__name__} on samples of shape {shape}: {error}"
            ) from error
        if not isinstance(answer, torch.Tensor):
            answer = torch.as_tensor(np.asarray(answer))
        if answer.shape != (len(x),):
            raise RewardError(
                f"reward must answer one number a sample, ({len(x)},), got {tuple(answer.shape)}"
            )
        bad = ~torch.isfinite(answer)
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            raise RewardError(f"reward must be finite, got {answer[where].item()} for {int(bad.sum())} of {len(x)} "
                              f"samples, first for sample {where}")  # fmt: skip
        return answer if answer.is_floating_point() else answer.float()

    scores.differentiable = getattr(reward, "differentiable", True)  # type: ignore[attr-defined]
    return scores
