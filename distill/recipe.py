"""Recipes: YAML files, typed by dataclasses, changed by ``key=value`` on the command line.

>>> from dataclasses import dataclass
>>> @dataclass
... class Demo:
...     steps: int = 10
...     lr: float = 1e-3
>>> read({"steps": 20}, Demo, ["lr=0.5"])
Demo(steps=20, lr=0.5)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Recipe = TypeVar("Recipe")
FOLDER = Path(__file__).parent / "recipes"


def names(*kinds: str) -> tuple[str, ...]:
    """The recipes that ship with the package, of the kinds asked for or all."""
    files = sorted(FOLDER.glob("*.yaml"))
    return tuple(p.stem for p in files if not kinds or raw(str(p)).get("kind", "denoiser") in kinds)


def find(name_or_path: str) -> Path:
    """A recipe's file, by its name or its path."""
    shipped = FOLDER / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    near = difflib.get_close_matches(name_or_path, names(), 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"recipe must be one of {', '.join(names())} or a YAML file, got {name_or_path!r}{hint}")


def raw(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as plain data, unchecked."""
    from omegaconf import OmegaConf

    if isinstance(source, Mapping):
        return dict(source)
    data = OmegaConf.to_container(OmegaConf.load(find(str(source))))
    if not isinstance(data, dict):
        raise ValueError(
            f"a recipe must be a mapping of keys to values, got {type(data).__name__} in {source}"
        )
    return data


def read(
    source: str | Path | Mapping[str, Any], schema: type[Recipe], overrides: Sequence[str] = ()
) -> Recipe:
    """Defaults of ``schema``, then the file (or mapping), then overrides: ``steps=500``, ``net.dropout=0.1``."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    for item in overrides:
        if "=" not in item:
            raise ValueError(f"overrides must look like key=value, got {item!r}")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(schema), raw(source), OmegaConf.from_dotlist(list(overrides))
        )
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        if not isinstance(error, (ConfigKeyError, ConfigAttributeError)):
            place = error.full_key or error.key
            raise ValueError(f"recipe: {f'{place}: ' if place else ''}{problem}") from error
        place = error.object_type if hasattr(error.object_type, "__dataclass_fields__") else schema
        known = list(place.__dataclass_fields__)  # type: ignore[union-attr]
        near = difflib.get_close_matches(str(error.key), known, 1)
        # newer releases of omegaconf say it themselves
        hint = f" (did you mean {near[0]!r}?)" if near and "id you mean" not in problem else ""
        raise ValueError(f"recipe: {problem}{hint}; {place.__name__} has {', '.join(known)}") from error
