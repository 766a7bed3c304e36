"""HTTP edge of every service: authentication, limits on bodies, validation, error responses. Independent of models.

Errors have OpenAI's shape, {"error": {"message", "type", "param", "code"}}. A PatchbayError brings its own status; any
other exception is a 500 that reveals nothing about the service.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import re
import reprlib
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import compile_path

from bentos import logs, traces
from bentos.tokens import CALLER, OPEN, Tokens, check_browser, near
from registry.errors import (
    BadRequest,
    Failed,
    NotReady,
    PatchbayError,
    TooLarge,
    plain,
)

log = logging.getLogger("patchbay")
MAX_BODY_BYTES = 2 << 20
PART_S, BODY_S = 10.0, 60.0
"""Longest wait in seconds for the next part of a body, and for the whole body"""
MAX_BYTES_IN_FLIGHT = 128 << 20
"""Largest total of bytes over all bodies being received"""
OFF_LOOP_BYTES = 64 << 10
"""Size above which a body is parsed on another thread, so that other requests need not wait"""
MAX_DEPTH = 32
"""Deepest nesting of brackets in JSON"""
MAX_FILES = 64
"""Largest number of files in one multipart form"""
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         408: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error",
         415: "invalid_request_error", 429: "rate_limit_error", 503: "unavailable_error"}  # fmt: skip


class WrongType(BadRequest):
    """The Content-Type header does not announce JSON."""

    status = 415


class TooSlow(BadRequest):
    """The rest of the body did not arrive in time."""

    status = 408


Handler = Callable[[Request, Any], Awaitable[Response]]


@dataclass(frozen=True)
class Call:
    """Declaration of one route of a service."""

    method: str
    path: str
    handler: Callable[[Any, Request, Any], Awaitable[Response]]
    """Coroutine method of a shape's Service, or of the Desk, that answers: (self, request, body) -> Response"""
    scope: str | None = None
    """Scope that a token needs (ANY: any known token); None: open to everybody (health)"""
    body: type[BaseModel] | None = None
    """Model that the JSON body must match; None for calls without a body"""
    max_bytes: int = MAX_BODY_BYTES
    """Largest size of the body"""
    files: str = ""
    """List field of the body to which files of a multipart form are added as {"data": base64}"""
    fields: bool = False
    """Whether the form's other parts are fields of the body, as OpenAI's clients send them: `n`,
    `patchbay[strength]`"""

    def bound(self, owner: Any) -> Handler:
        """Bind the handler to one service's `owner`."""
        return partial(self.handler, owner)


# A request's number is unique, not secret. The operating system's random numbers would cost every request a release of
# the interpreter's lock, and 5 ms until a decoding thread gives it back.
_STARTED = secrets.token_hex(4)
_NUMBERS = itertools.count(1)


def endpoint(
    tokens: Tokens, call: Call, handler: Handler, seen: Callable[[int], None] = lambda status: None
) -> Callable[[Request], Awaitable[Response]]:
    """Build a route's endpoint: authenticate, read and validate the body, call the handler, format errors.

    seen: told every response's status, of those too that were refused before they had an arm.
    """

    async def route(request: Request) -> Response:
        number = f"{_STARTED}{next(_NUMBERS):08x}"
        request.state.number = number
        start, allowed = time.perf_counter(), None
        traces.begin(request, call.path)
        try:
            allowed = check_browser(tokens, request)
            header = request.headers.get("authorization")
            request.state.token = tokens.admit(header, call.scope, near(request)) if call.scope else OPEN
            CALLER.set(request.state.token)
            body = await read(request, call) if call.body else None
            response = await handler(request, body)
        except PatchbayError as e:
            response = refuse(e, number)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            log.exception("request %s failed", number)
            response = error(500, f"Something failed here; it is in the log as request {number}.", "server_error")
        response.headers["x-patchbay-request"] = number
        if allowed is not None:
            response.headers["access-control-allow-origin"] = allowed
            response.headers["vary"] = "origin"
        traces.end(request, response)
        seen(response.status_code)
        if logs.access.isEnabledFor(logging.INFO):
            arm = response.headers.get("x-patchbay-arm")
            logs.answered(request, call.path, response.status_code, time.perf_counter() - start, arm)
        return response

    return route


