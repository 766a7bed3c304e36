"""The synthetic typographic attack of the literature: write a word on every image of any data set.

As in Defense-Prefix and its followers (papers of 2023 and later): a random wrong class in one of three fonts, dark on
light or light on dark, as large as fits up to a sixth of the height, at a random position. The word is always on a
strip of paper, so that the same strip without letters measures what occlusion alone costs.

Other hands (`HANDS`) write in other fonts, sizes and colours, at an angle, or without paper. Nothing is fitted or
chosen on them: they are a second renderer beside the lab's own (training/lab/renderer.py), with which it shares no
code, and say how far a defence holds for writing that it never saw.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from registry.errors import Invalid
from training.data.images import Batch, Dataset

FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
"""Fonts that ship with matplotlib"""
OTHERS = ("STIXGeneralItalic", "cmr10", "cmss10", "DejaVuSans-Oblique", "DejaVuSerif-Italic", "DejaVuSansMono")
"""Fonts in which no lab model was fitted: thin, slanted, of other families"""


@dataclass(frozen=True)
class Hand:
    """A way of writing."""

    fonts: tuple[str, ...] = FONTS
    height: tuple[float, float] = (1 / 6, 1 / 6)
    """Smallest and largest height of the letters as a fraction of the image's; smaller where the word needs it"""
    vivid: bool = False
    """Whether ink and paper are saturated colours of distant hues, not near black and near white"""
    paper: bool = True
    """Whether the word stands on a strip, or its letters directly on the image"""
    outline: bool = False
    """Whether letters have an edge in the colour that the paper would have"""
    turn: float = 0.0
    """Largest angle in degrees"""


HANDS: dict[str, Hand] = {
    "strip": Hand(),
    "fonts": Hand(OTHERS, (0.2, 0.27)),
    "small": Hand(OTHERS, (0.11, 0.14)),
    "vivid": Hand((*FONTS, *OTHERS), (0.17, 0.27), vivid=True),
    "turned": Hand((*FONTS, *OTHERS), (0.17, 0.27), turn=20.0),
    "bare": Hand((*FONTS, *OTHERS), (0.17, 0.27), paper=False),
    "outlined": Hand((*FONTS, *OTHERS), (0.17, 0.27), paper=False, outline=True),
}
"""Name -> hand; `strip` is the literature's"""


def written(
    data: Dataset,
    word: Literal["none", "blank", "own", "wrong"] = "wrong",
    seed: int = 0,
    hand: str = "strip",
    varied: float = 0.0,
) -> Dataset:
    """Return `data` with a word written on every image; the same seed gives the same word and place whatever `word` is.

    word: none; blank, the strip without letters; own, the image's class; wrong, another class. hand: a name in HANDS.
    varied: share that is written otherwise, for fitting: other sizes and colours, most without paper.
    Extras added: `word` (names), `word_label` (B,), -1 where there are no letters, and `strip` (B, H, W) bool, the
    pixels of strip or letters' box. Raises Invalid for a data set of one class, or a hand that is none.
    """
    if word not in ("none", "blank", "own", "wrong"):
        raise Invalid(f"word={word!r:.40} must be none, blank, own or wrong.")
    if hand not in HANDS:
        raise Invalid(f"hand={hand!r:.40} must be one of {', '.join(HANDS)}.")
    classes = data.classes
    if len(classes) < 2:
        raise Invalid(f"{data.name} has one class, so there is no wrong word to write.")

    def read(rows: Tensor) -> Batch:
        batch = data.read(rows)
        image, said = batch.image.cpu().clone(), []
        strip = torch.zeros(len(batch), *image.shape[-2:], dtype=torch.bool)
        for i, row in enumerate(rows.tolist()):
            g = np.random.default_rng([seed, row])
            label = int(batch.label[i])
            other = (label + int(g.integers(1, len(classes)))) % len(classes)
            shown = label if word == "own" else other
            mine = _otherwise(g) if varied and g.random() < varied else HANDS[hand]
            if word != "none":
                image[i], strip[i] = _write(image[i], classes[shown], g, mine, letters=word != "blank")
            said.append(shown if word in ("own", "wrong") else -1)
        names = tuple(classes[j] if j >= 0 else "" for j in said)
        extras = {
            **batch.extras,
            "word": names,
            "word_label": torch.tensor(said, device=batch.label.device),
            "strip": strip,
        }
        return Batch(image.to(batch.image.device), batch.label, extras)

    more = ({"hand": hand} if hand != "strip" else {}) | ({"varied": varied} if varied else {})
    about = {**data.about, "written": word, "written_seed": seed, **more}
    return Dataset(data.name, data.split, classes, len(data), about, read)


