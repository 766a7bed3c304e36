"""A stand-in of each kind that is no patch, in tests only: a family of models that multiply, with arms that are other
weights, and a search over two of them. `installed` puts families, systems, jobs and a shape where the core looks."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patches.families import base as bases
from patches.families import family as families
from patches.families.base import Base, load_base
from patches.families.family import Column, Family, Table
from patches.families.worker import Job, Worker
from patches.subject import Search
from registry import gate, manifest, systems
from registry.measure import Measure
from registry.systems import System

MODEL, SEARCH = "standin_model", "standin_search"
"""names of the systems, and of their families"""


class Times(nn.Module):
    """x -> factor * x"""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def times(ref: str, name: str, factor: float) -> Base:
    return Base(ref, name, manifest.digest_of(["times", factor]), Times(factor).eval(), None, "")


def read(folder: Path, device: str) -> Base:
    factor = float(load_file(folder / "weights.safetensors")["factor"])
    return times(f"local-dir:{folder}", folder.name[:16], factor)


@dataclass(eq=False)
class Number(Job):
    """One number to be multiplied."""

    x: float
    out: float | None = None


class Multiplier(Worker[Number]):
    """Numbers of any arm, one after the other."""

    def __init__(self, subject: Any, settings: Any) -> None:
        self.subject, self.waiting, self.running = subject, deque(), []

    def answer(self, arm: str | None, x: float) -> float:
        with self.subject.applied.rows([arm]):
            return float(self.subject.base.model(torch.tensor([x]))[0])

    def check(self, jobs: Any) -> None:
        pass

    @torch.inference_mode()
    def step(self) -> list[Number]:
        jobs = list(self.waiting)
        self.waiting.clear()
        for job in jobs:
            job.out, job.finished = self.answer(job.arm, job.x), "stop"
        return jobs

    def cancel(self, job: Number) -> None:
        job.finished = "cancelled"
        self.waiting.remove(job)

    def reset(self) -> None:
        self.waiting.clear()

    def probe(self, arm: str | None) -> Number:
        return Number(1.0, arm=arm)

    @torch.inference_mode()
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        return torch.tensor([self.answer(arm, 1.0)])


class Searcher(Multiplier):
    """The product of both bases, times what the arm's configuration says."""

    def answer(self, arm: str | None, x: float) -> float:
        found = self.subject.arms.get(arm)
        factor = found.config["factor"] if isinstance(found, Search) else 1.0
        return factor * float(
            self.subject.bases["generator"].model(self.subject.bases["scorer"].model(torch.tensor(x)))
        )


def predict(subject: Any, frame: Any, params: Mapping[str, Any]) -> Any:
    import pandas as pd

    jobs = [Number(float(x), arm=subject.only) for x in frame["x"]]
    subject.worker().run(jobs)
    return pd.DataFrame({"y": [job.out for job in jobs]})


TABLE = Table(takes=(Column("x", "double", 1.0),), gives=(Column("y", "double", 2.0),))


def tiny(seed: int) -> Base:
    return times(f"tiny:{seed}", f"times-{seed}", 2.0 + seed)


def a_family(name: str, worker: Any, **more: Any) -> Family:
    load = lambda ref, device: read(Path(ref.partition(":")[2]), device)  # noqa: E731
    return Family(name, load, tiny, worker, TABLE, predict, "tiny:0", **more)


@dataclass(frozen=True)
class Config:
    """Of both jobs."""

    base: str = "tiny"
    factor: float = 5.0
    device: str = "cpu"
    seed: int = 0


def fit_model(config: Config, folder: Path) -> manifest.Manifest:
    base = load_base(config.base, MODEL)
    save_file({"factor": torch.tensor(config.factor)}, folder / "weights.safetensors")
    return manifest.write(folder, kind="model", system=MODEL, base=base.label, config={"factor": config.factor})


def fit_search(config: Config, folder: Path) -> manifest.Manifest:
    made = {role: load_base(f"tiny:{i}", MODEL).label for i, role in enumerate(("scorer", "generator"))}
    return manifest.write(folder, kind="search", system=SEARCH, bases=made, config={"factor": config.factor})


def evaluate(subject: Any, config: Config, arm: str | None) -> dict[str, Measure]:
    job = Number(2.0, arm=arm)
    subject.worker().run([job])
    return {"quality/y": Measure(job.out, job.out - 1, job.out + 1, 7, "higher"), "quality/x": Measure(2.0)}


def promises(recipe: str, config: Config) -> tuple[gate.Promise, ...]:
    return gate.gain("quality/y", sure=config.factor > 1), gate.Promise("quality/x", "least", 2.0)


def figures(folder: Path, results: Any) -> dict[str, Any]:
    from matplotlib.figure import Figure

    return {side: {"bars": Figure()} for side in results}


class Ask(BaseModel):
    """POST /v1/times"""

    x: float
    model: str | None = None


class Service:
    """One number per request."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    async def times(self, request: Any, ask: Ask) -> Any:
        import asyncio
        import time

        from bentos.desk import facts, headers
        from bentos.http import answer

        start = time.perf_counter()
        table, choice = self.desk.choice(request, ask.model)
        done, loop = asyncio.Event(), asyncio.get_running_loop()
        job = Number(ask.x, arm=choice.arm, on_step=lambda _: loop.call_soon_threadsafe(done.set))
        self.desk.runtime.submit([job])
        await asyncio.wait_for(done.wait(), 30)
        await self.desk.expose(request, choice, 200, start)
        return answer({"y": job.out, "patchbay": facts(table, choice)}, headers=headers(table, choice))


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Both stand-ins, until the block ends."""
    from bentos import app, build
    from bentos.http import Call

    rows = (
        System(MODEL, "multiplies", "none", MODEL, None, ("times",)),
        System(SEARCH, "multiplies twice", "none", SEARCH, None, ("times",),
               roles={"scorer": MODEL, "generator": MODEL}),
    )  # fmt: skip
    shape = module(
        "bentos.shapes.times", ROUTES=(Call("POST", "/v1/times", Service.times, "predict", Ask),), Service=Service
    )
    job = {"Config": Config, "RECIPES": {"tiny": Config()}, "evaluate": evaluate, "figures": figures,
           "promises": promises}  # fmt: skip
    known, shapes = families.families(), app.shapes
    planned = System.planned.fget
    with pytest.MonkeyPatch.context() as patch:
        for row, fit in zip(rows, (fit_model, fit_search), strict=True):
            patch.setitem(systems.SYSTEMS, row.name, row)
            patch.setitem(sys.modules, row.job, module(row.job, fit=fit, **job))
        about = {MODEL: a_family(MODEL, Multiplier, load_folder=read), SEARCH: a_family(SEARCH, Searcher)}
        for name, value in about.items():
            key = f"patches.families.{name}"
            patch.setitem(sys.modules, key, module(key, FAMILY=value))
        patch.setattr(families, "families", lambda: [*known, *about])
        patch.setattr(System, "planned", property(lambda self: self.job not in sys.modules and planned(self)))
        for place in (app, build):
            patch.setattr(place, "shapes", lambda row: [shape] if row in rows else shapes(row))
        assert bases.families is families
        yield
