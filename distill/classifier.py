"""Training of the digit classifier: cross-entropy on the training split, with noise and affine maps as augmentation."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ..models import checkpoint
from ..models.classifier import DigitClassifier
from ..models.digits import digits
from .card import DIGITS, LICENCE, model_card
from .progress import track


@dataclass
class ClassifierRecipe:
    """What ``recipes/digits-classifier.yaml`` may say."""

    kind: str = "classifier"
    name: str = "digits-classifier"
    seed: int = 0
    steps: int = 2000
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.01
    noise: float = 0.2
    warp: float = 0.1
    width: int = 32
    dropout: float = 0.2
    threads: int = 1
    out: str = "."


Recipe = ClassifierRecipe  # what ``teacher.KINDS`` looks for


@dataclass
class Judged:
    """What training gives."""

    net: DigitClassifier
    record: dict[str, Any] = field(default_factory=dict)


def train(recipe: ClassifierRecipe) -> Judged:
    """Train on the training split; ``record`` holds accuracies, seconds of one core, and the recipe."""
    torch.manual_seed(recipe.seed)
    random = torch.Generator().manual_seed(recipe.seed)
    images, labels = (torch.from_numpy(a) for a in digits("train"))
    net = DigitClassifier(width=recipe.width, dropout=recipe.dropout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    cpu, wall = time.process_time(), time.monotonic()
    for _, say in track(recipe.steps, recipe.name):
        rows = torch.randint(len(images), (recipe.batch,), generator=random)
        x = warped(images[rows], recipe.warp, random)
        x = x + recipe.noise * torch.rand(len(x), 1, 1, 1, generator=random) * torch.randn(
            x.shape, generator=random
        )
        loss = functional.cross_entropy(net(x)[1], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        say(loss=float(loss.detach()))
    net.eval()
    record = {
        "recipe": {k: v for k, v in asdict(recipe).items() if k != "out"},
        "held_out_accuracy": accuracy(net, "held_out"),
        "train_accuracy": accuracy(net, "train"),
        "core_seconds": round(time.process_time() - cpu, 1),
        "minutes": round((time.monotonic() - wall) / 60, 2),
        "torch": torch.__version__,
    }
    return Judged(net, record)


def warped(x: torch.Tensor, size: float, random: torch.Generator) -> torch.Tensor:
    """Each image under a random affine map that strays from the identity by ``size`` (each entry's deviation)."""
    maps = torch.eye(2, 3) + size * torch.randn(len(x), 2, 3, generator=random)
    grid = functional.affine_grid(maps, list(x.shape), align_corners=False)
    return functional.grid_sample(x + 1, grid, align_corners=False) - 1  # empty outside


@torch.no_grad()
def accuracy(net: DigitClassifier, split: str) -> float:
    """The share of a split that is classified rightly."""
    images, labels = (torch.from_numpy(a) for a in digits(split))
    return round(float((net(images)[1].argmax(-1) == labels).float().mean()), 4)


def save(judged: Judged, folder: Path) -> Path:
    """Weights and model card into ``folder``."""
    path = folder / f"{judged.record['recipe']['name']}.safetensors"
    net_config = {**judged.net.config, "dropout": 0.0}
    checkpoint.write(
        path, judged.net.state_dict(), {"kind": "classifier", "net": net_config, "training": judged.record}
    )
    checkpoint.write_atomically(path.with_suffix(".md"), card(judged.record))
    return path


def run(recipe: ClassifierRecipe) -> Path:
    """Train by a recipe; the file of weights."""
    return save(train(recipe), Path(recipe.out))


def card(record: dict[str, Any]) -> str:
    """The model card."""
    recipe = record["recipe"]
    training = (
        f"{recipe['steps']} steps of {recipe['batch']}, AdamW, lr {recipe['lr']}, seed {recipe['seed']}; affine maps "
        f"({recipe['warp']}) and noise (up to {recipe['noise']}) on the images"
    )
    return model_card(
        recipe["name"],
        "Classifier of 8x8 digits; its 64 features and its accuracy judge samples, its probabilities are rewards.",
        {
            "retrain": f"`fewstep teacher {recipe['name']}`",
            "data": DIGITS + " for training, but this recipe was chosen among seven by their accuracy",
            "net": f"convolutions of {recipe['width']} and {2 * recipe['width']} channels, 64 features, silu",
            "training": training,
            "cost": f"{record['minutes']} minutes ({record['core_seconds']} core-seconds, one thread), "
            f"torch {record['torch']}",
            "accuracy": f"held out **{record['held_out_accuracy']:.4f}**, training {record['train_accuracy']:.4f}",
            "licence": LICENCE,
        },
    )
