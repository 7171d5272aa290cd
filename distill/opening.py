"""What a recipe opens: its teacher, and its data in the form that this teacher takes, prompts among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..models import load, paths
from ..models.denoiser import Denoiser
from .data import Data, grid_mixture, open_data, open_source
from .draws import Draws
from .parallel import ALONE, Ranks
from .prompts import SUFFIXES, embed, prompted, read_prompts
from .schema import DistillRecipe

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_teacher(recipe: DistillRecipe) -> Denoiser:
    """The teacher of a recipe."""
    t = recipe.teacher
    if t.path == "mixture":
        d = grid_mixture().denoiser(paths.by_name(t.on_path))
        d.shape = (2,)
        return d
    if t.dtype not in DTYPES:
        raise ValueError(f"teacher.dtype must be one of {', '.join(DTYPES)}, got {t.dtype!r}")
    if t.dtype != "fp32" and recipe.train.precision != "bf16":
        raise ValueError(
            f"teacher.dtype = {t.dtype} is for train.precision = bf16, which brings it and the float32 of student and "
            f"critic together; got train.precision = {recipe.train.precision}"
        )
    return load(t.path, dtype=DTYPES[t.dtype], height=t.height, width=t.width)


def open_batches(recipe: DistillRecipe, teacher: Denoiser, ranks: Ranks = ALONE) -> Data:
    """The data of a recipe: prompts, and samples beside them if there are any, for a teacher that takes text."""
    path, prompts = recipe.data.path, recipe.prompts.path
    named = Path(path).suffix in SUFFIXES
    if not getattr(teacher.codec, "takes_text", False):
        if named or prompts is not None:
            given = f"data.path = {path}" if named else f"prompts.path = {prompts}"
            raise ValueError(f"{given} holds prompts, and the teacher {recipe.teacher.path} takes no text")
        return open_data(recipe.data, teacher)
    if named and prompts is not None:
        raise ValueError(f"data.path = {path} and prompts.path = {prompts} both hold prompts: give one")
    if not named and prompts is None:
        raise ValueError(
            f"the teacher {recipe.teacher.path} takes text: data.path (or prompts.path, beside latents) must be a "
            f"{' or '.join(SUFFIXES)} of prompts, got data.path = {path}"
        )
    teacher.to(ranks.device)  # encoders and all
    embedded = embed(teacher, read_prompts(path if named else str(prompts)), recipe.prompts, ranks)
    return prompted(teacher, embedded, None if named or path == "prompts" else open_source(recipe.data))


def probe(teacher: Denoiser, count: int = 2, seed: int = 0) -> Draws:
    """The draws of a batch to learn shapes and the like from."""
    net = teacher.net
    device = torch.device("cpu") if net is None else next(net.parameters()).device
    return Draws(seed, 0, 0, count, count, device)


def check_guidance(method: Any, teacher: Denoiser, data: Data) -> None:
    """ValueError where the method guides a teacher that cannot be."""
    guidance = getattr(method, "guidance", 1.0)
    if guidance == 1:
        return
    if getattr(teacher.codec, "distilled", False):
        raise ValueError(
            f"method.guidance = {guidance} is classifier-free guidance, and this {type(teacher.net).__name__} has its "
            f"guidance distilled: say method.guidance=1 prompts.scale={guidance}"
        )
    if data.batch(probe(teacher)).null is None:
        raise ValueError(
            f"method.guidance = {guidance} needs a null condition, and the teacher and the data give none"
        )
