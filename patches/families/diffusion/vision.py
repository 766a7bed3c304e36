"""The image encoder of a pipeline that is told an image embedding: CLIP's vision tower with its preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.families.diffusion.layout import component

Look = Mapping[str, Any]
"""what an encoder sees of a picture: `size`, `mean`, `std`"""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read_encoder(folder: Path) -> Any:
    """The CLIPVisionModelWithProjection in `folder`, in float32. Raises NotFound if it lacks config or safetensors."""
    from transformers import CLIPVisionModelWithProjection

    return component(CLIPVisionModelWithProjection, folder)


def look_of(encoder: Any, file: Path | None = None) -> Look:
    """The preprocessing that `file` (a preprocessor_config.json) tells; without one CLIP's own at the encoder's
    size."""
    if file is None or not file.is_file():
        return {"size": int(encoder.config.image_size), "mean": MEAN, "std": STD}
    about = json.loads(file.read_text())
    size = about.get("crop_size", about.get("size"))
    size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    return {"size": int(str(size)), "mean": tuple(about["image_mean"]), "std": tuple(about["image_std"])}


def told(look: Look) -> dict[str, Any]:
    """A look as JSON has it, for a base's digest."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in look.items()}


@torch.no_grad()
def embed(encoder: Any, look: Look, pictures: Tensor) -> Tensor:
    """(B, k) embeddings, not normalised, of pictures (B, 3, H, W) in 0..1: resized, cut around the centre."""
    size = int(look["size"])
    scale = size / min(pictures.shape[-2:])
    wide = [round(n * scale) for n in pictures.shape[-2:]]
    x = F.interpolate(pictures, size=wide, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (wide[0] - size) // 2, (wide[1] - size) // 2
    x = x[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(look[k])[:, None, None] for k in ("mean", "std"))
    x = ((x - mean.to(x)) / std.to(x)).to(encoder.device, encoder.dtype)
    e: Tensor = encoder(x).image_embeds.float().cpu()
    return e


@torch.no_grad()
def embed_nothing(encoder: Any, look: Look) -> Tensor:
    """(k,) the embedding of an all-zero input, which is no picture."""
    size = int(look["size"])
    zero = torch.zeros(1, 3, size, size, device=encoder.device, dtype=encoder.dtype)
    e: Tensor = encoder(zero).image_embeds[0].float().cpu()
    return e
