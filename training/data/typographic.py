"""The synthetic typographic attack of the literature: write a word on every image of any data set.

As in Defense-Prefix and its followers (papers of 2023 and later): a random wrong class in one of three fonts, dark on
light or light on dark, as large as fits up to a sixth of the height, at a random position. The word is always on a
strip of paper, so that the same strip without letters measures what occlusion alone costs.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from registry.errors import Invalid
from training.data.images import Batch, Dataset

FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
"""Fonts that ship with matplotlib"""


def written(data: Dataset, word: Literal["none", "blank", "own", "wrong"] = "wrong", seed: int = 0) -> Dataset:
    """Return `data` with a word written on every image; the same seed gives the same word and place whatever `word` is.

    word: none; blank, the strip without letters; own, the image's class; wrong, another class. Extras added: `word`
    (names), `word_label` (B,), -1 where there are no letters, and `strip` (B, H, W) bool, the occluded pixels. Raises
    Invalid for a data set of one class.
    """
    if word not in ("none", "blank", "own", "wrong"):
        raise Invalid(f"word={word!r:.40} must be none, blank, own or wrong.")
    classes = data.classes
    if len(classes) < 2:
        raise Invalid(f"{data.name} has one class, so there is no wrong word to write.")

    def read(rows: Tensor) -> Batch:
        batch = data.read(rows)
        image, said = batch.image.clone(), []
        strip = torch.zeros(len(batch), *image.shape[-2:], dtype=torch.bool)
        for i, row in enumerate(rows.tolist()):
            g = np.random.default_rng([seed, row])
            label = int(batch.label[i])
            other = (label + int(g.integers(1, len(classes)))) % len(classes)
            shown = label if word == "own" else other
            if word != "none":
                image[i], strip[i] = _write(image[i], classes[shown], g, letters=word != "blank")
            said.append(shown if word in ("own", "wrong") else -1)
        names = tuple(classes[j] if j >= 0 else "" for j in said)
        extras = {**batch.extras, "word": names, "word_label": torch.tensor(said), "strip": strip}
        return Batch(image, batch.label, extras)

    about = {**data.about, "written": word, "written_seed": seed}
    return Dataset(data.name, data.split, classes, len(data), about, read)


def _write(picture: Tensor, text: str, g: np.random.Generator, letters: bool) -> tuple[Tensor, Tensor]:
    """Draw a strip, with the text if `letters`, on an image (3, H, W) uint8; also return the strip as (H, W) bool."""
    canvas = Image.fromarray(picture.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    name, size = FONTS[int(g.integers(len(FONTS)))], max(6, height // 6)
    while True:  # shrink the font until the word fits
        face = font(name, size)
        left, top, right, bottom = (int(v) for v in draw.textbbox((0, 0), text, font=face))
        w, h = right - left, bottom - top
        if (w < 0.95 * width and h < height) or size <= 6:
            break
        size -= 1
    dark, light = (tuple(int(v) for v in g.integers(lo, hi, 3)) for lo, hi in ((0, 90), (190, 256)))
    ink, paper = (light, dark) if g.random() < 0.3 else (dark, light)
    margin = max(1, size // 6)
    x, y = (int(g.integers(margin, max(margin + 1, full - part - margin))) for full, part in ((width, w), (height, h)))
    box = x - margin, y - margin, x + w + margin, y + h + margin
    draw.rectangle(box, fill=paper)
    if letters:
        draw.text((x - left, y - top), text, fill=ink, font=face)
    strip = torch.zeros(height, width, dtype=torch.bool)
    strip[max(0, box[1]) : box[3] + 1, max(0, box[0]) : box[2] + 1] = True
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1), strip


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font from matplotlib's data folder, located without importing matplotlib, which takes long."""
    found = find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf", size)
