"""Access control: bearer tokens with scopes and rates; without a token file this machine only, and no foreign page."""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from bentos import shapes
from registry.errors import (
    ConfigError,
    Forbidden,
    TooMany,
    Unauthorised,
)

ANY = "any"
"""Scope of a call that every known token may make"""
SCOPES = (*sorted(set(shapes.SCOPES.values())), "compare", "outcomes", "metrics")
"""All scopes a token may have: one per kind of shape, and the desk's own"""


@dataclass
class Bucket:
    """Token bucket of a rate limit: the calls a token may still make, refilled continuously."""

    per_s: float
    burst: float
    left: float
    at: float = field(default_factory=time.monotonic)

    def take(self) -> bool:
        """Take one call from the bucket; return False if it is empty."""
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.at) * self.per_s)
        self.at = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


@dataclass(frozen=True)
class Token:
    """A caller, identified by the sha256 of its bearer token; the token itself is not kept."""

    name: str
    """Name in error messages and logs"""
    scopes: frozenset[str]
    """Scopes of SCOPES that it may use"""
    bucket: Bucket | None
    tenant: str = ""
    """Owner of units, galleries and keys; several tokens may share one. Empty without a token file"""


OPEN = Token("anyone", frozenset(SCOPES), None)


class Tokens:
    """The tokens that may call. Without a file, everybody on this machine may call, and nobody else.

    File format: {"<sha256 of the token>": {"name": "...", "scopes": ["generate", ...], "per_minute": 600, "tenant":
    "..."}}. The tenant, by default the name, owns units, galleries and keys.
    """

    def __init__(self, file: Path | None, origins: str = "") -> None:
        """Load the token file.

        origins: comma-separated origins of other pages that may call, such as https://a.example.

        Raises ConfigError for a file that is not in the format above.
        """
        self.known: dict[str, Token] | None = None
        self.origins = frozenset(o.strip() for o in origins.split(",") if o.strip())
        if file is None:
            return
        try:
            listed = json.loads(file.read_text())
            self.known = {key.lower(): _token(key, about) for key, about in listed.items()}
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
            raise ConfigError(f"The token file {file.name} cannot be read: {e}.") from None

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Tokens:
        """As PATCHBAY_TOKENS and PATCHBAY_ORIGINS say."""
        name = env.get("PATCHBAY_TOKENS")
        return cls(Path(name) if name else None, env.get("PATCHBAY_ORIGINS", ""))

    def check_host(self, host: str) -> None:
        """Refuse to listen on a network address without tokens. Raises ConfigError."""
        if self.known is None and host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(f"Serving on {host} without tokens would be open to everybody. Set PATCHBAY_TOKENS.")

    def admit(self, header: str | None, scope: str, near: bool) -> Token:
        """Authenticate a caller and charge its rate limit. near: whether it calls from this machine.

        Raises Unauthorised, Forbidden or TooMany.
        """
        if self.known is None:
            if not near:
                raise Unauthorised(
                    "This service has no tokens, so it answers only its own machine. Set PATCHBAY_TOKENS."
                )
            return OPEN
        scheme, _, value = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not value:
            raise Unauthorised("This service wants a bearer token: Authorization: Bearer <token>.")
        digest = hashlib.sha256(value.strip().encode()).hexdigest()
        found = None
        for key, token in self.known.items():  # all of them: timing must not reveal the match
            if hmac.compare_digest(key, digest):
                found = token
        if found is None:
            raise Unauthorised("This bearer token is not known here.")
        if scope not in (ANY, *found.scopes):
            raise Forbidden(f"The token of {found.name} lacks the scope {scope!r}.")
        if found.bucket and not found.bucket.take():
            raise TooMany(f"{found.name} is over its {found.bucket.per_s * 60:g} calls a minute.")
        return found


def _token(key: str, about: dict[str, Any]) -> Token:
    if len(key) != 64:
        raise ValueError("keys must be sha256 digests of tokens")
    if unknown := set(about.get("scopes", SCOPES)) - set(SCOPES):
        raise ValueError(f"unknown scope {sorted(unknown)[0]!r}; scopes are {', '.join(SCOPES)}")
    rate = float(about.get("per_minute", 0))
    bucket = Bucket(rate / 60, max(1.0, rate / 6), max(1.0, rate / 6)) if rate else None
    tenant = str(about.get("tenant", about["name"]))
    if not re.fullmatch(r"[\x20-\x7e]{1,64}", tenant):
        raise ValueError(f"the tenant {tenant[:40]!r} must be 1 to 64 printable characters")
    return Token(str(about["name"]), frozenset(about.get("scopes", SCOPES)), bucket, tenant)


def near(request: Request) -> bool:
    """Return whether a call arrived at a loopback address, or over no network at all.

    Judged by the address it was sent to, which no header can forge. A Bento binds every address by default and must not
    be open to all of them.
    """
    if any(name in FORWARDED for name, _ in request.scope["headers"]):
        return False  # a local proxy forwarded it for somebody elsewhere
    return _loopback(_server(request))


FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via"})
"""Headers that proxies add, lower-case bytes as ASGI servers give them"""


def _server(request: Request) -> str:
    server = request.scope.get("server")
    return server[0] if server else ""


@functools.lru_cache(maxsize=256)
def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def check_browser(tokens: Tokens, request: Request) -> str | None:
    """Return the foreign origin that may read the answer; None for a call from no page or from our own.

    Raises Forbidden for pages that may not call, and for host names that are not ours (DNS rebinding).
    """
    # reads ASGI's raw header list once: starlette's headers decode all of it at each access
    sent = dict(reversed(request.scope["headers"]))
    host = sent.get(b"host", b"").decode("latin-1")
    server = _server(request)
    if tokens.known is None and _address(server) and _loopback(server):
        name = _name(host)
        if not (name == "localhost" or name.endswith(".localhost") or (_address(name) and _loopback(name))):
            raise Forbidden(f"Host {host[:60]!r} is no name of this machine. Without tokens, call it as localhost.")
    origin = sent[b"origin"].decode("latin-1") if b"origin" in sent else None
    if origin is None or origin.partition("://")[2] == host:
        return None
    if origin in tokens.origins:
        return origin
    raise Forbidden(f"Pages of {origin[:60]!r} may not call this service. Allow them with PATCHBAY_ORIGINS.")


@functools.lru_cache(maxsize=64)
def _address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def _loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket, or a call within the process
        return True
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
