"""Render synthetic scenes: a Layout says what to draw, `render` returns the images with masks, boxes and labels.

    layout = Layout(grounds(64, g), things(sprites, g), writing(words, g))
    scene = render(layout)                          # .image (64, 3, 96, 96) uint8, masks, boxes, caption facts
    clean = render(replace(layout, writing=None))   # the same images without the word
    strip = render(replace(layout, writing=replace(layout.writing, blank=True)))     # the strip without letters

All randomness is drawn on the CPU from a torch.Generator while the layout is made; drawing is deterministic and
batched. The same seed gives the same bytes on a CPU with any number of threads; on a GPU at most one pixel in a
thousand differs, by 1 of 255 (grid_sample rounds differently), and masks differ on single edge pixels.

Scenes are those that `lab:clip` was trained on: 96 px, nine backgrounds, up to three objects, a strip of large letters.
Shapes: B images, K objects, R pixels a side. Boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from registry.errors import NotFound
from training.data.typographic import font
from training.lab import atlas

VERSION = 1
"""Renderer version, part of every data set's digest: raise it when the same layout gives other images"""
SIZE = 96
GROUNDS = ("water", "grass", "sand", "night sky", "snow", "brick wall", "wood", "blue sky", "plain paper")
_COLOURS = (
    (0.15, 0.40, 0.75), (0.25, 0.60, 0.20), (0.85, 0.75, 0.50), (0.05, 0.05, 0.20), (0.93, 0.95, 0.98),
    (0.65, 0.30, 0.20), (0.50, 0.33, 0.18), (0.50, 0.75, 0.95), (0.90, 0.88, 0.85),
)  # fmt: skip
TEXTURES = 32
"""Number of textures per background, each 1.5 times as wide as a scene, which is a crop of it"""
BRICK = SIZE // 4
"""Period of the brick pattern in pixels"""
FONTS = {
    "sans": "DejaVuSans-Bold", "serif": "DejaVuSerif-Bold", "mono": "DejaVuSansMono-Bold", "times": "STIXGeneralBol",
}  # fmt: skip
"""Font name -> font file in matplotlib's data; `times` is held out of fitting"""
STRIP = (32, 96)
"""Height and width of a strip of letters in pixels"""
LETTER = 26
"""Height of the largest letters in pixels, before the strip is scaled"""
CHUNK = 32
"""Images drawn at once on a CPU; larger chunks exceed a core's cache"""


@dataclass(frozen=True)
class Grounds:
    """Backgrounds of B images; all tensors (B, ...) on the CPU."""

    kind: Tensor
    """(B,) index of the background in GROUNDS"""
    texture: Tensor
    """(B,) index of its texture, below TEXTURES"""
    corner: Tensor
    """(B, 2) int64 x and y of the crop's corner in the texture, below SIZE // 2"""
    mirror: Tensor
    """(B,) bool: whether the crop is mirrored"""
    colour: Tensor
    """(B, 3) colour offset added to every pixel, in units of full intensity"""


@dataclass(frozen=True)
class Things:
    """Foreground objects of B images, later ones in front; all tensors (B, K, ...) on the CPU."""

    sprite: Tensor
    """(B, K) index of the sprite in the atlas, -1 for none"""
    centre: Tensor
    """(B, K, 2) x and y of the centre, in [-1, 1]"""
    size: Tensor
    """(B, K) side of the sprite as a fraction of the image's side"""
    turn: Tensor
    """(B, K) rotation in radians"""
    mirror: Tensor
    """(B, K) bool: whether the sprite is mirrored"""
    tint: Tensor
    """(B, K, 5) saturation and contrast factors (1: unchanged), then offsets of red, green, blue in units of full
    intensity"""


