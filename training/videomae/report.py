"""The full report: the sealed checkpoint on test beside both controls and the same fine-tuning from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.families.video import base as checkpoints
from registry.errors import ConfigError
from training.data.video import ucf101_p
from training.lab.video import actions
from training.lab.video.corruptions import CORRUPTIONS, corrupt
from training.tasks import motion
from training.tasks.intervals import share
from training.videomae.config import SCRATCH, Config
from training.videomae.fit import at_once, classes, labelled, made, sampling


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Accuracy on test: a CNN on frame differences (positive control) and on the middle frame (negative), the same
    network fine-tuned from scratch, and the checkpoint; then the checkpoint under each corruption: the lab's, or those
    of UCF101-P in `damaged`."""
    test, seen = labelled(config, "test", config.test_clips), labelled(config, "train", config.labels)
    table: dict[str, Any] = {}
    for see in (motion.differences, motion.middle):
        steps = 600 if config.labels > 100 else 20
        right, _ = motion.control(see, seen, test, steps, config.seed, len(classes(config)))
        table[f"control: {see.__name__}"] = share(right)
    scratch = made(replace(config, stage=SCRATCH))
    model = checkpoints.read(folder).eval()
    for name, one in (("from scratch", scratch), ("checkpoint", model)):
        table[name] = share(_said(one, test.video) == test.label)
    some = test[: max(22, config.test_clips // 4)]
    worse = {kind: share(_said(model, video) == label) for kind, video, label in damaged(config, some)}
    return {"accuracy": table, "corrupted": {"clean": share(_said(model, some.video) == some.label), **worse}}


def damaged(config: Config, some: actions.Clips) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each corruption's name with its clips (n, T, 3, R, R) and their labels."""
    if not config.damaged:
        for kind in CORRUPTIONS:
            yield kind, corrupt(some.video, kind), some.label
        return
    known = classes(config)
    for place in sorted(Path(config.damaged).iterdir()):
        if place.is_dir():
            data = ucf101_p(config.damaged, place.name, sampling=sampling(config))
            if odd := [c for c in data.classes if c not in known]:
                raise ConfigError(f"{place} has the class {odd[0]!r:.40}, which the checkpoint does not know.")
            batch = data.read(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: len(some)])
            yield place.name, batch.image, torch.tensor([known.index(data.classes[i]) for i in batch.label.tolist()])


@torch.no_grad()
def _said(model: Any, video: Tensor) -> Tensor:
    return torch.cat([model(clips=part)["scores"] for part in video.split(at_once(model))]).argmax(1)
