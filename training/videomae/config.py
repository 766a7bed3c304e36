"""What a run of videomae may set, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from patches.families.video.pixels import Still
from registry import gate
from registry.config import STRICT
from registry.gate import Promise
from training.videomae.pretraining import Plan, Size

SCRATCH, NATURAL = "scratch", "natural"


@dataclass(frozen=True)
class Config:
    """What to pre-train on, what to fit on top, and what to measure."""

    __pydantic_config__ = STRICT

    base: str = "lab:video-scratch"
    """the checkpoint it is compared with: of the same frames, size and classes"""
    stage: str = "image_crops"
    """a stage of the progression, `natural` for the task's own clips without their labels, `scratch` for none"""
    data: str = ""
    """Real clips instead of the lab's, as READER:FOLDER (`ucf101:`, `hmdb51:`, `kinetics:`; a folder alone is
    UCF101's): what is probed, fine-tuned and measured, and what `natural` pre-trains on"""
    damaged: str = ""
    """Folder of UCF101-P, which the report then measures; empty: the lab's own corruptions"""
    stride: int = 4
    """Frames of a real clip from one that the model sees to the next"""
    device: str = "cpu"
    seed: int = 0
    size: Size = field(default_factory=Size)
    steps: int = 8000
    batch: int = 32
    peak: float = 2e-3
    ratio: float = 0.75
    mask: Literal["tube", "random"] = "random"
    still: Still = "mean"
    """what is taken away from clips that stand still; `keep` for real ones, whose camera moves"""
    pool: int = 8192
    """clips drawn; each batch is one of 96 views of some"""
    bf16: bool = False
    compile: bool = False
    processes: int = 1
    """Processes that pre-train together, one on each device, through `accelerate`"""
    labels: int = 550
    tune_steps: int = 300
    tune_batch: int = 16
    tune_peak: float = 2e-3
    layer_decay: float = 1.0
    probe_steps: int = 200
    test_clips: int = 1100
    val_clips: int = 330
    few: int = 0
    """Unused since fewer labels are a sweep's (progression.py); kept because sealed recipes hold it"""
    half: bool = False
    """weights in half precision on disk"""


_PAPER = Size(768, 12, 12, 384, 4, 6, image=224, patch=16, frames=16, norm_pix=True)
RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny:motions", size=Size(16, 2, 2, 16, 1, 2, image=16, patch=8, frames=4), steps=12, batch=8, pool=64,
        labels=44, tune_steps=12, probe_steps=12, test_clips=66,
        val_clips=22,
    ),
    "lab": Config(stage="transforming", steps=1000, pool=2048, half=True),
    "long": Config(steps=16_000, half=True),
    "demo": Config(steps=400, pool=1024, labels=110, tune_steps=100, test_clips=220, val_clips=110),
    "paper": Config(
        base="untrained:videomae-base", size=_PAPER, steps=159_000, batch=192, peak=2.25e-4, mask="tube", still="keep",
        pool=9537, labels=9537,
        tune_steps=12_000, tune_batch=128, tune_peak=1e-3, layer_decay=0.7, bf16=True, compile=True, device="cuda",
    ),
}  # fmt: skip


def plan_of(config: Config) -> Plan:
    """How a config pre-trains."""
    return Plan(config.steps, config.batch, config.peak, ratio=config.ratio, mask=config.mask, still=config.still,
                seed=config.seed, bf16=config.bf16, compile=config.compile)  # fmt: skip


def promises(recipe: str, config: Config) -> tuple[Promise, ...]:
    """Pre-training helps the probe for sure, at the same cost."""
    del config
    if recipe == "tiny":
        return gate.gain("quality/restored", sure=False), gate.latency(20.0)
    return gate.gain("target/probe"), gate.latency(1.5)
