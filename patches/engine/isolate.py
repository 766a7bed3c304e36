"""Run one forward for many jobs, so that a job that makes it raise fails alone and the others succeed.

Every worker's step goes through `isolate`. The forward must store nothing until it has succeeded (a cache's lengths
advance last), so that it can be retried for fewer jobs: a batch that raises is bisected until the failing job stands
alone. When memory runs out the largest job is given up first, because then the batch is at fault and not a single job.
One bad job in a batch of n costs 2 log2(n) extra forwards, once.
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
    """The fields that a job needs in order to fail alone."""

    arm: str | None
    finished: Any
    error: PatchbayError | None


J = TypeVar("J", bound=Fallible)


def isolate(jobs: Sequence[J], forward: Callable[[Sequence[J]], None], size: Callable[[J], float]) -> None:
    """Run forward(jobs), bisecting on errors; jobs for which it still fails get `error` and end.

    forward: must change nothing when it raises; it is called with runs of neighbours in `jobs`, from first to last.
    size: the memory a job needs, in any unit.
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
        # outside of the handler: inside it the traceback keeps the forward's tensors alive
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
    """End a job with an error; a job that has ended already is left as it is."""
    if not job.finished:
        job.error, job.finished = error, "failed"


def named(arm: str | None) -> str:
    """Format an arm for log messages."""
    return "base" if arm is None else f"sha256:{arm[:16]}"


def not_finite(arm: str | None, what: str = "logits") -> Failed:
    """Return the error for NaN or infinite outputs. It does not name the arm, which only the log may tell."""
    log.error("the %s of a job under %s are not finite", what, named(arm))
    return Failed(f"The {what} of this job are not finite numbers under its arm. Ask another arm, or the base.")


def usable(x: Tensor) -> bool:
    """Return whether a choice can be made from scores x (..., V): no NaN, and a finite largest one in each row.

    -inf is allowed: it forbids a choice.
    """
    return bool(x.amax(-1).isfinite().all())


def out_of_memory(e: BaseException) -> bool:
    """Return whether an exception means that memory ran out, on any device."""
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(e, RuntimeError) and any(s in str(e).lower() for s in ("can't allocate memory", "out of memory"))


def _no_memory() -> NoMemory:
    return NoMemory("There is not enough memory for this job beside the others. Send a shorter one, or try again.")


def _raised(e: Exception) -> Failed:
    return Failed(f"The forward of this job under its arm failed ({type(e).__name__}); it is in the log.")
