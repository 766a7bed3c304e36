"""Batches of clips, each with its own arm and its own wishes, on one copy of a video model.

Features, class scores and surprise of all clips of a step share forwards; tracking has its own, and rollouts advance
by one frame a step, so a long one never holds up a short question.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from patches.engine.isolate import fail, isolate, not_finite
from patches.engine.patch import Applied, Patch
from patches.families.base import Base
from patches.families.video.model import MaskedVideo, VideoModel
from patches.families.video.tokens import TokenVideo
from patches.families.video.track import PARTS, SHARP, finer, propagate, to_frames
from patches.families.worker import Job, Worker, WorkerSettings
from registry.errors import Invalid

if TYPE_CHECKING:
    from patches.subject import Subject

Want = Literal["features", "tokens", "scores", "surprise", "reconstruction", "rollout", "track"]
WANTS: tuple[Want, ...] = ("features", "tokens", "scores", "surprise", "reconstruction", "rollout", "track")


def offers(model: VideoModel) -> tuple[Want, ...]:
    """Return what a kind of model answers: no scores without a head, no rollout of a masked model, ..."""
    coded, masked = isinstance(model, TokenVideo), isinstance(model, MaskedVideo) and model.decodes
    can = {
        "scores": model.head is not None,
        "surprise": coded or masked,
        "reconstruction": masked,
        "rollout": isinstance(model, TokenVideo) and model.codebook.paints,
    }
    return tuple(want for want in WANTS if can.get(want, True))


@dataclass(eq=False)
class Clip(Job):
    """One clip and what is asked of it; `VideoWorker` fills the answers."""

    video: Tensor
    """(T, 3, R, R) uint8, the model's own T and R"""
    wants: Sequence[Want] = ("features",)
    layer: int | None = None
    """whose features: 0 is the embedding; None the last. Of track, too, where None is the middle"""
    ratio: float = 0.75
    """reconstruction: share of the patches that is hidden"""
    mask: Literal["tube", "random"] = "tube"
    seed: int = 0
    given: int = 0
    """rollout: frames that are kept; 0: half"""
    temperature: float = 0.0
    top_k: int = 0
    expected: bool = False
    """rollout: paint the mean of what may come in place of the code that was drawn"""
    objects: Tensor | None = None
    """track: (R, R) int64 labels of the first frame"""
    out: Tensor | None = None
    """features: (d,) the mean over tokens"""
    tokens: Tensor | None = None
    """(N, d)"""
    scores: Tensor | None = None
    """(C,) probabilities"""
    surprise: Tensor | None = None
    """(T,)"""
    made: Tensor | None = None
    """reconstruction or rollout: (T, 3, R, R) in [0, 1]"""
    hidden: Tensor | None = None
    """reconstruction: (T, R, R) bool"""
    off: float | None = None
    """reconstruction: mean squared error of what was hidden; rollout: mean nats a token"""
    tracked: Tensor | None = None
    """(T, R, R) int64"""
    rolling: Iterator[tuple[Tensor, Tensor]] | None = field(default=None, repr=False)


