"""Config of clip_sae and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from patches.mechanisms.features import Op, Tokens
from registry.config import STRICT
from training.clip_sae.dictionary import SAEConfig
from training.clip_sae.gates import GateConfig
from training.clip_sae.streams import Hook
from training.tasks.recognition import (
    Classifier,
    Task,
)

Rank = Literal["difference", "effect", "gates"]


@dataclass(frozen=True)
class Config:
    """What to fit and how to measure it."""

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
    layers: tuple[int, ...] = (4,)
    """Candidate layers, 0-based; a dictionary is trained for each"""
    hook: Hook = "block"
    """Where activations are read: the residual stream after the block (resid_post), or the MLP's output (mlp_out)"""
    which: Literal["all", "cls", "patches"] = "all"
    """Tokens the dictionary is trained on"""
    sae: SAEConfig = field(default_factory=SAEConfig)
    chunk: int = 256
    """Pictures per chunk of activations"""
    dictionary: str = ""
    """Folder of a published dictionary in SAELens' or Prisma's layout ({layer} stands for the layer), or
    `lab:clip-sae`, the one that ships; empty: one is trained"""
    ranks: tuple[Rank, ...] = ("difference", "effect", "gates")
    """How features are ranked. difference: by how much more they fire where the spurious cue is (the written word, the
    ground). effect: by the first-order change of the true class's log-probability when they are removed. gates: by how
    far learned gates close (gates.py), which also set how much of each feature is left, whatever `op` is"""
    gates: GateConfig = field(default_factory=GateConfig)
    counts: tuple[int, ...] = (50, 100, 250, 500, 1000)
    """Candidate numbers of edited features; above half of the dictionary no control of equal size is left"""
    strengths: tuple[float, ...] = (1.0,)
    """Candidate strengths of gated edits: 1 removes what the gates say"""
    op: Op = "zero"
    """Operation on the features' activations"""
    value: float = 0.0
    """Argument of `op`, if it takes one; for task=steer in multiples of the feature's largest activation"""
    levels: tuple[float, ...] = (0.0,)
    """Candidate values that op=zero sets features to, in multiples of their mean over groups. Zero itself can be
    evidence for a class: a bird without any ground is taken for a landbird"""
    tokens: Tokens = "all"
    """Tokens that are edited"""
    word: str = ""
    """Class to steer to, for task=steer"""
    steer_features: int = 0
    """Number of features, neurons and random directions per layer whose steering is compared; 0: none"""
    steer_strengths: tuple[float, ...] = (1.0, 2.0)
    """Values they are clamped to, in mean token norms of the layer: below 1 hardly anything steers, at 4 nearly all
    does"""
    folds: tuple[str, ...] = ()
    """Illustrators of the lab's icons (worlds.HANDS) that are held out in turn, for the group tasks. A candidate then
    counts by its mean worth over these folds and val, which by itself shows a single illustrator"""
    within: float = 0.0
    """The smallest candidate of a layer whose worth is at most this much below the best is taken: serving cost grows
    with the number of features"""
    varied: float = 0.0
    """Share of train's and val's writing that is of other sizes and colours, seven of ten without paper (task
    typographic)"""
    bound: float = 0.01
    """Largest loss on val of clean accuracy (typographic) or average accuracy (groups)"""
    fit_images: int = 384
    val_images: int = 384
    test_images: int = 500


_SMALL = SAEConfig(features=96, k=6, steps=12, batch=128, warmup=4, dead_after=4)
_LAB = SAEConfig(features=2048, batch=2048, steps=600, passes=3)
"""Dictionary for two cores: per minute, 2,048 features in batches of 2,048 reconstruct better than 4,096 in 4,096"""
RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", layers=(1,), sae=_SMALL, chunk=48, counts=(4, 16), fit_images=24, val_images=24, test_images=24,
        gates=GateConfig(steps=4, batch=8),
    ),
    "lab": Config(
        layers=(4,), sae=_LAB, ranks=("gates",), counts=(100, 200, 300, 400, 600), fit_images=1024,
        gates=GateConfig(steps=500, batch=8, keep=30, shun=2.0, price=1.5e-3),  # 200 features do what 600 did at 2e-4
        within=0.025,  # the standard error of worth on 384 images is .006
    ),
    "hands": Config(  # for writing of other sizes and colours, and without paper
        layers=(4,), dictionary="lab:clip-sae", ranks=("gates",), counts=(300,), varied=0.5, fit_images=512,
        gates=GateConfig(steps=300, batch=8, keep=30, shun=2.0, price=1.5e-3), within=0.025,
    ),
    "demo": Config(
        layers=(4,), dictionary="lab:clip-sae", ranks=("gates",), counts=(300,),
        gates=GateConfig(steps=90, batch=8, keep=30, shun=2.0, price=1.5e-3),
        fit_images=128, val_images=48, test_images=64,
    ),
    "layers": Config(
        layers=tuple(range(8)), sae=replace(_LAB, steps=120), ranks=("difference",), counts=(200, 400, 800),
        steer_features=32, fit_images=128, val_images=192,
    ),
    "waterbirds": Config(
        task="waterbirds", classifier="probe", dictionary="lab:clip-sae", ranks=("difference",),
        counts=(10, 20, 30, 50), levels=(0.25, 0.5, 1.0), folds=("noto", "fluent-emoji"), fit_images=512,
        val_images=480,
    ),
    "celeba": Config(
        task="celeba", sae=_LAB, ranks=("difference", "gates"), counts=(50, 200, 1000), fit_images=512,
        gates=GateConfig(steps=100, keep=0.1),
    ),
    "steer": Config(task="steer", layers=(7,), word="owl", op="clamp", value=4.0, counts=(1, 2, 4)),
    "paper": Config(
        base="hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", device="cuda", layers=tuple(range(12)),
        sae=SAEConfig(method="vanilla", features=64 * 768, l1=1e-5, steps=158_691, warmup=500, dead="auxiliary",
                      normalise="layer_norm"),
        chunk=2048, fit_images=2000, val_images=2000, test_images=10_000,
    ),
}  # fmt: skip
