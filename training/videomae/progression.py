"""Runs the progression: the same VideoMAE pre-trained on every stage, then probed and fine-tuned the same way.

    python -m training.videomae.progression FOLDER [steps=2000 seeds=3 ...]

One job is one (stage, seed): pre-train, fine-tune on few and on more labels, linear and attentive probe of the last
layer, corruptions. A job's numbers are appended to FOLDER/rows.jsonl when it is done, so a sweep that is stopped has
whole rows; started again it goes on, and several processes may share a folder. Seed s decides the pre-training, the
labelled clips (disjoint between seeds) and the order of fine-tuning: stages are compared within a seed. Which clips of
test were right is kept as bits, for intervals over seeds and clips.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from registry import config as configs
from registry.config import STRICT
from training.lab.video import actions, stages
from training.lab.video.corruptions import CORRUPTIONS, corrupt
from training.tasks import motion
from training.videomae import tuning
from training.videomae.pretraining import Plan, Size, new, pretrain

ROWS = "rows.jsonl"
SCRATCH, NATURAL = "scratch", "natural"
EVERY = (SCRATCH, NATURAL, *stages.STAGES)
FIRST = (SCRATCH, NATURAL, "image_crops", "moving_circles", "transforming", "static_circles", "moving_shapes",
         "accelerating", "textures")  # fmt: skip
"""what is run first within a seed, should the time end early"""


@dataclass(frozen=True)
class Sweep:
    """What one sweep holds equal."""

    __pydantic_config__ = STRICT

    steps: int = 1600
    batch: int = 32
    mask: str = "random"
    still: str = "mean"
    ratio: float = 0.75
    pool: int = 4096
    """clips drawn for a stage; each batch is one of 96 views of some of them"""
    seeds: int = 3
    few: int = 110
    more: int = 550
    few_steps: int = 200
    more_steps: int = 300
    peak: float = 2e-3
    decay: float = 1.0
    """fine-tuning's learning rate of a block, as a part of the one above"""
    probe_steps: int = 200
    test: int = 1100
    controls: tuple[int, ...] = (550, 2200)
    """labels that the control CNNs are fitted on"""
    corrupted: int = 330
    """test clips of the corruption table; 0 leaves it out"""
    size: Size = field(default_factory=Size)

    @property
    def plan(self) -> Plan:
        return Plan(steps=self.steps, batch=self.batch, ratio=self.ratio, mask=self.mask, still=self.still)  # type: ignore[arg-type]


def pool(row: str, sweep: Sweep, seed: int = 0) -> Tensor:
    """The unlabelled clips of a row: drawn alike for every seed of pre-training, which shuffles and varies them."""
    size = sweep.size
    if row == NATURAL:  # the downstream task's own training clips, without their labels, as in the paper
        return actions.draw("train", sweep.pool, 30 + seed, size.frames, size.image).video
    return stages.draw(row, sweep.pool, seed, size.frames, size.image)


def labelled(sweep: Sweep, seed: int) -> actions.Clips:
    """The labelled clips of a seed; those of two seeds share none."""
    every = motion.clips("train", sweep.more * max(3, sweep.seeds), 20, sweep.size.frames, sweep.size.image)
    return every[sweep.more * seed : sweep.more * (seed + 1)]


def test(sweep: Sweep) -> actions.Clips:
    return motion.clips("test", sweep.test, 10, sweep.size.frames, sweep.size.image)


@lru_cache(32)
def corrupted(sweep: Sweep, kind: str) -> Tensor:
    return corrupt(test(sweep).video[: sweep.corrupted], kind)


def pack(right: Tensor) -> str:
    """(n,) bool as base64 of its bits."""
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()


def unpack(text: str, n: int) -> Tensor:
    """The inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:n].astype(bool))


def run(folder: Path, sweep: Sweep, rows: tuple[str, ...] = FIRST) -> None:
    """Run what is not done yet, seed by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    _check_gates(folder, sweep)
    for seed in range(sweep.seeds):
        for row in rows:
            with _claimed(folder, f"{row}.{seed}") as mine:
                if mine:
                    _say(folder, one(folder, sweep, row, seed))


