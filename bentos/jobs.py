"""Long-running jobs over HTTP, shared by all shapes: accepted with 202 and an id, then followed, cancelled or resumed.

A shape registers a kind of work and submits to it; everything else about jobs is here:

    POST   (the shape's own route)   202, {"id", "object": "job", "state": "queued", ...}, Location: /v1/jobs/{id}
    GET    /v1/jobs                  the caller's jobs, newest first
    GET    /v1/jobs/{id}             state, progress, the best so far; once done, the result and its sha256
    GET    /v1/jobs/{id}/events      server-sent events from number Last-Event-ID on; the last one is the whole job
    DELETE /v1/jobs/{id}             cancels an open job (its work stops within a second), deletes a finished one
    POST   /v1/jobs/{id}/resume      queues a failed, cancelled or lost job again, with its checkpoints

A job is visible only to the bearer token that submitted it. Jobs survive restarts: finished ones are kept (KEPT_JOBS
per token, for KEPT_S), queued ones are queued again, interrupted ones continue from their checkpoints if their kind can
(`resumes`) and are otherwise reported as lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from bentos.http import Call, answer, told
from bentos.job_store import OPEN as OPEN_STATES
from bentos.job_store import JobStore, Record, State
from bentos.tokens import ANY, OPEN
from registry.errors import BadRequest, Conflict, NotFound, NotReady, PatchbayError, TooLarge, TooMany
from registry.home import home

if TYPE_CHECKING:
    from bentos.desk import Desk

log = logging.getLogger("patchbay")

RUNNING = 16
"""Number of jobs that run at once; the others wait in first-come order"""
OPEN_JOBS = 8
"""Largest number of queued and running jobs per token"""
KEPT_JOBS, KEPT_S = 200, 7 * 86400.0
"""Number of finished jobs kept per token, and for how many seconds"""
MAX_RESULT_BYTES = 16 << 20
TELL_S = 0.1
"""Shortest interval in seconds between progress events without a new best"""
POLL_S = 0.25
"""Interval in seconds for checking stops that other processes were asked for"""
RECOVER_S = 5.0
"""Interval in seconds for checking for jobs whose process has died"""
PING_S = 15.0


class Running:
    """Handle of a running job, given to its work. `tell` and `keep` may be called from any thread."""

    def __init__(self, jobs: Jobs, record: Record, kept: list[Any], number: int) -> None:
        self.id, self.ask, self.about = record.id, record.ask, record.about
        self.kept = kept
        """Checkpoints of earlier runs of this job, in order"""
        self.stopping = threading.Event()
        """Set when the job has ended (cancelled, failed or done), for threads that its work started"""
        self._jobs, self._number, self._told = jobs, number, 0.0
        self._checkpoints = len(kept)
        self._lock = threading.Lock()

    def tell(self, progress: float | None = None, best: Any = None, **more: Any) -> None:
        """Send an event to followers.

        progress: 0 to 1. best: the best answer so far; an event without one is dropped if another came less than TELL_S
        ago.
        """
        with self._lock:
            now = time.monotonic()
            if best is None and not more and now - self._told < TELL_S:
                return
            self._told = now
            self._number += 1
            data = {"progress": progress, "best": best, **more}
            self._jobs.wrote(self.id, self._jobs.store.tell(self.id, self._number, data))

    def keep(self, data: Any) -> Future[int]:
        """Store a checkpoint (JSON-able), returned in `kept` when the job is resumed.

        The future resolves once it is durable.
        """
        with self._lock:
            self._checkpoints += 1
            return self._jobs.store.keep(self.id, self._checkpoints, data)


Work = Callable[[Running], Awaitable[Any]]
"""Coroutine that does a job's work on the event loop and returns a JSON-able result; cancelled as asyncio tasks are"""


@dataclass
class Kind:
    """A registered kind of work."""

    work: Work
    resumes: bool
    """Whether an interrupted job can continue from its checkpoints"""


