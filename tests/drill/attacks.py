"""Hostile callers against a service in this process: attack(home, night, seed) -> Row."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bentos.tokens import Tokens, check_browser
from patches import artifact
from patches.families import llm
from patches.families.pictures import read
from patches.families.worker import Fleet
from patches.mechanisms.sink import SinkConfig, SinkEdit
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.experiment import CONTROL, OWNER
from registry.errors import Invalid
from tests.bentos.conftest import SYSTEM, seal
from tests.bentos.test_edge import request
from tests.bentos.test_faults import Breaks
from tests.drill import malformed, place, tampering
from tests.drill.table import Row


def malformed_requests(home: Path, night: bool, seed: int) -> Row:
    """Every route of two systems, with calm callers beside."""
    n = 5000 if night else 400

    async def work() -> Row:
        rng, seen, bad = random.Random(seed), Counter[int](), []
        async with place.words() as s, place.Calm(s) as calm:
            place.split(s)
            got, wrong = await malformed.attack(s.http, rng, malformed.WORDS, n)
            seen, bad = seen + got, bad + wrong
            after = await place.recovered(s)
        async with place.pictures() as s:
            got, wrong = await malformed.attack(s.http, rng, malformed.PICTURES, n)
            seen, bad = seen + got, bad + wrong
        for line in bad[:20]:
            print("   ", line)
        fives = sum(v for k, v in seen.items() if k >= 500)
        codes = ", ".join(f"{v:,} x {k}" for k, v in sorted(seen.items()))
        held = fives == 0 and calm.hurt == calm.wrong == 0
        return Row(
            "malformed requests, all routes",
            seen.total(),
            held,
            wrong=calm.wrong,
            hurt=calm.hurt,
            recover_s=after,
            note=f"{fives} x 5xx ({codes}); {calm.asked:,} calm calls",
        )

    return asyncio.run(work())


def damaged_pictures(home: Path, night: bool, seed: int) -> Row:
    """Bits, cuts and splices of five formats; anything but Invalid escapes."""
    n, rng = 50_000 if night else 4000, random.Random(seed)
    pictures = []
    for kind, mode, how in (
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("PNG", "LA", {"optimize": True}),
    ):
        out = io.BytesIO()
        noise = np.random.default_rng(seed).integers(0, 255, (24, 32, 4), dtype=np.uint8)
        image = Image.fromarray(noise, "RGBA")
        (Image.fromarray(noise[:, :, 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)).save(
            out, kind, **how
        )
        pictures.append(out.getvalue())
    escapes: Counter[str] = Counter()
    refused = 0
    for _ in range(n):
        raw = bytearray(rng.choice(pictures))
        for _ in range(rng.choice((0, 1, 1, 2, 4, 16))):
            raw[rng.randrange(len(raw))] = rng.choice((0, 255, rng.randrange(256)))
        how = rng.random()
        if how < 0.2:
            raw = raw[: rng.randrange(len(raw))]
        elif how < 0.3:
            at, other = rng.randrange(len(raw)), rng.choice(pictures)
            raw = raw[:at] + other[rng.randrange(len(other)) :]
        elif how < 0.4:
            at = rng.randrange(len(raw))
            raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
        try:
            read(base64.b64encode(bytes(raw)).decode())
        except Invalid:
            refused += 1
        except Exception as e:
            escapes[type(e).__name__] += 1
    sound = n - refused - escapes.total()
    note = f"{refused:,} refused, {sound:,} still pictures, {escapes.total()} escapes {dict(escapes) or ''}"
    return Row("damaged pictures", n, not escapes, note=note)


def tampered_folders(home: Path, night: bool, seed: int) -> Row:
    """Sealed folders changed behind their manifest's back, loaded by the digest they had."""
    folder = home / "sealed"
    patch = SinkEdit(SinkConfig(neurons=((0, 1),)), {"a": torch.ones(4), "b": torch.zeros(2, 3)})
    digest = artifact.save(patch, SYSTEM, folder, base=llm.tiny().label).digest
    n, wrong, words = tampering.attack(folder, lambda f: artifact.load(f, digest=digest), home)
    more, also, _ = tampering.attack(folder, lambda f: artifact.load(f, digest=None) and _still(f, digest), home)
    if words < n:
        wrong.append(f"{n} ways were refused in {words} different words")
    for line in (*wrong, *also)[:20]:
        print("   ", line)
    note = f"{words} different refusals of {n}; by digest and without"
    return Row("tampered folders", n + more, not wrong and not also, wrong=len(wrong) + len(also), note=note)


