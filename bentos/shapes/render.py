"""The shape `render`: a diffusion model and its patches; every row of the running batch has its own arm and its own
parameters.

`/v1/images/generations` and `/v1/images/edits` in OpenAI's form. For what that form cannot say: `/v1/render/sample`
(rows that differ in everything), `/v1/render/edit`, `/v1/render/counterfactual` (one picture, a sweep, a strip),
`/v1/render/invert` (a job), `/v1/render/point` (the coefficients of what a request asks for), `GET /v1/render` (what
the arms take).
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from torch import Tensor

from bentos import jobs
from bentos.desk import Desk, facts, headers
from bentos.http import Call, answer, parse, refuse, told
from bentos.runtime.arms import Choice, Table
from bentos.shapes import drawing, waiting
from bentos.shapes.drawing import MAX_ROWS
from bentos.shapes.inverting import Inverting
from bentos.shapes.pictures import MAX_BODY_BYTES
from bentos.shapes.render_asks import Counterfactual, Edits, Generations, Inversion, Point, Row, Sample
from patches.families import diffusion
from patches.families.diffusion import Denoising, Invert, Regenerate
from registry.errors import BadRequest, Invalid, NotFound, PatchbayError, TooLarge


@dataclass
class Entry:
    """One row of an answer."""

    label: str
    row: Denoising | None = None
    refused: PatchbayError | None = None


class Service(Inverting):
    """The routes, for one desk."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.jobs.register("invert", self.inversion, resumes=True)

    # ---- OpenAI's form -------------------------------------------------------------------------------------------

    async def generations(self, request: Request, ask: Generations) -> Response:
        """Pictures that a prompt asks for."""
        if not ask.prompt.strip():
            raise BadRequest("prompt: it is empty; say what to draw.")
        size = drawing.size_of(ask.size)
        condition = (await drawing.told(self.runtime, lambda: self.pipe.text([ask.prompt])))[0]
        how, n = ask.patchbay, ask.n or 1
        first = how.seed if how.seed is not None else time.time_ns() % 2**31

        def rows(choice: Choice, arm: str | None) -> list[Denoising]:
            return [
                Denoising(
                    condition=condition, arm=arm, strength=how.strength, seed=(first + i) % 2**63, steps=how.steps,
                    guidance=3.0 if how.guidance is None else how.guidance, solver=how.solver, size=size,
                )
                for i in range(n)
            ]  # fmt: skip

        return await self._images(request, ask, rows)

    async def edits(self, request: Request, ask: Edits) -> Response:
        """Pictures changed by the arm, and by the prompt if it says something."""
        many = [i.get("data") if isinstance(i, dict) else i for i in ask.images]
        files = [data for data in many if isinstance(data, str)]
        if len(files) < len(many):
            raise BadRequest("images: each must be a picture's file, or {data: base64}.")
        x = await asyncio.to_thread(lambda: [drawing.picture_of(self.runtime, data) for data in files])
        words = ask.prompt if ask.prompt.strip() and "text" in self.pipe.conditions else ""
        how = ask.patchbay

        def conditions() -> tuple[list[Any], Any]:
            made = [diffusion.changed(self.pipe, one, count=how.levels) for one in x]
            return made, self.pipe.text([words])[0]["text"] if words else None

        begun, said = await drawing.told(self.runtime, conditions)

        def rows(choice: Choice, arm: str | None) -> list[Denoising]:
            return [
                Denoising(
                    condition=b.condition if said is None else {**b.condition, "text": said}, other=b.condition,
                    start=b.start, program=b.program, arm=arm, strength=how.strength, seed=how.seed or 0,
                    guidance=2.0 if how.guidance is None else how.guidance,
                )
                for b in begun for _ in range(ask.n or 1)
            ]  # fmt: skip

        return await self._images(request, ask, rows)

    async def _images(self, request: Request, ask: Generations, rows: Any) -> Response:
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user, ask.patchbay.compare)
        entries = [Entry(choice.label, row) for row in rows(choice, choice.arm)]
        if ask.patchbay.compare:
            entries = [*(Entry("base", row) for row in rows(choice, None)), *entries]
        if len(entries) > MAX_ROWS:
            raise TooLarge(f"{len(entries)} pictures are more than {MAX_ROWS}; ask for fewer at once.")
        await self.desk.prepare([e.row for e in entries if e.row is not None], ask.patchbay.ask)
        about = {"created": int(time.time()), "model": self.desk.model(choice), "patchbay": facts(table, choice)}
        if ask.stream:
            self.runtime.worker.check([e.row for e in entries if e.row is not None])
            body = self._stream(request, entries, about, choice, start)
            return StreamingResponse(body, headers=headers(table, choice), media_type="text/event-stream")
        await self._draw(request, entries, table, choice, start)
        twin = self.desk.twin(choice)
        if twin is not None:
            self.desk.later(self._shadow(request, twin, rows, entries, ask.patchbay.ask))
        data = [self._shown(e, ask.patchbay.compare) for e in entries]
        return answer({**about, "data": data}, headers=headers(table, choice))

    async def _draw(
        self, request: Request, entries: Sequence[Entry], table: Table, choice: Choice, start: float
    ) -> None:
        """Rows to the end, with their exposure. Raises what all rows failed with."""
        rows = [e.row for e in entries if e.row is not None]
        try:
            if rows:
                await waiting.finished(self.runtime, rows, request)
            if (wrong := drawing.first_error(rows)) is not None:
                raise wrong
        except (PatchbayError, asyncio.CancelledError) as e:
            await self.desk.expose(request, choice, getattr(e, "status", 499), start)
            raise
        await self.desk.expose(request, choice, 200, start)

    def _shown(self, entry: Entry, named: bool) -> dict[str, Any]:
        """One picture of an answer, or why there is none."""
        out: dict[str, Any] = {"arm": entry.label} if named else {}
        wrong = entry.refused or (entry.row.error if entry.row is not None else None)
        if wrong is not None or entry.row is None or entry.row.picture is None:
            return {**out, "b64_json": None, **told(wrong or NotFound("There is no picture."))}
        out["b64_json"] = drawing.coded(self.runtime, entry.row.picture)
        return {**out, "told": entry.row.told} if entry.row.told else out

    async def _stream(
        self, request: Request, entries: list[Entry], about: Mapping[str, Any], choice: Choice, start: float
    ) -> AsyncIterator[bytes]:
        """Server-sent events: progress, then each picture, then the end."""
        rows = [e.row for e in entries if e.row is not None]
        moved: asyncio.Queue[float | None] = asyncio.Queue()
        work = asyncio.ensure_future(
            waiting.finished(self.runtime, rows, request, lambda: moved.put_nowait(drawing.progress(rows)))
        )
        work.add_done_callback(lambda _: moved.put_nowait(None))
        status, last = 200, -1.0
        try:
            while (at := await moved.get()) is not None:
                if at > last:
                    yield _event({"type": "image_generation.progress", "progress": round(at, 4)})
                    last = at
            await work
            for i, e in enumerate(entries):
                shown = self._shown(e, True)
                yield _event(
                    {"type": "image_generation.completed", "index": i, "created_at": about["created"], **shown}
                )
            yield _event({"type": "patchbay.done", **about})
        except PatchbayError as e:
            status = e.status
            yield b"data: " + bytes(refuse(e).body) + b"\n\n"
        finally:
            work.cancel()
            await self.desk.expose(request, choice, status if work.done() and not work.cancelled() else 499, start)

    async def _shadow(
        self, request: Request, twin: Choice, rows: Any, entries: list[Entry], ask: dict[str, Any] | None
    ) -> None:
        """The treatment's pictures beside the control's, after the caller has theirs."""
        start = time.perf_counter()
        beside = rows(twin, twin.arm)
        await self.desk.prepare(beside, ask)
        await waiting.finished(self.runtime, beside)
        mine = [e.row.picture for e in entries if e.row is not None and e.label != "base"]
        shown = [[drawing.coded(self.runtime, p) for p in many if p is not None] for many in
                 (mine, [r.picture for r in beside])]  # fmt: skip
        self.desk.keep(request.state.number, twin, *shown)
        await self.desk.expose(request, twin, 200, start)

    # ---- what that form cannot say -------------------------------------------------------------------------------

    async def sample(self, request: Request, ask: Sample) -> Response:
        """Rows of one batch, each with its own everything; a bad one costs its neighbours nothing."""
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user)
        entries = await asyncio.gather(*(self._row(request, ask, values, choice) for values in ask.rows))
        if all(e.refused for e in entries):
            assert entries[0].refused is not None
            raise entries[0].refused
        about = {"object": "samples", "model": self.desk.model(choice), "patchbay": facts(table, choice)}
        if ask.stream:
            body = self._stream(request, list(entries), {**about, "created": int(time.time())}, choice, start)
            return StreamingResponse(body, headers=headers(table, choice), media_type="text/event-stream")
        await self._draw(request, entries, table, choice, start)
        data = [{"index": i, **self._shown(e, True)} for i, e in enumerate(entries)]
        return answer({**about, "data": data}, headers=headers(table, choice))

    async def _row(self, request: Request, ask: Sample, values: Any, choice: Choice) -> Entry:
        try:
            one: Row = parse(Row, values)
            if one.model is not None:
                choice = self.desk.choice(request, one.model, ask.user)[1]
                if choice.experiment is not None:
                    raise BadRequest("rows: a row's own model cannot be auto; name that for the whole request.")
            x = await asyncio.to_thread(drawing.picture_of, self.runtime, one.image) if one.image else None
            condition = await drawing.told(self.runtime, lambda: self._condition(one.prompt, x))
            row = Denoising(
                condition=condition, arm=choice.arm, strength=one.strength, seed=one.seed, steps=one.steps,
                guidance=one.guidance, solver=one.solver,
            )  # fmt: skip
            await self.desk.prepare([row], one.ask)
            self.runtime.worker.check([row])
        except PatchbayError as e:
            return Entry(choice.label, refused=e)
        return Entry(choice.label, row)

    def _condition(self, prompt: str, picture: Tensor | None) -> Mapping[str, Tensor]:
        """Everything a row says to the model, on the thread that owns it."""
        out: dict[str, Tensor] = dict(self.pipe.null())
        if picture is not None:
            out |= self.pipe.image(picture[None])[0]
        if prompt.strip():
            said = self.pipe.text([prompt])[0]
            out = {**said, "image": out["image"]} if picture is not None and "image" in said else dict(said)
        return out

    async def counterfactual(self, request: Request, ask: Counterfactual) -> Response:
        """One picture under a sweep of the arm: pictures, how much each changed, and a strip (a PNG, if that is
        accepted)."""
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user)
        begun = await self._begin(request, ask, choice.arm)
        rows = []
        for value in ask.sweep.values:
            strength, said = ask.strength, ask.ask
            if ask.sweep.name == "strength":
                if not 0.0 <= value <= 2.0:
                    raise Invalid(f"sweep.values: a strength lies between 0 and 2, not at {value}.")
                strength = value
            else:
                said = _with(said or {}, ask.sweep.name, value)
            row = begun.row(choice.arm, strength)
            await self.desk.prepare([row], said)
            rows.append(row)
        entries = [Entry(choice.label, row) for row in rows]
        await self._draw(request, entries, table, choice, start)
        shown = [row.picture for row in rows if row.picture is not None]
        tape = await asyncio.to_thread(drawing.strip, self.runtime, [begun.picture, *shown])
        if "image/png" in request.headers.get("accept", ""):
            return Response(tape, headers=headers(table, choice), media_type="image/png")
        data = []
        for value, entry, row in zip(ask.sweep.values, entries, rows, strict=True):
            one: dict[str, Any] = {"value": value, **self._shown(entry, False)}
            if row.picture is not None:
                one["l1"] = float((row.picture - begun.picture).abs().mean())
            data.append(one)
        out: dict[str, Any] = {
            "object": "counterfactual",
            "model": self.desk.model(choice),
            "sweep": ask.sweep.name,
            "data": data,
        }
        out |= {"strip": base64.b64encode(tape).decode(), "patchbay": facts(table, choice)}
        return answer(out, headers=headers(table, choice))

    async def edit(self, request: Request, ask: Counterfactual) -> Response:
        """One picture under the arm, beside what the base gives back of it."""
        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model, ask.user)
        begun = await self._begin(request, ask, choice.arm)
        base, row = begun.row(None, 1.0), begun.row(choice.arm, ask.strength)
        if ask.image is not None and choice.arm is not None and self.runtime.subject.applied.founded(choice.arm):
            base = (await self._begin(request, ask, None)).row(None, 1.0)  # a tuned arm inverts by itself
        await self.desk.prepare([row], ask.ask)
        entries = [Entry("base", base), Entry(choice.label, row)]
        await self._draw(request, entries, table, choice, start)
        data = [self._shown(e, True) for e in entries]
        out = {"object": "edit", "model": self.desk.model(choice), "data": data, "patchbay": facts(table, choice)}
        return answer(out, headers=headers(table, choice))

    async def point(self, request: Request, ask: Point) -> Response:
        """The coefficients an `ask` stands for, and where they lie along named attributes. For arms that have
        coordinates."""
        table, choice = self.desk.choice(request, ask.model)
        patch = drawing.patch_of(self.runtime, choice.arm)
        if patch is None or not hasattr(patch, "point") or patch.Ask is None:
            raise BadRequest("This arm has no coordinates; rows of it are told other things (GET /v1/render).")
        z = patch.point(parse(patch.Ask, ask.ask))
        out: dict[str, Any] = {"object": "point", "coefficients": [round(v, 5) for v in z.tolist()]}
        names = getattr(patch.config, "attributes", ())
        if names:
            out["attributes"] = dict(zip(names, [round(v, 4) for v in patch.read(z).tolist()], strict=True))  # type: ignore[attr-defined]
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def about(self, request: Request, _: None) -> Response:
        """What this model is told, and what each arm takes from a request."""
        del request
        table = self.desk.table()
        arms = {}
        for name, digest in (("champion", table.champion), ("challenger", table.challenger)):
            patch = drawing.patch_of(self.runtime, digest)
            if patch is not None:
                takes = {k: list(v) for k, v in vars(patch.config).items()
                         if isinstance(v, tuple) and v and all(isinstance(x, str) for x in v)}  # fmt: skip
                arms[name] = {
                    "mechanism": type(patch).__name__, "names": takes, "inverts": self.fits(patch),
                    "ask": patch.Ask.model_json_schema() if patch.Ask is not None else None,
                }  # fmt: skip
        out: dict[str, Any] = {"size": list(self.pipe.size), "conditions": sorted(self.pipe.conditions), "arms": arms}
        return answer({**out, "patchbay": facts(table, None)})

    # ---- inversion -----------------------------------------------------------------------------------------------

    async def invert(self, request: Request, ask: Inversion) -> Response:
        """A job: what makes the picture. Coefficients, if the arm has them; else the noise it inverts to."""
        table, choice = self.desk.choice(request, ask.model, ask.user)
        await asyncio.to_thread(drawing.picture_of, self.runtime, ask.image)  # refused now rather than in the job
        return await self.jobs.submit(request, "invert", {**ask.model_dump(), "arm": choice.arm}, facts(table, choice))

    async def _begin(self, request: Request, ask: Counterfactual, arm: str | None) -> Begun:
        """The inverted picture of a request, on what an arm starts from."""
        if (ask.image is None) == (ask.inverted is None):
            raise Invalid("Send a picture as `image`, or the id of its inversion as `inverted`: one of the two.")
        if ask.inverted is not None:
            picture, condition, state, method, levels = await self.recalled(request, ask.inverted)
        else:
            assert ask.image is not None
            data = ask.image
            picture = await asyncio.to_thread(drawing.picture_of, self.runtime, data)
            levels, method = diffusion.levels(self.pipe, ask.levels), ask.method
            condition, row = await drawing.told(
                self.runtime, lambda: self.inverting(picture, Invert(method, levels, ask.iterations), ask.seed, arm)
            )
            await waiting.finished(self.runtime, [row], request)
            if row.error is not None:
                raise row.error
            assert row.out is not None
            state = row.out
        skip = min(ask.skip, len(levels) - 1)
        other = condition if ask.against == "source" else None
        return Begun(picture, condition, other, state, Regenerate(method, levels, skip), ask.guidance)


