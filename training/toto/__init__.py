"""toto: a language model over visual tokens of clips and pictures, trained by next-token prediction alone.

Paper: Rajasegaran, Radosavovic et al., "An Empirical Study of Autoregressive Pre-training from Videos", arXiv
2501.05453. Claims: features for recognition, tracking and robotics come out of next-token prediction, best in the
middle of the network; the loss falls as a power of compute (exponent 0.0378 there); the first frame is the dearest.
docs/systems/toto.md has what was measured here, docs/log/toto.md how.

    patchbay fit toto/tiny          # seconds
    patchbay fit toto/lab           # minutes of one core
    patchbay fit toto/base device=cuda
    python -m training.toto.scaling FOLDER      # five sizes: loss, probes by layer, rollouts, tracking, the power law

The tokenizer is k-means over patches; on the lab's still grounds later frames are tokenised as differences from the
frame before (`residual`). What is sealed is a checkpoint (kind `model`) with an attentive probe of one layer, which is
chosen on val. The base it is compared with is the same network before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from patches.families.base import load_base
from patches.families.video import base as checkpoints
from patches.families.video.tokens import TokenVideo
from patches.subject import Subject
from registry import manifest
from registry.config import STRICT
from registry.errors import ConfigError
from registry.manifest import Manifest
from registry.measure import Measure
from training.lab.video import actions
from training.tasks import motion
from training.tasks.intervals import wilson
from training.tasks.tracking import copied, tracked
from training.toto import learn
from training.toto.sizes import SIZES


@dataclass(frozen=True)
class Config:
    """What to train and what to measure."""

    __pydantic_config__ = STRICT

    base: str = "lab:video-toto-untrained"
    """the checkpoint it is compared with: of the same frames, size and classes"""
    size: str = "lab"
    """a name of training/toto/sizes.py: tiny, lab, base, large, 1b and those of the scaling curve"""
    device: str = "cpu"
    seed: int = 0
    steps: int = 2000
    batch: int = 32
    peak: float = 3e-3
    bf16: bool = False
    codes: int = 256
    patch: int = 4
    shrink: int = 2
    residual: bool = True
    pictures: float = 0.2
    """share of sequences that are packed pictures"""
    pool: int = 8192
    frames: int = actions.FRAMES
    image: int = actions.SIZE
    labels: int = 550
    probe_steps: int = 200
    val_clips: int = 330
    test_clips: int = 1100
    tracked_clips: int = 110


_PAPER: dict[str, Any] = {
    "device": "cuda", "bf16": True, "codes": 8192, "patch": 8, "shrink": 1, "residual": False, "frames": 16,
    "image": 128, "batch": 256, "peak": 3e-4, "steps": 1_000_000, "pool": 500_000,
}  # fmt: skip
RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny:toto-motions", size="tiny", steps=12, batch=8, codes=12, pool=48, frames=4, image=16, labels=44,
        probe_steps=12, val_clips=22, test_clips=44, tracked_clips=11,
    ),
    "lab": Config(),
    "demo": Config(size="w32", steps=150, pool=512, labels=110, val_clips=110, test_clips=220, tracked_clips=22),
    "base": Config(size="base", **_PAPER),
    "large": Config(size="large", **_PAPER),
    "1b": Config(size="1b", **_PAPER),
    "paper": Config(size="1b", **_PAPER),
}  # fmt: skip


def fit(config: Config, folder: Path) -> Manifest:
    """Train one checkpoint and its probe; sealed as a model."""
    base = load_base(config.base, "video")
    model = made(config)
    if (model.frames, model.size, model.classes) != (base.model.frames, base.model.size, base.model.classes):
        raise ConfigError(
            f"{config.base} reads {base.model.frames} frames of {base.model.size} px; this recipe has {model.frames} and "
            f"{model.size}. Name another base."
        )
    checkpoints.save(model, folder)
    plain = {k: v for k, v in asdict(config).items() if k != "device"}
    return manifest.write(folder, kind="model", system="toto", base=base.label, config=plain)


def made(config: Config, trained: bool = True) -> TokenVideo:
    """The checkpoint of a config, or the same network before training; both with a probe of the layer best on val."""
    if config.size not in SIZES:
        raise ConfigError(f"size={config.size!r:.30} must be one of {', '.join(SIZES)}.")
    video = learn.pool(config.pool, config.frames, config.image)
    codebook = learn.tokenizer(video[:1024], config.codes, config.patch, config.shrink, config.residual, config.seed)
    model = learn.new(SIZES[config.size], codebook, config.frames, config.image, config.seed).to(config.device)
    if trained:
        g = Generator().manual_seed(config.seed)
        ids = learn.tokenise(video, codebook)
        stills = learn.tokenise_pictures(video, codebook, config.frames, g)
        plan = learn.Plan(config.steps, config.batch, config.peak, pictures=config.pictures, seed=config.seed, bf16=config.bf16)
        learn.fit(model, ids, stills, plan)
    model = model.cpu().eval()
    model.classes = motion.CLASSES
    seen, val = (motion.clips(s, n, k, config.frames, config.image) for s, n, k in
                 (("train", config.labels, 20), ("val", config.val_clips, 7)))  # fmt: skip
    x, y = (learn.features(model, learn.tokenise(c.video, codebook)) for c in (seen, val))
    best = -1.0
    for layer in range(1, model.depth + 1):
        probe = motion.probe(x[layer], seen.label, "attention", config.probe_steps, config.seed)
        right = float((motion.answers(probe, y[layer]) == val.label).float().mean())
        if right > best:
            best, model.probe, model.probe_layer = right, probe, layer
    return model


@torch.no_grad()
def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, float | Measure]:
    """Accuracy of the probe, next-token loss, rollouts against copying, tracking: on clips of test."""
    model = subject.alone(arm).model
    assert isinstance(model, TokenVideo)
    test = motion.clips("test", config.test_clips, 10, config.frames, config.image)
    said = torch.cat([model(clips=part)["scores"] for part in test.video.split(100)]).argmax(1)
    value, low, high, n = wilson(said == test.label)
    out: dict[str, float | Measure] = {"probe": Measure(value, low, high, int(n), "higher")}
    surprise = torch.cat([model.surprise(part) for part in test.video[:330].split(100)])
    out["nll"] = mean_of(surprise.mean(1), "lower")
    out["nll_first_frame"] = mean_of(surprise[:, 0], "lower")
    out["nll_later_frames"] = mean_of(surprise[:, 1:].mean(1), "lower")
    moving = test[(test.label != 0).nonzero()[: config.tracked_clips, 0]]
    given = model.frames // 2
    made_, _ = model.rollout(moving.video, given)
    true = moving.video.float() / 255
    off = (made_ - true)[:, given].square().mean((1, 2, 3))
    copy = (true[:, given - 1] - true[:, given]).square().mean((1, 2, 3))
    out["next_frame_gain"] = mean_of((copy - off) / copy.mean(), "higher")
    states = model.states(moving.video)
    found = tracked(states[model.depth // 2], moving.mask, model.grid)
    out["track"] = Measure(found["JF"], found["JF"] - 1.96 * found["se"], found["JF"] + 1.96 * found["se"], int(found["n"]), "higher")
    return out


def mean_of(x: torch.Tensor, better: Any) -> Measure:
    """A mean over clips with its normal interval."""
    value, se = float(x.mean()), float(x.std() / len(x) ** 0.5)
    return Measure(value, value - 1.96 * se, value + 1.96 * se, len(x), better)


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


@torch.no_grad()
def report(folder: Path, config: Config) -> dict[str, Any]:
    """Beside the sealed checkpoint: controls, the probe of every layer, tracking by layer against copying the mask."""
    model = checkpoints.read(folder)
    assert isinstance(model, TokenVideo)
    test = motion.clips("test", config.test_clips, 10, config.frames, config.image)
    seen = motion.clips("train", config.labels, 20, config.frames, config.image)
    controls: dict[str, Any] = {}
    probes: dict[str, Any] = {}
    with torch.enable_grad():
        for see in (motion.differences, motion.middle):
            controls[see.__name__] = _measure(motion.control(see, seen, test, 600 if config.labels > 100 else 20)[0])
        x, y = (learn.features(model, learn.tokenise(c.video, model.codebook)).detach() for c in (seen, test))
        for layer in range(model.depth + 1):
            probe = motion.probe(x[layer], seen.label, "attention", config.probe_steps, config.seed)
            probes[f"layer {layer}"] = _measure(motion.answers(probe, y[layer]) == test.label)
    moving = test[(test.label != 0).nonzero()[: config.tracked_clips, 0]]
    states = model.states(moving.video)
    tracks = {"copy the mask": copied(moving.mask)} | {f"layer {i}": tracked(s, moving.mask, model.grid) for i, s in enumerate(states)}
    return {"controls": controls, "probes": probes, "tracking": tracks}


def _measure(right: torch.Tensor) -> Measure:
    value, low, high, n = wilson(right)
    return Measure(value, low, high, int(n), "higher")


__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "report"]
