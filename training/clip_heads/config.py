"""What a run of clip_heads may set, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from patches.families.clip.direct import Share
from patches.mechanisms.heads import Mode
from registry.config import STRICT
from training.clip_heads.names import Endpoint
from training.tasks.recognition import (
    Classifier,
)

Task = Literal["typographic", "waterbirds", "celeba"]
Judge = Literal["spectrum", "keyword", "embedding", "model"]


@dataclass(frozen=True)
class Config:
    """What to read, how to name it, what to take away and how to measure it."""

    __pydantic_config__ = STRICT

    base: str = "lab:clip"
    """reference of a CLIP: `lab:clip`, `open-clip:model/tag`, `hf-hub:org/name@revision`, `local-dir:path`"""
    device: str = "cpu"
    seed: int = 0
    task: Task = "typographic"
    classifier: Classifier = "zero-shot"
    """of groups also `probe`, a linear one fitted on train; it is sealed with the patch and served as its label set"""
    data: str = ""
    """folder of the real data set; empty: its twin in the lab world"""
    layers: tuple[int, ...] = ()
    """whose heads are read; empty: all of a tower of up to 8 layers, else the last four, as published"""
    pool: str = ""
    """.txt of the texts heads are named by, one a line; empty: the lab's own"""
    taxonomy: str = ""
    """JSON of property -> phrases; empty: the lab's own. Needed with `pool`"""
    span_images: int = 1024
    """pictures behind the second moments"""
    share: Share = "own"
    """how LayerNorm's mean is shared; `apportioned` as in the authors' code"""
    texts: int = 10
    """of a head"""
    rank: int = 80
    normalise_pool: bool = False
    judge: Judge = "spectrum"
    """whose labels count; the others' stand beside them with their agreement"""
    shuffles: int = 100
    """of texts over properties behind the spectrum's null"""
    endpoint: Endpoint = field(default_factory=Endpoint)
    """of judge=model"""
    examples: tuple[tuple[tuple[str, ...], str], ...] = ()
    """of judge=model: texts of a head and its name, by a person; without any it is shown texts of each property"""
    changes: str = ""
    """JSON list of labels that a person changed: layer, head, label, who, why, at"""
    ablate: tuple[str, ...] = ("text",)
    """properties whose heads may be taken away"""
    counts: tuple[int, ...] = (1, 2, 4, 8)
    modes: tuple[Mode, ...] = ("mean", "zero")
    tokens: Literal["all", "cls"] = "cls"
    draws: int = 5
    """random sets of as many heads that the chosen one is held against"""
    bound: float = 0.02
    """clean accuracy (typographic) or average accuracy (groups) that an edit may cost on val"""
    gallery_images: int = 256
    """pictures that are sealed with the patch, to look for neighbours in"""
    val_images: int = 384
    test_images: int = 500
    word: str = ""
    """of no task here"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", span_images=24, texts=4, counts=(1, 2), draws=2, gallery_images=12, val_images=24, test_images=24,
        modes=("mean",), bound=1.0, shuffles=20,
    ),
    "lab": Config(ablate=("text",), counts=(2, 4, 8, 12), modes=("mean",), tokens="all"),
    "waterbirds": Config(
        task="waterbirds", classifier="probe", ablate=("background",), counts=(1, 2, 3, 4, 6), tokens="cls",
    ),
    "paper": Config(
        base="hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K", device="cuda", task="waterbirds", span_images=5000,
        texts=20, ablate=("location", "setting"), counts=(2, 4, 6, 8, 12), modes=("mean",), val_images=1199,
        test_images=5794,
    ),
}  # fmt: skip
