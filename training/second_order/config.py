"""Config of second_order and its recipes."""

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
    """Which neurons to read, which to ablate, and how to measure the edit."""

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
    word: str = ""
    """Unused, since no task of this system steers; kept because sealed recipes hold it (docs/decisions/0010)"""
    layers: tuple[int, ...] = (4, 5, 6)
    """Layers whose neurons are read, 0-based; neurons of the last layer have no second-order effects"""
    ln: Norms = "own"
    """LayerNorm centring of the lens. own: exactly linear. official: as in the authors' code"""
    share: float = 0.02
    """Share of pictures with the largest effects, from which a neuron's direction and threshold are taken"""
    pool: str = ""
    """Text file of candidate texts, one a line; empty: the lab's names and grounds, or the classes of `data`"""
    atoms: int = 16
    """Texts per neuron in the sparse decomposition"""
    atom_norm: AtomNorm = "unit"
    """Normalisation of the dictionary's atoms: per text, or per dimension as in the authors' code (legacy)"""
    edits: tuple[Edit, ...] = ("effects", "activations")
    """What is mean-ablated: the second-order effects alone, or the activation itself"""
    counts: tuple[int, ...] = (25, 100, 300)
    """Candidate numbers of edited neurons"""
    bound: float = 0.01
    """Largest loss on val of clean accuracy (typographic) or average accuracy (groups)"""
    fit_images: int = 1000
    """Pictures that directions are taken from"""
    rank_images: int = 384
    """Pictures of the task that neurons are ranked on, each with and without the spurious cue"""
    val_images: int = 256
    test_images: int = 500
    probes: int = 24
    """Neurons, and pictures, for which the lens is compared with true ablation"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", layers=(0, 1), atoms=4, counts=(4, 32), fit_images=40, rank_images=16, val_images=16,
        test_images=16, share=0.1, probes=3,
    ),
    "lab": Config(counts=(50, 200), fit_images=800, rank_images=256, val_images=160),
    "demo": Config(
        layers=(5,), counts=(100,), edits=("activations",), fit_images=128, rank_images=48, val_images=32,
        test_images=32, probes=4,
    ),
    "waterbirds": Config(task="waterbirds", bound=0.02),
    "celeba": Config(task="celeba", bound=0.02),
    "paper": Config(
        base="open-clip:ViT-B-32/openai", device="cuda", layers=(8, 9, 10), atoms=128, fit_images=5124,
        rank_images=2000, val_images=2000, test_images=10_000,
    ),
}  # fmt: skip
