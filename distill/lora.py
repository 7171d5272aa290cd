"""Student and critic as LoRA adapters (2106.09685) on the teacher's own network: one frozen copy of weights.

Which adapter is on is decided inside a Denoiser's call, and with checkpointing inside the *checkpointed* call: the
recomputed forward of the backward pass must find its own adapter again. (peft's ``set_adapter`` outside of it would
give wrong gradients without an error.) ``requires_grad`` is never used to choose.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from ..models.denoiser import Denoiser
from ..samplers.adapters import adapted, adapter_layers, switched
from .parallel import whole

STUDENT, CRITIC = "student", "critic"


def share_network(
    teacher: Denoiser,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two are meant
            inject_adapter_in_model(config, teacher.net, adapter_name=name)
    if not adapter_layers(teacher.net):
        raise ValueError(f"lora.targets {list(targets)} name no layer of the network")
    teacher.net.requires_grad_(False)
    own = adapters_of(teacher.net)
    for module in own:
        module.float().requires_grad_(True)
    denoisers = [adapted(teacher, name) for name in (None, STUDENT, CRITIC)]
    return *denoisers, own  # type: ignore[return-value]


def adapters_of(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The parameters of both adapters, as modules for an optimizer; asked again after the network was sharded."""
    return tuple(nn.ParameterList(adapter_parameters(net, name)) for name in (STUDENT, CRITIC))  # type: ignore[return-value]


def adapter_parameters(net: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in the network's order."""
    return [p for key, p in net.named_parameters() if f".{name}." in f".{key}."]


def recomputing(d: Denoiser) -> Denoiser:
    """``d`` whose activations are thrown away and computed again in the backward pass.

    A network of diffusers does so block by block, and each block remembers which adapters were on. Any other does so by
    the very same call as a whole.
    """
    if getattr(d.net, "_supports_gradient_checkpointing", False):
        d.net.enable_gradient_checkpointing(_recomputed_block(adapter_layers(d.net)))  # type: ignore[union-attr]
        return d
    leaf, call = copy.copy(d), d.call
    if isinstance(call, functools.partial) and call.args[:1] == (d.net,):  # can still be copied
        leaf.call = functools.partial(_again, d.net, call.func, call.args[1:], call.keywords)
    else:
        leaf.call = functools.partial(
            _again, None, lambda _, *arguments, **cond: call(*arguments, **cond), (), {}
        )
    return leaf


def _again(
    net: Any, function: Callable, more: tuple, named: dict, x: torch.Tensor, tau: torch.Tensor, **cond: Any
):
    if not torch.is_grad_enabled():
        return function(net, *more, x, tau, **named, **cond)
    return recomputed(function, net, *more, x, tau, use_reentrant=False, **named, **cond)


def _recomputed_block(layers: Sequence[nn.Module]) -> Callable[..., Any]:
    def run(block: nn.Module, *arguments: Any, **named: Any) -> Any:
        on = _on(layers)

        def again(*arguments: Any) -> Any:
            with switched(layers, on):
                return block(*arguments, **named)

        return recomputed(again, *arguments, use_reentrant=False)

    return run


def _on(layers: Sequence[nn.Module]) -> list[str]:
    """The adapters that are on: the same in every layer, for ``adapted`` switches all of them."""
    if not layers or layers[0]._disable_adapters:
        return []
    active = layers[0]._active_adapter
    return [active] if isinstance(active, str) else list(active)  # type: ignore[arg-type]


def merged_state(net: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The network's state with one adapter added into its weights and all adapter layers gone; nothing is copied twice.

    Every rank must ask where the network is sharded.
    """
    state = {
        key.replace(".base_layer.", "."): value.detach()
        for key, value in net.state_dict().items()
        if not any(part.startswith("lora_") for part in key.split("."))
    }
    for path, layer in net.named_modules():
        if name in getattr(layer, "lora_A", ()):
            key = f"{path}.weight"
            down, up = (whole(pair[name].weight.detach()).flatten(1) for pair in (layer.lora_A, layer.lora_B))
            weight = whole(state[key])
            if up.shape[0] * down.shape[1] != weight.numel():
                raise ValueError(f"{path} is a convolution in groups, which LoRA is not merged into")
            # in float32: a student's difference to a bf16 weight would be rounded away
            state[key] = weight.float() + (up @ down).reshape(weight.shape) * layer.scaling[name]
    return state
