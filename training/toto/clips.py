"""The clips of a run: the lab's, or real ones in their true layouts; and masks to track, the lab's or DAVIS'."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from patches.families.video.decode import cropped
from training.data.video import Sampling, davis, held, source
from training.lab.video import actions
from training.tasks import motion
from training.toto import learn
from training.toto.config import Config

_held = lru_cache(4)(held)


def unlabelled(config: Config) -> Tensor:
    """(n, T, 3, R, R) uint8 to train on."""
    if config.data:
        return held(config.data, "train", config.pool, sampling(config))[0]
    return learn.pool(config.pool, config.frames, config.image)


def labelled(config: Config, split: str, n: int) -> actions.Clips:
    """Labelled clips of a split; masks are the lab's alone."""
    if config.data:
        video, label, _ = _held(config.data, split, n, sampling(config))
        return actions.Clips(video, label, torch.zeros(len(label), 1, 1, 1, dtype=torch.uint8))
    return motion.clips(split, n, {"train": 20, "val": 7, "test": 10}[split], config.frames, config.image)


def classes(config: Config) -> tuple[str, ...]:
    """What the labels mean."""
    return source(config.data, "train").classes if config.data else motion.CLASSES


def moving(config: Config) -> actions.Clips:
    """Clips of test in which something moves: of real ones, all."""
    test = labelled(config, "test", config.test_clips)
    return test[: config.tracked_clips] if config.data else test[(test.label != 0).nonzero()[: config.tracked_clips, 0]]


def sampling(config: Config) -> Sampling:
    """Which frames of a real clip are seen."""
    return Sampling(config.frames, config.stride, config.image)


def tracked_clips(config: Config, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips to follow things through, (T', 3, R, R) uint8 with masks (T', R, R): of DAVIS' val every frame, its middle
    square at the model's size; of the lab as many frames as the model has."""
    if not config.davis:
        clips = moving(config)
        yield from zip(clips.video, clips.mask, strict=True)
        return
    for read in davis(config.davis, size=model.size):
        clip = read()
        h, w = clip.mask.shape[-2:]
        y, x = (h - model.size) // 2, (w - model.size) // 2
        mask = clip.mask[:, y : y + model.size, x : x + model.size]
        yield cropped(clip.video, model.size), mask
