"""Neurons over HTTP: what they say, what a picture shows in their words, where it shows it, what misleads a class.

`/v1/explain/neurons`, `/v1/explain/neurons/{layer}/{neuron}`, `/v1/explain/attributes`, `/v1/explain/segment`,
`/v1/explain/mine`. Cards are those sealed with a patch. Pictures are read on the base; with `patched` on the patch too.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from bentos.desk import Desk, Strict, facts, headers
from bentos.http import Call, answer, parse, told
from bentos.runtime.arms import Choice
from bentos.shapes import pictures
from bentos.shapes.classify import Classifiers, Label, Templates
from bentos.shapes.pictures import Image
from bentos.tokens import ANY
from patches import artifact
from patches.evidence.neuron_cards import (
    MINE_NEURONS,
    SEGMENT_NEURONS,
    SYNONYM,
    NeuronCards,
    Reader,
    Vote,
    attributes,
    load_neurons,
    mine,
    segment,
)
from patches.families import clip
from patches.families.clip import maps as heatmap
from patches.families.clip.maps import Threshold
from patches.families.pictures import Budget
from patches.mechanisms.neurons import NeuronEdit
from registry.ab.ledger import BASE
from registry.errors import BadRequest, NotFound, PatchbayError

KEPT = 2
"""readers in memory"""
MAX_IMAGES, MAX_SIDE, MAX_SHOWN, MAX_TOP, MAX_NEURONS, MAX_BLOCKED = 16, 512, 64, 100, 2000, 64
Format = Literal["floats", "rle", "png"]

Name = Annotated[str, Field(max_length=200)]
Images = Annotated[
    list[Any],
    Field(min_length=1, max_length=MAX_IMAGES, json_schema_extra={"items": Image.model_json_schema()}),
]
"""each is judged for itself"""


class Attributes(BaseModel):
    """POST /v1/explain/attributes"""

    model_config = Strict
    images: Images
    model: Name | None = None
    """the patch whose cards read; by default the champion's"""
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 16
    """texts to tell of"""
    patched: bool = False
    """read each picture with the patch on as well"""


class Segment(BaseModel):
    """POST /v1/explain/segment, as the shape `heads` has it, by the neurons that say the text."""

    model_config = Strict
    image: dict[str, Any] = Field(json_schema_extra=Image.model_json_schema())
    text: Label
    against: Label | None = None
    """contrastive: where the picture is rather the text than this"""
    way: Literal["neurons"] = "neurons"
    neurons: Annotated[int, Field(ge=1, le=MAX_NEURONS)] = SEGMENT_NEURONS
    """how many vote; fewer if there are fewer"""
    vote: Vote = "effect"
    """raw: mean activation, as published; signed, weighted: by what a neuron says of the text; effect: what all
    neurons of these layers add to the text through later heads, by patch"""
    threshold: Threshold = "otsu"
    format: Annotated[list[Format], Field(min_length=1, max_length=3)] = ["floats"]
    side: Annotated[int, Field(ge=8, le=MAX_SIDE)] = 224
    """pixels of mask and overlay"""
    model: Name | None = None
    patched: bool = False
    """read the picture with the patch on as well"""


class Mine(BaseModel):
    """POST /v1/explain/mine"""

    model_config = Strict
    true: Label
    wrong: Label
    templates: Templates = Field(default_factory=lambda: list(clip.TEMPLATES))
    neurons: Annotated[int, Field(ge=1, le=MAX_NEURONS)] = MINE_NEURONS
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 30
    blocked: Annotated[list[Label], Field(max_length=MAX_BLOCKED)] = Field(default_factory=list)
    """texts that share a word with one of these are left out"""
    synonym: Annotated[float, Field(ge=0, le=2)] = SYNONYM
    """texts at least as near to either class are left out; 2: none"""
    model: Name | None = None


