"""A real server process under BentoML on the tiny model: load, wrong arms, kill -9, promotion and rollback by itself.

`pytest -m slow -s tests/bentos/test_server.py` prints the times.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.experiment import CONTROL, TREATMENT
from registry.ab.ledger import Ledger
from registry.home import home
from tests.bench.server import Server, running

from .conftest import CONFIGS, SYSTEM, seal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CALLERS = 32
CALLS = 5000
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """The home of the server that the tests of this file share."""
    place = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHBAY_HOME", str(place))
        yield place


@pytest.fixture(scope="module")
def sealed(place, tiny_llm) -> list[str]:
    """Three patches: champion, challenger, and one nobody is routed to yet."""
    made = [seal(tiny_llm, c) for c in CONFIGS]
    first(made)
    return made


def first(made: list[str]) -> None:
    """The ledger as every test finds it."""
    head = Ledger().head(SYSTEM)
    if head is not None and head.experiment:
        ledgers.stop(Ledger(), SYSTEM)
    ledgers.promote(Ledger(), SYSTEM, made[0])
    ledgers.challenge(Ledger(), SYSTEM, made[1])


@pytest.fixture(scope="module")
def running_server(sealed) -> Iterator[Server]:
    with running(SYSTEM, PATCHBAY_BASE="tiny") as server:
        print(f"\nready after {server.ready_s:.1f} s, first answer after {server.answer_s:.1f} s")
        yield server


@pytest.fixture
def server(running_server, sealed, place, monkeypatch) -> Server:
    """The server, following a ledger with champion, challenger and no experiment."""
    monkeypatch.setenv("PATCHBAY_HOME", str(place))
    first(sealed)
    wanted = {"champion": sealed[0], "challenger": sealed[1], "experiment": None}

    async def follows() -> bool:
        async with client(running_server) as http:
            about = (await http.get("/v1/models")).json()["patchbay"]
        return wanted.items() <= about.items()

    asyncio.run(until(follows))
    return running_server


@pytest.fixture
def digests(sealed) -> list[str]:
    return sealed


def begin(digests: list[str], **words: Any) -> experiments.Experiment:
    given = [f"{k}={v}" for k, v in words.items()]
    x = experiments.begin(SYSTEM, control=digests[0], treatment=digests[1], share=0.5, words=given)
    ledgers.split(Ledger(), SYSTEM, experiments.plain(x))
    return x


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0, **more}


def said(answer: httpx.Response) -> str:
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


async def until(what: Any, seconds: float = 120.0) -> float:
    """Wait until `await what()`; how many seconds that took."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if await what():
            return time.monotonic() - start
        await asyncio.sleep(0.02)
    raise AssertionError("it never happened")


def client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=64, max_keepalive_connections=64)
    )


def test_five_thousand_calls_by_thirty_two_callers_without_an_error_or_a_wrong_arm(server, digests):
    """Base, champion, challenger and bare digests mixed at random; every answer is its own arm's, word for word."""
    texts = [f"say {word} again" for word in ("one", "two words", "three more words", "x")]
    arms = {
        "base": "base", "champion": digests[0], "challenger": digests[1],
        f"sha256:{digests[0]}": digests[0], f"sha256:{digests[1][:12]}": digests[1],
    }  # fmt: skip
    problems: Counter[str] = Counter()

    async def work() -> float:
        async with client(server) as http:
            alone = {(t, a): said(await http.post(CHAT, json=ask(t, model=a))) for t in texts for a in arms}
            assert len({tuple(alone[t, a] for t in texts) for a in ("base", "champion", "challenger")}) == 3
            todo = iter(range(CALLS))

            async def caller(seed: int) -> None:
                rng = random.Random(seed)
                for _ in todo:
                    text, arm = rng.choice(texts), rng.choice(list(arms))
                    try:
                        got = await http.post(CHAT, json=ask(text, model=arm))
                    except httpx.HTTPError as e:
                        problems[repr(e)[:80]] += 1
                        continue
                    if got.status_code != 200:
                        problems[f"{got.status_code} {got.text[:80]}"] += 1
                    elif said(got) != alone[text, arm] or got.headers["x-patchbay-patch"] != arms[arm]:
                        problems["wrong arm"] += 1

            start = time.monotonic()
            await asyncio.gather(*(caller(i) for i in range(CALLERS)))
            return time.monotonic() - start

    seconds = asyncio.run(work())
    print(f"{CALLS} calls at c = {CALLERS} in {seconds:.0f} s, problems: {dict(problems)}")
    assert not problems


