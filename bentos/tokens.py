"""Access control: bearer tokens with scopes and rates; without a token file this machine only, and no foreign page."""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
SCOPES = (*sorted(set(shapes.SCOPES.values())), "compare", "explore", "outcomes", "metrics")
"""All scopes a token may have: one per kind of shape, and the desk's own"""


@dataclass
class Bucket:
    """Token bucket of a rate limit: the calls a token may still make, refilled continuously."""

    per_s: float
    burst: float
    left: float
    at: float = field(default_factory=time.monotonic)

    def take(self, n: float = 1.0) -> float:
        """Take n calls (or rows) from the bucket; return 0, or the seconds until there is enough.

        What is larger than the whole bucket is let in when it is full, and has to be made up for afterwards.
        """
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.at) * self.per_s)
        self.at = now
        if (short := min(n, self.burst) - self.left) > 1e-9:
            return short / self.per_s
        self.left -= n
        return 0.0


@dataclass(frozen=True)
class Token:
    """A caller, identified by the sha256 of its bearer token; the token itself is not kept."""

    name: str
    """Name in error messages and logs"""
    scopes: frozenset[str]
    """Scopes of SCOPES that it may use"""
    buckets: Mapping[str, Bucket] = field(default_factory=dict)
    """Field of QUOTAS -> what is left of it"""
    tenant: str = ""
    """Owner of units, galleries and keys; several tokens may share one. Empty without a token file"""

    def charge(self, what: Literal["calls", "rows"], n: int = 1) -> None:
        """Charge n calls or rows to the quotas. Raises TooMany, with the seconds to wait, and charges nothing."""
        mine = [(key, bucket) for key, bucket in self.buckets.items() if QUOTAS[key][0] == what]
        for i, (key, bucket) in enumerate(mine):
            if wait := bucket.take(n):
                for _, before in mine[:i]:
                    before.left += n
                most = bucket.per_s * QUOTAS[key][1]
                refusal = TooMany(f"{self.name} is over its {most:g} {what} a {QUOTAS[key][2]}; wait {wait:.0f} s.")
                refusal.retry_s = math.ceil(wait)
                raise refusal


QUOTAS: dict[str, tuple[str, float, str]] = {
    "per_minute": ("calls", 60.0, "minute"),
    "per_day": ("calls", 86_400.0, "day"),
    "rows_per_minute": ("rows", 60.0, "minute"),
    "rows_per_day": ("rows", 86_400.0, "day"),
}
"""Field of a token file -> what it counts, seconds it covers, their name. A row is one answer of one arm: a choice, a
picture, a text. Quotas are refilled continuously; each service of a token counts for itself"""
OPEN = Token("anyone", frozenset(SCOPES))
CALLER: ContextVar[Token] = ContextVar("caller", default=OPEN)
"""Token of the request that this task answers"""
SHADOWED: ContextVar[str | None] = ContextVar("shadowed", default=None)
"""Arm that runs beside the caller's in a shadow experiment; its rows are not the caller's"""


def charge_rows(jobs: Iterable[Any]) -> None:
    """Charge jobs to the quotas of the request's token. Raises TooMany."""
    token = CALLER.get()
    if token.buckets and (n := sum(job.arm != SHADOWED.get() or job.arm is None for job in jobs)):
        token.charge("rows", n)


class Tokens:
    """The tokens that may call. Without a file, everybody on this machine may call, and nobody else.

    File format: {"<sha256 of the token>": {"name": "...", "scopes": ["generate", ...], "per_minute": 600, "per_day":
    50000, "rows_per_minute": 2000, "rows_per_day": 100000, "tenant": "..."}}; quotas may be left out. The
    tenant, by default the name, owns units, galleries and keys.
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
        found.charge("calls")
        return found


def _token(key: str, about: dict[str, Any]) -> Token:
    if len(key) != 64:
        raise ValueError("keys must be sha256 digests of tokens")
    if unknown := set(about.get("scopes", SCOPES)) - set(SCOPES):
        raise ValueError(f"unknown scope {sorted(unknown)[0]!r}; scopes are {', '.join(SCOPES)}")
    buckets = {}
    for quota, (_, seconds, _) in QUOTAS.items():
        if rate := float(about.get(quota, 0)):
            if not 0.0 < rate < 1e12:
                raise ValueError(f"{quota} must be a number above 0, not {rate:g}")
            # a minute's calls may come in a sixth of one at once; all others count as a whole
            burst = max(1.0, rate / 6 if quota == "per_minute" else rate)
            buckets[quota] = Bucket(rate / seconds, burst, burst)
    tenant = str(about.get("tenant", about["name"]))
    if not re.fullmatch(r"[\x20-\x7e]{1,64}", tenant):
        raise ValueError(f"the tenant {tenant[:40]!r} must be 1 to 64 printable characters")
    return Token(str(about["name"]), frozenset(about.get("scopes", SCOPES)), buckets, tenant)


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
