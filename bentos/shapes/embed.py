"""The shape `embed`: clips in; features, class scores, surprise, a reconstruction, a rollout or tracked masks out.

`POST /v1/video`, JSON or a multipart form: each clip is a file (video, animated GIF or WebP, zip of pictures) or a
list of pictures, and may name its own arm. Arms are models: base beside checkpoint with `patchbay.compare`. Clips are
decoded in a process of their own, two at a time; a clip that is refused costs its neighbours nothing.
`GET /v1/video` says what an arm can answer. `/v1/embeddings` is its own shape (`bentos.shapes.embeddings`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from bentos.desk import Desk, Extra, Strict, facts, headers
from bentos.http import Call, answer, parse, told
from bentos.runtime import Runtime
from bentos.runtime.arms import Choice
from bentos.shapes import films, waiting
from bentos.shapes.vectors import numbers
from bentos.tokens import ANY
from patches.families.pictures import MAX_BYTES
from patches.families.video import Clip, VideoModel
from patches.families.video.decode import Decoded, Limits, cropped, read, sample
from patches.families.video.worker import offers
from registry.errors import BadRequest, Invalid, NotReady, PatchbayError

MAX_BODY_BYTES = 96 << 20
MAX_CLIPS, MAX_FRAMES = 16, 128
LIMITS = Limits()
TOKENS = 4096
"""most numbers a layer's features are told as, token by token; more are told as their mean alone"""
Want = Literal["features", "tokens", "scores", "surprise", "reconstruction", "rollout", "track"]


