"""Open Inference Protocol v2 (KServe, Triton): health and metadata, for platforms that look for them.

A model is a system, its versions are the digests that are loaded. What a system answers is no table of tensors, so
`inputs` and `outputs` are empty and there is no `/infer`: its own routes (`/openapi.json`) are where it is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from bentos.http import Call, answer
from bentos.tokens import ANY
from registry.ab.ledger import BASE
from registry.errors import NotFound
from registry.systems import system

if TYPE_CHECKING:
    from bentos.desk import Desk

VERSION = "0.1.0"


async def server(desk: Desk, request: Request, _: None) -> Response:
    """Describe the server."""
    del desk, request
    return answer({"name": "patchbay", "version": VERSION, "extensions": []})


async def live(desk: Desk, request: Request, _: None) -> Response:
    """Answer liveness probes: 503 if only a new process can help."""
    del request
    why = desk.runtime.dead()
    return answer({"live": not why}, 503 if why else 200)


async def ready(desk: Desk, request: Request, _: None) -> Response:
    """Answer readiness probes: 503 if no request should be sent here now."""
    del request
    why = desk.runtime.ill()
    return answer({"ready": not why}, 503 if why else 200, {"retry-after": "2"} if why else None)


async def model(desk: Desk, request: Request, _: None) -> Response:
    """Describe the system, or one of its versions. Raises NotFound for another name or digest."""
    name, version = _known(desk, request)
    kind = system(name).family
    versions = [version] if version else _versions(desk)
    return answer({"name": name, "versions": versions, "platform": f"patchbay_{kind}", "inputs": [], "outputs": []})


async def model_ready(desk: Desk, request: Request, _: None) -> Response:
    """Answer whether the system, or one of its versions, is served here now. Raises as `model`."""
    name, _version = _known(desk, request)
    why = desk.runtime.ill()
    return answer({"name": name, "ready": not why}, 503 if why else 200, {"retry-after": "2"} if why else None)


def _versions(desk: Desk) -> list[str]:
    """Digests that are loaded, the champion first."""
    table = desk.table()
    return list(dict.fromkeys([table.champion, *sorted(table.loaded), BASE]))


def _known(desk: Desk, request: Request) -> tuple[str, str]:
    """The system and the version that a path names; no version is "". Raises NotFound."""
    name, version = request.path_params["name"], request.path_params.get("version", "")
    here = desk.runtime.settings.system
    if name != here:
        raise NotFound(f"There is no model {name[:80]!r} here; there is {here}.")
    if version and version not in _versions(desk):
        raise NotFound(f"{here} has no version {version[:80]!r} loaded; /v2/models/{here} lists them.")
    return name, version


ROUTES: tuple[Call, ...] = (
    Call("GET", "/v2", server),
    Call("GET", "/v2/health/live", live),
    Call("GET", "/v2/health/ready", ready),
    Call("GET", "/v2/models/{name}", model, ANY),
    Call("GET", "/v2/models/{name}/ready", model_ready),
    Call("GET", "/v2/models/{name}/versions/{version}", model, ANY),
    Call("GET", "/v2/models/{name}/versions/{version}/ready", model_ready),
)
