"""API shape `heads`: attention heads' contributions to an image's embedding, their maps, and nearest images per head.

`/v1/explain/decompose`, `/v1/explain/heads`, `/v1/explain/heads/{head}`, `/v1/explain/segment`,
`/v1/explain/neighbours`, `/v1/explain/gallery`. Heads' names and a first gallery are those sealed with a patch. A
caller's own gallery is sealed under its digest, which is its only name: no path comes from a request.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from bentos.desk import Desk
from bentos.http import Call, answer, parse, told
from bentos.runtime import Runtime
from bentos.runtime.arms import Choice
from bentos.shapes import pictures
from bentos.shapes.explain.common import Compared, Explainer, Name, Read, Sealed, Segmentation, Text
from bentos.shapes.pictures import Image, Images
from bentos.tokens import ANY
from patches.evidence import content
from patches.evidence.gallery import Gallery, Metric, joined, load_gallery, make_gallery, save_gallery
from patches.families import clip
from patches.families.clip import maps
from patches.families.clip.direct import Lens
from patches.families.pictures import Budget, guarded, read
from registry import manifest
from registry.ab.experiment import OWNER
from registry.ab.ledger import BASE
from registry.errors import BadRequest, Conflict, NotFound, PatchbayError, TooLarge
from registry.home import home, part_prefix, swept

MAX_TEXTS, MAX_HEADS, MAX_TOP = 64, 256, 64
MAX_GALLERY, MAX_GALLERIES, KEPT = 4096, 64, 3
"""Limits on images per uploaded gallery, on uploaded galleries on this machine, and on galleries in memory"""

HeadName = Annotated[str, Field(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")]
"""Head as layer.head, both 0-based"""
Heads = Annotated[list[HeadName], Field(min_length=1, max_length=MAX_HEADS)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Decompose(Compared):
    """Decompose an image's embedding into direct contributions (POST /v1/explain/decompose).

    Under a patch; with `compare` also of the base.
    """

    image: dict[str, Any] = Field(json_schema_extra=Image.model_json_schema())
    texts: Annotated[list[Text], Field(max_length=MAX_TEXTS)] = Field(default_factory=list)
    """Texts with whose cosine contributions are expressed; without any, contributions are given by their norms"""
    level: Literal["layer", "head"] = "head"
    """Whether contributions are summed per layer or given per head"""
    share: Literal["own", "apportioned"] = "own"
    """How LayerNorm's centring is distributed over components"""
    vectors: bool = False
    """Whether to return the heads' contributions (L, H, k) as float16 in base64"""


class Segment(Segmentation):
    """Locate a text in an image by heads' direct contributions (POST /v1/explain/segment).

    Under a patch; with `compare` also of the base.
    """

    heads: Heads | None = None
    """Heads to use; by default all"""


class Neighbours(Read):
    """Find the images nearest to an image or a text in some heads (POST /v1/explain/neighbours).

    Exactly one of image and text; in the heads named, or in all heads of a property.
    """

    image: Annotated[dict[str, Any] | None, Field(json_schema_extra=Image.model_json_schema())] = None
    text: Text | None = None
    heads: Heads | None = None
    property: Name | None = None
    """Property whose heads are searched, by the names sealed with the patch"""
    metric: Metric = "centred"
    """Comparison of contributions: as they are (raw), by cosine, or less the gallery's mean (centred)"""
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 8
    """Number of images to return"""
    gallery: Digest | None = None
    """Digest of an uploaded gallery; by default the one sealed with the patch"""
    thumbs: bool = True
    """Whether to return thumbnails"""


class Upload(Read):
    """Upload images as a gallery (POST /v1/explain/gallery)."""

    images: Images
    names: Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=pictures.MAX_IMAGES)] | None = None
    """Names of the images; by default their indices"""
    gallery: Digest | None = None
    """Digest of a gallery to extend; the result is a new gallery with this one as its parent"""


def _lens(runtime: Runtime) -> Lens:
    return Lens(runtime.base)


