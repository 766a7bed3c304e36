"""Vectors as OpenAI's API answers them: unit length, shortened where that is asked for, as numbers or as base64."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as nnf
from torch import Tensor

from registry.errors import Invalid


def numbers(x: Tensor, encoding: str) -> Any:
    """A tensor as JSON numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(x.contiguous().numpy().astype("<f4").tobytes()).decode()
    return x.tolist()


def entries(states: Sequence[Tensor], dimensions: int | None, encoding: str) -> list[dict[str, Any]]:
    """What /v1/embeddings answers for states (D,): the first `dimensions` of each, normalised. Raises Invalid for more
    than there are."""
    out = []
    for i, x in enumerate(states):
        if dimensions is not None and dimensions > len(x):
            raise Invalid(f"dimensions={dimensions}: this model has {len(x)}.")
        unit = nnf.normalize(x.float().cpu()[:dimensions], dim=0)
        out.append({"object": "embedding", "index": i, "embedding": numbers(unit, encoding)})
    return out
