"""Who takes part in a recipe: the teacher that it names, a student and a critic made of it, a discriminator on one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ..models import load, paths
from ..models.denoiser import Denoiser
from ..models.load import build
from .data import Data, grid_mixture
from .discriminator import discriminator_on
from .draws import Draws
from .lora import share_network
from .methods.meanflow import MeanFlow, mean_flow_student
from .methods.phased import PhasedDMD, phased_student
from .players import Players
from .schema import DistillRecipe
from .student import few_steps
from .training import warm_up


def open_teacher(recipe: DistillRecipe) -> Denoiser:
    """The teacher of a recipe."""
    if recipe.teacher.path == "mixture":
        d = grid_mixture().denoiser(paths.by_name(recipe.teacher.on_path))
        d.shape = (2,)
        return d
    return load(recipe.teacher.path)


def cast(recipe: DistillRecipe, method: Any, teacher: Denoiser, data: Data) -> Players:
    """Student, critic and discriminator for a teacher."""
    torch.manual_seed(recipe.seed)
    parent = teacher
    if recipe.student.net is not None:
        parent = _of_its_own(recipe, teacher, data)
    if isinstance(method, PhasedDMD):
        student = phased_student(parent, recipe.student.steps, method.phases, recipe.student.times)
    elif isinstance(method, MeanFlow):
        s = recipe.student
        student = mean_flow_student(parent, s.steps, s.sampler, s.times)
    else:
        s = recipe.student
        student = few_steps(parent.copy(), s.steps, s.sampler, s.times, s.t_max)
    critic, adapters = parent.copy(), None
    if recipe.lora.rank:
        if isinstance(method, PhasedDMD):
            raise ValueError("lora.rank > 0 is not for phased DMD: its experts are networks of their own")
        if isinstance(method, MeanFlow):
            raise ValueError(
                "lora.rank > 0 is not for MeanFlow: its network has a time more than the teacher's"
            )
        teacher, made, critic, adapters = share_network(teacher, **asdict(recipe.lora))
        student = student._replace(d=made)
    if not hasattr(method, "critic_loss"):
        critic = None
    gan = getattr(method, "gan", None)
    if gan is None or not (gan.student or hasattr(method, "divergence")):
        return Players(teacher, student, critic, adapters=adapters)
    if gan.features not in ("critic", "teacher"):
        raise ValueError(f"method.gan.features must be critic or teacher, got {gan.features!r}")
    source = critic if gan.features == "critic" else teacher
    probe = data.batch(_probe(recipe))
    heads = discriminator_on(source, gan.layers, torch.zeros(2, *data.shape), probe.cond, gan.width)
    return Players(teacher, student, critic, heads, source, adapters)


def _probe(recipe: DistillRecipe) -> Draws:
    return Draws(recipe.seed, 0, 0, 2, 2)


def _of_its_own(recipe: DistillRecipe, teacher: Denoiser, data: Data) -> Denoiser:
    edm = teacher.path.name == "edm"
    spread = float(data.batch(_probe(recipe)._replace(count=512, total=512)).real.std())
    config = {
        "path": teacher.path.to_config(), "predicts": "x0" if edm else "flow", "precond": "edm" if edm else None,
        "sigma_data": spread, "shape": list(data.shape), "net": dict(recipe.student.net),
    }  # fmt: skip
    parent = build(config)
    warm_up(parent, teacher, data, recipe.seed, recipe.student.warm_up, 4 * recipe.train.batch)
    return parent


def networks(players: Players) -> list[torch.nn.Module]:
    """Every network that takes part."""
    experts = getattr(players.student.d, "experts", [players.student.d])
    denoisers = [players.teacher, players.critic, *experts]
    return [d.net for d in denoisers if d is not None and d.net is not None] + [
        heads for heads in (players.discriminator,) if heads is not None
    ]
