"""Run one forward for many jobs, so that a job that makes it fail fails alone.

`isolate` is what every worker's step goes through. The forward it is given stores nothing until it has succeeded (a
cache's lengths advance at the end), so that it may be run again for fewer jobs: a batch that raises is halved until the
job that makes it raise stands alone. Out of memory gives up the largest job first, for there the batch is at fault and
no single job. A batch of n with one bad job costs 2 log2(n) forwards more, once, and then the job is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from registry.errors import Failed, NoMemory, PatchbayError

log = logging.getLogger("patchbay")


class Fallible(Protocol):
    """What a job must have to fail alone."""

    arm: str | None
    finished: Any
    error: PatchbayError | None


J = TypeVar("J", bound=Fallible)


def isolate(jobs: Sequence[J], forward: Callable[[Sequence[J]], None], size: Callable[[J], float]) -> None:
    """forward(jobs), or for as many neighbouring ones of them as it succeeds for; the others get `error` and end.

    forward: must change nothing when it raises, and is asked for runs of neighbours in `jobs`, first to last.
    size: how much memory a job asks for, in any unit.
    """
    todo: list[tuple[int, int]] = [(0, len(jobs))]
    while todo:
        low, high = todo.pop()
        if low == high:
            continue
        some = jobs[low:high]
        error: PatchbayError | None = None
        full = False
        try:
            forward(some)
            continue
        except Exception as e:
            full = out_of_memory(e)
            if len(some) == 1:
                error = e if isinstance(e, PatchbayError) else (_no_memory() if full else _raised(e))
                log.error("a job of arm %s fails alone: %s", named(some[0].arm), error, exc_info=not full)
        # outside of the handler: until here the traceback held the forward's tensors
        if full and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if error is not None:
            fail(some[0], error)
        elif full:
            worst = max(range(low, high), key=lambda i: size(jobs[i]))
            log.error("out of memory for %d jobs; the largest is given up", len(some))
            fail(jobs[worst], _no_memory())
            todo += [(worst + 1, high), (low, worst)]
        else:
            middle = (low + high) // 2
            todo += [(middle, high), (low, middle)]


def fail(job: Fallible, error: PatchbayError) -> None:
    """End a job with the reason why; a job that has ended stays as it ended."""
    if not job.finished:
        job.error, job.finished = error, "failed"


def named(arm: str | None) -> str:
    """An arm as messages say it."""
    return "base" if arm is None else f"sha256:{arm[:16]}"


def not_finite(arm: str | None, what: str = "logits") -> Failed:
    """The error of a job whose numbers are NaN or infinite. Which arm is for the log: not every caller may know it."""
    log.error("the %s of a job under %s are not finite", what, named(arm))
    return Failed(f"The {what} of this job are not finite numbers under its arm. Ask another arm, or the base.")


def usable(x: Tensor) -> bool:
    """Whether something can be chosen from scores x (..., V): no NaN, and a finite largest one. -inf forbids a choice
    and is no fault."""
    return bool(x.amax(-1).isfinite().all())


def out_of_memory(e: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(e, RuntimeError) and any(s in str(e).lower() for s in ("can't allocate memory", "out of memory"))


def _no_memory() -> NoMemory:
    return NoMemory("There is not enough memory for this job beside the others. Send a shorter one, or try again.")


def _raised(e: Exception) -> Failed:
    return Failed(f"The forward of this job under its arm failed ({type(e).__name__}); it is in the log.")
