"""What a run of clip_sae may set, and its recipes."""

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
    """reference of a CLIP: `lab:clip`, `open-clip:model/tag`, `hf-hub:org/name@revision`, `local-dir:path`"""
    device: str = "cpu"
    seed: int = 0
    task: Task = "typographic"
    classifier: Classifier = "zero-shot"
    """of groups also `probe`, a linear one fitted on train; it is sealed with the patch and served as its label set"""
    data: str = ""
    """folder of the real data set; empty: its twin in the lab world"""
    layers: tuple[int, ...] = (4,)
    """candidates, 0-based; a dictionary is trained for each"""
    hook: Hook = "block"
    """the stream after the block (resid_post), or what its MLP adds (mlp_out)"""
    which: Literal["all", "cls", "patches"] = "all"
    """tokens the dictionary is trained on"""
    sae: SAEConfig = field(default_factory=SAEConfig)
    chunk: int = 256
    """pictures per chunk of activations"""
    dictionary: str = ""
    """folder of a published dictionary, SAELens' or Prisma's layout; {layer} in it stands for the layer; `lab:clip-sae`
    is the one that ships. Nothing is trained then"""
    ranks: tuple[Rank, ...] = ("difference", "effect", "gates")
    """how features are ordered: by how much more they fire where the thing that should not matter is; by what taking
    them away does to the true class to first order; by how far learned gates close (gates.py), which also say
    how much of each is left, whatever `op` is"""
    gates: GateConfig = field(default_factory=GateConfig)
    counts: tuple[int, ...] = (50, 100, 250, 500, 1000)
    """candidates; those above half of the dictionary are left out, since a control takes as many others"""
    strengths: tuple[float, ...] = (1.0,)
    """how much of what gates say is taken away, as far as candidates go"""
    op: Op = "zero"
    value: float = 0.0
    """of the ops that take one; for steer in multiples of the feature's largest activation"""
    levels: tuple[float, ...] = (0.0,)
    """of op=zero: what is left of a feature, whatever it was, in multiples of its mean over groups; candidates. Nothing
    at all may say as much of a class as what was there: without any ground a bird is a bird of the land"""
    tokens: Tokens = "all"
    """that are edited"""
    word: str = ""
    """of steer: the class to steer to"""
    steer_features: int = 0
    """so many features and neurons of every layer are compared by how they steer; 0: none"""
    steer_strengths: tuple[float, ...] = (1.0, 2.0)
    """what they are set to, in mean norms of a layer's tokens: below 1 next to nothing steers, at 4 nearly all"""
    folds: tuple[str, ...] = ()
    """of the lab's groups: hands of drawing (worlds.HANDS) that are left out in turn. A candidate then counts by its
    mean worth over them and val, which alone is one hand's"""
    within: float = 0.0
    """of a layer's candidates that are worth so much less than the best at most, the one with the fewest features is
    taken: what they cost whoever serves them is proportional to their number"""
    bound: float = 0.01
    """clean accuracy (typographic) or average accuracy (groups) that an edit may cost on val"""
    fit_images: int = 384
    val_images: int = 384
    test_images: int = 500


_SMALL = SAEConfig(features=96, k=6, steps=12, batch=128, warmup=4, dead_after=4)
_LAB = SAEConfig(features=2048, batch=2048, steps=600, passes=3)
"""a dictionary for two cores: smaller batches of fewer features learn more in a minute than one of 4,096 x 4,096"""
RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", layers=(1,), sae=_SMALL, chunk=48, counts=(4, 16), fit_images=24, val_images=24, test_images=24,
        gates=GateConfig(steps=4, batch=8),
    ),
    "lab": Config(
        layers=(4,), sae=_LAB, ranks=("gates",), counts=(100, 200, 300, 400, 600), fit_images=1024,
        gates=GateConfig(steps=500, batch=8, keep=30, shun=2.0, price=1.5e-3),  # 200 features do what 600 did at 2e-4
        within=0.025,  # a standard error of .6 among 384
    ),
    "demo": Config(
        layers=(4,), dictionary="lab:clip-sae", ranks=("gates",), counts=(300,),
        gates=GateConfig(steps=180, batch=8, keep=30, shun=2.0, price=1.5e-3),
        fit_images=256, val_images=96, test_images=150,
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
