"""The model that a verb runs on, and what it is told: ``MODEL --prompt .. --label .. --guidance ..`` as a Denoiser."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from ..models import Denoiser

DTYPES = ("float32", "float16", "bfloat16")


class Told(NamedTuple):
    """A denoiser, guided or not, and its condition: rows that are dealt out to the samples in turn."""

    d: Denoiser
    cond: dict[str, Any] | None
    classes: int | None


def add_model(parser: argparse.ArgumentParser, name: str = "model") -> None:
    """MODEL, or what ``name`` says, and its condition."""
    parser.add_argument(
        name,
        help="digits-edm, digits-vp, digits-flow, a checkpoint, or a folder that diffusers saved; of sample also "
        "digits-ar, digits-masked and digits-tarflow",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="of a pipeline of texts; give several, and samples take them in turn",
    )
    parser.add_argument(
        "--negative", help="text to lead away from (default: as the pipeline does without one)"
    )
    parser.add_argument("--label", type=int, help="class of all samples (default: every class in turn)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance: 1 is none, 0 forgets the condition; where guidance is distilled into "
        "the network, what it is told (default: the pipeline's own, 1 for other models)",
    )
    for name, of in (("height", "pixels"), ("width", "pixels"), ("frames", "a video")):
        parser.add_argument(f"--{name}", type=int, help=f"{of}, where a pipeline leaves the choice")
    parser.add_argument("--dtype", choices=DTYPES, help="of the network (default: as the files are loaded)")
    parser.add_argument("--variant", help="of a pipeline's files, e.g. fp16")


def told(arguments: argparse.Namespace, device: torch.device, blocks: bool = False) -> Told:
    """Load the model and make its condition; ``ValueError`` where the two do not go together.

    ``blocks``: on a CPU a sample has the same bits whatever the batch.
    """
    import torch

    from ..models import in_blocks, load
    from ..samplers import cfg

    d = load(
        arguments.model, dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        variant=arguments.variant, device=device, height=arguments.height, width=arguments.width,
        frames=arguments.frames,
    )  # fmt: skip
    codec = d.codec
    if blocks and device.type == "cpu":
        d = in_blocks(d, 16 if codec is None else 1)
    classes = getattr(d.net, "null_label", None)  # the label after the last class
    if codec is not None and codec.null:
        classes = codec.null.get("label")
    if arguments.label is not None and not (classes and 0 <= arguments.label < classes):
        raise ValueError(
            f"--label must lie in 0 .. {classes - 1}" if classes else f"{arguments.model} takes no --label"
        )
    scale = scale_of(arguments, codec)
    if codec is not None and codec.takes_text:
        cond, scale = embedded(arguments, arguments.prompt, codec, scale)
    else:
        if arguments.prompt or arguments.negative:
            raise ValueError(
                f"--{'prompt' if arguments.prompt else 'negative'} is of no use: {arguments.model} takes no text"
                f"{', but --label' if classes else ''}"
            )
        if scale != 1 and not classes:
            raise ValueError(
                f"--guidance needs a model of classes or texts, and {arguments.model} is neither"
            )
        cond = None
        if classes:
            one = arguments.label is not None
            labels = torch.tensor([arguments.label]) if one else torch.arange(classes)
            cond = {"label": labels.to(device)}
    return Told(d if scale == 1 else cfg(d, scale), cond, classes)


def scale_of(arguments: argparse.Namespace, codec: Any) -> float:
    """The guidance asked for, or else the pipeline's own."""
    return arguments.guidance if arguments.guidance is not None else 1.0 if codec is None else codec.guidance


def embedded(
    arguments: argparse.Namespace, prompts: list[str] | None, codec: Any, scale: float
) -> tuple[Any, float]:
    """The condition of texts, a row each, and the scale that is left to guide by."""
    if not prompts:
        raise ValueError(f"--prompt is needed: {arguments.model} makes pictures of texts")
    if codec.distilled:
        if arguments.negative:
            raise ValueError(
                f"--negative is of no use: the guidance of {arguments.model} is distilled into it, and there is no "
                "second branch to lead away from"
            )
        return codec.embed(prompts, None, guidance_scale=scale), 1.0
    if scale == 1:
        if arguments.negative:
            raise ValueError("--negative needs a --guidance other than 1, which is none")
        return codec.embed(prompts, None), scale
    cond = codec.embed(prompts, arguments.negative or "")
    if cond.null is None:
        raise ValueError(f"--guidance needs --negative here: {arguments.model} has no null of its own")
    return cond, scale
