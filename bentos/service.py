"""What BentoML serves and packs: the application of `bentos.desk`, whole.

Nothing heavy is imported before the worker starts: BentoML's own processes import this module too, and torch would cost
each of them 700 MB. The settings switch off what BentoML would wrap around every call a second time: its access log,
its metrics (ours are at /metrics), its tracing and its limit of concurrency (we have a queue). Its timeout ends with
the first byte, so an answer may stream for longer.

There are PATCHBAY_WORKERS workers, on GPUs one each, with the base and every patch of their own, on one socket; the
ledger and the event log make them one service, as they do for replicas.
"""

from __future__ import annotations

import os
import sys

import bentoml
from starlette.exceptions import HTTPException

from bentos.hosted import hosted, workers


def _worker() -> bool:
    """Whether this process is one that BentoML started to work, and not a test or another server."""
    return sys.argv[0].replace(os.sep, "/").endswith("_bentoml_impl/worker/service.py")


if _worker():
    from bentos.connections import install

    install()

app = hosted(_worker, parent=True, worker=lambda: bentoml.server_context.worker_index or 1)


@bentoml.service(
    name="patchbay",
    workers=workers(),
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
