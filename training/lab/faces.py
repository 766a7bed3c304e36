"""Procedurally drawn faces with exact attribute labels, 64 px: the lab's twin of CelebA.

Shapes are anti-aliased signed distance fields. An identity is nine numbers in [0, 1]: five binary attributes (beard,
glasses, hat, long hair, bald) and four continuous ones (skin from light to dark; hair from black over brown and red to
blond; width of the face; distance of the eyes). Everything else varies between images of one identity: mouth,
background, clothes, position, size and light. Own code, no data to license.

    python -m training.lab.faces faces.png      # eight identities, twelve images each
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import patches
from registry.errors import NotFound

BINARY = ("beard", "glasses", "hat", "long_hair", "bald")
CONTINUOUS = ("skin", "hair", "width", "eyes")
ATTRIBUTES = BINARY + CONTINUOUS
MOUTHS = ("neutral", "smiling", "open")
GROUNDS = ("blue", "yellow", "green", "white", "violet")
RATES = {"beard": 0.4, "glasses": 0.4, "hat": 0.3, "long_hair": 0.5, "bald": 0.25}
"""Probability of each binary attribute; a bald person has no long hair"""
SIZE = 64
JUDGE = Path(patches.__file__).parent / "lab" / "faces" / "judge.safetensors"
VERSION = 1
"""Version of the drawing code: a base trained on another version has not seen these faces"""

_GROUND = torch.tensor(
    [[0.70, 0.86, 0.97], [0.98, 0.84, 0.50], [0.68, 0.90, 0.66], [0.96, 0.96, 0.96], [0.78, 0.68, 0.90]]
)
_HAIR = torch.tensor([[0.09, 0.07, 0.08], [0.40, 0.24, 0.12], [0.76, 0.32, 0.10], [0.95, 0.82, 0.46]])
_FRAME, _HAT, _BRIM = (0.05, 0.05, 0.12), (0.15, 0.25, 0.58), (0.09, 0.16, 0.44)


def identities(n: int, g: Generator) -> Tensor:
    """Draw the attributes (n, 9) of n identities, independent except that bald people have no long hair."""
    u = torch.rand(n, len(ATTRIBUTES), generator=g)
    z = u.clone()
    for i, name in enumerate(BINARY):
        z[:, i] = (u[:, i] < RATES[name]).float()
    z[:, BINARY.index("long_hair")] *= 1 - z[:, BINARY.index("bald")]
    return z


@dataclass(frozen=True)
class Pictures:
    """n drawn images with their ground truth."""

    image: Tensor
    """(n, 3, 64, 64) in [0, 1]"""
    people: Tensor
    """(n, 9) attributes of the identity shown, in the order of ATTRIBUTES"""
    mouth: Tensor
    """(n,) index of the mouth in MOUTHS"""
    ground: Tensor
    """(n,) index of the background in GROUNDS"""


def pictures(people: Tensor, g: Generator, chunk: int = 64) -> Pictures:
    """Draw one image of each identity in `people` (n, 9) with random mouth, background, clothes, position and light."""
    n = len(people)
    r = torch.rand(n, 7, generator=g)
    mouth = torch.randint(0, len(MOUTHS), (n,), generator=g)
    ground = torch.randint(0, len(GROUNDS), (n,), generator=g)
    parts = [p.split(chunk) for p in (people, mouth, ground, r)]
    image = torch.cat([draw(*part) for part in zip(*parts, strict=True)]) if n else torch.zeros(0, 3, SIZE, SIZE)
    return Pictures(image, people, mouth, ground)


class _Canvas:
    """n images onto which shapes are painted back to front. Coordinates lie in [-1, 1]; y points down."""

    def __init__(self, ground: Tensor, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.soft = x, y, size * 0.5
        self.image = ground[:, :, None, None].expand(-1, 3, size, size).clone()

    def _v(self, value: Tensor | float) -> Tensor | float:
        return value[:, None, None] if isinstance(value, Tensor) else value

    def ellipse(self, cx: Tensor | float, cy: float, rx: Tensor | float, ry: float, x: Tensor | None = None) -> Tensor:
        """Return the coverage (n, size, size) in [0, 1] of an ellipse with centre (cx, cy) and radii rx, ry."""
        rx = self._v(rx)
        d = ((((self.x if x is None else x) - self._v(cx)) / rx).square() + ((self.y - cy) / ry).square()).sqrt() - 1
        least = torch.clamp(rx, max=ry) if isinstance(rx, Tensor) else min(rx, ry)
        return (0.5 - d * least * self.soft).clamp(0, 1)

    def box(self, cx: Tensor | float, cy: float, rx: Tensor | float, ry: float, x: Tensor | None = None) -> Tensor:
        """Return the coverage (n, size, size) in [0, 1] of a rectangle with centre (cx, cy) and half-sizes rx, ry."""
        d = torch.maximum(((self.x if x is None else x) - self._v(cx)).abs() - self._v(rx), (self.y - cy).abs() - ry)
        return (0.5 - d * self.soft).clamp(0, 1)

    def below(self, edge: Tensor | float) -> Tensor:
        """Return the coverage (n, size, size) in [0, 1] of everything below the horizontal line y = edge."""
        return (0.5 + (self.y - edge) * self.soft).clamp(0, 1)

    def paint(self, mask: Tensor, colour: Tensor | tuple[float, ...], on: Tensor | None = None) -> None:
        """Blend `colour` into the images where `mask` (n, size, size) covers them; on: (n,) opacity per image."""
        mask = mask if on is None else mask * on[:, None, None]
        c = torch.tensor(colour) if isinstance(colour, tuple) else colour
        self.image.lerp_(c.reshape(-1, 3, 1, 1).expand_as(self.image), mask[:, None].expand_as(self.image))


def _blend(stops: Tensor, t: Tensor) -> Tensor:
    """Interpolate colours (n, 3) at t (n,) in [0, 1] along the gradient `stops` (k, 3)."""
    at = t.clamp(0, 1) * (len(stops) - 1)
    low = at.floor().long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[low], stops[low + 1], (at - low)[:, None])


@torch.no_grad()
def draw(people: Tensor, mouth: Tensor, ground: Tensor, r: Tensor, size: int = SIZE) -> Tensor:
    """Draw faces (n, 3, size, size) in [0, 1] from attributes (n, 9), mouth and background indices (n,), and nuisances.

    r: (n, 7) in [0, 1]: clothes' colour (3), shift (2), scale, light.
    """
    a = {name: people[:, i] for i, name in enumerate(ATTRIBUTES)}
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    scale = (1 / (0.98 + 0.04 * r[:, 5]))[:, None, None]
    x = ((axis[None, None, :] - (r[:, 3, None, None] - 0.5) * 0.05) * scale).expand(-1, size, size)
    y = ((axis[None, :, None] - (r[:, 4, None, None] - 0.5) * 0.05) * scale).expand(-1, size, size)
    c, both = _Canvas(_GROUND[ground], x, y, size), x.abs()
    skin = _blend(torch.tensor([[1.0, 0.87, 0.76], [0.78, 0.56, 0.40], [0.34, 0.21, 0.14]]), a["skin"])
    hair, w, has = _blend(_HAIR, a["hair"]), 0.38 + 0.20 * a["width"], 1 - a["bald"]
    eye = w * (0.30 + 0.26 * a["eyes"])
    square = (x / w[:, None, None]).square()

    c.paint(torch.maximum(c.ellipse(0.0, -0.12, w + 0.16, 0.66), c.box(0.0, 0.3, w + 0.15, 0.45)), hair, a["long_hair"])
    c.paint(c.ellipse(0.0, 1.0, 0.78, 0.36), r[:, :3] * 0.7 + 0.1)
    c.paint(c.box(0.0, 0.58, 0.16, 0.2), skin * 0.9)
    c.paint(c.ellipse(0.0, -0.2, w + 0.10, 0.57), hair, has)
    c.paint(c.ellipse(w, 0.05, 0.08, 0.12, both), skin * 0.95)
    face = c.ellipse(0.0, 0.05, w, 0.58)
    c.paint(face, skin)
    c.paint(face * (1 - c.below(-0.30 - 0.12 * square)), hair, has)
    c.paint(face * c.below(0.22 - 0.12 * square), hair * 0.9, a["beard"])
    c.paint(c.ellipse(eye, -0.02, 0.105, 0.085, both), (0.97, 0.97, 0.97))
    c.paint(c.ellipse(eye, -0.02, 0.055, 0.07, both), (0.1, 0.08, 0.08))
    c.paint(c.box(eye, -0.20, 0.12, 0.03, both), hair * 0.7)
    ring = (c.ellipse(eye, -0.02, 0.20, 0.18, both) - c.ellipse(eye, -0.02, 0.135, 0.115, both)).clamp(0, 1)
    c.paint(ring, _FRAME, a["glasses"])
    c.paint(c.box(0.0, -0.03, (eye - 0.16).clamp(min=0.01), 0.03), _FRAME, a["glasses"])
    c.paint(c.ellipse(0.0, 0.16, 0.06, 0.07), skin * 0.82)
    says = F.one_hot(mouth, len(MOUTHS)).float().unbind(1)
    c.paint(c.box(0.0, 0.38, 0.15, 0.03), (0.65, 0.2, 0.2), says[0])
    c.paint(c.ellipse(0.0, 0.33, 0.22, 0.15) * c.below(0.33), (0.98, 0.95, 0.95), says[1])
    c.paint(c.ellipse(0.0, 0.39, 0.11, 0.12), (0.40, 0.05, 0.08), says[2])
    c.paint(c.ellipse(0.0, -0.48, w + 0.09, 0.36) * (1 - c.below(-0.36)), _HAT, a["hat"])
    c.paint(c.box(0.0, -0.37, w + 0.2, 0.055), _BRIM, a["hat"])
    return (c.image * (0.94 + 0.12 * r[:, 6])[:, None, None, None]).clamp(0, 1)


def sketch(image: Tensor) -> Tensor:
    """Render images (n, 3, h, w) as grey sketches with dark outlines: a style that no model was trained on."""
    grey = image.mean(1, keepdim=True)
    dx = F.pad(image[..., :, 1:] - image[..., :, :-1], (0, 1)).abs().amax(1, keepdim=True)
    dy = F.pad(image[..., 1:, :] - image[..., :-1, :], (0, 0, 0, 1)).abs().amax(1, keepdim=True)
    return (0.35 + 0.65 * grey - 2.0 * torch.maximum(dx, dy)).clamp(0, 1).expand(-1, 3, -1, -1)


# ---- the judge ---------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """CNN that predicts the attributes of 64 px faces.

    It is fitted on drawn images only, and no generator or adapter is trained against it.
    """

    def __init__(self) -> None:
        super().__init__()

        def stage(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())

        out = len(ATTRIBUTES) + len(MOUTHS) + len(GROUNDS)
        self.net = nn.Sequential(
            stage(3, 24), stage(24, 48), stage(48, 96), nn.Flatten(), nn.Dropout(0.1), nn.Linear(96 * 16, out)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return attributes (n, 9) (binary ones as probabilities), mouth logits (n, 3) and background logits (n, 5)."""
        y = self.net(F.avg_pool2d(image, image.shape[-1] // 32) - 0.5)
        b, k = len(BINARY), len(ATTRIBUTES)
        return torch.cat([y[:, :b].sigmoid(), y[:, b:k]], 1), y[:, k : k + len(MOUTHS)], y[:, k + len(MOUTHS) :]

    @torch.no_grad()
    def read(self, image: Tensor, chunk: int = 256) -> Tensor:
        """Predict the attributes (n, 9) of images (n, 3, 64, 64) in [0, 1]."""
        return torch.cat([self(part)[0] for part in image.split(chunk)])


@cache
def load_judge() -> Judge:
    """Load the attribute classifier that ships with lab:faces. Raises NotFound if the file is missing."""
    from safetensors.torch import load_file

    if not JUDGE.is_file():
        raise NotFound(f"{JUDGE} is missing. Make it: python -m training.lab.face_diffusion lab {JUDGE.parent}")
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(JUDGE).items()}, strict=False)
    return judge.eval().requires_grad_(False)


