"""The worker of searches: jobs of any configuration, each a picture, a clip, a sound or a sum, on shared bases.

An arm is a configuration (`patches.subject.Search`); the bare base retrieves the best line of the lab's bank, which is
a search of no round. strength scales the rounds, so strength 0 is the base's way with the arm's own bank. Arms share
what they can: one scorer for all that score alike, whose text features all their items use.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patches import artifact
from patches.engine.isolate import fail
from patches.engine.patch import Applied, apply
from patches.families.base import Base, load_base
from patches.families.search import backdrops
from patches.families.search import bank as banks
from patches.families.search.bank import Bank
from patches.families.search.config import Budget, SearchConfig
from patches.families.search.generators import Generator, Mutation, Random
from patches.families.search.loop import Item, Searcher
from patches.families.search.scorers import Both, Clip, Cropped, Features, Renderer, Scorer, Target
from patches.families.search.sound import Clap
from patches.families.worker import Job, Worker, WorkerSettings
from registry import config as configs
from registry.errors import BadArtifact, Invalid, NotReady, WrongBase

if TYPE_CHECKING:
    from patches.subject import Subject

SCORER, GENERATOR = "scorer", "generator"
"""roles of the bases"""
RENDERER = "renderer"
"""folder of a patch on the diffusion base that draws"""
RETRIEVAL = SearchConfig(steps=0)
"""the bare base: the best line of the bank"""
PROBE_LINES = 32
"""lines of the bank that a probe or a proof scores"""
DRAWN_LINES = 2
"""the same where every text is drawn"""
TELL_S = 1.0
"""seconds between two words on how far the encoding of the bank is"""
TAKES: dict[str, tuple[str, ...]] = {
    "image": ("pixels",), "video": ("pixels",), "audio": ("sound",), "prompt": ("goal",), "style": ("content",),
    "arithmetic": ("plus", "pixels"),
}  # fmt: skip
"""inputs that a task takes"""
GIVEN = {
    "pixels": "a picture or a clip", "sound": "a sound", "goal": "a goal, the prompt to rewrite", "plus": "a sum",
    "content": "a picture and a style", "both": "a picture with a sound",
}  # fmt: skip
FINISHED = {"cancelled": "cancelled", "failed": "failed", "seconds": "length", "calls": "length", "tokens": "length"}


@dataclass(eq=False, kw_only=True)
class Searching(Job):
    """One item a text is searched for."""

    inputs: Mapping[str, Any]
    """as the scorer's `target` takes them: {"pixels": (T, 3, H, W)}, {"sound": (samples, rate)}, ..."""
    budget: Budget = field(default_factory=Budget)
    key: str = "0"
    """with the configuration's seed: what its random draws depend on"""
    start: tuple[str, ...] = ()
    goal: str = ""
    records: Sequence[Mapping[str, Any]] = ()
    """its trace so far, if it was interrupted"""
    item: Item | None = None
    """filled by the worker: item.track has the trace"""
    progress: float = 0.0
    """rounds that are done, the bank's among them, over all of them"""

    @property
    def best(self) -> tuple[str, float] | None:
        """The best text so far and its score."""
        track = self.item.track if self.item is not None else None
        return (track.best.text, track.best.score) if track is not None and track.best is not None else None


@dataclass
class Parts:
    """What an arm is made of."""

    config: SearchConfig
    bank: Bank
    folder: Path | None = None


