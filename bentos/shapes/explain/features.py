"""API shape `explain`: SAE features of an image, feature cards, and the effect of steering by features.

`/v1/explain/encode`, `/v1/explain/steer`, `/v1/explain/features`, `/v1/explain/features/{feature}`,
`/v1/explain/examples`. Features are those of the dictionary sealed with a patch, read on the unpatched base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from bentos.desk import Desk
from bentos.http import Call
from bentos.shapes import pictures
from bentos.shapes.classify import Classifiers, Label, Templates, best
from bentos.shapes.explain.common import Explainer, Read, Sealed
from bentos.shapes.pictures import Image
from bentos.tokens import ANY
from patches import artifact
from patches.engine.patch import apply
from patches.engine.read import record
from patches.evidence import read_evidence, tensors
from patches.evidence.feature_cards import Cards, load_cards
from patches.families import clip
from patches.families.clip import maps
from patches.mechanisms.features import SAE, FeatureEdit, Op, edit
from patches.sae_files import load_sae
from registry.errors import BadRequest, NotFound, PatchError

KEPT = 3
"""Number of dictionaries in memory"""
MAX_STRENGTHS, MAX_FEATURES, MAX_SHOWN, MAX_EXAMPLES = 33, 512, 256, 16

Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Index = Annotated[int, Field(ge=0, lt=1 << 24)]


ABOUT = {"typographic": "writing"}
"""Task of an artifact -> what its edited features are about"""


class Encode(Read):
    """Encode an image into features of the dictionary sealed with a patch (POST /v1/explain/encode)."""

    image: dict[str, Any] = Field(json_schema_extra=Image.model_json_schema())
    top: Annotated[int, Field(ge=1, le=MAX_SHOWN)] = 16
    """Number of strongest features to return"""
    maps: bool = False
    """Whether to return each feature's activation at every token"""


class Steer(Read):
    """Classify an image while features are edited, at several strengths (POST /v1/explain/steer)."""

    image: dict[str, Any] = Field(json_schema_extra=Image.model_json_schema())
    labels: Annotated[list[Label], Field(min_length=2, max_length=1000)]
    """Class names for the zero-shot classification"""
    templates: Templates = Field(default_factory=lambda: list(clip.TEMPLATES))
    """Prompt templates with {} for the label"""
    features: Annotated[list[Index], Field(min_length=1, max_length=MAX_FEATURES)]
    """Indices of the edited features"""
    op: Op = "zero"
    value: Number = 0.0
    """Argument of `op`. clamp, cap, add: in multiples of each feature's largest known activation; scale: the factor"""
    tokens: Literal["all", "cls", "patches"] = "all"
    """Tokens at which features are edited"""
    strengths: Annotated[list[Annotated[float, Field(ge=0, le=2)]], Field(min_length=1, max_length=MAX_STRENGTHS)] = (
        Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    )
    """Strengths of the sweep, computed in one batch; 0 is exactly the base"""
    top: Annotated[int, Field(ge=1, le=1000)] = 5
    """Number of best labels to return"""


@dataclass(frozen=True)
class Dictionary:
    """The dictionary of an artifact and what is needed to read it."""

    sae: SAE
    site: str
    chosen: frozenset[int]
    """Features that the artifact's patch edits"""
    kept: Cards | None
    about: str = ""
    """Common meaning of the edited features, where the artifact's task gives one; their nearest words mislead then"""

    @property
    def cards(self) -> Cards:
        """The feature cards. Raises NotFound if the artifact has none."""
        if self.kept is None:
            raise NotFound("This artifact carries no feature cards; fit it again with a recipe that makes them.")
        return self.kept


