"""Denoisers of diffusers pipelines, live or saved: networks as they are, and a codec for prompts and pictures.

    d = load(pipe)                                      # or load("path/to/sdxl", dtype=torch.float16, device="cuda")
    cond = d.codec.embed("a fox", negative="blurry")
    x = sample(cfg(d, 5.0), starting_noise(0, 4, d.shape), table, cond=cond)
    images = d.codec.decode(x)                          # (4, 3, H, W), -1 to 1

A U-Net over pixels (UNet2DModel) in a folder becomes our own. All else goes by what the pipeline says when it is asked
(``pipeline.ask``): tested are DDPM, DiT, Stable Diffusion, SDXL, SD3, Flux and Wan, and what is found to be otherwise
than assumed is refused by name. Only configuration is read from the scheduler.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .codec import Codec, Condition
from .denoiser import Denoiser
from .pipeline import CLOCKS, Asked, argument_names, ask, bare, network
from .scheduler_meaning import scheduler_meaning
from .unet import UNet

LOADABLE = (
    "a UNet2DModel, or a pipeline of prompts or classes to images or video (DiT, Stable Diffusion, SDXL, SD3, Flux, "
    "Wan and their like), with a scheduler of DDPM's betas, a FlowMatch scheduler or an EDM scheduler"
)
GUIDANCE = (
    "true_cfg_scale",
    "guidance_scale",
)  # what switches classifier-free guidance on, the first that there is
DISTILLED = ("guidance", "timestep_cond")  # keywords of networks that are told a guidance scale
SIZES = {"height": "height", "width": "width", "frames": "num_frames"}


# --- from a folder ------------------------------------------------------------------------------------------------


def load_folder(
    folder: Path,
    attention: str = "sdpa",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: str | torch.device | None = None,
    **size: int | None,
) -> Denoiser:
    """From a pipeline's folder with ``model_index.json`` in it; weights are read from safetensors alone."""
    index = _json(folder / "model_index.json")
    if index is None:
        raise ValueError(
            f"{folder} has no model_index.json; what can be loaded is a pipeline's folder: {LOADABLE}"
        )
    unet = _json(folder / "unet/config.json") or {}
    if unet.get("_class_name") == "UNet2DModel":
        d = _pixel_unet(folder, attention, variant, size)
        return d.to(device=device, dtype=dtype)
    pipe = _pretrained(folder, index, dtype, variant)
    if device is not None:
        pipe.to(device)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return load_pipeline(pipe, **size)


def _pixel_unet(
    folder: Path, attention: str, variant: str | None, size: Mapping[str, int | None]
) -> Denoiser:
    if given := [name for name, value in size.items() if value is not None]:
        raise ValueError(f"{given[0]} cannot be chosen: the network in {folder} has one size")
    scheduler = _json(folder / "scheduler/scheduler_config.json")
    if scheduler is None:
        raise ValueError(f"{folder} has no scheduler; what can be loaded is {LOADABLE}")
    meaning = _meaning(scheduler)

    from diffusers import UNet2DModel

    twin = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, variant=variant)
    net = UNet.from_diffusers(twin, attention)
    side = net.config.sample_size
    shape = None if side is None else (net.config.in_channels, side, side)
    return Denoiser(functools.partial(_ask_unet, net), net=net, shape=shape, **meaning)


def _ask_unet(
    net: UNet, x: torch.Tensor, tau: torch.Tensor, label: torch.Tensor | None = None
) -> torch.Tensor:
    # of a foreign net we do not know that its last class stands for none
    if net.null_label is not None and label is None:
        raise ValueError(f"label is needed: this net knows {net.config.num_class_embeds} classes")
    return net(x, tau, label)


def _pretrained(
    folder: Path, index: Mapping[str, Any], dtype: torch.dtype | None, variant: str | None
) -> Any:
    nets = [_json(folder / name / "config.json") or {} for name in ("unet", "transformer")]
    named = [net["_class_name"] for net in nets if "_class_name" in net]
    kind = f"{index.get('_class_name')} with {', '.join(named) or 'no unet or transformer'}"
    try:
        import diffusers
        from diffusers.pipelines import pipeline_loading_utils
    except ImportError as error:
        raise ImportError(
            f"a pipeline needs diffusers and transformers: pip install 'fewstep[diffusers]' transformers ({error})"
        ) from None
    options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
    config = _json(folder / "scheduler/scheduler_config.json")
    foreign = (index.get("scheduler") or ["diffusers"])[0] != "diffusers"
    if foreign and hasattr(pipeline_loading_utils, "_get_library_or_raise"):
        options["scheduler"] = None  # a class that diffusers does not import; its config is what we read
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, variant=variant, **options
        )
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError(
            f"{folder} is a {kind} that diffusers {diffusers.__version__} does not load from safetensors ({error}); "
            f"what can be loaded is {LOADABLE}"
        ) from error
    if "scheduler" in options:
        flow = _meaning(config or {}, mu=0.0)["path"].name == "flow"
        like = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDPMScheduler
        pipe.register_modules(scheduler=like.from_config(config))
    return pipe


