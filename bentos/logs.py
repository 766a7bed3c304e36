"""Logs of a service as JSON lines, one object each, for PATCHBAY_LOG=json; without secrets in either form.

A line has time (UTC, ISO 8601), level, logger and message; a request's line has its number, route, status and
milliseconds, too, and no query, header, body or token.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.requests import Request

from registry.errors import ConfigError, unsecret

access = logging.getLogger("patchbay.access")
FIELDS = ("request", "route", "method", "status", "ms", "caller", "arm")


class Json(logging.Formatter):
    """Formatter that writes a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        out: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        out["message"] = unsecret(record.getMessage())
        out |= {name: record.__dict__[name] for name in FIELDS if record.__dict__.get(name) is not None}
        if record.exc_info and record.exc_info[0] is not None:
            out["error"] = record.exc_info[0].__name__
            out["trace"] = unsecret(self.formatException(record.exc_info))
        return orjson.dumps(out, default=str).decode()


def install(env: Mapping[str, str] = os.environ) -> None:
    """Write all logs of this process as JSON if PATCHBAY_LOG says so. Raises ConfigError for an unknown form."""
    kind = env.get("PATCHBAY_LOG", "text")
    if kind not in ("text", "json"):
        raise ConfigError(f"PATCHBAY_LOG={kind[:40]!r} is no form of logs; it may be text or json.")
    if kind == "text":
        return
    formatter = Json()
    own = logging.StreamHandler(sys.stderr)
    own.setFormatter(formatter)
    logger = logging.getLogger("patchbay")
    logger.handlers, logger.propagate = [own], False
    logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
    access.disabled = False
    access.setLevel(logging.INFO)
    named = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for other in (logging.root, *named):  # what libraries said before us, they go on saying in our form
        for handler in other.handlers:
            handler.setFormatter(formatter)


def answered(request: Request, route: str, status: int, seconds: float, arm: str | None) -> None:
    """Write a request's line, where lines are JSON."""
    token = getattr(request.state, "token", None)
    access.info("answered", extra={
        "request": request.state.number, "route": route, "method": request.method, "status": status,
        "ms": round(1e3 * seconds, 2), "caller": token.name if token is not None else None, "arm": arm,
    })  # fmt: skip


access.setLevel(logging.CRITICAL)  # until `install` wants them
