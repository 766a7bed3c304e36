"""API shape `neurons`: neuron cards, images described and segmented by neurons, mined misleading words.

`/v1/explain/neurons`, `/v1/explain/neurons/{layer}/{neuron}`, `/v1/explain/attributes`, `/v1/explain/segment`,
`/v1/explain/mine`. Cards are those sealed with a patch. Images are read on the base; with `compare` also on the patch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from bentos.desk import Desk
from bentos.http import Call, parse, told
from bentos.shapes import pictures
from bentos.shapes.classify import Classifiers, Label, Templates
from bentos.shapes.explain.common import Compared, Explainer, Read, Sealed, Segmentation
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
    text_maps,
)
from patches.families import clip
from patches.families.clip import maps
from patches.families.pictures import Budget
from patches.mechanisms.neurons import NeuronEdit
from registry.errors import BadRequest, NotFound, PatchbayError

KEPT = 2
"""Number of readers in memory"""
MAX_IMAGES, MAX_SHOWN, MAX_TOP, MAX_NEURONS, MAX_BLOCKED = 16, 64, 100, 2000, 64

Images = Annotated[
    list[Any],
    Field(min_length=1, max_length=MAX_IMAGES, json_schema_extra={"items": Image.model_json_schema()}),
]
"""List of images, each validated on its own"""


class Attributes(Compared):
    """Describe images by texts of their significant neurons (POST /v1/explain/attributes)."""

    images: Images
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 16
    """Number of texts to return"""


class Segment(Segmentation):
    """Locate a text in an image by neurons' activations (POST /v1/explain/segment); for heads see the shape `heads`."""

    way: Literal["neurons"] = "neurons"
    neurons: Annotated[int, Field(ge=1, le=MAX_NEURONS)] = SEGMENT_NEURONS
    """Number of neurons that vote; at most all there are"""
    vote: Vote = "effect"
    """Weighting of the vote. raw: mean activation, as published; signed, weighted: by each neuron's cosine with the
    text; effect: what all neurons of these layers contribute to the text through later heads, by patch"""


class Mine(Read):
    """Mine words that mislead from the true to the wrong class (POST /v1/explain/mine)."""

    true: Label
    """Class from which images should be misled"""
    wrong: Label
    """Class to which they should be misled"""
    templates: Templates = Field(default_factory=lambda: list(clip.TEMPLATES))
    neurons: Annotated[int, Field(ge=1, le=MAX_NEURONS)] = MINE_NEURONS
    """Number of neurons that vote"""
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 30
    """Number of words to return"""
    blocked: Annotated[list[Label], Field(max_length=MAX_BLOCKED)] = Field(default_factory=list)
    """Texts that share a word with one of these are left out"""
    synonym: Annotated[float, Field(ge=0, le=2)] = SYNONYM
    """Cosine from which a text counts as a synonym of either class and is left out; 2: none"""


class Service(Explainer):
    """Handlers of this shape's routes."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.classifiers = desk.shared(Classifiers)
        self.readers = Sealed(self._load, KEPT, "neuron cards")

    async def neurons(self, request: Request, _: None) -> Response:
        """List neuron cards without images: of the edited neurons, or a layer's first by ?order=spread|explained.

        ?layer= names the layer.
        """
        table, choice = self.choice(request)
        reader, patch = await self.readers.of(choice.digest)
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
        return self.said(out, table, choice)

    async def neuron(self, request: Request, _: None) -> Response:
        """Return one neuron's card, its images as data: URIs."""
        table, choice = self.choice(request)
        reader, patch = await self.readers.of(choice.digest)
        layer, neuron = (_number(request.path_params[k], k) for k in ("layer", "neuron"))
        card = self._card(reader, layer, neuron, patch)
        for seen in card["pictures"]:
            seen["png"] = maps.png(reader.cards.thumbs[seen["picture"]])
        return self.said(card, table, choice)

    async def attributes(self, request: Request, ask: Attributes) -> Response:
        """Answer POST /v1/explain/attributes."""
        table, choice = self.choice(request, ask)
        reader, _ = await self.readers.of(choice.digest)
        refused, good, x = await asyncio.to_thread(self._read_all, ask.images)

        results: list[dict[str, Any]] = [{"index": i, **r} for i, r in enumerate(refused)]
        for side, arm in self.sides(choice, ask.compare, "base"):
            found, active = await self.read(attributes, reader, x, ask.top, arm=arm)
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
        return self.said(out, table, choice)

    async def segment(self, request: Request, ask: Segment) -> Response:
        """Answer POST /v1/explain/segment."""
        table, choice = self.choice(request, ask)
        reader, _ = await self.readers.of(choice.digest)
        x = await self.pixels(ask.image)
        picture = self.runtime.base.processor.shown(x)
        count = min(ask.neurons, sum(len(one.told) for one in reader.cards.layers.values()))

        def look() -> Tensor:
            texts = clip.embed_texts(reader.base, [ask.text, *([ask.against] if ask.against else [])], clip.TEMPLATES)
            return text_maps(reader, x[None], texts, count, ask.vote)[0].cpu()

        out: dict[str, Any] = {"object": "segmentation", "text": ask.text, "against": ask.against, "side": ask.side}
        out |= await self.doubts(ask.text, ask.against)
        out |= {"way": ask.way, "neurons": count, "vote": ask.vote}
        for side, arm in self.sides(choice, ask.compare, "base"):
            grids = await self.read(look, arm=arm)  # (1 or 2, rows, columns)
            grid = grids[0] - grids[1] if len(grids) == 2 else grids[0]
            out[side] = await asyncio.to_thread(maps.drawn, picture, grid, ask.threshold, ask.side, ask.format)
        return self.said(out, table, choice)

    async def mine(self, request: Request, ask: Mine) -> Response:
        """Answer POST /v1/explain/mine."""
        table, choice = self.choice(request, ask)
        reader, _ = await self.readers.of(choice.digest)
        weights = await self.classifiers.of([ask.true, ask.wrong], ask.templates)  # refuses a duplicate class
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
        return self.said(out, table, choice)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _read_all(self, images: Sequence[Any]) -> tuple[list[dict[str, Any]], list[int], Tensor]:
        """Read images: an error for each ({} if none), the indices of the readable ones, and those (B, 3, h, w).

        Raises the first error if none is readable.
        """
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
    Call("GET", "/v1/explain/neurons", Service.neurons, ANY),
    Call("GET", "/v1/explain/neurons/{layer}/{neuron}", Service.neuron, ANY),
    Call(
        "POST",
        "/v1/explain/attributes",
        Service.attributes,
        "explain",
        Attributes,
        pictures.MAX_BODY_BYTES,
        files="images",
    ),
    Call("POST", "/v1/explain/segment", Service.segment, "explain", Segment, pictures.MAX_BODY_BYTES),
    Call("POST", "/v1/explain/mine", Service.mine, "explain", Mine),
)
