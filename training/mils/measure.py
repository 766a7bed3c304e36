"""Measuring searches: the same items for every arm and baseline, by what is true of them and by their own judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from patches.engine.patch import ONLY
from patches.families.base import Base
from patches.families.search.scorers import Drawn, Renderer
from patches.families.search.track import digest
from patches.families.search.worker import Searching, SearchWorker
from patches.families.worker import WorkerSettings
from patches.subject import Subject
from registry.measure import Measure
from training.lab.worlds import Split
from training.mils import judge
from training.mils.config import Config
from training.mils.draw import Drawer
from training.mils.items import Task, items
from training.tasks.captions import bleu, cider_d, named, objects
from training.tasks.intervals import mean, share


@dataclass(frozen=True)
class Run:
    """What a search came to on n items."""

    task: Task
    jobs: list[Searching]
    seconds: float
    """wall time of all of them together"""
    draws: Renderer | None = None
    """what drew the candidates, of tasks that draw"""

    @property
    def texts(self) -> list[str]:
        return [job.best[0] if job.best is not None else "" for job in self.jobs]

    def texts_at(self, step: int) -> list[str]:
        """The best text of every item after round `step`."""
        out = []
        for job in self.jobs:
            assert job.item is not None
            assert job.item.track is not None
            found = [c for c in job.item.track.found.values() if c.step <= step]
            out.append(max(found, key=lambda c: c.score).text)
        return out

    @property
    def traces(self) -> list[list[dict[str, Any]]]:
        return [job.item.track.trace for job in self.jobs if job.item is not None and job.item.track is not None]

    @property
    def digest(self) -> str:
        """64 hex digits of all traces, without what clocks measured."""
        return digest([record for trace in self.traces for record in trace])


_workers: WeakKeyDictionary[Subject, SearchWorker] = WeakKeyDictionary()


def worker(subject: Subject) -> SearchWorker:
    """The worker of a subject, which can also draw; one, so that all measurements share the features of texts."""
    if subject in _workers:
        return _workers[subject]
    made = _workers[subject] = SearchWorker(subject, WorkerSettings())
    made.renderers["prompt"] = Drawer()
    return made


def jobs_of(task: Task, arm: str | None, strength: float = 1.0) -> list[Searching]:
    return [
        Searching(
            arm=arm, strength=strength, inputs=x, key=str(i), start=task.starts[i] if task.starts else (),
            goal=task.goals[i] if task.goals else "",
        )
        for i, x in enumerate(task.inputs)
    ]  # fmt: skip


def run(
    subject: Subject, task: Task, arm: str | None, strength: float = 1.0, on_round: Callable[[Run], None] | None = None
) -> Run:
    """Search for all items together. on_round: called after every round of any of them."""
    at_work = worker(subject)
    scorer = at_work.scorer(at_work.parts(arm))
    made = Run(task, jobs_of(task, arm, strength), 0.0, scorer.renderer if isinstance(scorer, Drawn) else None)
    began = time.monotonic()
    at_work.add(made.jobs)
    while not at_work.idle:
        if at_work.step() and on_round is not None:
            on_round(made)
    for job in made.jobs:
        if job.error is not None:
            raise job.error
    return replace(made, seconds=time.monotonic() - began)


def worth(done: Run, texts: Sequence[str]) -> list[float]:
    """What every text is worth: F1 of the things it says, or whether the judge calls what it draws what was asked."""
    task = done.task
    if task.drawn:
        assert done.draws is not None
        n = done.draws.batch
        drawn = torch.cat([done.draws.draw(texts[i : i + n]) for i in range(0, len(texts), n)])
        return [float(x) for x in judge.right(drawn, [true[0] for true in task.true])]
    return [objects(t, true, task.names).f1 for t, true in zip(texts, task.true, strict=True)]


def metrics(done: Run, texts: Sequence[str] | None = None) -> dict[str, Measure]:
    """What the best texts are worth, with 95 % intervals over items."""
    task = done.task
    texts = list(texts if texts is not None else done.texts)
    if task.drawn:
        return {"target/drawn_right": share([bool(x) for x in worth(done, texts)], "higher")}
    return judged(task, texts)


def judged(task: Task, texts: Sequence[str]) -> dict[str, Measure]:
    """What texts are worth by what is true of the items they describe, and by the judge."""
    found = [objects(t, true, task.names) for t, true in zip(texts, task.true, strict=True)]
    out = {
        "target/f1": mean([o.f1 for o in found]),
        "target/recall": mean([o.recall for o in found]),
        "target/precision": mean([o.precision for o in found]),
    }
    if task.references:
        out["quality/bleu4"] = Measure(bleu(texts, task.references), n=len(texts), better="higher")
        out["quality/cider_d"] = mean(cider_d(texts, task.references))
    if task.judged is not None:
        out["quality/judge"] = mean(judge.score(task.judged, texts))
    if task.words:
        says = [bool(named(t, [w])) for t, w in zip(texts, task.words, strict=True)]
        out["target/says_word"] = share(says, "lower")
    return out


def spent(done: Run) -> dict[str, Measure]:
    """Scores, scorer calls and tokens of the searches themselves."""
    tracks = [job.item.track for job in done.jobs if job.item is not None and job.item.track is not None]
    return {
        "quality/score": mean([t.best.score for t in tracks if t.best is not None]),
        "offtarget/calls": Measure(sum(t.calls for t in tracks) / len(tracks), n=len(tracks)),
        "offtarget/tokens": Measure(sum(t.tokens for t in tracks) / len(tracks), n=len(tracks)),
    }


def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, float | Measure]:
    """The search on the test split; arm None: the same with no round, which is the best line of the same bank."""
    task = task_of(config, subject.bases["scorer"], "test", config.items)
    done = run(subject, task, ONLY, strength=0.0 if arm is None else 1.0)
    return {**metrics(done), **spent(done)}


def task_of(config: Config, base: Base, split: Split, n: int) -> Task:
    return items(config, base, split, n)
