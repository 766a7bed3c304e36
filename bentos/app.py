"""A service as one ASGI application over one runtime."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bentos import traces
from bentos.desk import ROUTES, Desk
from bentos.http import Call, Handler, elsewhere, endpoint, preflight
from bentos.runtime import Runtime, Settings
from bentos.tokens import Tokens
from registry.errors import NotFound
from registry.systems import System, system

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


def shapes(row: System) -> list[Any]:
    """The modules that answer for a system. Raises NotFound if none of its shapes is written yet."""
    here = Path(__file__).parent / "shapes"
    there = [s for s in row.services if here.joinpath(*s.split(".")).with_suffix(".py").is_file()]
    found = [importlib.import_module(f"bentos.shapes.{s}") for s in there]
    if not found:
        raise NotFound(f"{row.name} is served as {' and '.join(row.services)}, which is not written yet.")
    return found


def calls(row: System) -> list[Call]:
    """Every route of a system's service."""
    return [*(r for m in shapes(row) for r in m.ROUTES), *ROUTES]


def application(settings: Settings | None = None, tokens: Tokens | None = None) -> Starlette:
    """The whole service as an ASGI application; its lifespan starts and stops the runtime."""
    settings = settings or Settings.from_environment()
    guard = tokens or Tokens.from_environment()
    row = system(settings.system)
    modules, routes = shapes(row), calls(row)
    answering: dict[Call, Handler] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        traces.tracer()  # what cannot trace says so before it loads anything
        runtime = Runtime(settings)
        desk = Desk(runtime, routes, " + ".join(row.services))
        app.state.desk = desk
        answering.update({r: r.bound(desk) for r in ROUTES})
        for module in modules:
            service = module.Service(desk)
            answering.update({r: r.bound(service) for r in module.ROUTES})
        await asyncio.to_thread(runtime.start)
        try:
            yield
        finally:
            await desk.close()
            await asyncio.to_thread(runtime.stop)

    app = Starlette(lifespan=lifespan)

    def seen(status: int) -> None:
        if (desk := getattr(app.state, "desk", None)) is not None:
            desk.runtime.counts.called(status)

    def route(r: Call) -> Route:
        async def call(request: Request, body: Any) -> Response:
            return await answering[r](request, body)

        return Route(r.path, endpoint(guard, r, call, seen), methods=[r.method])

    app.router.routes.extend(map(route, routes))
    if guard.origins:
        app.router.routes.extend(
            Route(path, preflight(guard), methods=["OPTIONS"]) for path in {r.path for r in routes}
        )
    app.router.routes.append(Route("/{path:path}", elsewhere(routes), methods=list(METHODS)))
    return app
