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


SHAPES = {
    "generate": Ask("/v1/completions", lambda: {"prompt": "a man walks", "max_tokens": 4, "temperature": 0}),
    "classify": Ask("/v1/classify", lambda: {"images": [picture()], "labels": ["cat", "dog"]}),
    "explain.features": Ask("/v1/explain/encode", lambda: {"image": picture()}),
    "explain.heads": Ask("/v1/explain/heads"),
    "explain.neurons": Ask("/v1/explain/neurons"),
}
"""shape -> request; a new shape says here how it is asked"""


def routed(services: tuple[str, ...]) -> str:
    """Of a system's shapes the one whose answers every arm gives, the base too."""
    return next(s for s in services if not s.startswith("explain."))