def _still(folder: Path, digest: str) -> None:
    """Without a digest to hold it to, a folder may be another, sound artifact; it must not pass for the first."""
    about, _ = artifact.load(folder)
    if about.digest != digest:
        raise artifact.BadArtifact(
            f"another artifact: {sorted(about.files)} {about.base} {about.parents} {about.config}"
        )


def disconnects(home: Path, night: bool, seed: int) -> Row:
    """Callers of a live experiment who leave at any moment, streams and outcomes among them."""
    n = 1000 if night else 120

    async def work() -> Row:
        rng = random.Random(seed)
        async with place.words() as s, place.Calm(s) as calm:
            x = place.split(s)
            await s.until(lambda: s.runtime.table.experiment, 30)
            await asyncio.sleep(0)

            async def leave(i: int) -> None:
                unit = {"x-patchbay-unit": f"u{i}"}
                if i % 5 == 4:
                    work = s.http.post("/v1/outcomes", json={"unit": f"u{i - 1}", "value": 1})
                else:
                    work = s.chat("leaving", headers=unit, max_tokens=30, stream=bool(i % 2))
                task = asyncio.ensure_future(work)
                await asyncio.sleep(rng.random() * 0.05)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

            for start in range(0, n, 20):
                await asyncio.gather(*(leave(i) for i in range(start, min(n, start + 20))))
            after = await place.recovered(s)
            kept = s.runtime.events.count()
            one = await s.chat("stays", headers={"x-patchbay-unit": "stays"})
            told = await s.http.post("/v1/outcomes", json={"unit": "stays", "value": 1})
            await s.until(lambda: s.runtime.queued == 0, 30)
            ill = s.runtime.watch.ill()
            ok = one.status_code == told.status_code == 200 and s.runtime.events.count() >= kept + 2
            threads = len(s.runtime.watch._all) + 1
        held = ok and not ill and not s.runtime.events.lost[x.name] and calm.hurt == calm.wrong == 0
        return Row(
            "callers who leave",
            n,
            held,
            lost=s.runtime.events.lost[x.name],
            wrong=calm.wrong,
            hurt=calm.hurt,
            recover_s=after,
            note=f"{threads - len(ill)} of {threads} threads well",
        )

    return asyncio.run(work())


def hostile_rows(home: Path, night: bool, seed: int) -> Row:
    """Cold temperatures, extreme biases, tokens without a row, prompts that do not fit in memory."""
    n = 400 if night else 60

    async def work() -> Row:
        rng, seen = random.Random(seed), Counter[int]()
        async with place.words() as s, place.Calm(s) as calm:
            s.runtime.base.processor.add_special_tokens({"additional_special_tokens": ["[MORE]"]})
            worker = s.runtime.worker
            decoder: Any = worker.base if isinstance(worker, Fleet) else worker
            forward = decoder._forward

            def full(rows: Any, *rest: Any) -> Any:
                if any(len(r.prompt) > 200 for r in rows):
                    raise torch.OutOfMemoryError("CUDA out of memory (planted)")
                return forward(rows, *rest)

            decoder._forward = full
            asks: list[dict[str, Any]] = [
                {"temperature": 1e-40},
                {"temperature": 5e-324, "top_p": 1e-300},
                {"text": "see [MORE]"},
                {"text": "x" * 220},
                {"temperature": 2.0, "logit_bias": {str(i): 100.0 for i in range(97)}},
                {"logit_bias": {str(i): -100.0 for i in range(97)}},
                {"n": 8, "temperature": 1e-38},
                {"logprobs": True, "top_logprobs": 20, "temperature": 1e-30},
            ]

            async def one() -> int:
                ask = dict(rng.choice(asks))
                return (await s.chat(ask.pop("text", "hostile"), **ask)).status_code

            for _ in range(0, n, 10):
                seen.update(await asyncio.gather(*(one() for _ in range(10))))
            after = await place.recovered(s)
        held = not calm.hurt and not calm.wrong and set(seen) <= {200, 400, 503}
        return Row(
            "hostile rows in everybody's batch",
            seen.total(),
            held,
            wrong=calm.wrong,
            hurt=calm.hurt,
            recover_s=after,
            note=f"{dict(sorted(seen.items()))} (503: does not fit in memory)",
        )

    return asyncio.run(work())


