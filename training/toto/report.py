"""The full report: both controls, the probe of every layer, tracking by layer against copying the mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patches.families.video import base as checkpoints
from patches.families.video.tokens import TokenVideo
from training.tasks import motion
from training.tasks.intervals import share
from training.tasks.tracking import tracked
from training.toto import learn
from training.toto.clips import classes, labelled, tracked_clips
from training.toto.config import Config


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Beside the sealed checkpoint: controls, the probe of every layer, tracking by layer against copying the mask."""
    model = checkpoints.read(folder)
    assert isinstance(model, TokenVideo)
    test, seen = labelled(config, "test", config.test_clips), labelled(config, "train", config.labels)
    controls: dict[str, Any] = {}
    probes: dict[str, Any] = {}
    known = len(classes(config))
    for see in (motion.differences, motion.middle):
        steps = 600 if config.labels > 100 else 20
        controls[see.__name__] = share(motion.control(see, seen, test, steps, config.seed, known)[0])
    for layer, (x, y) in enumerate(learn.by_layer(model, seen.video, test.video)):
        probe = motion.probe(x, seen.label, "attention", config.probe_steps, config.seed, known)
        probes[f"layer {layer}"] = share(motion.answers(probe, y) == test.label)
    out = {"controls": controls, "probes": probes}
    if config.data and not config.davis:
        return out
    return {**out, "tracking": tracked(model, tracked_clips(config, model), range(model.depth + 1))}
