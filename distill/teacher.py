"""``fewstep teacher RECIPE [key=value ...]``: a small teacher on data of any source, in pixels or in latents.

    fewstep teacher digits-flow                            # a shipped recipe
    fewstep teacher digits-edm steps=500 out=/tmp          # changed on the command line
    fewstep teacher latent-flow data.path=pictures.zip data.size=256 latents.vae=path/to/vae
    torchrun --nproc_per_node=8 -m fewstep teacher latent-flow data.path=... latents.vae=...

``OUT/NAME.safetensors`` is the teacher: ``load`` takes it, and so does ``teacher.path`` of a distillation. Its
autoencoder, if it has one, is in it; ``NAME.md`` is its card. With ``checkpoint=1000`` the run is kept every so many
steps, and goes on by itself where it was.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..models import paths
from ..models.checkpoint import write_atomically
from ..models.latent_codec import LatentCodec, open_vae
from ..models.load import build, save_checkpoint
from . import checkpoints, parallel
from . import recipe as recipes
from .data import DataRecipe, Source, as_float, open_data, open_source
from .data.latents import cached
from .draws import Draws
from .fitting import Fitting, on_threads
from .levels import Times
from .parallel import ALONE, Ranks
from .progress import track
from .regression import Regression

# Recipes of other kinds than denoisers: a module with ``Recipe``, its dataclass, and ``run(recipe)``, which writes the
# file of weights and answers its path.
KINDS = {
    "classifier": ".classifier",
    "autoregressive": ".autoregressive",
    "masked": ".masked",
    "tarflow": ".tarflow",
}
CHECK = 50  # steps between looks at the loss where a look means waiting for a GPU


@dataclass
class LatentsRecipe:
    """``vae``: the folder of an autoencoder that diffusers saved: the teacher is trained in its latents.

    They are made once, ``batch`` pictures at a time, and kept in ``cache`` (default: beside the teacher).
    """

    vae: str | None = None
    cache: str | None = None
    batch: int = 16


@dataclass
class TeacherRecipe(Fitting):
    """What a teacher's recipe may say. ``net``: ``type`` and what that network's config takes beside the data's shape.

    ``sigma_data``: EDM's constant (default: measured). ``time_cutoff``: the time embedding's frequencies above so many
    radians per unit of t are held at 0 (see ``without_fast_frequencies``). ``exam``: samples that the finished teacher
    is measured on. ``checkpoint``: steps between checkpoints, 0 for none. The rest is as in ``Fitting``.
    """

    kind: str = "denoiser"
    path: dict[str, Any] = field(default_factory=lambda: {"path": "edm"})
    predicts: str = "x0"
    precond: str | None = "edm"
    sigma_data: float | None = None
    time_scale: float = 1.0
    net: dict[str, Any] = field(default_factory=dict)
    time_cutoff: float | None = None
    times: Times = field(default_factory=Times)
    data: DataRecipe = field(default_factory=DataRecipe)
    latents: LatentsRecipe = field(default_factory=LatentsRecipe)
    label_dropout: float = 0.1
    steps: int = 3000
    warmup: int = 100
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    clip: float | None = None
    precision: str = "fp32"
    exam: int = 1000
    checkpoint: int = 0
    device: str = "auto"


def open_samples(
    recipe: TeacherRecipe, ranks: Ranks = ALONE, keep: bool = True
) -> tuple[Source, LatentCodec | None]:
    """(what it is trained on, the autoencoder it came through); ``keep``: make the cache, else encode on the way."""
    if recipe.data.path == "labels":
        raise ValueError("data.path = labels has no samples to train a teacher on")
    if recipe.latents.vae is None:
        source = open_source(recipe.data)
        return source, None if source.latents is None else LatentCodec(source.latents)
    codec = open_vae(recipe.latents.vae, ranks.device)
    if not keep:
        return open_source(recipe.data, codec), codec
    made = Path(recipe.data.path)
    if made.suffix != ".safetensors":
        made = Path(recipe.latents.cache or Path(recipe.out) / f"{recipe.name}-latents.safetensors")
        if ranks.first:
            cached(made, recipe.data, codec, recipe.latents.batch)
        ranks.wait()
    source = open_source(replace(recipe.data, path=str(made), size=None))
    if source.latents is None or source.latents["sha256"] != codec.about["sha256"]:
        raise ValueError(
            f"{made} holds latents of another autoencoder than latents.vae = {recipe.latents.vae}: the hashes of their "
            "weights differ"
        )
    return source, codec


def config_of(recipe: TeacherRecipe, source: Source, codec: LatentCodec | None) -> dict[str, Any]:
    """What ``build`` makes the teacher of: the recipe's network, with the data's shape and classes."""
    net = {"type": "unet", **recipe.net}
    classes = {} if source.classes is None else {"num_class_embeds": source.classes + 1}
    if net["type"] in ("unet", "dit"):
        if len(source.shape) != 3:
            raise ValueError(
                f"net.type = {net['type']} is for images, and data.path = {source.name} has points: mlp"
            )
        channels, side, width = source.shape
        if side != width:
            raise ValueError(
                f"data.path = {source.name} has samples of {side} x {width}: crop them to squares"
            )
        net = {"sample_size": side, "in_channels": channels, "out_channels": channels, **classes, **net}
    elif net["type"] == "mlp":
        net = {"dim": math.prod(source.shape), **classes, **net}
    spread = recipe.sigma_data
    if spread is None:
        spread = round(float(as_float(source.read(Draws(recipe.seed, 0, 0, 512, 512))[0]).std()), 4)
    return {
        "path": paths.from_config(recipe.path).to_config(),
        "predicts": recipe.predicts,
        "precond": recipe.precond,
        "sigma_data": spread,
        "time_scale": recipe.time_scale,
        "net": net,
        "shape": list(source.shape),
        **({} if codec is None else {"latents": codec.about}),
    }


def begin(recipe: TeacherRecipe, ranks: Ranks = ALONE, keep: bool = True) -> Regression:
    """A teacher at its first step."""
    source, codec = open_samples(recipe, ranks, keep)
    config = config_of(recipe, source, codec)
    torch.manual_seed(recipe.seed)
    d = build(config)
    d.codec = codec
    return Regression(recipe, d, open_data(recipe.data, d, source), ranks)


def train(recipe: TeacherRecipe, ranks: Ranks = ALONE) -> tuple[Regression, dict[str, Any]]:
    """The finished teacher in its training, and the record of that."""
    training = begin(recipe, ranks)
    kept = Path(recipe.out) / f".{recipe.name}.training"
    if recipe.checkpoint:
        _resume(training, kept)
    cpu, wall, running = time.process_time(), time.monotonic(), None
    for step, say in track(recipe.steps, recipe.name, quiet=not ranks.first):
        if step < training.done:
            continue
        loss = training.step()
        running = loss if running is None else running.lerp(loss, 0.02)
        if ranks.device.type == "cpu" or training.done % CHECK == 0 or training.done == recipe.steps:
            value = float(loss)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss of {recipe.name} became {value} at step {step}; try a smaller lr than {recipe.lr}"
                )
            say(loss=float(running))
        if recipe.checkpoint and training.done % recipe.checkpoint == 0:
            checkpoints.save(kept, training.done, training.state(), ranks=ranks)
            if ranks.first:
                checkpoints.tidy(kept, 2)
    d = training.finish()
    said = asdict(recipe)
    for part, key in ((said["data"], "path"), (said["latents"], "vae")):
        part[key] = part[key] and os.path.basename(part[key])  # what it was, not where it lay
    for part, key in ((said, "out"), (said["data"], "root"), (said["latents"], "cache")):
        del part[key]
    return training, {
        "recipe": said,
        "core_seconds": round(time.process_time() - cpu, 1),
        "minutes": round((time.monotonic() - wall) / 60, 2),
        "parameters": sum(p.numel() for p in d.net.parameters()),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
    }


def _resume(training: Regression, kept: Path) -> None:
    """Go on where the checkpoints end; ValueError where they are of another recipe."""
    from omegaconf import OmegaConf

    from .schema import differences

    recipe, ranks = training.recipe, training.ranks
    config = kept / "config.yaml"
    if config.is_file():
        changed = differences(OmegaConf.to_container(OmegaConf.load(config)), asdict(recipe))
        if changed:
            raise ValueError(
                f"{kept} holds a teacher half trained by another recipe; give this one another name=, or remove the "
                "folder:\n  " + "\n  ".join(changed)
            )
    elif ranks.first:
        write_atomically(config, OmegaConf.to_yaml(OmegaConf.create(asdict(recipe))))
    ranks.wait()
    found = checkpoints.newest(kept)
    if found is not None:
        state = training.state()
        checkpoints.load(found, state)
        training.load_state(state)


def run(name_or_path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Train by a recipe, write ``<out>/<name>.safetensors`` and its model card, and return the file's path."""
    recipe = read(name_or_path, overrides)
    with on_threads(recipe.threads):
        return _run(recipe) if isinstance(recipe, TeacherRecipe) else _module(recipe.kind).run(recipe)


