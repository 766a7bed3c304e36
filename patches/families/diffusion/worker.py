"""Denoising rows of one running batch: each row with its own condition, seed, guidance, solver, steps and row
parameters.

A row is a program (see `solvers`) that asks for denoiser outputs. One step of the worker gathers what every running
row asks, runs it in one forward, and hands the outputs back; so rows join and leave between steps, and rows of
different arms, levels and solvers share a batch. Guidance asks for two outputs a latent, the row's own and the other
half's: out = other + guidance * (own - other), and the row's parameters are given to both halves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patches.engine.isolate import fail, isolate, not_finite
from patches.engine.patch import Applied
from patches.families.base import Base
from patches.families.diffusion import inversion, solvers
from patches.families.diffusion.base import Condition, Pipe
from patches.families.diffusion.schedule import MAX_STEPS, SOLVERS, Schedule, noise
from patches.families.diffusion.solvers import Program, Query
from patches.families.worker import Job, Worker, WorkerSettings
from registry.errors import Failed, Invalid, PatchbayError, TooLarge

MAX_GUIDANCE = 50.0
MAX_STATE = 64 << 20
"""numbers one row may carry (edit-friendly noise of many levels)"""


@dataclass(eq=False, kw_only=True)
class Denoising(Job):
    """One picture being made, or one being inverted; `Denoiser` fills `out` and `picture`."""

    condition: Condition
    """name -> tensor without a batch dimension, of every name in `Pipe.conditions`"""
    other: Condition | None = None
    """the condition of guidance's other half; None: the base's null condition"""
    other_patched: bool = False
    """whether the other half goes through the arm too, as in most papers; False: what the arm starts from answers it,
    which is the base unless the arm was tuned"""
    guidance: float = 1.0
    """1: the row's own condition alone, half the cost"""
    steps: int = 10
    solver: str = "ddim"
    """"" is the pipeline's own scheduler"""
    seed: int = 0
    """Seed of the noise the row starts from, if there is no `start`"""
    size: tuple[int, int] | None = None
    """(H, W) of the picture; None: the base's own"""
    start: Tensor | None = None
    """latents (c, h, w) to start from, or what an inversion returned"""
    strength_of_edit: float = 1.0
    """how much of a started picture is noised away, as image-to-image pipelines count it: 1 is everything"""
    program: Callable[[Schedule, Denoising, tuple[int, int, int]], Program] | None = None
    """what is run instead of `sampled`: an `Invert`, a `Regenerate`, an `Edit`"""
    decode: bool = True
    """whether the result is turned into a picture"""
    out: Tensor | None = None
    """latents, on the CPU"""
    picture: Tensor | None = None
    """(3, H, W) in 0..1, on the CPU"""
    evaluations: int = 0
    """denoiser outputs so far, both halves counted"""
    stage: int = 0
    """queries answered so far, of about `stages`"""
    stages: int = 0
    query: Query | None = field(default=None, repr=False)
    run: Program | None = field(default=None, repr=False)


