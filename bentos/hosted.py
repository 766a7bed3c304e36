"""What a process that serves does around the application: it takes its device and its share of the cores, says why it
cannot start, and stops in time.

A service that cannot start says why once and ends, all of it: whoever watches it would start it again for ever. Told to
stop, it lets what runs finish for FINISH_S, gives up the rest, and is gone by GONE_S whatever hangs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette

FINISH_S, GONE_S = 2.0, 5.0
"""Seconds this process may take to finish streams and to end; BentoML's own parent takes two to pass the signal on and
three to end after it"""
REFUSED = 3
"""Exit status of a service that cannot start"""


def workers(env: Mapping[str, str] = os.environ) -> int:
    """How many workers a service has, by PATCHBAY_WORKERS; by default one. Raises ValueError for another text."""
    text = env.get("PATCHBAY_WORKERS") or "1"
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 64:
        raise ValueError(f"PATCHBAY_WORKERS={text[:40]!r} is no whole number from 1 to 64. Leave it out for 1.")
    return int(text)


def device_of(worker: int, env: Mapping[str, str] = os.environ) -> str:
    """The device of a worker (from 1): a GPU each where PATCHBAY_DEVICE is `cuda`, else what it says."""
    device = env.get("PATCHBAY_DEVICE") or "cpu"
    return f"cuda:{worker - 1}" if device == "cuda" and workers(env) > 1 else device


def hosted(working: Callable[[], bool], parent: bool, worker: Callable[[], int] = lambda: 1) -> Starlette:
    """The application for a process of a server; nothing of it is imported before the server starts its lifespan.

    working: whether this process works, and not a test or a parent that only imports it. parent: whether ending has to
    end the parent, too. worker: number of this worker, from 1.
    """

    @contextlib.asynccontextmanager
    async def lifespan(outer: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                if working():
                    _start_lean()
                from bentos import logs
                from bentos.app import application

                logs.install()
                if workers() > 1:
                    os.environ["PATCHBAY_DEVICE"] = device_of(worker())
                _share_cores(workers())
                inner = application()
                outer.router.routes.extend(inner.router.routes)
                await stack.enter_async_context(inner.router.lifespan_context(inner))
            except Exception as e:
                if working():
                    _end(e, parent)
                raise
            outer.state.desk = inner.state.desk
            if working():
                _stop_in_time(inner.state.desk.runtime)
                gc.freeze()  # what was imported lasts
                gc.enable()
                sys.stderr.write(f"{inner.state.desk.runtime.told()}\n")
                sys.stderr.flush()
            yield

    return Starlette(lifespan=lifespan)


def _start_lean() -> None:
    """Import what requests need and no more, and look for garbage among it when it is all there."""
    from patches import lean

    lean.only_serves = True
    gc.disable()


def _share_cores(among: int) -> None:
    """One core is the event loops'; torch's threads spin on the others, unless the environment says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, (cores - 1) // among))


def _end(e: Exception, parent: bool) -> None:
    """Say why the service cannot start, and end it, whoever keeps starting it."""
    from registry.errors import PatchbayError

    if isinstance(e, PatchbayError):
        sys.stderr.write(f"patchbay cannot serve: {e}\n")
    else:
        import traceback

        traceback.print_exception(e)
    sys.stderr.flush()
    if parent:
        with contextlib.suppress(OSError):
            os.kill(os.getppid(), signal.SIGTERM)
    os._exit(REFUSED)


def _stop_in_time(runtime: Any) -> None:
    """Once told to stop: give up what still runs after FINISH_S, be gone after GONE_S. The server's own handler waits
    for every connection, for ever."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def told(n: int, frame: Any, before: Any = before) -> None:
            for seconds, do in ((FINISH_S, runtime.stop), (GONE_S, lambda: os._exit(1))):
                timer = threading.Timer(seconds, do)
                timer.daemon = True
                timer.start()
            if callable(before):
                before(n, frame)

        signal.signal(number, told)
