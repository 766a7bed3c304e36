"""What a service runs on: one base, its patches, one thread that works; it follows the ledger while it serves.

Start-up: load the base, pull and verify every digest the ledger names, warm each arm, prove the revert (strength 0 and
no arm give the base's logits bit for bit), only then be ready. After that two quiet threads work: one follows the
ledger (new arms are verified and warmed before the routing table is swapped by one reference; rows in flight keep their
arm), one judges the live experiment about once a second and writes what it decides to the ledger.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bentos.runtime.arms import Table
from patches.engine.patch import Patch
from patches.families.base import Base, check_device, load_base
from patches.families.family import family
from patches.families.worker import Job, Worker, WorkerSettings
from patches.subject import Arm, Subject, load_arm
from registry import manifest
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.events import Events
from registry.ab.experiment import Experiment
from registry.ab.ledger import BASE, Ledger
from registry.errors import NotReady, PatchbayError, TooMany, WrongBase
from registry.home import home
from registry.manifest import Manifest
from registry.systems import system

log = logging.getLogger("patchbay")

CARRIED = Path(__file__).parents[2] / "carried"
"""in a Bento: the sealed folder it was built to serve; a checkout has none"""
FOLLOW_S = 0.5
JUDGE_S = 1.0
WINDOW_S = 10.0
"""how often the live experiment's numbers go to MLflow, which only displays them"""
QUEUE = 512
"""rows waiting or running; more get 429"""
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


def check(s: Settings, head: ledgers.Entry | None) -> dict[str, str]:
    """role -> reference of each base, if all that can be told before they are loaded is well.

    Raises NotReady with the way out.
    """
    row = system(s.system)
    check_device(s.device)
    if s.provider:
        engine = family(row.family).engine
        if engine is None:
            raise NotReady(
                f"PATCHBAY_PROVIDER={s.provider[:20]!r}: {row.family} bases run in torch alone; leave it out."
            )
        importlib.import_module(engine).check_provider(s.provider)
    refs = _named(s, head)
    refs |= dict(zip(row.bases, (s.base or "").split(","), strict=False)) if s.base else {}
    for role, kind in row.bases.items():
        if not refs.get(role):
            one = ",".join(family(kind).example for kind in row.bases.values())
            raise NotReady(
                f"{s.system} has no patch yet, so its {role if row.roles else 'base'} is unknown. Push one, or set "
                f"PATCHBAY_BASE, for instance to {one}."
            )
        if refs[role].startswith("local:"):
            raise NotReady(
                f"The base is the folder {refs[role][6:]!r} of the machine where the patch was fitted. Put it here, "
                "and set PATCHBAY_BASE=local-dir:<folder> (or gguf:<file>)."
            )
        del kind
    return {role: refs[role] for role in row.bases}


def _named(s: Settings, head: ledgers.Entry | None) -> dict[str, str]:
    """role -> reference, as the pinned artifact, the champion or the challenger names it."""
    folder = s.pinned
    for digest in (head.champion, head.challenger) if head and folder is None else ():
        if digest and digest != BASE:
            from registry import store

            folder = store.pull(digest)
            break
    if folder is None:
        return {}
    return {role: label.rpartition("@")[0] for role, label in manifest.read(folder).bases.items()}


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