@dataclass
class Jobs:
    """The jobs of one service, created once by `desk.shared(Jobs)`; `register` starts the processing."""

    runtime: Any
    kinds: dict[str, Kind] = field(default_factory=dict)
    """Kind -> how its work is done"""
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Job id -> its running task"""

    def __post_init__(self) -> None:
        self.store = JobStore(home(), self.runtime.settings.system)
        self.running: dict[str, Running] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._followers: dict[str, set[asyncio.Event]] = {}
        self._closing = False

    # ---- for shapes ------------------------------------------------------------------------------------------------

    def register(self, kind: str, work: Work, resumes: bool = False) -> None:
        """Register `work` for jobs of a kind. resumes: it can continue from `Running.kept` after an interruption.

        Called by a shape's `Service.__init__`, which runs on the event loop.
        """
        self.kinds[kind] = Kind(work, resumes)
        if self._watcher is None:
            self._loop = asyncio.get_running_loop()
            self._room = asyncio.Semaphore(RUNNING)
            self._submitting = asyncio.Lock()
            self._watcher = self._loop.create_task(self._watch())

    async def submit(
        self, request: Request, kind: str, ask: Any, about: dict[str, Any] | None = None, wait: float = 0.0
    ) -> Response:
        """Queue work for `ask` (JSON-able; given to the work, never shown). about: facts for the job's document.

        Answers 202 once the job is durable; with `wait`, after up to that many seconds, and 200 if the job has ended by
        then. Raises TooMany beyond OPEN_JOBS of one token.
        """
        owner = owner_of(request)
        async with self._submitting:
            mine = await asyncio.to_thread(self.store.of, owner)
            if sum(r.state in OPEN_STATES for r in mine) >= OPEN_JOBS:
                raise TooMany(f"{OPEN_JOBS} of your jobs are queued or running; wait for one, or DELETE one.")
            over = [r for r in mine if r.state not in OPEN_STATES]
            request.state.token.charge("rows")
            old = [r.id for i, r in enumerate(over) if i >= KEPT_JOBS - 1 or time.time() - r.created > KEPT_S]
            id = secrets.token_hex(12)
            await asyncio.wrap_future(self.store.add(id, kind, owner, ask, about or {}))
            if old:
                self.store.forget(*old)
        self._spawn(id, kind)
        if wait and (task := self.tasks.get(id)) is not None:
            await asyncio.wait([task], timeout=wait)
        made = await self._document(id)
        return answer(made, 202 if made["state"] in OPEN_STATES else 200, {"location": f"/v1/jobs/{id}"})

    async def close(self) -> None:
        """Stop working. Open jobs stay open on disk, and the next process continues them."""
        self._closing = True
        working = [t for t in (self._watcher, *self.tasks.values()) if t is not None]
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        await asyncio.to_thread(self.store.close)

    # ---- doing the work --------------------------------------------------------------------------------------------

    def _spawn(self, id: str, kind: str) -> None:
        task = asyncio.ensure_future(self._run(id, self.kinds[kind]))
        self.tasks[id] = task
        task.add_done_callback(lambda _: self.tasks.pop(id, None))

    async def _run(self, id: str, kind: Kind) -> None:
        state: State = "failed"
        result, wrong = None, None
        try:
            async with self._room:
                result = await self._work(id, kind)
            state = "done"
        except asyncio.CancelledError:
            if self._closing:
                raise
            state = "cancelled"
        except PatchbayError as e:
            wrong = told(e)["error"]
        except Exception:
            log.exception("job %s failed", id)
            wrong = {"message": f"Something failed here; it is in the log as job {id}.", "type": "server_error"}
        finally:
            if id in self.running:
                self.running.pop(id).stopping.set()
        # shielded: a second DELETE must not leave the job open with nobody working on it
        await asyncio.shield(asyncio.wrap_future(self.store.finish(id, state, result, wrong)))
        self._ring(id)

    async def _work(self, id: str, kind: Kind) -> Any:
        if not await asyncio.wrap_future(self.store.begin(id)):
            raise asyncio.CancelledError
        record, kept, (number, _) = await asyncio.to_thread(
            lambda: (self.store.get(id), self.store.kept(id), self.store.last_event(id))
        )
        assert record is not None
        running = self.running[id] = Running(self, record, kept, number)
        running.tell(state="running", resumed=len(kept))
        result = await kind.work(running)
        if (size := len(json.dumps(result))) > MAX_RESULT_BYTES:
            raise TooLarge(f"The result has {size} bytes; {MAX_RESULT_BYTES} are kept.")
        return result

    async def _watch(self) -> None:
        """Take over interrupted jobs when a process has died, and stop jobs that others asked to stop.

        Begins once the runtime is ready.
        """
        while self.runtime.problem:
            await asyncio.sleep(POLL_S / 5)
        looked = -RECOVER_S
        while True:
            try:
                if time.monotonic() - looked >= RECOVER_S:
                    await self._recover()
                    looked = time.monotonic()
                if self.tasks:
                    for id in await asyncio.to_thread(self.store.to_stop):
                        if id in self.tasks:
                            self.tasks[id].cancel()
            except Exception:
                log.exception("cannot look after the jobs; trying again")
            await asyncio.sleep(POLL_S)

    async def _recover(self) -> None:
        for r in await asyncio.to_thread(self.store.unfinished):
            if r.id in self.tasks or await asyncio.to_thread(self.store.alive, r.holder):
                continue
            kind = self.kinds.get(r.kind)
            again = kind is not None and (kind.resumes or r.started is None)
            if await asyncio.wrap_future(self.store.take(r, "queued" if again else "lost")) and again:
                log.info("job %s was interrupted; going on with it", r.id)
                self._spawn(r.id, r.kind)

    # ---- telling ---------------------------------------------------------------------------------------------------

    def wrote(self, id: str, write: Future[int]) -> None:
        """Wake a job's followers once `write` is done."""
        loop = self._loop
        assert loop is not None

        def ring(_: Future[int]) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, so nobody follows
                loop.call_soon_threadsafe(self._ring, id)

        write.add_done_callback(ring)

    def _ring(self, id: str) -> None:
        for event in self._followers.get(id, ()):
            event.set()

    async def mine(self, request: Request) -> Record:
        """Return the job a request names, if its token submitted it. Raises NotFound for any other."""
        record = await asyncio.to_thread(self.store.get, request.path_params["id"][:64])
        if record is None or record.owner != owner_of(request):
            raise NotFound(f"You have no job {request.path_params['id'][:40]!r} here. GET /v1/jobs lists yours.")
        return record

    async def _document(self, id: str) -> dict[str, Any]:
        record, (_, last) = await asyncio.to_thread(lambda: (self.store.get(id), self.store.last_event(id)))
        assert record is not None
        return document(record, last)

    async def follow(self, id: str, after: int) -> AsyncIterator[bytes]:
        """Yield a job's server-sent events after number `after`, until it ends."""
        news = asyncio.Event()
        self._followers.setdefault(id, set()).add(news)
        pinged = time.monotonic()
        try:
            while True:
                news.clear()
                record = await asyncio.to_thread(self.store.get, id)
                for number, data in await asyncio.to_thread(self.store.events, id, after):
                    yield _event("progress", data, number)
                    after = number
                    pinged = time.monotonic()
                if record is None:
                    return
                if record.state not in OPEN_STATES:
                    yield _event(record.state, await self._document(id))
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await news.wait()
                if time.monotonic() - pinged > PING_S:
                    yield b": still there\n\n"
                    pinged = time.monotonic()
        finally:
            followers = self._followers.get(id, set())
            followers.discard(news)
            if not followers:
                self._followers.pop(id, None)

    # ---- asked over HTTP -------------------------------------------------------------------------------------------

    async def cancel(self, record: Record) -> dict[str, Any]:
        """Stop an open job; wait up to a second until its work has ended."""
        if not self.store.alive(record.holder):
            await asyncio.wrap_future(self.store.take(record, "cancelled"))
            return await self._document(record.id)
        await asyncio.wrap_future(self.store.ask_stop(record.id))
        if (task := self.tasks.get(record.id)) is not None:
            task.cancel()
            await asyncio.wait([task], timeout=1.0)
        else:
            for _ in range(10):
                await asyncio.sleep(0.1)
                now = await asyncio.to_thread(self.store.get, record.id)
                if now is None or now.state not in OPEN_STATES:
                    break
        return await self._document(record.id)

    async def resume(self, record: Record) -> dict[str, Any]:
        """Queue an ended job again.

        Raises Conflict for one that is open or done, NotReady if its kind of work is not registered.
        """
        if record.state in (*OPEN_STATES, "done"):
            raise Conflict(f"The job is {record.state}; only failed, cancelled and lost jobs can be resumed.")
        if record.kind not in self.kinds:
            raise NotReady(f"This service does no {record.kind!r} jobs now.")
        if not await asyncio.wrap_future(self.store.take(record, "queued")):
            raise Conflict("Somebody else has resumed this job; look at its state.")
        self._spawn(record.id, record.kind)
        return await self._document(record.id)


