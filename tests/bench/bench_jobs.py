"""What an artifact of any system costs: its family's probe job by base and by artifact, turn about in one worker.

Of a patch, base and patched are rows of one model; of a model, its own weights stand beside the base's. One job alone
and eight together: the ratio says what the artifact costs, jobs a second what a batch gains.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from patches.families.worker import Worker
from patches.subject import Subject

from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]
SECONDS, ROUNDS, FEWEST = 12.0, 40, 5
"""time that a bench takes, the most rounds that it takes, and the fewest"""


def runner(subject: Subject, count: int) -> Callable[[str | None], None]:
    """What runs `count` probe jobs of an arm together, to their ends."""
    worker: Worker[Any] = subject.worker()
    worker.prepare(subject.only)

    def run(arm: str | None) -> None:
        worker.run([worker.probe(arm) for _ in range(count)])
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def times(run: Callable[[str | None], None], only: str | None, seconds: float = SECONDS) -> dict[str, list[float]]:
    """Seconds of each call of `run`, by variant and round. seconds: about how long; 0 is one round."""
    run(only)
    run(None)  # the first runs allocate and read
    begun = time.perf_counter()
    run(None)
    rounds = max(FEWEST, min(ROUNDS, int(seconds / 3 / (time.perf_counter() - begun)))) if seconds else 1
    variants: dict[str, Callable[[], object]] = {"base": partial(run, None), "base again": partial(run, None)}
    return interleave(variants | {"patched": partial(run, only)}, rounds, warmup=min(1, rounds - 1))


@pytest.mark.parametrize("count", [1, 8])
def bench_jobs(worked: Subject, benchmark: Any, count: int) -> None:
    """So many of the family's probe jobs in one batch."""
    run = runner(worked, count)
    took = times(run, worked.only)
    out = {name: ratio(t, took["base"]) for name, t in took.items()}
    rate = {name: count / statistics.median(t) for name, t in took.items()}
    benchmark.extra_info.update(
        device=str(worked.base.device), base=worked.base.label, jobs=count, memory=worked.memory,
        ratios={name: vars(found) for name, found in out.items()},
        sides={f"jobs_per_s_{count}": {"base": rate["base"], "patched": rate["patched"]}},
    )  # fmt: skip
    benchmark.pedantic(run, (worked.only,), rounds=3)
    print(f"\n{count} jobs:", {name: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for name, v in out.items()})
