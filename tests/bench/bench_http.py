"""What a patch costs over HTTP, and what HTTP costs: real servers under BentoML, every variant in turn in each round.

Ratios compare what one round measured side by side; absolute numbers are this machine's and are kept to be plotted,
not to be compared. The client and the servers share the machine, so CPU-ms per request counts, not requests per second.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from patches import artifact
from patches.export import export
from patches.families import llm
from patches.subject import Subject
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.home import home

from .conftest import TINY, Benched
from .floor import InProcess
from .interleave import interleave, ratio
from .load import Load, load, memory_mb
from .server import Server, running

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

CHAT = "/v1/chat/completions"
TOKENS = 16
TEXTS = [f"Tell me {n} thing{'s' * (n > 1)} about {what}." for n in range(1, 9) for what in ("a river", "iron", "bees")]
CALLS = {1: 4, 8: 24, 32: 64}
ROUNDS = {1: 8, 8: 5, 32: 4}


@dataclass(frozen=True)
class Variant:
    """One thing to be asked: a server, and how its arm is called."""

    server: Server
    model: str
    arm: str | None
    """the same arm in process"""

    def body(self, i: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": TEXTS[i % len(TEXTS)]}]
        about = {"model": self.model, "messages": messages, "max_tokens": TOKENS}
        return {**about, "temperature": 0, "ignore_eos": True}


def seal(subject: Benched, patch: Any) -> str:
    """A patch as the store would have brought it here."""
    folder = home() / "artifacts" / "part"
    about = artifact.save(patch, subject.system, folder, base=subject.base.label)
    folder.rename(folder.parent / about.digest)
    return about.digest


@pytest.fixture(scope="module")
def variants(subject: Benched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Variant]]:
    """base and patched on one server; a patch that folds with hooks on it too, and folded on a second one."""
    with pytest.MonkeyPatch.context() as env, contextlib.ExitStack() as stack:
        env.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp("home")))
        env.setenv("PATCHBAY_DEVICE", subject.base.device.type)
        digest = seal(subject, subject.patch)
        ledgers.promote(Ledger(), subject.system, digest)
        always = None
        if subject.foldable is not None and subject.foldable != subject.patch:
            always = seal(subject, subject.foldable)
            ledgers.challenge(Ledger(), subject.system, always)
        start = partial(running, subject.system)
        hooked = stack.enter_context(start(PATCHBAY_BASE=subject.base.ref))
        out = {
            "base": Variant(hooked, "base", None),
            "base again": Variant(hooked, "base", None),
            "patched": Variant(hooked, "champion", "patched"),
        }
        if subject.foldable is not None:
            if always is not None:
                out["foldable"] = Variant(hooked, "challenger", "foldable")
            folder = export(home() / "artifacts" / (always or digest), base=subject.base)
            env.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp("folded")))
            folded = stack.enter_context(start(PATCHBAY_BASE=f"local-dir:{folder}"))
            out["folded"] = Variant(folded, "base", "foldable")
        yield out


@pytest.fixture(scope="module")
def texts(subject: Benched, variants: dict[str, Variant]) -> dict[str, list[str]]:
    """What every variant must answer: each prompt decoded by itself, in this process, by the same arm."""
    arms = {"patched": subject.patch} | ({"foldable": subject.foldable} if subject.foldable else {})
    model = Subject(subject.base, arms)
    out = {}
    for arm in {v.arm for v in variants.values()}:
        chats = [[{"role": "user", "content": text}] for text in TEXTS]
        out[str(arm)] = [llm.generate(model, [c], TOKENS, arm=arm, ignore_eos=True)[0] for c in chats]
    model.close()
    assert len({tuple(v) for v in out.values()}) == len(out), "the arms do not differ on these prompts"
    return out


@pytest.mark.parametrize("callers", CALLS)
def bench_http(subject: Benched, variants, texts, benchmark, callers: int) -> None:
    """Closed loop with `callers` callers: tokens/s, p50, p99, CPU-ms per request, peak memory; equal answers."""
    loads: dict[str, list[Load]] = {name: [] for name in variants}

    def measure(name: str) -> None:
        v = variants[name]
        want = texts[str(v.arm)]
        loads[name].append(
            load(v.server.url + CHAT, v.body, CALLS[callers], callers, v.server.pid, want=lambda i: want[i % len(want)])
        )

    interleave({name: partial(measure, name) for name in variants}, ROUNDS[callers], warmup=1)
    for done in loads.values():
        del done[0]  # the warm-up
    benchmark.pedantic(partial(measure, "patched"), rounds=1)
    del loads["patched"][-1]

    def median(name: str, field: str) -> float:
        return statistics.median(getattr(one, field) for one in loads[name])

    def against(name: str, field: str) -> Any:
        return ratio([getattr(a, field) for a in loads[name]], [getattr(b, field) for b in loads["base"]])

    failed = {name: sum(one.failed for one in done) for name, done in loads.items()}
    unequal = {name: sum(one.unequal for one in done) for name, done in loads.items()}
    calls = CALLS[callers] * ROUNDS[callers]
    kept = ("tokens_per_s", "p50_ms", "p99_ms", "cpu_ms_per_call", "peak_mb")
    sides = {
        f"http_c{callers}_{name.replace(' ', '_')}/{f}": {"base": median("base", f), "patched": median(name, f)}
        for name in variants if name not in ("base", "base again") for f in kept
    }  # fmt: skip
    ratios = {f: {name: vars(against(name, f)) for name in variants} for f in kept}
    subject.about(
        benchmark, callers=callers, calls=calls, tokens=TOKENS, failed=failed, unequal=unequal, sides=sides,
        ratios=ratios["p50_ms"], throughput=ratios["tokens_per_s"], cpu=ratios["cpu_ms_per_call"],
        p99=ratios["p99_ms"],
    )  # fmt: skip
    print(f"\nc = {callers}, {calls} calls each; failed {failed}; unequal answers {unequal}")
    for name in variants:
        shown = "  ".join(f"{f} {median(name, f):8.1f} (x{against(name, f).median:.3f})" for f in kept)
        print(f"  {name:10} {shown}")
    assert not any(failed.values()), {name: [one.reasons for one in done] for name, done in loads.items()}
    if callers == 1:  # batches of another shape may round another way, and turn a near tie
        assert not any(unequal.values())
    assert all(n <= 0.05 * calls for n in unequal.values())


def bench_cold_start(subject: Benched, benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds from the start of the process to /readyz and to the first answer; base alone, and with a patch."""
    times: dict[str, list[tuple[float, float, float]]] = {"base": [], "patched": []}

    def start(name: str) -> None:
        monkeypatch.setenv("PATCHBAY_HOME", str(tmp_path / name))
        with running(subject.system, PATCHBAY_BASE=subject.base.ref) as server:
            times[name].append((server.ready_s, server.answer_s, memory_mb(server.pid)))

    monkeypatch.setenv("PATCHBAY_HOME", str(tmp_path / "patched"))
    ledgers.promote(Ledger(), subject.system, seal(subject, subject.patch))
    interleave({name: partial(start, name) for name in times}, rounds=3, warmup=1)
    for done in times.values():
        del done[0]
    benchmark.pedantic(partial(start, "patched"), rounds=1)
    words = ("ready_s", "answer_s", "memory_mb")
    median = {k: dict(zip(words, map(statistics.median, zip(*v, strict=True)), strict=True)) for k, v in times.items()}
    sides = {f"cold_start/{w}": {"base": median["base"][w], "patched": median["patched"][w]} for w in words}
    subject.about(benchmark, sides=sides, starts=len(times["base"]))
    print("\ncold start:", {k: {w: round(x, 2) for w, x in v.items()} for k, v in median.items()})


