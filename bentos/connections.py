"""Limits on HTTP connections in uvicorn: a deadline for request heads, and a maximum number of connections.

uvicorn waits forever for the rest of a request's head and accepts as many connections as the system allows. Its
protocol class is what it lets one replace, so `limit` subclasses it. Bodies have their own deadlines in `bentos.http`,
and idle connections are closed by uvicorn itself.
"""

from __future__ import annotations

import asyncio
from typing import Any

HEAD_S = 15.0
"""Longest time in seconds from the opening of a connection, or the first byte of a later request, to the end of its
head"""
MAX_CONNECTIONS = 2000


def limit(protocol: type[Any]) -> type[Any]:
    """Subclass a uvicorn protocol with a deadline for request heads, and at most MAX_CONNECTIONS connections."""

    class Limited(protocol):  # type: ignore[misc]
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.close()
                return
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:  # the head is complete
                self._heard()
            elif self._deadline is None:
                self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._heard()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self._deadline = asyncio.get_running_loop().call_later(HEAD_S, self._give_up)

        def _heard(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            if self.transport is not None and not self.transport.is_closing():
                self.transport.close()

    return Limited


def install() -> None:
    """Make the servers that this process starts from now on use it."""
    from uvicorn.protocols.http import auto

    if not hasattr(auto.AutoHTTPProtocol, "_deadline"):
        auto.AutoHTTPProtocol = limit(auto.AutoHTTPProtocol)
