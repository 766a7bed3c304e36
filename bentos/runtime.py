"""What a service runs on: one base, its patches, one thread that works; it follows the ledger while it serves.

Start-up: load the base, pull and verify every digest the ledger names, warm each arm, prove the revert (strength 0 and
no arm give the base's logits bit for bit), only then be ready. After that two quiet threads work: one follows the
ledger (new arms are verified and warmed before the routing table is swapped by one reference; rows in flight keep their
arm), one judges the live experiment about once a second and writes what it decides to the ledger.

Only the champion, and the control of an experiment, must be servable: what else the ledger names and cannot be served
here is a warning (page, log, metric). No thread ends by an exception, and `ill` says which is not well.
"""

from __future__ import annotations

import fcntl
import importlib
import logging
import math
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bentos.arms import Table
from bentos.threads import Watch
from patches import artifact
from patches.bases import Base, check_device, load_base
from patches.decode import Decoder, Row
from patches.embed import Embedder, Picture
from patches.isolate import fail, named
from patches.patched import PatchedModel
from registry import experiment as experiments
from registry import ledger as ledgers
from registry import manifest
from registry.errors import Failed, NotReady, PatchbayError, TooMany
from registry.events import Events
from registry.experiment import Experiment
from registry.home import home
from registry.ledger import BASE, Ledger
from registry.systems import system

log = logging.getLogger("patchbay")

CARRIED = Path(__file__).parent.parent / "carried"
"""in a Bento: the sealed folder it was built to serve; a checkout has none"""
FOLLOW_S = 0.5
JUDGE_S = 1.0
JUDGE_AGAIN_S = 5.0
"""how often one who may not judge asks whether it may now"""
WINDOW_S = 10.0
"""how often the live experiment's numbers go to MLflow, which only displays them"""
ENGINE, ENGINED = "patches.onnx", ("clip",)
"""what runs towers instead of torch, and the families it can run; named here and imported only where it is asked for"""
Job = Row | Picture
"""what is queued: a row to be decoded, a picture to be embedded"""
QUEUE = 512
"""rows waiting or running; more get 429"""
WORK_SILENT_S, QUIET_SILENT_S = 120.0, 600.0
"""longest silence of the thread that works (one step), and of those that follow and judge (a store may be slow)"""
CALL_S = 120.0
"""how long something that has to be done between two steps is waited for"""
STOP_S = 8.0
"""a stop is over by then, whatever hangs"""
AGAIN_S = 5.0
"""what could not be served is tried again after this, or when the ledger moves"""
SHADOW_QUEUE = 32
"""rows waiting above which a shadow is dropped, so that it never delays an answer"""


@dataclass(frozen=True)
class Settings:
    """How a service is deployed; from the environment, so that a Bento and a laptop say it the same way."""

    system: str
    base: str | None = None
    """reference of the base; None: the one the artifact's manifest names"""
    device: str = "cpu"
    slots: int = 32
    """rows of one batch"""
    context: int = 4096
    """tokens of a row, prompt and answer"""
    provider: str = ""
    """of ONNX Runtime, cpu or cuda, for families whose towers it can run; empty: torch"""
    pinned: Path | None = None
    """sealed folder of the one patch to serve, or of the bare base; then there is no ledger and no store"""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Settings:
        pinned = env.get("PATCHBAY_PINNED") or (CARRIED if CARRIED.is_dir() else None)
        name = manifest.read(Path(pinned)).system if pinned else env.get("PATCHBAY_SYSTEM", "")
        return cls(
            system=system(name).name,
            base=env.get("PATCHBAY_BASE") or None,
            device=env.get("PATCHBAY_DEVICE", "cpu"),
            slots=int(env.get("PATCHBAY_SLOTS", "32")),
            context=int(env.get("PATCHBAY_CONTEXT", "4096")),
            provider=env.get("PATCHBAY_PROVIDER", ""),
            pinned=Path(pinned) if pinned else None,
        )


def check(s: Settings, head: ledgers.Entry | None) -> str:
    """The base's reference, if all that can be told before it is loaded is well. Raises NotReady with the way out."""
    family = system(s.system).families[0]
    check_device(s.device)
    if s.provider:
        if family not in ENGINED:
            raise NotReady(f"PATCHBAY_PROVIDER={s.provider[:20]!r}: {family} bases run in torch alone; leave it out.")
        importlib.import_module(ENGINE).check_provider(s.provider)
    ref = s.base or _base_ref(s, head)
    if ref.startswith("local:"):
        raise NotReady(
            f"The base is the folder {ref[6:]!r} of the machine where the patch was fitted. Put it here, and "
            "set PATCHBAY_BASE=local-dir:<folder> (or gguf:<file>)."
        )
    return ref


