"""Runtime of a service: one base, its arms and one worker thread; it follows the ledger while it serves.

Start-up: load the base, pull and verify every digest that the ledger names, warm up each arm, prove that reverting
works (strength 0 and no arm give the base's outputs bit for bit); only then is it ready. Then two background threads
run: one follows the ledger (new arms are verified and warmed before the routing table is swapped by one reference; rows
in flight keep their arm), one judges the live experiment about once a second and writes its decisions to the ledger.

Only the champion and an experiment's control must be servable; anything else in the ledger that cannot be served here
is a warning (page, log, metric). No thread ends by an exception; `ill` says which is unhealthy.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bentos.metrics import Counts
from bentos.runtime.arms import Table
from bentos.runtime.judge import Judge
from bentos.runtime.threads import Watch
from bentos.runtime.worker import CALL_S, Loop
from bentos.settings import CARRIED, Settings, check, check_signed, sealed
from bentos.tokens import charge_rows
from patches.engine.isolate import named
from patches.engine.patch import Patch
from patches.families.base import Base, load_base
from patches.families.family import family
from patches.families.worker import Worker, WorkerSettings
from patches.subject import Arm, Subject, load_arm
from registry import manifest
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.events import Events
from registry.ab.experiment import Experiment
from registry.ab.ledger import BASE, Ledger
from registry.errors import NotReady, WrongBase
from registry.manifest import Manifest
from registry.systems import system

log = logging.getLogger("patchbay")

FOLLOW_S = 0.5
WORK_SILENT_S, QUIET_SILENT_S = 120.0, 600.0
"""Longest healthy silence in seconds of the worker thread (one step), and of the following and judging threads (a store
may be slow)"""
STOP_S = 3.0
"""Longest duration of a stop in seconds, whatever hangs"""
AGAIN_S = 5.0
"""Seconds after which loading an arm that could not be served is retried; also when the ledger changes"""
EXPLORED = 8
"""Number of arms that requests may have made and that are still served"""
SHADOW_QUEUE = 32
"""Queued rows above which shadow requests are dropped, so that they never delay an answer"""

__all__ = ["CARRIED", "SHADOW_QUEUE", "Counts", "Runtime", "Settings", "check"]


class Runtime:
    """One base with its arms, shared by all requests. Call `start` before use and `stop` after."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts = Counts()
        self.problem = "starting"
        """Why the service is not ready; empty when it is"""
        self.warnings: dict[str, str] = {}
        """Problems that do not prevent serving: what -> why"""
        self.watch = Watch()
        self.table: Table | None = None
        self.events: Events | None = None
        self.judge = Judge(self)
        self.explored: list[str] = []
        """Digests of arms that requests made, oldest first"""
        self._exploring = threading.Lock()

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load, verify, warm up and prove; then follow the ledger.

        Raises whatever prevents serving, also shown by /readyz.
        """
        try:
            pinned = self.settings.pinned
            self.ledger = None if pinned else Ledger()
            head = self.ledger.sound(self.settings.system) if self.ledger else None
            s, row = self.settings, system(self.settings.system)
            refs = check(s, head)
            bases = {role: load_base(refs[role], kind, s.device) for role, kind in row.bases.items()}
            self.subject = Subject(bases, about=family(row.family))
            size = WorkerSettings(s.slots, s.context, s.provider, int(s.kv_gib * 2**30) or None)
            self.loop = Loop(self.subject.worker(size), self.watch, self.counts)
            self.watch.spawn("work", self.loop.work, WORK_SILENT_S)
            self.call(lambda: self.worker.proof(None))
            if pinned:
                champion, *beside = [self._pin(folder) for folder in (pinned, *self.settings.beside)]
                self.table = self._table(None, champion, next(iter(beside), None))
            else:
                self.events = Events()
                self.table = self._follow_once(head)
                self.watch.spawn("follow", self._follow, QUIET_SILENT_S)
                self.watch.spawn("judge", self.judge.run, QUIET_SILENT_S)
            self.problem = ""
        except BaseException as e:
            self.problem = str(e) or type(e).__name__
            raise

    def told(self) -> str:
        """For whoever started it: where it answers, of what, on which device, and which arms there are."""
        t, s = self.table, self.settings
        assert t is not None
        where = os.environ.get("PATCHBAY_URL") or f"port {os.environ.get('PORT', '3000')}"
        bases = ", ".join(base.label for base in self.subject.bases.values())
        arms = {"champion": t.champion, "challenger": t.challenger}
        shown = [f"{role} {d if d == 'base' else f'sha256:{d[:16]}'}" for role, d in arms.items() if d]
        return "\n".join([
            f"ready: {s.system} at {where} (the page at /, the API under /v1)",
            f"  base        {bases} on {s.device}",
            f"  arms        base, {', '.join(shown)}",
            *([f"  experiment  {t.experiment.name}, {t.experiment.share:.0%} treated"] if t.experiment else []),
            *([f"  warning     {self.warning}"] if self.warning else []),
        ])  # fmt: skip

    def stop(self) -> None:
        """End the threads and remove the patches, within STOP_S whatever hangs."""
        until = time.monotonic() + STOP_S
        self.watch.stopping.set()
        self.problem = self.problem or "stopping"
        if hasattr(self, "loop"):
            self.loop.wake()
        left = self.watch.stop(until - 1.0)
        if self.events:
            self.events.close(max(0.5, until - time.monotonic()))
        if left:
            log.error("left behind: %s", ", ".join(left))
        elif hasattr(self, "subject"):
            self.subject.close()

    @property
    def warning(self) -> str:
        """All problems that do not prevent serving, in one line; empty if there are none."""
        return "; ".join([*self.warnings.values(), *(why for k, why in self.watch.ill().items() if k != "work")])

    def dead(self) -> str:
        """Return problems that only a new process solves, for /livez; empty if there are none."""
        if self.watch.stopping.is_set():
            return ""
        ended = [why for why in self.watch.ill().values() if "has ended" in why]
        return "; ".join([*ended, *self._broken()])

    def ill(self) -> str:
        """Return why no request should be sent here now, for /readyz; empty if all is well."""
        if self.problem:
            return self.problem
        written = self.events.problem() if self.events else ""
        return "; ".join(why for why in (self.dead(), self.watch.ill().get("work", ""), written) if why)

    def _broken(self) -> list[str]:
        return [self.loop.broken] if hasattr(self, "loop") and self.loop.broken else []

    @property
    def base(self) -> Base:
        """The base to which patches are applied."""
        return self.subject.base

    @property
    def worker(self) -> Worker[Any]:
        """The worker that runs jobs; only its own thread may touch it."""
        return self.loop.worker

    @property
    def judging(self) -> str:
        """The process that judges this system's experiments."""
        return self.judge.who

    # ---- work, from any thread -----------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Any]) -> None:
        """Queue jobs. Raises NotReady, TooMany for a full queue or an empty quota, and as the worker's `check`; then
        none is queued."""
        if self.problem:
            raise NotReady(f"The service is not ready: {self.problem}")
        charge_rows(jobs)
        self.loop.submit(jobs)

    def run(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Run jobs to completion, blocking the calling thread. Raises the error of the first job that failed."""
        left, done = len(jobs), threading.Event()

        def count(job: Any) -> None:
            nonlocal left
            if job.finished:
                left -= 1
                if left <= 0:
                    done.set()

        for job in jobs:
            job.on_step = count
        self.submit(jobs)
        if not done.wait(CALL_S):
            for job in jobs:
                self.cancel(job)
            raise NotReady(f"No answer within {CALL_S:g} s; it was given up.")
        for job in jobs:
            if job.error is not None:
                raise job.error
        return jobs

    def cancel(self, job: Any) -> None:
        """Stop a job, without effect on others."""
        self.loop.cancel(job)

    def call(self, command: Callable[[], Any]) -> Any:
        """Run a command on the worker's thread between steps, and wait for its result."""
        return self.loop.call(command)

    @property
    def queued(self) -> int:
        """Number of jobs waiting or running."""
        return self.loop.queued

    # ---- arms ----------------------------------------------------------------------------------------------------

    def _pin(self, folder: Path) -> str:
        """Load an artifact of a pinned deployment; return its digest, or "base"."""
        about = self._own(folder)
        if about.kind == "model" and not about.files:
            return BASE
        check_signed(folder, about.digest)
        self._add(about.digest, load_arm(folder, about, self.settings.device, self.settings.arm_gib))
        return about.digest

    def _own(self, folder: Path, digest: str | None = None) -> Manifest:
        """Read the manifest of a sealed folder and check that it belongs to the loaded bases. Raises WrongBase."""
        about = manifest.read(folder, digest=digest)
        for role, label in about.bases.items():
            have = self.subject.bases.get(role)
            if have is not None and not manifest.same_base(label.rpartition("@")[2], have.digest):
                raise WrongBase(
                    f"{folder} was made from {label[:80]}, not from {have.label[:80]}. Fit it again on this base."
                )
        return about

    def folder(self, digest: str) -> Path:
        """Return the verified sealed folder of an arm that is served here."""
        if self.settings.pinned:
            inside = (self.settings.pinned, *self.settings.beside)
            folder = next((f for f in inside if manifest.parse(f).digest == digest), self.settings.pinned)
            manifest.read(folder, digest=digest)
            return folder
        return sealed(digest)

    # ---- following -----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        seen, tried = -1, 0.0
        assert self.ledger is not None
        while not self.watch.stopping.wait(FOLLOW_S):
            self.watch.beat("follow")
            try:
                self._stop_if_lost()
                now = self.ledger.version()
                again = bool(self.warnings) and time.monotonic() - tried > AGAIN_S
                if now == seen and not again:
                    self._forget_unused()
                    continue
                seen, tried = now, time.monotonic()
                head = self.ledger.sound(self.settings.system)
                if again or self.table is None or (head.hash if head else "") != self.table.head:
                    table = self._follow_once(head)
                    if self.table is None or table.champion != self.table.champion:
                        log.info("serving champion %s", table.champion[:16])
                    self.table = table
                self.calm("ledger")
            except Exception as e:  # the old table keeps serving, and the warning shows
                self.warn("ledger", f"cannot follow the ledger: {e}")

    def warn(self, what: str, why: str) -> None:
        """Set a warning, shown on the page, in the log (once) and in the metrics."""
        if self.warnings.get(what) != why:
            log.error(why)
        self.warnings = {**self.warnings, what: why}

    def calm(self, *what: str) -> None:
        """Clear warnings."""
        self.warnings = {k: why for k, why in self.warnings.items() if k not in what}

    def _follow_once(self, head: ledgers.Entry | None) -> Table:
        """Build the routing table of a ledger entry, loading its arms.

        Raises if the champion or the control cannot be served; any other arm that cannot is left out with a warning.
        """
        x = experiments.load(head.experiment) if head and head.experiment else None
        if x and self.events and self.events.lost[x.name]:
            x = None  # being stopped, see _stop_if_lost
        champion = head.champion if head else BASE
        challenger = head.challenger if head else None
        must = {champion, *((x.control,) if x else ())}
        cannot: dict[str, str] = {}
        for digest in [*sorted(must), challenger, x.treatment if x else None]:
            if digest is None or digest == BASE or digest in self.subject.arms or digest in cannot:
                continue
            try:
                self._load(digest)
            except Exception as e:
                if digest in must:
                    raise
                cannot[digest] = str(e) or type(e).__name__
        self.calm(*(k for k in self.warnings if k.startswith("sha256:")))
        for digest, why in cannot.items():
            self.warn(named(digest), f"{named(digest)} is not served here: {why}")
        if x and x.treatment in cannot:
            self.warn(named(x.treatment), f"{x.name} does not run here, its treatment cannot be served: "
                       f"{cannot[x.treatment]}")  # fmt: skip
            x = None
        return self._table(head, champion, None if challenger in cannot else challenger, x)

    def _load(self, digest: str) -> None:
        """Load an arm from the store. Raises whatever prevents it."""
        folder = sealed(digest)
        check_signed(folder, digest)
        arm = load_arm(folder, self._own(folder, digest), self.settings.device, self.settings.arm_gib)
        self._add(digest, arm)

    def _stop_if_lost(self) -> None:
        """Stop an experiment that lost events: its estimates would be biased."""
        x = self.table.experiment if self.table else None
        if x is None or self.events is None or self.ledger is None or not (lost := self.events.lost[x.name]):
            return
        assert self.table is not None
        self.warn("events", f"{x.name} is stopped: {lost} of its events could not be written")
        self.table = replace(self.table, experiment=None)
        head = self.ledger.head(x.system)
        if head and head.experiment and head.experiment["name"] == x.name:
            ledgers.stop(self.ledger, x.system, evidence={"why": "events were lost", "lost": lost}, who="service")

    def _table(
        self, head: ledgers.Entry | None, champion: str, challenger: str | None = None, x: Experiment | None = None
    ) -> Table:
        return Table(
            self.settings.system, self.base.name, self.base.digest, champion, challenger, x,
            frozenset(self.subject.arms), head.hash if head else "", self.subject.memory,
        )  # fmt: skip

    def _add(self, digest: str, arm: Arm) -> None:
        """Add a verified arm, and run and prove it once before any request is routed to it."""
        self.call(lambda: self.subject.add(digest, arm))
        try:
            self.worker.prepare(digest, arm if isinstance(arm, Patch) else None)
            job = self.loop.probe(digest)
            if job.error is not None:
                raise NotReady(f"{named(digest)} was verified but gives no answer: {job.error}")
            self.call(partial(self._prove, digest))
        except BaseException:
            self.call(lambda: self.subject.remove(digest))
            raise

    def _prove(self, digest: str) -> None:
        """Check that strength 0, and no arm, give the base's outputs bit for bit.

        Raises NotReady otherwise, and for edits that are never reached or outputs that are not finite.
        """
        look = self.worker.proof
        base = look(None)
        look(digest)
        if not isinstance(self.subject.arms[digest], Patch):
            return  # models and searches have no strength at which they equal the base
        if not torch.equal(look(digest, 0.0), base) or not torch.equal(look(None), base):
            raise NotReady(f"{named(digest)} does not revert to the base bit for bit; it is not served.")
        if missed := [m for m in self.subject.applied.unreached() if m.startswith(f"{digest}:")]:
            raise NotReady(f"These edits were never reached: {', '.join(missed)[:200]}.")

    def explore(self, digest: str, patch: Patch) -> bool:
        """Serve a patch that a request made, by its digest alone; the oldest such one goes. Returns whether it was
        there already. Raises as `_add`."""
        with self._exploring:
            known = digest in self.subject.arms
            if not known:
                self._add(digest, patch)
            if known and digest not in self.explored:
                return True  # an artifact that the ledger names
            self.explored = [*(d for d in self.explored if d != digest), digest]
            old, self.explored = self.explored[:-EXPLORED], self.explored[-EXPLORED:]
            for one in old:
                if not self.loop.inflight[one]:
                    self.call(partial(self.subject.remove, one))
            if self.table is not None:
                self.table = self._retabled(self.table)
            return known

    def _forget_unused(self) -> None:
        """Remove arms that no routing names and no row uses."""
        table = self.table
        if table is None:
            return
        x = table.experiment
        wanted = {table.champion, table.challenger, *self.explored, *((x.control, x.treatment) if x else ())}
        for digest in set(self.subject.arms) - wanted:
            if not self.loop.inflight[digest]:
                self.call(partial(self.subject.remove, digest))
                self.table = self._retabled(table)

    def _retabled(self, table: Table) -> Table:
        return replace(table, loaded=frozenset(self.subject.arms))
