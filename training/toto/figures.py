"""Figures of a sealed checkpoint: loss by frame, and rollouts beside what happened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patches.families.video import base as checkpoints
from patches.families.video.tokens import TokenVideo
from training.tasks import motion


def figures(folder: Path, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Loss by frame, and a rollout beside what happened."""
    from matplotlib.figure import Figure

    model = checkpoints.read(folder)
    assert isinstance(model, TokenVideo)
    clips = motion.clips("test", 44, 10, model.frames, model.size).video
    with torch.no_grad():
        off = model.surprise(clips).mean(0)
        made_, _ = model.rollout(clips[1:3], model.frames // 2)
    loss = Figure((4.5, 3))
    ax = loss.add_subplot()
    ax.bar(range(len(off)), off.tolist())
    ax.set_xlabel("frame")
    ax.set_ylabel("nats a token")
    film = Figure((model.frames, 4.2))
    for r, frames in enumerate([clips[1].float() / 255, made_[0], clips[2].float() / 255, made_[1]]):
        for t in range(model.frames):
            one = film.add_subplot(4, model.frames, r * model.frames + t + 1)
            one.imshow(frames[t].permute(1, 2, 0).numpy(), interpolation="nearest")
            one.axis("off")
    film.subplots_adjust(0, 0, 1, 1, 0.03, 0.03)
    del results
    return {"loss_by_frame": loss, "rollout": film}
