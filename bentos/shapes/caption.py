"""The shape `caption`: a picture, clip, sound, sum or prompt in (`described`); a text that is searched for out, as a
job.

    POST /v1/captions      202 and a job (bentos.jobs): its events show the best text and its score after every round
    POST /v1/mils/score    scores of given texts, at once: a plain CLIPScore
    GET  /v1/captions      what the arms are configured to do, and what one request may spend

Every request has a budget (rounds, seconds, texts scored, tokens), at most what the arm's configuration allows. Arms
are configurations: base (the best line of the bank) beside challenger with `patchbay.compare`. Jobs go on from their
trace after a restart. Generators and their endpoints are named at deploy time, never here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from bentos import jobs
from bentos.desk import Desk, Extra, Strict, facts, headers
from bentos.http import Call, answer
from bentos.runtime.arms import Choice
from bentos.shapes.described import KINDS, Media, Text, decoded, packed, restored
from bentos.tokens import ANY
from patches.families.search.config import Budget
from patches.families.search.track import digest
from patches.families.search.worker import Searching
from registry.ab.experiment import TREATMENT
from registry.ab.ledger import BASE
from registry.errors import BadRequest

MAX_BODY_BYTES = 96 << 20
MAX_TEXTS = 1000
"""texts of one call to be scored"""


class Spend(BaseModel):
    """What one request may spend; less than its arm's configuration, which is the default."""

    model_config = Strict
    steps: Annotated[int, Field(ge=0, le=100)] | None = None
    """rounds after the bank"""
    seconds: Annotated[float, Field(gt=0, le=3600)] | None = None
    calls: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """texts scored after the bank's, which cost nothing once they are encoded"""
    tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    ask: Annotated[int, Field(ge=1, le=1000)] | None = None
    """candidates a round"""
    lines: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """lines of the bank, the first ones; default all that the arm has"""


