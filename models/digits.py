"""The 8x8 handwritten digits that ship inside scikit-learn, with one fixed split.

1797 images of 13 writers: the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits"
(1998), UCI Machine Learning Repository, doi:10.24432/C50P49, licensed CC BY 4.0. Pixels 0..16 are scaled to [-1, 1];
nothing else is changed.

36 images of every class are held out; nothing here is ever trained on them.

    >>> images, labels = digits("train")
    >>> images.shape, images.dtype, float(images.min()), float(images.max())
    ((1437, 1, 8, 8), dtype('float32'), -1.0, 1.0)
"""

from __future__ import annotations

import functools

import numpy as np

SPLITS = ("train", "held_out", "all")
CLASSES = 10
HELD_OUT_PER_CLASS = 36
SHAPE = (1, 8, 8)
# the standard deviation of all pixels about their common mean is 0.751; EDM's constant
SIGMA_DATA = 0.75


def digits(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 8, 8) in [-1, 1] as float32, and labels (N,) as int64.

    Args:
        split: ``train`` (1437 images), ``held_out`` (360, 36 of each class) or ``all`` (1797, in scikit-learn's order).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    images, labels = _everything()
    rows = slice(None) if split == "all" else split_rows(split)
    return images[rows].copy(), labels[rows].copy()


def split_rows(split: str) -> np.ndarray:
    """The rows of ``digits("all")`` that a split holds, ascending."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be train or held_out, got {split!r}")
    labels = _everything()[1]
    # RandomState's stream is frozen by NumPy, a Generator's is not
    random = np.random.RandomState(20261120)
    held_out = np.sort(
        np.concatenate(
            [random.permutation(np.flatnonzero(labels == c))[:HELD_OUT_PER_CLASS] for c in range(CLASSES)]
        )
    )
    return held_out if split == "held_out" else np.setdiff1d(np.arange(len(labels)), held_out)


@functools.lru_cache(maxsize=1)
def _everything() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install scikit-learn (or fewstep[demo])"
        ) from error
    bunch = load_digits()
    images = (bunch.images / 8.0 - 1.0).astype(np.float32)[:, None]
    return images, bunch.target.astype(np.int64)
