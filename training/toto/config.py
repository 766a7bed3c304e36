"""What a run of toto may set, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from registry import gate
from registry.config import STRICT
from registry.gate import Promise
from training.lab.video import actions


@dataclass(frozen=True)
class Config:
    """What to train and what to measure."""

    __pydantic_config__ = STRICT

    base: str = "lab:video-toto-untrained"
    """the checkpoint it is compared with: of the same frames, size and classes"""
    size: str = "lab"
    """a name of training/toto/sizes.py: tiny, lab, base, large, 1b and those of the scaling curve"""
    data: str = ""
    """Real clips instead of the lab's, as READER:FOLDER (`ucf101:`, `hmdb51:`, `kinetics:`): what is trained on and
    probed"""
    davis: str = ""
    """Folder of DAVIS, on whose val the report then tracks; empty: the lab's masks"""
    stride: int = 4
    """Frames of a real clip from one that the model sees to the next"""
    device: str = "cpu"
    seed: int = 0
    steps: int = 2000
    batch: int = 32
    peak: float = 3e-3
    bf16: bool = False
    tokenizer: str = ""
    """Folder of a trained tokenizer in place of k-means, whose are `codes`, `patch`, `shrink` and `residual`:
    a VQModel (diffusers) or a flava_image_codebook, DALL-E's dVAE (transformers)"""
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
    half: bool = False
    """weights in half precision on disk"""


_PAPER: dict[str, Any] = {
    "device": "cuda", "bf16": True, "codes": 8192, "patch": 8, "shrink": 1, "residual": False, "frames": 16,
    "image": 128, "batch": 256, "peak": 3e-4, "steps": 1_000_000, "pool": 500_000,
}  # fmt: skip
RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny:toto-motions", size="tiny", steps=12, batch=8, codes=12, pool=48, frames=4, image=16, labels=44,
        probe_steps=12, val_clips=22, test_clips=44, tracked_clips=11,
    ),
    "lab": Config(size="w48", steps=300, pool=3072, half=True),
    "long": Config(steps=8000, half=True),
    "demo": Config(size="w32", steps=150, pool=512, labels=110, val_clips=110, test_clips=220, tracked_clips=22),
    "base": Config(base="untrained:toto-base", size="base", **_PAPER),
    "large": Config(base="untrained:toto-large", size="large", **_PAPER),
    "1b": Config(base="untrained:toto-1b", size="1b", **_PAPER),
    "paper": Config(base="untrained:toto-1b", size="1b", **_PAPER),
}  # fmt: skip


def promises(recipe: str, config: Config) -> tuple[Promise, ...]:
    """Training teaches to tell motions and to predict frames, at the same cost."""
    del config
    if recipe == "tiny":
        return gate.gain("quality/nll_later_frames", sure=False), gate.latency(20.0)
    return gate.gain("target/probe"), gate.gain("quality/nll_later_frames"), gate.latency(1.5)