def owner_of(request: Request) -> str:
    """Return a job's owner: the sha256 of the bearer token; "" without a token file."""
    if request.state.token is OPEN:
        return ""
    value = request.headers.get("authorization", "").partition(" ")[2].strip()
    return hashlib.sha256(value.encode()).hexdigest()


def document(record: Record, last: dict[str, Any]) -> dict[str, Any]:
    """Build the document of a job that callers see. last: its newest event."""
    out: dict[str, Any] = {
        "id": record.id, "object": "job", "kind": record.kind, "state": record.state, "created": record.created,
        "started": record.started, "finished": record.finished, "progress": last.get("progress"),
        "best": last.get("best"), "resumable": record.state in ("failed", "cancelled", "lost"),
    }  # fmt: skip
    if record.state == "done":
        out |= {"progress": 1.0, "result": record.result}
        out["sha256"] = hashlib.sha256(orjson.dumps(record.result, option=orjson.OPT_SORT_KEYS)).hexdigest()
    if record.state == "lost":
        out["error"] = {"message": "The service was restarted while this ran, and its work cannot go on from where it "
                                   "was. POST /v1/jobs/{id}/resume starts it anew.", "type": "lost"}  # fmt: skip
    if record.error is not None:
        out["error"] = record.error
    return {**out, "patchbay": record.about}


