"""Encode prompts as token ids, and decode answers to many prompts in one running batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from patches.families.base import Base
from patches.families.llm.table import TABLE
from patches.families.llm.worker import Decoder, Row
from registry.errors import Invalid

if TYPE_CHECKING:
    from patches.subject import Subject

__all__ = ["TABLE", "Prompt", "encode", "generate", "predict"]

Prompt = str | list[dict[str, str]]
"""A text, or a chat as a list of {role, content}"""


def encode(base: Base, prompt: Prompt, begun: bool = False) -> list[int]:
    """Tokenise a text, or a chat up to where the assistant speaks.

    begun: the last message is the beginning of the assistant's turn, which stays open.
    """
    tokenizer = base.processor
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def maker(base: Base, what: Prompt | Sequence[int], pictures: Sequence[Any] = (), begun: bool = False) -> Any:
    """Return a factory of rows for a text, a chat or token ids: factory(arm=..., max_tokens=...).

    Raises Invalid for pictures.
    """
    if pictures:
        raise Invalid(f"{base.name} reads text and sees no pictures; send text, or ask a vision-language model.")
    if isinstance(what, str) or (what and isinstance(what[0], Mapping)):
        return partial(Row, encode(base, cast(Prompt, what), begun))
    return partial(Row, list(cast(Sequence[int], what)))


def generate(
    subject: Subject, prompts: Sequence[Prompt], max_tokens: int = 32, arm: str | None = None, **how: Any
) -> list[str]:
    """Generate answers to texts or chats, all decoded in one running batch.

    arm: the arm to answer; by default the only one. how: fields of `Row`.
    """
    arm = arm if arm is not None else subject.only
    rows = [Row(encode(subject.base, p), arm=arm, max_tokens=max_tokens, **how) for p in prompts]
    Decoder(subject.base, subject.applied).run(rows)
    return [subject.base.processor.decode(r.out, skip_special_tokens=True) for r in rows]


def predict(subject: Subject, frame: Any, params: Mapping[str, Any]) -> list[str]:
    """Answer the prompts in a DataFrame's first column greedily. params: max_tokens, strength (0 is the base)."""
    prompts = [str(prompt) for prompt in frame.iloc[:, 0]]
    return generate(subject, prompts, int(params["max_tokens"]), strength=float(params["strength"]))