class Denoiser(Worker[Denoising]):
    """Rows of any arms in one forward."""

    def __init__(self, subject: Any, settings: WorkerSettings | None = None) -> None:
        """subject: what has `base` and `applied`; a Subject."""
        self.base: Base = subject.base
        self.applied: Applied = subject.applied
        self.pipe: Pipe = self.base.model
        self.settings = settings or WorkerSettings()
        self.null: Condition = {k: v.cpu() for k, v in self.pipe.null().items()}
        self.reset()

    def reset(self) -> None:
        """Forget what is queued and running."""
        self.waiting: deque[Denoising] = deque()
        self.running: list[Denoising] = []

    # ---- queueing ------------------------------------------------------------------------------------------------

    def check(self, jobs: Iterable[Denoising]) -> None:
        """Raises Invalid or TooLarge, in words, if a row cannot be run."""
        for row in jobs:
            self._check(row)

    def _check(self, row: Denoising) -> None:
        top = min(MAX_STEPS, len(self.pipe.schedule.alphas))
        if not 1 <= row.steps <= top:
            raise Invalid(f"{row.steps} steps: this model takes 1 to {top}.")
        if row.solver not in ("", *SOLVERS):
            raise Invalid(f"There is no solver {row.solver[:40]!r}. Solvers: {', '.join(SOLVERS)}.")
        if not abs(row.guidance) <= MAX_GUIDANCE:  # also if it is NaN
            raise Invalid(f"Guidance {row.guidance}: it must lie within +-{MAX_GUIDANCE:g}.")
        if not 0.0 < row.strength_of_edit <= 1.0:
            raise Invalid(f"Strength {row.strength_of_edit}: how much is noised away lies above 0 and up to 1.")
        shape = self._shape(row)
        for given in (row.condition, row.other):
            if given is None:
                continue
            if set(given) != set(self.pipe.conditions):
                raise Invalid(f"This model is told {', '.join(self.pipe.conditions)}, not {', '.join(given)}.")
            for name, x in given.items():
                if tuple(x.shape) != tuple(self.pipe.conditions[name]) or not bool(torch.isfinite(x).all()):
                    raise Invalid(
                        f"The condition {name!r} must be finite numbers of shape {self.pipe.conditions[name]}, "
                        f"not {tuple(x.shape)}."
                    )
        if row.start is not None:
            if row.start.numel() > MAX_STATE:
                raise TooLarge(f"A row starts from {row.start.numel()} numbers; {MAX_STATE} are allowed.")
            if tuple(row.start.shape[-3:]) != shape or not bool(torch.isfinite(row.start).all()):
                raise Invalid(f"A row starts from finite latents of shape {shape}, not {tuple(row.start.shape)}.")
        if any(not bool(torch.isfinite(v).all()) for v in row.params.values() if v.is_floating_point()):
            raise Invalid("A row's parameters hold NaN or infinity; every number must be finite.")

    def _shape(self, row: Denoising) -> tuple[int, int, int]:
        return self.pipe.shape if row.size is None else self.pipe.shape_of(row.size)

    def cancel(self, job: Denoising) -> None:
        """Stop one row now; the others do not notice."""
        if job.finished:
            return
        job.finished = "cancelled"
        if job in self.running:
            self.running.remove(job)
        elif job in self.waiting:
            self.waiting.remove(job)
        job.run = job.query = None

    # ---- running -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Denoising]:
        """One forward for every running row, after waiting ones joined; returns the rows that took part. One that makes
        it raise, or leaves the range of numbers, fails alone."""
        while self.waiting and len(self.running) < self.settings.slots:
            row = self.waiting.popleft()
            self.running.append(row)
            self._begin(row)
        isolate([row for row in self.running if row.query is not None], self._advance, _weight)
        done, self.running = [r for r in self.running if r.finished], [r for r in self.running if not r.finished]
        isolate([r for r in done if r.finished == "stop" and r.decode], self._decode, _weight)
        for row in done:
            row.run = row.query = None
        return [*done, *self.running]

    def _begin(self, row: Denoising) -> None:
        """Start a row's program up to its first query."""
        try:
            row.run = (row.program or sampled)(self.pipe.schedule, row, self._shape(row))
        except PatchbayError as e:
            fail(row, e)
        else:
            self._send(row, None)

    def _advance(self, rows: Sequence[Denoising]) -> None:
        """Answer every row's query and let its program go on."""
        for row, out in zip(rows, self._answer(rows), strict=True):
            assert row.query is not None
            halves = 2 if row.query.guided and row.guidance != 1.0 else 1
            row.evaluations += halves * len(row.query.x)
            row.stage += 1
            self._send(row, out)

    def _send(self, row: Denoising, out: Tensor | None) -> None:
        """Send a row's outputs to its program; it asks again or is finished."""
        assert row.run is not None
        try:
            row.query = row.run.send(out) if out is not None else next(row.run)
        except StopIteration as end:
            row.out, row.query = end.value.float().cpu(), None
            if bool(torch.isfinite(row.out).all()):
                row.finished = "stop"
            else:
                fail(row, not_finite(row.arm, "latents"))
        except Exception as e:  # a program's own fault is its row's
            row.query = None
            fail(row, e if isinstance(e, PatchbayError) else Failed(f"This row failed ({type(e).__name__}: {e})."))

    def _answer(self, rows: Sequence[Denoising]) -> list[Tensor]:
        """(n, c, h, w) for each row's query, guidance done."""
        flat: list[tuple[Tensor, float, Denoising, bool]] = []
        """latent, level, row, whether it is the row's own half"""
        for row in rows:
            assert row.query is not None
            halves = (True, False) if row.query.guided and row.guidance != 1.0 else (True,)
            flat += [(x, t, row, own) for own in halves for x, t in zip(row.query.x, row.query.t, strict=True)]
        outs = self._forward(flat)
        answers, at = [], 0
        for row in rows:
            assert row.query is not None
            n = len(row.query.x)
            out = torch.stack(outs[at : at + n])
            at += n
            if row.query.guided and row.guidance != 1.0:
                other = torch.stack(outs[at : at + n])
                at += n
                out = other + row.guidance * (out - other)
            answers.append(out)
        return answers

    def _forward(self, flat: Sequence[tuple[Tensor, float, Denoising, bool]]) -> list[Tensor]:
        """One output for each, in forwards of at most 2 x slots latents of one shape."""
        outs: dict[int, Tensor] = {}
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, (x, *_) in enumerate(flat):
            by_shape.setdefault(tuple(x.shape), []).append(i)
        most = 2 * self.settings.slots
        for same in by_shape.values():
            for chunk in (same[i : i + most] for i in range(0, len(same), most)):
                part = [flat[i] for i in chunk]
                with self._rows(part):
                    out = self.pipe.rows(
                        torch.stack([x for x, *_ in part]),
                        torch.tensor([t for _, t, *_ in part]),
                        [self._condition(row, own) for _, _, row, own in part],
                    )
                outs |= dict(zip(chunk, out.cpu(), strict=True))
        return [outs[i] for i in range(len(flat))]

    def _condition(self, row: Denoising, own: bool) -> Condition:
        return row.condition if own else self.null if row.other is None else row.other

    def _rows(self, part: Sequence[tuple[Tensor, float, Denoising, bool]]) -> Any:
        """Who gets which arm in one forward."""
        rows = [row for _, _, row, _ in part]
        under = [not self._patched(row, own) for _, _, row, own in part]
        said = [r.params for r in rows]
        return self.applied.rows([r.arm for r in rows], [r.strength for r in rows], said, under)

    @staticmethod
    def _patched(row: Denoising, own: bool) -> bool:
        """Whether the row's own half, or its other one, goes through its arm."""
        assert row.query is not None
        return row.query.patched and (own or row.other_patched)

    def _decode(self, rows: Sequence[Denoising]) -> None:
        """Latents to pictures, those of one shape together."""
        by_shape: dict[tuple[int, ...], list[Denoising]] = {}
        for row in rows:
            assert row.out is not None
            by_shape.setdefault(tuple(row.out.shape), []).append(row)
        for same in by_shape.values():
            x = torch.stack([row.out for row in same if row.out is not None])
            for row, picture in zip(same, self.pipe.pictures(x).float().cpu(), strict=True):
                row.picture = picture.clamp(0, 1)

    # ---- proofs --------------------------------------------------------------------------------------------------

    def probe(self, arm: str | None) -> Denoising:
        """Two guided steps that any model can do."""
        return Denoising(condition=self._told(), arm=arm, guidance=2.0, steps=2, decode=False)

    @torch.inference_mode()
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        """Outputs (2, c, h, w) for fixed latents under an arm: equal for equal behaviour, bit for bit. Raises Failed if
        they are not finite."""
        x, t = noise((2, *self.pipe.shape), 0), torch.tensor([999.0, 1.0]).clamp(max=len(self.pipe.schedule.alphas) - 1)
        with self.applied.rows([arm] * 2, [strength] * 2):
            out = self.pipe.rows(x, t, [self._told()] * 2).cpu()
        if not bool(out.isfinite().all()):
            raise not_finite(arm, "outputs")
        return out

    def _told(self) -> Condition:
        """A condition that is nobody's null: fixed waves."""
        return {
            name: torch.sin(torch.arange(1.0, 1.0 + x.numel())).reshape(x.shape) if x.is_floating_point() else x
            for name, x in self.null.items()
        }


