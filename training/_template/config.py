"""What a run of _template may set, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass

from registry import gate
from registry.config import STRICT
from registry.gate import Promise


@dataclass(frozen=True)
class Config:
    """Which direction to take out of which layer, and how it is measured."""

    __pydantic_config__ = STRICT

    base: str = "pypi:smollm2"
    """reference of a language model"""
    device: str = "cpu"
    seed: int = 0
    layers: tuple[int, ...] = (8, 16, 24)
    """candidates, 0-based: where the direction is taken out, after the block"""
    documents: int = 8
    """per kind of text, for fitting, choosing and measuring each"""
    tokens: int = 256
    """Tokens that a document may have"""
    bound: float = 1.02
    """perplexity on prose that an edit may cost on val, as a multiple of the base's"""


RECIPES: dict[str, Config] = {
    "tiny": Config(base="tiny", layers=(0, 1), documents=2, tokens=32, bound=2.0),
    "paper": Config(),
}


def promises(recipe: str, config: Config) -> tuple[Promise, ...]:
    """Code is predicted worse, for that is what is taken away; prose nearly as before."""
    del recipe
    return gate.ratio("quality/perplexity_prose", 2.0 * config.bound), gate.latency(20.0)
