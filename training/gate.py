"""What an artifact's recipe promised, and its latency beside its base's: what `patchbay gate` measures.

Quality comes from `training.run.evaluate`, or from an evaluation of the same data that the store already has.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from patches.subject import Subject
from registry import gate, manifest
from registry.errors import NotFound
from registry.measure import Measure
from registry.systems import system
from training.evidence import dataset_of, recipe_of
from training.tasks.intervals import Z

PAIRS, SECONDS = 24, 20.0
"""runs of each side that a latency is taken from, and the seconds after which fewer must do"""
FEWEST = 5


def promises(folder: Path) -> tuple[str, tuple[gate.Promise, ...], tuple[str, str]]:
    """The recipe (system/recipe) of a sealed folder, what it promises, and name and digest of the data it is measured
    on. Raises NotFound for a system that promises nothing."""
    about = manifest.read(folder)
    sealed = recipe_of(folder, about)
    job = system(about.system).load_job()
    found = job.promises(sealed.name.partition("/")[2], sealed.config) if hasattr(job, "promises") else ()
    if not found:
        raise NotFound(f"{sealed.name} promises nothing, so nothing can be held to it: {job.__name__} has no promises.")
    return sealed.name, tuple(found), dataset_of(sealed)


def latency(folder: Path, device: str | None = None) -> Measure:
    """Seconds of the patched arm over seconds of its base for the same job: the geometric mean over pairs of runs, one
    after the other in turns, with a normal 95 % interval of the mean logarithm."""
    about = manifest.read(folder)
    config = recipe_of(folder, about).config
    row = system(about.system)
    given = getattr(config, "base", "") if not row.roles else ""
    subject = Subject.load(folder, given or None, str(device or getattr(config, "device", "cpu")))
    try:
        worker = subject.worker()
        worker.prepare(subject.only)

        def seconds(arm: str | None) -> float:
            start = time.perf_counter()
            worker.run([worker.probe(arm)])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - start

        seconds(None), seconds(subject.only)  # the first runs compile, allocate and read
        ratios: list[float] = []
        end = time.monotonic() + SECONDS
        while len(ratios) < PAIRS and (time.monotonic() < end or len(ratios) < FEWEST):
            first, second = (None, subject.only) if len(ratios) % 2 else (subject.only, None)
            took = {first: seconds(first), second: seconds(second)}
            ratios.append(math.log(took[subject.only] / took[None]))
    finally:
        subject.close()
    logs = torch.tensor(ratios, dtype=torch.float64)
    mean, half = float(logs.mean()), Z * float(logs.std()) / len(logs) ** 0.5
    return Measure(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(ratios), "lower")
