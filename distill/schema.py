"""What a distillation recipe may say, as dataclasses that OmegaConf checks; a method's options are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..models import checkpoint
from . import recipe as recipes
from .data import DataRecipe
from .disback import DisBackRecipe
from .methods import METHODS
from .methods.presets import with_preset
from .prompts import PromptsRecipe


@dataclass
class TeacherChoice:
    """``path``: what ``load`` takes, or ``mixture``: an exact one, on ``on_path`` (edm, vp_linear, flow).

    Of a pipeline: ``height`` and ``width`` in pixels where they are not its own; ``dtype``: what the frozen network is
    held in (fp32, bf16, fp16; student and critic are float32 whatever it is).
    """

    path: str = "digits-edm"
    on_path: str = "edm"
    height: int | None = None
    width: int | None = None
    dtype: str = "fp32"


@dataclass
class StudentRecipe:
    """``steps`` calls by ``sampler`` (sde: fresh noise between them; ode), or at given ``times``; ``t_max``: the first.

    ``sampler`` may be a solver's name, for a student that is its teacher tuned: ``steps`` of it on ``grid``.

    ``net``: a network of its own instead of a copy of the teacher's (``type`` and its config), for teachers that have
    none; it is then warmed up for ``warm_up`` iterations on the teacher's own answers, and so is the critic.
    """

    steps: int = 1
    sampler: str = "sde"
    times: list[float] | None = None
    t_max: float | None = None
    grid: str = "vp"
    net: dict[str, Any] | None = None
    warm_up: int = 0


@dataclass
class LoraRecipe:
    """Student and critic as adapters of ``rank`` on the teacher's one frozen network (0: networks of their own).

    ``targets``: suffixes of the names of the layers that get them (default: every linear layer and convolution).
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] | None = None


@dataclass
class Optim:
    """AdamW for both; ``clip`` is of the gradient's norm. The rate does not decay, so a run can be prolonged."""

    lr: float = 2e-4
    critic_lr: float = 4e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip: float = 10.0
    warmup: int = 0


@dataclass
class Train:
    """``iters`` student updates, ``critic_steps`` of the critic before each; ``ema`` counts student updates.

    ``accumulate``: parts that a batch is cut into; ``precision``: fp32 or bf16 (autocast over float32 weights).
    ``checkpoint``: recompute activations in the backward pass instead of keeping them, block by block where a network
    of diffusers offers it. ``bad_limit``: so many non-finite losses are skipped and counted, then the run stops.
    """

    iters: int = 200
    batch: int = 128
    critic_steps: int = 5
    accumulate: int = 1
    precision: str = "fp32"
    checkpoint: bool = False
    ema: float = 0.99
    bad_limit: int = 20


@dataclass
class Report:
    """Every so many iterations; ``exam``: held-out samples, for each of which the teacher has ``teacher_calls``.

    ``keep``: checkpoints besides the best.
    ``sinks``: tensorboard, wandb, or both, beside metrics.jsonl.
    """

    validate: int = 50
    checkpoint: int = 50
    grid: int = 100
    exam: int = 1000
    teacher_calls: int = 40
    keep: int = 2
    sinks: list[str] = field(default_factory=list)


@dataclass
class DistillRecipe:
    """A distillation: who teaches, how the student samples, which method, and what for."""

    kind: str = "distill"
    name: str = "run"
    teacher: TeacherChoice = field(default_factory=TeacherChoice)
    student: StudentRecipe = field(default_factory=StudentRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "dmd2"})
    disback: DisBackRecipe = field(default_factory=DisBackRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    prompts: PromptsRecipe = field(default_factory=PromptsRecipe)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    report: Report = field(default_factory=Report)
    shard: str = "replicate"
    device: str = "auto"
    threads: int = 2
    seed: int = 0
    out: str = "runs"

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.out) / self.name


SHORT = {"divergence": "method.", "reward": "method.", "pairs": "method."}  # said without their place
# What may change between a run and its resumption: how long, how it reports, where it runs.
FREE = ("train.iters", "report", "out", "device", "threads", "data.ahead")


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[DistillRecipe, Any]:
    """(recipe, method): the method's options are checked by its own dataclass.

    >>> recipe, method = read("dmd2-digits", ["method.guidance=1.5"])
    >>> method.guidance
    1.5
    """
    short = [
        f"{SHORT[item.partition('=')[0]]}{item}" if item.partition("=")[0] in SHORT else item
        for item in overrides
    ]
    recipe = recipes.read(source, DistillRecipe, [*short, *_reward_of_pairs(short)])
    if recipe.kind != "distill":
        raise ValueError(f"kind must be distill, got {recipe.kind!r}: it is a recipe for another command")
    options = with_preset(recipe.method)
    name = options.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"method.name must be one of {', '.join(METHODS)}, got {name!r}")
    method = recipes.read(options, METHODS[name])
    recipe.method = {"name": name, **asdict(method)}
    return recipe, method


def _reward_of_pairs(overrides: Sequence[str]) -> list[str]:
    """A file of pairs brings the reward that made them, or none: the recipe's is of pairs that it would make itself."""
    said = dict(item.split("=", 1) for item in overrides if "=" in item)
    pairs = said.get("method.pairs")
    if pairs in (None, "", "null") or "method.reward" in said:
        return []
    try:
        reward = checkpoint.about(Path(pairs).expanduser()).get("reward")
    except (OSError, ValueError):  # whoever opens it says what is wrong, or it is nobody's of ours
        reward = None
    return [f"method.reward={'null' if reward is None else reward}"]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], inside: str = "") -> list[str]:
    """Lines ``key: old -> new`` for what differs and may not.

    >>> differences({"seed": 0, "train": {"iters": 5}}, {"seed": 1, "train": {"iters": 9}})
    ['seed: 0 -> 1']
    """
    lines = []
    for key in sorted({*old, *new}):
        name = f"{inside}{key}"
        if name in FREE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {a} -> {b}")
    return lines
