"""Where the weights of a feature extractor are: a path, an environment variable, torch's cache, a download.

In that order, the first that there is; every file is hashed. What is found in the cache or downloaded must have the
published hash; what a user names may be any file, and the protocol of each number then says whose hash it is.

>>> INCEPTION.file, INCEPTION.variable
('pt_inception-2015-12-05-6726825d.pth', 'FEWSTEP_INCEPTION')
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from .files import written_aside
from .statistics_files import file_hash

OFFLINE = "FEWSTEP_OFFLINE"  # set to 1, nothing is downloaded


class Weights(NamedTuple):
    """A published file: its names in torch's cache, url, sha256, and the variable that may hold a path to it."""

    file: str
    url: str
    sha256: str
    variable: str
    also: tuple[str, ...] = ()


class Found(NamedTuple):
    """A file, its sha256, and whether that is the published one."""

    path: Path
    sha256: str
    published: bool


_DINO = "https://dl.fbaipublicfiles.com/dinov2"
_CLIP = "https://openaipublic.azureedge.net/clip/models"

INCEPTION = Weights(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "FEWSTEP_INCEPTION",
    also=("weights-inception-2015-12-05-6726825d.pth",),
)
DINOV2 = Weights(
    "dinov2_vitl14_pretrain.pth",
    f"{_DINO}/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "FEWSTEP_DINOV2",
)
CLIP = Weights(
    "ViT-L-14-336px.pt",
    f"{_CLIP}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    "FEWSTEP_CLIP",
    also=("clip-vit-l-14-336px-3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02.pt",),
)


def find_weights(weights: Weights, path: str | os.PathLike | None = None, download: bool = True) -> Found:
    """The file; ``FileNotFoundError`` that names all four places where there is none."""
    for named, by in ((path, "weights"), (os.environ.get(weights.variable), weights.variable)):
        if named:
            if not Path(named).is_file():
                raise FileNotFoundError(f"{by} is {os.fspath(named)!r}, and there is no such file")
            digest = file_hash(named)
            return Found(Path(named), digest, digest == weights.sha256)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in (weights.file, *weights.also):
        if (cache / name).is_file():
            digest = file_hash(cache / name)
            if digest != weights.sha256:
                raise ValueError(
                    f"{cache / name} has sha256 {digest}, expected {weights.sha256}: remove it, or name it as weights "
                    "if it is meant"
                )
            return Found(cache / name, digest, True)
    failure = f"{OFFLINE} is set" if offline() else "not allowed (download=False)"
    if download and not offline():
        try:
            return _download(weights, cache / weights.file)
        except OSError as error:  # URLError is one
            failure = str(error)
    raise FileNotFoundError(
        f"no weights {weights.file} (sha256 {weights.sha256}). Looked for, in this order: a path given as weights "
        f"(--weights FILE): none; the environment variable {weights.variable}: not set; torch's cache "
        f"{cache}: no {weights.file}; a download from {weights.url}: {failure}"
    )


def offline() -> bool:
    """Whether the environment forbids downloads."""
    return os.environ.get(OFFLINE, "0") not in ("", "0")


def _download(weights: Weights, target: Path) -> Found:
    with written_aside(target) as aside:
        torch.hub.download_url_to_file(weights.url, str(aside), progress=False)
        digest = file_hash(aside)
        if digest != weights.sha256:
            raise OSError(f"what came has sha256 {digest}, and is not kept")
    return Found(target, digest, True)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, of a file of ``torch.save`` (tensors alone), or of a TorchScript archive."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with warnings.catch_warnings():  # that a TorchScript archive is one is known below
            warnings.filterwarnings("ignore", message="'torch.load' received a zip file")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as plain:  # torch names no common kind for what it cannot read
        try:
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
        except RuntimeError:
            raise ValueError(
                f"{path} holds no weights that can be read without unpickling: {plain}"
            ) from plain
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state_dict, tensors by their names")
    return dict(state)
