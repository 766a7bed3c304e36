"""One renderer: a Layout says what to draw, `render` draws it and says what is where.

    layout = Layout(grounds(64, g), things(sprites, g), writing(words, g))
    scene = render(layout)                          # .image (64, 3, 96, 96) uint8, masks, boxes, captions' facts
    clean = render(replace(layout, writing=None))   # the same pictures without the word
    strip = render(replace(layout, writing=replace(layout.writing, blank=True)))     # the strip without letters

Everything random is drawn on the CPU from a torch.Generator while the layout is made; drawing has no randomness and no
loop over pictures. The same seed gives the same bytes on a CPU, whatever the number of threads; on a GPU at most one
pixel in a thousand differs, by 1 of 255 (grid_sample rounds differently), and masks differ on single edge pixels.

It draws what `lab:clip` was trained on: 96 px, nine grounds, up to three things, a strip of large letters.
Shapes: B pictures, K things, R pixels a side. Boxes are x0, y0, x1, y1 in pixels, the last two exclusive.
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
"""part of every digest: raise it when the same layout gives other pictures"""
SIZE = 96
GROUNDS = ("water", "grass", "sand", "night sky", "snow", "brick wall", "wood", "blue sky", "plain paper")
_COLOURS = (
    (0.15, 0.40, 0.75), (0.25, 0.60, 0.20), (0.85, 0.75, 0.50), (0.05, 0.05, 0.20), (0.93, 0.95, 0.98),
    (0.65, 0.30, 0.20), (0.50, 0.33, 0.18), (0.50, 0.75, 0.95), (0.90, 0.88, 0.85),
)  # fmt: skip
TEXTURES = 32
"""pictures of each ground, half as large again as a scene, which is cut from them"""
BRICK = SIZE // 4
"""pixels after which the pattern of bricks comes again"""
FONTS = {
    "sans": "DejaVuSans-Bold", "serif": "DejaVuSerif-Bold", "mono": "DejaVuSansMono-Bold", "times": "STIXGeneralBol",
}  # fmt: skip
"""name -> file that matplotlib carries; `times` is held out of fitting"""
STRIP = (32, 96)
"""height and width of a strip of letters"""
LETTER = 26
"""height of the largest letters, px before a strip is scaled"""
CHUNK = 32
"""pictures drawn at once; more leave a core's cache"""


@dataclass(frozen=True)
class Grounds:
    """What the pictures stand on; all (B, ...) on the CPU."""

    kind: Tensor
    """(B,) index of GROUNDS"""
    texture: Tensor
    """(B,) index below TEXTURES"""
    corner: Tensor
    """(B, 2) int64: where the scene is cut from its texture, x and y, below SIZE // 2"""
    mirror: Tensor
    """(B,) bool"""
    colour: Tensor
    """(B, 3) added to every pixel, 0 to 1"""


@dataclass(frozen=True)
class Things:
    """What stands in the pictures, later ones in front; all (B, K, ...) on the CPU."""

    sprite: Tensor
    """(B, K) index in the atlas, -1 for nothing"""
    centre: Tensor
    """(B, K, 2) x and y in [-1, 1]"""
    size: Tensor
    """(B, K) share of the picture's side"""
    turn: Tensor
    """(B, K) radians"""
    mirror: Tensor
    """(B, K) bool"""
    tint: Tensor
    """(B, K, 5): saturation, contrast (1 leaves them), red, green, blue added (0 to 1)"""


@dataclass(frozen=True)
class Writing:
    """A strip with a word on it, in front of everything; all (B, ...) on the CPU."""

    words: tuple[str, ...]
    """Word on each picture's strip; "" for no strip"""
    font: Tensor
    """(B,) index of FONTS"""
    centre: Tensor
    """(B, 2) x and y in [-1, 1]"""
    scale: Tensor
    """(B,) 1 is as wide as the picture"""
    ink: Tensor
    """(B, 3)"""
    paper: Tensor
    """(B, 3)"""
    papered: Tensor
    """(B,) bool: letters on a strip, or right on the picture"""
    blank: bool = False
    """the strips without their letters: what the covering alone costs"""


@dataclass(frozen=True)
class Layout:
    """B pictures to draw."""

    grounds: Grounds
    things: Things
    writing: Writing | None = None

    def __len__(self) -> int:
        return len(self.grounds.kind)