def elsewhere(calls: Sequence[Call]) -> Callable[[Request], Awaitable[Response]]:
    """Build the endpoint for requests that no route answers: OPTIONS with the allowed methods, else 404 or 405."""
    known = [(compile_path(c.path)[0], "GET, HEAD" if c.method == "GET" else c.method) for c in calls]

    async def route(request: Request) -> Response:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        methods = [m for pattern, m in known if pattern.match(path)]
        if not methods:
            where = f"There is nothing at {path[:80]!r}. /openapi.json lists what there is."
            return error(404, where, KINDS[404])
        allow = {"allow": ", ".join([*dict.fromkeys(methods), "OPTIONS"])}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=allow)
        wrong = f"{path[:80]} takes {allow['allow']}, not {request.method[:20]}."
        return error(405, wrong, KINDS[400], headers=allow)

    return route


def preflight(tokens: Tokens) -> Callable[[Request], Awaitable[Response]]:
    """Build the endpoint that answers browsers' CORS preflight requests for pages of `tokens.origins`."""

    async def route(request: Request) -> Response:
        origin = request.headers.get("origin", "")
        if origin not in tokens.origins:
            return Response(status_code=403)
        return Response(status_code=204, headers={
            "access-control-allow-origin": origin, "vary": "origin", "access-control-max-age": "600",
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": "authorization, content-type, x-patchbay-arm, x-patchbay-unit",
        })  # fmt: skip

    return route


async def read(request: Request, call: Call) -> Any:
    """Read and validate a body as `call.body`.

    Raises TooLarge as soon as the limit is passed, BadRequest naming the field.
    """
    assert call.body is not None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (call.files and kind == "multipart/form-data"):
        also = " or multipart/form-data" if call.files else ""
        raise WrongType(f"Content-Type {kind[:60] or '(none)'!r} is not application/json{also}.")
    if "transfer-encoding" in request.headers and "content-length" in request.headers:
        raise BadRequest("Content-Length and Transfer-Encoding contradict each other; send one of them.")
    raw = await _received(request, call.max_bytes)
    body = call.body
    if kind == "multipart/form-data":
        values = await _form(request, raw, call)
        return await asyncio.to_thread(parse, body, values)
    if len(raw) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(lambda: parse(body, _object(raw, "The body")))
    return parse(body, _object(raw, "The body"))


class _Flight:
    """Total of bytes in the bodies that this process is receiving."""

    bytes = 0


async def _received(request: Request, limit: int) -> bytes:
    """Receive a whole body.

    Raises TooLarge as soon as it exceeds `limit`, TooSlow if it stalls, NotReady if too many bytes are in flight.
    """
    size = 0
    parts: list[bytes] = []
    loop = asyncio.get_running_loop()
    until = loop.time() + BODY_S
    try:
        async with asyncio.timeout(PART_S) as deadline:
            async for part in request.stream():
                size += len(part)
                _Flight.bytes += len(part)
                if size > limit:
                    raise TooLarge(f"The body is larger than {limit} bytes.")
                if _Flight.bytes > MAX_BYTES_IN_FLIGHT:
                    raise NotReady("Too many large bodies are being received; try again in a few seconds.")
                parts.append(part)
                deadline.reschedule(min(until, loop.time() + PART_S))
        return b"".join(parts)
    except TimeoutError:
        raise TooSlow(f"The body stopped after {size} bytes; it was given up.") from None
    finally:
        _Flight.bytes -= size


def _object(raw: bytes | str, what: str) -> dict[str, Any]:
    raw = raw.encode() if isinstance(raw, str) else raw
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(raw, what)
    try:
        values = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"{what} is not JSON: {str(e)[:120]}.") from None
    if not isinstance(values, dict):
        raise BadRequest(f"{what} must be a JSON object, not {type(values).__name__}.")
    return values


