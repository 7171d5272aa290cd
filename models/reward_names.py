"""Rewards by name, for recipes and the shell; from Python, a reward is a function of images.

    class:7                    p(7 | x0) by the digit classifier; log_class:7 its logarithm
    ink, brightness            see ``rewards``
    compressibility:jpeg       with a format
    -ink                       the negative of any of them
    package.module:function    a function of yours, imported

>>> named_reward("-ink")(torch.ones(2, 1, 8, 8))
tensor([-1., -1.])
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import torch

from . import rewards
from .rewards import Reward


def _class(label: str | None, log: bool = False) -> Reward:
    if label is None or label not in map(str, range(10)):
        got = "class" if label is None else f"class:{label}"
        raise ValueError(f"reward must be class:0 .. class:9, got {got!r}")
    from .classifier import load_classifier

    found: dict[torch.device, Reward] = {}

    def reward(x0: torch.Tensor) -> torch.Tensor:
        if x0.device not in found:  # the judge goes where the images are
            found[x0.device] = rewards.class_probability(int(label), load_classifier().to(x0.device), log)
        return found[x0.device](x0)

    return reward


def _compressibility(format: str | None) -> Reward:
    return rewards.compressibility() if format is None else rewards.compressibility(format)  # type: ignore[bad-argument-type]


def _plain(made: Callable[[], Reward], name: str) -> Callable[[str | None], Reward]:
    def make(argument: str | None) -> Reward:
        if argument is not None:
            raise ValueError(f"reward {name} takes no argument, got {name}:{argument}")
        return made()

    return make


NAMES: dict[str, Callable[[str | None], Reward]] = {
    "class": _class,
    "log_class": lambda label: _class(label, log=True),
    "ink": _plain(rewards.ink, "ink"),
    "brightness": _plain(rewards.brightness, "brightness"),
    "compressibility": _compressibility,
}


def named_reward(name: str) -> Reward:
    """The reward called ``name``, see the module."""
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"reward must be a name, e.g. class:7, ink or module.of.yours:function, got {name!r}"
        )
    if name.startswith("-"):
        positive = named_reward(name[1:])

        def negative(x0: torch.Tensor) -> torch.Tensor:
            return -positive(x0)

        negative.differentiable = getattr(positive, "differentiable", True)  # type: ignore[attr-defined]
        return negative
    word, colon, argument = name.partition(":")
    if word in NAMES:
        return NAMES[word](argument if colon else None)
    if "." in word and colon:
        return _imported(word, argument)
    near = difflib.get_close_matches(word, NAMES, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(
        f"reward must be one of {', '.join(NAMES)} or package.module:function of yours, got {name!r}{hint}"
    )


def _imported(module: str, attribute: str) -> Any:
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {module}:{attribute} cannot be imported: {error}") from error
    if not callable(found):
        raise TypeError(
            f"reward {module}:{attribute} must be a function of images, got {type(found).__name__}"
        )
    return found