def balanced(read: Tensor, people: Tensor) -> dict[str, float]:
    """Score predicted against true attributes, both (n, 9): balanced accuracy if binary, R2 if continuous."""
    out = {}
    for i, name in enumerate(ATTRIBUTES):
        p, z = read[:, i], people[:, i]
        if name in BINARY:
            yes, said = z > 0.5, p > 0.5
            out[name] = float((said[yes].float().mean() + (~said[~yes]).float().mean()) / 2)
        else:
            out[name] = float(1 - (p - z).square().mean() / z.var(unbiased=False))
    return out


def sheet(image: Tensor, columns: int, zoom: int = 1):  # type: ignore[no-untyped-def]
    """Arrange n images (n, 3, h, w) into one PIL image with rows of `columns`; incomplete rows are dropped."""
    from PIL import Image

    n, h, w = len(image) // columns, image.shape[-2], image.shape[-1]
    grid = image[: n * columns].reshape(n, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(n * h, columns * w, 3)
    out = Image.fromarray((grid.clamp(0, 1) * 255).round().byte().numpy())
    return out.resize((out.width * zoom, out.height * zoom), 0) if zoom > 1 else out


if __name__ == "__main__":
    seed = Generator().manual_seed(3)
    sheet(pictures(identities(8, seed).repeat_interleave(12, 0), seed).image, 12).save(Path(sys.argv[1]))
