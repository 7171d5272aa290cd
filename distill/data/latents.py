"""Latents made once: a data set through an autoencoder of diffusers, kept in a file that training reads at random.

    fewstep latents pictures.zip --vae path/to/vae --out cache.safetensors --size 256 --flip
    fewstep teacher latent-flow data.path=cache.safetensors latents.vae=path/to/vae

The file holds ``latents`` (N, C, h, w), as the network sees them, ``mirrored`` (those of the mirrored pictures, since a
mirrored latent is not the latent of the mirrored picture), ``labels``, and in its metadata what autoencoder made them:
name, config with scaling, and the SHA-256 of the weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...eval.files import written_aside
from ...models.latent_codec import LatentCodec, open_vae
from .source import Items

FORMAT = 1
_KEY = "fewstep"
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def latents(path: Path) -> Items:
    """The latents of a file, read as they are asked for."""
    file, about = _about(path)
    names = set(file.keys())
    parts = {name: file.get_slice(name) for name in names & {"latents", "mirrored"}}
    count, *shape = parts["latents"].get_shape()

    def get(name: str):
        part = parts[name]
        return lambda rows: torch.cat([part[row : row + 1] for row in rows.tolist()])

    return Items(
        str(path), count, tuple(shape), get("latents"), file.get_tensor("labels") if "labels" in names else None,
        about["classes"], get("mirrored") if "mirrored" in names else None, slow=True, latents=about["vae"],
    )  # fmt: skip


def encoded(items: Items, codec: LatentCodec) -> Items:
    """The same items through the autoencoder, as they are asked for."""
    from .batches import as_float

    def get(rows: torch.Tensor, mirror: bool = False) -> torch.Tensor:
        x = as_float(items.get(rows))
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)  # autoencoders know colours
        return codec.encode(x.flip(-1) if mirror else x).cpu()

    try:
        shape = tuple(get(torch.tensor([0])).shape[1:])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{codec.about['name']} does not encode samples of shape {items.shape}: {error}"
        ) from error
    return Items(
        items.name, items.count, shape, get, items.labels, items.classes, lambda rows: get(rows, True),
        latents=codec.about,
    )  # fmt: skip


def keep(
    out: Path, items: Items, codec: LatentCodec, batch: int = 16, flip: bool = False,
    dtype: torch.dtype = torch.float16, made_from: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Encode all items into a file of latents, a batch at a time; it appears whole or not at all."""
    from ..progress import track

    if out.suffix != ".safetensors":
        raise ValueError(f"latents are kept in a .safetensors, got {out}")
    made = encoded(items, codec)
    about = {
        "format": FORMAT, "kind": "latents", "vae": codec.about, "classes": items.classes,
        "made_from": made_from or {},
    }  # fmt: skip
    tensors = {"latents": (dtype, (made.count, *made.shape))}
    if flip:
        tensors["mirrored"] = (dtype, (made.count, *made.shape))
    if items.labels is not None:
        tensors["labels"] = (torch.int64, (made.count,))
    parts = [get for get, wanted in ((made.get, True), (made.mirrored, flip)) if wanted]
    rows = torch.arange(made.count).split(batch)

    def pieces() -> Iterator[torch.Tensor]:
        for step, say in track(len(rows) * len(parts), f"latents of {items.name}"):
            y = parts[step // len(rows)](rows[step % len(rows)])
            say(std=float(y.std()))
            if not torch.isfinite(y).all():
                raise ValueError(f"{codec.about['name']} made NaN or infinity of {items.name}")
            yield y.to(dtype)
        if items.labels is not None:
            yield items.labels

    with written_aside(out) as aside, open(aside, "wb") as file:
        file.write(_header(tensors, about))
        for piece in pieces():
            file.write(piece.contiguous().view(torch.uint8).numpy().tobytes())


def _header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], about: dict[str, Any]) -> bytes:
    """What a safetensors file begins with, so that tensors larger than memory can follow piece by piece."""
    place = 0
    entries: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(about, sort_keys=True)}}
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize
        for n in shape:
            size *= n
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def cached(path: Path, recipe: Any, codec: LatentCodec, batch: int = 16) -> None:
    """Make the file of a recipe's data, unless it is there; ValueError where it was made of others."""
    from .batches import open_items

    items = open_items(recipe)
    wanted = {
        "data": Path(items.name).name, "count": items.count, "shape": list(items.shape), "flip": recipe.flip,
        "vae": codec.about["sha256"],
    }  # fmt: skip
    if not path.is_file():
        return keep(path, items, codec, batch, recipe.flip, made_from=wanted)
    found = _about(path)[1]["made_from"]
    if found != wanted:
        changed = [f"{k}: {found.get(k)} -> {wanted[k]}" for k in wanted if found.get(k) != wanted[k]]
        raise ValueError(
            f"{path} holds latents of something else; name another latents.cache, or remove it:\n  "
            + "\n  ".join(changed)
        )


def _about(path: Path) -> tuple[Any, dict[str, Any]]:
    """(the open file, what its metadata say); ValueError where it is no file of latents."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    about = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    if about.get("kind") != "latents" or about.get("format") != FORMAT:
        raise ValueError(f"{path} holds no latents of this version: fewstep latents makes such")
    return file, about


def main(argv: Sequence[str] | None = None) -> int:
    """``fewstep latents DATA --vae FOLDER --out FILE``."""
    import argparse

    from .batches import DataRecipe, open_items

    parser = argparse.ArgumentParser(
        prog="fewstep latents", description="Encode a data set once, to train in latents."
    )
    parser.add_argument("data", help="what data.path takes: pictures, shards, torchvision:NAME")
    parser.add_argument(
        "--vae", required=True, help="a folder that diffusers saved an autoencoder or a pipeline to"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new .safetensors")
    parser.add_argument("--size", type=int, help="scale and cut pictures to squares of so many pixels")
    parser.add_argument("--root", default="data", help="of torchvision's data sets")
    parser.add_argument("--flip", action="store_true", help="also keep those of the mirrored pictures")
    parser.add_argument("--batch", type=int, default=16, help="pictures that the autoencoder sees at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        raise FileExistsError(f"{arguments.out} exists already: --out must name a new file")
    items = open_items(DataRecipe(arguments.data, size=arguments.size, root=arguments.root))
    keep(arguments.out, items, open_vae(arguments.vae, arguments.device), arguments.batch, arguments.flip)
    found = latents(arguments.out)
    print(f"{arguments.out}: {found.count} latents of shape {' x '.join(map(str, found.shape))}")
    return 0