def read(name_or_path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Any:
    """A teacher's recipe, checked: a ``TeacherRecipe``, or that of its kind."""
    kind = recipes.raw(name_or_path).get("kind", "denoiser")
    if kind != "denoiser" and kind not in KINDS:
        raise ValueError(f"kind must be one of denoiser, {', '.join(KINDS)}, got {kind!r}")
    schema = TeacherRecipe if kind == "denoiser" else _module(kind).Recipe
    recipe = recipes.read(name_or_path, schema, overrides)
    if recipe.kind != kind:
        raise ValueError(f"kind must stay {kind}, which the recipe is for, got {recipe.kind!r}")
    for name in ("steps", "batch"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(recipe, name)}")
    return recipe


def _module(kind: str) -> Any:
    return importlib.import_module(KINDS[kind], __package__)


def _run(recipe: TeacherRecipe) -> Path:
    from . import teacher_card

    ranks = parallel.start(recipe.device)
    training, record = train(recipe, ranks)
    if not ranks.first:
        return recipe.file
    d = training.d
    if recipe.data.path == "digits":
        record["metrics"] = teacher_card.measure(d.to("cpu"))
        text = teacher_card.card(d.config, record)
    else:
        record["metrics"] = teacher_card.measure_on(
            d, training.data, recipe.exam, recipe.file.with_suffix(".png")
        )
        text = teacher_card.plain_card(d.config, record)
    save_checkpoint(recipe.file, d, d.config, training=record)
    write_atomically(recipe.file.with_suffix(".md"), text)
    shutil.rmtree(recipe.file.with_name(f".{recipe.name}.training"), ignore_errors=True)
    return recipe.file


def main(argv: Sequence[str] | None = None) -> int:
    """``fewstep teacher RECIPE [key=value ...]``."""
    parser = argparse.ArgumentParser(
        prog="fewstep teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(recipes.names("denoiser", *KINDS))
    parser.add_argument("recipe", help=f"{known}, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. steps=500 net.dropout=0.1 out=runs")
    parser.add_argument("--print-config", action="store_true", help="print the whole recipe and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, make one step, write nothing"
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.print_config:
            from omegaconf import OmegaConf

            recipe = read(arguments.recipe, arguments.overrides)
            print(OmegaConf.to_yaml(OmegaConf.create(asdict(recipe))), end="")
        elif arguments.dry_run:
            recipe = read(arguments.recipe, arguments.overrides)
            if not isinstance(recipe, TeacherRecipe):
                raise ValueError(f"--dry-run is for denoisers, and {recipe.name} is of kind {recipe.kind}")
            with on_threads(recipe.threads):
                print(dry_run(recipe))
        else:
            file = run(arguments.recipe, arguments.overrides)
            if int(os.environ.get("RANK", 0)) == 0:
                print(file)
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    finally:
        parallel.finish()
    return 0


def dry_run(recipe: TeacherRecipe) -> str:
    """Everything built, one step made, nothing written; what it came to."""
    training = begin(recipe, parallel.start(recipe.device), keep=False)
    loss = float(training.step())
    parameters = sum(p.numel() for p in training.net.parameters())
    shape = " x ".join(map(str, training.data.shape))
    null_label = getattr(training.net, "null_label", None)
    classes = "no classes" if null_label is None else f"{null_label} classes"
    return f"{recipe.name}: {parameters} parameters, samples of {shape}, {classes}\nloss {loss:.4g}"