@dataclass(frozen=True, eq=False)
class Begun:
    """An inverted picture, from which rows are regenerated."""

    picture: Tensor
    condition: Mapping[str, Tensor]
    other: Mapping[str, Tensor] | None
    state: Tensor
    program: Regenerate
    guidance: float

    def row(self, arm: str | None, strength: float) -> Denoising:
        """A row that regenerates it under an arm."""
        return Denoising(
            condition=self.condition, other=self.other, start=self.state, program=self.program, guidance=self.guidance,
            arm=arm, strength=strength,
        )  # fmt: skip


def _event(data: Mapping[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"


def _with(ask: Mapping[str, Any], name: str, value: float) -> dict[str, Any]:
    """`ask` with the field `name` (dots reach into objects) set to `value`."""
    first, _, rest = name.partition(".")
    inner = ask.get(first, {})
    if rest and not isinstance(inner, Mapping):
        raise Invalid(f"sweep.name: {first[:40]!r} is no object, so it has no {rest[:40]!r}.")
    return {**ask, first: _with(inner, rest, value) if rest else value}


ROUTES: tuple[Call, ...] = (
    Call("POST", "/v1/images/generations", Service.generations, "render", Generations),
    Call("POST", "/v1/images/edits", Service.edits, "render", Edits, MAX_BODY_BYTES, files="images", fields=True),
    Call("POST", "/v1/render/sample", Service.sample, "render", Sample, MAX_BODY_BYTES),
    Call("POST", "/v1/render/edit", Service.edit, "render", Counterfactual, MAX_BODY_BYTES),
    Call("POST", "/v1/render/counterfactual", Service.counterfactual, "render", Counterfactual, MAX_BODY_BYTES),
    Call("POST", "/v1/render/invert", Service.invert, "render", Inversion, MAX_BODY_BYTES),
    Call("POST", "/v1/render/point", Service.point, "render", Point),
    Call("GET", "/v1/render", Service.about, "render"),
    *jobs.ROUTES,
)
