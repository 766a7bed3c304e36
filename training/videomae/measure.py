"""Measuring: accuracy of the fine-tuned and of the probed checkpoint, and what its decoder restores."""

from __future__ import annotations

import torch

from patches.families.video.model import MaskedVideo
from patches.subject import Subject
from registry.measure import Measure
from training.tasks import motion
from training.tasks.intervals import mean, share
from training.videomae.config import Config
from training.videomae.fit import at_once, classes, labelled
from training.videomae.tuning import last


@torch.no_grad()
def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, Measure]:
    """On clips of test: `target/accuracy` of the head that serves (the fine-tuned copy, else the probe),
    `target/probe` (a checkpoint without one is probed here, on the recipe's labelled clips), and `quality/restored`:
    1 - (squared error of hidden pixels over that of guessing that nothing moves), per clip; a clip in which nothing
    moves is left out."""
    base = subject.alone(arm)
    model, device = base.model, base.device
    assert isinstance(model, MaskedVideo)
    test = labelled(config, "test", config.test_clips)
    probe, layer = model.probe, model.probe_layer
    if probe is None:
        seen, layer = labelled(config, "train", config.labels), model.depth
        x = last(model.net, seen.video, model.still)
        with torch.enable_grad():
            probe = motion.probe(x, seen.label, "attention", config.probe_steps, config.seed, len(classes(config)))
        probe = probe.to(device)
    scores, probed = [], []
    for part in test.video.split(at_once(model)):
        out = model(clips=part.to(device))
        probed.append(probe(out["states"][layer]).argmax(1).cpu())
        scores.append(probed[-1] if out["scores"] is None else out["scores"].argmax(1).cpu())
    moving = (test.video if config.data else test.video[test.label != 0])[:200]
    parts = [model.reconstruct(part.to(device), config.ratio, config.mask) for part in moving.split(at_once(model))]
    hidden, off = (torch.cat([part[i].cpu() for part in parts]) for i in (1, 2))
    away = (moving.float() - moving.float().mean(1, keepdim=True)) / 255
    nothing = (away.square().mean(2) * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)).clamp_min(1)
    return {
        "target/accuracy": share(torch.cat(scores) == test.label),
        "target/probe": share(torch.cat(probed) == test.label),
        "quality/restored": mean((nothing - off) / nothing.mean()),
    }
