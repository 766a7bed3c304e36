"""Config of clip_heads and its recipes."""

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
    """Which heads to read, how to name them, which to ablate, and how to measure the edit."""

    __pydantic_config__ = STRICT

    base: str = "lab:clip"
    """Reference of a CLIP: `lab:clip`, `open-clip:model/tag`, `hf-hub:org/name@revision`, `local-dir:path`"""
    device: str = "cpu"
    seed: int = 0
    task: Task = "typographic"
    classifier: Classifier = "zero-shot"
    """What tells classes apart: their names, or (waterbirds, celeba) a linear probe fitted on train, which is sealed
    with the patch and served as its label set"""
    data: str = ""
    """Real images: a folder, or `layout:folder` (training/data/layouts.py); empty: their rendered twin in the lab"""
    layers: tuple[int, ...] = ()
    """Layers whose heads are read; empty: all of a tower of up to 8 layers, else the last four, as published"""
    pool: str = ""
    """Text file of the texts heads are named by, one a line; empty: the lab's own"""
    taxonomy: str = ""
    """JSON object, property -> phrases; empty: the lab's own. Needed with `pool`"""
    span_images: int = 1024
    """Pictures from which second moments of head contributions are taken"""
    share: Share = "own"
    """How LayerNorm's centring is split between heads; `apportioned` as in the authors' code"""
    texts: int = 10
    """Texts per head (TEXTSPAN)"""
    rank: int = 80
    """Largest number of principal directions kept per head"""
    normalise_pool: bool = False
    """Whether texts are rescaled to unit norm after projection onto a head's directions"""
    judge: Judge = "spectrum"
    """Whose labels count; those of the other judges are sealed beside them, with their agreement"""
    shuffles: int = 100
    """Random assignments of texts to properties behind the null of judge=spectrum"""
    endpoint: Endpoint = field(default_factory=Endpoint)
    """Language model behind judge=model"""
    examples: tuple[tuple[tuple[str, ...], str], ...] = ()
    """Examples for judge=model: texts of a head and the name a person gave it; none: texts of each property are shown
    """
    changes: str = ""
    """JSON list of labels that a person overrules: layer, head, label, who, why, at"""
    ablate: tuple[str, ...] = ("text",)
    """Properties whose heads are candidates for ablation"""
    counts: tuple[int, ...] = (1, 2, 4, 8)
    """Candidate numbers of ablated heads"""
    modes: tuple[Mode, ...] = ("mean", "zero")
    """Candidate ablations: to the mean, or to zero"""
    tokens: Literal["all", "cls"] = "cls"
    """Tokens at which heads are ablated"""
    draws: int = 5
    """Random sets of as many heads, the control"""
    bound: float = 0.02
    """Largest loss on val of clean accuracy (typographic) or average accuracy (groups)"""
    gallery_images: int = 256
    """Pictures sealed with the patch as a gallery for nearest-neighbour search"""
    val_images: int = 384
    test_images: int = 500
    word: str = ""
    """Unused, since no task of this system steers; kept because sealed recipes hold it (docs/decisions/0010)"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", span_images=24, texts=4, counts=(1, 2), draws=2, gallery_images=12, val_images=24, test_images=24,
        modes=("mean",), bound=1.0, shuffles=20,
    ),
    "lab": Config(ablate=("text",), counts=(2, 4, 8, 12), modes=("mean",), tokens="all"),
    "demo": Config(
        counts=(8,), modes=("mean",), tokens="all", span_images=128, texts=6, shuffles=20, draws=1, gallery_images=24,
        val_images=32, test_images=32,
    ),
    "waterbirds": Config(
        task="waterbirds", classifier="probe", ablate=("background",), counts=(1, 2, 3, 4, 6), tokens="cls",
    ),
    "paper": Config(
        base="hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K", device="cuda", task="waterbirds", span_images=5000,
        texts=20, ablate=("location", "setting"), counts=(2, 4, 6, 8, 12), modes=("mean",), val_images=1199,
        test_images=5794,
    ),
}  # fmt: skip
