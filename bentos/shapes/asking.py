"""What a request says to the mechanism of its arm (`patchbay.ask`), for every shape: checked by the mechanism, passed on
blindly. A mechanism may look first: then it runs other jobs on the same worker before it answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from bentos.desk import DEADLINE_S
from patches.engine.patch import Patch
from registry.errors import BadRequest, NotReady


async def say(runtime: Any, job: Any, ask: Mapping[str, Any] | None) -> None:
    """Fill `params` and `told` of a job. The base, and rows that ask nothing, say nothing.

    Raises BadRequest for what the mechanism of the job's arm does not take, and what the mechanism raises.
    """
    if not ask or job.arm is None:
        return
    patch = runtime.subject.arms.get(job.arm)
    if not isinstance(patch, Patch) or patch.Ask is None:
        raise BadRequest("patchbay.ask: the mechanism that answers takes nothing from a request; leave it out.")
    try:
        asked = patch.Ask.model_validate(dict(ask))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"][:4])[:60]
        raise BadRequest(f"patchbay.ask.{where}: {first['msg'][:160]}") from None
    await asyncio.to_thread(patch.prepare, job, asked, runtime.base, lambda jobs: run(runtime, jobs))


def run(runtime: Any, jobs: Sequence[Any]) -> Sequence[Any]:
    """Run jobs on the runtime's worker and wait for all, from any thread but its own. Raises NotReady after the
    deadline."""
    done = threading.Event()

    def ring(_: Any) -> None:
        if all(j.finished for j in jobs):
            done.set()

    for job in jobs:
        job.on_step = ring
    runtime.submit(jobs)
    if not done.wait(DEADLINE_S):
        for job in jobs:
            runtime.cancel(job)
        raise NotReady(f"No answer within {DEADLINE_S:g} s; it was given up.")
    return jobs