@dataclass(frozen=True)
class Scene:
    """B pictures and what is where."""

    image: Tensor
    """(B, 3, R, R) uint8"""
    concept: Tensor
    """(B, K) int64 index in the atlas' names, -1 for nothing"""
    style: Tensor
    """(B, K) int64, -1 for nothing"""
    mask: Tensor
    """(B, K, R, R) bool: where a thing is seen, so never under another or under a strip"""
    box: Tensor
    """(B, K, 4) int64: of the whole thing, covered or not; zeros if none"""
    ground: Tensor
    """(B,) int64 index of GROUNDS"""
    words: tuple[str, ...]
    """what is to be read, "" for nothing"""
    letters: Tensor
    """(B, R, R) bool: ink"""
    strip: Tensor
    """(B, R, R) bool: paper and ink, all that the writing covers"""
    word_box: Tensor
    """(B, 4) int64: of the ink; zeros if there is none"""

    def __len__(self) -> int:
        return len(self.image)

    @property
    def captions(self) -> tuple[str, ...]:
        """What training says of such a picture: things, then ground, then the word."""
        names, out = atlas.load().names, []
        for row, kind, word in zip(self.concept.tolist(), self.ground.tolist(), self.words, strict=True):
            things = " and a ".join(names[c] for c in row if c >= 0)
            text = f"a picture of a {things} on {GROUNDS[kind]}" if things else f"a picture of {GROUNDS[kind]}"
            out.append(f"{text} with the word {word}" if word else text)
        return tuple(out)


# ---- layouts -----------------------------------------------------------------------------------------------------


