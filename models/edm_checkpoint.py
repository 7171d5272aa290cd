"""A network of EDM (2206.00364) or EDM2 (2312.02696) out of its pickle: a config for ``build``, and named tensors.

The pickle holds objects, not weights: nested records of a preconditioner, the net in it, and that net's layers, each
with the arguments that it was made with. ``inert_pickle`` reads them without running anything; here they are told
apart by name and turned into

    EDMPrecond, Precond (EDM2)   the EDM path, x0 through EDM's preconditioning
    VPPrecond                    eps on the linear VP path, told (M - 1) t
    VEPrecond                    eps (its output negated) on the EDM path, told ln(rho / 2)
    iDDPMPrecond                 eps on a discrete VP path; the variance that ADM answers with is left out

What is for training alone is left out, too: the augmentation's label, EDM2's uncertainty, the dropout of labels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from . import paths
from .inert_pickle import Record, plain, read, tensors

TRAINING_ONLY = {"augment_dim", "label_dropout"}
ADM = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (32, 16, 8)}
KNOWN = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "Precond")

# what a layer's record says of itself, and where ours says it
SAID = {
    "UNetBlock": {
        "num_heads": lambda m: m.heads,
        "skip_scale": lambda m: m.style.skip_scale,
        "adaptive_scale": lambda m: m.style.modulates,
    },
    "GroupNorm": {"num_groups": lambda m: m.num_groups, "eps": lambda m: m.eps},
    "Block": {
        "num_heads": lambda m: m.heads,
        "flavor": lambda m: m.flavor,
        "res_balance": lambda m: m.config.res_balance,
        "attn_balance": lambda m: m.config.attn_balance,
        "clip_act": lambda m: m.config.clip_act,
    },
    "UNet": {
        "label_balance": lambda m: m.config.label_balance,
        "concat_balance": lambda m: m.config.concat_balance,
    },
}


class EDMCheckpoint(NamedTuple):
    """``config`` is for ``build``; ``tensors`` are its network's; ``about`` is what else the pickle says."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]
    record: Record


def read_edm(path: str | os.PathLike) -> EDMCheckpoint:
    """The network under ``ema``; ``ValueError`` for another pickle, which is named."""
    with open(path, "rb") as file:
        try:
            content = read(file)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is no checkpoint of EDM or EDM2: {error}") from None
    precond = content.get("ema") if isinstance(content, dict) else content
    if not isinstance(precond, Record) or precond.name not in KNOWN:
        found = precond.name if isinstance(precond, Record) else type(precond).__name__
        raise ValueError(
            f"{os.fspath(path)} must hold one of {', '.join(KNOWN)} under 'ema', it holds a {found}"
        )
    try:
        inner = precond["_modules"]["unet" if precond.name == "Precond" else "model"]
        config, named = _meaning(precond, inner)
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)} holds a {precond.name} without {error}") from None
    about: dict[str, Any] = {"source": os.path.basename(os.fspath(path)), "class": precond.name}
    if precond.get("use_fp16"):
        about["use_fp16"] = True
    encoder = content.get("encoder") if isinstance(content, dict) else None
    if isinstance(encoder, Record) and encoder.get("vae_name"):
        config["latents"] = {"name": str(encoder["vae_name"]), **_latents(encoder)}
    return EDMCheckpoint(config, named, about, inner)


def check_same(record: Record, net: torch.nn.Module) -> None:
    """``ValueError`` where a layer's record says another number than the layer that was built in its place."""
    for name, layer in _layers(record):
        for key, ours in SAID.get(layer.name, {}).items():
            if key not in layer.state:
                continue
            theirs, own = layer[key], ours(net.get_submodule(name))
            same = (
                math.isclose(theirs, own) if isinstance(theirs, float) and own is not None else theirs == own
            )
            if not same:
                raise ValueError(
                    f"the layer {name or 'net'} of the checkpoint has {key} = {theirs!r}, the network that it is "
                    f"loaded into {own!r}: the pickle was made by other code than EDM's"
                )


def _meaning(precond: Record, inner: Record) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    net, named = _net(inner), tensors(inner)
    for name in [name for name in named if name.endswith("resample_filter")]:
        _check_filter(name, named.pop(name), net.get("resample_filter", (1, 1)))
    named.pop("map_augment.weight", None)
    size = int(precond["img_resolution"])
    config: dict[str, Any] = {"net": net, "shape": [int(precond["img_channels"]), size, size]}
    kind = precond.name
    if kind in ("EDMPrecond", "Precond"):
        path = paths.edm()
        config |= {"predicts": "x0", "precond": "edm", "sigma_data": float(precond["sigma_data"])}
    elif kind == "VPPrecond":
        slope, start = float(precond["beta_d"]), float(precond["beta_min"])
        path = paths.vp_linear(start, start + slope, float(precond["epsilon_t"]))
        config |= {"predicts": "eps", "time_scale": float(precond["M"]) - 1.0}
    elif kind == "VEPrecond":
        path = paths.edm(float(precond["sigma_max"]), float(precond["sigma_min"]))
        config |= {"predicts": "eps", "time": "log_rho", "time_offset": -math.log(2.0)}
        for name in [name for name in named if "aux_conv." in name]:
            named[name] = -named[name]
    else:
        sigma = precond["_buffers"]["u"].double().numpy()[-2::-1]  # the last is 0; index 0 is the least noise
        path = paths.vp_discrete(1.0 / (1.0 + sigma**2))
        config |= {"predicts": "eps"}
        channels = config["shape"][0]
        net["out_channels"] = channels
        for name in ("out_conv.weight", "out_conv.bias"):
            named[name] = named[name][:channels]
    return {**config, "path": path.to_config()}, named


def _net(inner: Record) -> dict[str, Any]:
    if inner.get("_init_args"):
        raise ValueError("the checkpoint's net was made with unnamed arguments, whose names are not known")
    known = {"SongUNet": ("edm", "song"), "DhariwalUNet": ("edm", "dhariwal"), "UNet": ("edm2", None)}
    if inner.name not in known:
        raise ValueError(f"the checkpoint's net must be one of {', '.join(known)}, it is a {inner.name}")
    kind, style = known[inner.name]
    given = {k: _bare(v) for k, v in inner["_init_kwargs"].items() if k not in TRAINING_ONLY}
    config = {
        "type": kind,
        **({"kind": style} if style else {}),
        **(ADM if style == "dhariwal" else {}),
        **given,
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def _bare(value: Any) -> Any:
    value = plain(value)
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _layers(record: Record, prefix: str = "") -> Iterator[tuple[str, Record]]:
    yield prefix, record
    for name, child in (record.get("_modules") or {}).items():
        if isinstance(child, Record):
            yield from _layers(child, f"{prefix}.{name}" if prefix else name)


def _check_filter(name: str, held: torch.Tensor, taps: Any) -> None:
    line = torch.tensor(taps, dtype=torch.float32)
    wanted = (line[:, None] * line / line.sum() ** 2)[None, None]
    if held.shape != wanted.shape or not torch.allclose(held.float(), wanted, rtol=2e-3):
        raise ValueError(
            f"{name} of the checkpoint is not the filter {list(taps)} that its net was made with"
        )


def _latents(encoder: Record) -> dict[str, list[float]]:
    """EDM2's latents are scale z + bias, a channel at a time, of what the VAE answers."""
    return {key: np.asarray(plain(encoder[key]), dtype=np.float64).tolist() for key in ("scale", "bias")}
