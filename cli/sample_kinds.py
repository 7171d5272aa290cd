"""``fewstep sample`` for what is no denoiser: masked models of pixels and invertible flows.

fewstep sample digits-masked --parallel 8 --order 2
fewstep sample digits-masked --solver masked_ancestral --steps 16
fewstep sample digits-tarflow --guidance 1.5
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .arguments import solver_options

if TYPE_CHECKING:
    import torch

KINDS = ("masked", "tarflow")
SOLVERS = {"masked": ("first_hitting", "masked_ancestral"), "tarflow": ("gs_jacobi", "sequential")}


def kind_of(name: str) -> str | None:
    """masked or tarflow, if the name or file is one; None for all else."""
    from ..models import checkpoint

    shipped = checkpoint.DATA / f"{name}.safetensors"
    path = shipped if shipped.parent == checkpoint.DATA and shipped.is_file() else Path(name).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        kind = checkpoint.about(path).get("kind")
    except ValueError:
        return None  # whoever opens it says what is wrong
    return kind if kind in KINDS else None


class Drawer:
    """``draw(ids)`` -> (images (n, C, H, W), their labels or None); ``said``: by what, and in how many calls."""

    def __init__(self, kind: str, arguments: argparse.Namespace, words: list[str], device: torch.device):
        if arguments.table is not None or arguments.prompt or arguments.negative:
            given = "table" if arguments.table is not None else "prompt" if arguments.prompt else "negative"
            raise ValueError(f"--{given} is of no use: {arguments.model} is a {kind} model")
        known = SOLVERS[kind]
        self.solver = known[0] if arguments.solver == "abm" else arguments.solver  # the default
        if self.solver not in known:
            raise ValueError(
                f"--solver must be one of {', '.join(known)} for {arguments.model}, got {self.solver!r}"
            )
        self.arguments, self.calls = arguments, 0
        self._draw, self.classes = (_masked if kind == "masked" else _flow)(self, words, device)
        if self.classes is None:
            for flag in ("label", "guidance"):
                if getattr(arguments, flag) is not None:
                    raise ValueError(f"--{flag} is of no use: {arguments.model} knows no classes")
        elif arguments.label is not None and not 0 <= arguments.label < self.classes:
            raise ValueError(f"--label must lie in 0 .. {self.classes - 1}, got {arguments.label}")

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        label = None
        if self.classes is not None:
            label = ids % self.classes if self.arguments.label is None else ids * 0 + self.arguments.label
        x, calls = self._draw(ids, label)
        self.calls = max(self.calls, calls)
        return x, label

    @property
    def said(self) -> str:
        return f"{self.solver}, {self.calls} calls each at most"


def _masked(self: Drawer, words: list[str], device: torch.device) -> tuple[Callable, int | None]:
    from .. import samplers
    from ..models import load_masked
    from ..models.pixel_tokens import to_images
    from ..samplers import masked_cfg

    model = load_masked(self.arguments.model)
    assert model.net is not None
    model.net.to(device)
    classes, shape = model.net.net.null_label, (1, model.net.side, model.net.side)
    sampler = getattr(samplers, self.solver)
    options = _options(sampler, words, ("cond", "seed", "ids", "progress"))
    first = (self.arguments.steps,) if self.solver == "masked_ancestral" else ()
    if self.arguments.guidance is not None:
        model = masked_cfg(model, self.arguments.guidance)

    def draw(ids: torch.Tensor, label: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        cond = None if label is None else {"label": label}
        tokens, info = sampler(
            model, len(ids), *first, cond=cond, seed=self.arguments.seed, ids=ids, **options
        )
        return to_images(tokens, shape, model.vocabulary), info.calls

    return draw, classes


def _flow(self: Drawer, words: list[str], device: torch.device) -> tuple[Callable, int | None]:
    from ..models import load_flow
    from ..samplers import gs_jacobi
    from ..samplers.noise import starting_noise

    flow = load_flow(self.arguments.model).to(device)
    fast = self.solver == "gs_jacobi"
    options = (
        _options(gs_jacobi, words, ("plan", "guidance"))
        if fast
        else _options(flow.inverse, words, ("guidance",))
    )
    # 1 is no guidance on the command line, and 0 is in the flow's own formula
    options["guidance"] = 0.0 if self.arguments.guidance is None else self.arguments.guidance - 1

    def draw(ids: torch.Tensor, label: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        z = starting_noise(self.arguments.seed, ids, flow.shape)
        if fast:
            x, info = gs_jacobi(flow, z, label, **options)
            calls = info.calls
        else:
            x, calls = flow.inverse(z, label, **options), sum(block.tokens - 1 for block in flow.blocks)
        return (flow.denoise(x, label) if flow.config.noise else x), calls

    embeds = flow.config.num_class_embeds
    return draw, None if embeds is None else embeds - 1


def _options(sampler: Callable, words: list[str], ours: tuple[str, ...]) -> dict[str, Any]:
    """Flags as the sampler's own options, those beside what we give it."""
    known = {
        name: one.default
        for name, one in inspect.signature(sampler).parameters.items()
        if one.default is not one.empty and name not in (*ours, "label")
    }
    entry = SimpleNamespace(name=getattr(sampler, "__name__", "it"), options=known)
    return solver_options(SimpleNamespace(entry=entry), words)  # type: ignore[bad-argument-type]