@dataclass(frozen=True)
class Writing:
    """Strips with a written word, in front of everything; all tensors (B, ...) on the CPU."""

    words: tuple[str, ...]
    """Word on each image's strip; "" for no strip"""
    font: Tensor
    """(B,) index of the font in FONTS"""
    centre: Tensor
    """(B, 2) x and y of the strip's centre, in [-1, 1]"""
    scale: Tensor
    """(B,) width of the strip as a fraction of the image's width"""
    ink: Tensor
    """(B, 3) RGB of the letters in [0, 1]"""
    paper: Tensor
    """(B, 3) RGB of the strip in [0, 1]"""
    papered: Tensor
    """(B,) bool: whether the letters stand on a strip, or directly on the image"""
    blank: bool = False
    """Whether to leave out the letters: the control that measures what occlusion by the strip costs"""


@dataclass(frozen=True)
class Layout:
    """Complete description of B images to draw."""

    grounds: Grounds
    things: Things
    writing: Writing | None = None

    def __len__(self) -> int:
        return len(self.grounds.kind)


@dataclass(frozen=True)
class Scene:
    """B rendered images with their ground truth."""

    image: Tensor
    """(B, 3, R, R) uint8"""
    concept: Tensor
    """(B, K) int64 index of the concept in the atlas's names, -1 for none"""
    style: Tensor
    """(B, K) int64 index of the style in the atlas's styles, -1 for none"""
    mask: Tensor
    """(B, K, R, R) bool: the visible part of an object, excluding what other objects or a strip occlude"""
    box: Tensor
    """(B, K, 4) int64 box of the whole object, occluded or not; zeros if none"""
    ground: Tensor
    """(B,) int64 index of the background in GROUNDS"""
    words: tuple[str, ...]
    """Text to be read in each image, "" for none"""
    letters: Tensor
    """(B, R, R) bool: pixels of the letters"""
    strip: Tensor
    """(B, R, R) bool: pixels of strip and letters, all that the writing occludes"""
    word_box: Tensor
    """(B, 4) int64 box of the letters; zeros if there are none"""

    def __len__(self) -> int:
        return len(self.image)

    @property
    def captions(self) -> tuple[str, ...]:
        """Captions as in `lab:clip`'s training: objects, then background, then the word."""
        names, out = atlas.load().names, []
        for row, kind, word in zip(self.concept.tolist(), self.ground.tolist(), self.words, strict=True):
            things = " and a ".join(names[c] for c in row if c >= 0)
            text = f"a picture of a {things} on {GROUNDS[kind]}" if things else f"a picture of {GROUNDS[kind]}"
            out.append(f"{text} with the word {word}" if word else text)
        return tuple(out)


# ---- layouts -----------------------------------------------------------------------------------------------------


