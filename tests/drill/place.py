"""A service to attack, and calm callers beside whoever attacks it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patches.families import clip, llm
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from tests.bentos.conftest import CONFIGS, PICTURES, SYSTEM, Served, seal, seal_features, serving


@contextlib.contextmanager
def own_home() -> Iterator[Path]:
    """A home for one attack."""
    before = os.environ.get("PATCHBAY_HOME")
    with tempfile.TemporaryDirectory(prefix="drill-") as place:
        os.environ["PATCHBAY_HOME"] = place
        try:
            yield Path(place)
        finally:
            os.environ.pop("PATCHBAY_HOME")
            if before:
                os.environ["PATCHBAY_HOME"] = before


@contextlib.asynccontextmanager
async def words(tokens: Any = None, **settings: Any) -> AsyncIterator[Served]:
    """A language model with champion and challenger."""
    base = llm.tiny()
    digests = [seal(base, c) for c in CONFIGS]
    async with serving(SYSTEM, digests, True, tokens, settings) as served:
        yield served


@contextlib.asynccontextmanager
async def pictures(**settings: Any) -> AsyncIterator[Served]:
    """A CLIP with champion and challenger."""
    base = clip.tiny()
    digests = [seal_features(base, range(0, 40, 2)), seal_features(base, range(5), 1, cards=False)]
    async with serving(PICTURES, digests, True, None, settings) as served:
        yield served


def split(s: Served, **more: Any) -> experiments.Experiment:
    """Begin an experiment of half and half."""
    x = experiments.begin(
        s.runtime.settings.system,
        control=s.digests[0],
        treatment=s.digests[1],
        share=0.5,
        words=[f"{k}={v}" for k, v in more.items()],
    )
    ledgers.split(s.ledger, x.system, experiments.plain(x))
    return x


@dataclass
class Calm:
    """Callers who ask the same thing again and again, and know the answer."""

    s: Served
    want: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    hurt: int = 0
    wrong: int = 0
    models: tuple[str, ...] = ("base", "champion", "challenger")
    _go: bool = True

    async def one(self, model: str) -> None:
        digest = {"base": "base", "champion": self.s.digests[0], "challenger": self.s.digests[1]}[model]
        got = await self.s.chat("calm and quiet", model=model, max_tokens=6)
        self.asked += 1
        if got.status_code != 200:
            self.hurt += 1
            return
        text = got.json()["choices"][0]["message"]["content"]
        self.hurt += self.want.setdefault(model, text) != text
        self.wrong += got.headers["x-patchbay-patch"] != digest

    async def _run(self) -> None:
        while self._go:
            for model in self.models:
                await self.one(model)
            await asyncio.sleep(0.01)

    async def __aenter__(self) -> Calm:
        for model in self.models:
            await self.one(model)
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._go = False
        await self._task


async def recovered(s: Served, seconds: float = 60.0) -> float:
    """Seconds until a call, /readyz and /livez answer 200."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    while loop.time() - start < seconds:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(10):
                codes = [(await s.chat()).status_code]
                codes += [(await s.http.get(path)).status_code for path in ("/readyz", "/livez")]
            if set(codes) == {200}:
                return loop.time() - start
        await asyncio.sleep(0.05)
    return float("inf")
