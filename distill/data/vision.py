"""torchvision's data sets by name: ``data.path=torchvision:CIFAR10 data.root=folder``. Nothing is fetched unless asked.

Any of its classes that gives (picture, class) pairs and takes ``root``: CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN,
STL10, ImageNet, ... The training part is what the class gives by default.
"""

from __future__ import annotations

import difflib
import inspect

import torch

from .pictures import pictures
from .source import Items

PREFIX = "torchvision:"


def vision(path: str, root: str, download: bool = False, size: int | None = None) -> Items:
    """The training part of a data set of torchvision, ``path`` being ``torchvision:NAME``."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"data.path = {path} needs torchvision: pip install torchvision") from error
    name = path.removeprefix(PREFIX)
    if name not in datasets.__all__:
        near = difflib.get_close_matches(name, datasets.__all__, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"data.path = {path}: torchvision has no data set {name!r}{hint}")
    kind = getattr(datasets, name)
    known = inspect.signature(kind).parameters
    if download and "download" not in known:
        raise ValueError(f"data.download: torchvision does not fetch {name}; put it into data.root by hand")
    try:
        found = kind(root, **({"download": download} if "download" in known else {}))
    except (RuntimeError, FileNotFoundError) as error:
        fetch = " (data.download=true fetches it)" if "download" in known and not download else ""
        raise ValueError(f"data.root = {root} holds no {name}{fetch}: {error}") from error
    labels = next((getattr(found, n) for n in ("targets", "labels") if hasattr(found, n)), None)
    if labels is None and hasattr(found, "samples"):
        labels = [label for _, label in found.samples]
    classes = getattr(found, "classes", None)
    return pictures(
        path,
        len(found),
        lambda row: (found[row][0], f"{name}, item {row}"),
        None if labels is None else torch.as_tensor(labels).long(),
        None if classes is None else len(classes),
        size,
    )
