"""What diffusion_cf can be told, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from patches.families.diffusion import METHODS
from registry import gate
from registry.config import STRICT
from registry.errors import ConfigError
from registry.gate import Promise
from training.diffusion_cf import domains


@dataclass(frozen=True)
class Tune:
    """LoRA on the denoiser, so that it knows a domain better; off with 0 steps."""

    __pydantic_config__ = STRICT

    steps: int = 0
    rank: int = 4
    alpha: float = 8.0
    rate: float = 4e-4
    batch: int = 8
    dropped: float = 0.1
    """share of rows told nothing, so that the null condition does not drift (the authors' code drops none)"""


@dataclass(frozen=True)
class Config:
    """Which model and domains, how pictures are inverted, and what is measured on how many."""

    __pydantic_config__ = STRICT

    base: str = "lab:diffusion"
    """reference of a diffusion model that is told an image embedding"""
    device: str = "cpu"
    seed: int = 0
    data: str = ""
    """folder of the user's own domain, one folder of pictures a class, split or not; empty: the lab's domains"""
    domains: tuple[str, ...] = tuple(domains.LAB)
    """Domains of the lab that are fitted"""
    examples: int = 60
    """train pictures a class behind its mean"""
    method: Literal["fixed_point", "ddim", "edit_friendly", "edict", "o_belm"] = "fixed_point"
    levels: int = 8
    """a picture is inverted along, up to nine tenths of the schedule"""
    iterations: int = 3
    """Fixed-point iterations at each level, for the method `fixed_point`"""
    guidance: float = 2.0
    against: Literal["source", "null"] = "source"
    """what guidance starts from: the picture's own condition, or none, as published"""
    norm: Literal["unit", "free"] = "unit"
    """whether the moved condition gets its old length back; the authors' does not, and their model's is not of unit
    length"""
    amounts: tuple[float, ...] = (0.75, 1.0, 1.5)
    """in class gaps; tried on val"""
    rule: Literal["reach", "apart"] = "reach"
    """which of them is taken, by the model's own encoder. reach: the smallest at which `goal` of pictures lie nearer to
    the target; apart: the one at which most more do than after an equal step towards a class of another domain"""
    goal: float = 0.9
    """Share of val pictures, for the rule `reach`"""
    val_images: int = 2
    """a class"""
    test_images: int = 3
    """a class, for `evaluate`"""
    report_images: int = 20
    """a class, for the main comparison of `eval --full`"""
    report_few: int = 3
    """a class, for baselines and other inversions; in the lab's test split every drawing once"""
    held_images: int = 4
    """a class, in the style no lab model was trained on"""
    few: tuple[int, ...] = (2, 5, 10, 50)
    """examples a class that means are tried from in `eval --full`"""
    draws: int = 3
    """Draws of those examples, each its own pictures"""
    denoiser: Literal["float32", "bfloat16"] = "float32"
    """numbers the denoiser computes with in `eval --full`"""
    beside: tuple[Literal["ddim", "o_belm", "edit_friendly", "edict"], ...] = (
        "ddim",
        "o_belm",
        "edit_friendly",
        "edict",
    )
    """inversions that `eval --full` holds beside the recipe's own"""
    judges: tuple[Literal["cnn", "clip"], ...] = ("cnn", "clip")
    tune: Tune = field(default_factory=Tune)

    def __post_init__(self) -> None:
        if not self.amounts or self.method not in METHODS or not self.judges:
            raise ConfigError("amounts and judges must name at least one each.")


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", domains=("cats", "citrus"), examples=4, levels=3, iterations=2, amounts=(1.0,), goal=0.0,
        test_images=1, report_images=1, report_few=1, held_images=1, few=(2,), draws=2, beside=("ddim", "edict"),
        judges=("cnn",),
    ),
    "lab": Config(),
    "paper": Config(
        base="hf-hub:kandinsky-community/kandinsky-2-2-decoder", device="cuda", examples=0, method="edit_friendly",
        levels=100, guidance=4.0, against="null", norm="free", amounts=(1.0, 1.5, 2.0), val_images=20, test_images=100,
        report_images=100, report_few=40, tune=Tune(steps=2000, batch=32),
    ),
}  # fmt: skip


def promises(recipe: str, config: Config) -> tuple[Promise, ...]:
    """Pictures go over to the other class for both judges, few of them to a third, at two denoisings."""
    del config
    if recipe == "tiny":
        return Promise("offtarget/neither_cnn", "most", 0.5), gate.latency(20.0)
    return gate.gain("target/flip_both"), Promise("offtarget/neither_cnn", "most", 0.2), gate.latency(3.0)
