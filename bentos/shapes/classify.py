"""API shape `classify`: zero-shot classification of images by labels in words, or by the label set sealed with a patch.

`/v1/classify`, JSON or a multipart form. Every image of a batch may name its own arm. `patchbay.compare` answers with
base and patched side by side.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from bentos.desk import Desk, Extra, Strict, facts, headers
from bentos.http import Call, answer, parse, told
from bentos.runtime import Runtime
from bentos.runtime.arms import Choice, Table
from bentos.shapes import pictures
from bentos.shapes.pictures import Image, Images
from patches.evidence import label_set
from patches.evidence.label_set import LabelSet
from patches.families import clip
from patches.families.clip.worker import Picture
from patches.families.pictures import Budget
from registry.ab.ledger import BASE
from registry.errors import BadArtifact, BadRequest, PatchbayError, TooLarge

MAX_LABELS, MAX_TEMPLATES, MAX_TEXTS = 1000, 80, 8000
"""Limits on labels, on templates, and on texts (labels x templates)"""
KEPT_NUMBERS, KEPT_SETS = 4 << 20, 64
"""Limits on kept classifiers: their numbers in total (16 MB), and the number of sealed label sets"""

Label = Annotated[str, Field(max_length=200, pattern=r"\S")]
Labels = Annotated[list[Label], Field(min_length=2, max_length=MAX_LABELS)]
Templates = Annotated[list[Annotated[str, Field(max_length=200, pattern=r"\{\}")]], Field(min_length=1, max_length=80)]


class Classify(BaseModel):
    """Classify images (POST /v1/classify)."""

    model_config = Strict
    images: Images
    labels: Labels | None = None
    """Class names; by default the label set sealed with the chosen patch, else with the champion or the challenger"""
    templates: Templates = Field(default_factory=lambda: list(clip.TEMPLATES))
    """Prompt templates with {} for the label; text embeddings are averaged over them"""
    top: Annotated[int, Field(ge=1, le=MAX_LABELS)] = 5
    """Number of best labels to return"""
    model: Annotated[str, Field(max_length=200)] | None = None
    user: str | None = None
    """Unit of an experiment; see `unit_of`"""
    patchbay: Extra = Field(default_factory=Extra)


@dataclass
class Entry:
    """One image of a request, and what became of it."""

    choice: Choice
    """Arm that this image was given to"""
    job: Picture | None = None
    beside: Picture | None = None
    """The same image for the base, with `compare`"""
    refused: PatchbayError | None = None
    """Why the image was not accepted"""

    @property
    def failed(self) -> PatchbayError | None:
        """Why a valid image was not embedded."""
        return next((p.error for p in (self.job, self.beside) if p is not None and p.error is not None), None)


class Classifiers:
    """Cache of zero-shot classifiers (k, C), times the logit scale, on the CPU. Used on the worker's thread."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.kept: OrderedDict[tuple[tuple[str, ...], ...], Tensor] = OrderedDict()
        self.doubts: OrderedDict[tuple[str, ...], list[str]] = OrderedDict()
        """labels -> what a caller should know of them, the latest"""
        self.sealed: OrderedDict[str, LabelSet | None] = OrderedDict()
        """Digest -> sealed label set; None for an artifact without one"""

    async def carried(self, table: Table, choice: Choice) -> tuple[LabelSet, str]:
        """Return the label set of the chosen patch, else of the champion, else of the challenger, and its digest.

        Raises BadRequest if none has one.
        """
        for digest in (choice.digest, table.champion, table.challenger):
            if digest and digest != BASE and (found := await asyncio.to_thread(self._read, digest)) is not None:
                return found, digest
        raise BadRequest("labels: none are given, and no patch that is served here carries a label set. Name some.")

    def _read(self, digest: str) -> LabelSet | None:
        if digest not in self.sealed:
            folder, base = self.runtime.folder(digest), self.runtime.base
            found: LabelSet | None = None
            if (folder / label_set.FILE).is_file():
                found = label_set.load_label_set(folder, digest)
                if len(found.weights) != base.model.visual.proj.shape[1]:
                    raise BadArtifact(f"The label set of sha256:{digest[:16]} is none of {base.name}.")
                found = LabelSet(found.labels, clip.logit_scale(base) * found.weights)
            self.sealed[digest] = found
            while len(self.sealed) > KEPT_SETS:
                self.sealed.popitem(last=False)
        return self.sealed[digest]

    async def of(self, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return the classifier of these labels.

        Raises BadRequest for duplicate labels, TooLarge for more than MAX_TEXTS texts.
        """
        if len(labels) * len(templates) > MAX_TEXTS:
            raise TooLarge(f"{len(labels)} labels x {len(templates)} templates are more than {MAX_TEXTS} texts.")
        key = (tuple(labels), tuple(templates))
        found = self.kept.get(key)
        if found is not None:  # avoids waiting for the worker
            return found
        made: Tensor = await asyncio.to_thread(self.runtime.call, lambda: self._make(*key))
        return made

    @torch.inference_mode()
    def _make(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        base = self.runtime.base
        engine = self.runtime.worker.engines.get(None)
        tower = partial(engine, "text") if engine is not None else None
        made = clip.logit_scale(base) * clip.zero_shot(base, labels, templates, tower).cpu()
        self.kept[labels, templates] = made
        self.doubts[labels] = clip.doubts(base, labels)  # on this thread: tokenizers are not for two at once
        while len(self.doubts) > KEPT_SETS:
            self.doubts.popitem(last=False)
        while len(self.kept) > 1 and sum(w.numel() for w in self.kept.values()) > KEPT_NUMBERS:
            self.kept.popitem(last=False)
        return made


class Service:
    """Handlers of this shape's routes."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime
        self.classifiers = desk.shared(Classifiers)

    async def classify(self, request: Request, ask: Classify) -> Response:
        """Answer POST /v1/classify."""
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user, ask.patchbay.compare)
        try:
            by, sealed = await self._label_set(table, choice, ask)
            budget = Budget()
            entries = await asyncio.to_thread(
                lambda: [self._entry(request, ask, choice, values, budget) for values in ask.images]
            )
            if all(e.refused for e in entries):
                assert entries[0].refused is not None
                raise entries[0].refused
            twin = self.desk.twin(choice)
            await self.desk.prepare([e.job for e in entries if e.job is not None], ask.patchbay.ask)
            await pictures.embed(self.runtime, [p for e in entries for p in (e.job, e.beside) if p is not None])
        except PatchbayError as e:
            await self.desk.expose(request, choice, e.status, start)
            raise
        # an image on which its arm failed counts as that arm's failure, though the others are answered
        status = max([e.failed.status for e in entries if e.failed and e.choice.arm == choice.arm], default=200)
        await self.desk.expose(request, choice, status, start)
        results = [self._result(i, e, by, ask.top) for i, e in enumerate(entries)]
        if twin is not None:
            self.desk.later(self._shadow(request, twin, entries, results, by))
        out = {"object": "classification", "model": self.desk.model(choice), "results": results}
        if doubts := self.classifiers.doubts.get(tuple(ask.labels or ())):
            out["warnings"] = doubts
        if sealed:
            out["label_set"] = f"sha256:{sealed[:16]}"
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def _label_set(self, table: Table, choice: Choice, ask: Classify) -> tuple[LabelSet, str]:
        """Return the request's classifier, times the logit scale, and the digest of its patch ("" for labels in
        words)."""
        if ask.labels is None:
            return await self.classifiers.carried(table, choice)
        return LabelSet(tuple(ask.labels), await self.classifiers.of(ask.labels, ask.templates)), ""

    def _entry(self, request: Request, ask: Classify, choice: Choice, values: Any, budget: Budget) -> Entry:
        try:
            image = parse(Image, values)
            if image.model is not None:
                choice = self.desk.choice(request, image.model, ask.user)[1]
                if choice.experiment is not None:
                    raise BadRequest("images: a picture's own model cannot be auto; name that for the whole request.")
            x = pictures.pixels(self.runtime, image.data, budget)
        except PatchbayError as e:
            return Entry(choice, refused=e)
        job = Picture(x, arm=choice.arm, strength=ask.patchbay.strength)
        return Entry(choice, job, Picture(x) if ask.patchbay.compare else None)

    def _result(self, index: int, entry: Entry, by: LabelSet, top: int) -> dict[str, Any]:
        if entry.refused is not None:
            return {"index": index, **told(entry.refused)}
        if entry.failed is not None:
            return {"index": index, **told(entry.failed)}
        assert entry.job is not None
        label, digest = entry.choice.shown
        out = {"index": index, "arm": label, "patch": digest}
        out |= scores(entry.job, by, top)
        return out | {"base": scores(entry.beside, by, top)} if entry.beside is not None else out

    async def _shadow(
        self, request: Request, twin: Choice, entries: list[Entry], results: list[dict[str, Any]], by: LabelSet
    ) -> None:
        """Classify with the treatment arm of a shadow experiment, after the caller has the control's answer."""
        start = time.perf_counter()
        jobs = {
            i: Picture(e.job.pixels, arm=twin.arm, strength=e.job.strength)
            for i, e in enumerate(entries)
            if e.job is not None
        }
        await pictures.embed(self.runtime, list(jobs.values()))
        control = [results[i].get("label") for i in jobs]
        treatment = [scores(p, by, 1)["label"] if p.out is not None else None for p in jobs.values()]
        self.desk.keep(request.state.number, twin, control, treatment)
        status = max([p.error.status for p in jobs.values() if p.error], default=200)
        await self.desk.expose(request, twin, status, start)


def scores(picture: Picture, by: LabelSet, top: int) -> dict[str, Any]:
    """Return the best label of an embedded image, and the `top` best with probabilities."""
    assert picture.out is not None
    return best(by.logits(picture.out[None])[0].softmax(0), by.classes, top)


def best(p: Tensor, labels: Sequence[str], top: int) -> dict[str, Any]:
    """Return the best label of probabilities p (C,), and the `top` best with probabilities."""
    values, at = p.topk(min(top, len(labels)))
    shown = [{"label": labels[i], "probability": x} for i, x in zip(at.tolist(), values.tolist(), strict=True)]
    return {"label": shown[0]["label"], "scores": shown}


ROUTES: tuple[Call, ...] = (
    Call("POST", "/v1/classify", Service.classify, "classify", Classify, pictures.MAX_BODY_BYTES, files="images"),
)