# --- from a pipeline ----------------------------------------------------------------------------------------------


def load_pipeline(pipe: Any, **size: int | None) -> Denoiser:
    """A Denoiser over a live pipeline's own network, which is not copied, frozen or moved.

    ``height``, ``width`` (pixels) and ``frames`` are the pipeline's defaults unless given, and fixed from then on:
    ``shape`` and every prompt's condition go by them.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    fixed = {}
    for name, value in size.items():
        if name not in SIZES:
            raise TypeError(f"a pipeline's size is given by {', '.join(SIZES)}, got {name}")
        if value is not None:
            if SIZES[name] not in takes:
                raise ValueError(f"{name} cannot be chosen: a {type(pipe).__name__} has one size")
            fixed[SIZES[name]] = value
    text, classes = "prompt" in takes, "class_labels" in takes
    switch = next((name for name in GUIDANCE if name in takes), None)
    call: dict[str, Any] = dict(fixed)
    if text:
        call |= {"prompt": ""} | ({switch: 1.0} if switch else {})
    elif classes:
        call |= {"class_labels": [0]} | ({switch: 2.0} if switch else {})
    try:
        asked = _clearly(pipe, call)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"a {type(pipe).__name__}, asked for {', '.join(call) or 'nothing'} alone: {error}; what can be loaded is "
            f"{LOADABLE}"
        ) from error
    distilled = text and any(name in asked.cond for name in DISTILLED)
    scale = "guidance_scale" if distilled else switch
    if distilled and switch == scale:  # it means the scale that the network is told
        switch = None
    embed = functools.partial(_embed, pipe, fixed, switch, asked.shared) if text else None
    d = denoiser_of(pipe, asked)
    d.codec = codec_of(pipe, asked, embed)
    if d.codec is not None:
        d.codec.size, d.codec.distilled = fixed, distilled
        d.codec.guidance = float(takes[scale].default) if scale in takes else 1.0
    return d


def denoiser_of(pipe: Any, asked: Asked) -> Denoiser:
    """The network of a pipeline for what was asked of it: ``asked.cond`` is a condition that it takes.

    On a flow with dynamic shifting the path's shift is the one that the pipeline chose for this size.
    """
    net = network(pipe)
    config = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
    meaning = _meaning(config, asked.schedule.get("mu"))
    steps, own = config.get("num_train_timesteps", 1000), meaning.pop("time", None)
    if asked.clock != "t":
        meaning["time"] = functools.partial(_network_time, asked.clock, own, steps)
    elif own is not None:
        meaning["time"] = own
    names = argument_names(net)
    form = Form(
        names[0], frozenset(names), frozenset(asked.cond), asked.shared,
        asked.noise.shape[1] if asked.noise.ndim > 3 and asked.channels != asked.noise.shape[1] else None,
        "class_labels" in asked.cond, asked.tau_shape,
    )  # fmt: skip
    d = Denoiser(functools.partial(_ask_network, net, form), net=net, shape=asked.noise.shape[1:], **meaning)
    if d.dtype != asked.dtype:  # its first parameter is not of the dtype that the pipeline feeds it
        d._dtype = asked.dtype
    return d


def codec_of(pipe: Any, asked: Asked, embed: Callable[..., Condition] | None = None) -> Codec | None:
    """The pipeline's autoencoder and prompts; None where it samples pixels and takes no text."""
    vae, grid, null = getattr(pipe, "vae", None), None, None
    if asked.noise.ndim == 3:
        places = asked.cond.get("img_ids")
        if places is None:
            raise ValueError(
                f"a {type(pipe).__name__} packs its latents into {tuple(asked.noise.shape[1:])} in a way that is not "
                "known: they cannot be decoded"
            )
        rows, columns = (places[0, :, axis].amax() + 1 for axis in (1, 2))
        grid = int(rows), int(columns)
    if asked.null is not None and "class_labels" in asked.null:
        null = {"label": int(asked.null["class_labels"][0])}
    if vae is None and embed is None and null is None:
        return None
    return Codec(vae, embed, grid, null=null, pipe=pipe)


class Form(NamedTuple):
    """How a network is called."""

    input: str
    names: frozenset[str]
    wanted: frozenset[str]
    shared: frozenset[str]
    channels: int | None  # how many of the output's are the prediction, where not all are
    classes: bool
    tau_shape: tuple[int, ...]