def _weight(row: Denoising) -> float:
    """How much memory a row's forward asks for, in latents."""
    return float(row.query.x.numel()) if row.query is not None else 1.0


# ---- what rows run -----------------------------------------------------------------------------------------------


def sampled(schedule: Schedule, row: Denoising, shape: tuple[int, int, int]) -> Program:
    """Noise to picture; with `start`, the picture noised to a level and denoised from there (SDEdit, arXiv
    2108.01073)."""
    skip = row.steps - max(1, round(row.steps * row.strength_of_edit)) if row.start is not None else 0
    fresh = noise(shape, row.seed)
    row.stages = row.steps - skip
    if row.solver == "ddim":
        levels = schedule.levels(row.steps)[skip:]
        if row.start is not None:
            a, s = schedule.at(levels[0])
            fresh = a * row.start + s * fresh
        return solvers.ddim(schedule, fresh, levels)
    if row.start is not None:
        return solvers.stock(schedule, fresh, row.solver, row.steps, skip, row.seed, row.start)
    return solvers.stock(schedule, fresh, row.solver, row.steps, 0, row.seed)


@dataclass(frozen=True)
class Invert:
    """A row's program: from the latents `row.start` of a picture to the state an inversion ends in (`inversion.up`)."""

    method: str = "fixed_point"
    levels: tuple[int, ...] = ()
    iterations: int = 3

    def __call__(self, schedule: Schedule, row: Denoising, shape: tuple[int, int, int]) -> Program:
        assert row.start is not None
        each = {"fixed_point": self.iterations, "edict": 2}.get(self.method, 1)
        row.stages = 1 if self.method == "edit_friendly" else each * len(self.levels)
        return inversion.up(schedule, self.method, row.start, self.levels, self.iterations, row.seed)


