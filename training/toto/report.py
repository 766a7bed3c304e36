"""The full report: both controls, the probe of every layer, tracking by layer against copying the mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from patches.families.video import base as checkpoints
from patches.families.video.tokens import TokenVideo
from training.tasks import motion
from training.tasks.intervals import mean, share
from training.tasks.tracking import each, tracks
from training.toto import learn
from training.toto.config import Config


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Beside the sealed checkpoint: controls, the probe of every layer, tracking by layer against copying the mask."""
    model = checkpoints.read(folder)
    assert isinstance(model, TokenVideo)
    test = motion.clips("test", config.test_clips, 10, config.frames, config.image)
    seen = motion.clips("train", config.labels, 20, config.frames, config.image)
    controls: dict[str, Any] = {}
    probes: dict[str, Any] = {}
    for see in (motion.differences, motion.middle):
        controls[see.__name__] = share(motion.control(see, seen, test, 600 if config.labels > 100 else 20)[0])
    x, y = (learn.features(model, learn.tokenise(c.video, model.codebook)) for c in (seen, test))
    for layer in range(model.depth + 1):
        probe = motion.probe(x[layer], seen.label, "attention", config.probe_steps, config.seed)
        probes[f"layer {layer}"] = share(motion.answers(probe, y[layer]) == test.label)
    moving = test[(test.label != 0).nonzero()[: config.tracked_clips, 0]]
    with torch.no_grad():
        states = model.states(moving.video)
    found = {"copy the mask": moving.mask[:, :1].long().expand_as(moving.mask)}
    found |= {f"layer {i}": tracks(s, moving.mask, model.grid) for i, s in enumerate(states)}
    tracking = {k: mean([(j + f) / 2 for j, f in each(v, moving.mask) if j == j]) for k, v in found.items()}
    return {"controls": controls, "probes": probes, "tracking": tracking}
