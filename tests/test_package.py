"""What setup.cfg ships is what the tree holds: a forgotten folder works in a clone and fails once installed."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.metadata
from pathlib import Path

import fewstep

ROOT = Path(fewstep.__file__).resolve().parent
LAYERS = ("kernels", "models", "samplers", "eval", "distill", "cli")


def setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def forgotten(files: list[str], patterns: dict[str, list[str]]) -> list[str]:
    """Data files below a package's folder that no pattern of ``[options.package_data]`` takes along."""
    left = []
    for name in files:
        layer, _, inner = name.partition("/")
        if not any(fnmatch.fnmatch(inner, pattern) for pattern in patterns.get(f"fewstep.{layer}", [])):
            left.append(name)
    return left


def data_files() -> list[str]:
    found = [
        p
        for layer in LAYERS
        for p in (ROOT / layer).rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc")
    ]
    return sorted(p.relative_to(ROOT).as_posix() for p in found if not p.name.startswith("."))


def test_every_package_is_listed():
    listed = set(setup()["options"]["packages"].split())
    there = {"fewstep"}
    for layer in LAYERS:
        for init in (ROOT / layer).rglob("__init__.py"):
            there.add(".".join(("fewstep", *init.parent.relative_to(ROOT).parts)))
    assert listed == there


def test_all_data_is_shipped():
    patterns = {k: [p.strip() for p in v.split(",")] for k, v in setup()["options.package_data"].items()}
    assert forgotten(data_files(), patterns) == []
    assert forgotten(["models/data/new.npz"], patterns) == ["models/data/new.npz"]


def test_the_command_is_there():
    names = [e.value for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "fewstep"]
    assert names == ["fewstep.cli:main"]
    assert callable(importlib.import_module("fewstep.cli").main)


def test_weights_stay_small():
    assert [n for n in data_files() if (ROOT / n).stat().st_size > 2 * 2**20] == []
