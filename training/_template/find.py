"""Finding the direction: from the mean activation on prose to the mean activation on code."""

from __future__ import annotations

import torch
from torch import Tensor

from patches.engine.read import record
from patches.families import llm
from patches.families.base import Base
from training._template.config import Config
from training.data import text

SPLITS = ("train", "val", "test")


def documents(base: Base, config: Config, source: str, split: str) -> list[Tensor]:
    """Token ids (T,) of texts of one kind; no document is in two splits."""
    skip = SPLITS.index(split) * config.documents
    return text.documents(source, base.processor, config.documents, config.tokens, skip=skip)


@torch.inference_mode()
def direction(base: Base, config: Config, layer: int) -> Tensor:
    """(D,) of unit norm: the mean after `layer` over tokens of code, less that over tokens of prose, on train."""
    site = llm.site("block", layer)
    means = []
    for source in ("code", "prose"):
        with record(base.model, [site], keep=lambda x: x[0].float().cpu()) as acts:
            for ids in documents(base, config, source, "train"):
                base.model(input_ids=ids[None].to(base.device), use_cache=False)
        means.append(torch.cat(acts[site]).mean(0))
    return torch.nn.functional.normalize(means[0] - means[1], dim=0)
