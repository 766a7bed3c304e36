"""What to fit and how to measure it; the recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from registry import gate
from registry.config import STRICT
from registry.gate import Promise


@dataclass(frozen=True)
class Config:
    """An erasure on one vision-language base."""

    __pydantic_config__ = STRICT

    base: str = "lab:vlm"
    """reference of a vision-language model"""
    device: str = "cpu"
    seed: int = 0
    pictures: str = "lab"
    """lab: the lab's scenes; else a folder of COCO's pictures"""
    annotations: str = ""
    """COCO's instances_*.json"""
    references: str = ""
    """COCO's captions_*.json: what they name counts as there"""
    question: str = "Describe the picture."
    max_tokens: int = 24
    depths: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (3,), (0, 1), (0, 1, 2, 3))
    """where erasing is tried; 0 is the projector's output. (-1,) stands for every depth but the last"""
    text_depths: tuple[int, ...] = (-1, 0)
    """depths a word's direction is taken from; -1: the one it is erased at"""
    weights: tuple[float, ...] = (1.0, 1.5, 2.0)
    own: tuple[bool, ...] = (False, True)
    """whether the mean word is taken out of a direction"""
    normed: bool = True
    """whether the lens passes states through the final norm"""
    rounds: int = 3
    kept: float = 0.9
    """share of true mentions a setting should keep; below it counts against it"""
    val_scenes: int = 400
    """pictures that settings are chosen on"""
    sweep_captions: int = 90
    """Captions with an invention that the sweep erases in"""
    test_scenes: int = 600
    """pictures that are only reported on"""


_LLAVA = Config(
    base="hf-hub:llava-hf/llava-1.5-7b-hf", device="cuda", pictures="coco/val2014",
    annotations="coco/annotations/instances_val2014.json", references="coco/annotations/captions_val2014.json",
    question="Write a detailed description.", max_tokens=512, depths=((1,), (10,), (15,), (19,), (22,)),
    text_depths=(1, 21), weights=(1.5, 2.5, 3.5), own=(False,), normed=False, val_scenes=200, sweep_captions=100,
    test_scenes=500,
)  # fmt: skip
RECIPES: dict[str, Config] = {
    "tiny": Config(
        depths=((0,), (0, 1)), text_depths=(-1,), weights=(1.0,), own=(False,), val_scenes=16, sweep_captions=8,
        test_scenes=12,
    ),
    "lab": Config(),
    "projector": Config(base="lab:vlm-projector"),
    "paper": _LLAVA,
    "instructblip": replace(
        _LLAVA, base="hf-hub:Salesforce/instructblip-vicuna-7b", question="Give a detailed description.",
        depths=((1,), (2,), (4,)), text_depths=(1, 2), weights=(1.0, 1.5, 2.5),
    ),
}  # fmt: skip


def promises(recipe: str, config: Config) -> tuple[Promise, ...]:
    """Fewer invented things, those that are there still named. The check for what to erase is a second reading."""
    del config
    if recipe == "tiny":
        return gate.loss("quality/recall", 0.25), gate.latency(20.0)
    return gate.gain("target/chair_i", sure=False), gate.loss("quality/recall", 0.03), gate.latency(3.0)
