"""Config of attention_sink and its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from registry import gate
from registry.config import STRICT
from registry.gate import Promise

Context = Literal["chat", "prefix", "bos"]


@dataclass(frozen=True)
class Config:
    """What to fit and how to measure it."""

    __pydantic_config__ = STRICT

    base: str = "pypi:smollm2"
    """Reference of a decoder language model with Llama's layout"""
    device: str = "cpu"
    """Where it runs; several with commas (cuda:0,cuda:1) for a model too large for one"""
    seed: int = 0
    method: Literal["auto", "paper", "damp"] = "auto"
    """Candidate patches. paper: silence the last stage's neurons away from the first token, or these and their echoes
    at repeats. damp: repeated-key damping alone. auto: all combinations; the one that repeats best on the fitting words
    within the perplexity bound is taken"""
    limits: tuple[float, ...] = (4.0, 8.0)
    """Candidate limits of damping in the first attention: copies of a token that keep their full weight"""
    run_limits: tuple[float, ...] = (8.0,)
    """Candidate limits within one unbroken run, in every later layer"""
    fit_words: int = 8
    """Number of words on which candidates are judged"""
    fit_contexts: tuple[Context, ...] = ("chat", "prefix")
    """Kinds of prompt before the copies on which candidates are judged"""
    fit_copies: int = 512
    """Longest run that candidates are judged on; longer ones are only tested"""
    test_words: int = 50
    """Number of words of which results are reported"""
    copies: tuple[int, ...] = (4, 16, 64, 256, 512, 1024)
    """Run lengths after which the next token is judged; one forward over the longest serves all"""
    contexts: tuple[Context, ...] = ("chat", "prefix", "bos")
    """Kinds of prompt before the copies of which results are reported"""
    continue_after: int = 200
    """Number of copies before the greedy continuation"""
    continue_tokens: int = 32
    """Tokens of the greedy continuation that must all be right for a word to count; 0 skips it"""
    documents: int = 8
    """Documents per kind of text"""
    document_tokens: int = 512
    """Largest number of tokens per document"""
    perplexity_bound: float = 1.002
    """Largest perplexity on fitting text, as a multiple of the base's"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny:planted", fit_words=6, test_words=8, copies=(4, 16, 64, 128), contexts=("prefix", "bos"),
        fit_contexts=("prefix", "bos"), continue_after=100, continue_tokens=4, documents=2, document_tokens=48,
        limits=(4.0,), run_limits=(),
    ),
    "smollm": Config(),
    "demo": Config(
        limits=(4.0,), run_limits=(), fit_words=3, fit_contexts=("prefix",), test_words=6, copies=(4, 64, 320),
        contexts=("prefix",), continue_tokens=8, documents=2, document_tokens=256,
    ),
    "gemma": Config(base="pypi:gemma3"),
    "paper": Config(
        base="hf-hub:meta-llama/Llama-2-7b-hf", device="cuda", method="paper", copies=(64, 256, 1024, 2048)
    ),
}  # fmt: skip


def promises(recipe: str, config: Config) -> tuple[Promise, ...]:
    """More words repeated after the longest run, text predicted as before, hardly any time."""
    longest = f"quality/repeat_{config.contexts[0]}_{max(config.copies)}"
    dear = recipe == "tiny"
    few = recipe in ("tiny", "demo")  # six words cannot make a gain sure
    return (
        gate.gain(longest, sure=not few), gate.ratio("quality/perplexity_prose", 1.05 if dear else 1.01),
        gate.latency(20.0 if dear else 3.0 if few else 1.5),
    )  # fmt: skip
