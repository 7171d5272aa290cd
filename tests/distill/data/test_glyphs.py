"""Rendered letters: the same bytes for a seed in any split, every class, font and place, and letters one can tell."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")

from fewstep.distill.data import DataRecipe, open_source
from fewstep.distill.data.glyphs import CHARACTERS, FONTS, GAP, SIZES, atlas, drawn, glyphs
from fewstep.distill.draws import Draws

FEW = "ABKO"


def test_the_bytes_follow_from_seed_turn_and_place():
    source = open_source(DataRecipe(f"glyphs:{FEW}"))
    whole, labels = source.read(Draws(0, 3, 0, 40, 40))
    part, some = source.read(Draws(0, 3, 10, 5, 40))
    assert torch.equal(whole[10:15], part) and torch.equal(labels[10:15], some)
    assert not torch.equal(whole, source.read(Draws(0, 4, 0, 40, 40))[0])
    assert not torch.equal(whole, source.read(Draws(1, 3, 0, 40, 40))[0])


def test_a_picture_is_a_mask_of_its_class_between_two_colours():
    """Undo the composition: what differs from the ground, cut out, is one of the masks times a constant."""
    x, labels = drawn(FEW, Draws(5, 0, 0, 8, 8))
    masks, height, width = (part.reshape(len(FEW), -1, *part.shape[1:]) for part in atlas(FEW))
    for one, label in zip(x.double(), labels, strict=True):
        ground = one.flatten(1).mode(1).values
        ink = trimmed((one - ground[:, None, None]).abs().amax(0))
        near = ((height[label] - ink.shape[0]).abs() <= 4) & ((width[label] - ink.shape[1]).abs() <= 4)
        own = [m for m in map(trimmed, masks[label][near].double()) if m.shape == ink.shape]
        assert (
            max(float(torch.corrcoef(torch.stack([m.flatten(), ink.flatten()]))[0, 1]) for m in own) > 0.999
        )
    assert x.flatten(1).min(1).values.max() < GAP and x.flatten(1).max(1).values.min() >= 256 - GAP


def trimmed(mask):
    """Without the rows and columns round it that are next to empty."""
    rows, columns = ((mask > 0.05 * mask.max()).any(dim).nonzero()[:, 0] for dim in (1, 0))
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_every_class_font_and_size_is_there_and_fits():
    masks, height, width = atlas(CHARACTERS)
    assert len(masks) == len(CHARACTERS) * len(FONTS) * len(SIZES)
    assert 0 < height.min() and height.max() <= 32 and 0 < width.min() and width.max() <= 32
    assert masks.flatten(1).amax(1).min() > 150  # ink is ink, even in the thinnest font
    _, labels = drawn(CHARACTERS, Draws(0, 0, 0, 5200, 5200))
    counts = torch.bincount(labels, minlength=26).double()
    assert ((counts - 200) ** 2 / 200).sum() < 25 + 5 * 50**0.5


def test_wrong_characters_are_named():
    for wrong in ("AA", "A B", "é"):
        with pytest.raises(ValueError, match="letters and digits, each once"):
            glyphs(f"glyphs:{wrong}")
