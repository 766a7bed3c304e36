"""One caller's fault stays one caller's: each attack that once hurt others, and a sibling of it."""

import asyncio
import threading
import time
from dataclasses import dataclass

import pytest
import torch

from bentos.app import application
from bentos.runtime import Runtime, Settings
from bentos.runtime.threads import Watch
from bentos.tokens import Tokens
from patches import artifact
from patches.engine.edits import Act
from patches.engine.patch import Patch
from patches.families import llm
from patches.mechanisms.sink import SinkConfig, SinkEdit
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.experiment import CONTROL, TREATMENT
from registry.ab.ledger import Ledger
from registry.errors import Failed, NotFinite, NotReady

from .conftest import CONFIGS, SYSTEM, seal


@dataclass(frozen=True)
class Breaks(Patch):
    """Gives NaN or raises at one site, for prompts that begin with one token (5: '"')."""

    Config = dict

    def edits(self):
        def act(x, inputs):
            if not bool((inputs["input_ids"][:, 0] == 5).any()) and x.shape[1] > 1:
                return x
            if self.config["how"] == "raise":
                raise RuntimeError("planted")
            return torch.full_like(x, float("nan"))

        return [Act("model.layers.1.mlp", act)]


async def plant(s, digest: str, how: str) -> None:
    """Arm `digest` breaks from now on, though it was verified and proved."""
    patch = Breaks({"how": how}, {})

    def put():
        s.runtime.subject.remove(digest)
        s.runtime.subject.add(digest, patch)

    await asyncio.to_thread(s.runtime.call, put)


def words(got):
    return got.json()["choices"][0]["message"]["content"]


# ---- 1: a row ------------------------------------------------------------------------------------------------------

