"""What BentoML serves and packs: the application of `bentos.desk`, whole.

Nothing heavy is imported before the worker starts: BentoML's own processes import this module too, and torch would cost
each of them 700 MB. The settings switch off what BentoML would wrap around every call a second time: its access log,
its metrics (ours are at /metrics), its tracing and its limit of concurrency (we have a queue). Its timeout ends with
the first byte, so an answer may stream for longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import bentoml
from starlette.applications import Starlette


@contextlib.asynccontextmanager
async def _lifespan(outer: Starlette) -> AsyncIterator[None]:
    from bentos.desk import application

    inner = application()
    outer.router.routes.extend(inner.router.routes)
    async with inner.router.lifespan_context(inner):
        outer.state.desk = inner.state.desk
        yield


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

    def __is_ready__(self) -> bool:
        # BentoML answers /readyz itself, before the application is asked
        desk = getattr(app.state, "desk", None)
        return desk is not None and not desk.runtime.problem