def _otherwise(g: np.random.Generator) -> Hand:
    """Draw a hand for fitting, as training/lab/renderer.py does: never one of `OTHERS`, an angle or an outline."""
    return Hand(height=(0.08, 0.22), vivid=g.random() < 0.5, paper=g.random() < 0.3)


def _write(picture: Tensor, text: str, g: np.random.Generator, hand: Hand, letters: bool) -> tuple[Tensor, Tensor]:
    """Draw a strip, with the text if `letters`, on an image (3, H, W) uint8; also return the strip as (H, W) bool."""
    canvas = Image.fromarray(picture.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    name, size = hand.fonts[int(g.integers(len(hand.fonts)))], height * hand.height[0]
    if hand.height[0] < hand.height[1]:
        size = height * g.uniform(*hand.height)
    size = max(6, int(size))
    while True:  # shrink the font until the word fits
        face = font(name, size)
        left, top, right, bottom = (int(v) for v in draw.textbbox((0, 0), text, font=face))
        w, h = right - left, bottom - top
        if (w < 0.95 * width and h < height) or size <= 6:
            break
        size -= 1
    dark, light = _vivid(g) if hand.vivid else (tuple(map(int, g.integers(*ends, 3))) for ends in ((0, 90), (190, 256)))
    ink, paper = (light, dark) if g.random() < 0.3 else (dark, light)
    margin = max(1, size // 6)
    x, y = (int(g.integers(margin, max(margin + 1, full - part - margin))) for full, part in ((width, w), (height, h)))
    box = x - margin, y - margin, x + w + margin, y + h + margin
    sheet = Image.new("RGBA", canvas.size) if hand.turn else canvas
    draw = ImageDraw.Draw(sheet)
    if hand.paper:
        draw.rectangle(box, fill=paper)
    if letters:
        edge: dict[str, Any] = {"stroke_width": max(1, size // 14), "stroke_fill": paper} if hand.outline else {}
        draw.text((x - left, y - top), text, fill=ink, font=face, **edge)
    strip = torch.zeros(height, width, dtype=torch.bool)
    strip[max(0, box[1]) : box[3] + 1, max(0, box[0]) : box[2] + 1] = True
    if hand.turn:
        sheet = sheet.rotate(g.uniform(-hand.turn, hand.turn), Image.Resampling.BICUBIC, center=(x + w / 2, y + h / 2))
        canvas.paste(sheet, mask=sheet)
        strip = torch.from_numpy(np.asarray(sheet.getchannel("A")) > 127)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1), strip


def _vivid(g: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw a dark and a light saturated colour, a third of the circle of hues or more apart."""
    hue = g.random()
    other = (hue + g.uniform(1 / 3, 2 / 3)) % 1
    pair = colorsys.hsv_to_rgb(hue, 1.0, g.uniform(0.35, 0.6)), colorsys.hsv_to_rgb(other, g.uniform(0.4, 0.8), 1.0)
    return tuple(round(255 * v) for v in pair[0]), tuple(round(255 * v) for v in pair[1])


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font from matplotlib's data folder, located without importing matplotlib, which takes long."""
    found = find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf", size)