HOSTILE = {
    "a cold temperature": ({"temperature": 1e-40}, 200),
    "the coldest": ({"temperature": 5e-324, "top_p": 1e-300}, 200),
    "a cold stream of many": ({"temperature": 1e-38, "n": 8}, 200),
    "every bias": ({"temperature": 2.0, "logit_bias": {str(i): 100.0 for i in range(97)}}, 200),
    "no token wanted": ({"logit_bias": {str(i): -100.0 for i in range(97)}, "seed": -(2**63)}, 200),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_leaves_its_neighbours_alone(service, name):
    more, status = HOSTILE[name]

    async def work():
        async with service() as s:
            want = words(await s.chat("calm"))
            calm = [asyncio.create_task(s.chat("calm")) for _ in range(12)]
            bad = [asyncio.create_task(s.chat("bad", **more)) for _ in range(4)]
            assert [(await t).status_code for t in bad] == [status] * 4
            assert [words(await t) for t in calm] == [want] * 12
            assert not s.runtime.counts.failed

    asyncio.run(work())


def test_a_token_the_tokenizer_knows_and_the_model_does_not_is_the_callers_error(service):
    async def work():
        async with service() as s:
            tokenizer = s.runtime.base.processor
            assert tokenizer.add_special_tokens({"additional_special_tokens": ["[MORE]"]}) == 1
            calm = [asyncio.create_task(s.chat("calm")) for _ in range(8)]
            for got in (
                await s.chat("see [MORE] here"),
                await s.http.post("/v1/completions", json={"prompt": ["fine", "[MORE]"]}),
            ):
                assert got.status_code == 400, got.text
                assert "vocabulary" in got.json()["error"]["message"]
            assert {(await t).status_code for t in calm} == {200}

    asyncio.run(work())


@pytest.mark.parametrize("how", ["nan", "raise"])
def test_an_arm_that_breaks_hurts_its_own_callers_only(service, how):
    async def work():
        async with service() as s:
            want = words(await s.chat('"calm', model="base"))
            await plant(s, s.digests[1], how)
            tasks = [
                asyncio.create_task(s.chat('"calm', model=m))
                for _ in range(6)
                for m in ("base", "champion", "challenger")
            ]
            got = [await t for t in tasks]
            assert [g.status_code for g in got[2::3]] == [500] * 6
            assert not any(s.digests[1][:16] in g.json()["error"]["message"] for g in got[2::3])
            assert [words(g) for g in got[::3]] == [want] * 6
            assert {g.status_code for g in got[1::3]} == {200}
            assert s.runtime.counts.failed == {s.digests[1]: 6}
            assert s.runtime.ill() == ""
            assert s.runtime.queued == 0

    asyncio.run(work())


def test_a_picture_that_fails_leaves_the_requests_others_answered(pictures, monkeypatch):
    """The sibling in another worker."""
    import base64
    import io

    from PIL import Image

    def picture(shade):
        out = io.BytesIO()
        Image.new("RGB", (40, 40), (shade, 90, 20)).save(out, "PNG")
        return base64.b64encode(out.getvalue()).decode()

    async def work():
        async with pictures() as s:
            worker = s.runtime.worker
            torch_ = worker._torch

            def sometimes(x, jobs):
                y = torch_(x, jobs)
                for i, p in enumerate(jobs):
                    if float(p.pixels.mean()) == ill:
                        y[i] = float("inf")
                return y

            images = [{"data": picture(i)} for i in (10, 80, 160)]
            ill = float(s.runtime.base.processor.image(Image.new("RGB", (40, 40), (80, 90, 20)))[0].mean())
            monkeypatch.setattr(worker, "_torch", sometimes)
            got = await s.http.post("/v1/classify", json={"images": images, "labels": ["cat", "dog"]})
            assert got.status_code == 200, got.text
            assert ["error" in r for r in got.json()["results"]] == [False, True, False]
            alone = await s.http.post("/v1/classify", json={"images": images[1:2], "labels": ["cat", "dog"]})
            assert alone.status_code == 500

    asyncio.run(work())


def test_memory_that_runs_out_sheds_the_largest_and_answers_the_rest(service, monkeypatch):
    async def work():
        async with service() as s:
            decoder = s.runtime.worker
            forward = decoder._forward

            def full(rows, first, starts, ids, counts):
                if any(len(r.prompt) > 100 for r in rows):
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return forward(rows, first, starts, ids, counts)

            monkeypatch.setattr(decoder, "_forward", full)
            calm = [asyncio.create_task(s.chat("calm")) for _ in range(6)]
            big = await s.chat("x" * 200)
            assert (big.status_code, big.headers["retry-after"]) == (503, "2")
            assert "memory" in big.json()["error"]["message"]
            assert {(await t).status_code for t in calm} == {200}

    asyncio.run(work())


# ---- 2: threads ----------------------------------------------------------------------------------------------------


def split(s, **words):
    x = experiments.begin(
        SYSTEM, control=s.digests[0], treatment=s.digests[1], share=0.5, words=[f"{k}={v}" for k, v in words.items()]
    )
    ledgers.split(s.ledger, SYSTEM, experiments.plain(x))
    return x


def test_callers_who_leave_end_nothing(service):
    async def work():
        async with service() as s:
            x = split(s)
            await s.until(lambda: s.runtime.table.experiment)
            for i in range(60):
                task = asyncio.create_task(s.chat("calm", headers={"x-patchbay-unit": f"u{i}"}))
                await asyncio.sleep(0.001 * (i % 20))
                task.cancel()
            got = await asyncio.wait_for(s.chat("calm", headers={"x-patchbay-unit": "stays"}), 20)
            assert got.status_code == 200
            one = {"unit": "stays", "value": 1}
            assert (await asyncio.wait_for(s.http.post("/v1/outcomes", json=one), 20)).status_code == 200
            assert (await s.http.get("/readyz")).status_code == 200
            assert s.runtime.watch.ill() == {}
            assert not s.runtime.events.lost[x.name]
            await s.until(lambda: s.runtime.queued == 0)

    asyncio.run(work())


@pytest.mark.parametrize("error", [ValueError, SystemExit, MemoryError])
def test_the_working_thread_survives_what_it_is_told(service, error):
    async def work():
        async with service() as s:

            def bad():
                raise error("planted")

            for _ in range(2):
                s.runtime.loop.tell(bad)
            assert (await asyncio.wait_for(s.chat(), 10)).status_code == 200
            assert (await s.http.get("/livez")).status_code == 200

    asyncio.run(work())


@pytest.mark.parametrize("which", ["follow", "judge"])
def test_a_quiet_thread_that_falls_is_begun_again(service, monkeypatch, which):
    async def work():
        async with service() as s:
            beat, fell = s.runtime.watch.beat, []

            def once(name):
                if name == which and not fell:
                    fell.append(name)
                    raise MemoryError("planted")
                beat(name)

            monkeypatch.setattr(s.runtime.watch, "beat", once)
            await s.until(lambda: fell)
            x = split(s, min_n=20)
            await s.until(lambda: s.runtime.table.experiment)
            for i in range(150):
                side = experiments.assign(x, str(i))
                s.runtime.events.expose(x, str(i), side)
                s.runtime.events.outcome(x, str(i), float(side == CONTROL)).result(10)
            await s.until(lambda: s.runtime.table.experiment is None, 30)
            assert s.ledger.head(SYSTEM).action == "rollback"

    asyncio.run(work())


def test_a_dead_writer_and_a_dead_worker_are_seen(service, monkeypatch):
    async def work():
        async with service() as s:
            monkeypatch.setattr(s.runtime.events, "problem", lambda: "the writer of the event log has ended")
            got = await s.http.get("/readyz")
            assert (got.status_code, "writer" in got.json()["why"]) == (503, True)
            monkeypatch.undo()
            assert (await s.http.get("/readyz")).status_code == 200
            w = s.runtime.watch._all["work"]
            real, w.thread = w.thread, threading.Thread()
            assert (await s.http.get("/livez")).status_code == 503
            assert (await s.http.get("/readyz")).status_code == 503
            assert "patchbay_ill 1" in (await s.http.get("/metrics")).text
            w.thread = real
            w.limit_s = -1.0
            assert "silent" in (await s.http.get("/readyz")).json()["why"]
            assert (await s.http.get("/livez")).status_code == 200

    asyncio.run(work())


def test_a_base_that_works_no_more_is_said_until_it_does(service, monkeypatch):
    async def work():
        async with service() as s:
            decoder = s.runtime.worker

            def lost(*_, **__):
                raise RuntimeError("CUDA error: device-side assert triggered")

            monkeypatch.setattr(decoder, "_forward", lost)
            monkeypatch.setattr(decoder, "proof", lost)
            assert (await s.chat()).status_code == 500
            await s.until(lambda: s.runtime.dead())
            assert (await s.http.get("/livez")).status_code == 503

    asyncio.run(work())


@pytest.mark.parametrize("where", ["step", "call", "log"])
def test_a_stop_is_over_in_ten_seconds_whatever_hangs(home, monkeypatch, where):
    go = threading.Event()

    async def work():
        app = application(Settings(SYSTEM, base="tiny"), Tokens(None))
        async with app.router.lifespan_context(app):
            runtime = app.state.desk.runtime
            if where == "step":
                monkeypatch.setattr(runtime.worker, "step", lambda: go.wait(60))
                runtime.submit([runtime.worker.probe(None)])
            elif where == "call":
                asyncio.get_running_loop().run_in_executor(None, runtime.call, lambda: go.wait(60))
            else:
                monkeypatch.setattr(runtime.events, "_keep", lambda _: go.wait(60))
                runtime.events.outcome(experiments.begin("a", control="base", treatment="a" * 64, share=0.1), "u", 1.0)
            await asyncio.sleep(0.3)
            return time.monotonic()

    began = asyncio.run(work())
    assert time.monotonic() - began < 10
    go.set()


def test_those_who_wait_when_it_stops_are_told(home):
    runtime = Runtime(Settings(SYSTEM, base="tiny"))
    runtime.start()
    row = runtime.worker.probe(None)
    row.max_tokens, told = 400, threading.Event()
    row.on_step = lambda r: told.set() if r.finished else None
    runtime.submit([row])
    runtime.stop()
    assert told.wait(5)
    assert row.finished == "length" or isinstance(row.error, NotReady)


def test_a_watched_thread_says_that_it_falls():
    watch, seen = Watch(), []

    def work():
        seen.append(1)
        raise OSError("again")

    watch.spawn("odd", work, 60)
    end = time.monotonic() + 10
    while "odd" not in watch.ill() and time.monotonic() < end:
        time.sleep(0.05)
    assert "fell" in watch.ill()["odd"]
    assert len(seen) >= 3
    assert watch.stop(time.monotonic() + 6) == []


# ---- 3: NaN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_neither_sealed_nor_loaded(tmp_path, tiny_llm, monkeypatch, value):
    x = torch.ones(3, 4)
    x[1, 2] = value
    with pytest.raises(NotFinite, match="1 of 12 numbers of 'w'"):
        artifact.save(SinkEdit(CONFIGS[1], {"w": x}), SYSTEM, tmp_path / "a", base=tiny_llm.label)
    assert not (tmp_path / "a").exists()
    with monkeypatch.context() as m:
        m.setattr(artifact, "check_finite", lambda *_: None)  # as an older or a hostile hand sealed it
        artifact.save(SinkEdit(CONFIGS[1], {"w": x}), SYSTEM, tmp_path / "b", base=tiny_llm.label)
    with pytest.raises(NotFinite):
        artifact.load(tmp_path / "b")


@pytest.mark.parametrize("how", ["nan", "raise"])
def test_a_patch_that_breaks_on_every_input_is_not_served(service, how):
    @dataclass(frozen=True)
    class Always(Patch):
        Config = dict

        def edits(self):
            def act(x, _):
                if how == "raise":
                    raise RuntimeError("planted")
                return x * float("nan")

            return [Act("model.layers.1.mlp", act)]

    async def work():
        async with service() as s:
            with pytest.raises((NotReady, Failed), match="f" * 16):
                await asyncio.to_thread(s.runtime._add, "f" * 64, Always({}, {}))
            assert "f" * 64 not in s.runtime.subject.arms
            assert (await s.chat()).status_code == 200

    asyncio.run(work())


def test_an_arm_that_breaks_under_way_is_rolled_back_and_the_control_is_well(service):
    async def work():
        async with service() as s:
            x = split(s)
            await s.until(lambda: s.runtime.table.experiment)
            await plant(s, s.digests[1], "nan")
            got = {CONTROL: [], TREATMENT: []}
            for block in range(14):
                units = [f"u{block}-{i}" for i in range(40)]
                answers = await asyncio.gather(
                    *(s.chat('"x', max_tokens=2, headers={"x-patchbay-unit": u}) for u in units)
                )
                for unit, a in zip(units, answers, strict=True):
                    if a.headers.get("x-patchbay-arm", "") != "champion":
                        got[experiments.assign(x, unit)].append(a.status_code)
                if s.ledger.head(SYSTEM).action == "rollback":
                    break
            await s.until(lambda: s.ledger.head(SYSTEM).action == "rollback", 10)
            why = s.ledger.head(SYSTEM).evidence["why"]
            assert "health" in why or "errors 100" in why
            assert s.ledger.head(SYSTEM).champion == s.digests[0]
            assert set(got[CONTROL]) == {200}

    asyncio.run(work())


# ---- 4: who judges -------------------------------------------------------------------------------------------------


def test_every_system_of_a_home_is_judged(service, pictures):
    async def work():
        async with service() as s, pictures() as p:
            await s.until(lambda: s.runtime.judging and p.runtime.judging)
            assert (s.runtime.judging, p.runtime.judging) == ("this process", "this process")
            assert (await p.http.get("/readyz")).json()["judge"] == "this process"
            second = Runtime(Settings(SYSTEM, base="tiny"))  # another service of one system: one judges, and says so
            await asyncio.to_thread(second.start)
            await s.until(lambda: second.judging)
            assert second.judging.startswith("process ")
            await asyncio.to_thread(second.stop)
            assert (await s.http.get("/v1/models")).json()["patchbay"]["judge"] == "this process"

    asyncio.run(work())


# ---- 5: what need not load -----------------------------------------------------------------------------------------


def ill_challengers(tiny_llm):
    """Challengers that cannot be served: of another base, of another kind, damaged, missing, not finite."""
    import tempfile
    from pathlib import Path

    from registry import manifest
    from registry.home import home

    def bare():
        (home() / "artifacts").mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=home()))
        (part / "x.txt").write_text("x")
        digest = manifest.write(part, kind="report", system=SYSTEM, base=tiny_llm.label, config={}).digest
        part.rename(home() / "artifacts" / digest)
        return digest

    def damaged():
        digest = seal(tiny_llm, CONFIGS[2])
        (home() / "artifacts" / digest / "more").write_text("unlisted")
        return digest

    return {
        "of another base": lambda: seal(llm.tiny(7), CONFIGS[2]),
        "of another kind": bare,
        "damaged": damaged,
        "missing": lambda: "e" * 64,
        "of other layers": lambda: seal(tiny_llm, SinkConfig(neurons=((9, 1),))),
    }


