"""``load``: a Denoiser from a name, a checkpoint or a diffusers pipeline; ``save_checkpoint``: the way back.

>>> d = load("digits-flow")
>>> d.shape, d.path.name, d.predicts
((1, 8, 8), 'flow', 'flow')
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, paths
from .autoregressive import Autoregressive, conditional
from .denoiser import Denoiser
from .dit import DiT
from .edm2_codec import EDM2Codec
from .edm2_unet import EDM2UNet
from .edm_checkpoint import EDMCheckpoint, check_same, read_edm
from .edm_unet import EDMUNet
from .jumps import jumping
from .latent_codec import PREFIX as CODEC
from .latent_codec import LatentCodec
from .load_diffusers import load_folder, load_pipeline
from .mlp import MLP
from .token_flow import TokenFlow
from .unet import UNet

EMBEDDED = ("digits-edm", "digits-vp", "digits-flow")
SHIPPED = (*EMBEDDED, "digits-ar")  # the last one's estimates are of one place after another
READERS = {"classifier": "load_classifier", "masked": "load_masked", "tarflow": "load_flow"}
ALIASES = {"digits": "digits-edm"}
NETS = {"unet": UNet, "dit": DiT, "mlp": MLP, "edm": EDMUNet, "edm2": EDM2UNet, "token_flow": TokenFlow}


def load(
    name_or_path: str | os.PathLike | Any,
    attention: str = "sdpa",
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: str | torch.device | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> Denoiser:
    """A Denoiser, frozen and in evaluation mode.

    Args:
        name_or_path: ``digits-edm`` (also ``digits``), ``digits-vp``, ``digits-flow``: the embedded teachers, and
            ``digits-ar``, an autoregressive one; a ``.safetensors`` checkpoint of fewstep; a ``.pkl`` of the EDM or
            EDM2 repositories, whose weights are read without running the code that it carries; a folder that diffusers
            saved: a UNet2DModel with a scheduler, or a pipeline of prompts or classes (DiT, Stable Diffusion, SDXL,
            SD3, Flux, Wan, ...); or such a pipeline itself, whose network is used as it stands.
        attention: ``sdpa`` or ``xformers``, of our own networks; pipelines have ``pipe.set_attn_processor``.
        dtype: what the network computes in; the sampler's state is float32 whatever it is.
        variant: of a pipeline's files, e.g. ``fp16``.
        device: where to.
        height, width, frames: of a pipeline's images, in pixels; its defaults unless given, and fixed from then on.

    >>> load("digits", dtype=torch.bfloat16)(torch.zeros(1, 1, 8, 8), 1.0, label=torch.tensor([3])).dtype
    torch.float32
    """
    size = {"height": height, "width": width, "frames": frames}
    size = {name: value for name, value in size.items() if value is not None}
    if not isinstance(name_or_path, (str, os.PathLike)):
        if not (callable(name_or_path) and hasattr(name_or_path, "scheduler")):
            raise TypeError(
                f"name_or_path must be a name, a path or a diffusers pipeline, got {type(name_or_path).__name__}"
            )
        if variant is not None:
            raise ValueError(
                f"variant is of files, and this {type(name_or_path).__name__} is loaded: got {variant!r}"
            )
        d = load_pipeline(name_or_path, **size)
        return d if dtype is device is None else d.to(device=device, dtype=dtype)
    known = os.fspath(name_or_path) in (*ALIASES, *SHIPPED)
    if not known and os.path.isdir(os.path.expanduser(name_or_path)):
        d = load_folder(Path(name_or_path).expanduser(), attention, dtype, variant, device, **size)
        return _frozen(d)
    if size or variant is not None:
        raise ValueError(
            f"{[*size, 'variant'][0]} is for folders and pipelines of diffusers, got {os.fspath(name_or_path)!r}"
        )
    d = _load(name_or_path, attention)
    return d if dtype is device is None else d.to(device=device, dtype=dtype)


def _load(name_or_path: str | os.PathLike, attention: str) -> Denoiser:
    name = os.fspath(name_or_path)
    name = ALIASES.get(name, name)
    if name in SHIPPED:
        return _checkpoint(checkpoint.DATA / f"{name}.safetensors", attention)
    path = Path(name).expanduser()
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise ValueError(
            f"{name} is a pickle without an architecture, which is not read: make safetensors of it with "
            "torch.load(..., weights_only=True), and a network that they fit"
        )
    if path.suffix in (".pkl", ".pickle") and path.exists():
        return _edm(path, attention)[0]
    if path.is_file():
        return _checkpoint(path, attention)
    other = checkpoint.DATA / f"{path.name}.safetensors"
    if name == path.name and other.is_file():
        return _checkpoint(other, attention)  # which says what it is instead
    known = [*ALIASES, *SHIPPED]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"name_or_path must be one of {', '.join(known)}, a fewstep checkpoint (.safetensors), a .pkl of EDM or EDM2, "
        f"or a folder saved by diffusers, got {name!r}, which is neither a name nor a path that exists{hint}"
    )


def build(config: Mapping[str, Any], attention: str = "sdpa") -> Denoiser:
    """A Denoiser with fresh weights from plain data.

    Keys: ``path`` (see ``Path.to_config``), ``predicts``, ``precond``, ``sigma_data``, ``shape``, ``net`` (``type``:
    ``unet``, ``dit``, ``mlp``, ``edm`` or ``edm2``, and that net's config), ``time``, ``time_scale``, ``time_offset``:
    the network is given time_scale x u + time_offset, u being t, or ln(rho) where ``time`` is ``log_rho``, or
    ln(rho) / 4 with EDM preconditioning. ``latents``, where samples are such: what a ``LatentCodec`` or an
    ``EDM2Codec`` is made with. ``jumps``: of a network of two times, where its steps end (see ``jumps``).
    """
    known = {
        "path",
        "predicts",
        "precond",
        "sigma_data",
        "time",
        "time_scale",
        "time_offset",
        "net",
        "shape",
        "latents",
        "jumps",
    }
    if unknown := set(config) - known:
        raise ValueError(
            f"unknown key {', '.join(sorted(unknown))}; a Denoiser's config has {', '.join(sorted(known))}"
        )
    net_config = dict(config["net"])
    kind = net_config.pop("type", None)
    if kind not in NETS:
        raise ValueError(f"net.type must be one of {', '.join(NETS)}, got {kind!r}")
    net = NETS[kind](net_config, attention)
    path = paths.from_config(config["path"])
    d = Denoiser(
        functools.partial(_ask, net),
        path,
        predicts=config["predicts"],
        precond=config.get("precond"),
        sigma_data=config.get("sigma_data", 0.5),
        time=_time(path, config),
        net=net,
        shape=config["shape"],
    )
    if (latents := config.get("latents")) is not None:
        null = None if net.null_label is None else {"label": net.null_label}
        d.codec = LatentCodec(latents, null=null) if "sha256" in latents else EDM2Codec(**latents, null=null)
    d.config = dict(config)
    return d if config.get("jumps") is None else jumping(d, config["jumps"])


def _ask(
    net: torch.nn.Module,
    x: torch.Tensor,
    tau: torch.Tensor,
    label: torch.Tensor | None = None,
    **more: torch.Tensor | None,  # a second time, or what stands before: of the nets that have such
) -> torch.Tensor:
    return net(x, tau, label, **{name: value for name, value in more.items() if value is not None})


def _time(path: paths.Path, config: Mapping[str, Any]):
    kind, scale = config.get("time", "t"), float(config.get("time_scale", 1.0))
    offset = float(config.get("time_offset", 0.0))
    if kind not in ("t", "log_rho"):
        raise ValueError(f"time must be 't' or 'log_rho', got {kind!r}")
    if config.get("precond") == "edm":
        kind, scale = "log_rho", 0.25 * scale
    if kind == "log_rho":
        return lambda t: path.lam(t) * -scale + offset
    return lambda t: t * scale + offset


def save_checkpoint(
    path: str | os.PathLike,
    d: Denoiser,
    config: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``d.net`` and the ``config`` that ``build`` makes it from; ``training`` is kept beside it as a record.

    The file appears whole or not at all. ``dtype`` is what weights are stored in; they are loaded as float32.
    """
    if d.net is None:
        raise ValueError("d must have a network to save: this Denoiser has net=None")
    build(config).net.load_state_dict(d.net.state_dict())  # what cannot be loaded again is not written
    tensors = {
        k: v if dtype is None or not v.is_floating_point() else v.to(dtype)
        for k, v in d.net.state_dict().items()
    }
    if isinstance(d.codec, LatentCodec):
        tensors |= d.codec.tensors()
    checkpoint.write(
        path, tensors, {"kind": "denoiser", "config": dict(config), "training": dict(training or {})}
    )


def _checkpoint(path: Path, attention: str) -> Denoiser:
    tensors, meta = checkpoint.read(path)
    if meta.get("kind") == "autoregressive":
        net = Autoregressive(meta["net"])
        net.load_state_dict({k: v.float() for k, v in tensors.items()})
        return _frozen(conditional(net))
    if meta.get("kind") != "denoiser":
        reader = READERS.get(str(meta.get("kind")))
        told = f"; {reader} reads it" if reader else ""
        raise ValueError(f"{path} holds a {meta.get('kind')}, not a denoiser{told}")
    d = build(meta["config"], attention)
    restore(d, tensors)
    return _frozen(d)


def restore(d: Denoiser, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the network, in float32, and the codec, where it has weights of its own, from a checkpoint's tensors."""
    if isinstance(d.codec, LatentCodec):
        d.codec.restore(tensors)
    own = {k: v for k, v in tensors.items() if not k.startswith(CODEC)}
    d.net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in own.items()})


def _frozen(d: Denoiser) -> Denoiser:
    d.net.eval().requires_grad_(False)
    return d


def convert(source: str | os.PathLike, out: str | os.PathLike) -> Denoiser:
    """A ``.pkl`` of EDM or EDM2 as a checkpoint of fewstep (``.safetensors``); returns what was read.

    Weights are stored as the pickle has them: half precision stays half. ``training`` in the file's metadata says where
    they came from.
    """
    d, found = _edm(Path(source))
    half = any(v.dtype == torch.float16 for v in found.tensors.values())
    save_checkpoint(out, d, found.config, training=found.about, dtype=torch.float16 if half else None)
    return d


def _edm(path: Path, attention: str = "sdpa") -> tuple[Denoiser, EDMCheckpoint]:
    found = read_edm(path)
    d = build(found.config, attention)
    try:
        d.net.load_state_dict({k: v.float() for k, v in found.tensors.items()})
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold the weights of the network that it describes: {error}"
        ) from None
    check_same(found.record, d.net)
    return _frozen(d), found
