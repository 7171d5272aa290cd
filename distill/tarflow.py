"""A TarFlow (2412.06329) fitted by its likelihood: ``fewstep teacher digits-tarflow``.

    loss = - 1/D E log p(x + noise | label),    noise ~ N(0, s^2), or uniform over a level's width

Gaussian noise is what the paper samples with (its flow then has a density that ``TarFlow.denoise`` can use), uniform
noise is what likelihoods of quantised images are stated with. Some labels are replaced by the null one, for guidance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..eval.frechet import frechet_distance
from ..models.checkpoint import write_atomically
from ..models.classifier import load_classifier
from ..models.digits import CLASSES, digits
from ..models.tarflow import TarFlow, save_flow
from ..samplers.noise import starting_noise
from .card import DIGITS, LICENCE, model_card
from .data import DataRecipe, Source, as_float, open_source
from .draws import Draws
from .fitting import Fitting, fit
from .regression import null_some

AUGMENT = ("gaussian", "uniform")


@dataclass
class TarFlowRecipe(Fitting):
    """``net``: a ``TarFlowConfig`` beside the data's shape and classes. ``noise``: s, or the level's width."""

    kind: str = "tarflow"
    name: str = "tarflow"
    net: dict[str, Any] = field(default_factory=dict)
    data: DataRecipe = field(default_factory=DataRecipe)
    augment: str = "gaussian"
    noise: float = 0.1
    label_dropout: float = 0.1


Recipe = TarFlowRecipe  # what ``teacher.KINDS`` looks for


def begin(recipe: TarFlowRecipe) -> tuple[TarFlow, Source]:
    """A fresh flow, and what it is fitted to."""
    if recipe.augment not in AUGMENT:
        raise ValueError(f"augment must be one of {', '.join(AUGMENT)}, got {recipe.augment!r}")
    if not 0 < recipe.noise < math.inf:
        raise ValueError(f"noise must be above 0 (a density of levels has none), got {recipe.noise}")
    source = open_source(recipe.data)
    if len(source.shape) != 3 or source.shape[1] != source.shape[2]:
        raise ValueError(f"data.path = {source.name} must have square images, got samples {source.shape}")
    config = {
        "in_channels": source.shape[0],
        "sample_size": source.shape[1],
        "num_class_embeds": None if source.classes is None else source.classes + 1,
        "noise": recipe.noise if recipe.augment == "gaussian" else 0.0,
        **recipe.net,
    }
    torch.manual_seed(recipe.seed)
    return TarFlow(config), source


def batch_loss(flow: TarFlow, source: Source, recipe: TarFlowRecipe, draws: Draws) -> torch.Tensor:
    """The mean loss of a step's batch, in nats a number."""
    x, label = source.read(draws)
    x = as_float(x)
    x = x + augmentation(recipe, draws, x)
    if flow.null_label is None or label is None:
        cond = {}
    else:
        cond = null_some({"label": label}, {"label": flow.null_label}, recipe.label_dropout, draws)
    return -flow.log_prob(x, **cond).mean() / x[0].numel()


def augmentation(recipe: TarFlowRecipe, draws: Draws, x: torch.Tensor) -> torch.Tensor:
    """The noise of a step's batch x."""
    shape = tuple(x.shape[1:])
    if recipe.augment == "gaussian":
        return recipe.noise * draws.normal("forward", shape).to(x.dtype)
    share = draws.uniforms("forward", math.prod(shape)).reshape(x.shape)
    return (recipe.noise * (share - 0.5)).to(x.dtype)


def run(recipe: TarFlowRecipe) -> Path:
    """Fit by a recipe, write weights and card; the file of weights."""
    flow, source = begin(recipe)
    record = fit(flow, lambda draws: batch_loss(flow, source, recipe, draws), recipe)
    if recipe.data.path == "digits":
        record["metrics"] = measure(flow, recipe)
    save_flow(recipe.file, flow, record)
    write_atomically(recipe.file.with_suffix(".md"), card(flow, record))
    return recipe.file


