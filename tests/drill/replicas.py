"""Three replicas of one service over a real PostgreSQL: one decision, one judge, and what is left when things die."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import text

from patches.families import llm
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.database import Database
from registry.ab.ledger import Ledger
from tests import postgres
from tests.bench.server import Server, running
from tests.bentos.conftest import CONFIGS, SYSTEM, seal
from tests.drill.table import Row

REPLICAS = 3
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}


def three_replicas(home: Path, night: bool, seed: int) -> Row:
    """Units are sticky, a promotion is everywhere, and a replica, the judge and the database are killed."""
    name = "three replicas on PostgreSQL"
    try:
        with postgres.running() as database, contextlib.ExitStack() as stack:
            url = database.database()
            os.environ["PATCHBAY_DB"] = url
            stack.callback(os.environ.pop, "PATCHBAY_DB")
            return _drill(name, home, database, url, stack, 300 if night else 60)
    except pytest.skip.Exception as e:
        return Row(name, 0, True, note=str(e))


def _drill(name: str, home: Path, database: postgres.Server, url: str, stack: contextlib.ExitStack, units: int) -> Row:
    made = [seal(llm.tiny(), c) for c in CONFIGS[:2]]
    book = Ledger()
    ledgers.promote(book, SYSTEM, made[0])
    live = _split(book, made[0], made[1])
    up = [stack.enter_context(running(SYSTEM, kind="uvicorn", PATCHBAY_BASE="tiny")) for _ in range(REPLICAS)]
    http = stack.enter_context(httpx.Client(timeout=30))
    until(lambda: all(experiment_of(http, s.url) for s in up))
    exposed: list[str] = []
    keys: list[str] = []
    wrong = hurt = 0
    for i in range(units):
        unit = f"u{i}"
        for s in up:  # what a proxy does with one user's calls
            got = http.post(f"{s.url}/v1/chat/completions", json=ASK, headers={"x-patchbay-unit": unit})
            hurt += got.status_code != 200
            wrong += got.headers["x-patchbay-patch"] != live.arm_digest(experiments.assign(live, unit))
            exposed.append(got.headers["x-patchbay-request"])
        for s in up:  # a client that tries again elsewhere
            got = http.post(f"{s.url}/v1/outcomes", json={"unit": unit, "value": i % 2, "key": f"k{i}"})
            hurt += got.status_code != 200
        keys.append(f"k{i}")
    judges = [s for s in up if _judge(http, s) == "this process"]
    one_judge = len(judges) == 1
    # a promotion reaches all of them
    start = time.monotonic()
    ledgers.promote(book, SYSTEM, made[1])
    until(lambda: all(champion_of(http, s.url) == made[1] for s in up), 20)
    reached = time.monotonic() - start
    # the judge is killed, another one judges
    kill(judges[0].pid)
    left = [s for s in up if s is not judges[0]]
    start = time.monotonic()
    until(lambda: sum(_judge(http, s) == "this process" for s in left) == 1, 30)
    judged = time.monotonic() - start
    # the database is killed: answers go on, and what was acknowledged is there when it is back
    database.stop()
    answers = [http.post(f"{s.url}/v1/chat/completions", json=ASK) for s in left for _ in range(5)]
    hurt += sum(a.status_code != 200 or a.headers["x-patchbay-patch"] != made[1] for a in answers)
    database.start()
    start = time.monotonic()
    until(lambda: _works(book, made), 30)
    until(lambda: all(experiment_of(http, s.url) for s in left), 30)
    back = time.monotonic() - start
    with Database(url).reading() as db:
        there = {r for (r,) in db.execute(text("SELECT request FROM events WHERE kind = 'exposure'"))}
        counted = [k for (k,) in db.execute(text("SELECT key FROM events WHERE kind = 'outcome'"))]
    lost = len(set(exposed) - there) + len(set(keys) - set(counted))
    wrong += len(counted) - len(set(counted))
    held = one_judge and not (lost or wrong or hurt) and reached < 2 and judged < 15
    return Row(
        name,
        len(exposed) + len(keys),
        held,
        lost=lost,
        wrong=wrong,
        hurt=hurt,
        recover_s=back,
        note=f"{len(judges)} judge; promotion on all after {reached:.1f} s; judge killed, another after {judged:.1f} s;"
        " database killed, no answer failed",
    )


def _split(book: Ledger, control: str, treatment: str) -> experiments.Experiment:
    x = experiments.begin(SYSTEM, control=control, treatment=treatment, share=0.5)
    ledgers.split(book, SYSTEM, experiments.plain(x))
    return x


def _works(book: Ledger, made: list[str]) -> bool:
    """Whether the ledger takes another experiment."""
    with contextlib.suppress(Exception):
        _split(book, made[1], made[0])
        return True
    return False


def experiment_of(http: httpx.Client, url: str) -> str:
    """The name of the experiment that a service says is live, "" for none or no answer."""
    with contextlib.suppress(httpx.HTTPError):
        found = http.get(f"{url}/v1/experiments/live").json().get("experiment")
        return found["name"] if found else ""
    return ""


def _judge(http: httpx.Client, s: Server) -> str:
    with contextlib.suppress(httpx.HTTPError):
        said: str = http.get(f"{s.url}/readyz").json().get("judge", "")
        return said
    return ""


def champion_of(http: httpx.Client, url: str) -> str:
    """The digest of the patch that a service's champion answers with, "" for the base."""
    got = http.post(f"{url}/v1/chat/completions", json={**ASK, "model": "champion"})
    said: str = got.headers.get("x-patchbay-patch", "")
    return said


def kill(pid: int) -> None:
    """Kill a process with all that it started, without a word."""
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGKILL)


def until(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.05)


ALL = (three_replicas,)