def bench_http_cost(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU-ms per request on the tiny model, as multiples of the same work in this process, one chat at a time.

    floor: the least Starlette that can do it. uvicorn, bentoml: the service. In process, `batch`: as many chats at once
    as there are callers, which is what the service can do and the floor cannot.
    """
    from patches.families.llm import tiny
    from patches.mechanisms.sink import SinkEdit

    monkeypatch.setenv("PATCHBAY_HOME", str(tmp_path))
    monkeypatch.setenv("PATCHBAY_BASE", "tiny")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subject = Benched(tiny(), SinkEdit(TINY, {}), None, "attention_sink")
    ledgers.promote(Ledger(), subject.system, seal(subject, subject.patch))
    here, calls = InProcess(), 256

    def body(i: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"hello {i % 100:03}"}]
        return {"model": "base", "messages": messages, "max_tokens": 1, "temperature": 0, "ignore_eos": True}

    raw = [orjson.dumps(body(i)) for i in range(calls)]

    def in_process(batch: int) -> float:
        start = time.process_time()
        for at in range(0, calls, batch):
            here(*raw[at : at + batch])
        return (time.process_time() - start) * 1e3 / calls

    with contextlib.ExitStack() as stack:
        servers = {
            kind: stack.enter_context(running(subject.system, kind=kind)) for kind in ("floor", "serve", "bentoml")
        }
        want = [orjson.loads(a)["choices"][0]["message"]["content"] for a in here(*raw)]
        costs: dict[str, list[float]] = {}
        failed = unequal = 0

        def over_http(kind: str, callers: int) -> None:
            nonlocal failed, unequal
            server = servers[kind]
            got = load(server.url + CHAT, body, calls, callers, server.pid, want=lambda i: want[i])
            failed, unequal = failed + got.failed, unequal + got.unequal
            costs.setdefault(f"{kind} c={callers}", []).append(got.cpu_ms_per_call)

        def alone(batch: int) -> None:
            costs.setdefault(f"in process x{batch}", []).append(in_process(batch))

        rounds = 6
        steps: dict[str, Any] = {f"in process x{n}": partial(alone, n) for n in (1, 8, 32)}
        steps |= {f"{k} c={c}": partial(over_http, k, c) for k in servers for c in (1, 8, 32)}
        interleave(steps, rounds, warmup=1)
        for done in costs.values():
            del done[0]
        ask = partial(httpx.post, servers["bentoml"].url + CHAT, json=body(0))
        benchmark.pedantic(ask, rounds=30, warmup_rounds=5)
    one = costs["in process x1"]
    out = {name: vars(ratio(cost, one)) for name, cost in costs.items()}
    batched = {
        f"{k} c={c}": vars(ratio(costs[f"{k} c={c}"], costs[f"in process x{c}"])) for k in servers for c in (1, 8, 32)
    }
    subject.about(benchmark, calls=calls * rounds, failed=failed, unequal=unequal, cost=out, cost_of_batch=batched)
    print(f"\nCPU of the server per request, in process one at a time = 1; failed {failed}, unequal {unequal}")
    for name, r in out.items():
        more = f"; of the same batch in process x{batched[name]['median']:.2f}" if name in batched else ""
        print(f"  {name:16} x{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]{more}")
    assert failed == unequal == 0
