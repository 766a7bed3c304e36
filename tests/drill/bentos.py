"""Three Bentos behind nginx over a real PostgreSQL: one decision, one judge, and what is left when things die."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from bentos.build import build
from bentos.up import proxy
from patches.families import llm
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.database import Database
from registry.ab.ledger import Ledger
from registry.errors import NotFound
from tests import postgres
from tests.bench.server import end
from tests.bentos.conftest import CONFIGS, SYSTEM, seal
from tests.drill.replicas import ASK, champion_of, experiment_of, kill, until
from tests.drill.table import Row

REPLICAS = 3
CALLERS = 4
CHAT = "/v1/chat/completions"
NAME = "three Bentos behind nginx, on PostgreSQL"


def three_bentos(home: Path, night: bool, seed: int) -> Row:
    """As `drilled`, in the long form alone: three Bentos take minutes to start where others work as well."""
    del seed
    return drilled(home, 300) if night else Row(NAME, 0, True, note="tried in the long form")


def drilled(home: Path, units: int) -> Row:
    """Units are sticky, promotions are everywhere in time, and a replica, the judge and the database are killed, all
    under load through the proxy."""
    try:
        proxy.binary()
        with postgres.running() as database, contextlib.ExitStack() as stack:
            url = database.database()
            os.environ["PATCHBAY_DB"] = url
            stack.callback(os.environ.pop, "PATCHBAY_DB")
            return _drill(home, database, url, stack, units)
    except (pytest.skip.Exception, NotFound) as e:
        return Row(NAME, 0, True, note=str(e))


def _drill(home: Path, database: postgres.Server, url: str, stack: contextlib.ExitStack, units: int) -> Row:
    made = [seal(llm.tiny(), c) for c in CONFIGS[:2]]
    book = Ledger()
    ledgers.promote(book, SYSTEM, made[0])
    live = _split(book, made[0], made[1])
    tag = build(SYSTEM, made[0], beside=[made[1]]).tag
    up = stack.enter_context(_bentos(tag, home))
    front = stack.enter_context(_nginx(home, [r.port for r in up]))
    http = stack.enter_context(httpx.Client(timeout=30))
    until(lambda: all(experiment_of(http, r.url) for r in up), 120)
    notes: list[str] = []
    wrong = _sticky(http, [front, *(r.url for r in up)], live, units)
    judges = [r for r in up if _judge(http, r.url) == "this process"]
    held = len(judges) == 1
    notes.append(f"{len(judges)} judge")
    with _load(front, made) as load:
        # a promotion, and a promotion back, while everybody calls
        for digest in (made[1], made[0]):
            start = time.monotonic()
            ledgers.promote(book, SYSTEM, digest)
            until(lambda d=digest: all(champion_of(http, r.url) == d for r in up), 20)
            reached = time.monotonic() - start
            held = held and reached < 2
            notes.append(f"promotion on all after {reached:.1f} s")
            load.some(40)
        swapped = load.failed
        notes.append(f"{load.asked} calls meanwhile, {swapped} failed")
        second = _split(book, made[0], made[1])
        until(lambda: all(experiment_of(http, r.url) == second.name for r in up))
        load.experiment = second
        load.some(60)
        # a replica that does not judge, then the one that does
        _end(next(r for r in up if r not in judges))
        load.some(60)
        _end(judges[0])
        left = [r for r in up if r.process.poll() is None]
        start = time.monotonic()
        until(lambda: sum(_judge(http, r.url) == "this process" for r in left) == 1, 30)
        judged = time.monotonic() - start
        held = held and judged < 15
        notes.append(f"two replicas killed, the judge among them, another judges after {judged:.1f} s")
        load.some(60)
        # the database: answers go on, and who acknowledged an outcome has it when it is back
        database.stop()
        for _ in range(4):  # the callers wait for their outcomes; answers go on
            load.failed += http.post(f"{front}{CHAT}", json=ASK).status_code != 200
        database.start()
        start = time.monotonic()
        until(lambda: _counts(http, front, load), 60)
        back = time.monotonic() - start
        load.some(60)
    with Database(url).reading() as db:
        keys = "SELECT key FROM events WHERE kind = 'outcome' AND key IS NOT NULL"
        counted = [k for (k,) in db.execute(text(keys))]
    lost = len(load.keys - set(counted))
    wrong += load.wrong + len(counted) - len(set(counted))
    notes.append(f"database killed; {len(load.keys)} outcomes acknowledged, {load.again} sent again")
    return Row(
        NAME, load.asked + units * (REPLICAS + 1), held and not (lost or wrong or load.failed), lost=lost, wrong=wrong,
        hurt=load.failed, recover_s=back, note="; ".join(notes),
    )  # fmt: skip


# ---- the deployment ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Replica:
    """One Bento process."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def _bentos(tag: str, home: Path) -> Iterator[list[Replica]]:
    """Replicas of a Bento, each in a home of its own, as BentoML serves it."""
    ports = _free(REPLICAS)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PATCHBAY_", "MLFLOW_", "PYTHONPATH"))}
    kept |= {"PATCHBAY_DB": os.environ["PATCHBAY_DB"], "PATCHBAY_CACHE": str(home / "cache")}
    made = []
    try:
        for n, port in enumerate(ports):
            command = [sys.executable, "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(port)]
            env = {**kept, "PATCHBAY_HOME": str(home / f"replica-{n}")}
            out = subprocess.DEVNULL
            made.append(Replica(subprocess.Popen(command, cwd=home, env=env, stdout=out, stderr=out), port))
        with httpx.Client(timeout=5) as http:
            until(lambda: all(_ready(http, r.url) for r in made), 300)
        yield made
    finally:
        for replica in made:
            end(replica.process)


@contextlib.contextmanager
def _nginx(home: Path, ports: list[int]) -> Iterator[str]:
    """nginx before the replicas, with the configuration that `patchbay up` writes; its address."""
    (front,) = _free(1)
    folder = home / "nginx"
    folder.mkdir()
    (folder / "nginx.conf").write_text(proxy.config(folder, "127.0.0.1", front, {SYSTEM: ports}, None, trusted=True))
    command = [*proxy.binary(), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(timeout=5) as http:
            until(lambda: _ready(http, f"http://127.0.0.1:{front}"), 30)
        yield f"http://127.0.0.1:{front}"
    finally:
        end(process)


def _free(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in made:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in made]


# ---- the callers -------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Callers who ask and score, through the proxy, until told to stop; what is acknowledged is remembered."""

    url: str
    arms: list[str]
    experiment: experiments.Experiment | None = None
    asked: int = 0
    failed: int = 0
    """calls that were not answered"""
    wrong: int = 0
    """answers of an arm that the unit does not have"""
    again: int = 0
    """outcomes that were sent more than once"""
    keys: set[str] = field(default_factory=set)
    """outcomes that were acknowledged"""
    _go: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def some(self, calls: int) -> None:
        """Wait until so many more calls are answered."""
        want = self.asked + calls
        until(lambda: self.asked >= want, 120)

    def run(self, number: int) -> None:
        """One caller: a call for a unit, then its outcome, sent again with its key until it is acknowledged."""
        n = 0
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while self._go:
                n += 1
                unit, x = f"c{number}-{n}", self.experiment
                got = http.post(CHAT, json=ASK, headers={"x-patchbay-unit": unit})
                with self._lock:
                    self.asked += 1
                    self.failed += got.status_code != 200
                    of = got.headers.get("x-patchbay-experiment")
                    if x is not None and of == x.name:
                        right = x.arm_digest(experiments.assign(x, unit))
                        self.wrong += got.headers["x-patchbay-patch"] != right
                    self.wrong += got.status_code == 200 and got.headers.get("x-patchbay-patch") not in self.arms
                if of is not None:
                    self._score(http, unit, of, n)
                time.sleep(0.02)

    def _score(self, http: httpx.Client, unit: str, name: str, n: int) -> None:
        body = {"unit": unit, "value": n % 2, "key": f"{name}-{unit}", "experiment": name}
        tries = 0
        while self._go:
            tries += 1
            got = http.post("/v1/outcomes", json=body)
            with self._lock:
                if got.status_code == 200:
                    self.keys.add(f"{name}-{unit}")
                    self.again += tries > 1
                    return
            if got.status_code == 404:  # its exposure was lost with the database, which the service counts and says
                return
            time.sleep(0.1)


@contextlib.contextmanager
def _load(url: str, arms: list[str]) -> Iterator[Load]:
    """Callers until the block ends."""
    load = Load(url, arms)
    callers = [threading.Thread(target=load.run, args=(i,), daemon=True) for i in range(CALLERS)]
    for caller in callers:
        caller.start()
    try:
        yield load
    finally:
        load._go = False
        for caller in callers:
            caller.join(60)


def _sticky(http: httpx.Client, urls: list[str], live: experiments.Experiment, units: int) -> int:
    """Answers, through the proxy and by each replica, of another arm than the unit's."""
    wrong = 0
    for i in range(units):
        right = live.arm_digest(experiments.assign(live, f"u{i}"))
        for url in urls:
            got = http.post(f"{url}{CHAT}", json=ASK, headers={"x-patchbay-unit": f"u{i}"})
            wrong += got.headers.get("x-patchbay-patch") != right
    return wrong


def _split(book: Ledger, control: str, treatment: str) -> experiments.Experiment:
    x = experiments.begin(SYSTEM, control=control, treatment=treatment, share=0.5)
    ledgers.split(book, SYSTEM, experiments.plain(x))
    return x


def _counts(http: httpx.Client, url: str, load: Load) -> bool:
    """Whether an outcome is acknowledged again."""
    with contextlib.suppress(httpx.HTTPError, AttributeError):
        body = {"unit": "c0-1", "value": 1, "experiment": load.experiment.name}
        return http.post(f"{url}/v1/outcomes", json=body).status_code in (200, 404)
    return False


def _ready(http: httpx.Client, url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return http.get(f"{url}/readyz").status_code == 200
    return False


def _judge(http: httpx.Client, url: str) -> str:
    with contextlib.suppress(httpx.HTTPError):
        said: str = http.get(f"{url}/v1/models").json()["patchbay"]["judge"] or ""  # /readyz is BentoML's own there
        return said
    return ""


def _end(replica: Replica) -> None:
    kill(replica.process.pid)
    replica.process.wait()


ALL = (three_bentos,)
