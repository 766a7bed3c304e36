"""What happens when the disk, the clock, the ledger, MLflow or the process itself fails: attack(home, night, seed)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import event

from patches.families import llm
from registry.ab import events
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.experiment import CONTROL
from registry.ab.ledger import Ledger
from tests.bench.server import running
from tests.bentos.conftest import CONFIGS, SYSTEM, seal
from tests.drill import place
from tests.drill.table import Row


def full_disk(home: Path, night: bool, seed: int) -> Row:
    """The event log may not grow any more, in the middle of an experiment; then it may again."""

    async def work() -> Row:
        async with place.words() as s, place.Calm(s) as calm:
            x = place.split(s)
            await s.until(lambda: s.runtime.table.experiment, 30)
            acked = 0
            for i in range(20):
                got = await s.chat(headers={"x-patchbay-unit": f"u{i}"})
                acked += got.status_code == 200
            database = s.runtime.events.database

            def full(db: sqlite3.Connection, _: Any) -> None:
                db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")

            give_up, events.GIVE_UP_S = events.GIVE_UP_S, 2.0
            event.listen(database._engine, "connect", full)
            database.close()
            slowest = failed = 0.0
            n = 0
            while s.runtime.table.experiment and n < 200:
                start = time.monotonic()
                got = await asyncio.gather(*(s.chat(headers={"x-patchbay-unit": f"f{n}-{i}" * 12}) for i in range(10)))
                slowest = max(slowest, time.monotonic() - start)
                failed += sum(g.status_code != 200 for g in got)
                n += 1
            stopped = s.ledger.head(SYSTEM).action
            event.remove(database._engine, "connect", full)
            database.close()
            events.GIVE_UP_S = give_up
            after = await place.recovered(s)
            lost = acked - sum(1 for i in range(20) if _there(home, x.name, f"u{i}"))
            held = failed == 0 and stopped == "stop" and lost == 0 and calm.hurt == calm.wrong == 0 and slowest < 6
        return Row(
            "a full disk under an experiment",
            n * 10,
            held,
            lost=lost,
            wrong=calm.wrong,
            hurt=calm.hurt + int(failed),
            recover_s=after,
            note=f"answers at most {slowest:.1f} s late, the experiment stopped itself",
        )

    return asyncio.run(work())


def _there(home: Path, name: str, unit: str) -> bool:
    with contextlib.closing(sqlite3.connect(home / "events.db")) as db:
        found = db.execute("SELECT 1 FROM events WHERE experiment = ? AND unit = ?", (name, unit)).fetchone()
    return found is not None


def locked_log(home: Path, night: bool, seed: int) -> Row:
    """Somebody else holds the event log for some seconds."""

    async def work() -> Row:
        async with place.words() as s, place.Calm(s) as calm:
            x = place.split(s)
            await s.until(lambda: s.runtime.table.experiment, 30)
            other = sqlite3.connect(home / "events.db", isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            start = time.monotonic()
            got = await asyncio.gather(*(s.chat(headers={"x-patchbay-unit": f"u{i}"}) for i in range(16)))
            slowest = time.monotonic() - start
            other.execute("ROLLBACK")
            other.close()
            after = await place.recovered(s)
            await s.until(lambda: s.runtime.events._waiting.empty(), 30)
            await asyncio.sleep(1.0)
            lost = sum(not _there(home, x.name, f"u{i}") for i in range(16))
        failed = sum(g.status_code != 200 for g in got)
        held = not failed and not lost and slowest < 6 and calm.hurt == calm.wrong == 0
        return Row(
            "a locked event log",
            16,
            held,
            lost=lost,
            wrong=calm.wrong,
            hurt=calm.hurt + failed,
            recover_s=after,
            note=f"answers went out after {slowest:.1f} s at most; every exposure was written later",
        )

    return asyncio.run(work())


ELSEWHERE = (
    "INSERT INTO entries SELECT seq + 1000, at, who, 'another', action, champion, challenger, experiment, evidence, "
    "'x' || seq, hash FROM entries LIMIT 1"
)
"""an entry of another system, so that everybody looks at the ledger again"""


def forged_ledger(home: Path, night: bool, seed: int) -> Row:
    """Entries that nobody sealed: inserted, changed, cut off."""

    async def work() -> Row:
        wrong = 0
        async with place.words() as s, place.Calm(s) as calm:
            evil = s.digests[2]
            forgeries = (
                "INSERT INTO entries SELECT seq + 1, at, 'evil', system, 'promote', '{d}', NULL, NULL, NULL, hash, "
                "'{h}' FROM entries ORDER BY seq DESC LIMIT 1",
                "UPDATE entries SET champion = '{d}' WHERE seq = (SELECT MAX(seq) FROM entries)",
                "UPDATE entries SET experiment = '{{' WHERE seq = (SELECT MAX(seq) FROM entries)",
                "DELETE FROM entries WHERE seq = (SELECT MAX(seq) FROM entries)",
            )
            slowest = 0.0
            for forgery in forgeries:
                with contextlib.closing(sqlite3.connect(home / "ledger.db")) as db:
                    rows = db.execute("SELECT * FROM entries").fetchall()
                    for trigger in ("no_update", "no_delete"):
                        db.execute(f"DROP TRIGGER IF EXISTS {trigger}")
                    db.execute(forgery.format(d=evil, h="f" * 64))
                    db.execute(ELSEWHERE)
                    db.commit()
                await s.until(lambda: "ledger" in s.runtime.warnings, 30)
                wrong += (await s.chat()).headers["x-patchbay-patch"] != s.digests[0]
                with contextlib.closing(sqlite3.connect(home / "ledger.db")) as db:
                    db.execute("DELETE FROM entries")
                    db.executemany("INSERT INTO entries VALUES (?,?,?,?,?,?,?,?,?,?,?)", rows)
                    db.commit()
                start = time.monotonic()
                await s.until(lambda: "ledger" not in s.runtime.warnings, 60)
                slowest = max(slowest, time.monotonic() - start)
        held = wrong == 0 and calm.hurt == calm.wrong == 0
        return Row(
            "a forged ledger",
            len(forgeries),
            held,
            wrong=wrong + calm.wrong,
            hurt=calm.hurt,
            recover_s=slowest,
            note="refused each time; the last sound table served on",
        )

    return asyncio.run(work())


def clock(home: Path, night: bool, seed: int) -> Row:
    """The clock steps back an hour and forward a day while things are decided."""
    ledger, real = Ledger(), time.time
    digests = [f"{i:064x}" for i in range(1, 7)]
    wrong = 0
    try:
        for digest, off in zip(digests, (0, -3600, 86_400, 0, -10, 5), strict=True):
            time.time = lambda off=off: real() + off  # type: ignore[assignment]
            ledgers.promote(ledger, SYSTEM, digest)
            head = ledger.head(SYSTEM)
            assert head is not None
            wrong += head.champion != digest
            live = ledger.live_at(SYSTEM, head.at)
            wrong += live is None or live.champion != digest
    finally:
        time.time = real
    at = [e.at for e in ledger.history(SYSTEM)]
    wrong += at != sorted(at, reverse=True)
    held = wrong == 0 and ledger.verify(SYSTEM) == 6
    return Row("a clock that steps", 6, held, lost=6 - len(at), wrong=wrong, note="what was live when keeps its order")


def no_mlflow(home: Path, night: bool, seed: int) -> Row:
    """MLflow does not answer while an experiment is to be decided."""

    async def work() -> Row:
        async with place.words() as s, place.Calm(s) as calm:
            calm.models = ("base", "champion")
            x = place.split(s, min_n=30)
            await s.until(lambda: s.runtime.table.experiment, 30)
            start = time.monotonic()
            for i in range(200):
                side = experiments.assign(x, str(i))
                s.runtime.events.expose(x, str(i), side)
                s.runtime.events.outcome(x, str(i), float(side == CONTROL)).result(30)
            await s.until(lambda: s.ledger.head(SYSTEM).action == "rollback", 60)
            took = time.monotonic() - start
        held = calm.hurt == calm.wrong == 0
        return Row(
            "MLflow is down",
            1,
            held,
            lost=0,
            wrong=calm.wrong,
            hurt=calm.hurt,
            recover_s=took,
            note="decided all the same; seconds are until the rollback",
        )

    before = os.environ.get("MLFLOW_TRACKING_URI", "")
    os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    try:
        return asyncio.run(work())
    finally:
        os.environ["MLFLOW_TRACKING_URI"] = before


_WRITER = """
import sys
from registry.ab.events import Events
from registry.ab import experiment as experiments
x = experiments.begin("attention_sink", control="base", treatment="a" * 64, share=0.5)
with Events() as log:
    for i in range(10**9):
        log.expose(x, f"{sys.argv[1]}-{i}", "control").result(30)
        print(x.name, f"{sys.argv[1]}-{i}", flush=True)
