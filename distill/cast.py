"""Who takes part in a recipe: the teacher that it names, a student and a critic made of it, a discriminator on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..models.denoiser import Denoiser
from ..models.load import build
from ..models.reward_names import named_reward
from ..models.rewards import checked
from .data import Data
from .discriminator import Discriminator, discriminator_on
from .lora import recomputing, share_network
from .methods.dd2 import DD2, autoregressive_start
from .methods.meanflow import MeanFlow, mean_flow_student
from .methods.phased import PhasedDMD, phased_student
from .opening import probe
from .players import Players
from .schema import DistillRecipe
from .student import Student, sampled
from .training import warm_up


def cast(recipe: DistillRecipe, method: Any, teacher: Denoiser, data: Data) -> Players:
    """Student, critic and discriminator for a teacher."""
    torch.manual_seed(recipe.seed)
    parent = teacher
    if recipe.student.net is not None:
        parent = _of_its_own(recipe, teacher, data)
    elif isinstance(method, DD2):
        parent = _autoregressive_start(recipe, teacher)
    heads = _heads(recipe, method, {"critic": parent, "teacher": teacher}, data)
    if recipe.shard == "fsdp" and parent.net is not None:
        parent.net.cpu()  # copies of it go to the device as shards, block by block
    if isinstance(method, PhasedDMD):
        student = phased_student(master(parent), recipe.student.steps, method.phases, recipe.student.times)
    elif isinstance(method, MeanFlow):
        s = recipe.student
        student = mean_flow_student(parent, s.steps, s.sampler, s.times)
    else:
        s = recipe.student
        # an adapter is no copy: the student is put in its place below
        mine = parent if recipe.lora.rank else master(parent)
        student = sampled(mine, s)
    adapters = critic = None
    if recipe.lora.rank:
        if isinstance(method, PhasedDMD):
            raise ValueError("lora.rank > 0 is not for phased DMD: its experts are networks of their own")
        if isinstance(method, MeanFlow):
            raise ValueError(
                "lora.rank > 0 is not for MeanFlow: its network has a time more than the teacher's"
            )
        teacher, made, critic, adapters = share_network(teacher, **asdict(recipe.lora))
        student = student._replace(d=made)
    elif hasattr(method, "critic_loss"):
        critic = master(parent)
    if not hasattr(method, "critic_loss"):
        critic = None
    if recipe.train.checkpoint:
        student, critic = _recomputing(student), critic and recomputing(critic)
    source = None if heads is None else critic if method.gan.features == "critic" else teacher
    reward = getattr(method, "reward", None)
    reward = None if reward is None else checked(named_reward(reward), teacher.codec)
    return Players(teacher, student, critic, heads, source, adapters, reward)


def _heads(
    recipe: DistillRecipe, method: Any, sources: Mapping[str, Denoiser], data: Data
) -> Discriminator | None:
    """The discriminator that the method wants, on a network like the one whose features it is to read."""
    gan = getattr(method, "gan", None)
    if gan is None or not (gan.student or hasattr(method, "divergence")):
        return None
    if gan.features not in sources:
        raise ValueError(f"method.gan.features must be critic or teacher, got {gan.features!r}")
    d = sources[gan.features]
    example = data.batch(probe(d, seed=recipe.seed))
    if example.real is None:
        raise ValueError(
            f"method.gan.student = {gan.student} needs real samples, and data.path = {recipe.data.path} has none: give "
            "cached latents, or method.gan.student=0"
        )
    return discriminator_on(d, gan.layers, torch.zeros_like(example.real), example.cond, gan.width)


def master(d: Denoiser) -> Denoiser:
    """A copy of ``d`` in float32, to be trained."""
    twin = d.copy()
    twin.net.float()  # type: ignore[union-attr]
    twin._dtype = None
    return twin


def _recomputing(student: Student) -> Student:
    experts = getattr(student.d, "experts", None)
    if experts is not None:
        student.d.experts = [recomputing(d) for d in experts]  # type: ignore[attr-defined]
        return student
    return student._replace(d=recomputing(student.d))


def _of_its_own(recipe: DistillRecipe, teacher: Denoiser, data: Data) -> Denoiser:
    edm = teacher.path.name == "edm"
    spread = float(data.batch(probe(teacher, 512, recipe.seed)).real.std())
    config = {
        "path": teacher.path.to_config(), "predicts": "x0" if edm else "flow", "precond": "edm" if edm else None,
        "sigma_data": spread, "shape": list(data.shape), "net": dict(recipe.student.net),
    }  # fmt: skip
    parent = build(config)
    warm_up(parent, teacher, data, recipe.seed, recipe.student.warm_up, 4 * recipe.train.batch)
    return parent


def _autoregressive_start(recipe: DistillRecipe, teacher: Denoiser) -> Denoiser:
    s = recipe.student
    if s.steps != 1 or s.times or recipe.lora.rank:
        raise ValueError(
            f"method dd2 makes students of one call, whole networks: student.steps must be 1 and lora.rank 0, got "
            f"{s.steps} and {recipe.lora.rank}"
        )
    return autoregressive_start(teacher, s.warm_up, recipe.train.batch, recipe.seed)


def networks(players: Players) -> list[torch.nn.Module]:
    """Every network that takes part."""
    experts = getattr(players.student.d, "experts", [players.student.d])
    denoisers = [players.teacher, players.critic, *experts]
    found = [d.net for d in denoisers if d is not None and d.net is not None] + [
        heads for heads in (players.discriminator,) if heads is not None
    ]
    return list(dict.fromkeys(found))  # with adapters, teacher, student and critic are one
