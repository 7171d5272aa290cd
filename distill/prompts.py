"""Prompts of a text-to-image teacher: embedded once by its pipeline's own encoders, kept on disk, read row by row.

    prompts.txt                     a prompt a line
    prompts.jsonl                   an object a line, its prompt under "prompt", "caption" or "text"

Embeddings are safetensors of some hundred prompts each, in a folder named by a hash of prompts, options and encoders:
another run finds them, and a broken off one goes on. Encoders are let go of afterwards.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "two.jsonl"
>>> _ = path.write_text('{"prompt": "a fox"}\\n\\n{"prompt": "a hare"}\\n')
>>> read_prompts(path)
['a fox', 'a hare']
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import write_atomically
from ..models.denoiser import Denoiser
from .data import Data
from .data.source import Source
from .draws import Draws
from .parallel import ALONE, Ranks

KEYS = ("prompt", "caption", "text")
SUFFIXES = (".txt", ".jsonl")
SHARD = 256  # prompts a file
TOKENS = 4096  # numbers that a tensor of an encoder is told by


@dataclass
class PromptsRecipe:
    """``path``: the prompts, where ``data.path`` does not name them; ``negative``: what guidance leads away from.

    ``scale``: the guidance scale that is told to networks with guidance distilled into them (default: the pipeline's).
    ``options``: the pipeline's own, e.g. max_sequence_length; ``cache``: where embeddings are kept; ``batch``: prompts
    that the encoders see at once.
    """

    path: str | None = None
    negative: str = ""
    scale: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    cache: str = "~/.cache/fewstep/prompts"
    batch: int = 32


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a .txt or .jsonl, without empty lines."""
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"prompts.path must end in {' or '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"prompts.path = {path} is no file")
    lines = [(number, line.strip()) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    texts = [_prompt(path, number, line) for number, line in lines if line]
    if not texts:
        raise ValueError(f"prompts.path = {path} holds no prompts")
    return texts


def _prompt(path: Path, number: int, line: str) -> str:
    if path.suffix == ".txt":
        return line
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
    text = next((found[key] for key in KEYS if key in found), None) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"line {number} of {path} must be an object with a text under {', '.join(KEYS)}")
    return text


# --- embeddings ---------------------------------------------------------------------------------------------------


class Embedded:
    """Embeddings of ``count`` prompts in ``folder``: ``rows`` are their conditions, ``null`` is guidance's."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self._open: dict[int, Any] = {}
        about = json.loads((folder / "about.json").read_text())
        self._shared, self._constants, self._null = about["shared"], about["constants"], about["null"]

    def rows(self, which: torch.Tensor, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The condition of prompts ``which`` (B,)."""
        places = [divmod(int(i), SHARD) for i in which]
        flat = dict(self._constants)
        first = self._file(0)
        for name in first.keys():  # noqa: SIM118 (not a dict)
            if name in self._shared:
                flat[name] = first.get_tensor(name)
            else:
                flat[name] = torch.cat([self._file(k).get_slice(name)[i : i + 1] for k, i in places])
        return _nested({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in flat.items()})

    def null(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The condition without a prompt, one row, or None where there is none."""
        if not self._null:
            return None
        from safetensors.torch import load_file

        flat = load_file(self.folder / "null.safetensors")
        return _nested({k: v.to(device) for k, v in flat.items()} | self._constants)

    def _file(self, k: int) -> Any:
        if k not in self._open:
            from safetensors import safe_open

            self._open[k] = safe_open(self.folder / f"{k:06d}.safetensors", framework="pt")
        return self._open[k]


def embed(teacher: Denoiser, texts: Sequence[str], recipe: PromptsRecipe, ranks: Ranks = ALONE) -> Embedded:
    """The embeddings of ``texts``, from the cache as far as they are there. The teacher's encoders are gone then."""
    options = _options(teacher, recipe)
    said = {"prompts": list(texts), "negative": recipe.negative, "options": options, "shape": teacher.shape}
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    total.update(fingerprint(teacher.codec.pipe).encode())
    folder = Path(recipe.cache).expanduser() / total.hexdigest()[:32]
    if ranks.first and not (folder / "about.json").is_file():
        _write(folder, teacher, texts, recipe, options)
    ranks.wait()
    release(teacher.codec.pipe)
    return Embedded(folder, len(texts))


def _options(teacher: Denoiser, recipe: PromptsRecipe) -> dict[str, Any]:
    codec = teacher.codec
    if codec is None or not codec.takes_text:
        raise ValueError(
            f"prompts are of no use to this teacher: its {type(teacher.net).__name__} takes no text"
        )
    if recipe.scale is not None and not codec.distilled:
        raise ValueError(
            f"prompts.scale = {recipe.scale} is told to networks with guidance distilled into them, and this "
            f"{type(teacher.net).__name__} is not told any: give method.guidance"
        )
    if codec.distilled and recipe.negative:
        raise ValueError(
            f"prompts.negative must be '', got {recipe.negative!r}: this {type(teacher.net).__name__} has its guidance "
            "distilled and takes no null"
        )
    scale = codec.guidance if recipe.scale is None else recipe.scale
    return {**recipe.options, **({"guidance_scale": scale} if codec.distilled else {})}


def _write(
    folder: Path, teacher: Denoiser, texts: Sequence[str], recipe: PromptsRecipe, options: Mapping[str, Any]
) -> None:
    from safetensors.torch import save

    about: dict[str, Any] = {}
    # a pipeline's branches are told apart by solving for their rows' weights: more rows than numbers cannot be
    size = max(1, min(recipe.batch, math.prod(teacher.shape or (0,)) // 8))
    for k, part in enumerate(_cut(texts, SHARD)):
        path = folder / f"{k:06d}.safetensors"
        if path.is_file() and k:  # the first says what the others look like
            continue
        pieces = [_piece(teacher, piece, recipe.negative, options) for piece in _cut(part, size)]
        conds, nulls = zip(*pieces, strict=True)
        tensors = {name: v for name, v in conds[0].items() if isinstance(v, torch.Tensor)}
        if not k:
            about = {
                "shared": sorted(name for name in tensors if name.rpartition(".")[2] in _shared(teacher)),
                "constants": {name: v for name, v in conds[0].items() if name not in tensors},
                "null": nulls[0] is not None,
            }
            if nulls[0] is not None:
                row = {n: v[:1].contiguous() for n, v in nulls[0].items() if isinstance(v, torch.Tensor)}
                write_atomically(folder / "null.safetensors", save(row))
        joined = {
            name: v if name in about["shared"] else torch.cat([cond[name] for cond in conds]).contiguous()
            for name, v in tensors.items()
        }
        write_atomically(path, save(joined))
    write_atomically(folder / "about.json", json.dumps({**about, "count": len(texts)}, indent=1))


def _shared(teacher: Denoiser) -> frozenset[str]:
    return teacher.call.args[1].shared  # what the pipeline gives its network once for a whole batch


def _piece(
    teacher: Denoiser, texts: Sequence[str], negative: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    found = teacher.codec.embed(list(texts), negative, **options)
    null = None if found.null is None else dict(_flat(found.null))
    return dict(_flat(found.cond)), null


def _flat(cond: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in cond.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{inside}{name}.")
        else:
            yield f"{inside}{name}", value.cpu() if isinstance(value, torch.Tensor) else value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    cond: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = cond
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return cond


def _cut(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[first : first + size] for first in range(0, len(texts), size))


def fingerprint(pipe: Any) -> str:
    """What the pipeline's encoders and tokenizers are, by their tensors' names, shapes and some of their numbers."""
    total = hashlib.sha256(type(pipe).__name__.encode())
    for name in encoders(pipe):
        part = getattr(pipe, name)
        total.update(f"{name} {type(part).__name__}".encode())
        if isinstance(part, torch.nn.Module):
            for key, value in part.state_dict().items():
                some = value.flatten()[:: max(1, value.numel() // TOKENS)].double().cpu()
                total.update(f"{key} {tuple(value.shape)}".encode() + some.numpy().tobytes())
        elif hasattr(part, "get_vocab"):
            total.update(json.dumps(sorted(part.get_vocab().items())).encode())
    return total.hexdigest()


def encoders(pipe: Any) -> list[str]:
    """The names of the pipeline's text encoders and tokenizers."""
    return sorted(name for name in pipe.components if "text_encoder" in name or "tokenizer" in name)


def release(pipe: Any) -> None:
    """Let go of the pipeline's text encoders."""
    for name in encoders(pipe):
        if "text_encoder" in name:
            setattr(pipe, name, None)


# --- as data ------------------------------------------------------------------------------------------------------


def prompted(teacher: Denoiser, embedded: Embedded, source: Source | None = None) -> Data:
    """Batches of prompts, drawn at random; with the samples of ``source``, whose labels are their prompts' numbers.

    A source without labels is drawn independently of the prompts.
    """
    shape = teacher.shape
    if shape is None:
        raise ValueError("prompts need a teacher that knows its shape")
    if source is not None and source.classes is not None and source.classes > embedded.count:
        raise ValueError(
            f"data.path = {source.name} has labels up to {source.classes - 1}, which are its prompts' numbers, and "
            f"there are {embedded.count} prompts"
        )
    pack = _fitting(teacher, source)

    def real(draws: Draws) -> tuple[torch.Tensor | None, dict[str, Any]]:
        x = which = None
        if source is not None:
            x, which = source.read(draws)
            x = pack(x.to(draws.device, torch.float32, non_blocking=True))
        if which is None:
            which = (draws._replace(device="cpu").uniform("prompt") * embedded.count).long()
        return x, embedded.rows(which, draws.device)

    nulls: dict[Any, Any] = {}

    def null(cond: dict[str, Any]) -> dict[str, Any] | None:
        device = next(v for _, v in _tensors(cond)).device
        if device not in nulls:
            nulls[device] = embedded.null(device)
        return nulls[device]

    return Data(shape, real, null, embedded.rows, range(embedded.count))


def _tensors(cond: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in cond.items():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield name, value


def _fitting(teacher: Denoiser, source: Source | None):
    """Latents as the network takes them: as they are, or packed into tokens (Flux)."""
    if source is None or source.shape == teacher.shape:
        return lambda x: x
    grid = teacher.codec.grid
    if grid is not None and source.shape[1:] == (2 * grid[0], 2 * grid[1]):
        return teacher.codec._packed
    raise ValueError(
        f"data.path = {source.name} holds samples of shape {source.shape}, and the teacher makes {teacher.shape}: "
        "cache latents of its own size"
    )
