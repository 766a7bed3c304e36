"""The former name of `patches.subject`, which MLflow models that were pushed before it import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patches.families import llm
from patches.subject import Subject


class PatchedModel(Subject):
    """A subject with what old pyfuncs of language models call."""

    def generate(self, prompts: Sequence[Any], max_tokens: int = 32, arm: str | None = None, **how: Any) -> list[str]:
        """Answers to texts or chats; see `llm.generate`."""
        return llm.generate(self, prompts, max_tokens, arm, **how)


__all__ = ["PatchedModel"]
