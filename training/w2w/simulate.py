"""The components of a population too large to train here: rows are drawn on the fly, some directions are planted.

    python -m training.w2w.simulate [models=60000 numbers=99648 components=100 ...]

The shape of the paper's population (64,974 adapters of 99,648 numbers, arXiv 2406.09413) by default. One line of JSON:
CPU seconds, peak memory, and how much of the planted directions lies in the components found.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from registry import config as configs
from registry.config import STRICT
from training.w2w import subspace

STRONGEST, WEAKEST = 20.0, 4.5
"""standard deviations of the planted directions, where any other has one; below (d / N)^(1/4) none could be found"""

BYTE = (65535 / 12) ** 0.5
"""standard deviation of a byte, -128 to 127"""


@dataclass(frozen=True)
class Simulation:
    """How large a population, and how its components are looked for."""

    __pydantic_config__ = STRICT

    models: int = 60_000
    numbers: int = 99_648
    """Numbers of one adapter"""
    components: int = 100
    planted: int = 64
    block: int = 250
    """models in memory at a time, as a shard would hold them"""
    power: int = 1
    """power iterations, two passes over the population each"""
    seed: int = 0


def planted(c: Simulation) -> Tensor:
    """(planted, numbers) directions of unit length times their standard deviations."""
    g = Generator().manual_seed(c.seed)
    strength = torch.linspace(STRONGEST, WEAKEST, c.planted)
    return strength[:, None] * torch.nn.functional.normalize(torch.randn(c.planted, c.numbers, generator=g), dim=1)


def rows(c: Simulation, directions: Tensor) -> Iterator[Tensor]:
    """(n, numbers) blocks of the population, the same at every call: planted directions and noise of unit variance."""
    for at in range(0, c.models, c.block):
        n, g = min(c.block, c.models - at), Generator().manual_seed(c.seed * 1_000_003 + at + 1)
        # eight bytes of noise at a time: the simulation is to cost what components cost, not what normals do
        words = torch.empty(-(-n * c.numbers // 8), dtype=torch.int64).random_(-(2**63), 2**63 - 1, generator=g)
        noise = words.view(torch.int8)[: n * c.numbers].view(n, c.numbers).float()
        own = torch.randn(n, c.planted, generator=g)
        yield torch.addmm(noise.add_(0.5).div_(BYTE), own, directions)


def simulate(c: Simulation) -> dict[str, Any]:
    """CPU seconds, peak memory in GiB, and `found`: the mean squared cosine of planted directions with the space."""
    directions = planted(c)
    begun, passes = time.process_time(), 0

    def blocks() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        return rows(c, directions)

    made = subspace.fit(blocks, c.components, route="randomised", power=c.power, seed=c.seed)
    spent = time.process_time() - begun
    unit = torch.nn.functional.normalize(directions / made.sd, dim=1)
    return {
        "models": c.models, "numbers": c.numbers, "components": c.components, "passes": passes,
        "cpu_seconds": round(spent, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "found": round(float((unit @ made.basis).square().sum(1).mean()), 4),
        "share": round(float(made.share[-1]), 4),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(simulate(configs.override(Simulation(), sys.argv[1:]))))  # noqa: T201 - a command line's answer
