"""Measuring: accuracy of the fine-tuned and of the probed checkpoint, and what its decoder restores."""

from __future__ import annotations

import torch

from patches.families.video.model import MaskedVideo
from patches.subject import Subject
from registry.measure import Measure
from training.tasks.intervals import mean, share
from training.videomae.config import Config
from training.videomae.fit import labelled


@torch.no_grad()
def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, Measure]:
    """On clips of test: `target/accuracy` of the head that serves (the fine-tuned copy, else the probe),
    `target/probe`, and `quality/restored`: 1 - (squared error of hidden pixels over that of guessing that nothing
    moves), per clip; a clip in which nothing moves is left out."""
    base = subject.alone(arm)
    model, device = base.model, base.device
    assert isinstance(model, MaskedVideo)
    test = labelled(config, "test", config.test_clips)
    scores, probed = [], []
    for part in test.video.split(100):
        out = model(clips=part.to(device))
        scores.append(out["scores"].argmax(1).cpu())
        assert model.probe is not None
        probed.append(model.probe(out["states"][model.probe_layer]).argmax(1).cpu())
    moving = test.video[test.label != 0][:200]
    _, hidden, off = (x.cpu() for x in model.reconstruct(moving.to(device), config.ratio, config.mask))
    away = (moving.float() - moving.float().mean(1, keepdim=True)) / 255
    nothing = (away.square().mean(2) * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)).clamp_min(1)
    return {
        "target/accuracy": share(torch.cat(scores) == test.label),
        "target/probe": share(torch.cat(probed) == test.label),
        "quality/restored": mean((nothing - off) / nothing.mean()),
    }
