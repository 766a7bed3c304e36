"""Wait for a request's jobs: queued together, and cancelled when the caller disconnects or the deadline passes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request

from bentos.desk import DEADLINE_S
from bentos.runtime import Runtime
from patches.families.worker import Job
from registry.errors import NotReady

LOOK_S = 1.0
"""Interval in seconds for checking the deadline and whether the caller is still connected"""


async def finished(
    runtime: Runtime,
    jobs: Sequence[Job],
    request: Request | None = None,
    news: Callable[[], Any] | None = None,
) -> None:
    """Queue jobs and wait for all; a failed one has its `error` set.

    news: called on the event loop when jobs made progress.

    Raises NotReady after the deadline, CancelledError if the caller of `request` has disconnected; the jobs are then
    cancelled.
    """
    if not jobs:
        return
    moved, loop = asyncio.Event(), asyncio.get_running_loop()

    def ring(_: Any) -> None:
        if news is not None or all(job.finished for job in jobs):
            with contextlib.suppress(RuntimeError):  # the loop may have ended; then nobody waits
                loop.call_soon_threadsafe(moved.set)

    for job in jobs:
        job.on_step = ring
    runtime.submit(jobs)
    start = loop.time()
    try:
        while not all(job.finished for job in jobs):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await moved.wait()
            moved.clear()
            if news is not None:
                news()
            if loop.time() - start > DEADLINE_S:
                raise NotReady(f"No answer within {DEADLINE_S:g} s; it was given up.")
            if request is not None and await request.is_disconnected():
                raise asyncio.CancelledError
    finally:
        for job in jobs:
            if not job.finished:
                runtime.cancel(job)
    for job in jobs:
        if job.finished == "failed" and job.error is None:
            job.error = NotReady("This job failed; it is in the log. Try again.")
