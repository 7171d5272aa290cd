"""Letters of 21 fonts, 32 x 32, in colour, made as they are asked for: data without end, and without a download.

A class is a character. Font, size, place and colours are drawn by the turn's counters:

    pixel = (ground (255 - m) + ink m) / 255,      m the letter's mask, moved to its place

in integers, so the bytes are the same on every device. The masks are rendered once from the fonts that matplotlib
brings (``atlas``), and batches are made of them by indexing: where the network is, with nothing to load.
"""

from __future__ import annotations

import functools

import torch

from ..draws import Draws
from .source import Source

PREFIX = "glyphs"
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIDE = 32
SIZES = (16, 18, 20, 22, 24, 26)
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
GAP = 112  # ink and ground lie in different parts of 0 .. 255, of this width, with a gap between


def glyphs(path: str = PREFIX) -> Source:
    """``glyphs``, the capital letters, or ``glyphs:0123456789``, the characters after the colon.

    >>> source = glyphs("glyphs:fewstp")
    >>> x, label = source.read(Draws(seed=0, turn=0, first=0, count=5, total=5))
    >>> source.classes, x.shape, x.dtype
    (6, torch.Size([5, 3, 32, 32]), torch.uint8)
    """
    characters = path.partition(":")[2] or CHARACTERS
    if len(set(characters)) != len(characters) or not (characters.isascii() and characters.isalnum()):
        raise ValueError(
            f"data.path = glyphs:... must name ASCII letters and digits, each once, got {characters!r}"
        )
    atlas(characters)  # a missing library is told now, not at the first batch

    def read(draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        return drawn(characters, draws)

    return Source(path, (3, SIDE, SIDE), len(characters), read)


def drawn(characters: str, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Letters (B, 3, 32, 32) in bytes and their classes (B,), on the device of ``draws``."""
    masks, height, width = _atlas_on(characters, str(draws.device))
    share = draws.uniforms("data", 12)

    def pick(column: int, n: int) -> torch.Tensor:
        return (share[:, column] * n).long()

    label, font, size = pick(0, len(characters)), pick(1, len(FONTS)), pick(2, len(SIZES))
    which = (label * len(FONTS) + font) * len(SIZES) + size
    line = torch.arange(SIDE, device=share.device)
    corners = []
    for column, extent in ((3, height[which]), (4, width[which])):
        corners.append(line - (share[:, column] * (SIDE - extent + 1)).long()[:, None])
    rows, columns = corners  # where in its mask each pixel of the picture looks
    inside = ((rows >= 0) & (rows < SIDE))[:, :, None] & ((columns >= 0) & (columns < SIDE))[:, None, :]
    rows, columns = rows.clamp(0, SIDE - 1)[:, :, None], columns.clamp(0, SIDE - 1)[:, None, :]
    mask = (masks[which[:, None, None], rows, columns] * inside)[:, None].int()
    light = pick(5, 2)[:, None]  # 1: a light ground and dark ink
    tone = (share[:, 6:12] * GAP).long()
    ground = tone[:, :3] + light * (256 - GAP)
    ink = tone[:, 3:] + (1 - light) * (256 - GAP)
    ground, ink = (c.int()[:, :, None, None] for c in (ground, ink))
    return ((ground * (255 - mask) + ink * mask + 127) // 255).to(torch.uint8), label


@functools.lru_cache(maxsize=4)
def atlas(characters: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(masks (K, 32, 32) in bytes, heights (K,), widths (K,)), K = characters x fonts x sizes; each in its corner."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the glyphs' fonts come with matplotlib: pip install matplotlib (or fewstep[demo])"
        ) from error
    from PIL import Image, ImageFont

    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    shape = (len(characters), len(FONTS), len(SIZES))
    masks = torch.zeros(*shape, SIDE, SIDE, dtype=torch.uint8)
    extent = torch.zeros(2, *shape, dtype=torch.long)
    for f, name in enumerate(FONTS):
        for s, size in enumerate(SIZES):
            font = ImageFont.truetype(f"{folder}/{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)
            for c, character in enumerate(characters):
                left, top, right, bottom = font.getbbox(character)
                picture = Image.new("L", (SIDE, SIDE))
                mask = font.getmask(character, mode="L")
                width, height = mask.size
                if width > SIDE or height > SIDE:
                    raise ValueError(f"{character!r} of {name} at {size} is {width} x {height}")
                picture.im.paste(mask, (0, 0, width, height))
                masks[c, f, s] = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(
                    SIDE, SIDE
                )
                extent[:, c, f, s] = torch.tensor([height, width])
    return masks.flatten(0, 2), extent[0].flatten(), extent[1].flatten()


@functools.lru_cache(maxsize=4)
def _atlas_on(characters: str, device: str) -> tuple[torch.Tensor, ...]:
    return tuple(part.to(device) for part in atlas(characters))
