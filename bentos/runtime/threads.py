"""Supervised threads: restarted after exceptions, and monitored for silence."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger("patchbay")

PAUSE_S = 0.2
"""Pause in seconds before a failed thread is restarted, doubled each time up to PAUSE_MAX_S"""
PAUSE_MAX_S = 5.0
CALM_S = 60.0
"""Seconds without an exception after which earlier ones are forgotten"""


@dataclass
class _Watched:
    limit_s: float
    """Longest healthy silence in seconds"""
    thread: threading.Thread | None = None
    beat: float = field(default_factory=time.monotonic)
    """Monotonic time of the last sign of life"""
    fell: int = 0
    """Number of recent exceptions"""
    at: float = 0.0
    """Monotonic time of the last exception"""
    why: str = ""
    """Type of the last exception"""


class Watch:
    """Supervisor of named threads. Each calls `beat` in its loop; `ill` reports the unhealthy ones."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._all: dict[str, _Watched] = {}

    def spawn(self, name: str, work: Callable[[], None], limit_s: float) -> None:
        """Run work() on a thread until it returns, restarting it after exceptions.

        limit_s: longest healthy silence in seconds.
        """
        w = self._all[name] = _Watched(limit_s)
        w.thread = threading.Thread(target=self._run, args=(name, work, w), name=name, daemon=True)
        w.thread.start()

    def beat(self, name: str) -> None:
        """Signal that a thread is alive; called by the thread itself."""
        if (w := self._all.get(name)) is not None:
            w.beat = time.monotonic()

    def ill(self) -> dict[str, str]:
        """Return name -> what is wrong with the thread; empty while stopping."""
        if self.stopping.is_set():
            return {}
        out, now = {}, time.monotonic()
        for name, w in self._all.items():
            if w.thread is None or not w.thread.is_alive():
                out[name] = f"the thread {name!r} has ended"
            elif now - w.beat > w.limit_s:
                out[name] = f"the thread {name!r} has been silent for {now - w.beat:.0f} s"
            elif w.fell >= 3 and now - w.at < CALM_S:
                out[name] = f"the thread {name!r} fell {w.fell} times lately, last by {w.why}"
        return out

    def stop(self, until: float) -> list[str]:
        """Ask all threads to end and wait until the monotonic time `until`; return the names of those still running."""
        self.stopping.set()
        left = []
        for name, w in self._all.items():
            if w.thread is not None:
                w.thread.join(max(0.0, until - time.monotonic()))
                if w.thread.is_alive():
                    left.append(name)
        return left

    def _run(self, name: str, work: Callable[[], None], w: _Watched) -> None:
        while not self.stopping.is_set():
            start = time.monotonic()
            try:
                work()
                return
            except BaseException as e:  # even BaseException: all requests depend on this thread
                w.fell = 1 if time.monotonic() - start > CALM_S else w.fell + 1
                w.why, w.at = type(e).__name__, time.monotonic()
                log.exception("the thread %s fell; it is begun again", name)
            self.stopping.wait(min(PAUSE_MAX_S, PAUSE_S * 2 ** (w.fell - 1)))