def broken_arm(home: Path, night: bool, seed: int) -> Row:
    """A treatment that begins to give NaN, or to raise, in the middle of an experiment."""

    async def work(how: str) -> tuple[place.Calm, int, str, float]:
        async with place.words() as s, place.Calm(s) as calm:
            calm.models = ("base", "champion")
            x = place.split(s)
            await s.until(lambda: s.runtime.table.experiment, 30)

            def put() -> None:
                s.runtime.subject.remove(s.digests[1])
                s.runtime.subject.add(s.digests[1], Breaks({"how": how}, {}))

            await asyncio.to_thread(s.runtime.call, put)
            start, control = time.monotonic(), Counter[int]()
            for block in range(60):
                units = [f"u{block}-{i}" for i in range(20)]
                got = await asyncio.gather(*(s.chat('"x', max_tokens=2, headers={"x-patchbay-unit": u}) for u in units))
                control.update(
                    g.status_code for u, g in zip(units, got, strict=True) if experiments.assign(x, u) == CONTROL
                )
                if s.ledger.head(SYSTEM).action == "rollback":
                    break
            took = time.monotonic() - start
            return calm, sum(v for k, v in control.items() if k != 200), s.ledger.head(SYSTEM).action, took

    hurt = wrong = n = 0
    took = 0.0
    actions = []
    for how in ("nan", "raise"):
        with place.own_home():
            calm, control, action, seconds = asyncio.run(work(how))
        hurt, wrong, n, took = hurt + control + calm.hurt, wrong + calm.wrong, n + 1, max(took, seconds)
        actions.append(action)
    held = hurt == wrong == 0 and actions == ["rollback"] * 2
    return Row(
        "an arm that breaks in an experiment",
        n,
        held,
        wrong=wrong,
        hurt=hurt,
        recover_s=took,
        note="rolled back by itself; the control never failed",
    )


def unservable(home: Path, night: bool, seed: int) -> Row:
    """Challengers of another base, of another layout, missing, damaged: the champion serves on."""

    async def work() -> Row:
        async with place.words() as s, place.Calm(s) as calm:
            calm.models = ("base", "champion")
            more = seal(llm.tiny(), SinkConfig(neurons=((2, 2),)))
            (home / "artifacts" / more / "extra").write_text("x")
            bad = [
                seal(llm.tiny(7), SinkConfig(neurons=((0, 1),))),
                seal(llm.tiny(), SinkConfig(neurons=((9, 1),))),
                "e" * 64,
                more,
            ]
            warned = 0
            for digest in bad:
                ledgers.challenge(s.ledger, SYSTEM, digest)
                await s.until(lambda d=digest: d[:16] in s.runtime.warning, 30)
                warned += (await s.http.get("/readyz")).status_code == 200
            ledgers.challenge(s.ledger, SYSTEM, s.digests[1])
            await s.until(lambda: not s.runtime.warning, 30)
            after = await place.recovered(s)
        held = warned == len(bad) and calm.hurt == calm.wrong == 0
        return Row(
            "challengers that cannot be served",
            len(bad),
            held,
            wrong=calm.wrong,
            hurt=calm.hurt,
            recover_s=after,
            note=f"{warned} warnings, the champion served on",
        )

    return asyncio.run(work())


