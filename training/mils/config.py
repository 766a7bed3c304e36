"""Config and recipes of mils."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from patches.families.search.config import SearchConfig
from registry import gate
from registry.config import STRICT
from registry.gate import Promise

Data = Literal["scenes", "clips", "sounds", "typographic", "prompts", "styles", "plus", "minus", "both", "company"]


@dataclass(frozen=True)
class Config:
    """A search, what it is tried on, and how many items."""

    __pydantic_config__ = STRICT

    search: SearchConfig = field(default_factory=SearchConfig)
    """the configuration that is sealed; words reach into it: search.steps=5"""
    data: Data = "scenes"
    """what items are made of: pictures of two things, clips, sounds, pictures with a written word, prompts to rewrite,
    styles, sums: picture + picture, picture - word, picture + sound; and the scenes that lab:vlm captions"""
    scorer: str = "lab:clip"
    """base of the role scorer"""
    language: str = "pypi:smollm2"
    """base of the role generator; used by search.generator=llm alone, and sealed so that configurations that differ in
    their generator can be split-tested on one service"""
    sound: str = ""
    """audio-text model of tasks with sounds; empty: the small CLAP of the lab's sounds, trained by the fit"""
    renderer: str = ""
    """diffusion base that draws, for prompts and styles; empty: of prompts the lab's renderer as a program, which a
    service does not have, of styles the lab's grounds and lights, sealed by the fit (both `training.mils.draw`)"""
    sound_steps: int = 250
    """steps of that training"""
    bank: str = ""
    """a text file with one candidate a line; empty: the lab's own"""
    patch: str = ""
    """a sealed folder, or a reference in the store, of the patch on the scorer; empty: none"""
    captioner: str = ""
    """a sealed folder, or a reference in the store, of a vision-language model's patch: its captions and those of its
    base are measured beside the search's; empty: none"""
    fit_items: int = 12
    """items of val whose searches are the sealed trace, and by which the number of rounds is chosen"""
    items: int = 100
    """items of test"""
    pace: bool = True
    """whether the report measures both loops' captions a minute, which takes as long again"""
    device: str = "cpu"
    seed: int = 0


def _search(**how: object) -> SearchConfig:
    return SearchConfig(**{"keep": 24, "ask": 24, "steps": 5, **how})  # type: ignore[arg-type]


RECIPES: dict[str, Config] = {
    "tiny": Config(
        search=_search(keep=6, ask=6, steps=2, lines=100), scorer="tiny:0", language="tiny:0", fit_items=2, items=3,
        sound_steps=2,
    ),
    "lab": Config(search=_search()),
    "crops": Config(search=_search(crops=3), fit_items=24),
    "paper": Config(
        search=SearchConfig(generator="llm", keep=50, ask=50, steps=10, temperature=0.5, top_p=0.9, how="shared"),
        scorer="hf-hub:timm/ViT-SO400M-14-SigLIP", language="hf-hub:meta-llama/Llama-3.1-8B-Instruct",
        fit_items=20, items=1000, device="cuda",
    ),
    "image": Config(search=_search()),
    "smollm": Config(search=_search(generator="llm", ask=16, steps=6), items=24, fit_items=2),
    "typographic": Config(search=_search(), data="typographic", patch="clip_sae@champion"),
    "company": Config(search=_search(crops=3), data="company", captioner="vlm_erasure@champion"),
    "video": Config(search=_search(task="video"), data="clips"),
    "audio": Config(search=_search(task="audio"), data="sounds"),
    "prompt": Config(
        search=_search(task="prompt", keep=4, ask=4, steps=2, lines=3, drawn=4), data="prompts",
        renderer="lab:diffusion", fit_items=3, items=100,
    ),
    "style": Config(search=_search(task="style", keep=8, ask=12, steps=3, lines=44), data="styles"),
    "arithmetic": Config(search=_search(task="arithmetic"), data="plus"),
    "minus": Config(search=_search(task="arithmetic"), data="minus"),
    "both": Config(search=_search(task="arithmetic"), data="both"),
}  # fmt: skip
"""tiny, lab and paper, and one by the name of each task: image, video, audio, prompt, style, arithmetic; crops is lab
with a scorer that looks for a text's things one by one"""


def promises(recipe: str, config: Config) -> tuple[Promise, ...]:
    """More of what is there is said than by the best line of the bank; how long it searches is set, not promised."""
    del config
    if recipe in ("lab", "crops", "smollm", "typographic", "image"):
        return gate.gain("target/f1", sure=False), gate.latency(20.0)
    return gate.loss("quality/score", 0.0), gate.latency(20.0)
