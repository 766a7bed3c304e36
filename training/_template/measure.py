"""Measuring: what text of each kind costs the model."""

from __future__ import annotations

import torch

from patches.subject import Subject
from registry.measure import Measure
from training._template.config import Config
from training._template.find import documents
from training.tasks.intervals import perplexity

BETTER = {"prose": "lower", "code": "higher"}


@torch.inference_mode()
def costs(model: Subject, config: Config, arm: str | None, split: str) -> dict[str, Measure]:
    """Kind of text -> perplexity, with an interval over documents."""
    out = {}
    for source, better in BETTER.items():
        parts = []
        for ids in documents(model.base, config, source, split):
            x = ids[None].to(model.base.device)
            logits = model(rows=[arm], input_ids=x, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum")
            parts.append((float(loss), len(ids) - 1))
        got = perplexity(parts)
        out[source] = Measure(got.value, got.low, got.high, got.n, "higher" if better == "higher" else "lower")
    return out


def evaluate(model: Subject, config: Config, arm: str | None) -> dict[str, Measure]:
    """Perplexity on test: what should rise, and what should stay. The same names for every arm."""
    got = costs(model, config, arm, "test")
    return {"target/perplexity_code": got["code"], "quality/perplexity_prose": got["prose"]}
