"""The examples in docstrings run. Modules are imported by name: pytest's own --doctest-modules would import a second
copy of each, named after the clone's folder."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import types

import pytest

import fewstep

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
LAYERS = ("kernels", "models", "samplers", "eval", "distill", "cli")
# What needs a library that the plain package does not bring.
NEEDS = {"fewstep.samplers.scheduler": "diffusers"}


def names() -> list[str]:
    found = ["fewstep"]
    for info in pkgutil.iter_modules(fewstep.__path__):
        if info.name in LAYERS:
            found.append(f"fewstep.{info.name}")
            if info.ispkg:
                package = importlib.import_module(f"fewstep.{info.name}")
                found += [m.name for m in pkgutil.walk_packages(package.__path__, f"fewstep.{info.name}.")]
    return found


def run(module) -> doctest.TestResults:
    return doctest.testmod(module, optionflags=FLAGS, verbose=False)


@pytest.mark.parametrize("name", names())
def test_examples_run(name, monkeypatch, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)  # an example may write a file
    failed, _ = run(importlib.import_module(name))
    assert failed == 0, f"{failed} examples of {name} failed: see the output above"


def test_a_wrong_example_fails(capsys):
    module = types.ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert run(module).failed == 1
    capsys.readouterr()


def test_what_users_call_has_an_example():
    """Every public function and class of ``fewstep.samplers``, itself or its module."""
    samplers = importlib.import_module("fewstep.samplers")
    bare = []
    for name in getattr(samplers, "__all__", []):
        thing = getattr(samplers, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            module = inspect.getmodule(thing)
            if ">>>" not in (thing.__doc__ or "") + ((module and module.__doc__) or ""):
                bare.append(name)
    assert bare == []