def test_the_synchronous_openai_client_works_over_a_real_port(server):
    """Nothing of ours in it but the address."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as ai:
        messages: Any = [{"role": "user", "content": "hello"}]
        whole = ai.chat.completions.create(model="champion", messages=messages, max_tokens=12, temperature=0)
        parts = ai.chat.completions.create(
            model="champion", messages=messages, max_tokens=12, temperature=0, stream=True
        )
        assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
        assert {"base", "champion"} <= {m.id for m in ai.models.list()}
        with pytest.raises(openai.NotFoundError, match="gpt-9"):
            ai.chat.completions.create(model="gpt-9", messages=messages)


@dataclass
class Told:
    """What a user of an experiment was told: every 200 is a promise."""

    exposed: dict[str, str] = field(default_factory=dict)
    """request number -> unit"""
    counted: list[str] = field(default_factory=list)
    """keys of outcomes"""
    wrong: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    last_before: float = 0.0
    first_after: float = 0.0


async def use(http: httpx.AsyncClient, x: experiments.Experiment, told: Told, stop: asyncio.Event, seed: int) -> None:
    """A caller: a chat for a fresh unit, then its outcome; goes on through failures."""
    for n in itertools.count():
        if stop.is_set():
            return
        unit = f"u{seed}-{n}"
        try:
            got = await http.post(CHAT, json=ask("hello"), headers={"x-patchbay-unit": unit})
            if got.status_code != 200:
                told.failed[str(got.status_code)] += 1
                await asyncio.sleep(0.05)
                continue
            told.exposed[got.headers["x-patchbay-request"]] = unit
            told.wrong += got.headers["x-patchbay-patch"] != x.arm_digest(experiments.assign(x, unit))
            if told.last_before:
                told.first_after = told.first_after or time.monotonic()
            outcome = {"unit": unit, "value": 1, "key": f"k{unit}"}
            got = await http.post("/v1/outcomes", json=outcome)
            if got.status_code == 200:
                told.counted.append(f"k{unit}")
        except httpx.HTTPError as e:
            told.failed[type(e).__name__] += 1
            await asyncio.sleep(0.05)


def kept() -> tuple[dict[str, str], Counter[str]]:
    """What is on the disk: exposures by request, outcomes by key."""
    db = sqlite3.connect(home() / "events.db")
    exposed = dict(db.execute("SELECT request, unit FROM events WHERE kind = 'exposure'").fetchall())
    keys = Counter(k for (k,) in db.execute("SELECT key FROM events WHERE kind = 'outcome'"))
    db.close()
    return exposed, keys


def test_kill_9_of_the_worker_loses_nothing_acknowledged_and_it_comes_back(server, digests):
    x = begin(digests)
    told = Told()

    async def work() -> tuple[float, float]:
        async with client(server) as http:

            async def live() -> bool:
                answer = await http.get("/v1/experiments/live")
                return bool(answer.json()["experiment"])

            await until(live)
            stop = asyncio.Event()
            callers = [asyncio.create_task(use(http, x, told, stop, i)) for i in range(16)]
            while len(told.counted) < 300:
                await asyncio.sleep(0.01)
            worker = server.worker
            os.kill(worker, signal.SIGKILL)
            told.last_before = killed = time.monotonic()
            while not told.first_after:
                await asyncio.sleep(0.01)
                assert time.monotonic() - killed < 120, told
            before = len(told.counted)
            while len(told.counted) < before + 100:
                await asyncio.sleep(0.01)
            stop.set()
            await asyncio.gather(*callers)
            assert server.worker != worker
            return told.first_after - killed, time.monotonic()

    recovery_s, _ = asyncio.run(work())
    exposed, keys = kept()
    print(
        f"worker killed under load: first answer again after {recovery_s:.1f} s; {len(told.exposed)} exposures and "
        f"{len(told.counted)} outcomes acknowledged, all kept; failed meanwhile: {dict(told.failed)}"
    )
    assert told.wrong == 0
    assert told.exposed.items() <= exposed.items()
    assert set(told.counted) <= keys.keys()
    assert max(keys.values()) == 1
    assert set(told.failed) <= {"ReadError", "ConnectError", "RemoteProtocolError", "503", "ReadTimeout"}


def test_kill_9_of_everything_loses_nothing_acknowledged(tiny_llm):
    """The whole tree dies at once, as when a machine's power goes; a new server goes on where it ended."""
    digests = [seal(tiny_llm, c) for c in CONFIGS]
    first(digests)
    x = begin(digests)
    told = Told()

    async def load(server: Server, enough: int, kill: bool) -> None:
        async with client(server) as http:
            stop = asyncio.Event()
            callers = [asyncio.create_task(use(http, x, told, stop, i + 100 * kill)) for i in range(8)]
            before = len(told.counted)
            while len(told.counted) < before + enough:
                await asyncio.sleep(0.01)
            if kill:
                for pid in (server.pid, server.worker):  # the supervisor first, so that it restarts nothing
                    os.kill(pid, signal.SIGKILL)
            stop.set()
            await asyncio.gather(*callers)

    with running(SYSTEM, PATCHBAY_BASE="tiny") as server:
        asyncio.run(load(server, 150, kill=True))
    killed = dict(told.exposed), list(told.counted)
    with running(SYSTEM, PATCHBAY_BASE="tiny") as server:
        asyncio.run(load(server, 20, kill=False))
    exposed, keys = kept()
    assert killed[0].items() <= told.exposed.items() <= exposed.items()
    assert set(killed[1]) <= set(told.counted) <= keys.keys()
    assert told.wrong == 0


