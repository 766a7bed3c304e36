"""What BentoML serves and packs: the application of `bentos.desk`, whole.

Nothing heavy is imported before the worker starts: BentoML's own processes import this module too, and torch would cost
each of them 700 MB. The settings switch off what BentoML would wrap around every call a second time: its access log,
its metrics (ours are at /metrics), its tracing and its limit of concurrency (we have a queue). Its timeout ends with
the first byte, so an answer may stream for longer.

A service that cannot start says why once and ends, all of it: BentoML would start its worker again for ever. Told to
stop, it lets what runs finish for FINISH_S, gives up the rest, and is gone by GONE_S whatever hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import bentoml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

FINISH_S, GONE_S = 2.0, 5.0
"""Seconds this process may take to finish streams and to end; BentoML's own parent takes two to pass the signal on and
three to end after it"""


@contextlib.asynccontextmanager
async def _lifespan(outer: Starlette) -> AsyncIterator[None]:
    from bentos import logs
    from bentos.app import application

    async with contextlib.AsyncExitStack() as stack:
        try:
            logs.install()
            _share_cores()
            inner = application()
            outer.router.routes.extend(inner.router.routes)
            await stack.enter_async_context(inner.router.lifespan_context(inner))
        except Exception as e:
            _end(e)
            raise
        outer.state.desk = inner.state.desk
        _stop_in_time(inner.state.desk.runtime)
        if _worker():
            sys.stderr.write(f"{inner.state.desk.runtime.told()}\n")
            sys.stderr.flush()
        yield


def _worker() -> bool:
    """Whether this process is one that BentoML started to work, and not a test or another server."""
    return sys.argv[0].replace(os.sep, "/").endswith("_bentoml_impl/worker/service.py")


def _share_cores() -> None:
    """One core is the event loop's; torch's threads spin on the others, unless the environment says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores - 1))


def _end(e: Exception) -> None:
    """Say why the service cannot start, and end it, whoever keeps starting it."""
    if not _worker():
        return
    from registry.errors import PatchbayError

    if isinstance(e, PatchbayError):
        sys.stderr.write(f"patchbay cannot serve: {e}\n")
    else:
        import traceback

        traceback.print_exception(e)
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(3)


def _stop_in_time(runtime: Any) -> None:
    """Once told to stop: give up what still runs after FINISH_S, be gone after GONE_S. The server's own handler waits
    for every connection, for ever."""
    if not _worker() or threading.current_thread() is not threading.main_thread():
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


if _worker():
    from bentos.connections import install

    install()

app = Starlette(lifespan=_lifespan)


@bentoml.service(
    name="patchbay",
    workers=1,  # one process holds one copy of the base with every patch; more workers are more copies
    # beyond our own deadline (bentos.desk.DEADLINE_S) and no longer: BentoML keeps a timer of half a kilobyte for
    # every request until then, answered or not
    traffic={"timeout": 330},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},
    envs=[{"name": "BENTOML_DO_NOT_TRACK", "value": "true"}],
)
@bentoml.asgi_app(app, path="/")
class Patchbay:
    """One base with all its patches, behind the shapes of API its system has."""

    # BentoML answers /readyz and /livez itself, before the application is asked; on the event loop, because a pool of
    # threads may be what is stuck

    async def __is_ready__(self) -> bool:
        return _well(desk.runtime.ill() if (desk := getattr(app.state, "desk", None)) else "starting")

    async def __is_alive__(self) -> bool:
        return _well(desk.runtime.dead() if (desk := getattr(app.state, "desk", None)) else "")


def _well(why: str) -> bool:
    if why:
        raise HTTPException(503, why)
    return True
