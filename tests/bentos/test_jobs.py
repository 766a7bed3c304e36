"""Jobs over HTTP: accepted, followed, cancelled, limited, owned, resumed after kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Route

from bentos import jobs
from bentos.desk import Desk
from bentos.http import Call, endpoint
from bentos.job_store import JobStore
from bentos.tokens import Tokens
from registry.errors import NotReady
from registry.home import home


class Ask(BaseModel):
    """POST /count"""

    to: int = 3
    wait: float = 0.01
    fail_at: int = -1
    kind: str = "count"


class Counting(jobs.Service):
    """Counts to a number, one checkpoint a step."""

    def __init__(self, desk):
        super().__init__(desk)
        self.ended = 0
        self.jobs.register("count", self.work, resumes=True)
        self.jobs.register("forgetful", self.work)

    async def count(self, request, ask):
        return await self.jobs.submit(request, ask.kind, ask.model_dump(), {"arm": "base"})

    async def work(self, running):
        ask = running.ask
        try:
            for i in range(len(running.kept), ask["to"]):
                await asyncio.sleep(ask["wait"])
                if i == ask["fail_at"] and len(running.kept) == 0:
                    raise NotReady("The endpoint is down.")
                await asyncio.wrap_future(running.keep(i))
                running.tell((i + 1) / ask["to"], best=i)
            return {"count": ask["to"], "resumed": len(running.kept)}
        finally:
            self.ended += 1


ROUTES = (Call("POST", "/count", Counting.count, "generate", Ask), *jobs.ROUTES)


@contextlib.asynccontextmanager
async def serving(tokens: Tokens | None = None):
    desk = Desk(SimpleNamespace(problem="", settings=SimpleNamespace(system="counting")), ROUTES, "t")
    service = Counting(desk)
    guard = tokens or Tokens(None)
    routes = [Route(r.path, endpoint(guard, r, r.bound(service)), methods=[r.method]) for r in ROUTES]
    transport = httpx.ASGITransport(app=Starlette(routes=routes), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=20) as http:
            yield SimpleNamespace(http=http, service=service)
    finally:
        await desk.close()


async def ended(http, id, headers=None):
    for _ in range(400):
        got = (await http.get(f"/v1/jobs/{id}", headers=headers)).json()
        if got["state"] not in ("queued", "running"):
            return got
        await asyncio.sleep(0.02)
    raise AssertionError("it never ended")


def run(what):
    return asyncio.run(what)


def events_of(text: str):
    out = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            out.append((lines["event"], int(lines.get("id", 0)), json.loads(lines["data"])))
    return out


def test_a_job_is_accepted_followed_and_its_result_kept():
    async def go():
        async with serving() as s:
            made = await s.http.post("/count", json={"to": 4})
            assert made.status_code == 202
            id = made.json()["id"]
            assert made.headers["location"] == f"/v1/jobs/{id}"
            assert made.json()["state"] in ("queued", "running")
            assert made.json()["patchbay"] == {"arm": "base"}
            events = events_of((await s.http.get(f"/v1/jobs/{id}/events")).text)
            best = [d["best"] for kind, _, d in events if kind == "progress" and d["best"] is not None]
            assert best == [0, 1, 2, 3]
            assert [n for _, n, _ in events[:-1]] == list(range(1, len(events)))
            assert events[-1][0] == "done"
            assert events[-1][2]["result"] == {"count": 4, "resumed": 0}
            after = events_of((await s.http.get(f"/v1/jobs/{id}/events", headers={"last-event-id": "3"})).text)
            assert [n for _, n, _ in after[:-1]] == [4, 5]
            got = (await s.http.get(f"/v1/jobs/{id}")).json()
            assert got["state"] == "done"
            assert got["progress"] == 1.0
            listed = (await s.http.get("/v1/jobs")).json()["data"]
            assert [j["id"] for j in listed] == [id]
            return got

    first = run(go())

    async def again():
        async with serving() as s:
            assert (await s.http.get(f"/v1/jobs/{first['id']}")).json() == first
            assert (await s.http.delete(f"/v1/jobs/{first['id']}")).json()["deleted"]
            assert (await s.http.get(f"/v1/jobs/{first['id']}")).status_code == 404

    run(again())


def test_cancelling_stops_the_work_within_a_second():
    async def go():
        async with serving() as s:
            id = (await s.http.post("/count", json={"to": 1000, "wait": 0.05})).json()["id"]
            await asyncio.sleep(0.3)
            start = time.perf_counter()
            got = (await s.http.delete(f"/v1/jobs/{id}")).json()
            assert time.perf_counter() - start < 1.0
            assert got["state"] == "cancelled"
            assert s.service.ended == 1
            assert not s.service.jobs.running

    run(go())


def test_a_job_that_waits_is_cancelled_before_it_begins(monkeypatch):
    monkeypatch.setattr(jobs, "RUNNING", 1)

    async def go():
        async with serving() as s:
            first = (await s.http.post("/count", json={"to": 1000, "wait": 0.05})).json()["id"]
            second = (await s.http.post("/count", json={"to": 1})).json()["id"]
            await asyncio.sleep(0.1)
            assert (await s.http.get(f"/v1/jobs/{second}")).json()["state"] == "queued"
            assert (await s.http.delete(f"/v1/jobs/{second}")).json()["state"] == "cancelled"
            await s.http.delete(f"/v1/jobs/{first}")
            assert s.service.ended == 1

    run(go())


def test_another_process_can_cancel():
    async def go():
        async with serving() as s:
            id = (await s.http.post("/count", json={"to": 1000, "wait": 0.05})).json()["id"]
            other = JobStore(home(), "counting")
            other.ask_stop(id).result()
            assert (await ended(s.http, id))["state"] == "cancelled"
            other.close()

    run(go())


def test_a_failure_says_why_and_is_resumed_from_its_checkpoints():
    async def go():
        async with serving() as s:
            id = (await s.http.post("/count", json={"to": 4, "fail_at": 2})).json()["id"]
            got = await ended(s.http, id)
            assert got["state"] == "failed"
            assert got["error"]["message"] == "The endpoint is down."
            assert got["resumable"]
            assert (await s.http.post(f"/v1/jobs/{id}/resume")).status_code == 202
            got = await ended(s.http, id)
            assert got["result"] == {"count": 4, "resumed": 2}
            refused = await s.http.post(f"/v1/jobs/{id}/resume")
            assert refused.status_code == 409

    run(go())


def test_a_job_belongs_to_its_token(tmp_path):
    file = tmp_path / "tokens.json"
    names = {"one": "a" * 20, "two": "b" * 20}
    known = {hashlib.sha256(v.encode()).hexdigest(): {"name": "same", "scopes": ["generate"]} for v in names.values()}
    file.write_text(json.dumps(known))
    one, two = ({"authorization": f"Bearer {v}"} for v in names.values())

    async def go():
        async with serving(Tokens(file)) as s:
            id = (await s.http.post("/count", json={}, headers=one)).json()["id"]
            for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", ""), ("POST", "/resume")):
                assert (await s.http.request(method, f"/v1/jobs/{id}{path}", headers=two)).status_code == 404
            assert (await s.http.get("/v1/jobs", headers=two)).json()["data"] == []
            assert (await s.http.get(f"/v1/jobs/{id}")).status_code == 401
            assert (await ended(s.http, id, one))["state"] == "done"

    run(go())


def test_a_token_has_so_many_open_jobs_and_so_many_kept(monkeypatch):
    monkeypatch.setattr(jobs, "OPEN_JOBS", 2)
    monkeypatch.setattr(jobs, "KEPT_JOBS", 3)

    async def go():
        async with serving() as s:
            ids = [(await s.http.post("/count", json={"to": 1000, "wait": 0.05})).json()["id"] for _ in range(2)]
            refused = await s.http.post("/count", json={})
            assert refused.status_code == 429
            assert "2 of your jobs" in refused.json()["error"]["message"]
            for id in ids:
                await s.http.delete(f"/v1/jobs/{id}")
            for _ in range(5):
                await ended(s.http, (await s.http.post("/count", json={"to": 1})).json()["id"])
            assert len((await s.http.get("/v1/jobs")).json()["data"]) == 3

    run(go())


KILLED = """
    import asyncio, os, signal
    from tests.bentos.test_jobs import serving

    async def go():
        async with serving() as s:
            made = [(await s.http.post("/count", json={"to": 6, "wait": 0.05, "kind": k})).json()["id"]
                    for k in ("count", "forgetful")]
            done = (await s.http.post("/count", json={"to": 1})).json()["id"]
            while True:
                await asyncio.sleep(0.01)
                got = [(await s.http.get(f"/v1/jobs/{id}")).json() for id in (*made, done)]
                if got[0]["best"] == 2 and got[2]["state"] == "done":
                    print(*made, done, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(go())
"""


def test_jobs_survive_kill_9():
    """What was finished is kept; what ran goes on from its checkpoints, or is said to be lost and can be begun anew."""
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    counting, forgetful, done = killed.stdout.split()

    async def go():
        async with serving() as s:
            got = await ended(s.http, counting)
            assert got["result"]["count"] == 6
            assert got["result"]["resumed"] >= 3
            lost = await ended(s.http, forgetful)
            assert lost["state"] == "lost"
            assert "resume" in lost["error"]["message"]
            assert (await s.http.get(f"/v1/jobs/{done}")).json()["result"]["count"] == 1
            await s.http.post(f"/v1/jobs/{forgetful}/resume")
            assert (await ended(s.http, forgetful))["state"] == "done"

    run(go())


def test_a_quiet_stop_leaves_jobs_to_the_next_service():
    async def first():
        async with serving() as s:
            id = (await s.http.post("/count", json={"to": 30, "wait": 0.02})).json()["id"]
            await asyncio.sleep(0.2)
            return id

    id = run(first())

    async def second():
        async with serving() as s:
            assert (await ended(s.http, id))["result"]["resumed"] > 1

    run(second())


@pytest.mark.parametrize("value", ["-1", "x", "9" * 20])
def test_a_bad_event_number_is_refused(value):
    async def go():
        async with serving() as s:
            id = (await s.http.post("/count", json={})).json()["id"]
            got = await s.http.get(f"/v1/jobs/{id}/events", headers={"last-event-id": value})
            assert got.status_code == 400

    run(go())