class Caption(Media):
    """POST /v1/captions"""

    budget: Spend = Field(default_factory=Spend)
    wait: Annotated[float, Field(ge=0, le=60)] = 0.0
    """answer with 200 and the result if it is there within so many seconds"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """the same seed, input and arm give the same trace, if no budget of seconds ends it"""
    model: Annotated[str, Field(max_length=200)] | None = None
    user: str | None = None
    """the unit of an experiment: printable, without spaces"""
    patchbay: Extra = Field(default_factory=Extra)


class Score(Media):
    """POST /v1/mils/score"""

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
    model: Annotated[str, Field(max_length=200)] | None = None


class Service(jobs.Service):
    """The routes, for one desk."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self.jobs.register("caption", self._work, resumes=True)
        self.decoding = asyncio.Semaphore(2)

    # ---- asked over HTTP -------------------------------------------------------------------------------------------

    async def captions(self, request: Request, ask: Caption) -> Response:
        """Queue a search. What cannot be one is refused here, before there is a job."""
        if ask.patchbay.ask is not None:
            raise BadRequest("patchbay.ask: a search takes nothing from a request but its budget; leave it out.")
        table, choice = self.desk.choice(request, ask.model, ask.user, ask.patchbay.compare)
        inputs = await self._inputs(ask)
        arms = [choice.arm, *([None] if ask.patchbay.compare else [])]
        self.runtime.worker.check([self._job(arm, inputs, ask.model_dump()) for arm in arms])
        twin = self.desk.twin(choice)
        plain = {
            "ask": ask.model_dump(exclude=set(KINDS)), "arm": choice.arm,
            "label": choice.label, "unit": choice.unit, "owner": choice.owner, "side": choice.side,
            "number": request.state.number,
            "experiment": choice.experiment.name if choice.experiment else None,
            "twin": twin.digest if twin else None, "inputs": packed(inputs),
        }  # fmt: skip
        about = {**facts(table, choice), "model": self.desk.model(choice)}
        response = await self.jobs.submit(request, "caption", plain, about, ask.wait)
        response.headers.update(headers(table, choice))
        return response

    async def score(self, request: Request, ask: Score) -> Response:
        """Scores of the texts for one input, by the scorer of an arm."""
        table, choice = self.desk.choice(request, ask.model)
        inputs = await self._inputs(ask)
        worker: Any = self.runtime.worker
        worker.check([Searching(arm=choice.arm, inputs=inputs)])
        scorer = await asyncio.to_thread(self.runtime.call, lambda: worker.plain(choice.arm))
        target = await asyncio.to_thread(self.runtime.call, lambda: scorer.target(inputs))
        scores: list[float] = []
        for i in range(0, len(ask.texts), 32):  # other jobs' slices come in between
            some = ask.texts[i : i + 32]
            scores += await asyncio.to_thread(self.runtime.call, partial(scorer, target, some))
        made = [
            {"text": t, "score": round(s, 6), "clipscore": round(2.5 * max(s, 0.0), 6)}
            for t, s in zip(ask.texts, scores, strict=True)
        ]
        out = {"object": "scores", "model": self.desk.model(choice), "scores": made}
        return answer({**out, "patchbay": facts(table, choice)}, headers=headers(table, choice))

    async def caption_arms(self, request: Request, _: None) -> Response:
        """What every arm searches for and with."""
        del request
        worker: Any = self.runtime.worker
        out = {}
        for arm in (None, *sorted(self.desk.table().loaded)):
            c = (await asyncio.to_thread(worker.parts, arm)).config
            out["base" if arm is None else f"sha256:{arm[:16]}"] = {
                "task": c.task, "generator": c.generator, "steps": c.steps, "keep": c.keep, "ask": c.ask,
                "seconds": c.seconds, "calls": c.calls, "tokens": c.tokens, "patched": list(c.patched),
            }  # fmt: skip
        return answer({"object": "list", "arms": out})

    # ---- the work --------------------------------------------------------------------------------------------------

    async def _work(self, running: jobs.Running) -> Any:
        """A search, and the base's beside it if both are wanted; the trace is kept round by round."""
        ask, start = running.ask, time.perf_counter()
        inputs = restored(ask["inputs"])
        sides = {"caption": ask["arm"]} | ({"base": None} if ask["ask"]["patchbay"]["compare"] else {})
        if ask["twin"]:
            sides["twin"] = None if ask["twin"] == BASE else ask["twin"]
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        made: dict[str, Searching] = {}
        for side, arm in sides.items():
            job = made[side] = self._job(arm, inputs, ask["ask"])
            job.records = [k["record"] for k in running.kept if k["side"] == side]
            job.on_step = self._told(running, side, made, loop, over)
        status = 499
        try:
            self.runtime.submit(list(made.values()))
            await over.wait()
            if (failed := next((j.error for j in made.values() if j.error is not None), None)) is not None:
                status = failed.status
                raise failed
            status = 200
        finally:
            for job in made.values():
                if not job.finished:
                    self.runtime.cancel(job)
            if status != 499:
                await self._expose(ask, status, start)
        out = {"object": "caption", **_result(made["caption"])}
        if "twin" in made:
            other = _result(made["twin"])
            twin = Choice(TREATMENT, sides["twin"] or BASE, unit=ask["unit"], owner=ask.get("owner", ""))
            self.desk.keep(ask["number"], twin, out["text"], other["text"])
            await self._expose({**ask, "side": TREATMENT, "arm": sides["twin"], "label": TREATMENT}, 200, start)
        return {**out, "base": _result(made["base"])} if "base" in made else out

    def _told(
        self, running: jobs.Running, side: str, made: dict[str, Searching], loop: Any, over: asyncio.Event
    ) -> Any:  # fmt: skip
        """Make what happens after each round, and while the bank is read: the round is kept, the best and the progress
        are told. It is called on the worker's thread."""
        kept = sum(k["side"] == side for k in running.kept)

        def told(job: Searching) -> None:
            nonlocal kept
            track = job.item.track if job.item is not None else None
            if track is not None:
                for record in track.trace[kept:]:
                    running.keep({"side": side, "record": record})
                kept = max(kept, len(track.trace))
                if side == "caption" and job.best is not None:
                    top = [{"text": c.text, "score": c.score, "step": c.step} for c in track.kept()[:5]]
                    best = {"text": job.best[0], "score": job.best[1], "candidates": top}
                    running.tell(job.progress, best=best, **job.told)
                elif side == "caption":
                    running.tell(job.progress)
            if all(j.finished for j in made.values()):
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(over.set)

        return told

    def _job(self, arm: str | None, inputs: dict[str, Any], ask: dict[str, Any]) -> Searching:
        budget = Budget(**ask["budget"]) if arm is not None else Budget(
            seconds=ask["budget"]["seconds"], lines=ask["budget"].get("lines")
        )  # fmt: skip
        strength = ask["patchbay"]["strength"]
        goal = str(inputs.get("goal", ""))
        start = (goal,) if goal else ()
        return Searching(
            arm=arm, strength=strength, inputs=inputs, budget=budget, key=str(ask["seed"]), goal=goal, start=start
        )

    async def _expose(self, ask: dict[str, Any], status: int, start: float) -> None:
        """The exposure of a job's unit, if it was made for the live experiment."""
        x = self.desk.table().experiment
        if x is None or x.name != ask["experiment"]:
            x = None  # it has ended since
        choice = Choice(
            ask["label"], ask["arm"] or BASE, x, ask["side"] if x else None, ask["unit"], ask.get("owner", "")
        )
        request: Any = SimpleNamespace(state=SimpleNamespace(number=ask["number"]))
        await self.desk.expose(request, choice, status, start)

    async def _inputs(self, media: Media) -> dict[str, Any]:
        """What the scorer looks at or listens to. Raises as `described.decoded`."""
        async with self.decoding:
            return await asyncio.to_thread(decoded, media, self.runtime.base.processor)


def _result(job: Searching) -> dict[str, Any]:
    """The document of one search: text, score, curve, the best candidates, and the hash of its trace."""
    assert job.item is not None
    track = job.item.track
    assert track is not None
    assert track.best is not None
    top = [{"text": c.text, "score": c.score, "step": c.step} for c in track.kept()[:10]]
    return {
        "text": track.best.text, "score": track.best.score, "clipscore": round(2.5 * max(track.best.score, 0.0), 6),
        "curve": track.curve(), "candidates": top, "trace": f"sha256:{digest(track.trace)[:16]}",
        "bank": f"sha256:{track.bank.digest[:16]}", **job.told,
    }  # fmt: skip


ROUTES: tuple[Call, ...] = (
    Call("POST", "/v1/captions", Service.captions, "generate", Caption, MAX_BODY_BYTES),
    Call("GET", "/v1/captions", Service.caption_arms, ANY),
    Call("POST", "/v1/mils/score", Service.score, "generate", Score, MAX_BODY_BYTES),
    *jobs.ROUTES,
)