@dataclass(frozen=True)
class Edit:
    """A row's program: a picture's latents `row.start` inverted on what its arm starts from, then regenerated as the
    row asks."""

    method: str = "fixed_point"
    levels: tuple[int, ...] = ()
    iterations: int = 3
    skip: int = 0

    def __call__(self, schedule: Schedule, row: Denoising, shape: tuple[int, int, int]) -> Program:
        assert row.start is not None
        each = {"fixed_point": self.iterations, "edict": 2}.get(self.method, 1)
        up = 1 if self.method == "edit_friendly" else each * len(self.levels)
        row.stages = up + (len(self.levels) - self.skip) * (2 if self.method == "edict" else 1)
        return inversion.edited(schedule, self.method, row.start, self.levels, self.iterations, row.seed, self.skip)


@dataclass(frozen=True)
class Regenerate:
    """A row's program: from an inversion's state down to a picture under the row's condition (`inversion.down`)."""

    method: str = "fixed_point"
    levels: tuple[int, ...] = ()
    skip: int = 0

    def __call__(self, schedule: Schedule, row: Denoising, shape: tuple[int, int, int]) -> Program:
        assert row.start is not None
        row.stages = (len(self.levels) - self.skip) * (2 if self.method == "edict" else 1)
        return inversion.down(schedule, self.method, row.start, self.levels, self.skip)
