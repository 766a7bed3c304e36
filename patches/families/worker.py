"""Jobs and the workers that run them: what every family's running batch has in common.

A worker belongs to one thread. Jobs of any arm join and leave its batch between steps; a service, an evaluation and
MLflow's pyfunc all drive it by the same few methods.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from patches.engine.isolate import fail
from registry.errors import Failed, PatchbayError

if TYPE_CHECKING:
    from patches.engine.patch import Patch


log = logging.getLogger("patchbay")


@dataclass(eq=False, kw_only=True)
class Job:
    """One row of a batch: which arm it wants, and what became of it."""

    arm: str | None = None
    """None: the base as it is"""
    strength: float = 1.0
    """how much of the arm; 0 is exactly the base"""
    params: Mapping[str, Tensor] = field(default_factory=dict)
    """row parameters: what this row says to its mechanism (`Inputs.row`)"""
    on_step: Callable[[Any], None] | None = None
    """called with the job on the worker's thread after each step it took part in, and at its end"""
    finished: Literal["stop", "length", "cancelled", "failed"] | None = None
    error: PatchbayError | None = None
    """why it failed"""
    told: dict[str, Any] = field(default_factory=dict)
    """facts for the answer that worker or mechanism found on the way; what JSON can say"""


@dataclass(frozen=True)
class WorkerSettings:
    """How large a worker's batch may become, and what runs it."""

    slots: int = 32
    """rows of one batch"""
    context: int = 4096
    """tokens of a row, for families that have tokens"""
    provider: str = ""
    """Provider of ONNX Runtime (cpu or cuda) for families that it can run; empty: torch"""
    kv_bytes: int | None = None
    """Bytes that keys and values of all rows may take; None: what is free, less a reserve"""


def spare_bytes(device: torch.device) -> int:
    """Bytes of keys and values that `device` has room for now: four fifths of what is free, half of it on a CPU, whose
    memory others use, too."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available // 2)


J = TypeVar("J", bound=Job)


class Worker(ABC, Generic[J]):
    """A running batch: `add` jobs, call `step` until `idle`."""

    waiting: deque[J]
    running: list[J]
    context: int = 0
    """Tokens that a row may hold, of families that have tokens"""
    engines: Mapping[str | None, Any] = {}
    """arm -> what runs it in another runtime than torch"""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @abstractmethod
    def check(self, jobs: Iterable[J]) -> None:
        """Raises Invalid or TooLarge if one of the jobs cannot be run."""

    def add(self, jobs: Iterable[J]) -> None:
        """Queue jobs. Raises as `check`, queueing none."""
        jobs = list(jobs)
        self.check(jobs)
        self.waiting.extend(jobs)

    @abstractmethod
    def step(self) -> list[J]:
        """One forward of the batch; returns the jobs that took part. Those finished among them have left it.

        A job that makes the forward raise, or whose numbers are not finite, fails alone (patches.engine.isolate).
        """

    def advance(self) -> list[J]:
        """`step` for many callers: if it raises as a whole, the jobs that ran fail and those that wait stay."""
        try:
            return self.step()
        except Exception:
            log.exception("a step failed as a whole; its running jobs are given up")
            ran, waiting = list(self.running), list(self.waiting)
            for job in ran:
                fail(job, Failed("The step of this job failed; it is in the log. Try again."))
            self.reset()
            self.waiting.extend(waiting)
            return ran

    @abstractmethod
    def cancel(self, job: J) -> None:
        """Stop one job now; the others do not notice."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what is queued, running and cached."""

    @abstractmethod
    def probe(self, arm: str | None) -> J:
        """A small job that any model of the family can do."""

    @abstractmethod
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        """What the model gives for a fixed input under an arm: equal bit for bit where behaviour is equal."""

    def prepare(self, arm: str | None, patch: Patch | None = None) -> None:
        """Make what an arm needs before rows are routed to it; may take seconds, so not on the stepping thread."""
        del arm, patch

    def run(self, jobs: Sequence[J]) -> Sequence[J]:
        """Run all of them to the end. Raises the error of the first that failed."""
        self.add(jobs)
        while not self.idle:
            self.step()
        for job in jobs:
            if job.error is not None:
                raise job.error
        return jobs


class Fleet(Worker[Job]):
    """Workers of several models as one: each job goes to the worker of its arm. For arms that are models."""

    def __init__(self, base: Worker[Any]) -> None:
        self.base = base
        self.models: dict[str, Worker[Any]] = {}
        """arm -> the worker of its own copy of the weights; replaced whole"""

    def of(self, arm: str | None) -> Worker[Any]:
        """The worker that runs jobs of `arm`."""
        return self.models.get(arm, self.base) if arm is not None else self.base

    @property
    def all(self) -> tuple[Worker[Any], ...]:
        return (self.base, *self.models.values())

    @property
    def waiting(self) -> deque[Job]:  # type: ignore[override]
        return deque(job for worker in self.all for job in worker.waiting)

    @property
    def running(self) -> list[Job]:  # type: ignore[override]
        return [job for worker in self.all for job in worker.running]

    @property
    def idle(self) -> bool:
        return all(worker.idle for worker in self.all)

    def check(self, jobs: Iterable[Job]) -> None:
        for worker, theirs in self._sorted(jobs):
            worker.check(theirs)

    def add(self, jobs: Iterable[Job]) -> None:
        jobs = list(jobs)
        self.check(jobs)
        for worker, theirs in self._sorted(jobs):
            worker.add(theirs)

    def step(self) -> list[Job]:
        """One step of every worker that has something to do; what one of them raises, the others do not notice."""
        return [job for worker in self.all if not worker.idle for job in worker.advance()]

    def cancel(self, job: Job) -> None:
        self.of(job.arm).cancel(job)

    def reset(self) -> None:
        for worker in self.all:
            worker.reset()

    def probe(self, arm: str | None) -> Job:
        job: Job = self.of(arm).probe(arm)
        return job

    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        return self.of(arm).proof(arm, strength)

    def prepare(self, arm: str | None, patch: Patch | None = None) -> None:
        self.of(arm).prepare(arm, patch)

    def _sorted(self, jobs: Iterable[Job]) -> list[tuple[Worker[Any], list[Job]]]:
        theirs: dict[int, tuple[Worker[Any], list[Job]]] = {}
        for job in jobs:
            worker = self.of(job.arm)
            theirs.setdefault(id(worker), (worker, []))[1].append(job)
        return list(theirs.values())
