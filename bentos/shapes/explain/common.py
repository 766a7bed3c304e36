"""What the shapes that explain have in common: one field and one guard for base beside patched, reads on the worker's
thread, and what lies sealed beside a patch, read once."""

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
from patches.families.clip.maps import Threshold
from registry.ab.ledger import BASE
from registry.errors import NotFound

T = TypeVar("T")

MAX_SIDE = 512
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=200, pattern=r"\S")]
Format = Literal["floats", "rle", "png"]


class Read(BaseModel):
    """What every question about a model's insides may say."""

    model_config = Strict
    model: Name | None = None
    """the patch that is asked about; by default the champion"""


class Compared(Read):
    """A question that base and patched can both be asked."""

    compare: bool = False
    """ask base and patched, side by side; needs the scope `compare`"""


class Segmentation(Compared):
    """Where a picture shows a text."""

    image: dict[str, Any] = Field(json_schema_extra=Image.model_json_schema())
    text: Text
    against: Text | None = None
    """contrastive: where the picture is rather the text than this"""
    threshold: Threshold = "otsu"
    """How the map is cut into a mask, of what speaks for the text; mean: the protocol of the literature, which takes
    half of every picture"""
    format: Annotated[list[Format], Field(min_length=1, max_length=3)] = ["floats"]
    side: Annotated[int, Field(ge=8, le=MAX_SIDE)] = 224
    """pixels of mask and overlay"""


class Explainer:
    """The base of the services that explain."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime

    def choice(self, request: Request, ask: Read | None = None) -> tuple[Table, Choice]:
        """Who is asked about: by header, body, query, else the champion. Raises Forbidden if both sides are wanted by a
        token without the scope `compare`."""
        self.desk.check_compare(request, isinstance(ask, Compared) and ask.compare)
        named = ask.model if ask is not None else request.query_params.get("model")
        return self.desk.choice(request, named or "champion")

    @staticmethod
    def sides(choice: Choice, compare: bool, alone: Literal["base", "patched"]) -> list[tuple[str, str | None]]:
        """(side, arm) of what is read: both with `compare`, else the one that the question is about."""
        both: list[tuple[str, str | None]] = [("base", None), ("patched", choice.arm)]
        return both if compare else [side for side in both if side[0] == alone]

    async def read(self, work: Callable[..., T], *args: Any, arm: str | None = None) -> T:
        """Run work(*args) on the worker's thread, between batches, without gradients, and with an arm's edits on."""

        def run() -> T:
            with torch.inference_mode(), self.runtime.subject.applied.rows([arm]) if arm else nullcontext():
                return work(*args)

        made: T = await asyncio.to_thread(self.runtime.call, run)
        return made

    async def pixels(self, image: dict[str, Any]) -> Tensor:
        """One picture as the base's processor makes it, (3, h, w). Raises BadRequest."""
        return await asyncio.to_thread(lambda: pictures.pixels(self.runtime, parse(Image, image).data))

    @staticmethod
    def said(out: dict[str, Any], table: Table, choice: Choice) -> Response:
        """The answer, with who gave it."""
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))


class Sealed(Generic[T]):
    """What lies sealed beside patches, read once and kept for the `kept` last asked for."""

    def __init__(self, read: Callable[[str], T], kept: int, what: str) -> None:
        """read: digest -> what lies there, on a thread of its own. what: it, in words, for who asks the base for it."""
        self._read, self._most, self._what = read, kept, what
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._reading = asyncio.Lock()

    async def of(self, digest: str) -> T:
        """What lies beside a patch. Raises NotFound for the base, and whatever `read` raises."""
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
        """Read it again when next asked for."""
        self._kept.pop(digest, None)