def _base_ref(s: Settings, head: ledgers.Entry | None) -> str:
    if s.pinned:
        return manifest.read(s.pinned).base.rpartition("@")[0]
    for digest in (head.champion, head.challenger) if head else ():
        if digest and digest != BASE:
            from registry import store

            return manifest.read(store.pull(digest)).base.rpartition("@")[0]
    one = {"llm": "pypi:smollm2", "clip": "lab:clip"}.get(system(s.system).families[0], "hf-hub:org/name")
    raise NotReady(
        f"{s.system} has no patch yet, so its base is unknown. Push one, or set PATCHBAY_BASE, for instance to {one}."
    )


@dataclass
class Counts:
    """What /metrics shows."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(arm label, status)"""
    tokens: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    shadows_dropped: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """arm -> jobs that failed alone"""
    unwritten: int = 0
    """answers that went out before their exposure was on the disk"""


class Runtime:
    """One base with its arms, decoding for everybody. `start` before use, `stop` after."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts = Counts()
        self.problem = "starting"
        """why it is not ready; empty when it is"""
        self.warnings: dict[str, str] = {}
        """what goes wrong beside the serving: what -> why"""
        self.judging = ""
        """who judges the experiments of this system: "this process", or another by its number"""
        self.watch = Watch()
        self.table: Table | None = None
        self.events: Events | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = self.watch.stopping
        self._broken = ""
        self._inflight: Counter[str] = Counter()
        self._counting = threading.Lock()

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load, verify, warm, prove; then follow. Raises what stands in the way, and says it on /readyz."""
        try:
            pinned = self.settings.pinned
            self.ledger = None if pinned else Ledger()
            head = self.ledger.head(self.settings.system) if self.ledger else None
            family = system(self.settings.system).families[0]
            ref = check(self.settings, head)
            self.base: Base = load_base(ref, family, self.settings.device)
            self.model = PatchedModel(self.base)
            self.worker = self._worker()
            self.watch.spawn("work", self._work, WORK_SILENT_S)
            self.call(lambda: self.worker.proof(None))
            if pinned:
                self.table = self._table(None, champion=self._pin(pinned))
            else:
                self.events = Events()
                self.table = self._follow_once(head)
                self.watch.spawn("follow", self._follow, QUIET_SILENT_S)
                self.watch.spawn("judge", self._judge, QUIET_SILENT_S)
            self.problem = ""
        except BaseException as e:
            self.problem = str(e) or type(e).__name__
            raise

    def stop(self) -> None:
        """End the threads and take the patches off; over within STOP_S, whatever hangs."""
        until = time.monotonic() + STOP_S
        self._stopping.set()
        self.problem = self.problem or "stopping"
        with self._wake:
            self._wake.notify_all()
        left = self.watch.stop(until - 1.0)
        if self.events:
            self.events.close(max(0.5, until - time.monotonic()))
        if left:
            log.error("left behind: %s", ", ".join(left))
        elif hasattr(self, "model"):
            self.model.close()

    @property
    def warning(self) -> str:
        """Everything that goes wrong beside the serving, in one line; empty if nothing does."""
        return "; ".join([*self.warnings.values(), *(why for k, why in self.watch.ill().items() if k != "work")])

    def dead(self) -> str:
        """What only a new process mends; empty if there is nothing. /livez says it."""
        if self._stopping.is_set():
            return ""
        ended = [why for why in self.watch.ill().values() if "has ended" in why]
        return "; ".join([*ended, *([self._broken] if self._broken else [])])

    def ill(self) -> str:
        """Why nothing is to be sent here now; empty if all is well. /readyz says it."""
        if self.problem:
            return self.problem
        written = self.events.problem() if self.events else ""
        return "; ".join(why for why in (self.dead(), self.watch.ill().get("work", ""), written) if why)

    def _pin(self, folder: Path) -> str:
        """The champion of a deployment that carries its own: a patch's digest, or "base"."""
        about = manifest.read(folder, base=self.base.digest)
        if about.kind == "model" and not about.files:
            return BASE
        _, patch = artifact.load(folder, digest=about.digest, base=self.base.digest)
        self._add(about.digest, patch)
        return about.digest

    def folder(self, digest: str) -> Path:
        """The sealed folder of a patch that is served here, verified."""
        if self.settings.pinned:
            manifest.read(self.settings.pinned, digest=digest)
            return self.settings.pinned
        from registry import store

        return store.pull(digest)

    # ---- working -------------------------------------------------------------------------------------------------

    def _worker(self) -> Decoder | Embedder:
        """What turns this family's rows into answers."""
        s = self.settings
        family = system(s.system).families[0]
        if family == "llm":
            return Decoder(self.base, self.model.applied, s.slots, s.context)
        return Embedder(self.base, self.model.applied, s.slots, self._towers if s.provider else None)

    def _towers(self, arm: str | None, patch: Any) -> Any:
        """An arm's towers in ONNX Runtime, from a copy of the base that nobody has hooks on."""
        s = self.settings
        fresh = load_base(self.base.ref, system(s.system).families[0])
        return importlib.import_module(ENGINE).prepared(fresh, s.provider, patch, system=s.system, digest=arm or "")

    def submit(self, rows: Sequence[Any]) -> None:
        """Queue jobs of the worker's kind; row.tag(row) is called on the worker's thread after each step it took part
        in, and at its end.

        Raises TooMany if the queue is full, TooLarge if a prompt does not fit; then nothing is queued.
        """
        if self.problem:
            raise NotReady(f"The service is not ready: {self.problem}")
        if sum(self._inflight.values()) + len(rows) > QUEUE:
            raise TooMany(f"{QUEUE} rows are waiting or running; try again in a few seconds.")
        self.worker.check(rows)
        with self._counting:
            for row in rows:
                self._inflight[row.arm or BASE] += 1
        self._tell(lambda: self.worker.add(rows))

    def cancel(self, row: Any) -> None:
        """Stop a row; its neighbours do not notice."""

        def command() -> None:
            if not row.finished:
                try:
                    self.worker.cancel(row)
                finally:
                    row.finished = row.finished or "cancelled"
                    self._done(row)

        self._tell(command)

    @property
    def queued(self) -> int:
        return sum(self._inflight.values())

    def _tell(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _work(self) -> None:
        torch.set_grad_enabled(False)
        while not self._stopping.is_set():
            with self._wake:
                while not self._commands and self.worker.idle and not self._stopping.is_set():
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
            except BaseException:  # the commands after it are other people's
                log.exception("a command of a request failed")

    def _step(self) -> None:
        """One step of the worker, and what it means for those who wait."""
        start = time.perf_counter()
        try:
            touched: Sequence[Job] = self.worker.step()
        except Exception:
            # a worker finds the job that fails (patches.isolate); this is the worker itself
            log.exception("a step failed as a whole; the running jobs are given up")
            touched, waiting = list(self.worker.running), list(self.worker.waiting)
            for row in touched:
                fail(row, Failed("The step of this job failed; it is in the log. Try again."))
            self.worker.reset()
            self.worker.add(waiting)
        self.counts.steps += 1
        self.counts.rows += len(touched)
        self.counts.seconds += time.perf_counter() - start
        for row in touched:
            self.counts.tokens[row.arm or BASE] += 1
            if row.finished:
                self._done(row)
                if row.finished == "failed":
                    self.counts.failed[row.arm or BASE] += 1
            self._tell_of(row)
        if touched and all(row.finished == "failed" for row in touched):
            self._suspect()

    @staticmethod
    def _tell_of(row: Job) -> None:
        if row.tag is not None:
            try:
                row.tag(row)
            except Exception:  # its caller's event loop may be gone
                log.debug("nobody listens to a job any more", exc_info=True)

    def _suspect(self) -> None:
        """Everything failed: is it the jobs, or can the base itself not work any more (a lost device)?"""
        try:
            self.worker.proof(None)
            self._broken = ""
        except Exception as e:
            self._broken = f"the base itself fails ({type(e).__name__}); start the service again"
            log.exception("the base itself fails")

    def _done(self, row: Job) -> None:
        with self._counting:
            self._inflight[row.arm or BASE] -= 1

    def call(self, command: Callable[[], Any]) -> Any:
        """Run on the worker's thread, between steps, and wait for the answer."""
        done = threading.Event()
        box: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                box.append((command(), None))
            except BaseException as e:
                box.append((None, e))
            done.set()

        self._tell(run)
        until = time.monotonic() + CALL_S
        while not done.wait(timeout=0.5):
            if self._stopping.is_set() or time.monotonic() > until:
                raise NotReady("The working thread does not answer.")
        value, error = box[0]
        if error is not None:
            raise error
        return value

    # ---- following -----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        seen, tried = -1, 0.0
        assert self.ledger is not None
        while not self._stopping.wait(FOLLOW_S):
            self.watch.beat("follow")
            try:
                self._stop_if_lost()
                now = self.ledger.version()
                again = bool(self.warnings) and time.monotonic() - tried > AGAIN_S
                if now == seen and not again:
                    self._forget_unused()
                    continue
                seen, tried = now, time.monotonic()
                head = self.ledger.head(self.settings.system)
                if again or self.table is None or (head.hash if head else "") != self.table.head:
                    table = self._follow_once(head)
                    if self.table is None or table.champion != self.table.champion:
                        log.info("serving champion %s", table.champion[:16])
                    self.table = table
                self._calm("ledger")
            except Exception as e:  # the old table keeps serving, loudly
                self._warn("ledger", f"cannot follow the ledger: {e}")

    def _warn(self, what: str, why: str) -> None:
        """On the page, in the log (once) and in the metrics."""
        if self.warnings.get(what) != why:
            log.error(why)
        self.warnings = {**self.warnings, what: why}

    def _calm(self, *what: str) -> None:
        """These are well again."""
        self.warnings = {k: why for k, why in self.warnings.items() if k not in what}

    def _follow_once(self, head: ledgers.Entry | None) -> Table:
        """The table of a ledger's entry. Raises what keeps the champion or the control from being served; anything else
        that cannot be served is left out, with a warning."""
        x = experiments.load(head.experiment) if head and head.experiment else None
        if x and self.events and self.events.lost[x.name]:
            x = None  # see _stop_if_lost
        champion = head.champion if head else BASE
        challenger = head.challenger if head else None
        must = {champion, *((x.control,) if x else ())}
        cannot: dict[str, str] = {}
        for digest in [*sorted(must), challenger, x.treatment if x else None]:
            if digest is None or digest == BASE or digest in self.model.applied.arms or digest in cannot:
                continue
            try:
                self._load(digest)
            except Exception as e:
                if digest in must:
                    raise
                cannot[digest] = str(e) or type(e).__name__
        self._calm(*(k for k in self.warnings if k.startswith("sha256:")))
        for digest, why in cannot.items():
            self._warn(named(digest), f"{named(digest)} is not served here: {why}")
        if x and x.treatment in cannot:
            self._warn(named(x.treatment), f"{x.name} does not run here, its treatment cannot be served: "
                       f"{cannot[x.treatment]}")  # fmt: skip
            x = None
        return self._table(head, champion, None if challenger in cannot else challenger, x)

    def _load(self, digest: str) -> None:
        """One more arm, from the store. Raises what stands in the way."""
        from registry import store

        _, patch = artifact.load(store.pull(digest), digest=digest, base=self.base.digest)
        self._add(digest, patch)

    def _stop_if_lost(self) -> None:
        """An experiment that lost what it should count is stopped: what it would say is not what happened."""
        x = self.table.experiment if self.table else None
        if x is None or self.events is None or self.ledger is None or not (lost := self.events.lost[x.name]):
            return
        assert self.table is not None
        self._warn("events", f"{x.name} is stopped: {lost} of its events could not be written")
        self.table = replace(self.table, experiment=None)
        head = self.ledger.head(x.system)
        if head and head.experiment and head.experiment["name"] == x.name:
            ledgers.stop(self.ledger, x.system, evidence={"why": "events were lost", "lost": lost}, who="service")

    def _table(
        self, head: ledgers.Entry | None, champion: str, challenger: str | None = None, x: Experiment | None = None
    ) -> Table:
        return Table(
            self.settings.system, self.base.name, self.base.digest, champion, challenger, x,
            frozenset(self.model.applied.arms), head.hash if head else "",
        )  # fmt: skip

    def _add(self, digest: str, patch: Any) -> None:
        """A verified patch becomes an arm, and has worked once and been proved before anybody is routed to it."""
        patch = patch.to(self.base.device)
        self.call(lambda: self.model.applied.add(digest, patch))
        try:
            self.worker.prepare(digest, patch)
            row = self._probe(digest)
            if row.error is not None:
                raise NotReady(f"{named(digest)} was verified but gives no answer: {row.error}")
            self.call(partial(self._prove, digest))
        except BaseException:
            self.call(lambda: self.model.applied.remove(digest))
            raise

    def _probe(self, digest: str) -> Any:
        """A small job of an arm, done."""
        done = threading.Event()
        row: Any = self.worker.probe(digest)
        row.tag = lambda r: done.set() if r.finished else None
        with self._counting:
            self._inflight[digest] += 1
        self._tell(lambda: self.worker.add([row]))
        until = time.monotonic() + CALL_S
        while not done.wait(0.5):
            if self._stopping.is_set() or time.monotonic() > until:
                raise NotReady(f"{named(digest)} was verified but gives no answer; it is not served.")
        return row

    def _prove(self, digest: str) -> None:
        """Strength 0, and no arm at all, must be the base bit for bit; an edit that is never reached is refused, and so
        are answers that are not finite."""
        look = self.worker.proof
        base = look(None)
        look(digest)
        if not torch.equal(look(digest, 0.0), base) or not torch.equal(look(None), base):
            raise NotReady(f"{named(digest)} does not revert to the base bit for bit; it is not served.")
        if missed := [m for m in self.model.applied.unreached() if m.startswith(f"{digest}:")]:
            raise NotReady(f"These edits were never reached: {', '.join(missed)[:200]}.")

    def _forget_unused(self) -> None:
        """Remove arms nobody is routed to and no row uses."""
        table = self.table
        if table is None:
            return
        x = table.experiment
        wanted = {table.champion, table.challenger, *((x.control, x.treatment) if x else ())}
        for digest in set(self.model.applied.arms) - wanted:
            if not self._inflight[digest]:
                self.call(partial(self.model.applied.remove, digest))
                self.table = self._retabled(table)

    def _retabled(self, table: Table) -> Table:
        return replace(table, loaded=frozenset(self.model.applied.arms))

    # ---- judging -------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Only one process of a deployment judges a system: the one that holds the system's lock, and says so in it."""
        file = home() / f"judge-{self.settings.system}.lock"
        with file.open("a+") as lock:
            while not self._stopping.is_set():
                self.watch.beat("judge")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    lock.seek(0)
                    self.judging = f"process {lock.read(80).strip() or 'unknown'}"
                self._stopping.wait(JUDGE_AGAIN_S)
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {socket.gethostname()}")
            lock.flush()
            self.judging = "this process"
            self._judge_on()

    def _judge_on(self) -> None:
        shown = 0.0
        while not self._stopping.wait(JUDGE_S):
            self.watch.beat("judge")
            try:
                decision = self.judge_once()
                self._calm("judge")
                if decision and (decision.action != "continue" or time.monotonic() - shown > WINDOW_S):
                    self._show(decision)
                    shown = time.monotonic()
            except Exception as e:
                self._warn("judge", f"cannot judge: {e}")

    def _show(self, decision: experiments.Decision) -> None:
        """The experiment's numbers, and after a decision the new champion, in MLflow. The ledger does not need it."""
        from registry import store

        try:
            r, s = decision.result, decision.summary
            units = s.control.units + s.treatment.units
            numbers = {
                "ab/effect": r.effect, "ab/low": r.low, "ab/high": r.high, "ab/e_value": r.e_value,
                "ab/mean_control": r.mean_control, "ab/mean_treatment": r.mean_treatment,
                "ab/n_control": r.n_control, "ab/n_treatment": r.n_treatment,
            }  # fmt: skip
            store.log_window(decision.experiment, units, {k: v for k, v in numbers.items() if math.isfinite(v)})
            if decision.action != "continue":
                store.log_decision(decision.experiment, decision.evidence())
                assert self.ledger is not None
                head = self.ledger.head(self.settings.system)
                assert head is not None
                if why := store.mirror(self.settings.system, head.champion, head.challenger):
                    log.warning(why)
        except PatchbayError as e:
            log.warning("MLflow does not show the experiment: %s", e)

    def judge_once(self) -> experiments.Decision | None:
        """Judge the live experiment; act on the ledger if it says so."""
        if self.ledger is None or self.events is None:
            return None
        head = self.ledger.head(self.settings.system)
        if head is None or head.experiment is None:
            return None
        x = experiments.load(head.experiment)
        decision = experiments.judge(x, self.events.summary(x))
        if decision.action == "continue":
            return decision
        act = {"promote": ledgers.promote, "rollback": ledgers.rollback}
        try:
            if decision.action == "stop":
                ledgers.stop(self.ledger, x.system, evidence=decision.evidence(), who="judge")
            else:
                act[decision.action](
                    self.ledger, x.system, evidence=decision.evidence(), who="judge", expect=head.hash,
                    **({"digest": x.treatment} if decision.action == "promote" else {}),
                )  # fmt: skip
            log.warning("%s: %s (%s)", x.name, decision.action, decision.why)
        except PatchbayError as e:  # somebody decided first: look again in a second
            log.info("not decided: %s", e)
        return decision