class VideoWorker(Worker[Clip]):
    """Clips of any arms in one forward."""

    def __init__(self, base: Base, applied: Applied, slots: int = 32, engines: Any = None) -> None:
        """engines: (arm, its patch) -> what gives features and scores of that arm at full strength instead of torch."""
        self.base, self.applied, self.slots, self.make_engine = base, applied, slots, engines
        self.model: VideoModel = base.model
        self.engines: dict[str | None, Any] = {}
        self.waiting: deque[Clip] = deque()
        self.running: list[Clip] = []
        self.prepare(None)

    def prepare(self, arm: str | None, patch: Patch | None = None) -> None:
        if self.make_engine is not None:
            self.engines = {**{k: v for k, v in self.engines.items() if k is None or k in self.applied.arms},
                            arm: self.make_engine(arm, patch)}  # fmt: skip

    def check(self, jobs: Iterable[Clip]) -> None:
        """Raises Invalid for a clip of another shape, and for what this kind of model cannot answer."""
        m = self.model
        for job in jobs:
            want = (m.frames, 3, m.size, m.size)
            if tuple(job.video.shape) != want or job.video.dtype != torch.uint8:
                raise Invalid(f"A clip must be bytes of shape {want}, not {job.video.dtype} {tuple(job.video.shape)}.")
            if odd := [w for w in job.wants if w not in WANTS]:
                raise Invalid(f"wants={odd[0]!r:.30}: there are {', '.join(WANTS)}.")
            if job.layer is not None and not 0 <= job.layer <= m.depth:
                raise Invalid(f"layer={job.layer}: this model has 0 (the embedding) to {m.depth}.")
            self._check_kind(job)

    def _check_kind(self, job: Clip) -> None:
        m = self.model
        if "scores" in job.wants and m.head is None:
            raise Invalid(f"{self.base.name} has no classifier and no probe; ask for its features.")
        if "rollout" in job.wants:
            if not isinstance(m, TokenVideo):
                raise Invalid(f"{self.base.name} is a masked model and predicts no future; ask for a reconstruction.")
            if not m.codebook.paints:
                raise Invalid(f"{self.base.name}'s tokenizer has no decoder: no rollout. Ask for surprise.")
            if job.given and not 1 <= job.given < m.frames:
                raise Invalid(f"given={job.given}: from 1 to {m.frames - 1} of this model's {m.frames} frames.")
        if "reconstruction" in job.wants or "surprise" in job.wants:
            if not isinstance(m, TokenVideo) and not (isinstance(m, MaskedVideo) and m.decodes):
                raise Invalid(f"{self.base.name} is a classifier without a decoder; ask for scores or features.")
            if "reconstruction" in job.wants and not isinstance(m, MaskedVideo):
                raise Invalid(f"{self.base.name} predicts what comes next; ask for a rollout instead.")
            if not 0.05 <= job.ratio <= 0.95:
                raise Invalid(f"ratio={job.ratio}: a share from 0.05 to 0.95.")
        if "track" in job.wants:
            got = job.objects
            if got is None or tuple(got.shape) != (m.size, m.size) or not 1 <= int(got.max()) < 32:
                raise Invalid(f"objects must be a mask ({m.size}, {m.size}) with labels 1 to 31 and 0 for the ground.")

    def cancel(self, job: Clip) -> None:
        if not job.finished:
            job.finished, job.rolling = "cancelled", None
            for queue in (self.waiting, self.running):
                if job in queue:
                    queue.remove(job)

    def reset(self) -> None:
        self.waiting.clear()
        self.running = []

    @torch.inference_mode()
    def step(self) -> list[Clip]:
        """Answer everything but rollouts of up to `slots` new clips, and one frame of each running rollout. A clip that
        makes it raise, or whose numbers are not finite, fails alone."""
        room = max(0, self.slots - len(self.running))
        new = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        self.running += new
        by_engine: dict[Any, list[Clip]] = {}
        for job in new:
            if set(job.wants) - {"reconstruction", "rollout", "track"}:
                by_engine.setdefault(self._engine(job), []).append(job)
        for engine, jobs in by_engine.items():
            isolate(jobs, partial(self._forward, engine), _size)
        for job in [j for j in self.running if not j.finished]:
            if job in new and "reconstruction" in job.wants:
                isolate([job], self._reconstruct, _size)
            if job in new and "track" in job.wants and not job.finished:
                isolate([job], self._track, _size)
            if "rollout" in job.wants and not job.finished:
                isolate([job], self._roll, _size)
            if not job.finished and job.rolling is None:
                job.finished = "stop"
        done, self.running = self.running, [job for job in self.running if not job.finished]
        return done

    def _engine(self, job: Clip) -> Any:
        """What runs this job instead of torch: only plain questions about the last layer, at full strength."""
        plain = (job.arm is None or job.strength == 1.0) and job.layer is None
        plain = plain and "surprise" not in job.wants
        return self.engines.get(job.arm) if plain else None

    def _forward(self, engine: Any, jobs: Sequence[Clip]) -> None:
        """Features, scores and surprise."""
        clips = torch.stack([job.video for job in jobs]).to(self.base.device)
        surprise: Sequence[Tensor | None] = [None] * len(jobs)
        if engine is not None:
            last, scores = engine(clips)
            states: Sequence[Tensor] = [last] * (self.model.depth + 1)
        else:
            with self.applied.rows([j.arm for j in jobs], [j.strength for j in jobs], [j.params for j in jobs]):
                out = self.model(clips=clips)
                if any("surprise" in job.wants for job in jobs):
                    surprise = list(self.model.surprise(clips).float().cpu())
            states, scores = out["states"], out["scores"]
        sound = states[-1].flatten(1).isfinite().all(1).tolist()
        for i, job in enumerate(jobs):
            if not sound[i]:
                fail(job, not_finite(job.arm, "features"))
                continue
            job.surprise = surprise[i] if "surprise" in job.wants else None
            self._fill(job, [x[i] for x in states], scores[i] if scores is not None else None)

    def _fill(self, job: Clip, states: Sequence[Tensor], scores: Tensor | None) -> None:
        depth = self.model.depth
        chosen = states[depth if job.layer is None else job.layer].float().cpu()
        if "features" in job.wants:
            job.out = chosen.mean(0)
        if "tokens" in job.wants:
            job.tokens = chosen
        if "scores" in job.wants and scores is not None:
            job.scores = scores.float().softmax(-1).cpu()

    def _reconstruct(self, jobs: Sequence[Clip]) -> None:
        (job,) = jobs
        assert isinstance(self.model, MaskedVideo)
        with self.applied.rows([job.arm], [job.strength], [job.params]):
            made, hidden, off = self.model.reconstruct(
                job.video[None].to(self.base.device), job.ratio, job.mask, job.seed
            )
        if not bool(off.isfinite().all()):
            fail(job, not_finite(job.arm, "reconstruction"))
            return
        job.made, job.hidden, job.off = made[0].float().cpu(), hidden[0].cpu(), float(off[0])

    def _track(self, jobs: Sequence[Clip]) -> None:
        (job,) = jobs
        assert job.objects is not None
        layer = self.model.depth // 2 if job.layer is None else job.layer
        rows = len(job.video) if isinstance(self.model, TokenVideo) else 1
        with self.applied.rows([job.arm] * rows, [job.strength] * rows, [job.params] * rows):
            (x,) = finer(self.model, job.video, [layer])
        if not bool(x.isfinite().all()):
            fail(job, not_finite(job.arm, "features"))
            return
        found = propagate(x, job.objects, self.model.grid[1] * PARTS, temperature=SHARP)
        job.tracked = to_frames(found, self.model.frames)

    def _roll(self, jobs: Sequence[Clip]) -> None:
        """One more frame; `rolling` is None after the last."""
        (job,) = jobs
        assert isinstance(self.model, TokenVideo)
        given = job.given or self.model.frames // 2
        if job.rolling is None:
            clips = job.video[None].to(self.base.device)
            job.rolling = self.model.roll(clips, given, job.temperature, job.top_k, job.seed, expected=job.expected)
            job.made, job.off = job.video[:given].float() / 255, 0.0
        assert job.made is not None
        assert job.off is not None
        with self.applied.rows([job.arm], [job.strength], [job.params]):
            frame, nats = next(job.rolling)
        drawn = len(job.made) - given
        job.made = torch.cat([job.made, frame.float().cpu()])
        job.off = (job.off * drawn + float(nats.mean())) / (drawn + 1)
        if len(job.made) >= self.model.frames:
            job.rolling = None

    def probe(self, arm: str | None) -> Clip:
        return Clip(_pattern(self.model), arm=arm)

    @torch.inference_mode()
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        """Last features (1, N, d) of a fixed clip under an arm."""
        clips = _pattern(self.model)[None].to(self.base.device)
        with self.applied.rows([arm], [strength]):
            out: Tensor = self.model(clips=clips)["states"][-1]
        return out


def made(subject: Subject, settings: WorkerSettings) -> VideoWorker:
    """The worker of a video model; with a provider, VideoMAE's features and scores run in ONNX Runtime."""

    def engine(arm: str | None, patch: Patch | None) -> Any:
        from patches.families.video.onnx import prepared

        return prepared(subject.base, settings.provider, patch, digest=arm or "")

    return VideoWorker(subject.base, subject.applied, settings.slots, engine if settings.provider else None)


def _size(job: Clip) -> float:
    return float(job.video.numel())


def _pattern(model: VideoModel) -> Tensor:
    """(T, 3, R, R) uint8: a stripe and a gradient that move."""
    t = torch.arange(model.frames)[:, None, None] / model.frames
    line = torch.linspace(0, 1, model.size)
    y, x = line[:, None], line[None]
    frames = torch.stack([(9 * (x + t)).sin() + 0 * y, y + t + 0 * x, (5 * x * y + 3 * t).cos()], 1)
    return frames.mul(63).add(127).clamp(0, 255).to(torch.uint8)
