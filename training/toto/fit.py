"""Fitting: tokenizer, language model, and the probe of the layer that is best on val, sealed as one checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from patches.evidence import write_evidence
from patches.families.base import load_base
from patches.families.video import base as checkpoints
from patches.families.video import convolved
from patches.families.video.convolved import Convolved
from patches.families.video.tokens import Codebook, TokenVideo
from registry import manifest
from registry.errors import ConfigError
from registry.manifest import Manifest
from training.tasks import motion
from training.toto import learn
from training.toto.clips import classes, labelled, unlabelled
from training.toto.config import Config
from training.toto.sizes import SIZES


def fit(config: Config, folder: Path) -> Manifest:
    """Train one checkpoint and its probe; sealed as a model."""
    base = load_base(config.base, "video")
    if (config.frames, config.image) != (base.model.frames, base.model.size):
        raise ConfigError(
            f"{config.base} reads {base.model.frames} frames of {base.model.size} px; this recipe has {config.frames}, "
            f"of {config.image}. Name another base."
        )
    if base.model.head is not None and base.model.classes != classes(config):
        raise ConfigError(
            f"{config.base} knows {len(base.model.classes)} classes, the clips have {len(classes(config))} others. "
            "Name a base of these, or one without a head."
        )
    model, log = made(config)
    checkpoints.save(model, folder, torch.float16 if config.half else torch.float32)
    write_evidence(folder, log)
    plain = {k: v for k, v in asdict(config).items() if k != "device"}
    return manifest.write(folder, kind="model", system="toto", base=base.label, config=plain)


def tokenizer(config: Config, video: Tensor) -> Codebook | Convolved:
    """The tokenizer that the recipe names, or k-means over patches of clips (n, T, 3, R, R). Raises ConfigError if the
    recipe's pictures do not divide into its cells."""
    if not config.tokenizer:
        return learn.tokenizer(video[:1024], config.codes, config.patch, config.shrink, config.residual, config.seed)
    found = convolved.read(Path(config.tokenizer).expanduser())
    if config.image % found.cell:
        raise ConfigError(f"image={config.image} is no multiple of the tokenizer's cells of {found.cell} px.")
    return found


def made(config: Config, trained: bool = True) -> tuple[TokenVideo, dict[str, Any]]:
    """The checkpoint of a config, or the same network before training; both with a probe of the layer best on val. And
    a log: loss while training, accuracy on val by layer."""
    if config.size not in SIZES:
        raise ConfigError(f"size={config.size!r:.30} must be one of {', '.join(SIZES)}.")
    log: dict[str, Any] = {"val": []}
    video = unlabelled(config)
    codebook = tokenizer(config, video)
    model = learn.new(SIZES[config.size], codebook, config.frames, config.image, config.seed)
    if trained:
        g = Generator().manual_seed(config.seed)
        ids = learn.tokenise(video, codebook)
        stills = learn.tokenise_pictures(video, codebook, config.frames, g)
        plan = learn.Plan(
            config.steps, config.batch, config.peak, pictures=config.pictures, seed=config.seed, bf16=config.bf16
        )
        done = learn.fit(model.to(config.device), ids, stills, plan)
        log |= {k: done[k] for k in ("clips", "tokens", "body", "flops", "loss")}
    model = model.eval()
    model.classes = classes(config)
    seen, val = labelled(config, "train", config.labels), labelled(config, "val", config.val_clips)
    best = -1.0
    for layer, (x, y) in enumerate(learn.by_layer(model, seen.video, val.video)):
        if layer == 0:
            continue
        probe = motion.probe(x, seen.label, "attention", config.probe_steps, config.seed, len(model.classes))
        right = float((motion.answers(probe, y) == val.label).float().mean())
        log["val"].append(round(right, 4))
        if right > best:
            best, model.probe, model.probe_layer = right, probe, layer
    return model.cpu(), log