def _ask_network(net: nn.Module, form: Form, x: torch.Tensor, tau: torch.Tensor, **cond: Any) -> torch.Tensor:
    if form.classes and "label" in cond:
        cond["class_labels"] = cond.pop("label")
    if missing := sorted(form.wanted - set(cond)):
        raise ValueError(
            "cond must hold 'label', a class a sample"
            if form.classes
            else f"cond must hold {', '.join(missing)}: d.codec.embed(prompt) makes it; got {', '.join(cond) or 'none'}"
        )
    if unknown := sorted(set(cond) - form.names):
        raise ValueError(f"cond holds {unknown[0]}, which this {type(bare(net)).__name__} does not take")
    if form.tau_shape:
        tau = tau.reshape(-1, *[1] * len(form.tau_shape)).expand(-1, *form.tau_shape)
    told = {key: _for_batch(key, value, len(x), form.shared) for key, value in cond.items()}
    output = net(**{form.input: x, "timestep": tau, **told, "return_dict": False})[0]
    return output if form.channels is None else output[:, : form.channels]


def _for_batch(key: str, value: Any, batch: int, shared: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _for_batch(name, inner, batch, shared) for name, inner in value.items()}
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if key in shared:
        return value[0]
    if len(value) == 1:
        return value.expand(batch, *value.shape[1:])
    if len(value) != batch:
        raise ValueError(
            f"cond's {key} has {len(value)} rows and the batch {batch} samples: give it one row, or one a sample "
            "(cond.repeat(2) says every row twice)"
        )
    return value


def _network_time(clock: str, own: Callable[[Any], Any] | None, steps: int, t: Any) -> Any:
    return CLOCKS[clock](t if own is None else own(t), steps)


def _embed(
    pipe: Any,
    fixed: Mapping[str, int],
    switch: str | None,
    shared: frozenset[str],
    prompt: str | list[str] | None,
    negative: str | list[str] | None = "",
    **options: Any,
) -> Condition:
    """The pipeline's own embedding of a prompt, by asking it."""
    takes = inspect.signature(type(pipe).__call__).parameters
    texts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
    if not ("prompt_embeds" in options and prompt is None) and not (
        texts and all(isinstance(text, str) for text in texts)
    ):
        raise TypeError(f"prompt must be a text or a list of texts, got {prompt!r}")
    if wrong := [name for name in SIZES.values() if name in options]:
        raise ValueError(f"{wrong[0]} is chosen when the model is loaded: load(.., {_key(wrong[0])}=..)")
    if unknown := [name for name in options if name not in takes]:
        raise TypeError(f"a {type(pipe).__name__} has no option {unknown[0]!r}")
    many = isinstance(prompt, (list, tuple))
    call = {"prompt": list(texts) if many else prompt, **fixed}
    if switch is not None:
        call[switch] = 1.0 if negative is None else 2.0
    if negative:
        if "negative_prompt" not in takes:
            raise ValueError(f"negative must be '' or None: a {type(pipe).__name__} takes no negative prompt")
        call["negative_prompt"] = [negative] * len(texts) if many and isinstance(negative, str) else negative
    asked = _clearly(pipe, call | options)
    if asked.shared != shared:
        raise ValueError(
            f"{', '.join(asked.shared ^ shared)} may be of one sample or of all: embed the prompts one by one"
        )
    if negative and asked.null is None:
        raise ValueError(
            f"negative must be '' or None: this {type(pipe).__name__} has its guidance distilled and takes no null"
        )
    return Condition(asked.cond, None if negative is None else asked.null)


def _clearly(pipe: Any, call: dict[str, Any]) -> Asked:
    """``ask``, with what is missing named."""
    try:
        return ask(pipe, **call)
    except NameError as error:  # diffusers imports what it could find
        raise ImportError(
            f"this {type(pipe).__name__} needs {error.name}: pip install {error.name}"
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        parts = sorted(name for name in pipe.components if "text_encoder" in name or "tokenizer" in name)
        missing = [name for name in parts if getattr(pipe, name) is None]
        if missing and "prompt" in call:
            raise ValueError(
                f"this {type(pipe).__name__} cannot embed a prompt: it has no {', '.join(missing)} ({error})"
            ) from error
        raise


def _meaning(config: Mapping[str, Any], mu: float | None = None) -> dict[str, Any]:
    try:
        return scheduler_meaning(config, mu)
    except ValueError as error:
        raise ValueError(
            f"the scheduler is a {config.get('_class_name')}: {error}; what can be loaded is {LOADABLE}"
        ) from None


def _key(argument: str) -> str:
    return next(name for name, own in SIZES.items() if own == argument)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None
