"""Fitting: pre-train on a stage, probe the frozen encoder, fine-tune a copy, seal all three as one checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.evidence import write_evidence
from patches.families.base import load_base
from patches.families.video import base as checkpoints
from patches.families.video.model import MaskedVideo
from registry import manifest
from registry.errors import ConfigError
from registry.home import home
from registry.manifest import Manifest
from training.lab.video import actions, stages
from training.tasks import motion
from training.tasks.intervals import wilson
from training.videomae.config import NATURAL, SCRATCH, Config, plan_of
from training.videomae.pretraining import new, pretrain
from training.videomae.tuning import Classifier, features, finetune


def fit(config: Config, folder: Path) -> Manifest:
    """Pre-train, probe and fine-tune one checkpoint; sealed as a model. Killed, it goes on when it is fitted again."""
    base = load_base(config.base, "video")
    want = config.size.frames, config.size.image, motion.CLASSES
    if (base.model.frames, base.model.size, base.model.classes) != want:
        raise ConfigError(
            f"{config.base} reads {base.model.frames} frames of {base.model.size} px, {len(base.model.classes)} "
            f"classes; this recipe has {want[0]}, {want[1]} and {len(want[2])}. Name another base."
        )
    place = home() / "resume" / f"videomae-{manifest.digest_of(asdict(config))[:16]}"
    model = made(config, place)
    checkpoints.save(model, folder, torch.float16 if config.half else torch.float32)
    again = checkpoints.read(folder).eval()
    assert isinstance(again, MaskedVideo)
    write_evidence(folder, chosen(again, config))
    shutil.rmtree(place, ignore_errors=True)
    plain = {k: v for k, v in asdict(config).items() if k != "device"}
    return manifest.write(folder, kind="model", system="videomae", base=base.label, config=plain)


@torch.no_grad()
def chosen(model: MaskedVideo, config: Config) -> dict[str, Any]:
    """What is sealed beside the weights: where they come from, and accuracy on val, as they lie on disk."""
    val = labelled(config, "val", config.val_clips)
    said = torch.cat([model(clips=part)["scores"] for part in val.video.split(100)]).argmax(1)
    return {"stage": config.stage, "clips": config.steps * config.batch, "val": wilson(said == val.label)}


def made(config: Config, resume: Path | None = None) -> MaskedVideo:
    """The checkpoint of a config: pre-trained (going on from what lies in `resume`), probed and fine-tuned."""
    torch.manual_seed(config.seed)
    size = config.size
    if config.stage == SCRATCH:
        net = new(size, config.seed)
    else:
        net, _ = pretrain(unlabelled(config), size, plan_of(config), resume, config.device)
    seen = labelled(config, "train", config.labels)
    net = net.cpu()
    x = features(net, seen.video, config.still)[-1]
    probe = motion.probe(x, seen.label, "attention", config.probe_steps, config.seed)
    tuned = finetune(
        None if config.stage == SCRATCH else net.videomae, size, seen, config.still, config.tune_steps, 16,
        config.tune_peak, config.layer_decay, config.seed,
    ).model  # fmt: skip
    assert isinstance(tuned, Classifier)
    return MaskedVideo(net, motion.CLASSES, probe, size.depth, tuned.net, config.still).eval()


def unlabelled(config: Config) -> Tensor:
    """The clips (n, T, 3, R, R) to pre-train on."""
    s = config.size
    if config.stage == NATURAL and config.data:
        from training.data.video import Sampling, ucf101

        data = ucf101(config.data, "train", 1, Sampling(s.frames, 4, s.image))
        return torch.cat([b.image for b in data.batches(32)])[: config.pool]
    if config.stage == NATURAL:
        return actions.draw("train", config.pool, 30 + config.seed, s.frames, s.image).video
    return stages.draw(config.stage, config.pool, config.seed, s.frames, s.image)


def labelled(config: Config, split: str, n: int) -> actions.Clips:
    """Labelled clips of a split: seed 20 of train is what probes and fine-tuning see, 10 of test what is reported."""
    seed = {"train": 20, "val": 7, "test": 10}[split]
    return motion.clips(split, n, seed, config.size.frames, config.size.image)
