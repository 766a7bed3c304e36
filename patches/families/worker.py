"""What every worker is, whatever its family: jobs are added, `step` runs all of them one step, rows join and leave between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from registry.errors import PatchbayError


@dataclass(eq=False, kw_only=True)
class Job:
    """One row of a batch, its arm, and what became of it."""

    arm: str | None = None
    """None: the base"""
    strength: float = 1.0
    params: Mapping[str, Tensor] = field(default_factory=dict)
    """row parameters by name: what this row says to its mechanism"""
    on_step: Callable[[Any], None] | None = None
    """called on the worker's thread after each step it took part in, and at its end"""
    finished: Literal["stop", "length", "cancelled", "failed"] | None = None
    error: PatchbayError | None = None
    """why it failed"""
    told: dict[str, Any] = field(default_factory=dict)
    """facts for the answer, JSON-able"""


@dataclass
class WorkerSettings:
    """How many rows run at once and how long one may be."""

    slots: int = 32
    context: int = 4096
    provider: str = ""


class Worker(ABC):
    """Runs jobs of one family in steps; one thread owns it."""

    running: Sequence[Any]
    waiting: Sequence[Any]

    @abstractmethod
    def check(self, jobs: Iterable[Any]) -> None: ...

    @abstractmethod
    def add(self, jobs: Iterable[Any]) -> None: ...

    @abstractmethod
    def step(self) -> list[Any]: ...

    @abstractmethod
    def cancel(self, job: Any) -> None: ...

    @abstractmethod
    def reset(self) -> None: ...

    @property
    @abstractmethod
    def idle(self) -> bool: ...

    @abstractmethod
    def probe(self, arm: str | None) -> Any: ...

    @abstractmethod
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor: ...

    def prepare(self, arm: str | None, patch: Any = None) -> None:
        """Nothing is to be made for an arm."""

    def run(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """All of them to the end."""
        self.add(jobs)
        while not self.idle:
            self.step()
        return jobs