@pytest.mark.parametrize("what", ["of another base", "of another kind", "damaged", "missing", "of other layers"])
def test_a_challenger_that_cannot_be_served_is_a_warning(home, tiny_llm, what):
    home.mkdir(parents=True, exist_ok=True)
    ledger = Ledger()
    champion, digest = seal(tiny_llm, CONFIGS[0]), ill_challengers(tiny_llm)[what]()
    ledgers.promote(ledger, SYSTEM, champion)
    ledgers.challenge(ledger, SYSTEM, digest)
    runtime = Runtime(Settings(SYSTEM, base="tiny"))
    runtime.start()
    try:
        assert (runtime.table.champion, runtime.table.challenger) == (champion, None)
        assert digest[:16] in runtime.warning
        assert runtime.ill() == ""
        x = experiments.begin(SYSTEM, control=champion, treatment=digest, share=0.5)
        ledgers.split(ledger, SYSTEM, experiments.plain(x))
        end = time.monotonic() + 10
        while "does not run here" not in runtime.warning and time.monotonic() < end:
            time.sleep(0.05)
        assert "does not run here" in runtime.warning
        assert runtime.table.experiment is None
    finally:
        runtime.stop()


def test_a_champion_that_cannot_be_served_stops_the_start_and_says_why(home, tiny_llm):
    home.mkdir(parents=True, exist_ok=True)
    digest = seal(llm.tiny(7), CONFIGS[0])
    ledgers.promote(Ledger(), SYSTEM, digest)
    runtime = Runtime(Settings(SYSTEM, base="tiny"))
    with pytest.raises(Exception, match="was made from"):
        runtime.start()
    assert "was made from" in runtime.problem
    runtime.stop()


def test_a_running_service_keeps_its_champion_when_the_next_cannot_be_served(service):
    async def work():
        async with service() as s:
            ledgers.promote(s.ledger, SYSTEM, "d" * 64)
            await s.until(lambda: s.runtime.warning)
            assert (await s.chat()).headers["x-patchbay-patch"] == s.digests[0]
            assert "warning" in (await s.http.get("/readyz")).json()
            ledgers.promote(s.ledger, SYSTEM, s.digests[2])
            await s.until(lambda: s.runtime.table.champion == s.digests[2])
            await s.until(lambda: not s.runtime.warning)

    asyncio.run(work())
