"""Videos in [-1, 1], (N, C, T, H, W), to files: an animation, a contact sheet, an archive, or folders of frames.

All of them hold bytes, rounded as ``images.to_uint8`` rounds: who wants the floats keeps the tensor.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from . import images
from .files import written_aside


def contact_sheet(videos: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """A row a video, at most ``columns`` frames of each, evenly apart, first and last among them: one (C, H, W).

    >>> contact_sheet(torch.zeros(2, 3, 9, 4, 4), columns=3).shape
    torch.Size([3, 8, 12])
    """
    frames = videos.shape[2]
    at = torch.linspace(0, frames - 1, min(frames, columns)).round().long()
    return images.tile(videos[:, :, at].transpose(1, 2).flatten(0, 1), columns=len(at))


def save_gif(path: str | os.PathLike, videos: torch.Tensor, fps: float = 16.0) -> None:
    """All videos side by side as one animation that repeats.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     save_gif(os.path.join(tmp, "a.gif"), torch.rand(2, 3, 5, 8, 8))
    ...     os.listdir(tmp)
    ['a.gif']
    """
    from PIL import Image

    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps!r}")
    tiled = [images.tile(frame).permute(1, 2, 0).numpy() for frame in _checked(videos).unbind(2)]
    first, *others = [Image.fromarray(frame if frame.shape[2] == 3 else frame[..., 0]) for frame in tiled]
    with written_aside(path) as aside:
        first.save(aside, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def save_npz(path: str | os.PathLike, videos: torch.Tensor) -> None:
    """``arr_0``, uint8 (N, T, H, W, C)."""
    array = np.ascontiguousarray(_checked(videos).permute(0, 2, 3, 4, 1).numpy())
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez_compressed(file, arr_0=array)


def save_folder(path: str | os.PathLike, videos: torch.Tensor) -> None:
    """A folder a video, 000000, 000001, ..., with a PNG a frame; all or nothing."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise FileExistsError(f"path {os.fspath(path)!r} exists; expected a new or an empty folder")
    with written_aside(path) as aside:
        aside.mkdir()
        for index, video in enumerate(_checked(videos)):
            images.save_folder(aside / f"{index:06d}", video.transpose(0, 1))


def _checked(videos: torch.Tensor) -> torch.Tensor:
    if videos.ndim != 5 or videos.shape[1] not in (1, 3) or 0 in videos.shape:
        raise ValueError(f"videos must have shape (N, C, T, H, W), C 1 or 3, got {tuple(videos.shape)}")
    return images.to_uint8(videos).cpu()