class Service:
    """The routes, for one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime
        self.classifiers = desk.shared(Classifiers)
        self.kept: OrderedDict[str, tuple[Reader, NeuronEdit]] = OrderedDict()
        self.reading = asyncio.Lock()

    async def neurons(self, request: Request, _: None) -> Response:
        """Cards without pictures: of the neurons that the patch edits, or with ?order=spread|explained of a layer's
        first ones; ?layer= names it."""
        table, choice = self.desk.choice(request, request.query_params.get("model") or "champion")
        reader, patch = await self._reader(choice.digest)
        cards, order = reader.cards, request.query_params.get("order", "edited")
        number = patch.layer
        if (asked := request.query_params.get("layer")) is not None:
            number = _number(asked, "layer")
        known = cards.layer(number).known
        if order == "edited":
            shown = sorted(patch.config.neurons)[:MAX_SHOWN] if number == patch.layer else []
        elif order in ("spread", "explained"):
            by = known.spread if order == "spread" else known.explained_all
            shown = by.topk(min(MAX_SHOWN, len(by))).indices.tolist()
        else:
            raise BadRequest(f"order={order[:40]!r} must be edited, spread or explained.")
        made = [{k: v for k, v in self._card(reader, number, n, patch).items() if k != "pictures"} for n in shown]
        out = {"object": "list", "data": made, "layers": {str(k): len(v.told) for k, v in cards.layers.items()}}
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def neuron(self, request: Request, _: None) -> Response:
        """One card, its pictures as data: URIs."""
        table, choice = self.desk.choice(request, request.query_params.get("model") or "champion")
        reader, patch = await self._reader(choice.digest)
        layer, neuron = (_number(request.path_params[k], k) for k in ("layer", "neuron"))
        card = self._card(reader, layer, neuron, patch)
        for seen in card["pictures"]:
            seen["png"] = heatmap.png(reader.cards.thumbs[seen["picture"]])
        return answer({**card, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def attributes(self, request: Request, ask: Attributes) -> Response:
        self.desk.check_compare(request, ask.patched)  # both sides are told
        table, choice = self.desk.choice(request, ask.model or "champion")
        reader, _ = await self._reader(choice.digest)
        refused, good, x = await asyncio.to_thread(self._read_all, ask.images)

        def look() -> tuple[list[Any], list[int]]:
            return attributes(reader, x, ask.top)

        results: list[dict[str, Any]] = [{"index": i, **r} for i, r in enumerate(refused)]
        for side, on in self._sides(choice, ask.patched):
            found, active = await asyncio.to_thread(self.runtime.call, partial(self._under, on, look))
            for i, row, n in zip(good, found, active, strict=True):
                said = [
                    {
                        "text": a.text,
                        "weight": a.weight,
                        "neurons": [{"layer": at, "neuron": j, "adds": v} for at, j, v in a.neurons],
                    }
                    for a in row
                ]
                results[i][side] = {"attributes": said, "neurons_that_count": n}
        out = {"object": "attributes", "results": results}
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def segment(self, request: Request, ask: Segment) -> Response:
        self.desk.check_compare(request, ask.patched)  # both sides are told
        table, choice = self.desk.choice(request, ask.model or "champion")
        reader, _ = await self._reader(choice.digest)
        x = await asyncio.to_thread(lambda: pictures.pixels(self.runtime, parse(Image, ask.image).data))
        picture = self.runtime.base.processor.shown(x)
        count = min(ask.neurons, sum(len(one.told) for one in reader.cards.layers.values()))

        def look() -> Tensor:
            texts = clip.embed_texts(reader.base, [ask.text, *([ask.against] if ask.against else [])], clip.TEMPLATES)
            return segment(reader, x[None], texts, count, ask.vote)[0].cpu()

        out: dict[str, Any] = {"object": "segmentation", "text": ask.text, "against": ask.against, "side": ask.side}
        out |= {"way": ask.way, "neurons": count, "vote": ask.vote}
        for side, on in self._sides(choice, ask.patched):
            grids = await asyncio.to_thread(
                self.runtime.call, partial(self._under, on, look)
            )  # (1 or 2, rows, columns)
            grid = grids[0] - grids[1] if len(grids) == 2 else grids[0]
            out[side] = await asyncio.to_thread(heatmap.drawn, picture, grid, ask.threshold, ask.side, ask.format)
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def mine(self, request: Request, ask: Mine) -> Response:
        table, choice = self.desk.choice(request, ask.model or "champion")
        reader, _ = await self._reader(choice.digest)
        weights = await self.classifiers.of([ask.true, ask.wrong], ask.templates)  # refuses a class twice
        true, wrong = torch.nn.functional.normalize(weights.T, dim=1).to(self.runtime.base.device)
        count = min(ask.neurons, sum(len(one.told) for one in reader.cards.layers.values()))
        found, left = await asyncio.to_thread(
            lambda: mine(reader.cards, true, wrong, count, ask.top, ask.blocked, ask.synonym)
        )
        words = [
            {
                "text": m.text,
                "weight": m.weight,
                "neurons": [{"layer": at, "neuron": j, "adds": v} for at, j, v in m.neurons],
            }
            for m in found
        ]
        out = {"object": "list", "data": words, "left_out": left[:MAX_TOP], "neurons": count}
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    # ---- parts ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _sides(choice: Choice, patched: bool) -> list[tuple[str, str | None]]:
        """(name in the answer, arm): the base, and the patch if it is asked for."""
        return [("base", None), *([("patched", choice.arm)] if patched else [])]

    def _under(self, arm: str | None, look: Any) -> Any:
        """On the worker's thread, so that nobody else's rows are in the way."""
        with torch.inference_mode(), self.runtime.subject.applied.rows([arm]) if arm else nullcontext():
            return look()

    def _read_all(self, images: Sequence[Any]) -> tuple[list[dict[str, Any]], list[int], Tensor]:
        """What is wrong with each picture ({} if nothing), which are good, and those (B, 3, h, w). Raises what is wrong
        with the first if none is good."""
        refused: list[dict[str, Any]] = []
        good: list[Tensor] = []
        first: PatchbayError | None = None
        budget = Budget()
        for values in images:
            try:
                image = parse(Image, values)
                if image.model is not None:
                    raise BadRequest("images: a picture's own model cannot be named here; name one for the request.")
                good.append(pictures.pixels(self.runtime, image.data, budget))
                refused.append({})
            except PatchbayError as e:
                first = first or e
                refused.append(told(e))
        if not good:
            assert first is not None
            raise first
        return refused, [i for i, r in enumerate(refused) if not r], torch.stack(good)

    @staticmethod
    def _card(reader: Reader, layer: int, neuron: int, patch: NeuronEdit) -> dict[str, Any]:
        edited = layer == patch.layer and neuron in patch.config.neurons
        return {**reader.cards.card(layer, neuron, reader.heads()), "edited": edited}

    async def _reader(self, digest: str) -> tuple[Reader, NeuronEdit]:
        """The cards sealed with a patch, on the base. Raises NotFound if there are none."""
        if digest == BASE:
            raise NotFound("The base has no neuron cards; name a patch as `model`, or promote one.")
        async with self.reading:
            if digest not in self.kept:
                self.kept[digest] = await asyncio.to_thread(self._load, digest)
                while len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(digest)
            return self.kept[digest]

    def _load(self, digest: str) -> tuple[Reader, NeuronEdit]:
        folder = self.runtime.folder(digest)
        _, patch = artifact.load(folder, digest=digest)
        if not isinstance(patch, NeuronEdit):
            raise NotFound(f"sha256:{digest[:16]} edits no neurons, so it carries no cards of them.")
        cards: NeuronCards = load_neurons(folder)
        with torch.inference_mode():
            return Reader.of(self.runtime.base, cards), patch


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise NotFound(f"There is no {what} {text[:40]!r}; layers and neurons are numbers from 0.")
    return int(text)


ROUTES: Sequence[Call] = (
    Call("GET", "/v1/explain/neurons", "neurons", ANY),
    Call("GET", "/v1/explain/neurons/{layer}/{neuron}", "neuron", ANY),
    Call(
        "POST", "/v1/explain/attributes", "attributes", "explain", Attributes, pictures.MAX_BODY_BYTES, files="images"
    ),
    Call("POST", "/v1/explain/segment", "segment", "explain", Segment, pictures.MAX_BODY_BYTES),
    Call("POST", "/v1/explain/mine", "mine", "explain", Mine),
)