def one(folder: Path, sweep: Sweep, row: str, seed: int) -> list[dict[str, Any]]:
    """One job: its rows."""
    out: list[dict[str, Any]] = []
    net = None
    weights = folder / f"{row}.{seed}.safetensors"
    if row != SCRATCH:
        if weights.exists():
            net = new(sweep.size, seed)
            net.load_state_dict(load_file(weights))
        else:
            plan = replace(sweep.plan, seed=seed)
            net, log = pretrain(pool(row, sweep, seed), sweep.size, plan, folder / f"{row}.{seed}")
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, weights)
            out.append({"row": row, "seed": seed, "protocol": "pretrain", **log})
    out += [{"row": row, "seed": seed, **line} for line in measure(net, sweep, seed)]
    return out


def measure(net: Any, sweep: Sweep, seed: int) -> Iterator[dict[str, Any]]:
    """Fine-tune and probe one encoder (None: from scratch, its probe untrained)."""
    seen, held, still = labelled(sweep, seed), test(sweep), sweep.plan.still

    def line(right: Tensor, begun: float, **about: Any) -> dict[str, Any]:
        cpu = round(time.process_time() - begun, 1)
        return {
            **about,
            "accuracy": round(float(right.float().mean()), 4),
            "n": len(right),
            "cpu_s": cpu,
            "right": pack(right),
        }

    for labels, steps in ((sweep.few, sweep.few_steps), (sweep.more, sweep.more_steps)):
        begun = time.process_time()
        encoder = net.videomae if net is not None else None
        made = tuning.finetune(encoder, sweep.size, seen[:labels], still, steps, 16, sweep.peak, sweep.decay, seed)
        right = motion.answers(made.model, held.video) == held.label
        yield line(right, begun, protocol="finetune", labels=labels, train=round(made.train, 3))
        if labels == sweep.more and sweep.corrupted:
            for kind in CORRUPTIONS:
                begun = time.process_time()
                right = motion.answers(made.model, corrupted(sweep, kind)) == held.label[: sweep.corrupted]
                yield line(right, begun, protocol=f"corrupted {kind}", labels=labels)
    frozen = net if net is not None else new(sweep.size, seed)
    x, y = (tuning.features(frozen, v, still)[-1] for v in (seen.video, held.video))
    for pooling in ("attention", "mean"):
        for labels in (sweep.few, sweep.more):
            begun = time.process_time()
            read = motion.probe(x[:labels], seen.label[:labels], pooling, sweep.probe_steps, seed)  # type: ignore[arg-type]
            right = motion.answers(read, y) == held.label
            yield line(right, begun, protocol=f"probe {pooling}", labels=labels)


def _check_gates(folder: Path, sweep: Sweep) -> None:
    """Measure the controls once. Nothing is refused: the table stands beside them."""
    with _claimed(folder, "controls") as mine:
        if not mine:
            return
        held, out = test(sweep), []
        every = motion.clips("train", 2200, 20, sweep.size.frames, sweep.size.image)
        for see in (motion.differences, motion.middle):
            for labels in sweep.controls:
                right, cpu = motion.control(see, every[:labels], held)
                out.append({"row": f"control {see.__name__}", "seed": 0, "protocol": "control", "labels": labels,
                            "accuracy": round(float(right.float().mean()), 4), "n": len(right), "cpu_s": round(cpu, 1),
                            "right": pack(right)})  # fmt: skip
        _say(folder, out)


@contextmanager
def _claimed(folder: Path, name: str) -> Iterator[bool]:
    """Whether this process is the one that does a job; a job that fails is given back."""
    mark = folder / f"{name}.taken"
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    except BaseException:
        mark.unlink(missing_ok=True)
        raise


def _say(folder: Path, lines: list[dict[str, Any]]) -> None:
    with (folder / ROWS).open("a") as f:
        f.writelines(json.dumps({"at": time.strftime("%H:%M:%S"), **line}) + "\n" for line in lines)
    for line in lines:
        shown = {k: v for k, v in line.items() if k not in ("right", "loss")}
        print(json.dumps(shown), flush=True)  # noqa: T201 - progress of a command line


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _words = [w for w in sys.argv[2:] if "=" in w]
    _rows = tuple(w for w in sys.argv[2:] if "=" not in w) or FIRST
    _sweep = configs.override(Sweep(), _words)
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    (Path(sys.argv[1]) / "sweep.json").write_text(json.dumps(asdict(_sweep)))
    run(Path(sys.argv[1]), _sweep, _rows)
