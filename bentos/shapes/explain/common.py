"""Base of the explain shapes: the `compare` field and its guard, reads on the worker's thread, cached sealed data."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from bentos.desk import Desk, Strict, facts, headers
from bentos.http import answer, parse
from bentos.runtime.arms import Choice, Table
from bentos.shapes import pictures
from bentos.shapes.pictures import Image
from patches.families import clip
from patches.families.clip.maps import Threshold
from registry.ab.ledger import BASE
from registry.errors import NotFound

T = TypeVar("T")

MAX_SIDE = 512
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=200, pattern=r"\S")]
Format = Literal["floats", "rle", "png"]


class Read(BaseModel):
    """Fields that every question about a model's internals may have."""

    model_config = Strict
    model: Name | None = None
    """Patch that is asked about; by default the champion"""


class Compared(Read):
    """A question that can be asked of base and patched."""

    compare: bool = False
    """Answer for base and patched, side by side; needs the scope `compare`"""


class Segmentation(Compared):
    """Locate a text in an image."""

    image: dict[str, Any] = Field(json_schema_extra=Image.model_json_schema())
    text: Text
    against: Text | None = None
    """Contrastive text: locate where the image shows `text` rather than this"""
    threshold: Threshold = "otsu"
    """Threshold of the map's positive part; mean: the literature's protocol, which covers about half of every image"""
    format: Annotated[list[Format], Field(min_length=1, max_length=3)] = ["floats"]
    """Formats of the map: its values, its mask as run lengths, an overlay as PNG"""
    side: Annotated[int, Field(ge=8, le=MAX_SIDE)] = 224
    """Side in pixels of mask and overlay"""


class Explainer:
    """Base class of the services that explain."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime

    def choice(self, request: Request, ask: Read | None = None) -> tuple[Table, Choice]:
        """Choose the arm that is asked about: by header, body or query, else the champion; with `compare` the
        challenger.

        Raises Forbidden for `compare` by a token without that scope.
        """
        compare = isinstance(ask, Compared) and ask.compare
        named = ask.model if ask is not None else request.query_params.get("model")
        return self.desk.choice(request, named or (None if compare else "champion"), compare=compare)

    @staticmethod
    def sides(choice: Choice, compare: bool, alone: Literal["base", "patched"]) -> list[tuple[str, str | None]]:
        """Return the (side, arm) pairs to read: both with `compare`, else the one that the question is about."""
        both: list[tuple[str, str | None]] = [("base", None), ("patched", choice.arm)]
        return both if compare else [side for side in both if side[0] == alone]

    async def doubts(self, *texts: str | None) -> dict[str, list[str]]:
        """`warnings` for an answer: words that the base never learned. Raises Invalid for texts that are one to it."""
        given, base = [t for t in texts if t], self.runtime.base

        def look() -> list[str]:
            clip.check_told_apart(base, list(dict.fromkeys(given)))
            return clip.doubts(base, given)

        found = await self.read(look) if given else []
        return {"warnings": found} if found else {}

    async def read(self, work: Callable[..., T], *args: Any, arm: str | None = None) -> T:
        """Run work(*args) on the worker's thread, between batches, without gradients, with an arm's edits applied."""

        def run() -> T:
            with torch.inference_mode(), self.runtime.subject.applied.rows([arm]) if arm else nullcontext():
                return work(*args)

        made: T = await asyncio.to_thread(self.runtime.call, run)
        return made

    async def pixels(self, image: dict[str, Any]) -> Tensor:
        """Decode and preprocess one image: (3, h, w). Raises BadRequest."""
        return await asyncio.to_thread(lambda: pictures.pixels(self.runtime, parse(Image, image).data))

    @staticmethod
    def said(out: dict[str, Any], table: Table, choice: Choice) -> Response:
        """Build the response, with the facts of who answered."""
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))


class Sealed(Generic[T]):
    """Cache of data sealed beside patches, for the `kept` most recently used."""

    def __init__(self, read: Callable[[str], T], kept: int, what: str) -> None:
        """Create an empty cache. read: digest -> data, run on another thread; what: name of the data in messages."""
        self._read, self._most, self._what = read, kept, what
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._reading = asyncio.Lock()

    async def of(self, digest: str) -> T:
        """Return the data beside a patch. Raises NotFound for the base, and whatever `read` raises."""
        if digest == BASE:
            raise NotFound(f"The base has no {self._what}; name a patch as `model`, or promote one.")
        async with self._reading:
            if digest not in self._kept:
                self._kept[digest] = await asyncio.to_thread(self._read, digest)
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(digest)
            return self._kept[digest]

    def forget(self, digest: str) -> None:
        """Drop an entry, so that it is read again."""
        self._kept.pop(digest, None)
