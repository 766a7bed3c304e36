"""Runs the progression: the same VideoMAE pre-trained on every stage, then probed and fine-tuned the same way.

    python -m training.videomae.progression FOLDER [steps=2000 seeds=3 ...] [ROW ...] [pretrain]

A row is `scratch`, `natural` or a stage, and may say in which form it is pre-trained where that is not the sweep's:
`moving_circles@keep` (what is taken away from clips) or `natural@tube` (the mask). One row of one seed is two jobs:
pre-training (its weights are FOLDER/ROW.SEED.safetensors; the word `pretrain` stops there), and measuring: fine-tuning
on few and on more labels, linear and attentive probe of the last layer, corruptions, appended to FOLDER/rows.jsonl
together. A sweep that is stopped or killed goes on when it is started again, and several processes may share a folder:
a job is held by a lock, which dies with its process. Seed s decides the pre-training, the labelled clips (disjoint
between seeds) and the order of fine-tuning: stages are compared within a seed. Which clips of test were right is kept
as bits, for intervals over seeds and clips.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patches.families.video.pixels import STILLS
from registry import config as configs
from registry.config import STRICT
from registry.errors import ConfigError
from training.lab.video import actions, stages
from training.lab.video.corruptions import CORRUPTIONS, corrupt
from training.tasks import motion
from training.videomae import tuning
from training.videomae.pretraining import Plan, Size, new, pretrain

ROWS = "rows.jsonl"
MASKS = ("random", "tube")
SCRATCH, NATURAL = "scratch", "natural"
EVERY = (SCRATCH, NATURAL, *stages.STAGES)
FIRST = (SCRATCH, NATURAL, "image_crops", "moving_circles", "transforming", "static_circles@keep",
         "moving_circles@keep", "moving_shapes", "textures", "accelerating", "natural@tube")  # fmt: skip
"""what is run first within a seed, should the time end early.

Static circles are empty with the mean frame away, so they are pre-trained as they are, beside moving ones as they are:
between the two only motion differs. One row has the paper's mask, in tubes.
"""


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
    fewest: int = 55
    """labels that are fine-tuned on alone: fewer leave more to pre-training"""
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

    def plan(self, form: str = "", seed: int = 0) -> Plan:
        """How a row pre-trains. form: another mask than the sweep's, or something else that is taken away; or ""."""
        if form not in ("", *MASKS, *STILLS):
            raise ConfigError(f"There is no form {form!r:.40}. Forms: {', '.join((*MASKS, *STILLS))}.")
        mask, still = form if form in MASKS else self.mask, form if form in STILLS else self.still
        return Plan(steps=self.steps, batch=self.batch, ratio=self.ratio, mask=mask, still=still, seed=seed)  # type: ignore[arg-type]


def pool(row: str, sweep: Sweep, seed: int = 0) -> Tensor:
    """The unlabelled clips of a row: drawn alike for every seed of pre-training, which shuffles and varies them."""
    size, row = sweep.size, row.partition("@")[0]
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


def run(folder: Path, sweep: Sweep, rows: tuple[str, ...] = FIRST, measured: bool = True) -> None:
    """Run what is not done yet, seed by seed. measured: False stops after the pre-training."""
    folder.mkdir(parents=True, exist_ok=True)
    if measured:
        _job(folder, "controls", partial(_controls, sweep))
    for seed in range(sweep.seeds):
        for row in rows:
            weights = folder / f"{row}.{seed}.safetensors"
            if row != SCRATCH:
                _job(folder, f"{row}.{seed}.pretrain", partial(_pretrained, weights, sweep, row, seed))
            if measured and (row == SCRATCH or weights.exists()):
                _job(folder, f"{row}.{seed}", partial(_measured, weights, sweep, row, seed))


def _pretrained(weights: Path, sweep: Sweep, row: str, seed: int) -> list[dict[str, Any]]:
    plan = sweep.plan(row.partition("@")[2], seed)
    net, log = pretrain(pool(row, sweep, seed), sweep.size, plan, weights.with_suffix(""))
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, weights)
    return [{"row": row, "seed": seed, "protocol": "pretrain", **log}]


def _measured(weights: Path, sweep: Sweep, row: str, seed: int) -> list[dict[str, Any]]:
    net = None
    if row != SCRATCH:
        net = new(sweep.size, seed)
        net.load_state_dict(load_file(weights))
    return [{"row": row, "seed": seed, **line} for line in measure(net, sweep, seed)]


def measure(net: Any, sweep: Sweep, seed: int) -> Iterator[dict[str, Any]]:
    """Fine-tune and probe one encoder (None: from scratch, its probe untrained)."""
    seen, held, still = labelled(sweep, seed), test(sweep), sweep.plan().still

    def line(right: Tensor, begun: float, **about: Any) -> dict[str, Any]:
        cpu = round(time.process_time() - begun, 1)
        return {
            **about,
            "accuracy": round(float(right.float().mean()), 4),
            "n": len(right),
            "cpu_s": cpu,
            "right": pack(right),
        }

    tuned = ((sweep.fewest, sweep.few_steps), (sweep.few, sweep.few_steps), (sweep.more, sweep.more_steps))
    for labels, steps in tuned:
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
    x, y = (tuning.last(frozen, v, still) for v in (seen.video, held.video))
    for pooling in ("attention", "mean"):
        for labels in (sweep.few, sweep.more):
            begun = time.process_time()
            read = motion.probe(x[:labels], seen.label[:labels], pooling, sweep.probe_steps, seed)  # type: ignore[arg-type]
            right = motion.answers(read, y) == held.label
            yield line(right, begun, protocol=f"probe {pooling}", labels=labels)


def _controls(sweep: Sweep) -> list[dict[str, Any]]:
    """Both controls, once. Nothing is refused: the table stands beside them."""
    held, out = test(sweep), []
    every = motion.clips("train", 2200, 20, sweep.size.frames, sweep.size.image)
    for see in (motion.differences, motion.middle):
        for labels in sweep.controls:
            right, cpu = motion.control(see, every[:labels], held)
            out.append({"row": f"control {see.__name__}", "seed": 0, "protocol": "control", "labels": labels,
                        "accuracy": round(float(right.float().mean()), 4), "n": len(right), "cpu_s": round(cpu, 1),
                        "right": pack(right)})  # fmt: skip
    return out


def _job(folder: Path, name: str, work: Callable[[], list[dict[str, Any]]]) -> None:
    """Do a job, unless it is done or another process is at it; a killed process' lock is gone with it."""
    done = folder / f"{name}.done"
    with (folder / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not done.exists():
            _say(folder, work())
            done.touch()


def _say(folder: Path, lines: list[dict[str, Any]]) -> None:
    with (folder / ROWS).open("a") as f:
        f.writelines(json.dumps({"at": time.strftime("%H:%M:%S"), **line}) + "\n" for line in lines)
    for line in lines:
        shown = {k: v for k, v in line.items() if k not in ("right", "loss")}
        print(json.dumps(shown), flush=True)  # noqa: T201 - progress of a command line


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _words = [w for w in sys.argv[2:] if "=" in w]
    _rows = tuple(w for w in sys.argv[2:] if "=" not in w and w != "pretrain") or FIRST
    _sweep = configs.override(Sweep(), _words)
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    (Path(sys.argv[1]) / "sweep.json").write_text(json.dumps(asdict(_sweep)))
    run(Path(sys.argv[1]), _sweep, _rows, "pretrain" not in sys.argv)