class Service(Explainer):
    """Handlers of this shape's routes."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.kept = Sealed(self._read, KEPT, "gallery")
        self.names = Sealed(self._found, KEPT, "names of heads")
        self.sealing = asyncio.Lock()

    # ---- one picture ---------------------------------------------------------------------------------------------

    async def decompose(self, request: Request, ask: Decompose) -> Response:
        """Answer POST /v1/explain/decompose."""
        table, choice = self.choice(request, ask)
        x = await self.pixels(ask.image)

        def look() -> dict[str, Any]:
            lens = self.desk.shared(_lens)
            parts = lens.read(x[None], share=ask.share)
            per = parts.norm[:, None]
            heads, mlps, bias, rest = (c[0] / per[0] for c in (parts.heads, parts.mlps, parts.bias, parts.rest))
            if ask.texts:
                T = clip.embed_texts(lens.base, ask.texts).T
                said = [(c @ T).tolist() for c in (heads.sum(1) if ask.level == "layer" else heads, mlps, bias)]
            else:
                said = [c.norm(dim=-1).tolist() for c in (heads.sum(1) if ask.level == "layer" else heads, mlps, bias)]
            out: dict[str, Any] = dict(zip(("heads", "mlps", "bias"), said, strict=True))
            out |= {"rest": float(rest.abs().max()), "norm": float(parts.norm), "sigma": float(parts.sigma)}
            if ask.texts:
                out["cosine"] = ((parts.y[0] / per[0]) @ T).tolist()
            if ask.vectors:
                raw = heads.half().cpu().contiguous().numpy().tobytes()
                out["vectors"] = {"shape": list(heads.shape), "float16": base64.b64encode(raw).decode()}
            return out

        out: dict[str, Any] = {"object": "decomposition", "level": ask.level, "share": ask.share, "texts": ask.texts}
        out |= await self.doubts(*(ask.texts or ()))
        for side, arm in self.sides(choice, ask.compare and choice.digest != BASE, "patched"):
            out |= {"base": await self.read(look)} if side == "base" else await self.read(look, arm=arm)
        return self.said(out, table, choice)

    async def segment(self, request: Request, ask: Segment) -> Response:
        """Answer POST /v1/explain/segment."""
        table, choice = self.choice(request, ask)
        heads = [_head(h) for h in ask.heads] if ask.heads else None
        x = await self.pixels(ask.image)

        def look() -> Tensor:
            lens = self.desk.shared(_lens)
            if heads:
                _check_heads(lens, heads)
            texts = clip.embed_texts(lens.base, [ask.text, *([ask.against] if ask.against else [])])
            return maps.grid(lens, x[None], texts, heads)[0].cpu()

        out: dict[str, Any] = {"object": "segmentation", "text": ask.text, "against": ask.against, "side": ask.side}
        out |= await self.doubts(ask.text, ask.against)
        picture = self.runtime.base.processor.shown(x)
        for side, arm in self.sides(choice, ask.compare and choice.digest != BASE, "patched"):
            grids = await self.read(look, arm=arm)  # (1 or 2, g, g)
            shown = grids[0] - grids[1] if len(grids) == 2 else grids[0]
            drawn = await asyncio.to_thread(maps.drawn, picture, shown, ask.threshold, ask.side, ask.format)
            out |= {"base": drawn} if side == "base" else drawn
        return self.said(out, table, choice)

    # ---- names of heads ------------------------------------------------------------------------------------------

    async def heads(self, request: Request, _: None) -> Response:
        """List every head's label and first texts, and metrics of the naming; ?label=... selects one label."""
        table, choice = self.choice(request)
        found = await self.names.of(choice.digest)
        wanted = request.query_params.get("label")
        rows = [h for h in found["heads"] if wanted is None or h["label"] == wanted]
        if wanted is not None and not rows:
            names = sorted({h["label"] for h in found["heads"]})
            raise NotFound(f"No head is called {wanted[:40]!r}. Labels: {', '.join(names)}.")
        data = [
            {**{k: h[k] for k in ("layer", "head", "label", "source", "score", "p", "explained")},
             "texts": [t["text"] for t in h["texts"][:3]]}
            for h in rows
        ]  # fmt: skip
        out = {"object": "list", "data": data, "properties": found["properties"], "metrics": found["metrics"]}
        return self.said(out, table, choice)

    async def head(self, request: Request, _: None) -> Response:
        """Return everything known about one head, `layer.head`."""
        table, choice = self.choice(request)
        found = await self.names.of(choice.digest)
        name = request.path_params["head"]
        rows = [h for h in found["heads"] if f"{h['layer']}.{h['head']}" == name]
        if not rows:
            first, last = found["heads"][0], found["heads"][-1]
            raise NotFound(
                f"There is no head {name[:20]!r}; heads are layer.head, here {first['layer']}.{first['head']} to "
                f"{last['layer']}.{last['head']}."
            )
        out = {"object": "head", **rows[0], "properties": found["properties"]}
        out["trail"] = [t for t in found["trail"] if (t["layer"], t["head"]) == (rows[0]["layer"], rows[0]["head"])]
        return self.said(out, table, choice)

    # ---- galleries -----------------------------------------------------------------------------------------------

    async def neighbours(self, request: Request, ask: Neighbours) -> Response:
        """Answer POST /v1/explain/neighbours."""
        table, choice = self.choice(request, ask)
        if (ask.image is None) == (ask.text is None):
            raise BadRequest("Give exactly one of image and text to look for.")
        if (ask.heads is None) == (ask.property is None):
            raise BadRequest("Give exactly one of heads and property to look in.")
        heads = [_head(h) for h in ask.heads] if ask.heads else await self._of(choice, ask.property or "")
        gallery = await self._gallery(choice.digest, ask.gallery, request.state.token.tenant)
        gallery.place(heads)
        x = await self.pixels(ask.image) if ask.image is not None else None

        def look() -> Tensor:
            lens = self.desk.shared(_lens)
            if x is None:
                return clip.embed_texts(lens.base, [ask.text or ""])[0].cpu()
            parts = lens.read(x[None])
            given = parts.heads[0, list(gallery.layers)] / parts.norm[0]
            return gallery.ask(given.cpu(), heads, ask.metric)

        query = await self.read(look)
        rows, scores = await asyncio.to_thread(gallery.nearest, query, heads, ask.top, ask.metric)
        data = []
        for i, score in zip(rows.tolist(), scores.tolist(), strict=True):
            data.append({"picture": i, "name": gallery.names[i], "score": score})
            if ask.thumbs:
                data[-1]["png"] = maps.png(gallery.thumbs[i])
        out: dict[str, Any] = {"object": "neighbours", "data": data, "metric": ask.metric}
        out |= {"heads": [f"{a}.{b}" for a, b in heads], **await self.doubts(ask.text)}
        return self.said(out, table, choice)

    async def galleries(self, request: Request, _: None) -> Response:
        """List the galleries that can be searched: the one sealed with a patch, and uploaded ones by digest."""
        table, choice = self.choice(request)
        data = [
            {"gallery": d.name}
            for d in sorted(_place(request.state.token.tenant).iterdir())
            if re.fullmatch("[0-9a-f]{64}", d.name)
        ]
        out: dict[str, Any] = {"object": "list", "data": data, "sealed": None}
        if choice.digest != BASE:
            try:
                sealed = await self._gallery(choice.digest, None, "")
                out["sealed"] = {"pictures": len(sealed), "layers": list(sealed.layers), "kept": sealed.kept}
            except NotFound:
                pass
        return self.said(out, table, choice)

    async def upload(self, request: Request, ask: Upload) -> Response:
        """Seal uploaded images as a gallery. An image that cannot be read is refused on its own; the others stay."""
        table, choice = self.choice(request, ask)
        if ask.names is not None and len(ask.names) != len(ask.images):
            raise BadRequest(f"names: there are {len(ask.names)} names for {len(ask.images)} images.")
        before = await self._gallery(choice.digest, ask.gallery, request.state.token.tenant) if ask.gallery else None
        have = len(before) if before else 0
        if have + len(ask.images) > MAX_GALLERY:
            raise TooLarge(f"{have} + {len(ask.images)} pictures are more than the {MAX_GALLERY} of a gallery.")
        like = before or await self._gallery(choice.digest, None, "")
        rows, refused = await asyncio.to_thread(self._readable, ask.images)
        if not rows:
            raise BadRequest(f"No picture could be read. The first: {refused[0]['error']['message']}")
        names = [ask.names[i] if ask.names else str(have + i) for i, _, _ in rows]

        def look() -> Gallery:
            lens = self.desk.shared(_lens)
            batches: Iterator[tuple[Tensor, Tensor, Sequence[str]]] = (
                (x[None], small[None], [name]) for (_, x, small), name in zip(rows, names, strict=True)
            )
            made = make_gallery(lens, batches, like.layers, like.basis)
            return joined(before, made) if before else made

        made = await self.read(look)
        async with self.sealing:
            digest = await asyncio.to_thread(self._seal, made, ask.gallery, request.state.token.tenant)
        out = {"object": "gallery", "gallery": digest, "pictures": len(made), "added": len(rows), "refused": refused}
        return self.said({**out, "kept": made.kept}, table, choice)

    async def forget(self, request: Request, _: None) -> Response:
        """Delete an uploaded gallery."""
        digest = request.path_params["gallery"]
        owner = request.state.token.tenant
        folder = _uploaded(digest, owner)
        async with self.sealing:
            await asyncio.to_thread(shutil.rmtree, folder, True)
        self.kept.forget(owner + OWNER + digest)
        return answer({"object": "gallery", "gallery": digest, "deleted": True})

    # ---- their parts ---------------------------------------------------------------------------------------------

    def _found(self, digest: str) -> dict[str, Any]:
        """Return what the fit found out about the heads. Raises NotFound if the artifact has no such evidence."""
        folder = self.runtime.folder(digest)
        if not (folder / "heads.json").is_file():
            raise NotFound(f"sha256:{digest[:16]} carries no names of heads.")
        found: dict[str, Any] = json.loads(content(folder, "heads.json"))
        return found

    async def _of(self, choice: Choice, name: str) -> list[tuple[int, int]]:
        found = await self.names.of(choice.digest)
        heads = [(h["layer"], h["head"]) for h in found["heads"] if h["label"] == name]
        if not heads:
            names = sorted({h["label"] for h in found["heads"]})
            raise NotFound(f"No head is called {name[:40]!r}. Labels: {', '.join(names)}.")
        return heads[:MAX_HEADS]

    async def _gallery(self, digest: str, uploaded: str | None, owner: str) -> Gallery:
        return await self.kept.of(owner + OWNER + uploaded if uploaded else digest)

    def _read(self, key: str) -> Gallery:
        owner, of_tenant, uploaded = key.rpartition(OWNER)
        if not of_tenant:
            return load_gallery(self.runtime.folder(key) / "gallery")
        folder = _uploaded(uploaded, owner)
        manifest.read(folder, digest=uploaded, base=self.runtime.base.digest)
        return load_gallery(folder)

    def _readable(self, images: Sequence[Any]) -> tuple[list[tuple[int, Tensor, Tensor]], list[dict[str, Any]]]:
        """Read images: (index, preprocessed image, uint8 thumbnail) of the readable ones, and errors of the others."""
        from torchvision.transforms.functional import pil_to_tensor

        rows, refused, budget = [], [], Budget()
        for i, image in enumerate(images):
            try:
                with guarded():
                    picture = read(parse(Image, image).data, budget)
                    x = self.runtime.base.processor.image(picture)[0]
                    picture.thumbnail((256, 256))
                    rows.append((i, x, pil_to_tensor(picture)))
            except PatchbayError as e:
                refused.append({"index": i, **told(e)})
        return rows, refused

    def _seal(self, made: Gallery, parent: str | None, owner: str) -> str:
        """Seal a gallery and return its digest. Raises Conflict if too many are kept."""
        place = _place(owner)
        part = Path(tempfile.mkdtemp(dir=swept(place), prefix=part_prefix()))
        try:
            save_gallery(made, part)
            about = manifest.write(
                part, kind="report", system=self.runtime.settings.system, base=self.runtime.base.label,
                config={"pictures": len(made)}, parents=[parent] if parent else [],
            )  # fmt: skip
            if not (place / about.digest).exists():
                if sum(not d.name.startswith(".") for d in place.iterdir()) >= MAX_GALLERIES:
                    raise Conflict(f"There are {MAX_GALLERIES} uploaded galleries already; delete one first.")
                part.rename(place / about.digest)
            return about.digest
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _place(owner: str) -> Path:
    """Return the folder of a tenant's galleries."""
    place = home() / "galleries"
    if owner:
        place /= "of-" + hashlib.sha256(owner.encode()).hexdigest()[:32]
    place.mkdir(parents=True, exist_ok=True)
    return place


