"""The digit classifier: the judge of the digits, by its 64 features and its logits.

>>> judge = load_classifier()
>>> features, logits = judge(torch.zeros(5, 1, 8, 8))
>>> features.shape, logits.shape
(torch.Size([5, 64]), torch.Size([5, 10]))
"""

from __future__ import annotations

import os

import torch
from torch import nn

from . import checkpoint


class DigitClassifier(nn.Module):
    """Two convolutions, one hidden layer, ten logits; silu throughout, so that rewards made of it are smooth."""

    def __init__(self, width: int = 32, features: int = 64, dropout: float = 0.0):
        super().__init__()
        self.config = {"width": width, "features": features, "dropout": dropout}
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8 * width, features),
            nn.SiLU(),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> (B, 64)."""
        if x.ndim != 4 or x.shape[1:] != (1, 8, 8):
            raise ValueError(f"x must have shape (B, 1, 8, 8), got {tuple(x.shape)}")
        return self.body(x)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features, logits)."""
        features = self.features(x)
        return features, self.head(self.dropout(features))


def load_classifier(path: str | os.PathLike | None = None) -> DigitClassifier:
    """The classifier whose weights ship with the package (or those at ``path``): frozen, in evaluation mode."""
    tensors, meta = checkpoint.read(
        checkpoint.DATA / "digits-classifier.safetensors" if path is None else path
    )
    if meta.get("kind") != "classifier":
        raise ValueError(f"path must be a classifier's checkpoint, got one of a {meta.get('kind')}")
    net = DigitClassifier(**meta["net"])
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)