class Runtime:
    """One base with its arms, decoding for everybody. `start` before use, `stop` after."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts = Counts()
        self.problem = "starting"
        """why it is not ready; empty when it is"""
        self.warning = ""
        """what went wrong while following; the old table keeps serving"""
        self.table: Table | None = None
        self.events: Events | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._inflight: Counter[str] = Counter()
        self._counting = threading.Lock()

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load, verify, warm, prove; then follow. Raises what stands in the way, and says it on /readyz."""
        try:
            pinned = self.settings.pinned
            self.ledger = None if pinned else Ledger()
            head = self.ledger.head(self.settings.system) if self.ledger else None
            row = system(self.settings.system)
            refs = check(self.settings, head)
            bases = {role: load_base(refs[role], kind, self.settings.device) for role, kind in row.bases.items()}
            self.subject = Subject(bases, about=family(row.family))
            s = self.settings
            self.worker: Worker[Any] = self.subject.worker(WorkerSettings(s.slots, s.context, s.provider))
            self._spawn(self._work)
            if pinned:
                self.table = self._table(None, champion=self._pin(pinned))
            else:
                self.events = Events()
                self.table = self._follow_once(head)
                self._spawn(self._follow)
                self._spawn(self._judge)
            self._prove_revert()
            self.problem = ""
        except BaseException as e:
            self.problem = str(e) or type(e).__name__
            raise

    def stop(self) -> None:
        """End the threads and take the patches off."""
        self._stopping.set()
        with self._wake:
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)
        if self.events:
            self.events.close()
        if hasattr(self, "subject"):
            self.subject.close()

    @property
    def base(self) -> Base:
        """The base that patches go on."""
        return self.subject.base

    def _pin(self, folder: Path) -> str:
        """The champion of a deployment that carries its own: a patch's digest, or "base"."""
        about = self._own(folder)
        if about.kind == "model" and not about.files:
            return BASE
        self._add(about.digest, load_arm(folder, about, self.settings.device))
        return about.digest

    def _own(self, folder: Path, digest: str | None = None) -> Manifest:
        """The manifest of a sealed folder, if it was made from the bases that are loaded. Raises WrongBase else."""
        about = manifest.read(folder, digest=digest)
        for role, label in about.bases.items():
            if role in self.subject.bases and label.rpartition("@")[2] != self.subject.bases[role].digest:
                have = self.subject.bases[role].label
                raise WrongBase(
                    f"{folder} was made from {label[:80]}, not from {have[:80]}. Fit it again on this base."
                )
        return about

    def folder(self, digest: str) -> Path:
        """The sealed folder of a patch that is served here, verified."""
        if self.settings.pinned:
            manifest.read(self.settings.pinned, digest=digest)
            return self.settings.pinned
        from registry import store

        return store.pull(digest)

    def _spawn(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True)
        self._threads.append(thread)
        thread.start()

    # ---- working -------------------------------------------------------------------------------------------------

    def submit(self, rows: Sequence[Any]) -> None:
        """Queue jobs of the worker's kind.

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
                self.worker.cancel(row)
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
                    self._wake.wait(timeout=1.0)
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            if self.worker.idle:
                continue
            start = time.perf_counter()
            try:
                touched: Sequence[Job] = self.worker.step()
            except Exception:
                # nothing a request contains may end up here; if it does, these rows fail and the next ones live
                log.exception("a step failed; its rows are given up")
                touched = [*self.worker.running, *self.worker.waiting]
                for row in touched:
                    row.finished = row.finished or "failed"
                self.worker.reset()
            self.counts.steps += 1
            self.counts.rows += len(touched)
            self.counts.seconds += time.perf_counter() - start
            for row in touched:
                self.counts.tokens[row.arm or BASE] += 1
                if row.finished:
                    self._done(row)
                if row.on_step is not None:
                    row.on_step(row)

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
        if not done.wait(timeout=120):
            raise NotReady("The working thread does not answer.")
        value, error = box[0]
        if error is not None:
            raise error
        return value

    # ---- following -----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        seen = -1
        assert self.ledger is not None
        while not self._stopping.wait(FOLLOW_S):
            try:
                now = self.ledger.version()
                if now == seen:
                    self._forget_unused()
                    continue
                head = self.ledger.head(self.settings.system)
                if self.table is None or (head.hash if head else "") != self.table.head:
                    self.table = self._follow_once(head)
                    log.info("serving champion %s", self.table.champion[:16])
                seen, self.warning = now, ""
            except Exception as e:  # the old table keeps serving, loudly
                self.warning = f"cannot follow the ledger: {e}"
                log.error(self.warning)

    def _follow_once(self, head: ledgers.Entry | None) -> Table:
        from registry import store

        x = experiments.load(head.experiment) if head and head.experiment else None
        champion = head.champion if head else BASE
        challenger = head.challenger if head else None
        for digest in {champion, challenger, *((x.control, x.treatment) if x else ())} - {BASE, None}:
            assert digest is not None
            if digest not in self.subject.arms:
                folder = store.pull(digest)
                self._add(digest, load_arm(folder, self._own(folder, digest), self.settings.device))
        return self._table(head, champion, challenger, x)

    def _table(
        self, head: ledgers.Entry | None, champion: str, challenger: str | None = None, x: Experiment | None = None
    ) -> Table:
        return Table(
            self.settings.system, self.base.name, self.base.digest, champion, challenger, x,
            frozenset(self.subject.arms), head.hash if head else "",
        )  # fmt: skip

    def _add(self, digest: str, arm: Arm) -> None:
        """What was verified becomes an arm, and has worked once before anybody is routed to it."""
        self.call(lambda: self.subject.add(digest, arm))
        self.worker.prepare(digest, arm if isinstance(arm, Patch) else None)
        warm = threading.Event()
        row: Any = self.worker.probe(digest)
        row.on_step = lambda r: warm.set() if r.finished else None
        with self._counting:
            self._inflight[digest] += 1
        self._tell(lambda: self.worker.add([row]))
        if not warm.wait(timeout=120) or row.finished not in ("length", "stop"):
            self.call(lambda: self.subject.remove(digest))
            raise NotReady(f"sha256:{digest[:16]} was verified but gives no answer; it is not served.")

    def _forget_unused(self) -> None:
        """Remove arms nobody is routed to and no row uses."""
        table = self.table
        if table is None:
            return
        x = table.experiment
        wanted = {table.champion, table.challenger, *((x.control, x.treatment) if x else ())}
        for digest in set(self.subject.arms) - wanted:
            if not self._inflight[digest]:
                self.call(partial(self.subject.remove, digest))
                self.table = self._retabled(table)

    def _retabled(self, table: Table) -> Table:
        return replace(table, loaded=frozenset(self.subject.arms))

    def _prove_revert(self) -> None:
        """Strength 0, and no arm at all, must be the base bit for bit; an arm that is never reached is refused."""

        def proof() -> None:
            look = self.worker.proof
            base = look(None)
            for digest in self.subject.arms:
                look(digest)
                if not isinstance(self.subject.arms[digest], Patch):
                    continue  # a model or a search has no strength at which it is the base
                if not torch.equal(look(digest, 0.0), base) or not torch.equal(look(None), base):
                    raise NotReady(f"sha256:{digest[:16]} does not revert to the base bit for bit; it is not served.")
            if missed := self.subject.applied.unreached():
                raise NotReady(f"These edits were never reached: {', '.join(missed)[:200]}.")

        self.call(proof)

    # ---- judging -------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Only one process of a deployment judges: the one that holds the lock."""
        with (home() / "judge.lock").open("w") as lock:
            while not self._stopping.is_set():
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                self._stopping.wait(5.0)
            shown = 0.0
            while not self._stopping.wait(JUDGE_S):
                try:
                    decision = self.judge_once()
                    if decision and (decision.action != "continue" or time.monotonic() - shown > WINDOW_S):
                        self._show(decision)
                        shown = time.monotonic()
                except Exception as e:
                    log.error("cannot judge: %s", e)

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