def generator(*seed: int | str) -> Generator:
    """Return a CPU generator seeded by the hash of the arguments: `generator("typographic", "test", 0)`."""
    digest = hashlib.sha256("/".join(map(str, seed)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def uniform(shape: Sequence[int], low: float, high: float, g: Generator) -> Tensor:
    """Draw float32 numbers uniformly from [low, high)."""
    return torch.rand(tuple(shape), generator=g) * (high - low) + low


def choose(pool: Tensor, shape: Sequence[int], g: Generator) -> Tensor:
    """Draw members of `pool` (M,) uniformly with replacement. Raises NotFound if it is empty."""
    if not len(pool):
        raise NotFound("There is no sprite of these classes in these styles; give other ones.")
    return pool[torch.randint(len(pool), tuple(shape), generator=g)]


def grounds(
    kind: int | Tensor, g: Generator, kinds: Sequence[str] = GROUNDS, textures: tuple[int, int] = (0, TEXTURES)
) -> Grounds:
    """Draw backgrounds of the given kinds (B,), or of B random kinds out of `kinds`.

    textures: first index, and one past the last index, of the textures to use.
    """
    if not isinstance(kind, Tensor):
        kind = choose(torch.tensor([GROUNDS.index(k) for k in kinds]), (kind,), g)
    n = len(kind)
    texture = torch.randint(*textures, (n,), generator=g)
    corner = torch.randint(SIZE // 2, (n, 2), generator=g)
    # the crop begins at a whole brick: lab:clip never saw others in training and loses 20 points on them
    corner = torch.where(kind[:, None] == GROUNDS.index("brick wall"), corner // BRICK * BRICK, corner)
    return Grounds(
        kind,
        texture,
        corner,
        torch.rand(n, generator=g) < 0.5,
        torch.randn(n, 3, generator=g) * 0.05,
    )


def things(
    sprite: Tensor,
    g: Generator,
    size: tuple[float, float] = (0.45, 0.95),
    centred: bool = False,
    turn: float = 0.35,
    tint: float = 1.0,
) -> Things:
    """Place one sprite per image (B,) anywhere it fits, or K (B, K), each in a quarter and at most half as large.

    turn: largest rotation in radians; tint: strength of the colour jitter, 0 for none.
    """
    many = sprite.ndim == 2 and sprite.shape[1] > 1
    sprite = sprite[:, None] if sprite.ndim == 1 else sprite
    n, k = sprite.shape
    if many:
        sizes = uniform((n, k), 0.3, 0.5, g)
        quarter = torch.rand(n, 4, generator=g).argsort(1)[:, :k]
        middle = torch.stack([quarter % 2, quarter // 2], -1) - 0.5
        centre = middle + uniform((n, k, 2), -0.12, 0.12, g)
    else:
        sizes = uniform((n, k), *size, g)
        centre = uniform((n, k, 2), -1, 1, g) * (1 - sizes[..., None]) * (not centred)
    colours = torch.cat(
        [
            1 + uniform((n, k, 1), -0.4, 0.4, g) * tint,
            1 + uniform((n, k, 1), -0.2, 0.2, g) * tint,
            torch.randn(n, k, 3, generator=g) * 0.05 * tint,
        ],
        -1,
    )
    return Things(sprite, centre, sizes, uniform((n, k), -turn, turn, g), torch.rand(n, k, generator=g) < 0.5, colours)


def writing(
    words: Sequence[str], g: Generator, fonts: Sequence[str] = ("sans", "serif", "mono"), varied: float = 0.0
) -> Writing:
    """Lay out a strip with each word, 75 to 100 % as wide as the image, dark on light (70 %) or light on dark.

    varied: the share that is written otherwise (`_otherwise`); which words, fonts and images stays the same.
    """
    n = len(words)
    scale = uniform((n,), 0.75, 1.0, g)
    room = torch.stack([1 - scale, 1 - scale * STRIP[0] / STRIP[1]], 1)
    dark, light = uniform((n, 3), 0, 0.35, g), uniform((n, 3), 0.75, 1.0, g)
    swap = torch.rand(n, 1, generator=g) < 0.3
    plain = Writing(
        tuple(words),
        torch.tensor([list(FONTS).index(f) for f in fonts])[torch.randint(len(fonts), (n,), generator=g)],
        uniform((n, 2), -1, 1, g) * room,
        scale,
        torch.where(swap, light, dark),
        torch.where(swap, dark, light),
        torch.rand(n, generator=g) < 0.8,
    )
    return _otherwise(plain, torch.rand(n, generator=g) < varied, g) if varied else plain


def _otherwise(plain: Writing, rows: Tensor, g: Generator) -> Writing:
    """Write the rows (B,) bool in other ways: 45 to 100 % as wide, seven of ten without paper, half in vivid colours of
    opposite hue, and dark and light as often."""
    n = len(rows)
    scale = uniform((n,), 0.45, 1.0, g)
    centre = uniform((n, 2), -1, 1, g) * torch.stack([1 - scale, 1 - scale * STRIP[0] / STRIP[1]], 1)
    hue, dark, light = uniform((n, 3), 0, 1, g), uniform((n, 3), 0, 0.35, g), uniform((n, 3), 0.75, 1.0, g)
    vivid = torch.rand(n, 1, generator=g) < 0.5
    deep, bright = torch.where(vivid, 0.6 * hue, dark), torch.where(vivid, 0.4 + 0.6 * ((hue + 0.5) % 1), light)
    swap, papered, at = torch.rand(n, 1, generator=g) < 0.5, torch.rand(n, generator=g) < 0.3, rows[:, None]
    return replace(
        plain,
        centre=torch.where(at, centre, plain.centre),
        scale=torch.where(rows, scale, plain.scale),
        ink=torch.where(at, torch.where(swap, bright, deep), plain.ink),
        paper=torch.where(at, torch.where(swap, deep, bright), plain.paper),
        papered=torch.where(rows, papered, plain.papered),
    )


def take(layout: Layout, rows: slice | Tensor) -> Layout:
    """Return the layout of a subset of the images. rows: a slice, or an index or bool tensor."""

    def cut(part: Grounds | Things | Writing) -> dict[str, Any]:
        return {k: v[rows] for k, v in vars(part).items() if isinstance(v, Tensor)}

    text = layout.writing
    if text is not None:
        index = torch.arange(len(text.words))[rows].tolist()
        text = replace(text, **cut(text), words=tuple(text.words[i] for i in index))
    return Layout(Grounds(**cut(layout.grounds)), Things(**cut(layout.things)), text)


# ---- drawing -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def render(layout: Layout, device: str | torch.device = "cpu", size: int = SIZE) -> Scene:
    """Render a layout on `device`. size: pixels a side; objects, strips and letters scale with it.

    Raises NotFound for an empty layout.
    """
    step = CHUNK if torch.device(device).type == "cpu" else 4096
    parts = [_draw(take(layout, slice(i, i + step)), torch.device(device), size) for i in range(0, len(layout), step)]
    if not parts:
        raise NotFound("The layout holds no picture; ask for at least one.")
    if len(parts) == 1:
        return parts[0]
    fields = {k: torch.cat([getattr(p, k) for p in parts]) for k, v in vars(parts[0]).items() if isinstance(v, Tensor)}
    return Scene(**fields, words=tuple(w for p in parts for w in p.words))


def _draw(layout: Layout, device: torch.device, size: int) -> Scene:
    """Draw a chunk: backgrounds, then objects in order, then the strip; each occludes the masks of those before it."""
    lab = _atlas(device)
    ground, stuff, text = layout.grounds, layout.things, layout.writing
    n, k = stuff.sprite.shape
    canvas = _cut(ground, device, size)  # (B, 3, R, R) float32 in 0..255
    mask = torch.zeros(n, k, size, size, dtype=torch.bool, device=device)
    box = torch.zeros(n, k, 4, dtype=torch.int64, device=device)
    concept, style = (torch.full((n, k), -1, device=device) for _ in range(2))
    for i in range(k):
        there = torch.where(stuff.sprite[:, i] >= 0)[0]
        if not len(there):
            continue
        rows: Tensor | slice = slice(None) if len(there) == n else there.to(device)
        sprite = stuff.sprite[there, i].to(device)
        picture = _tinted(lab.sprites[sprite].float(), stuff.tint[there, i].to(device))
        grid = _grid(stuff.centre[there, i], stuff.size[there, i], stuff.turn[there, i], stuff.mirror[there, i], 1.0)
        drawn = _sample(picture, grid, device, size)
        canvas[rows] = torch.addcmul(drawn[:, :3], canvas[rows], 1 - drawn[:, 3:])
        seen = drawn[:, 3] > 0.5
        if i:
            mask[rows] &= ~seen[:, None]
        mask[rows, i] = seen
        box[rows, i] = _box(seen)
        concept[rows, i], style[rows, i] = lab.concept[sprite], lab.style[sprite]
    letters, strip = (torch.zeros(n, size, size, dtype=torch.bool, device=device) for _ in range(2))
    if text is not None and (written := [i for i, w in enumerate(text.words) if w]):
        there = torch.tensor(written)
        rows = slice(None) if len(there) == n else there.to(device)
        ink = torch.stack([_letters(text.words[j], int(text.font[j])) for j in written])
        ink = torch.zeros_like(ink) if text.blank else ink
        sheet = torch.stack([ink, torch.ones_like(ink)], 1).to(device)
        still = torch.zeros(len(there))
        grid = _grid(text.centre[there], text.scale[there], still, still.bool(), STRIP[0] / STRIP[1])
        drawn = _sample(sheet, grid, device, size)
        paper = drawn[:, 1:] * text.papered[there].float().to(device)[:, None, None, None]
        under = torch.lerp(canvas[rows], text.paper[there].to(device)[:, :, None, None] * 255, paper)
        canvas[rows] = torch.lerp(under, text.ink[there].to(device)[:, :, None, None] * 255, drawn[:, :1])
        letters[rows] = drawn[:, 0] > 0.3  # not 0.5: strokes of small letters never cover half a pixel
        strip[rows] = (paper[:, 0] > 0.5) | letters[rows]
        mask &= ~strip[:, None]
    return Scene(
        canvas.round_().clamp_(0, 255).to(torch.uint8),
        concept,
        style,
        mask,
        box,
        ground.kind.to(device),
        text.words if text is not None and not text.blank else ("",) * n,
        letters,
        strip,
        _box(letters),
    )


def _grid(centre: Tensor, size: Tensor, turn: Tensor, mirror: Tensor, aspect: float) -> Tensor:
    """Return affine matrices (B, 2, 3) from image to sprite or strip coordinates; aspect: height / width."""
    cos, sin, side = turn.cos(), turn.sin(), torch.where(mirror, -1.0, 1.0)
    x, y = centre.unbind(1)
    out = torch.empty(len(size), 2, 3)
    out[:, 0, 0], out[:, 0, 1], out[:, 0, 2] = side * cos, side * sin, -side * (x * cos + y * sin)
    out[:, 1, 0], out[:, 1, 1], out[:, 1, 2] = -sin / aspect, cos / aspect, (x * sin - y * cos) / aspect
    return out / size[:, None, None]


def _sample(picture: Tensor, grid: Tensor, device: torch.device, size: int) -> Tensor:
    # as F.affine_grid, without its slow batched matrix product
    steps = (torch.arange(size, device=device) * 2 + 1) / size - 1
    column, row, at = grid.to(device)[:, :, None, None, :].unbind(-1)
    where = (column * steps + at + row * steps[:, None]).permute(0, 2, 3, 1)
    return F.grid_sample(picture, where, align_corners=False)


def _tinted(sprite: Tensor, tint: Tensor) -> Tensor:
    """Jitter the colours of RGBA sprites in 0..255; return RGB in 0..255 premultiplied by alpha, and alpha in 0..1."""
    rgb, opacity = sprite[:, :3], sprite[:, 3:] / 255
    grey = rgb.mean(1, keepdim=True)
    t = tint[:, :, None, None]
    rgb = torch.lerp(grey, rgb, t[:, :1]).mul_(t[:, 1:2]).add_(t[:, 2:] * 255).clamp_(0, 255)
    return torch.cat([rgb.mul_(opacity), opacity], 1)


def _box(mask: Tensor) -> Tensor:
    """Return the bounding boxes (..., 4) int64 of masks (..., R, R) bool; zeros where a mask is empty."""
    out = []
    for axis in (-2, -1):
        line = mask.view(torch.uint8).amax(axis)  # max of bytes is ten times as fast as `any`
        n = line.shape[-1]
        first = line.argmax(-1)
        last = n - line.flip(-1).argmax(-1)
        out.append((first, last * line.amax(-1)))
    (x0, x1), (y0, y1) = out
    return torch.stack([x0, y0, x1, y1], -1)


@cache
def _atlas(device: torch.device) -> atlas.Atlas:
    lab = atlas.load()
    return replace(lab, sprites=lab.sprites.to(device), concept=lab.concept.to(device), style=lab.style.to(device))


def _cut(ground: Grounds, device: torch.device, size: int) -> Tensor:
    """Crop each image's background (B, 3, size, size) float32 in 0..255 from its texture."""
    wall = _textures(device)
    n = len(ground.kind)
    x = ground.corner[:, :1] + torch.where(ground.mirror[:, None], torch.arange(SIZE - 1, -1, -1), torch.arange(SIZE))
    y = ground.corner[:, 1:] + torch.arange(SIZE)
    first = ((ground.kind * TEXTURES + ground.texture) * wall.shape[-2])[:, None]
    # a pixel (3 bytes and padding) is gathered as one int32, three times as fast as bytes
    at = ((first + y)[:, :, None] * wall.shape[-1] + x[:, None, :]).to(device)
    pixels = wall.view(-1).take(at.view(-1)).view(torch.uint8).view(n, SIZE, SIZE, 4)[..., :3]
    out = pixels.permute(0, 3, 1, 2).float()
    if size != SIZE:
        out = F.interpolate(out, size=(size, size), mode="bilinear", align_corners=False)
    return out.add_(ground.colour.to(device)[:, :, None, None] * 255).clamp_(0, 255)


@cache
def _textures(device: torch.device) -> Tensor:
    """Generate the fixed background textures (kinds * TEXTURES, S, S): each int32 packs one RGB pixel; S = 1.5 SIZE."""
    if device.type != "cpu":
        return _textures(torch.device("cpu")).to(device)
    g, n, s = generator("textures"), TEXTURES, SIZE * 3 // 2
    line = torch.arange(s) / (SIZE - 1)  # scene coordinates: 0 to 1 across one scene
    yy, xx = torch.meshgrid(line, line, indexing="ij")

    def noise(height: int, width: int, strength: float, channels: int = 1) -> Tensor:
        coarse = torch.randn(n, channels, height, width, generator=g) * strength
        return F.interpolate(coarse, size=(s, s), mode="bilinear", align_corners=False)

    def pattern(name: str) -> Tensor:
        match name:
            case "water":
                phase, pitch = uniform((n, 1, 1, 1), 0, 6.28, g), uniform((n, 1, 1, 1), 8 * 6.28, 16 * 6.28, g)
                return 0.1 * torch.sin(pitch * yy + 3 * torch.sin(6.28 * 2 * xx + phase) + phase)
            case "grass":
                return noise(24, s, 0.12)
            case "sand":
                return torch.randn(n, 1, s, s, generator=g) * 0.06
            case "night sky":
                return (torch.rand(n, 1, s, s, generator=g) > 0.995).float() * 0.8
            case "snow":
                return torch.randn(n, 1, s, s, generator=g) * 0.018
            case "brick wall":
                row, column = (yy * 8) % 1, (xx * 4 + 0.5 * ((yy * 8).floor() % 2)) % 1
                return -0.25 * ((row < 0.12) | (column < 0.06)).float().expand(n, 1, s, s)
            case "wood":
                return noise(s, 6, 0.08)
            case _:
                return torch.zeros(n, 1, s, s)

    out = []
    for name, colour in zip(GROUNDS, _COLOURS, strict=True):
        base = torch.tensor(colour)[:, None, None] + noise(4, 4, 0.07, 3) + noise(18, 18, 0.03, 3) + pattern(name)
        out.append(base.clamp(0, 1).mul(255).round().to(torch.uint8))
    pixels = torch.cat([torch.cat(out), torch.zeros(len(out) * n, 1, s, s, dtype=torch.uint8)], 1)
    return pixels.permute(0, 2, 3, 1).contiguous().view(torch.int32).squeeze(-1)


@cache
def _letters(word: str, kind: int) -> Tensor:
    """Rasterise a word centred on a strip (32, 96), float32 in 0..1, in the largest font that fits (26 to 6 px)."""
    height, width = STRIP
    file = list(FONTS.values())[kind]
    for size in range(LETTER, 5, -1):
        left, top, right, bottom = font(file, size).getbbox(word)
        if right - left <= width - 4 and bottom - top <= height - 4:
            break
    sheet = Image.new("L", (width, height))
    at = ((width - right + left) // 2 - left, (height - bottom + top) // 2 - top)
    ImageDraw.Draw(sheet).text(at, word, 255, font=font(file, size))
    return torch.from_numpy(np.asarray(sheet).copy()).float() / 255
