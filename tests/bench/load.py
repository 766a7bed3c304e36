"""A load client for a service on this machine: closed loop with c callers, failed calls counted, never dropped."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil


@dataclass(frozen=True)
class Load:
    """One run of load."""

    concurrency: int
    calls: int
    failed: int
    reasons: dict[str, int]
    """why calls failed -> how many"""
    unequal: int
    """answers that were not the text expected"""
    seconds: float
    p50_ms: float
    p99_ms: float
    tokens: int
    cpu_ms_per_call: float
    """CPU time of the server's whole process tree"""
    peak_mb: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def tree(pid: int) -> list[psutil.Process]:
    """The server and all its children."""
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


def cpu_s(pid: int) -> float:
    """CPU seconds used so far by the process tree."""
    total = 0.0
    for p in tree(pid):
        times = p.cpu_times()
        total += times.user + times.system
    return total


def memory_mb(pid: int) -> float:
    """Resident memory of the process tree, shared pages counted once per process."""
    return sum(p.memory_info().rss for p in tree(pid)) / 2**20


def chat(answer: Any) -> tuple[str, int]:
    """Text and number of tokens of a chat's answer."""
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


async def closed_loop(
    url: str, body: Callable[[int], dict[str, Any]], calls: int, concurrency: int, pid: int,
    headers: Callable[[int], dict[str, str]] = lambda _: {}, want: Callable[[int], str | None] = lambda _: None,
    read: Callable[[Any], tuple[str, int]] = chat,
) -> Load:  # fmt: skip
    """`calls` POSTs of body(i) by `concurrency` callers, each waiting for its answer before the next.

    want(i): the text answer i must be, None for any. read: an answer's text and how many tokens (or pictures) it took.
    """
    latencies: list[float] = []
    reasons: Counter[str] = Counter()
    tokens = unequal = 0
    peak = memory_mb(pid)
    todo = iter(range(calls))
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:

        async def caller() -> None:
            nonlocal tokens, unequal, peak
            for i in todo:
                start = time.perf_counter()
                try:
                    answer = await client.post(url, json=body(i), headers=headers(i))
                    if answer.status_code == 200:
                        said, made = read(answer.json())
                        tokens += made
                        unequal += want(i) not in (None, said)
                    else:
                        reasons[f"{answer.status_code} {answer.text[:120]}"] += 1
                except (httpx.HTTPError, ValueError, KeyError) as e:
                    reasons[repr(e)[:120]] += 1
                latencies.append((time.perf_counter() - start) * 1e3)
                if i % 50 == 0:
                    peak = max(peak, memory_mb(pid))

        before, start = cpu_s(pid), time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(concurrency)))
        seconds, used = time.perf_counter() - start, cpu_s(pid) - before
    latencies.sort()
    n = len(latencies)
    return Load(
        concurrency, n, sum(reasons.values()), dict(reasons), unequal, seconds, latencies[n // 2],
        latencies[min(n - 1, int(n * 0.99))], tokens, used * 1e3 / n, peak,
    )  # fmt: skip


def load(*args: Any, **how: Any) -> Load:
    return asyncio.run(closed_loop(*args, **how))
