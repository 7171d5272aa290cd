"""The autoregressive teacher of digits: a codebook by k-means on patches, then next-token cross-entropy.

    fewstep teacher digits-ar

The codebook comes first, from the training digits' patches. A part of the labels is replaced by the null label, so the
model has classes and no class. What the codebook alone costs (its floor) is measured beside what the model makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ..eval.frechet import frechet_distance
from ..models import checkpoint
from ..models.autoregressive import ARConfig, Autoregressive
from ..models.classifier import load_classifier
from ..models.codebook import Codebook, kmeans
from ..models.digits import digits
from .card import DIGITS, LICENCE, model_card
from .draws import Draws
from .fitting import Fitting, fit


@dataclass
class ARRecipe(Fitting):
    """``net``: of ``ARConfig``; ``label_dropout``: the share of labels that are replaced by the null one."""

    kind: str = "autoregressive"
    name: str = "digits-ar"
    net: dict[str, Any] = field(default_factory=dict)
    label_dropout: float = 0.1


Recipe = ARRecipe


def train(recipe: ARRecipe) -> tuple[Autoregressive, dict[str, Any]]:
    """The trained model, and the record of its training."""
    config = ARConfig.from_dict(recipe.net)
    if tuple(config.shape) != (1, 8, 8):
        raise ValueError(f"net.shape must be [1, 8, 8], the digits', got {list(config.shape)}")
    if config.num_class_embeds != 11:
        raise ValueError(
            f"net.num_class_embeds must be 11: ten digits and no class, got {config.num_class_embeds}"
        )
    images, labels = (torch.from_numpy(a) for a in digits("train"))
    cut = Codebook(config.codes, config.shape, config.patch)
    codes = kmeans(cut.split(images).flatten(0, 1), config.codes, recipe.seed)
    torch.manual_seed(recipe.seed)
    net = Autoregressive(config, codes)
    tokens = net.book.tokens(images)

    def loss_of(draws: Draws) -> torch.Tensor:
        rows = (draws.uniform("data") * len(tokens)).long()
        label = labels[rows].where(draws.uniform("null") >= recipe.label_dropout, net.null_label)
        return functional.cross_entropy(net(tokens[rows], label).flatten(0, 1), tokens[rows].flatten())

    record = fit(net, loss_of, recipe)
    return net, {**record, "metrics": measure(net)}


@torch.no_grad()
def measure(net: Autoregressive, seed: int = 10_007) -> dict[str, float]:
    """Nats a token on both splits, and FD of classifier features: 1000 samples, the codebook alone, other digits."""
    judge = load_classifier().features
    found: dict[str, float] = {}
    seen = {}
    for split in ("train", "held_out"):
        images, labels = (torch.from_numpy(a) for a in digits(split))
        tokens = net.book.tokens(images)
        nats = functional.cross_entropy(net(tokens, labels).flatten(0, 1), tokens.flatten())
        found[f"nats_{split}"] = round(float(nats), 4)
        seen[split] = judge(images), judge(net.book.rounded(images))
    label = torch.arange(1000) % 10
    made = judge(net.sample(label, seed))
    fd = {
        "fd": (made, seen["train"][0]),
        "fd_held_out": (made, seen["held_out"][0]),
        "fd_codebook": (seen["train"][1], seen["train"][0]),
        "fd_train_to_held_out": (seen["train"][0], seen["held_out"][0]),
    }
    return {**found, **{key: round(frechet_distance(*pair), 3) for key, pair in fd.items()}}


def save(net: Autoregressive, record: dict[str, Any], path: Path) -> Path:
    """Weights, in half precision, and the card beside them; the codebook stays as it is."""
    tensors = {k: v if k == "book.codes" else v.half() for k, v in net.state_dict().items()}
    meta = {"kind": "autoregressive", "net": net.config.to_dict(), "training": record}
    checkpoint.write(path, tensors, meta)
    checkpoint.write_atomically(path.with_suffix(".md"), card(record))
    return path


def run(recipe: ARRecipe) -> Path:
    """Train by a recipe; the file of weights."""
    return save(*train(recipe), recipe.file)


def card(record: dict[str, Any]) -> str:
    """The model card."""
    recipe, found = record["recipe"], record["metrics"]
    net = ARConfig.from_dict(recipe["net"])
    return model_card(
        recipe["name"],
        f"Autoregressive model of 8x8 digits: {net.codes} codewords for patches of {net.patch} x {net.patch} pixels.",
        {
            "retrain": f"`fewstep teacher {recipe['name']}`",
            "data": DIGITS + " for training, but this recipe was chosen by their likelihood",
            "net": f"causal transformer of {net.depth} blocks, width {net.width}, {record['parameters']} parameters",
            "training": f"{recipe['steps']} steps of {recipe['batch']}, AdamW, lr {recipe['lr']}, weight decay "
            f"{recipe['weight_decay']}, dropout {net.dropout}, seed {recipe['seed']}",
            "cost": f"{record['minutes']} minutes ({record['core_seconds']} core-seconds), torch {record['torch']}",
            "nats a token": f"held out **{found['nats_held_out']}**, training {found['nats_train']}",
            "FD of 1000 samples": f"**{found['fd']}** to the training digits, {found['fd_held_out']} to the held-out "
            f"ones (the training digits themselves: {found['fd_train_to_held_out']})",
            "FD of the codebook": f"{found['fd_codebook']}: training digits rounded to it, to themselves",
            "licence": LICENCE,
        },
    )