def _uploaded(digest: str, owner: str) -> Path:
    """Return the folder of an uploaded gallery. Raises NotFound for anything but the digest of one."""
    folder = _place(owner) / digest if re.fullmatch("[0-9a-f]{64}", digest) else None
    if folder is None or not folder.is_dir():
        raise NotFound(f"There is no uploaded gallery {digest[:64]!r}; see GET /v1/explain/gallery.")
    return folder


def _head(name: str) -> tuple[int, int]:
    layer, _, head = name.partition(".")
    return int(layer), int(head)


def _check_heads(lens: Lens, heads: Sequence[tuple[int, int]]) -> None:
    if odd := [h for h in heads if h[0] >= lens.layers or h[1] >= lens.heads]:
        raise BadRequest(
            f"heads: there is no head {odd[0][0]}.{odd[0][1]}; layers are 0 to {lens.layers - 1}, heads 0 to "
            f"{lens.heads - 1}."
        )


ROUTES: Sequence[Call] = (
    Call("POST", "/v1/explain/decompose", Service.decompose, "explain", Decompose, pictures.MAX_BODY_BYTES),
    Call("POST", "/v1/explain/segment", Service.segment, "explain", Segment, pictures.MAX_BODY_BYTES),
    Call("POST", "/v1/explain/neighbours", Service.neighbours, "explain", Neighbours, pictures.MAX_BODY_BYTES),
    Call("POST", "/v1/explain/gallery", Service.upload, "explain", Upload, pictures.MAX_BODY_BYTES, "images"),
    Call("DELETE", "/v1/explain/gallery/{gallery}", Service.forget, "explain"),
    Call("GET", "/v1/explain/gallery", Service.galleries, ANY),
    Call("GET", "/v1/explain/heads", Service.heads, ANY),
    Call("GET", "/v1/explain/heads/{head}", Service.head, ANY),
)
