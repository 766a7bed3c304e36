"""Judge the live experiment about once a second, and write decisions to the ledger."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.errors import Conflict, PatchbayError

if TYPE_CHECKING:
    from bentos.runtime import Runtime

log = logging.getLogger("patchbay")

JUDGE_S = 1.0
JUDGE_AGAIN_S = 5.0
"""Interval in seconds at which a process that does not judge tries to become the judge"""
HERE = "this process"
WINDOW_S = 10.0
"""Interval in seconds at which the live experiment's estimates go to MLflow, which only displays them"""
SHOWN_S = 1.0
"""Longest wait in seconds for MLflow when the judge ends"""


class Judge:
    """Judge of a system's experiments. Only the process that holds the system's file lock judges."""

    def __init__(self, runtime: Runtime) -> None:
        self.r = runtime
        self._told: queue.SimpleQueue[experiments.Decision | None] = queue.SimpleQueue()
        """Decisions that MLflow has not shown yet; None ends"""
        self.who = ""
        """The process that judges this system's experiments: HERE, or another one's number and machine"""

    def run(self) -> None:
        """Judge while this process has the system's turn; ask for it while another one has it."""
        assert self.r.ledger is not None
        turn = self.r.ledger.database.turn(f"judge-{self.r.settings.system}")
        shown = 0.0
        # MLflow takes seconds to import, and may hang: no decision waits for it
        display = threading.Thread(target=self._display, name="display", daemon=True)
        display.start()
        try:
            while not self.r.watch.stopping.wait(JUDGE_S if self.who == HERE else self._again()):
                self.r.watch.beat("judge")
                try:
                    if not turn.mine():
                        self.who = turn.holder
                        continue
                    self.who = HERE
                    decision = self.once()
                    self.r.calm("judge")
                    now = time.monotonic()
                    if decision and (decision.action != "continue" or (now - shown > WINDOW_S and self._told.empty())):
                        self._told.put(decision)
                        shown = now
                except Exception as e:
                    self.r.warn("judge", f"cannot judge: {e}")
        finally:
            turn.close()
            self._told.put(None)
            display.join(SHOWN_S)

    def _display(self) -> None:
        """Show decisions in MLflow as they come."""
        while (decision := self._told.get()) is not None:
            self._show(decision)

    def _again(self) -> float:
        """Seconds until the next question for the turn; none before the first."""
        return JUDGE_AGAIN_S if self.who else 0.0

    def _show(self, decision: experiments.Decision) -> None:
        """Show the experiment's estimates, and after a decision the new champion, in MLflow.

        The ledger does not depend on it.
        """
        try:
            from registry import store
        except ImportError:  # a Bento has no MLflow; `patchbay report` shows the same from the events
            return
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
                assert self.r.ledger is not None
                head = self.r.ledger.head(self.r.settings.system)
                assert head is not None
                if why := store.mirror(self.r.settings.system, head.champion, head.challenger):
                    log.warning(why)
        except Exception as e:  # whatever MLflow raises, the next decision is shown again
            log.warning("MLflow does not show the experiment: %s", e)

    def once(self) -> experiments.Decision | None:
        """Judge the live experiment once; act on the ledger if it is decided."""
        if self.r.ledger is None or self.r.events is None:
            return None
        head = self.r.ledger.sound(self.r.settings.system)
        if head is None or head.experiment is None:
            return None
        x = experiments.load(head.experiment)
        decision = experiments.judge(x, self.r.events.summary(x))
        if decision.action == "promote":
            try:
                ledgers.check_gate(self.r.ledger, x.system, x.treatment)
            except Conflict as e:  # it won, and still nobody has measured what it promises
                decision = replace(decision, action="continue", why=f"{decision.why}, but {e}")
        if decision.action == "continue":
            return decision
        act = {"promote": ledgers.promote, "rollback": ledgers.rollback}
        try:
            if decision.action == "stop":
                ledgers.stop(self.r.ledger, x.system, evidence=decision.evidence(), who="judge")
            else:
                act[decision.action](
                    self.r.ledger, x.system, evidence=decision.evidence(), who="judge", expect=head.hash,
                    **({"digest": x.treatment} if decision.action == "promote" else {}),
                )  # fmt: skip
            log.warning("%s: %s (%s)", x.name, decision.action, decision.why)
        except PatchbayError as e:  # another process decided first; retry in a second
            log.info("not decided: %s", e)
        return decision