class ClipIn(BaseModel):
    """One clip: a file as base64, or frames as pictures."""

    model_config = Strict
    data: Annotated[str, Field(min_length=1, max_length=LIMITS.max_bytes * 4 // 3 + 128)] | None = None
    """a video, an animated GIF or WebP, or a zip file of pictures, as base64 (a `data:` prefix is left out)"""
    frames: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_BYTES * 4 // 3 + 128)]],
        Field(min_length=2, max_length=MAX_FRAMES),
    ] | None = None  # fmt: skip
    mask: Annotated[str, Field(min_length=1, max_length=MAX_BYTES * 4 // 3 + 128)] | None = None
    """track: the first frame's objects as a PNG, each object its own grey or palette number, 0 the ground"""
    model: Annotated[str, Field(max_length=200)] | None = None
    """this clip's arm; by default the request's"""


class Video(BaseModel):
    """POST /v1/video"""

    model_config = Strict
    clips: Annotated[
        list[Any], Field(min_length=1, max_length=MAX_CLIPS, json_schema_extra={"items": ClipIn.model_json_schema()})
    ]
    """each is judged for itself"""
    wants: Annotated[list[Want], Field(min_length=1, max_length=7)] = Field(
        default_factory=lambda: list[Want](["scores"])
    )
    layer: Annotated[int, Field(ge=0, le=512)] | None = None
    """Layer that features, tokens and track are read from: 0 is the embedding; by default the last (for track the
    middle)"""
    stride: Annotated[int, Field(ge=0, le=64)] = 0
    """frames between two that the model sees; 0 spreads them over the whole clip"""
    start: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """seconds"""
    top: Annotated[int, Field(ge=1, le=1000)] = 5
    ratio: Annotated[float, Field(ge=0.05, le=0.95)] = 0.75
    mask: Literal["tube", "random"] = "tube"
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    given: Annotated[int, Field(ge=0, le=1024)] = 0
    """rollout: frames that are kept; 0 is half of the model's"""
    temperature: Annotated[float, Field(ge=0, le=4)] = 0.0
    top_k: Annotated[int, Field(ge=0, le=100_000)] = 0
    expected: bool = False
    """rollout: paint the mean of what may come, the picture of least squared error, in place of one code"""
    encoding: Literal["float", "base64"] = "float"
    """Form of the features in the answer: numbers, or little-endian float32 in base64"""
    model: Annotated[str, Field(max_length=200)] | None = None
    user: str | None = None
    patchbay: Extra = Field(default_factory=Extra)


@dataclass
class Entry:
    """One clip of a request: what became of it."""

    choice: Choice
    job: Clip | None = None
    beside: Clip | None = None
    about: dict[str, Any] = field(default_factory=dict)
    refused: PatchbayError | None = None

    @property
    def failed(self) -> PatchbayError | None:
        """Why it was not answered though it was sound."""
        return next((j.error for j in (self.job, self.beside) if j is not None and j.error is not None), None)


class Service:
    """The routes, for one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime
        self.decoding = asyncio.Semaphore(2)

    async def video(self, request: Request, ask: Video) -> Response:
        """Answer what is wanted of every clip."""
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user, ask.patchbay.compare)
        try:
            entries = await asyncio.gather(*(self._entry(request, ask, choice, values) for values in ask.clips))
            if all(e.refused for e in entries):
                assert entries[0].refused is not None
                raise entries[0].refused
            twin = self.desk.twin(choice)
            await run(self.runtime, [j for e in entries for j in (e.job, e.beside) if j is not None])
        except PatchbayError as e:
            await self.desk.expose(request, choice, e.status, start)
            raise
        status = max([e.failed.status for e in entries if e.failed and e.choice.arm == choice.arm], default=200)
        await self.desk.expose(request, choice, status, start)
        results = [await asyncio.to_thread(self._result, i, e, ask) for i, e in enumerate(entries)]
        if twin is not None:
            self.desk.later(self._shadow(request, twin, entries, results, ask))
        out = {"object": "video", "model": self.desk.model(choice), "results": results}
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def about(self, request: Request, _: None) -> Response:
        """Return what the model of an arm (query `model`, else the champion's) reads of a clip and can answer."""
        table, choice = self.desk.choice(request, request.query_params.get("model") or "champion")
        m = model_of(self.runtime, choice.arm)
        out = {
            "object": "video.about", "model": self.desk.model(choice), "wants": list(offers(m)), "frames": m.frames,
            "size": m.size, "layers": m.depth, "classes": list(m.classes or ()), "surprise_unit": m.unit,
        }  # fmt: skip
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def _entry(self, request: Request, ask: Video, choice: Choice, values: Any) -> Entry:
        try:
            clip = parse(ClipIn, values)
            if clip.model is not None:
                choice = self.desk.choice(request, clip.model, ask.user)[1]
                if choice.experiment is not None:
                    raise BadRequest("clips: a clip's own model cannot be auto; name that for the whole request.")
            async with self.decoding:
                decoded = await asyncio.to_thread(_decoded, clip)
            job, about = await asyncio.to_thread(self._job, clip, decoded, ask, choice.arm)
            beside = None
            if ask.patchbay.compare:
                beside = (await asyncio.to_thread(self._job, clip, decoded, ask, None))[0]
            return Entry(choice, job, beside, about)
        except PatchbayError as e:
            return Entry(choice, refused=e)

    def _job(self, clip: ClipIn, decoded: Decoded, ask: Video, arm: str | None) -> tuple[Clip, dict[str, Any]]:
        model = model_of(self.runtime, arm)
        frames, at = sample(decoded, model.frames, ask.stride, ask.start)
        objects = None
        if "track" in ask.wants:
            if clip.mask is None:
                raise BadRequest("track wants a mask: a PNG of the first frame's objects.")
            objects = films.mask(clip.mask, decoded.size, model.size)
        job = Clip(
            cropped(frames, model.size), tuple(dict.fromkeys(ask.wants)), ask.layer, ask.ratio, ask.mask, ask.seed,
            ask.given, ask.temperature, ask.top_k, ask.expected, objects, arm=arm, strength=ask.patchbay.strength,
        )  # fmt: skip
        self.runtime.worker.check([job])
        times = [round(float(decoded.times[i]), 4) for i in at]
        return job, {"frames": at, "seconds": times, "decoded": len(decoded.frames), "size": list(decoded.size)}

    def _result(self, index: int, entry: Entry, ask: Video) -> dict[str, Any]:
        refused = entry.refused or entry.failed
        if refused is not None:
            return {"index": index, **told(refused)}
        assert entry.job is not None
        out = {"index": index, "arm": entry.choice.label, "patch": entry.choice.digest, "sampling": entry.about}
        out |= answers(entry.job, model_of(self.runtime, entry.choice.arm), ask)
        if entry.beside is not None:
            out["base"] = answers(entry.beside, model_of(self.runtime, None), ask)
        return out

    async def _shadow(
        self, request: Request, twin: Choice, entries: Sequence[Entry], results: list[dict[str, Any]], ask: Video
    ) -> None:
        """The treatment's scores beside the control's, after the caller has theirs."""
        start = time.perf_counter()
        model = model_of(self.runtime, twin.arm)
        jobs = {
            i: Clip(e.job.video, ("scores",) if model.head else ("features",), arm=twin.arm, strength=e.job.strength)
            for i, e in enumerate(entries)
            if e.job is not None and e.job.video.shape[0] == model.frames and e.job.video.shape[-1] == model.size
        }
        with contextlib.suppress(PatchbayError):  # each says so in its own error
            await run(self.runtime, list(jobs.values()))
        theirs = [_best(j, model) for j in jobs.values()]
        self.desk.keep(request.state.number, twin, [results[i].get("label") for i in jobs], theirs)
        status = max([j.error.status for j in jobs.values() if j.error], default=200)
        await self.desk.expose(request, twin, status, start)


def model_of(runtime: Runtime, arm: str | None) -> VideoModel:
    """The model that answers for an arm."""
    found: VideoModel = runtime.subject.alone(arm).model
    return found


def _decoded(clip: ClipIn) -> Decoded:
    if (clip.data is None) == (clip.frames is None):
        raise BadRequest("clips: give each clip either data (one file) or frames (pictures), not both.")
    if clip.frames is not None:
        return films.stacked(clip.frames, LIMITS)
    assert clip.data is not None
    return read(films.unpacked(clip.data), LIMITS)


async def run(runtime: Runtime, jobs: Sequence[Clip]) -> None:
    """Queue clips and wait for all; one that failed says so in its `error`. Raises NotReady if it takes too long, and
    the error of the first if all failed."""
    await waiting.finished(runtime, jobs)
    if jobs and all(job.finished == "failed" for job in jobs):
        raise jobs[0].error or NotReady("This request failed; it is in the log. Try again.")


def answers(job: Clip, model: VideoModel, ask: Video) -> dict[str, Any]:
    """What one clip's answer holds."""
    out: dict[str, Any] = {}
    if job.scores is not None:
        p, at = job.scores.topk(min(ask.top, len(job.scores)))
        names = model.classes or tuple(str(i) for i in range(len(job.scores)))
        shown = [{"label": names[i], "probability": x} for i, x in zip(at.tolist(), p.tolist(), strict=True)]
        out |= {"label": shown[0]["label"], "scores": shown, "head": model.head}
    layer = model.depth if ask.layer is None else ask.layer
    if job.out is not None:
        out["features"] = {"layer": layer, "mean": numbers(job.out, ask.encoding)}
    if job.tokens is not None:
        told_ = {"layer": layer, "shape": list(job.tokens.shape), "grid": list(model.grid)}
        if job.tokens.numel() > TOKENS and ask.encoding == "float":
            raise Invalid(f"tokens are {job.tokens.numel()} numbers; ask for them with encoding=base64.")
        out["tokens"] = {**told_, "values": numbers(job.tokens, ask.encoding)}
    if job.surprise is not None:
        out["surprise"] = {"by_frame": [round(x, 5) for x in job.surprise.tolist()], "unit": model.unit}
    clip = job.video.float() / 255
    if job.hidden is not None and job.made is not None:
        seen = torch.where(job.hidden[:, None], torch.full_like(clip, 0.5), clip)
        out["reconstruction"] = {
            "strip": films.still([clip, seen, job.made]),
            "animation": films.animated([clip, seen, job.made]),
            "error": job.off,
            "ratio": ask.ratio,
            "mask": ask.mask,
            "borrows": borrowed(model),
        }
    if "rollout" in job.wants and job.made is not None:
        given = job.given or model.frames // 2
        out["rollout"] = {
            "animation": films.animated([clip, job.made], mark=given),
            "strip": films.still([clip, job.made]),
            "given": given,
            "drawn": model.frames - given,
            "nats": job.off,
            "expected": ask.expected,
        }
    if job.tracked is not None:
        out["track"] = {
            "masks": [films.labels(m) for m in job.tracked],
            "animation": films.overlaid(clip, job.tracked),
            "objects": int(job.tracked.max()),
        }
    return out


def borrowed(model: VideoModel) -> str:
    """What a reconstruction's picture takes from the clip that the model never saw."""
    config = getattr(getattr(model, "net", None), "config", None)
    parts = []
    if getattr(model, "still", "keep") != "keep":
        parts.append("what does not move")
    if getattr(config, "norm_pix_loss", False):
        parts.append("each hidden patch's mean and deviation")
    return " and ".join(parts) or "nothing"


def _best(job: Clip, model: VideoModel) -> str | None:
    if job.scores is None:
        return None
    at = int(job.scores.argmax())
    return model.classes[at] if model.classes else str(at)


ROUTES: tuple[Call, ...] = (
    Call("GET", "/v1/video", Service.about, ANY),
    Call("POST", "/v1/video", Service.video, "classify", Video, MAX_BODY_BYTES, files="clips"),
)
