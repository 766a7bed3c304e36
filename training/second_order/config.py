"""What a run of second_order may set, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patches.families.clip.second_order import (
    Norms,
)
from registry.config import STRICT
from training.second_order.omp import AtomNorm
from training.tasks.recognition import (
    Classifier,
    Task,
)

Edit = Literal["effects", "activations"]


@dataclass(frozen=True)
class Config:
    """What to read, what to take away, and how to measure it."""

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
    word: str = ""
    """of the task steer, which this system does not fit"""
    layers: tuple[int, ...] = (4, 5, 6)
    """whose neurons are read, 0-based; all but the last one have second-order effects"""
    ln: Norms = "own"
    """own: exactly linear; official: the centring of the authors' code, for parity"""
    share: float = 0.02
    """of the pictures, those of the largest effects, from which a neuron's direction is taken and its threshold set"""
    pool: str = ""
    """.txt of texts, one a line; empty: the lab's names and grounds, or the classes of `data`"""
    atoms: int = 16
    """texts per neuron"""
    atom_norm: AtomNorm = "unit"
    edits: tuple[Edit, ...] = ("effects", "activations")
    """what is taken away: second-order effects alone, or what the neuron fires"""
    counts: tuple[int, ...] = (25, 100, 300)
    """of neurons"""
    bound: float = 0.01
    """clean accuracy (typographic) or average accuracy (groups) that an edit may cost on val"""
    fit_images: int = 1000
    """that directions are taken from"""
    rank_images: int = 384
    """of the task, that neurons are ranked on; each with and without what should not matter"""
    val_images: int = 256
    test_images: int = 500
    probes: int = 24
    """neurons whose true path is followed, and as many pictures"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", layers=(0, 1), atoms=4, counts=(4, 32), fit_images=40, rank_images=16, val_images=16,
        test_images=16, share=0.1, probes=3,
    ),
    "lab": Config(counts=(50, 200), fit_images=800, rank_images=256, val_images=160),
    "demo": Config(
        layers=(5,), counts=(100,), edits=("activations",), fit_images=300, rank_images=128, val_images=96,
        test_images=100, probes=8,
    ),
    "waterbirds": Config(task="waterbirds", bound=0.02),
    "celeba": Config(task="celeba", bound=0.02),
    "paper": Config(
        base="open-clip:ViT-B-32/openai", device="cuda", layers=(8, 9, 10), atoms=128, fit_images=5124,
        rank_images=2000, val_images=2000, test_images=10_000,
    ),
}  # fmt: skip