def measure(flow: TarFlow, recipe: TarFlowRecipe, num: int = 1000) -> dict[str, float]:
    """Likelihoods in nats a number, beside those of one Gaussian a class; FD in the digit classifier's features."""
    numbers: dict[str, float] = {}
    images = {split: [torch.from_numpy(a) for a in digits(split)] for split in ("train", "held_out")}
    for split, (x, label) in images.items():
        draws = Draws(recipe.seed, recipe.steps, 0, len(x), len(x))
        noisy = x + augmentation(recipe, draws, x)
        with torch.no_grad():
            numbers[f"nll_{split}"] = -float(flow.log_prob(noisy, label).mean()) / x[0].numel()
        if split == "held_out":
            numbers["nll_held_out_of_gaussians"] = gaussian_nll(noisy, label, recipe)
    label = torch.arange(num) % CLASSES
    x = flow.inverse(starting_noise(recipe.seed, num, flow.shape), label)
    samples = flow.denoise(x, label) if flow.config.noise else x
    judge = load_classifier()
    features, logits = judge(samples.clamp(-1, 1))
    real = {split: judge.features(x) for split, (x, _) in images.items()}
    numbers |= {
        "feature_fd_held_out": frechet_distance(features, real["held_out"]),
        "feature_fd_train_to_held_out": frechet_distance(real["train"], real["held_out"]),
        "label_accuracy": float((logits.argmax(-1) == label).float().mean()),
    }
    return {name: round(value, 4) for name, value in numbers.items()}


def gaussian_nll(x: torch.Tensor, label: torch.Tensor, recipe: TarFlowRecipe) -> float:
    """What a Gaussian a class, fitted to the training digits with their noise's variance added, makes of x."""
    train, of = (torch.from_numpy(a) for a in digits("train"))
    variance = recipe.noise**2 / (1 if recipe.augment == "gaussian" else 12)
    total = torch.zeros((), dtype=torch.float64)
    for c in range(CLASSES):
        mine = train[of == c].flatten(1).double()
        covariance = mine.T.cov() + variance * torch.eye(mine.shape[1], dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(mine.mean(0), covariance)
        total += law.log_prob(x[label == c].flatten(1).double()).sum()
    return -float(total) / x.numel()


def card(flow: TarFlow, record: dict[str, Any]) -> str:
    """The model card."""
    recipe, numbers, config = record["recipe"], record.get("metrics", {}), flow.config
    known = recipe["data"]["path"] == "digits"
    spread = f"standard deviation {recipe['noise']}" if config.noise else f"width {recipe['noise']}"
    rows = {
        "retrain": f"`fewstep teacher {recipe['name']}`" if known else "",
        "data": DIGITS if known else recipe["data"]["path"],
        "net": f"{record['parameters']} parameters, {flow.tokens} tokens; {config.blocks} blocks of {config.depth} "
        f"layers, width {config.hidden_size}, {config.num_heads} heads",
        "training": f"{recipe['steps']} steps of {recipe['batch']}, AdamW, lr {recipe['lr']}, {recipe['augment']} "
        f"noise of {spread}, {recipe['label_dropout']:.0%} of labels dropped, weights averaged over the last "
        f"{recipe['ema_share']:.0%}, seed {recipe['seed']}",
        "cost": f"{record['minutes']} minutes ({record['core_seconds']} core-seconds, one thread), "
        f"torch {record['torch']}",
    }
    if numbers:
        rows |= {
            "nats a number, held out": f"**{numbers['nll_held_out']:.3f}** (training digits: "
            f"{numbers['nll_train']:.3f}; one Gaussian a class: {numbers['nll_held_out_of_gaussians']:.3f})",
            "feature FD to the 360 held out": f"{numbers['feature_fd_held_out']:.2f} (the training digits themselves: "
            f"{numbers['feature_fd_train_to_held_out']:.2f})",
            "accuracy of labels": f"{numbers['label_accuracy']:.3f}",
            "licence": LICENCE,
        }
    shape = " x ".join(map(str, flow.shape))
    told = (
        ""
        if flow.null_label is None
        else f" Labels are 0..{flow.null_label - 1}; the next is the null label."
    )
    note = "Samples: 1000 of the sequential inverse, denoised, no guidance." if numbers else ""
    return model_card(recipe["name"], f"Normalising flow (TarFlow) of images {shape}.{told}", rows, note)
