"""Measuring: the probe, next-token loss, rollouts against copying, tracking, on clips of test."""

from __future__ import annotations

import torch

from patches.families.video.tokens import TokenVideo
from patches.subject import Subject
from registry.measure import Measure
from training.tasks import motion
from training.tasks.intervals import mean, share
from training.tasks.tracking import tracked
from training.toto.clips import classes, labelled, moving, tracked_clips
from training.toto.config import Config


@torch.no_grad()
def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, Measure]:
    """`target/probe` accuracy (a checkpoint without a probe is probed here, at its middle layer); `quality/nll` nats a
    token of later frames, and of the first; `target/next_frame`: how much less squared error the expected next frame
    has than copying the last one, as a share of the copy's; `target/track` the mean of J and F by the middle layer's
    features, where masks are known."""
    base = subject.alone(arm)
    model, device = base.model, base.device
    assert isinstance(model, TokenVideo)
    test, size = labelled(config, "test", config.test_clips), max(1, 12_800 // (model.frames * model.per_frame))
    probe, layer = model.probe, model.probe_layer
    if probe is None:
        seen, layer = labelled(config, "train", config.labels), model.depth // 2
        x = torch.cat([model.features(part.to(device), layer).cpu() for part in seen.video.split(size)])
        with torch.enable_grad():
            probe = motion.probe(x, seen.label, "attention", config.probe_steps, config.seed, len(classes(config)))
        probe = probe.to(device)
    said = torch.cat([probe(model.features(part.to(device), layer)).argmax(1).cpu() for part in test.video.split(size)])
    surprise = torch.cat([model.surprise(part.to(device)).cpu() for part in test.video[:330].split(size)])
    clips = moving(config)
    given = model.frames // 2
    # only the first new frame is drawn
    made = next(model.roll(clips.video.to(device), given, expected=True))[0].cpu()
    true = clips.video.float() / 255
    off = (made - true[:, given]).square().mean((1, 2, 3))
    copy = (true[:, given - 1] - true[:, given]).square().mean((1, 2, 3))
    out = {
        "target/probe": share(said == test.label),
        "quality/nll_first_frame": mean(surprise[:, 0], "lower"),
        "quality/nll_later_frames": mean(surprise[:, 1:].mean(1), "lower"),
        "target/next_frame": mean((copy - off) / copy.mean()),
    }
    if not config.data or config.davis:
        layer = model.depth // 2
        out["target/track"] = tracked(model, tracked_clips(config, model), [layer])[f"layer {layer}"]
    return out
