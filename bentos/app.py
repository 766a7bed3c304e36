"""A service as one ASGI application over one runtime, and the process that serves it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bentos import traces
from bentos.desk import ROUTES, Desk
from bentos.hosted import device_of, workers
from bentos.http import Call, Handler, elsewhere, endpoint, preflight
from bentos.runtime import Runtime, Settings, check
from bentos.runtime.settings import placed
from bentos.tokens import Tokens
from registry.ab.ledger import Ledger
from registry.errors import ConfigError, NotFound
from registry.home import home
from registry.systems import System, system

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
KEEP_ALIVE_S = 75
"""idle connections are closed after this; longer than proxies keep theirs (60 s), or they send into a closed one"""


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

    def route(r: Call) -> Route:
        async def call(request: Request, body: Any) -> Response:
            return await answering[r](request, body)

        return Route(r.path, endpoint(guard, r, call), methods=[r.method])

    app.router.routes.extend(map(route, routes))
    if guard.origins:
        app.router.routes.extend(
            Route(path, preflight(guard), methods=["OPTIONS"]) for path in {r.path for r in routes}
        )
    app.router.routes.append(Route("/{path:path}", elsewhere(routes), methods=list(METHODS)))
    return app


def serve(
    name: str, host: str = "127.0.0.1", port: int = 3000, background: bool = False,
    given: Mapping[str, str] | None = None, log: int | None = None, watched: bool = False,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Run the service for system `name`: this process becomes it, or, in the background, starts it. One worker
    is a process under uvicorn (`bentos.alone`), several are BentoML's.

    given: variables of the environment as flags set them. log: descriptor of the file it writes on. watched:
    whoever starts it starts it again, too; it then listens only while it is ready. Raises as `check`, before anything
    is started.
    """
    settings = {
        **os.environ, **(given or {}), "PATCHBAY_SYSTEM": name, "PATCHBAY_HOME": str(home()),
        "PATCHBAY_URL": f"http://{f'[{host}]' if ':' in host else host}:{port}", "BENTOML_DO_NOT_TRACK": "true",
    }  # fmt: skip
    settings = placed(settings)
    Tokens.from_environment(settings).check_host(host)
    declared = Settings.from_environment(settings)
    head = None if declared.pinned else Ledger().head(declared.system)
    try:
        several = workers(settings)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    for number in range(1, several + 1):
        check(replace(declared, device=device_of(number, settings)), head)
    command = [sys.executable, "-m", "bentos.alone", *(["--once"] if watched else []), host, str(port)]
    if several > 1:
        command = [
            sys.executable, "-m", "bentoml", "serve", "bentos.service:Patchbay", "--host", host, "--port", str(port),
            "--timeout-keep-alive", str(KEEP_ALIVE_S),
        ]  # fmt: skip
    root = Path(__file__).parent.parent
    if not background:
        # whoever ends this process means the service, and a parent that only waits would hold torch in its memory
        os.chdir(root)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], command, settings)
    return subprocess.Popen(command, env=settings, cwd=root, stdout=log, stderr=log)
