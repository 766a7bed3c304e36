"""Pictures and questions in, texts out: rows made from chats, and answers decoded in one running batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from patches.families import pictures
from patches.families.base import Base
from patches.families.vlm.processor import Prompt
from patches.families.vlm.worker import Picture, PictureDecoder
from registry.errors import Invalid

if TYPE_CHECKING:
    from patches.subject import Subject


def encode(base: Base, prompt: Any, images: Sequence[Image.Image] = (), begun: bool = False) -> Prompt:
    """Ids and pixels of a text, or of a chat whose parts name the pictures in order. Raises Invalid."""
    return base.processor.prompt(prompt, images, begun)  # type: ignore[no-any-return]


def row(base: Base, prompt: Any, images: Sequence[Image.Image] = (), begun: bool = False, **how: Any) -> Picture:
    """A row for the worker. how: fields of `Picture`."""
    made = encode(base, prompt, images, begun)
    return Picture(made.ids, pixels=made.pixels, **how)


def maker(base: Base, what: Any, images: Sequence[Image.Image] = (), begun: bool = False) -> Any:
    """What makes rows of a text, a chat or token ids with pictures: maker(...)(arm=..., max_tokens=...)."""
    if not isinstance(what, str) and what and isinstance(what[0], int):
        return partial(Picture, list(what))
    made = encode(base, what, images, begun)
    return partial(Picture, made.ids, pixels=made.pixels)


def question(text: str, count: int) -> list[dict[str, Any]]:
    """A user's message with `count` pictures before the text."""
    return [{"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": text}]}]


def generate(
    subject: Subject, asked: Sequence[tuple[str, Sequence[Image.Image]]], max_tokens: int = 64, arm: str | None = None,
    asks: Sequence[Any] | None = None, **how: Any,
) -> list[Picture]:  # fmt: skip
    """Answered rows to (text, pictures), all decoded in one running batch.

    arm: whose answers; by default the only arm there is. asks: what each row says to its mechanism, checked already.
    """
    arm = arm if arm is not None else subject.only
    worker = PictureDecoder(subject.base, subject.applied)
    rows = [
        row(subject.base, question(text, len(images)), images, arm=arm, max_tokens=max_tokens, **how)
        for text, images in asked
    ]
    patch: Any = subject.arms.get(arm) if arm is not None else None
    if asks is not None and patch is not None:
        for one, ask in zip(rows, asks, strict=True):
            if ask is not None:
                patch.prepare(one, ask, subject.base, worker.run)
    worker.run(rows)
    return rows


def predict(subject: Subject, frame: Any, params: Mapping[str, Any]) -> list[str]:
    """Greedy answers to the rows of a DataFrame: `image` (base64 or a data URL), `prompt`, `ask` (JSON of the
    mechanism's Ask), each optional. params: max_tokens, strength (0 is the base)."""
    asked, asks = [], []
    patch: Any = subject.arms.get(subject.only) if subject.only else None
    for record in frame.to_dict("records"):
        image, text, ask = (_text(record.get(k)) for k in ("image", "prompt", "ask"))
        if not image and not text:
            raise Invalid("A row has neither image nor prompt; give one of them.")
        asked.append((text or "Describe the picture.", [pictures.read(image)] if image else []))
        if ask and (patch is None or patch.Ask is None):
            raise Invalid("ask: this model has no patch that takes anything from a row; leave it out.")
        asks.append(patch.Ask.model_validate(_json(ask)) if ask else None)
    rows = generate(subject, asked, int(params["max_tokens"]), asks=asks, strength=float(params["strength"]))
    return [subject.base.processor.decode(r.out, skip_special_tokens=True) for r in rows]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Invalid(f"ask: {text[:40]!r} is no JSON.") from None