class SearchWorker(Worker[Searching]):
    """All configurations of one subject. A step is one slice of one of them, so a cancel is obeyed within a second."""

    def __init__(self, subject: Subject, settings: WorkerSettings) -> None:
        del settings  # rows are bounded by the generators themselves
        self.subject = subject
        self.waiting: deque[Searching] = deque()
        self.running: list[Searching] = []
        self.searchers: dict[str | None, Searcher] = {}
        self.scorers: dict[tuple[str, ...], Scorer] = {}
        self.texts = Features()
        """Features of texts, for all scorers that read them as the unpatched base does"""
        self.generators: dict[tuple[str, ...], Generator] = {}
        self.renderers: dict[str, Renderer] = {}
        """task -> what draws for scorers of pictures that are made; put here by whoever has one"""
        self._patched: dict[str, Applied] = {}
        """role -> the patches on its base, for roles whose base the subject does not hook itself"""
        self._turn = 0
        self._told = 0.0

    # ---- jobs ------------------------------------------------------------------------------------------------------

    def check(self, jobs: Iterable[Searching]) -> None:
        """Raises Invalid for inputs the arm's task does not take, and for a budget beyond what its configuration
        allows."""
        for job in jobs:
            config = self.parts(job.arm).config
            job.budget.within(config)
            takes = TAKES[config.task] if job.arm is not None else ("pixels", "plus")
            if job.arm is not None and config.task == "arithmetic" and config.sound:
                takes = ("both",)
            if any(k in job.inputs for k in takes):
                continue
            what = " and ".join(GIVEN[k] for k in job.inputs if k in GIVEN) or "nothing"
            wants = " or ".join(GIVEN[k] for k in takes)
            if job.arm is None:
                raise Invalid(f"The base looks at pictures ({wants}); it was given {what}. Name an arm of that task.")
            looks = "looks at pictures and wants" if "pixels" in takes else "wants"
            raise Invalid(f"The task {config.task} {looks} {wants}; it was given {what}. Ask an arm of that task.")

    @torch.inference_mode()
    def step(self) -> list[Searching]:
        """One slice of work; returns the jobs whose round it completed, that ended, or that wait for the bank and were
        told of none for TELL_S."""
        while self.waiting:
            self._begin(self.waiting.popleft())
        touched = [j for j in self.running if j.finished]  # what failed when it began
        self._forget()
        busy = [s for s in self.searchers.values() if not s.idle]
        if busy:
            self._turn += 1
            searcher = busy[self._turn % len(busy)]
            done = searcher.step() or self._reading()
            mine = {id(j.item): j for j in self.running}
            touched += [mine[id(item)] for item in done if id(item) in mine]
        for job in touched:
            self._after(job)
        self.running = [j for j in self.running if not j.finished]
        return touched

    def _reading(self) -> list[Item]:
        """Return the items whose bank is being encoded, when it is time to say how far that is."""
        now = time.monotonic()
        if now - self._told < TELL_S:
            return []
        self._told = now
        every = (i for s in self.searchers.values() for i in s.items)
        return [i for i in every if i.track is not None and i.track.step == 0 and i.encoded]

    def _begin(self, job: Searching) -> None:
        self.running.append(job)
        try:
            searcher = self.searcher(job.arm)
            config = job.budget.scaled(searcher.config, job.strength)
            job.item = Item(inputs=job.inputs, config=config, key=job.key, start=job.start, goal=job.goal,
                            records=job.records)  # fmt: skip
            searcher.add([job.item])
        except (Invalid, BadArtifact, NotReady, WrongBase) as e:
            fail(job, e)

    def _after(self, job: Searching) -> None:
        """What a job is told after a round."""
        item = job.item
        if item is None or item.track is None:
            return
        if item.error is not None:
            fail(job, item.error)
        elif item.ended:
            job.finished = FINISHED.get(item.ended, "stop")  # type: ignore[assignment]
        track = item.track
        whole = track.step + (item.encoded if track.step == 0 else 0.0)
        job.progress = min(1.0, whole / (item.config.steps + 1))
        job.told |= {
            "step": max(0, track.step - 1),
            "steps": item.config.steps,
            "calls": track.calls,
            "tokens": track.tokens,
        }
        job.told |= {"why": item.ended} if item.ended else {}
        job.told |= {"problem": item.problem} if item.problem else {}

    def cancel(self, job: Searching) -> None:
        if job.finished:
            return
        job.finished = "cancelled"
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.running:
            self.running.remove(job)
            for searcher in self.searchers.values():
                if job.item in searcher.items or job.item in searcher._in_round:
                    assert job.item is not None
                    searcher.cancel(job.item)

    def reset(self) -> None:
        self.waiting.clear()
        self.running = []
        for searcher in self.searchers.values():
            searcher.reset()

    # ---- arms ------------------------------------------------------------------------------------------------------

    def parts(self, arm: str | None) -> Parts:
        """The configuration and bank of an arm. Raises BadArtifact for one that is no search."""
        if arm is None:
            return Parts(RETRIEVAL, banks.shipped())
        if arm in self.searchers:
            return Parts(self.searchers[arm].config, self.searchers[arm].bank)
        from patches.subject import Search

        found = self.subject.arms.get(arm)
        if not isinstance(found, Search):
            raise BadArtifact(f"The arm {arm[:16]} is no search.")
        file = found.folder / banks.FILE if found.folder is not None else banks.SHIPPED
        config = configs.parse(SearchConfig, found.config)
        return Parts(config, banks.read(file), found.folder)

    def searcher(self, arm: str | None) -> Searcher:
        """What runs an arm, made at its first job."""
        if arm not in self.searchers:
            p = self.parts(arm)
            self.searchers[arm] = Searcher(p.config, p.bank, self.scorer(p), self.generator(p))
        return self.searchers[arm]

    def _forget(self) -> None:
        """Searchers of arms that were removed and have no job go."""
        for arm in [a for a, s in self.searchers.items() if a is not None and s.idle and a not in self.subject.arms]:
            del self.searchers[arm]

    def plain(self, arm: str | None) -> Scorer:
        """The scorer of an arm as a plain cosine: without crops."""
        p = self.parts(arm)
        return self.scorer(replace(p, config=replace(p.config, crops=0)))

    def scorer(self, p: Parts) -> Scorer:
        """The scorer of a configuration; configurations that score alike share one."""
        patch = self._patch(SCORER, p)
        key: tuple[str, ...] = ("", f"{p.config.sound} {p.config.crops}", patch or "")
        if p.config.task in ("prompt", "style"):
            made_by = p.folder if RENDERER in p.config.patched else ""
            key = (p.config.task, f"{p.config.renderer} {p.config.drawn} {made_by}", patch or "")
        if key not in self.scorers:
            self.scorers[key] = self._scorer(p, patch)
        return self.scorers[key]

    def _scorer(self, p: Parts, patch: str | None) -> Scorer:
        from patches.families.search.scorers import Preference, Style

        base = self.subject.bases.get(SCORER, self.subject.base)
        if base.family == "search":  # a subject of one CLAP
            return Clap(base)
        if p.config.task in ("prompt", "style"):
            renderer = self._renderer(p)
            if p.config.task == "style":
                return Style(base, renderer)
            return Preference(base, renderer, self._applied(SCORER), patch)
        applied, crops = self._applied(SCORER), p.config.crops
        sees = Cropped(base, applied, patch, crops) if crops else Clip(base, applied, patch)
        if patch is None or self._blind(SCORER, patch):  # texts are the base's, so their features are shared
            sees.kept = self.texts
        if not p.config.sound:
            return sees
        ref, _, _ = p.config.sound.rpartition("@")
        if ref.startswith("sealed:"):
            if p.folder is None:
                raise BadArtifact("The configuration says its sound model is sealed with it, and there is no folder.")
            ref = f"local-dir:{p.folder / ref.removeprefix('sealed:')}"
        ears = self._named(ref, p.config.sound, "search")
        return Clap(ears) if p.config.task == "audio" else Both(sees, Clap(ears))

    def _renderer(self, p: Parts) -> Renderer:
        """What draws: the diffusion base that the configuration names, else what was put here for the task."""
        if not p.config.renderer:
            if p.config.task not in self.renderers:
                raise NotReady(
                    f"The task {p.config.task} needs something that draws, and this configuration names none. Fit it "
                    "with renderer=lab:diffusion, or another diffusion base."
                )
            return self.renderers[p.config.task]
        if p.config.renderer.startswith(backdrops.PREFIX):
            if p.folder is None:
                raise BadArtifact("The configuration says what draws is sealed with it, and there is no folder.")
            return backdrops.load(p.folder, p.config.renderer)
        from patches.families.search.draw import Diffusion

        base = self._named(p.config.renderer.rpartition("@")[0], p.config.renderer, "diffusion")
        patch = None
        if RENDERER in p.config.patched:
            if p.folder is None:
                raise BadArtifact("The configuration says its renderer is patched, and no patch was sealed with it.")
            _, patch = artifact.load(p.folder / RENDERER, base=base.digest, device=base.device)
        return Diffusion(base, patch, p.config.drawn)

    def _named(self, ref: str, label: str, kind: str) -> Base:
        """A base that a configuration names beside the roles. Raises WrongBase if it is no longer the one."""
        device = str(self.subject.bases.get(SCORER, self.subject.base).device)
        found, digest = load_base(ref, kind, device), label.rpartition("@")[2]
        if found.digest != digest:
            raise WrongBase(f"{ref} is {found.digest[:16]}, not {digest[:16]} as when this was sealed.")
        return found

    def generator(self, p: Parts) -> Generator:
        """The generator of a configuration; those of one bank, or of one model, share it."""
        c = p.config
        patch = self._patch(GENERATOR, p)
        key = (c.generator, p.bank.digest if c.generator in ("mutation", "random") else "", patch or "")
        if key not in self.generators:
            if c.generator == "mutation":
                made: Generator = Mutation(p.bank)
            elif c.generator == "random":
                made = Random(p.bank)
            elif c.generator == "endpoint":
                from patches.families.search.endpoint import Endpoint, Where

                made = Endpoint(Where.from_environment())
            else:
                from patches.families.search.llm import LanguageModel

                if GENERATOR not in self.subject.bases:
                    raise NotReady("The generator is a language model, and no base has the role generator.")
                made = LanguageModel(self.subject.bases[GENERATOR], self._applied(GENERATOR), patch)
            self.generators[key] = made
        return self.generators[key]

    def _applied(self, role: str) -> Applied:
        """The patches on the base of a role."""
        base = self.subject.bases.get(role, self.subject.base)
        if base is self.subject.base:
            return self.subject.applied
        if role not in self._patched:
            self._patched[role] = apply(base.model, {}, root=base.root)
        return self._patched[role]

    def _patch(self, role: str, p: Parts) -> str | None:
        """The arm, on the base of a role, of the patch that is sealed in <role>/ of the artifact."""
        if role not in p.config.patched:
            return None
        base = self.subject.bases.get(role, self.subject.base)
        if p.folder is None:
            raise BadArtifact(f"The configuration says its {role} is patched, and no patch was sealed with it.")
        about, patch = artifact.load(p.folder / role, base=base.digest, device=base.device)
        applied = self._applied(role)
        if about.digest not in applied.arms:
            applied.add(about.digest, patch)
        return about.digest

    def _blind(self, role: str, arm: str) -> bool:
        """Whether a patch touches nothing but the image tower."""
        return all(site.startswith("visual") for site, _ in self._applied(role).arms[arm])

    # ---- proof -----------------------------------------------------------------------------------------------------

    def inputs(self, arm: str | None) -> dict[str, Any]:
        """A small input that the arm's task takes."""
        base, task = self.subject.bases.get(SCORER, self.subject.base), self.parts(arm).config.task
        if task == "audio" or base.family == "search":
            return {"sound": (torch.linspace(0, 400, 4000).sin(), 8000)}
        h, w = base.processor.size
        y, x = torch.linspace(-2, 2, h)[:, None], torch.linspace(-2, 2, w)
        pixels = torch.stack([y + 0 * x, (9 * x).sin() + 0 * y, (5 * x * y).cos()])[None]
        if task == "prompt":
            return {"goal": "a picture"}
        if task == "style":
            size = base.processor.size
            flat = torch.zeros(3, *size, dtype=torch.uint8)
            return {"content": flat, "style": flat + 255, "key": "probe"}
        if task == "arithmetic" and self.parts(arm).config.sound:
            return {"both": ({"pixels": pixels}, {"sound": (torch.linspace(0, 400, 4000).sin(), 8000)})}
        return {"pixels": pixels}

    def probe(self, arm: str | None) -> Searching:
        """A few lines of the bank; of generators in this process also a round of two candidates."""
        config = self.parts(arm).config
        steps = min(config.steps, 0 if config.generator == "endpoint" else 1)
        lines = DRAWN_LINES if config.task in ("prompt", "style") else PROBE_LINES
        budget = Budget(steps=steps, lines=min(config.lines or lines, lines), ask=min(2, config.ask))
        return Searching(arm=arm, inputs=self.inputs(arm), budget=budget)

    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        """Scores of the first lines of the arm's bank for a fixed input."""
        del strength
        p = self.parts(arm)
        scorer = self.scorer(p)
        texts = p.bank.lines[: DRAWN_LINES if p.config.task in ("prompt", "style") else PROBE_LINES]
        with torch.inference_mode():
            target: Target = scorer.target(self.inputs(arm))
            scores = scorer(target, texts)
        return torch.tensor(scores, dtype=torch.float64)


@dataclass(frozen=True)
class Answer:
    """What came of one item, for those who ask from outside."""

    text: str
    score: float
    curve: tuple[float, ...]
    told: Mapping[str, Any] = field(default_factory=dict)


def answer(job: Searching) -> Answer:
    """The answer of a finished job. Raises its error if it failed."""
    if job.error is not None:
        raise job.error
    assert job.item is not None
    assert job.item.track is not None
    assert job.best is not None
    return Answer(*job.best, tuple(job.item.track.curve()), dict(job.told))