_PIECES = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""Strings (the last may be unterminated), and brackets outside of strings; possessive, so each byte is read once"""


def _check_depth(raw: bytes, what: str) -> None:
    """Refuse brackets nested deeper than MAX_DEPTH. Raises BadRequest."""
    depth = 0
    for found in _PIECES.finditer(raw):
        piece = found[0]
        if piece in b"[{":
            depth += 1
        elif piece in b"]}":
            depth -= 1
        if depth > MAX_DEPTH:
            raise BadRequest(f"{what} nests deeper than {MAX_DEPTH} brackets.")


async def _form(request: Request, raw: bytes, call: Call) -> dict[str, Any]:
    """Parse a multipart form: part `request` is the JSON body, every file one {"data": base64} of `call.files`."""

    async def whole() -> AsyncGenerator[bytes, None]:
        yield raw

    try:
        form = await MultiPartParser(request.headers, whole(), max_files=MAX_FILES, max_fields=64).parse()
    except MultiPartException as e:
        raise BadRequest(f"The form cannot be read: {e.message[:120]}.") from None
    values: dict[str, Any] = {}
    items = []
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            items.append({"data": base64.b64encode(await part.read()).decode()})
        elif name == "request":
            values = values | _object(part, "The part 'request'")
        elif call.fields:
            _put(values, name, part)
        else:
            raise BadRequest(f"The form has a field {name[:60]!r}; send the files, and the other fields in 'request'.")
    given = values.get(call.files, [])
    return {**values, call.files: [*(given if isinstance(given, list) else [given]), *items]}


def _put(values: dict[str, Any], name: str, text: str) -> None:
    """Set a field of a form.

    `a[b]` is field b of object a; values inside objects are parsed as JSON where possible, else text.
    """
    first, *rest = name.replace("]", "").split("[")
    if len(rest) > 8:
        raise BadRequest(f"The form's field {name[:60]!r} is too deep.")
    value: Any = text
    if rest or text[:1] == "{":
        _check_depth(text.encode(), f"The form's field {name[:60]!r}")
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            value = text
    node = values
    for key, after in zip([first, *rest][:-1], rest, strict=True):
        inner = node.setdefault(key, {})
        if not isinstance(inner, dict):
            raise BadRequest(f"The form's field {key[:60]!r} is given as a value and as an object with {after[:60]!r}.")
        node = inner
    node[[first, *rest][-1]] = value


def parse(model: type[BaseModel], values: Any) -> Any:
    """Validate `values` as a `model`. Raises BadRequest naming field and value."""
    try:
        return model.model_validate(values)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        # branches of a union have internal names, which would confuse the caller
        where = ".".join(str(part) for part in first["loc"] if not (isinstance(part, str) and ("[" in part)))[:200]
        given = _shown.repr(first.get("input"))[:80]
        said = _UNKNOWN if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        refusal = BadRequest(f"{where}: {said} (got {given}).")
        refusal.param = where  # type: ignore[attr-defined]
        raise refusal from None


_UNKNOWN = "this field is not known here, and what it asks for would not be done; leave it out"
_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxstring, _shown.maxother = 3, 80, 80


def refuse(e: PatchbayError, number: str = "") -> Response:
    """Convert an error into a response: in full if the request is at fault, without internals otherwise."""
    headers = {"retry-after": str(getattr(e, "retry_s", 2))} if e.status in (429, 503) else {}
    if e.status == 401:
        headers["www-authenticate"] = "Bearer"
    text = str(e)
    if e.status >= 500:
        if e.status != 503:
            log.error("request %s: %s: %s", number, type(e).__name__, e)
        if not isinstance(e, (NotReady, Failed)):
            text = f"Something failed here ({type(e).__name__}); it is in the log as request {number}."
    kind = KINDS.get(e.status, "server_error")
    return error(e.status, plain(text), kind, getattr(e, "param", None), headers, e.code)


def told(e: PatchbayError) -> dict[str, Any]:
    """Return the error object for one item of a request whose other items are answered."""
    return {"error": {"message": plain(str(e)), "type": KINDS.get(e.status, "server_error"), "code": e.status}}


def error(
    status: int, message: str, kind: str, param: str | None = None, headers: dict[str, str] | None = None,
    code: str | None = None,
) -> Response:  # fmt: skip
    """Build an error response in OpenAI's shape; `code` is by default its kind."""
    return answer({"error": {"message": message, "type": kind, "param": param, "code": code or kind}}, status, headers)


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Build a JSON response."""
    return Response(orjson.dumps(value), status, headers, "application/json")