def one_tenant(home: Path, night: bool, seed: int) -> Row:
    """A token that fails and praises its own units as it likes, alone and beside three honest ones."""
    from registry.ab.events import Events

    decided = []
    with Events(home / "events.db") as log:
        for share, beside in ((0.5, 0), (0.5, 3)):
            x = experiments.begin(
                SYSTEM,
                control="base",
                treatment="a" * 64,
                share=0.5,
                words=["promote_on_win=true", f"token_share={share}"],
            )
            rng = random.Random(seed)
            for i in range(1200 if night else 400):
                unit = f"mallory{OWNER}{i}"
                side = experiments.assign(x, unit)
                log.expose(x, unit, side, status=500 if side != CONTROL and not beside else 200)
                log.outcome(x, unit, float(side == CONTROL) if not beside else float(rng.random() < 0.5))
                for t in range(beside if i % 3 == 0 else 0):
                    unit = f"t{t}{OWNER}{i}"
                    log.expose(x, unit, experiments.assign(x, unit))
                    log.outcome(x, unit, float(rng.random() < 0.5))
            log.expose(x, "end", CONTROL).result(30)
            decided.append(experiments.judge(x, log.summary(x)).action)
    held = decided == ["continue", "continue"]
    return Row("one token decides", 2, held, note=f"decided: {', '.join(decided)}; its share is capped")


def long_prompts(home: Path, night: bool, seed: int) -> Row:
    """2 MB of text, and pictures of a kilobyte that claim 40 million pixels: does anybody else wait?"""

    async def work() -> Row:
        async with place.words(context=512) as s:
            await s.chat("warm")
            slow: list[float] = []
            stop = asyncio.Event()

            async def beat() -> None:
                while not stop.is_set():
                    before = time.perf_counter()
                    await s.http.get("/livez")
                    slow.append(time.perf_counter() - before)
                    await asyncio.sleep(0.01)

            task = asyncio.create_task(beat())
            n, seen = (40 if night else 8), Counter[int]()
            for _ in range(n):
                body = {"messages": [{"role": "user", "content": "word " * 400_000}]}
                seen[(await s.http.post("/v1/chat/completions", json=body)).status_code] += 1
            stop.set()
            await task
            worst = max(slow)
        return Row(
            "prompts of 2 MB",
            n,
            set(seen) == {400} and worst < 1.0,
            hurt=sum(v > 1.0 for v in slow),
            note=f"{dict(seen)}; livez at worst {worst * 1e3:.0f} ms",
        )

    return asyncio.run(work())


def browsers(home: Path, night: bool, seed: int) -> Row:
    """Names that were rebound to this machine, and pages from elsewhere."""
    tried = passed = 0
    hosts = (
        "evil.example",
        "localhost.evil.example",
        "10.0.0.1:3000",
        "",
        "[::2]",
        "127.0.0.1.nip.io",
        "0x7f.1",
        "a" * 300,
    )
    for host in hosts:
        for origin in (None, "http://evil.example", "null", "file://", f"http://{host}"):
            headers = {"host": host, **({"origin": origin} if origin else {})}
            tried += 1
            with contextlib.suppress(Exception):
                check_browser(Tokens(None), request(**headers))
                passed += 1
    for origin in ("http://evil.example", "null", "http://localhost:1", "https://localhost:3000.evil.example"):
        tried += 1
        with contextlib.suppress(Exception):
            check_browser(Tokens(None), request(host="localhost:3000", origin=origin))
            passed += 1
    return Row("foreign names and pages", tried, passed == 0, wrong=passed, note=f"{passed} answered")


ALL = (
    malformed_requests,
    damaged_pictures,
    tampered_folders,
    disconnects,
    hostile_rows,
    broken_arm,
    unservable,
    one_tenant,
    long_prompts,
    browsers,
)
