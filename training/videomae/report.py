"""The full report: the sealed checkpoint on test beside both controls and the same fine-tuning from scratch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patches.families.video import base as checkpoints
from training.tasks import motion
from training.tasks.intervals import share
from training.videomae.config import SCRATCH, Config
from training.videomae.fit import labelled, made


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Accuracy on test: a CNN on frame differences (positive control) and on the middle frame (negative), the same
    network fine-tuned from scratch, and the checkpoint; then the checkpoint under each corruption."""
    from training.lab.video.corruptions import CORRUPTIONS, corrupt

    test, seen = labelled(config, "test", config.test_clips), labelled(config, "train", config.labels)
    table: dict[str, Any] = {}
    for see in (motion.differences, motion.middle):
        right, _ = motion.control(see, seen, test, steps=600 if config.labels > 100 else 20)
        table[f"control: {see.__name__}"] = share(right)
    scratch = made(replace(config, stage=SCRATCH))
    model = checkpoints.read(folder).eval()
    for name, one in (("from scratch", scratch), ("checkpoint", model)):
        table[name] = share(_said(one, test.video) == test.label)
    some = test[: max(22, config.test_clips // 4)]
    worse = {kind: share(_said(model, corrupt(some.video, kind)) == some.label) for kind in CORRUPTIONS}
    return {"accuracy": table, "corrupted": {"clean": share(_said(model, some.video) == some.label), **worse}}


@torch.no_grad()
def _said(model: Any, video: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(clips=part)["scores"] for part in video.split(100)]).argmax(1)
