"""One request per shape of API: how tests ask a service of any system, by the shapes its row names."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image


@dataclass(frozen=True)
class Ask:
    """A request that every system with this shape must answer."""

    path: str
    body: Callable[[], dict[str, Any]] | None = None
    """None: it is a GET"""


def picture(seed: int = 0, size: int = 32) -> dict[str, str]:
    """A noisy PNG as requests carry it."""
    noise = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).save(file, "PNG")
    return {"data": base64.b64encode(file.getvalue()).decode()}


def film(frames: int = 8, size: int = 16) -> dict[str, str]:
    """An animated GIF of a square that moves, as requests carry it."""
    pictures = []
    for t in range(frames):
        one = Image.new("RGB", (size, size), (230, 220, 200))
        one.paste((190, 40, 60), (1 + t % 8, 4, 7 + t % 8, 11))
        pictures.append(one)
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=80)
    return {"data": base64.b64encode(file.getvalue()).decode()}


SHAPES = {
    "generate": Ask("/v1/completions", lambda: {"prompt": "a man walks", "max_tokens": 4, "temperature": 0}),
    "caption": Ask(
        "/v1/captions", lambda: {"image": picture()["data"], "budget": {"steps": 1, "ask": 2, "lines": 38}, "wait": 60}
    ),
    "classify": Ask("/v1/classify", lambda: {"images": [picture()], "labels": ["cat", "dog"]}),
    "embed": Ask("/v1/video", lambda: {"clips": [film()], "wants": ["scores", "features", "surprise"]}),
    "embeddings": Ask("/v1/embeddings", lambda: {"input": [f"data:image/png;base64,{picture()['data']}"]}),
    "render": Ask("/v1/images/generations", lambda: {"prompt": "a cat", "patchbay": {"steps": 2, "seed": 1}}),
    "explain.features": Ask("/v1/explain/encode", lambda: {"image": picture()}),
    "explain.heads": Ask("/v1/explain/heads"),
    "explain.neurons": Ask("/v1/explain/neurons"),
}
"""shape -> request; a new shape says here how it is asked"""


def routed(services: tuple[str, ...]) -> str:
    """Of a system's shapes the one whose answers every arm gives, the base too."""
    return next(s for s in services if not s.startswith("explain."))
