"""Embed images and texts with a CLIP base, and build zero-shot classifiers from texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.families.base import Base
from registry.errors import Invalid

TEMPLATES = ("a picture of a {}", "a photo of a {}", "a drawing of a {}")


# ---- embeddings ------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed_images(base: Base, images: Any, batch: int = 64) -> Tensor:
    """Embed images to unit vectors (N, k) float32 on the base's device. Applied patches take effect.

    images: as `Processor.image` takes them, or its result. Inside `Applied.rows`, batch must hold all of them.
    """
    many = images if isinstance(images, Tensor | Sequence) else [images]
    out = []
    for i in range(0, len(many), batch):
        x = many[i : i + batch]
        x = x if isinstance(x, Tensor) and x.is_floating_point() else base.processor.image(x)
        x = x.to(base.device, base.model.visual.proj.dtype)
        out.append(base.model(image=x)["image_features"].float())
    if not out:
        raise Invalid("There is no image to embed; give at least one.")
    return torch.cat(out)


@torch.no_grad()
def embed_texts(
    base: Base, texts: Sequence[str], templates: Sequence[str] = ("{}",), batch: int = 256,
    tower: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Embed texts to unit vectors (N, k) float32: each text in every template, averaged and normalised again.

    tower: function from token ids (B, context) to (B, k), instead of the base's own tower. Raises Invalid for no text
    or a template without {}.
    """
    if not texts or isinstance(texts, str):
        raise Invalid(f"Texts must be a list with at least one string, not {texts!r:.60}.")
    if bad := [t for t in templates if "{}" not in t]:
        raise Invalid(f"Template {bad[0][:60]!r} has no {{}} where the text goes.")
    own = lambda ids: base.model(text=ids)["text_features"]  # noqa: E731
    filled = [t.replace("{}", text) for text in texts for t in templates]
    parts = [
        (tower or own)(base.processor.text(filled[i : i + batch]).to(base.device)).float()
        for i in range(0, len(filled), batch)
    ]
    return F.normalize(torch.cat(parts).unflatten(0, (len(texts), -1)).mean(1), dim=-1)


def zero_shot(
    base: Base, labels: Sequence[str], templates: Sequence[str] = TEMPLATES,
    tower: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Build zero-shot classifier weights (k, C): logits are logit_scale(base) * features @ weights.

    Raises Invalid for no labels, for duplicates, and for two that the tokenizer maps to the same tokens.
    """
    if not labels:
        raise Invalid("A classifier needs labels; name at least one.")
    if double := next((x for x, n in Counter(labels).items() if n > 1), None):
        raise Invalid(f"Label {double[:60]!r} occurs twice; labels must differ.")
    check_told_apart(base, labels)
    return embed_texts(base, labels, templates, tower=tower).T


def check_told_apart(base: Base, labels: Sequence[str]) -> None:
    """Raises Invalid naming two labels that are the same tokens: in another case or spacing, cut off at the context, or
    made of words that the tokenizer does not know, which are all one to it."""
    seen: dict[bytes, str] = {}
    for label, ids in zip(labels, base.processor.text(labels).cpu().numpy(), strict=True):
        first = seen.setdefault(ids.tobytes(), label)
        if first != label:
            lost = sorted({w for text in (first, label) for w in unknown_words(base, [text]).get(text, [])})
            why = (
                f"does not know {', '.join(repr(w[:40]) for w in lost[:4])}"
                if lost
                else "makes the same tokens of both"
            )
            raise Invalid(
                f"Labels {first[:60]!r} and {label[:60]!r} cannot be told apart: the tokenizer of {base.name} {why}. "
                "Use other words, or one of the two."
            )


def unknown_words(base: Base, texts: Sequence[str]) -> dict[str, list[str]]:
    """text -> its words that the base's tokenizer does not know; texts without such are left out. Tokenizers that spell
    what they do not know, as CLIP's own does, know every word."""
    inner = getattr(base.processor.tokenizer, "tokenizer", None)
    lost = getattr(inner, "unk_token_id", None)
    if inner is None or lost is None:
        return {}
    words = {text: re.findall(r"\w+|[^\w\s]+", text) for text in texts}
    every = sorted({w for some in words.values() for w in some})
    ids = inner(every, add_special_tokens=False)["input_ids"] if every else []
    odd = {w for w, tokens in zip(every, ids, strict=True) if lost in tokens}
    return {text: found for text, some in words.items() if (found := [w for w in some if w in odd])}


def doubts(base: Base, texts: Sequence[str], most: int = 8) -> list[str]:
    """What a caller should know of texts: the words that the base never learned, of at most `most` of them."""
    lost = unknown_words(base, texts)
    said = []
    for text, words in list(lost.items())[:most]:
        named, one = ", ".join(repr(w[:40]) for w in words[:8]), len(words) == 1
        said.append(
            f"{base.name} does not know the word{'' if one else 's'} {named} in {text[:60]!r}, and takes "
            f"{'it' if one else 'them'} for any unknown word."
        )
    return said + ([f"Nor words in {len(lost) - most} other texts."] if len(lost) > most else [])


def logit_scale(base: Base) -> float:
    """Return the factor of cosines before the softmax; 100 for most trained models."""
    return float(base.model.logit_scale.detach().exp())
