"""What a run of attention_sink may set, and its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from registry.config import STRICT

Context = Literal["chat", "prefix", "bos"]


@dataclass(frozen=True)
class Config:
    """What to fit and how to measure it."""

    __pydantic_config__ = STRICT

    base: str = "pypi:smollm2"
    """reference of a decoder language model with Llama's layout"""
    device: str = "cpu"
    seed: int = 0
    method: Literal["auto", "paper", "damp"] = "auto"
    """paper: silence the last stage's neurons away from the first token, or at repeats these and their echoes.
    damp: repeated-key damping alone.
    auto: whatever repeats best on the fitting words, among all combinations that keep perplexity"""
    limits: tuple[float, ...] = (4.0, 8.0)
    """copies that may weigh in full; tried in this order"""
    run_limits: tuple[float, ...] = (8.0,)
    """the same within one run, in every later layer"""
    fit_words: int = 8
    fit_contexts: tuple[Context, ...] = ("chat", "prefix")
    fit_copies: int = 512
    """longest run the candidates are judged on; what it is worth beyond, the test says"""
    test_words: int = 50
    copies: tuple[int, ...] = (4, 16, 64, 256, 512, 1024)
    """lengths at which the next token is judged; one forward over the longest serves all"""
    contexts: tuple[Context, ...] = ("chat", "prefix", "bos")
    continue_after: int = 200
    continue_tokens: int = 32
    """greedy continuation: a word counts if all of these are right; 0 skips it"""
    documents: int = 8
    """per source of text"""
    document_tokens: int = 512
    perplexity_bound: float = 1.002
    """a candidate's perplexity on fitting text, as a multiple of the base's"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny:planted", fit_words=6, test_words=8, copies=(4, 16, 64, 128), contexts=("prefix", "bos"),
        fit_contexts=("prefix", "bos"), continue_after=100, continue_tokens=4, documents=2, document_tokens=48,
        limits=(4.0,), run_limits=(),
    ),
    "smollm": Config(),
    "demo": Config(
        limits=(4.0,), run_limits=(), fit_words=3, fit_contexts=("prefix",), test_words=10, copies=(4, 64, 256, 512),
        contexts=("prefix",), continue_tokens=16, documents=3, document_tokens=256,
    ),
    "gemma": Config(base="pypi:gemma3"),
    "paper": Config(
        base="hf-hub:meta-llama/Llama-2-7b-hf", device="cuda", method="paper", copies=(64, 256, 1024, 2048)
    ),
}  # fmt: skip