"""


def kill_9(home: Path, night: bool, seed: int) -> Row:
    """Writers of the event log are killed; what they were told is kept must be there."""
    lost = n = 0
    rounds = 12 if night else 3
    slowest = 0.0
    for r in range(rounds):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", _WRITER, f"{r}.{w}"],
                stdout=subprocess.PIPE,
                env=os.environ.copy(),
                cwd=Path(__file__).parents[2],
            )
            for w in range(2)
        ]
        said: list[bytes] = []
        readers = [threading.Thread(target=said.extend, args=(w.stdout or (),)) for w in writers]
        for reader in readers:
            reader.start()
        end = time.monotonic() + 60
        while len(said) < 200 and time.monotonic() < end:
            time.sleep(0.01)
        for w in writers:
            w.kill()
            w.wait()
        for reader in readers:
            reader.join(10)
        start = time.monotonic()
        with contextlib.closing(sqlite3.connect(home / "events.db")) as db:
            there = {f"{x} {u}" for x, u in db.execute("SELECT experiment, unit FROM events")}
        slowest = max(slowest, time.monotonic() - start)
        acked = [line.decode().strip() for line in said if line.endswith(b"\n")]
        n += len(acked)
        lost += sum(line not in there for line in acked)
    return Row(
        "kill -9 of writers", n, lost == 0 and n > 0, lost=lost, recover_s=slowest, note=f"{rounds} rounds of two"
    )


def processes(home: Path, night: bool, seed: int) -> Row:
    """A real server: half-sent heads, a stop while its log hangs. Long form only."""
    if not night:
        return Row("a server told to stop", 0, True, note="only in the long form")
    made = [seal(llm.tiny(), c) for c in CONFIGS[:2]]
    ledgers.promote(Ledger(), SYSTEM, made[0])
    x = experiments.begin(SYSTEM, control=made[0], treatment=made[1], share=0.5)
    ledgers.split(Ledger(), SYSTEM, experiments.plain(x))
    import socket

    with running(SYSTEM, PATCHBAY_BASE="tiny") as server:
        port = int(server.url.rpartition(":")[2])
        tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        half = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for s in half:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: lo")
        ask: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "model": "base"}
        start, hurt = time.monotonic(), 0
        while time.monotonic() - start < 20:
            hurt += httpx.post(f"{server.url}/v1/chat/completions", json=ask, timeout=20).status_code != 200
            time.sleep(0.2)
        closed = 0
        for s in half:
            s.settimeout(0.2)
            with contextlib.suppress(OSError):
                closed += s.recv(1000) == b""
            s.close()
        lock = sqlite3.connect(home / "events.db", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        callers = [threading.Thread(target=_quiet_post, args=(server.url,), daemon=True) for _ in range(8)]
        for c in callers:
            c.start()
        time.sleep(0.5)
        begun = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        left = psutil.wait_procs(tree, timeout=30)[1]
        took = time.monotonic() - begun
        lock.close()
    held = not hurt and closed == 300 and not left and took < 12
    return Row(
        "a server told to stop",
        309,
        held,
        hurt=hurt,
        recover_s=took,
        note=f"{closed} of 300 half-sent heads closed; gone after SIGTERM though its log hung",
    )


def _quiet_post(url: str) -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "stream": True}
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=30)


ALL = (full_disk, locked_log, forged_ledger, clock, no_mlflow, kill_9, processes)
