"""The kernels of norms and gates put into a model that is there already, and taken out again.

    from fewstep.models import patch
    handle = patch(pipe.unet)            # or .transformer, .vae: every module whose class is known, exactly
    print(handle.report())
    handle.undo()                        # or: with patch(model): ...

What is replaced is the ``forward`` of single modules, in their own ``__dict__``: parameters, buffers, names, classes
and children stay the same objects, so state dicts, LoRA (before or after), EMA copies and ``save_pretrained`` go on as
they are. Layers that adapters may wrap are always called as modules. A module whose norms were exchanged or hooked
later runs its own forward again, and so does a class of diffusers whose source is not the one known here: it is
reported, never computed by guess. Attention is left to diffusers' and torch's backends. The order is load, LoRA, patch,
shard, compile. Forward-mode derivatives run the references by themselves; second derivatives of kernels do not exist:
take them under ``kernels.dispatch.using("reference")``.

    >>> from fewstep.models import DiT, DiTConfig
    >>> net = DiT(DiTConfig(sample_size=8, hidden_size=16, depth=2, num_heads=2))
    >>> with patch(net) as handle:
    ...     print(handle.report())
    patched: 2 Block (layer_norm_modulate, gate_residual)
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

FAMILIES = ("patch_transformers", "patch_convolutions")


class Rule(NamedTuple):
    """What replaces the forward of one class.

    ``inner`` names the children that the new forward does not call, with their only possible class; ``check`` says why
    an instance cannot be patched, or None. Both are asked again at every call. ``sources``: the code that
    is replaced, as "module:attribute", and the fingerprints that it may have; empty for classes of this package.
    """

    forward: Callable[..., Any]
    ops: tuple[str, ...]
    inner: dict[str, type]
    check: Callable[[nn.Module], str | None]
    sources: dict[str, tuple[str, ...]]


def replaces(
    *ops: str,
    inner: dict[str, type] | None = None,
    check: Callable[[nn.Module], str | None] = lambda module: None,
    sources: dict[str, tuple[str, ...]] | None = None,
) -> Callable[[Callable[..., Any]], Rule]:
    """Make a ``Rule`` of a forward ``function(module, ...)``; it may return ``NotImplemented`` for the module's own."""

    def make(function: Callable[..., Any]) -> Rule:
        @functools.wraps(function)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = NotImplemented if obstacle(self, rule) else function(self, *args, **kwargs)
            return type(self).forward(self, *args, **kwargs) if out is NotImplemented else out

        forward.is_fewstep = True  # type: ignore[attr-defined]
        rule = Rule(forward, ops, inner or {}, check, sources or {})
        return rule

    return make


def obstacle(module: nn.Module, rule: Rule) -> str | None:
    """Why ``rule`` does not hold for this instance as it is now; None if it does."""
    for name, kind in rule.inner.items():
        child = getattr(module, name, None)
        if child is not None and (reason := altered(child, kind)):
            return f"{name} {reason}"
    return rule.check(module)


def altered(child: nn.Module, kind: type) -> str | None:
    """Why a child is not simply its class's forward: another class, or hooked."""
    if type(child) is not kind:
        return f"is a {type(child).__name__}, not a {kind.__name__}"
    if "forward" in child.__dict__ or child._forward_hooks or child._forward_pre_hooks:
        return "is hooked"
    if child._backward_hooks or child._backward_pre_hooks:
        return "is hooked"
    return None


class Entry(NamedTuple):
    """A module that was looked at: its name, its class's name, and the ops it now runs or why it does not."""

    name: str
    kind: str
    said: str


class Patched:
    """What ``patch`` did: ``patched`` and ``skipped`` list it, ``report()`` says it, ``undo()`` takes it back."""

    def __init__(self, patched: list[Entry], skipped: list[Entry], methods: list[tuple[nn.Module, Any]]):
        self.patched, self.skipped, self._methods = patched, skipped, methods

    def report(self) -> str:
        """A line for each class and what it runs, then one for each that was not patched, and why."""
        done = Counter(f"{e.kind} ({e.said})" for e in self.patched)
        left = Counter(f"{e.kind}: {e.said}" for e in self.skipped)
        lines = [f"patched: {n} {what}" for what, n in done.items()]
        return "\n".join(lines + [f"not patched: {n} {what}" for what, n in left.items()])

    def undo(self) -> None:
        """Every module's own forward again. ``RuntimeError`` if one was hooked meanwhile: unhook it first."""
        held = [m for m, method in self._methods if m.__dict__.get("forward") is not method]
        if held:
            kinds = ", ".join(sorted({type(m).__name__ for m in held}))
            raise RuntimeError(f"{kinds} got another forward after patch(): remove that hook first")
        while self._methods:
            module, _ = self._methods.pop()
            del module.__dict__["forward"]

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patched({len(self.patched)} modules, {len(self.skipped)} left)"


