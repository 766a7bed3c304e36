"""The worker's thread: runs commands between steps, steps of the worker, and callbacks to those who wait."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bentos.metrics import Counts
from bentos.runtime.threads import Watch
from patches.engine.isolate import fail, named
from patches.families.worker import Job, Worker
from registry.ab.ledger import BASE
from registry.errors import Failed, NotReady, PatchbayError, TooMany

log = logging.getLogger("patchbay")

QUEUE = 512
"""Largest number of rows waiting or running; more are refused with 429"""
CALL_S = 120.0
"""Longest wait in seconds for a command that runs between two steps"""


class Loop:
    """Steps a worker on its own thread (`work`), and accepts jobs and commands from other threads."""

    def __init__(self, worker: Worker[Any], watch: Watch, counts: Counts) -> None:
        self.worker, self.watch, self.counts = worker, watch, counts
        self.broken = ""
        """Why the base itself no longer works, such as a lost device; empty while it does"""
        self.inflight: Counter[str] = Counter()
        """Arm -> number of jobs waiting or running"""
        self._since: dict[Any, float] = {}
        """Job that has had no step yet -> when it was queued"""
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._counting = threading.Lock()

    def wake(self) -> None:
        """Wake the thread, for instance to see that it should stop."""
        with self._wake:
            self._wake.notify_all()

    def submit(self, rows: Sequence[Any]) -> None:
        """Queue jobs of the worker's kind.

        Raises TooMany if the queue is full, and as the worker's `check` for a job that does not fit; then none is
        queued.
        """
        if sum(self.inflight.values()) + len(rows) > QUEUE:
            raise TooMany(f"{QUEUE} rows are waiting or running; try again in a few seconds.")
        self.worker.check(rows)
        now = time.perf_counter()
        with self._counting:
            for row in rows:
                self.inflight[row.arm or BASE] += 1
                self._since[row] = now
        self.tell(lambda: self._join(rows))

    def _join(self, rows: Sequence[Any]) -> None:
        try:
            self.worker.add(rows)
        except Exception as e:  # checked before, but no request may wait for a job that is not running
            why = e if isinstance(e, PatchbayError) else Failed(f"This job cannot be queued ({type(e).__name__}).")
            for row in rows:
                fail(row, why)
                self._done(row)
                self._tell_of(row)
            raise

    def cancel(self, row: Any) -> None:
        """Stop a row, without effect on others."""

        def command() -> None:
            if not row.finished:
                try:
                    self.worker.cancel(row)
                finally:
                    row.finished = row.finished or "cancelled"
                    self._done(row)

        self.tell(command)

    @property
    def queued(self) -> int:
        return sum(self.inflight.values())

    def tell(self, command: Callable[[], None]) -> None:
        """Queue a command for the worker's thread."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def work(self) -> None:
        """Run commands and steps until the service stops; then fail what is left."""
        torch.set_grad_enabled(False)
        while not self.watch.stopping.is_set():
            with self._wake:
                while not self._commands and self.worker.idle and not self.watch.stopping.is_set():
                    self.watch.beat("work")
                    self._wake.wait(timeout=1.0)
                commands, self._commands = self._commands, deque()
            self.watch.beat("work")
            self._obey(commands)
            if not self.worker.idle:
                self._step()
        self._obey(self._commands)
        for row in [*self.worker.running, *self.worker.waiting]:
            fail(row, NotReady("The service is stopping; ask again in a few seconds."))
            self._tell_of(row)

    @staticmethod
    def _obey(commands: deque[Callable[[], None]]) -> None:
        while commands:
            try:
                commands.popleft()()
            except BaseException:  # the commands after it belong to other requests
                log.exception("a command of a request failed")

    def _step(self) -> None:
        """Run one step of the worker; update counters and call back."""
        start = time.perf_counter()
        touched: Sequence[Job] = self.worker.advance()
        waits = [(r.arm or BASE, start - at) for r in touched if (at := self._since.pop(r, None)) is not None]
        self.counts.stepped(Counter(r.arm or BASE for r in touched), time.perf_counter() - start, waits)
        for row in touched:
            if row.finished:
                self._done(row)
                if row.finished == "failed":
                    self.counts.failed[row.arm or BASE] += 1
            self._tell_of(row)
        if touched and all(row.finished == "failed" for row in touched):
            self._suspect()

    @staticmethod
    def _tell_of(row: Job) -> None:
        if row.on_step is not None:
            try:
                row.on_step(row)
            except Exception:  # the caller's event loop may have ended
                log.debug("nobody listens to a job any more", exc_info=True)

    def _suspect(self) -> None:
        """Find out, after all jobs of a step failed, whether the base itself still works."""
        try:
            self.worker.proof(None)
            self.broken = ""
        except Exception as e:
            self.broken = f"the base itself fails ({type(e).__name__}); start the service again"
            log.exception("the base itself fails")

    def _done(self, row: Job) -> None:
        self._since.pop(row, None)
        with self._counting:
            self.inflight[row.arm or BASE] -= 1

    def call(self, command: Callable[[], Any]) -> Any:
        """Run a command on the worker's thread between steps, and wait for its result."""
        done = threading.Event()
        box: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                box.append((command(), None))
            except BaseException as e:
                box.append((None, e))
            done.set()

        self.tell(run)
        until = time.monotonic() + CALL_S
        while not done.wait(timeout=0.5):
            if self.watch.stopping.is_set() or time.monotonic() > until:
                raise NotReady("The working thread does not answer.")
        value, error = box[0]
        if error is not None:
            raise error
        return value

    def probe(self, digest: str) -> Any:
        """Run a small job of an arm to completion, as a health check. Raises NotReady without an answer."""
        done = threading.Event()
        row: Any = self.worker.probe(digest)
        row.on_step = lambda r: done.set() if r.finished else None
        with self._counting:
            self.inflight[digest] += 1
        self.tell(lambda: self._join([row]))
        until = time.monotonic() + CALL_S
        while not done.wait(0.5):
            if self.watch.stopping.is_set() or time.monotonic() > until:
                raise NotReady(f"{named(digest)} was verified but gives no answer; it is not served.")
        return row
