"""The paper's numbers for base and patched alike, on pictures nothing was chosen on. The patch works automatically."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.families.vlm import PictureDecoder
from patches.mechanisms.erase import ROW, EraseEdit
from patches.subject import Subject
from registry.measure import Measure
from training.vlm_erasure import measure
from training.vlm_erasure.chair import POPE, answers, pope
from training.vlm_erasure.config import Config
from training.vlm_erasure.data import Seen, ask, see
from training.vlm_erasure.fit import confidence, scenes


def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, float | Measure]:
    """CHAIR, recall and the absent partner on biased pictures, the same on neutral ones (the lab's), and POPE."""
    patch: Any = subject.arms[arm] if arm is not None else None
    out: dict[str, float | Measure] = {}
    for part, prefix in (("test", ""), *([("test:neutral", "neutral_")] if config.pictures == "lab" else [])):
        seen = see(subject.base, scenes(config, part), config.question, config.max_tokens)
        said, sure = captioned(subject, seen, config, patch)
        found = measure.chair(said, seen.scenes.there, seen.scenes.partner)
        for name in ("chair_i", "chair_s", "partner"):
            if name in found:
                out[f"target/{prefix}{name}"] = found[name]
        for name in ("recall", "mentions"):
            out[f"quality/{prefix}{name}"] = found[name]
        if not prefix:
            for kind in POPE:
                got = questions(subject, seen, kind, config, patch, sure)
                out[f"quality/pope_{kind}"] = got["accuracy"]
                out[f"target/pope_{kind}_false_yes"] = got["false_yes"]
    return out


def captioned(subject: Subject, seen: Seen, config: Config, patch: EraseEdit | None) -> tuple[Tensor, Tensor | None]:
    """(N, C) what is named: by the base, or after the automatic erasure; and the confidence that it went by."""
    said = measure.captions(subject, seen)
    if patch is None:
        return said.mask, None
    sure = confidence(subject, seen, patch)
    new, _ = measure.automatic(subject, seen, said.mask, sure, patch.config.limit, patch, patch.config.rounds)
    return new, sure


def questions(
    subject: Subject, seen: Seen, kind: str, config: Config, patch: EraseEdit | None, sure: Tensor | None
) -> dict[str, Measure]:
    """POPE of one kind. Patched: a thing asked for that the tokens do not show is erased before the answer."""
    g = torch.Generator().manual_seed(config.seed)
    made = pope(seen.scenes.there, seen.scenes.partner, kind, g)
    names = seen.scenes.names
    text = "Is there a {}?" if config.pictures == "lab" else "Is there a {} in the image? Answer yes or no."
    prompts = {c: ask(subject.base, text.format(names[c]), seen) for c in sorted(set(made.ask.tolist()))}
    table = {}
    if patch is not None and sure is not None:
        low = {
            c for i, c in zip(made.picture.tolist(), made.ask.tolist(), strict=True) if sure[i, c] < patch.config.limit
        }
        table = (
            dict(zip(sorted(low), patch.directions(subject.base, [names[c] for c in sorted(low)]), strict=True))
            if low
            else {}
        )
        subject.add("asked", patch)
    jobs, token = [], subject.base.processor.image_token
    for i, c in zip(made.picture.tolist(), made.ask.tolist(), strict=True):
        erase = patch is not None and sure is not None and float(sure[i, c]) < patch.config.limit
        jobs.append(
            seen.row(
                i, seen.asked(prompts[c], i, token), max_tokens=2, arm="asked" if erase else None,
                params={ROW: table[c][None]} if erase else {},
            )
        )  # fmt: skip
    try:
        PictureDecoder(subject.base, subject.applied, measure.SLOTS).run(jobs)
    finally:
        if patch is not None:
            subject.remove("asked")
    decode = subject.base.processor.decode
    yes = torch.tensor([decode(j.out, skip_special_tokens=True).strip().lower().startswith("yes") for j in jobs])
    return answers(yes, made)
