"""Teachers of kind ``masked``: a masked diffusion model of images' pixels, a grey level a token.

    fewstep teacher digits-masked
    fewstep teacher digits-masked steps=200 out=/tmp

Each batch is hidden in part and the bound of ``losses.masked`` is descended, with some labels replaced by the null
label, so that guidance has its unconditional half. ``load_masked`` reads what is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..eval.frechet import frechet_distance
from ..eval.neighbours import memorisation
from ..models.checkpoint import write_atomically
from ..models.classifier import load_classifier
from ..models.digits import CLASSES, SHAPE, digits
from ..models.masked import MaskedModel, build_masked, save_masked
from ..models.pixel_tokens import to_images, to_tokens
from ..samplers.first_hitting import first_hitting
from .card import DIGITS, LICENCE, model_card
from .data import DataRecipe, Source, as_float, open_source
from .draws import Draws
from .fitting import Fitting, fit
from .losses.masked import hidden, masked_nelbo
from .regression import null_some


@dataclass
class Recipe(Fitting):
    """``levels``: of grey, the vocabulary. ``net``: ``type`` (``unet`` or ``dit``) and its options beside the data's.

    ``timed``: the network is told the time. ``masking``: how the loss is estimated, ``count`` or ``time``. ``half``:
    weights are stored in 16 bits, and rounded before they are measured. ``exam``: samples that the finished model is
    measured on, where the data are the digits.
    """

    kind: str = "masked"
    name: str = "digits-masked"
    levels: int = 17
    schedule: str = "linear"
    timed: bool = False
    masking: str = "count"
    net: dict[str, Any] = field(default_factory=dict)
    data: DataRecipe = field(default_factory=DataRecipe)
    label_dropout: float = 0.1
    half: bool = True
    exam: int = 1000


def begin(recipe: Recipe) -> tuple[MaskedModel, Source]:
    """The model with fresh weights, and what it is trained on."""
    source = open_source(recipe.data)
    if len(source.shape) != 3 or source.shape[0] != 1 or source.shape[1] != source.shape[2]:
        raise ValueError(
            f"data.path = {source.name} must have square pictures in grey, got samples of shape {source.shape}"
        )
    classes = {} if source.classes is None else {"num_class_embeds": source.classes + 1}
    torch.manual_seed(recipe.seed)
    model = build_masked({
        "vocabulary": recipe.levels,
        "schedule": recipe.schedule,
        "timed": recipe.timed,
        "net": {"type": "unet", "sample_size": source.shape[1], **classes, **recipe.net},
    })  # fmt: skip
    return model, source


def loss(model: MaskedModel, source: Source, recipe: Recipe, draws: Draws) -> torch.Tensor:
    """The mean loss of a step, in nats a token."""
    x, label = source.read(draws)
    tokens = to_tokens(as_float(x), recipe.levels)
    cond = null_some({} if label is None else {"label": label}, model.null, recipe.label_dropout, draws)
    out = hidden(recipe.masking, draws.stratified("level"), draws.uniforms("forward", model.length))
    return masked_nelbo(model, tokens, out, **cond).mean() / model.length


def run(recipe: Recipe) -> Path:
    """Train, measure, write ``<out>/<name>.safetensors`` and its card."""
    model, source = begin(recipe)
    assert model.net is not None
    record = fit(model.net, lambda draws: loss(model, source, recipe, draws), recipe)
    if recipe.half:
        model.net.half().float()
    record["metrics"] = measure(model, recipe.exam) if recipe.data.path == "digits" and recipe.exam else {}
    if recipe.half:
        model.net.half()
    save_masked(recipe.file, model, record)
    write_atomically(recipe.file.with_suffix(".md"), card(model, record))
    return recipe.file


@torch.no_grad()
def bits_per_token(model: MaskedModel, tokens: torch.Tensor, passes: int = 8, **cond: Any) -> float:
    """The bound of ``losses.masked`` in bits, averaged over sequences; each is seen ``passes`` times, at counts of
    hidden tokens that are spread evenly."""
    total = 0.0
    for turn in range(passes):
        draws = Draws(20_012, turn, 0, len(tokens), len(tokens), tokens.device)
        out = hidden("count", draws.stratified("level"), draws.uniforms("forward", model.length))
        total += float(masked_nelbo(model, tokens, out, **cond).mean())
    return total / passes / model.length / math.log(2)


@torch.no_grad()
def measure(model: MaskedModel, num: int = 1000, seed: int = 0) -> dict[str, float]:
    """Judge ``num`` samples of the first-hitting sampler, 1/10 of them of each class, as digits' teachers are."""
    levels, label = model.vocabulary, torch.arange(num) % CLASSES
    real = {split: torch.from_numpy(digits(split)[0]) for split in ("all", "train", "held_out")}
    labels = {split: torch.from_numpy(digits(split)[1]) for split in real}
    drawn, _ = first_hitting(model, num, seed=seed, cond={"label": label})
    samples, judge = to_images(drawn, SHAPE, levels), load_classifier()
    features, logits = judge(samples)
    near = memorisation(samples.flatten(1), real["train"].flatten(1), real["held_out"].flatten(1))
    bits = {
        split: bits_per_token(model, to_tokens(real[split], levels), label=labels[split])
        for split in ("train", "held_out")
    }
    numbers = {
        "feature_fd_all": frechet_distance(features, judge.features(real["all"])),
        "feature_fd_held_out": frechet_distance(features, judge.features(real["held_out"])),
        "feature_fd_train_to_held_out": frechet_distance(
            judge.features(real["train"]), judge.features(real["held_out"])
        ),
        "label_accuracy": float((logits.argmax(-1) == label).float().mean()),
        "nearest_train": near.samples,
        "nearest_train_of_held_out": near.held_out,
        "bits_held_out": bits["held_out"],
        "bits_train": bits["train"],
    }
    return {k: round(v, 4) for k, v in numbers.items()}


