"""The shape `embeddings`: OpenAI's `POST /v1/embeddings` for pictures and clips, and for texts where a model has them.

    {"input": ["data:image/png;base64,...", "data:video/mp4;base64,..."], "model": "champion"}

An input is a `data:` URI (or plain base64) of a picture or a clip. A video model takes a picture as a clip in which
nothing moves; CLIP takes pictures alone, and texts as they are. Answers are unit vectors in the order of the inputs,
and the `model` that answered. `encoding_format` is float or base64, as OpenAI has it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as nnf
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from bentos.desk import Desk, Extra, facts, headers
from bentos.http import Call, answer
from bentos.runtime import Runtime
from bentos.shapes import pictures
from bentos.shapes.neutral import Body
from bentos.shapes.vectors import entries
from patches.families.pictures import read as read_picture
from registry.errors import BadRequest, PatchbayError

if TYPE_CHECKING:
    from patches.families.clip.worker import Picture
    from patches.families.video import Clip

MAX_INPUTS = 64
MAX_INPUT = 64 << 20
MAX_BODY_BYTES = 96 << 20
Input = Annotated[str, Field(min_length=1, max_length=MAX_INPUT)]


class Embeddings(Body):
    """POST /v1/embeddings"""

    input: Input | Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS)]
    model: Annotated[str, Field(max_length=200)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=65536)] | None = None
    """the first so many numbers, normalised again"""
    user: str | None = None
    patchbay: Extra = Field(default_factory=Extra)


class Service:
    """The route, for one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime

    async def embeddings(self, request: Request, ask: Embeddings) -> Response:
        """Unit vectors of all inputs by one arm."""
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user)
        if ask.patchbay.compare:
            raise BadRequest("patchbay.compare: embeddings of two models are two requests; name each in `model`.")
        inputs = [ask.input] if isinstance(ask.input, str) else ask.input
        try:
            of = _clip if self.runtime.base.family == "clip" else _video
            vectors = await of(self.runtime, inputs, choice.arm, ask.patchbay.strength)
            data = entries(list(vectors), ask.dimensions, ask.encoding_format)
        except PatchbayError as e:
            await self.desk.expose(request, choice, e.status, start)
            raise
        await self.desk.expose(request, choice, 200, start)
        usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
        out = {"object": "list", "data": data, "model": self.desk.model(choice), "usage": usage}
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))


def _pictured(text: str) -> bool:
    return text.startswith("data:image/") and not text.startswith(("data:image/gif", "data:image/webp"))


async def _video(runtime: Runtime, inputs: list[str], arm: str | None, strength: float) -> Tensor:
    """Mean features of clips, and of pictures shown as long as a clip."""
    # what the other family needs takes seconds to import, and a service has one
    from bentos.shapes import embed, films
    from patches.families.video import Clip
    from patches.families.video.decode import Limits, cropped, fit, read

    model = embed.model_of(runtime, arm)

    def made(text: str, index: int) -> Clip:
        try:
            if _pictured(text):
                pixels = torch.from_numpy(np.asarray(read_picture(text)).copy()).permute(2, 0, 1)
                video = cropped(pixels[None].contiguous(), model.size).expand(model.frames, -1, -1, -1).contiguous()
            else:
                video = fit(read(films.unpacked(text), Limits()), model.frames, model.size)
        except PatchbayError as e:
            raise type(e)(f"input {index}: {e}") from None
        return Clip(video, ("features",), arm=arm, strength=strength)

    jobs = [await asyncio.to_thread(made, text, i) for i, text in enumerate(inputs)]
    await embed.run(runtime, jobs)
    return _stacked(jobs)


async def _clip(runtime: Runtime, inputs: list[str], arm: str | None, strength: float) -> Tensor:
    """CLIP's features of pictures and of texts, which share one space. Texts are embedded by the base's text tower."""
    from patches.families import clip as clips
    from patches.families.clip.worker import Picture

    shown = {i: text for i, text in enumerate(inputs) if text.startswith("data:")}
    written = [text for i, text in enumerate(inputs) if i not in shown]
    jobs: list[Picture] = []
    for i, text in shown.items():
        try:
            pixels = await asyncio.to_thread(pictures.pixels, runtime, text)
        except PatchbayError as e:
            raise type(e)(f"input {i}: {e}") from None
        jobs.append(Picture(pixels, arm=arm, strength=strength))
    await pictures.embed(runtime, jobs)
    texts = iter(())
    if written:
        rows = await asyncio.to_thread(
            runtime.call, lambda: clips.embed_texts(runtime.base, written, ("{}",)).float().cpu()
        )
        texts = iter(rows)
    of = iter(_stacked(jobs)) if jobs else iter(())
    return torch.stack([next(of) if i in shown else next(texts) for i in range(len(inputs))])


def _stacked(jobs: list[Any]) -> Tensor:
    """Unit vectors (n, d). Raises the error of the first job that failed."""
    for job in jobs:
        if job.error is not None:
            raise job.error
    return nnf.normalize(torch.stack([job.out for job in jobs]).float(), dim=1)


ROUTES: tuple[Call, ...] = (Call("POST", "/v1/embeddings", Service.embeddings, "classify", Embeddings, MAX_BODY_BYTES),)
