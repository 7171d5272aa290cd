"""The digits and their split."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

pytest.importorskip("sklearn")

from fewstep.models.digits import SIGMA_DATA, digits, split_rows

HELD_OUT_HASH = "e8df14393292a217"


def test_the_split_is_the_one_the_weights_were_trained_with():
    assert hashlib.sha256(split_rows("held_out").astype("<i8").tobytes()).hexdigest()[:16] == HELD_OUT_HASH


def test_splits_are_disjoint_stratified_and_complete():
    train, held_out = split_rows("train"), split_rows("held_out")
    assert len(train) == 1437 and len(held_out) == 360
    assert sorted([*train, *held_out]) == list(range(1797))
    assert np.bincount(digits("held_out")[1]).tolist() == [36] * 10
    everything = digits("all")[0]
    assert np.array_equal(digits("train")[0], everything[train])
    # and no image stands on both sides
    assert not {i.tobytes() for i in everything[train]} & {i.tobytes() for i in everything[held_out]}


def test_images_are_scaled_and_callers_cannot_spoil_them():
    images, labels = digits("all")
    assert images.shape == (1797, 1, 8, 8) and images.dtype == np.float32 and labels.dtype == np.int64
    assert images.min() == -1 and images.max() == 1
    assert np.array_equal(np.unique(images), np.linspace(-1, 1, 17, dtype=np.float32))
    assert abs(images.std() - SIGMA_DATA) < 0.01
    images[:] = 7
    assert digits("all")[0].max() == 1


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="train, held_out, all"):
        digits("test")
