"""Fitting: a direction per layer from train, the layer chosen on val, sealed with a control of equal size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches import artifact
from patches.evidence import write_evidence
from patches.families import llm
from patches.families.base import load_base
from patches.subject import Subject
from registry.manifest import Manifest
from training._template.config import Config
from training._template.find import direction
from training._template.measure import costs
from training._template.mechanism import DirectionConfig, WithoutDirection
from training.choose import Offer, best, worth


def fit(config: Config, folder: Path) -> Manifest:
    """Take the direction out of each candidate layer, keep the best on val, seal it with what was tried."""
    base = load_base(config.base, "llm", config.device)
    patches = {f"layer {n}": without(n, direction(base, config, n)) for n in config.layers}
    model = Subject(base, patches)
    plain = costs(model, config, None, "val")
    offers = [offer(name, costs(model, config, name, "val"), plain, config) for name in patches]
    model.close()
    chosen = best(offers)
    found = {"base": values(plain), "candidates": [o.row for o in offers], "chosen": chosen.row}
    write_evidence(folder, found)
    return artifact.save(patches[chosen.what], "_template", folder, base=base.label)


def without(layer: int, d: Tensor) -> WithoutDirection:
    """The patch that takes d (D,) out of a layer."""
    return WithoutDirection(DirectionConfig(llm.site("block", layer)), {"direction": d})


def control(patch: WithoutDirection, seed: int) -> WithoutDirection:
    """The same edit of a random direction."""
    drawn = torch.randn(patch.tensors["direction"].shape, generator=torch.Generator().manual_seed(seed))
    d = torch.nn.functional.normalize(drawn, dim=0).to(patch.tensors["direction"])
    return WithoutDirection(patch.config, {"direction": d})


def offer(name: str, got: Any, plain: Any, config: Config) -> Offer[str]:
    """A candidate by its perplexity on code, if prose stays within the bound."""
    value = worth(got["code"].value, -got["prose"].value, -config.bound * plain["prose"].value)
    return Offer(name, {"name": name, **values(got), "worth": value}, -got["prose"].value)


def values(got: Any) -> dict[str, float]:
    """Measures without their intervals."""
    return {k: m.value for k, m in got.items()}