def generator(*seed: int | str) -> Generator:
    """A CPU generator of its own for these words and numbers: `generator("typographic", "test", 0)`."""
    digest = hashlib.sha256("/".join(map(str, seed)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def uniform(shape: Sequence[int], low: float, high: float, g: Generator) -> Tensor:
    """float32 in [low, high)."""
    return torch.rand(tuple(shape), generator=g) * (high - low) + low


def choose(pool: Tensor, shape: Sequence[int], g: Generator) -> Tensor:
    """Members of `pool` (M,), with repetition. Raises NotFound if there are none."""
    if not len(pool):
        raise NotFound("There is no sprite of these classes in these styles; give other ones.")
    return pool[torch.randint(len(pool), tuple(shape), generator=g)]


def grounds(
    kind: int | Tensor, g: Generator, kinds: Sequence[str] = GROUNDS, textures: tuple[int, int] = (0, TEXTURES)
) -> Grounds:
    """Grounds of the given kinds (B,), or of B random ones out of `kinds`; textures: first and one past the last."""
    if not isinstance(kind, Tensor):
        kind = choose(torch.tensor([GROUNDS.index(k) for k in kinds]), (kind,), g)
    n = len(kind)
    texture = torch.randint(*textures, (n,), generator=g)
    corner = torch.randint(SIZE // 2, (n, 2), generator=g)
    # bricks are whole at the edge: lab:clip never saw them otherwise, and loses 20 points if they are not
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
    """One thing (B,) anywhere it fits, or K of them (B, K), each in a quarter of its own and at most half as large.

    turn: largest, radians; tint: how strongly colours vary, 0 for not at all.
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


def writing(words: Sequence[str], g: Generator, fonts: Sequence[str] = ("sans", "serif", "mono")) -> Writing:
    """A strip with each word, 3/4 to all of the picture wide, dark on light or the other way round."""
    n = len(words)
    scale = uniform((n,), 0.75, 1.0, g)
    room = torch.stack([1 - scale, 1 - scale * STRIP[0] / STRIP[1]], 1)
    dark, light = uniform((n, 3), 0, 0.35, g), uniform((n, 3), 0.75, 1.0, g)
    swap = torch.rand(n, 1, generator=g) < 0.3
    return Writing(
        tuple(words),
        torch.tensor([list(FONTS).index(f) for f in fonts])[torch.randint(len(fonts), (n,), generator=g)],
        uniform((n, 2), -1, 1, g) * room,
        scale,
        torch.where(swap, light, dark),
        torch.where(swap, dark, light),
        torch.rand(n, generator=g) < 0.8,
    )


def take(layout: Layout, rows: slice | Tensor) -> Layout:
    """Some of a layout's pictures."""

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
    """Draw a layout, on `device`. size: pixels a side; things, strips and letters scale with it."""
    step = CHUNK if torch.device(device).type == "cpu" else 4096
    parts = [_draw(take(layout, slice(i, i + step)), torch.device(device), size) for i in range(0, len(layout), step)]
    if not parts:
        raise NotFound("The layout holds no picture; ask for at least one.")
    if len(parts) == 1:
        return parts[0]
    fields = {k: torch.cat([getattr(p, k) for p in parts]) for k, v in vars(parts[0]).items() if isinstance(v, Tensor)}
    return Scene(**fields, words=tuple(w for p in parts for w in p.words))


def _draw(layout: Layout, device: torch.device, size: int) -> Scene:
    lab = _atlas(device)
    ground, stuff, text = layout.grounds, layout.things, layout.writing
    n, k = stuff.sprite.shape
    canvas = _cut(ground, device, size)  # (B, 3, R, R) 0..255
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
        letters[rows] = drawn[:, 0] > 0.3  # small letters have strokes that never cover half a pixel
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
    """(B, 2, 3): from the picture's coordinates to a thing's; aspect: its height over its width."""
    cos, sin, side = turn.cos(), turn.sin(), torch.where(mirror, -1.0, 1.0)
    x, y = centre.unbind(1)
    out = torch.empty(len(size), 2, 3)
    out[:, 0, 0], out[:, 0, 1], out[:, 0, 2] = side * cos, side * sin, -side * (x * cos + y * sin)
    out[:, 1, 0], out[:, 1, 1], out[:, 1, 2] = -sin / aspect, cos / aspect, (x * sin - y * cos) / aspect
    return out / size[:, None, None]


def _sample(picture: Tensor, grid: Tensor, device: torch.device, size: int) -> Tensor:
    # the same as F.affine_grid, without its matrix product
    steps = (torch.arange(size, device=device) * 2 + 1) / size - 1
    column, row, at = grid.to(device)[:, :, None, None, :].unbind(-1)
    where = (column * steps + at + row * steps[:, None]).permute(0, 2, 3, 1)
    return F.grid_sample(picture, where, align_corners=False)


def _tinted(sprite: Tensor, tint: Tensor) -> Tensor:
    """RGBA 0..255 -> RGB 0..255 premultiplied by A 0..1, colours changed."""
    rgb, opacity = sprite[:, :3], sprite[:, 3:] / 255
    grey = rgb.mean(1, keepdim=True)
    t = tint[:, :, None, None]
    rgb = torch.lerp(grey, rgb, t[:, :1]).mul_(t[:, 1:2]).add_(t[:, 2:] * 255).clamp_(0, 255)
    return torch.cat([rgb.mul_(opacity), opacity], 1)


def _box(mask: Tensor) -> Tensor:
    """(..., R, R) bool -> (..., 4) int64, zeros where the mask is empty."""
    out = []
    for axis in (-2, -1):
        line = mask.view(torch.uint8).amax(axis)  # ten times as fast as `any`
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
    """(B, 3, size, size) float32 0..255, out of the textures."""
    wall = _textures(device)
    n = len(ground.kind)
    x = ground.corner[:, :1] + torch.where(ground.mirror[:, None], torch.arange(SIZE - 1, -1, -1), torch.arange(SIZE))
    y = ground.corner[:, 1:] + torch.arange(SIZE)
    first = ((ground.kind * TEXTURES + ground.texture) * wall.shape[-2])[:, None]
    # whole pixels (3 bytes and a spare) are gathered as one int32: three times as fast as bytes
    at = ((first + y)[:, :, None] * wall.shape[-1] + x[:, None, :]).to(device)
    pixels = wall.view(-1).take(at.view(-1)).view(torch.uint8).view(n, SIZE, SIZE, 4)[..., :3]
    out = pixels.permute(0, 3, 1, 2).float()
    if size != SIZE:
        out = F.interpolate(out, size=(size, size), mode="bilinear", align_corners=False)
    return out.add_(ground.colour.to(device)[:, :, None, None] * 255).clamp_(0, 255)


@cache
def _textures(device: torch.device) -> Tensor:
    """(kinds * TEXTURES, S, S) int32 of four bytes each, S = 1.5 SIZE; always the same ones."""
    if device.type != "cpu":
        return _textures(torch.device("cpu")).to(device)
    g, n, s = generator("textures"), TEXTURES, SIZE * 3 // 2
    line = torch.arange(s) / (SIZE - 1)  # 0 to 1 over a scene
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
    """(32, 96) float32 0..1: the word in the middle of a strip, as large as it fits, 26 px at most, 6 at least."""
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