def _event(name: str, data: Any, number: int | None = None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {name}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"


class Service:
    """Handlers of the jobs routes; the Service of a shape with long work extends this."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.runtime = desk, desk.runtime
        self.jobs = desk.shared(Jobs)

    async def job(self, request: Request, _: None) -> Response:
        record = await self.jobs.mine(request)
        return answer(await self.jobs._document(record.id))

    async def job_list(self, request: Request, _: None) -> Response:
        mine = await asyncio.to_thread(self.jobs.store.of, owner_of(request))
        return answer({"object": "list", "data": [document(r, {}) for r in mine]})

    async def job_events(self, request: Request, _: None) -> Response:
        """Stream a job's events (GET /v1/jobs/{id}/events)."""
        record = await self.jobs.mine(request)
        after = request.headers.get("last-event-id", "0")
        if not (after.isascii() and after.isdigit() and len(after) < 10):
            raise BadRequest(f"Last-Event-ID {after[:20]!r} is no number of an event.")
        body = self.jobs.follow(record.id, int(after))
        return StreamingResponse(body, media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def job_cancel(self, request: Request, _: None) -> Response:
        """Cancel an open job or delete a finished one (DELETE /v1/jobs/{id})."""
        record = await self.jobs.mine(request)
        if record.state in OPEN_STATES:
            return answer(await self.jobs.cancel(record))
        await asyncio.wrap_future(self.jobs.store.forget(record.id))
        return answer({"id": record.id, "object": "job", "deleted": True})

    async def job_resume(self, request: Request, _: None) -> Response:
        return answer(await self.jobs.resume(await self.jobs.mine(request)), 202)


ROUTES: tuple[Call, ...] = (
    Call("GET", "/v1/jobs", Service.job_list, ANY),
    Call("GET", "/v1/jobs/{id}", Service.job, ANY),
    Call("GET", "/v1/jobs/{id}/events", Service.job_events, ANY),
    Call("DELETE", "/v1/jobs/{id}", Service.job_cancel, ANY),
    Call("POST", "/v1/jobs/{id}/resume", Service.job_resume, ANY),
)
"""Routes of jobs, for a shape to add to its own"""
