"""Student and critic as LoRA adapters (2106.09685) on the teacher's own network: one frozen copy of weights.

Which adapter is on is decided inside a Denoiser's call, and with checkpointing inside the *checkpointed* call: the
recomputed forward of the backward pass must find its own adapter again. (peft's ``set_adapter`` outside of it would
give wrong gradients without an error.) ``requires_grad`` is never used to choose.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from ..models.denoiser import Denoiser
from ..samplers.adapters import adapted, adapter_layers

STUDENT, CRITIC = "student", "critic"


def share_network(
    teacher: Denoiser,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    checkpoint: bool = False,
) -> tuple[Denoiser, Denoiser, Denoiser, tuple[nn.Module, nn.Module]]:
    """(teacher, student, critic, their adapters' parameters); ``teacher.net`` gets both adapters, 0 at the start."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora.rank > 0 needs peft: pip install peft") from error
    if teacher.net is None:
        raise ValueError("lora.rank > 0 needs a teacher with a network, and this one is exact")
    if targets is None:
        targets = [n for n, m in teacher.net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for name in (STUDENT, CRITIC):
        config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
        inject_adapter_in_model(config, teacher.net, adapter_name=name)
    if not adapter_layers(teacher.net):
        raise ValueError(f"lora.targets {list(targets)} name no layer of the network")
    teacher.net.requires_grad_(False)
    own = tuple(nn.ParameterList(adapter_parameters(teacher.net, name)) for name in (STUDENT, CRITIC))
    for module in own:
        module.requires_grad_(True)
    denoisers = [adapted(teacher, name) for name in (None, STUDENT, CRITIC)]
    if checkpoint:
        denoisers[1:] = [recomputing(d) for d in denoisers[1:]]
    return *denoisers, own  # type: ignore[return-value]


def adapter_parameters(net: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in the network's order."""
    return [p for key, p in net.named_parameters() if f".{name}." in f".{key}."]


def recomputing(d: Denoiser) -> Denoiser:
    """``d`` whose activations are thrown away and computed again in the backward pass, by the very same call."""
    leaf, inner = copy.copy(d), d.call

    def call(x: torch.Tensor, tau: torch.Tensor, **cond: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(x, tau, **cond)
        return recomputed(inner, x, tau, use_reentrant=False, **cond)

    leaf.call = call
    return leaf


def merged(net: nn.Module, name: str) -> nn.Module:
    """A copy of the network with one adapter added into its weights and all adapter layers gone."""
    net = copy.deepcopy(net)
    for path, module in list(net.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge(adapter_names=[name])
            parent, _, child = path.rpartition(".")
            setattr(net.get_submodule(parent), child, module.base_layer)
    return net