def test_promotion_and_rollback_are_followed_while_answers_go_on(server, digests):
    """No restart, no failed call, no answer by a half-loaded patch; rows in flight keep the arm they began with."""
    seen: list[tuple[float, str]] = []

    async def work() -> list[float]:
        async with client(server) as http:
            stop = asyncio.Event()

            async def caller() -> None:
                while not stop.is_set():
                    got = await http.post(CHAT, json=ask("hello"))
                    got.raise_for_status()
                    seen.append((time.monotonic(), got.headers["x-patchbay-patch"]))

            callers = [asyncio.create_task(caller()) for _ in range(4)]
            took = []
            for _ in range(5):
                for decide, digest in ((lambda: ledgers.promote(Ledger(), SYSTEM, digests[2]), digests[2]),
                                       (lambda: ledgers.rollback(Ledger(), SYSTEM), digests[0])):  # fmt: skip
                    decide()

                    async def served(digest: str = digest) -> bool:
                        return bool(seen) and seen[-1][1] == digest

                    took.append(await until(served))
            stop.set()
            await asyncio.gather(*callers)
            return took

    took = asyncio.run(work())
    print(f"followed after {sorted(took)[len(took) // 2]:.2f} s (median of {len(took)}, longest {max(took):.2f} s)")
    assert {d for _, d in seen} == {digests[0], digests[2]}
    assert max(took) < 10


def test_a_drop_of_five_points_rolls_back_by_itself(server, digests):
    """Users' outcomes over HTTP, 90 % good with the control, 85 % with the treatment; nobody touches the ledger."""
    x = begin(digests)
    rng = random.Random(0)
    treated = next(f"probe-{i}" for i in itertools.count() if experiments.assign(x, f"probe-{i}") == TREATMENT)
    told: list[float] = []
    """unix seconds at which each wave of outcomes was acknowledged"""

    async def work() -> tuple[int, float]:
        async with client(server) as http:

            async def patch() -> str:
                answer = await http.post(CHAT, json=ask("hi", max_tokens=1), headers={"x-patchbay-unit": treated})
                answer.raise_for_status()
                return str(answer.headers["x-patchbay-patch"])

            async def is_treated() -> bool:
                return await patch() == digests[1]

            async def is_back() -> bool:
                return await patch() == digests[0]

            async def chat(units: Iterator[str]) -> None:
                for unit in units:
                    got = await http.post(CHAT, json=ask("hi", max_tokens=1), headers={"x-patchbay-unit": unit})
                    got.raise_for_status()

            await until(is_treated)
            back = asyncio.create_task(until(is_back, 800))
            count = 0
            while not back.done():
                wave = [f"unit-{count + i}" for i in range(200)]
                todo = iter(wave)
                await asyncio.gather(*(chat(todo) for _ in range(CALLERS)))
                good = {u: 0.90 if experiments.assign(x, u) == CONTROL else 0.85 for u in wave}
                rows = [{"unit": u, "value": float(rng.random() < good[u]), "key": u} for u in wave]
                answer = await http.post("/v1/outcomes", json={"outcomes": rows, "experiment": x.name})
                answer.raise_for_status()
                told.append(time.time())
                count += len(wave)
            await back
            return count, time.time()

    begun = time.time()
    units, back = asyncio.run(work())
    head = Ledger().head(SYSTEM)
    assert (head.action, head.who, head.champion) == ("rollback", "judge", digests[0])
    decided = head.at - max(t for t in told if t <= head.at)
    print(
        f"5 points worse: {units} units, {head.at - begun:.0f} s of traffic; ledger {decided:.2f} s after the outcomes "
        f"that decided, champion served {back - head.at:.2f} s after the ledger. {head.evidence['why']}"
    )
    assert head.evidence["result"]["effect"] == pytest.approx(-0.05, abs=0.04)
