"""One network as several denoisers: with its adapters (LoRA, 2106.09685) off, or with some of them on.

peft's own switches (``disable_adapter``, ``set_adapter``) also set ``requires_grad`` of the adapters' weights, which
breaks a training run that samples now and then. Here a leaf's call sets what its layers look at, runs, and sets it
back; no parameter is touched and no second copy of a weight is held.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..models.denoiser import Denoiser


def adapted(d: Denoiser, adapter: str | Sequence[str] | None) -> Denoiser:
    """``d`` with the named adapter(s) of its network on and all others off; None turns all off.

    The network may be a peft model, or one that peft put layers into (diffusers' ``add_adapter``). What is merged into
    the weights cannot be switched. A backward pass that recomputes the forward (gradient checkpointing) would find the
    switch where it stood before: there, sample under ``no_grad``.

    >>> from fewstep.models import paths
    >>> adapted(Denoiser(lambda x, tau: x, paths.flow(), net=nn.Linear(2, 2)), None)
    Traceback (most recent call last):
    ValueError: d.net must have adapter layers (as peft makes them), this Linear has none
    """
    if d.parts() != (d,):
        raise ValueError(
            "adapters are switched in a leaf: write cfg(rlg(d, 'name', w), g), not rlg(cfg(d, g), 'name', w)"
        )
    if d.net is None:
        raise ValueError("d must be a Denoiser made with net=..., so that its adapters can be found")
    layers = adapter_layers(d.net)
    if not layers:
        raise ValueError(
            f"d.net must have adapter layers (as peft makes them), this {type(d.net).__name__} has none"
        )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "adapter cannot be switched while it is merged into the weights: call unmerge_adapter() first"
        )
    names = [] if adapter is None else [adapter] if isinstance(adapter, str) else list(adapter)
    known = sorted({name for layer in layers for name in _names(layer)})
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"adapter must be one of {', '.join(known)} (or None), got {unknown[0]!r}")
    leaf, inner = copy.copy(d), d.call

    def call(x: torch.Tensor, tau: torch.Tensor, **cond: Any) -> Any:
        with switched(layers, names):
            return inner(x, tau, **cond)

    leaf.call = call
    return leaf


def adapter_layers(net: nn.Module) -> list[nn.Module]:
    """The submodules that a switch between adapters concerns: peft's layers, known by their two switches."""
    return [m for m in net.modules() if hasattr(m, "_disable_adapters") and hasattr(m, "_active_adapter")]


@contextlib.contextmanager
def switched(layers: Sequence[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Inside the block the layers use these adapters; then those that they used before."""
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer, _, active in before:
            layer._disable_adapters = not names
            if names:
                layer._active_adapter = (
                    names[0] if isinstance(active, str) and len(names) == 1 else list(names)
                )
        yield
    finally:
        for layer, disabled, active in before:
            layer._disable_adapters, layer._active_adapter = disabled, active


def _names(layer: nn.Module) -> set[str]:
    found: set[str] = set()
    for name in getattr(layer, "adapter_layer_names", ()):
        held = getattr(layer, name, None)
        if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
            found |= set(held.keys())
    return found
