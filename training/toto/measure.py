"""Measuring: the probe, next-token loss, rollouts against copying, tracking, on clips of test."""

from __future__ import annotations

import torch

from patches.families.video.tokens import TokenVideo
from patches.subject import Subject
from registry.measure import Measure
from training.tasks import motion
from training.tasks.intervals import mean, share
from training.tasks.tracking import each, tracks
from training.toto.config import Config


@torch.no_grad()
def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, Measure]:
    """`target/probe` accuracy; `quality/nll` nats a token of later frames, and of the first; `target/next_frame`: how
    much less squared error the next frame has than copying the last one, as a share of the copy's; `target/track` the
    mean of J and F by the middle layer's features."""
    base = subject.alone(arm)
    model, device = base.model, base.device
    assert isinstance(model, TokenVideo)
    test = motion.clips("test", config.test_clips, 10, config.frames, config.image)
    said = torch.cat([model(clips=part.to(device))["scores"].argmax(1).cpu() for part in test.video.split(100)])
    surprise = torch.cat([model.surprise(part.to(device)).cpu() for part in test.video[:330].split(100)])
    moving = test[(test.label != 0).nonzero()[: config.tracked_clips, 0]]
    given = model.frames // 2
    made = model.rollout(moving.video.to(device), given)[0].cpu()
    true = moving.video.float() / 255
    off = (made - true)[:, given].square().mean((1, 2, 3))
    copy = (true[:, given - 1] - true[:, given]).square().mean((1, 2, 3))
    states = model.states(moving.video.to(device))[model.depth // 2].cpu()
    found = each(tracks(states, moving.mask, model.grid), moving.mask)
    return {
        "target/probe": share(said == test.label),
        "quality/nll_first_frame": mean(surprise[:, 0], "lower"),
        "quality/nll_later_frames": mean(surprise[:, 1:].mean(1), "lower"),
        "target/next_frame": mean((copy - off) / copy.mean()),
        "target/track": mean([(j + f) / 2 for j, f in found if j == j]),
    }
