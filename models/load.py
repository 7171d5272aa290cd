"""``load``: a Denoiser from a name, a checkpoint or a diffusers folder; ``save_checkpoint``: the way back.

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
from .denoiser import Denoiser
from .dit import DiT
from .load_diffusers import load_folder
from .mlp import MLP
from .unet import UNet

EMBEDDED = ("digits-edm", "digits-vp", "digits-flow")
ALIASES = {"digits": "digits-edm"}
NETS = {"unet": UNet, "dit": DiT, "mlp": MLP}


def load(name_or_path: str | os.PathLike, attention: str = "sdpa", allow_pickle: bool = False) -> Denoiser:
    """A Denoiser, frozen and in evaluation mode.

    Args:
        name_or_path: ``digits-edm`` (also ``digits``), ``digits-vp``, ``digits-flow``: the embedded teachers; a
            ``.safetensors`` checkpoint of fewstep; or a folder that diffusers saved: a pipeline of a UNet2DModel and
            a DDPM-like, FlowMatch or EDM scheduler; or, where pickles are allowed, one of the EDM repositories.
        attention: ``sdpa`` or ``xformers``.
        allow_pickle: pickles run code when they are read, so they are refused unless this says so.
    """
    name = os.fspath(name_or_path)
    name = ALIASES.get(name, name)
    if name in EMBEDDED:
        return _checkpoint(checkpoint.DATA / f"{name}.safetensors", attention)
    path = Path(name).expanduser()
    if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin"):
        if not allow_pickle:
            raise ValueError(
                f"{name} is a pickle, and reading one runs whatever code is in it; if you trust its source, pass "
                "allow_pickle=True, or better convert it to safetensors"
            )
        return _edm_pickle(path)
    if path.is_dir():
        return _frozen(load_folder(path, attention))
    if path.is_file():
        return _checkpoint(path, attention)
    known = [*ALIASES, *EMBEDDED]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"name_or_path must be one of {', '.join(known)}, a fewstep checkpoint (.safetensors) or a folder saved by "
        f"diffusers, got {name!r}, which is neither a name nor a path that exists{hint}"
    )


def build(config: Mapping[str, Any], attention: str = "sdpa") -> Denoiser:
    """A Denoiser with fresh weights from plain data.

    Keys: ``path`` (see ``Path.to_config``), ``predicts``, ``precond``, ``sigma_data``, ``shape``, ``net`` (``type``:
    ``unet``, ``dit`` or ``mlp``, and that net's config) and ``time_scale``: the network is given time_scale x t, and with EDM
    preconditioning time_scale x ln(rho) / 4.
    """
    known = {"path", "predicts", "precond", "sigma_data", "time_scale", "net", "shape"}
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
    scale, precond = float(config.get("time_scale", 1.0)), config.get("precond")
    return Denoiser(
        functools.partial(_ask, net),
        path,
        predicts=config["predicts"],
        precond=precond,
        sigma_data=config.get("sigma_data", 0.5),
        time=_scaled_time(path, precond, scale),
        net=net,
        shape=config["shape"],
    )


def _ask(
    net: torch.nn.Module, x: torch.Tensor, tau: torch.Tensor, label: torch.Tensor | None = None
) -> torch.Tensor:
    return net(x, tau, label)


def _scaled_time(path: paths.Path, precond: str | None, scale: float):
    if precond == "edm":
        return lambda t: path.lam(t) * (-0.25 * scale)
    return lambda t: t * scale


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
    checkpoint.write(
        path, tensors, {"kind": "denoiser", "config": dict(config), "training": dict(training or {})}
    )


def _checkpoint(path: Path, attention: str) -> Denoiser:
    tensors, meta = checkpoint.read(path)
    if meta.get("kind") != "denoiser":
        raise ValueError(f"{path} holds a {meta.get('kind')}, not a denoiser")
    d = build(meta["config"], attention)
    d.net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return _frozen(d)


def _frozen(d: Denoiser) -> Denoiser:
    d.net.eval().requires_grad_(False)
    return d


def _edm_pickle(path: Path) -> Denoiser:
    """The network under ``ema`` in a pickle of the EDM repositories: net(x, sigma, one-hot label) is an x0."""
    import pickle

    with open(path, "rb") as file:
        content = pickle.load(file)
    net = content.get("ema") if isinstance(content, dict) else None
    missing = [name for name in ("img_channels", "img_resolution", "label_dim") if not hasattr(net, name)]
    if missing:
        raise ValueError(f"{path} is no EDM pickle: what is under 'ema' has no {', '.join(missing)}")

    def call(x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        if not net.label_dim:
            return net(x, sigma, None)
        classes = torch.zeros(len(x), net.label_dim, device=x.device)
        if label is not None:  # no label is a row of zeros
            classes[torch.arange(len(x), device=x.device), label] = 1
        return net(x, sigma, classes)

    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    return _frozen(Denoiser(call, paths.edm(), predicts="x0", net=net.float(), shape=shape))