def card(model: MaskedModel, record: dict[str, Any]) -> str:
    """The model card."""
    recipe, numbers = record["recipe"], record["metrics"]
    net = ", ".join(f"{k} {v}" for k, v in recipe["net"].items())
    rows = {
        "retrain": f"`fewstep teacher {recipe['name']}`",
        "data": DIGITS if recipe["data"]["path"] == "digits" else recipe["data"]["path"],
        "net": f"one-hot tokens to logits; {net}; {record['parameters']} parameters"
        + (", stored in 16 bits" if recipe["half"] else ""),
        "training": f"{recipe['steps']} steps of {recipe['batch']}, AdamW, lr {recipe['lr']}, hidden by "
        f"{recipe['masking']}, {recipe['label_dropout']:.0%} of labels dropped, weights averaged over the last "
        f"{recipe['ema_share']:.0%}, seed {recipe['seed']}",
        "cost": f"{record['minutes']} minutes ({record['core_seconds']} core-seconds, {recipe['threads']} thread), "
        f"torch {record['torch']}",
    }
    if numbers:
        rows |= {
            "bound on the bits of a held-out pixel": f"**{numbers['bits_held_out']:.3f}** (training digits: "
            f"{numbers['bits_train']:.3f}; a uniform guess: {torch.tensor(float(model.vocabulary)).log2():.3f})",
            "feature FD to all 1797 digits": f"**{numbers['feature_fd_all']:.2f}**",
            "feature FD to the 360 held out": f"{numbers['feature_fd_held_out']:.2f} (the training digits themselves: "
            f"{numbers['feature_fd_train_to_held_out']:.2f})",
            "accuracy of labels": f"{numbers['label_accuracy']:.3f}",
            "median distance to the nearest training digit": f"{numbers['nearest_train']:.2f} (held-out digits: "
            f"{numbers['nearest_train_of_held_out']:.2f})",
            "licence": LICENCE,
        }
    told = "is told" if model.timed else "is not told"
    return model_card(
        recipe["name"],
        f"Masked diffusion model of pixels: {model.length} tokens of {model.vocabulary} levels and a mask; the network "
        f"{told} the time. `fewstep.models.load_masked` reads it."
        + (" Labels are 0..9; 10 is the null label." if numbers else ""),
        rows,
        f"Measured on {recipe['exam']} samples of the first-hitting sampler, in the features of `digits-classifier`."
        * bool(numbers),
    )
