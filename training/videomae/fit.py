"""Fitting: pre-train on a stage, probe the frozen encoder, fine-tune a copy, seal all three as one checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from patches.evidence import write_evidence
from patches.families.base import load_base
from patches.families.video import base as checkpoints
from patches.families.video.model import MaskedVideo
from registry import manifest
from registry.errors import ConfigError, Failed
from registry.home import home
from registry.manifest import Manifest
from training.data.video import Sampling, held, source
from training.lab.video import actions, stages
from training.tasks import motion
from training.tasks.intervals import wilson
from training.videomae.config import NATURAL, SCRATCH, Config, plan_of
from training.videomae.pretraining import new, pretrain
from training.videomae.tuning import Classifier, finetune, last


def fit(config: Config, folder: Path) -> Manifest:
    """Pre-train, probe and fine-tune one checkpoint; sealed as a model. Killed, it goes on when it is fitted again."""
    base = load_base(config.base, "video")
    want = config.size.frames, config.size.image
    if (base.model.frames, base.model.size) != want:
        raise ConfigError(
            f"{config.base} reads {base.model.frames} frames of {base.model.size} px; this recipe has {want[0]}, of "
            f"{want[1]}. Name another base."
        )
    known = classes(config)
    if base.model.head is not None and base.model.classes != known:
        raise ConfigError(
            f"{config.base} knows {len(base.model.classes)} classes ({', '.join(base.model.classes)[:60]}), the clips "
            f"have {len(known)} ({', '.join(known)[:60]}). Name a base of these, or one without a head."
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
    said = torch.cat([model(clips=part)["scores"] for part in val.video.split(at_once(model))]).argmax(1)
    return {"stage": config.stage, "clips": config.steps * config.batch, "val": wilson(said == val.label)}


def made(config: Config, resume: Path | None = None) -> MaskedVideo:
    """The checkpoint of a config: pre-trained (going on from what lies in `resume`), probed and fine-tuned."""
    torch.manual_seed(config.seed)
    size = config.size
    if config.stage == SCRATCH:
        net = new(size, config.seed).to(config.device)
    elif config.processes > 1:
        net = together(config, unlabelled(config), resume)
    else:
        net, _ = pretrain(unlabelled(config), size, plan_of(config), resume, config.device)
    seen, known = labelled(config, "train", config.labels), classes(config)
    x = last(net, seen.video, config.still)
    net = net.cpu()
    probe = motion.probe(x, seen.label, "attention", config.probe_steps, config.seed, len(known))
    tuned = finetune(
        None if config.stage == SCRATCH else net.videomae, size, seen, config.still, config.tune_steps,
        config.tune_batch, config.tune_peak, config.layer_decay, config.seed, len(known), config.device, config.bf16,
    ).model  # fmt: skip
    assert isinstance(tuned, Classifier)
    return MaskedVideo(net, known, probe, size.depth, tuned.net.cpu(), config.still).eval()


def together(config: Config, pool: Tensor, folder: Path | None) -> Any:
    """Pre-train by `config.processes` processes, which share the pool as one file; the model, on the first's device.

    Raises Failed with the last that they said.
    """
    with tempfile.TemporaryDirectory() as part:
        place = Path(part)
        (place / "config.json").write_text(json.dumps(asdict(config)))
        np.save(place / "pool.npy", pool.numpy())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "training.videomae.several"]
        command.insert(4, f"--nproc_per_node={config.processes}")
        done = subprocess.run([*command, str(place), str(folder or "")], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"{config.processes} processes did not finish: {done.stderr.strip()[-300:]}")
        net = new(config.size, config.seed)
        net.load_state_dict(load_file(place / "net.safetensors"))
    return net.to(config.device).eval()


def unlabelled(config: Config) -> Tensor:
    """The clips (n, T, 3, R, R) to pre-train on."""
    s = config.size
    if config.stage == NATURAL and config.data:
        return held(config.data, "train", config.pool, sampling(config))[0]
    if config.stage == NATURAL:
        return actions.draw("train", config.pool, 30 + config.seed, s.frames, s.image).video
    return stages.draw(config.stage, config.pool, config.seed, s.frames, s.image)


def labelled(config: Config, split: str, n: int) -> actions.Clips:
    """Labelled clips of a split: seed 20 of train is what probes and fine-tuning see, 10 of test what is reported."""
    if config.data:
        video, label, _ = _held(config.data, split, n, sampling(config))
        return actions.Clips(video, label, torch.zeros(len(label), 1, 1, 1, dtype=torch.uint8))
    seed = {"train": 20, "val": 7, "test": 10}[split]
    return motion.clips(split, n, seed, config.size.frames, config.size.image)


_held = lru_cache(4)(held)


def sampling(config: Config) -> Sampling:
    """Which frames of a real clip are seen."""
    return Sampling(config.size.frames, config.stride, config.size.image)


def classes(config: Config) -> tuple[str, ...]:
    """What the labels mean."""
    return source(config.data, "train").classes if config.data else motion.CLASSES


def at_once(model: Any) -> int:
    """Clips of one forward: 100 of the lab's, 4 of ViT-B's."""
    return max(1, 6400 // (model.grid[0] * model.grid[1] ** 2))