def patch(model: nn.Module) -> Patched:
    """Let ``model`` run fused norms, modulations, gates and rotary embeddings; the handle undoes it.

    Knows diffusers' DiT, SD3, Flux, U-Nets (2D, conditional) and AutoencoderKL, and this package's nets. Raises
    ``ValueError`` for a model that is patched, sharded or compiled already, or in which nothing is known.
    """
    if not isinstance(model, nn.Module):
        hint = ": its unet, transformer or vae is" if hasattr(model, "components") else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    _refuse(model)
    found, done, skipped = rules(), [], []
    methods: list[tuple[nn.Module, Any]] = []
    taken: set[int] = set()  # norms that a patched module runs itself
    for name, module in model.named_modules():
        kind = type(module)
        rule = found.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule is None or id(module) in taken:
            continue
        hooked = "is hooked: its forward was replaced" if "forward" in module.__dict__ else None
        reason = hooked or foreign(rule) or obstacle(module, rule)
        if reason:
            skipped.append(Entry(name, kind.__name__, reason))
            continue
        taken |= {id(getattr(module, child, None)) for child in rule.inner}
        methods.append((module, MethodType(rule.forward, module)))
        done.append(Entry(name, kind.__name__, ", ".join(rule.ops)))
    if not done and not skipped:
        raise ValueError(f"nothing in {type(model).__name__} can be patched: none of its classes is known")
    for module, method in methods:
        module.__dict__["forward"] = method
    return Patched(done, skipped, methods)


@functools.cache
def rules() -> dict[str, Rule]:
    """Every known class by its dotted name. Nothing of diffusers is imported to list them."""
    tables = (importlib.import_module(f".{name}", __package__).RULES for name in FAMILIES)
    return {kind: rule for table in tables for kind, rule in table.items()}


@functools.cache
def _hash(name: str) -> str | None:
    """The ``fingerprint`` of "module:attribute" as it is loaded; None if it has no source."""
    place, path = name.split(":")
    try:
        return fingerprint(inspect.getsource(functools.reduce(getattr, path.split("."), sys.modules[place])))
    except (KeyError, AttributeError, OSError, TypeError):
        return None


def fingerprint(source: str) -> str:
    """What a function computes, as a hash: its arguments and statements without annotations, docstring and layout.

    >>> fingerprint("def f(x: int, k=2): return x * k") == fingerprint("def f(x, k = 2) -> int: return x*k")
    True
    """
    text = textwrap.dedent(source)
    node = ast.parse(text).body[0]
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise TypeError(f"source must be a function's, got a {type(node).__name__}")
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    parts = [*given.defaults, *(d for d in given.kw_defaults if d is not None)]
    parts += node.body[ast.get_docstring(node) is not None :] + node.decorator_list
    pieces = [ast.get_source_segment(text, part) or "" for part in parts]
    return hashlib.sha256("".join("\n".join(names + pieces).split()).encode()).hexdigest()[:16]


def foreign(rule: Rule) -> str | None:
    """Why the code that ``rule`` replaces is not the code it was written for."""
    for name, known in rule.sources.items():
        if _hash(name) not in known:
            return f"signature changed: {name.split(':')[1]} is none of diffusers 0.36 to 0.42"
    return None


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if getattr(module.__dict__.get("forward"), "is_fewstep", False):
            raise ValueError(f"{where} is patched already: undo that first")
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"{where} is compiled: patch before torch.compile")
        if type(module).__name__ == "FullyShardedDataParallel" or any(map(_sharded, _own_parameters(module))):
            raise ValueError(f"{where} is sharded: patch before sharding, which renames classes")


def _own_parameters(module: nn.Module) -> Iterator[torch.Tensor]:
    return (p for p in module._parameters.values() if p is not None)


def _sharded(p: torch.Tensor) -> bool:
    """A DTensor (FSDP2, tensor parallelism), FSDP1's flat parameter, or one of DeepSpeed's ZeRO-3."""
    return hasattr(p, "device_mesh") or hasattr(p, "_sharded_size") or hasattr(p, "ds_id")