class Service(Explainer):
    """Handlers of this shape's routes."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.classifiers = desk.shared(Classifiers)
        self.dictionaries = Sealed(self._read, KEPT, "dictionary")
        self.sealed = Sealed(self._examples, KEPT, "examples")

    async def encode(self, request: Request, ask: Encode) -> Response:
        """Answer POST /v1/explain/encode."""
        table, choice = self.choice(request, ask)
        one = await self.dictionaries.of(choice.digest)
        x = await self.pixels(ask.image)

        def look() -> tuple[Tensor, Tensor]:
            with record(self.runtime.base.model, [one.site]) as acts:
                clip.embed_images(self.runtime.base, x[None])
                z = acts[one.site][0][0].float()
                return z, one.sae.encode(z)

        z, f = await self.read(look)  # (T, D), (T, F)
        left = (z - one.sae.decode(f, z)).square().sum() / (z - z.mean(0)).square().sum()
        highest, where = f.max(0)
        top = highest.topk(min(ask.top, len(highest)))
        seen = []
        for j, a in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            if a <= 0:
                break
            fires = f[:, j] > 0
            entry = {"feature": j, "activation": a, "token": int(where[j]), "tokens": int(fires.sum())}
            entry |= {"mean": float(f[:, j].mean()), "edited": j in one.chosen}
            if one.about and j in one.chosen:
                entry["about"] = one.about
            if one.kept is not None:
                entry["words"] = [w["word"] for w in one.cards.card(j)["words"][:3]]
            seen.append(entry | ({"map": f[:, j].tolist()} if ask.maps else {}))
        out = {"object": "features", "site": one.site, "features": seen, "dictionary": len(highest)}
        out |= {"l0": float((f > 0).sum(1).float().mean()), "explained_variance": 1 - float(left)}
        return self.said(out, table, choice)

    async def steer(self, request: Request, ask: Steer) -> Response:
        """Answer POST /v1/explain/steer."""
        table, choice = self.choice(request, ask)
        one = await self.dictionaries.of(choice.digest)
        try:
            patch = edit(one.sae, one.site, ask.features, ask.op, self._value(ask, one), ask.tokens)
        except PatchError as e:
            raise BadRequest(f"features: {e}") from None
        weights = await self.classifiers.of(ask.labels, ask.templates)
        x = await self.pixels(ask.image)
        n, base = len(ask.strengths), self.runtime.base

        def look() -> Tensor:
            with apply(base.model, {"steer": patch}, root=base.root) as on, on.rows(["steer"] * n, ask.strengths):
                return clip.embed_images(base, x.expand(n, *x.shape), batch=n).cpu()

        p = ((await self.read(look)) @ weights).softmax(1)
        sweep = [{"strength": s, **best(row, ask.labels, ask.top)} for s, row in zip(ask.strengths, p, strict=True)]
        out = {"object": "steering", "site": one.site, "features": ask.features, "op": ask.op, "sweep": sweep}
        return self.said(out, table, choice)

    async def features(self, request: Request, _: None) -> Response:
        """List feature cards without images: of the features a patch edits, or the first by ?order=density|largest."""
        table, choice = self.choice(request)
        one = await self.dictionaries.of(choice.digest)
        order = request.query_params.get("order", "edited")
        if order == "edited":
            shown = sorted(one.chosen)[:MAX_SHOWN]
        elif order in ("density", "largest"):
            shown = getattr(one.cards, order).topk(min(MAX_SHOWN, len(one.cards.density))).indices.tolist()
        else:
            raise BadRequest(f"order={order[:40]!r} must be edited, density or largest.")
        cards = [{k: v for k, v in one.cards.card(j).items() if k != "pictures"} for j in shown]
        out = {"object": "list", "data": cards, "features": len(one.cards.density), "edited": len(one.chosen)}
        return self.said(out, table, choice)

    async def feature(self, request: Request, _: None) -> Response:
        """Return one feature's card, its images as data: URIs."""
        table, choice = self.choice(request)
        one = await self.dictionaries.of(choice.digest)
        name = request.path_params["feature"]
        if not (name.isascii() and name.isdigit() and len(name) < 9):
            raise NotFound(f"There is no feature {name[:40]!r}; features are numbers from 0.")
        card = one.cards.card(int(name))
        for seen in card["pictures"]:
            seen["png"] = maps.png(one.cards.thumbs[seen["picture"]])
        out = {**card, "edited": int(name) in one.chosen, "site": one.site}
        return self.said(out, table, choice)

    async def examples(self, request: Request, _: None) -> Response:
        """Return the images sealed with a patch, with their true classes and both sides' predictions in the fit."""
        table, choice = self.choice(request)
        return self.said({"object": "list", "data": await self.sealed.of(choice.digest)}, table, choice)

    def _examples(self, digest: str) -> list[dict[str, Any]]:
        folder = self.runtime.folder(digest)
        if not (folder / "examples.safetensors").is_file():
            raise NotFound("This artifact carries no examples.")
        said = read_evidence(folder)["examples"]
        images = tensors(folder, "examples.safetensors")["image"]
        return [
            {"png": maps.png(image), **{k: v[i] for k, v in said.items()}}
            for i, image in enumerate(images[:MAX_EXAMPLES])
        ]

    def _read(self, digest: str) -> Dictionary:
        folder = self.runtime.folder(digest)
        _, patch = artifact.load(folder, digest=digest)
        if not isinstance(patch, FeatureEdit) or not (folder / "sae").is_dir():
            raise NotFound(f"sha256:{digest[:16]} carries no dictionary of features.")
        try:
            cards = load_cards(folder)
        except NotFound:
            cards = None
        c = patch.config
        about = ABOUT.get(str(read_evidence(folder).get("task", "")), "")
        sae = load_sae(folder / "sae", str(self.runtime.base.device))
        return Dictionary(sae, c.site, frozenset(c.features), cards, about)

    @staticmethod
    def _value(ask: Steer, one: Dictionary) -> Tensor | float:
        if ask.op in ("zero", "scale"):
            return ask.value
        if one.kept is None:
            raise NotFound(
                f"op={ask.op!r} is given in multiples of a feature's largest activation, which this artifact does not "
                "know. Use zero or scale, or fit it again with a recipe that makes feature cards."
            )
        F = len(one.cards.largest)
        known = [j for j in ask.features if j < F]
        if len(known) < len(ask.features):
            raise BadRequest(f"features: there is no feature {max(ask.features)}; this dictionary has 0 to {F - 1}.")
        return ask.value * one.cards.largest[known]


ROUTES: Sequence[Call] = (
    Call("POST", "/v1/explain/encode", Service.encode, "explain", Encode, pictures.MAX_BODY_BYTES),
    Call("POST", "/v1/explain/steer", Service.steer, "explain", Steer, pictures.MAX_BODY_BYTES),
    Call("GET", "/v1/explain/examples", Service.examples, ANY),
    Call("GET", "/v1/explain/features", Service.features, ANY),
    Call("GET", "/v1/explain/features/{feature}", Service.feature, ANY),
)
