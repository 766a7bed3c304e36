"""PatchedModel: one base, any number of patches on it, one call. What evaluations, MLflow and services run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from patches import artifact
from patches.engine.patch import ONLY, Applied, Patch, apply
from patches.families.base import Base, load_base
from patches.families.llm.worker import Decoder, Row
from registry.errors import WrongBase
from registry.systems import system


class PatchedModel:
    """A base with arms. Arms come and go while it runs; rows of one batch may use different ones."""

    def __init__(self, base: Base, patches: Mapping[str, Patch] | None = None) -> None:
        self.base = base
        self.folder: Path | None = None
        """the sealed folder it was loaded from, for what else is in it"""
        arms = {name: patch.to(base.device) for name, patch in (patches or {}).items()}
        self.applied: Applied = apply(base.model, arms, root=base.root)

    @classmethod
    def load(cls, folder: Path | str, base: Base | str | None = None, device: str = "cpu") -> PatchedModel:
        """The sealed patch in `folder` as the arm "patch", on `base` (or the base it names). Everything is verified."""
        folder = Path(folder)
        about, patch = artifact.load(folder)
        if not isinstance(base, Base):
            base = load_base(base or about.base.rpartition("@")[0], system(about.system).families[0], device)
        if about.base_digest != base.digest:
            raise WrongBase(f"{folder} was made from {about.base}, not from {base.label}. Fit it again on this base.")
        model = cls(base, {ONLY: patch})
        model.folder = folder
        return model

    def __call__(self, rows: Sequence[str | None] | None = None, **inputs: Any) -> Any:
        """The base's own forward by keyword, rows as `Applied.rows`. Gradients off."""
        with torch.inference_mode():
            if rows is None:
                return self.base.model(**inputs)
            with self.applied.rows(rows):
                return self.base.model(**inputs)

    def generate(
        self, prompts: Sequence[str | list[dict[str, str]]], max_tokens: int = 32, arm: str | None = None, **how: Any
    ) -> list[str]:
        """Answers to texts or chats (lists of {role, content}), all decoded in one running batch.

        arm: whose answers; by default the only arm there is. how: fields of `patches.families.llm.worker.Row`.
        """
        arm = arm if arm is not None else (ONLY if ONLY in self.applied.arms else None)
        rows = [Row(self.encode(p), arm=arm, max_tokens=max_tokens, **how) for p in prompts]
        Decoder(self.base, self.applied).run(rows)
        return [self.base.processor.decode(r.out, skip_special_tokens=True) for r in rows]

    def encode(self, prompt: str | list[dict[str, str]], begun: bool = False) -> list[int]:
        """Token ids of a text, or of a chat up to where the assistant speaks.

        begun: the last message is what the assistant has said so far; its turn stays open.
        """
        tokenizer = self.base.processor
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        text = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def close(self) -> None:
        """Take every patch off; the base is bit for bit what it was."""
        self.applied.revert()
