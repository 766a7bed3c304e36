"""How one search runs: which generator proposes, which scorer ranks, how much of both. The config of kind `search`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from registry.config import STRICT
from registry.errors import ConfigError, Invalid

Task = Literal["image", "video", "audio", "prompt", "style", "arithmetic"]
TASKS: tuple[Task, ...] = ("image", "video", "audio", "prompt", "style", "arithmetic")
GeneratorName = Literal["mutation", "llm", "endpoint", "random"]

MAX_ASK, MAX_KEEP, MAX_STEPS = 1000, 1000, 100
"""Limits of one item: candidates a round, candidates kept, rounds"""
MAX_CALLS = 100_000
MAX_SECONDS = 3600.0
MAX_WORDS = 100
MAX_LINES = 100_000
"""lines of a bank"""


@dataclass(frozen=True)
class SearchConfig:
    """One configuration of `generator -> scorer -> top k -> generator`. Raises ConfigError for what cannot run."""

    __pydantic_config__ = STRICT

    task: Task = "image"
    generator: GeneratorName = "mutation"
    """mutation: words and phrases of the bank and of the kept lines; llm: the base of role `generator`; endpoint: an
    OpenAI-compatible service named at deploy time; random: lines built from the bank without looking at scores"""
    keep: int = 50
    """K: the best candidates that the next round is made from"""
    ask: int = 50
    """R: candidates asked for in a round"""
    steps: int = 10
    """N: rounds after the bank; 0 retrieves the best line of the bank"""
    patience: int = 0
    """stop after so many rounds without a better best; 0 never"""
    epsilon: float = 0.0
    """share of K drawn at random from the candidates below the best K (exploration)"""
    seconds: float = 0.0
    """budget of one item, 0: none; as calls and tokens"""
    calls: int = 0
    """texts scored for one item after its bank, whose features all items share: no budget loses the bank's best"""
    tokens: int = 0
    """tokens generated for one item"""
    lines: int = 0
    """lines of the bank that are scored first, 0: all; for tasks that draw every line"""
    words: int = 16
    """words of the longest candidate; longer ones are cut"""
    shown: int = 6
    """kept lines shown to a language model in one prompt"""
    scores: Literal["raw", "rank"] = "raw"
    """how scores are shown to a language model: cosines, or 1 for the best down to 0"""
    temperature: float = 0.9
    top_p: float = 0.95
    wait: float = 60.0
    """seconds a round waits for its generator; then it goes on with the candidates that have come"""
    how: Literal["shared", "official"] = "shared"
    """official: the published loop; one item at a time, the bank and all kept texts encoded again in every round, all
    candidates of a round in one stream of the language model. Kept to measure against"""
    crops: int = 0
    """crops in a row and a column of the picture in which a text's things are looked for (`Cropped`); 0: the whole
    picture alone"""
    sound: str = ""
    """name@digest of the audio-text model, for tasks with sounds"""
    renderer: str = ""
    """name@digest of the diffusion base that draws what prompts say, for tasks that make pictures, or of the backdrops
    that are sealed with the search (`backdrops`); empty: what whoever runs the search put there"""
    drawn: int = 10
    """denoiser steps of one picture of it"""
    patched: tuple[str, ...] = ()
    """roles whose base carries the patch that is sealed in the folder <role>/ of the artifact"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("keep", self.keep, 1, MAX_KEEP), ("ask", self.ask, 1, MAX_ASK), ("steps", self.steps, 0, MAX_STEPS),
            ("patience", self.patience, 0, MAX_STEPS), ("epsilon", self.epsilon, 0.0, 1.0),
            ("seconds", self.seconds, 0.0, MAX_SECONDS), ("calls", self.calls, 0, MAX_CALLS),
            ("tokens", self.tokens, 0, 10_000_000), ("lines", self.lines, 0, MAX_LINES),
            ("words", self.words, 1, MAX_WORDS),
            ("shown", self.shown, 1, 50), ("crops", self.crops, 0, 6), ("drawn", self.drawn, 1, 100),
            ("wait", self.wait, 0.1, 600.0), ("temperature", self.temperature, 0.0, 2.0),
            ("top_p", self.top_p, 1e-3, 1.0),
        ):  # fmt: skip
            if not low <= value <= high:
                raise ConfigError(f"{name}={value:g} must be between {low:g} and {high:g}.")


@dataclass(frozen=True)
class Budget:
    """What one request may spend, at most what its configuration allows. None: what the configuration says."""

    steps: int | None = None
    seconds: float | None = None
    calls: int | None = None
    tokens: int | None = None
    ask: int | None = None
    """candidates a round"""
    lines: int | None = None
    """lines of the bank"""

    def within(self, config: SearchConfig) -> SearchConfig:
        """The configuration with its budgets lowered. Raises Invalid for a budget that is negative or beyond what the
        configuration allows."""
        new = {}
        for name in ("steps", "seconds", "calls", "tokens", "ask", "lines"):
            value, most = getattr(self, name), getattr(config, name)
            if value is None:
                continue
            most = most or {"seconds": MAX_SECONDS, "calls": MAX_CALLS, "tokens": 10_000_000, "lines": MAX_LINES}.get(
                name, most
            )
            least = 0 if name == "steps" else 1 if name != "seconds" else 0.01
            if not least <= value <= most:
                raise Invalid(f"budget.{name}={value:g} must be between {least:g} and {most:g} here.")
            new[name] = value
        return replace(config, **new)

    def scaled(self, config: SearchConfig, strength: float) -> SearchConfig:
        """`within`, and the rounds times `strength`: 0 retrieves from the bank, which is the base."""
        made = self.within(config)
        return replace(made, steps=min(MAX_STEPS, round(made.steps * strength)))
