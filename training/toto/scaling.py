"""Toto's scaling curve: several sizes on the same clips, the loss each reaches, and the power law through them.

    python -m training.toto.scaling FOLDER [steps=400 seeds=1 ...]

One size of one seed is one line of FOLDER/rows.jsonl, written when it is done: the loss on held-out clips, whole and by
frame; of the first seed also the attentive probe of every layer, rollouts against copying the last frame, tracking
against leaving the mask. A sweep that is stopped goes on where it was. Seeds differ in weights and order; clips and
tokenizer are the same.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from patches.families.video import base as checkpoints
from patches.families.video.tokens import RESERVED, TokenVideo
from registry import config as configs
from registry.config import STRICT
from training.lab.video import actions
from training.tasks import motion
from training.tasks.intervals import mean
from training.tasks.tracking import tracked
from training.toto import learn as fitting
from training.toto.sizes import SIZES

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Sweep:
    """What the sizes share."""

    __pydantic_config__ = STRICT

    sizes: tuple[str, ...] = ("tiny", "w24", "w32", "w48", "lab")
    steps: int = 300
    batch: int = 32
    codes: int = 256
    residual: bool = True
    pool: int = 3072
    held: int = 330
    labels: int = 550
    test: int = 1100
    rollouts: int = 990
    """clips that move"""
    tracked: int = 110
    given: int = 4
    frames: int = actions.FRAMES
    image: int = actions.SIZE
    seeds: int = 3
    untrained: str = "lab"
    """the size that is also probed before training: what its probe owes to it"""
    probed: bool = False
    """probe the layers of every seed, not of the first alone"""


def run(folder: Path, sweep: Sweep) -> None:
    """Run the sizes that are not done yet, seed by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = {(row["size"], row.get("seed", 0)) for row in rows(folder)}
    video = fitting.pool(sweep.pool, sweep.frames, sweep.image)
    codebook = fitting.tokenizer(video[:1024], sweep.codes, residual=sweep.residual, seed=0)
    ids = fitting.tokenise(video, codebook)
    stills = fitting.tokenise_pictures(video, codebook, sweep.frames, Generator().manual_seed(0))
    test = motion.clips("test", sweep.test, 10, sweep.frames, sweep.image)
    held = fitting.tokenise(test.video[: sweep.held], codebook)
    if ("codes", 0) not in done:
        _say(folder, {"size": "codes", "of": sweep.codes, **_used(ids, sweep.codes)})
    for seed in range(sweep.seeds):
        for name in sweep.sizes:
            for key in (name, f"{name} untrained") if name == sweep.untrained and not seed else (name,):
                if (key, seed) in done:
                    continue
                model = fitting.new(SIZES[name], codebook, sweep.frames, sweep.image, seed)
                log: dict[str, Any] = {"size": key, "seed": seed, "width": SIZES[name].width,
                                       "depth": SIZES[name].depth}  # fmt: skip
                if key == name:
                    log |= fitting.fit(model, ids, stills, fitting.Plan(sweep.steps, sweep.batch, seed=seed), held)
                if not seed or sweep.probed:
                    log["probe"] = layers(model, sweep)
                if key == name and not seed:
                    log |= rollout(model, sweep) | {"track": track(model, sweep)}
                checkpoints.save(model, folder / f"{key.replace(' ', '-')}.{seed}")
                _say(folder, log)


def _used(ids: Tensor, count: int) -> dict[str, Any]:
    """How many codes are used, the share of the commonest, and their entropy in nats."""
    use = torch.bincount((ids[:, 1:-1] - RESERVED).flatten(), minlength=count).float()
    use = use / use.sum()
    entropy = float(-(use * use.clamp_min(1e-12).log()).sum())
    return {"used": int((use > 0).sum()), "largest_share": round(float(use.max()), 4), "entropy": round(entropy, 4)}


def layers(model: TokenVideo, sweep: Sweep) -> list[float]:
    """Test accuracy of the attentive probe after each layer, the embedding first."""
    seen = motion.clips("train", 1650, 20, sweep.frames, sweep.image)[: sweep.labels]
    test = motion.clips("test", sweep.test, 10, sweep.frames, sweep.image)
    x, y = (fitting.features(model, fitting.tokenise(c.video, model.codebook)) for c in (seen, test))
    out = []
    for layer in range(model.depth + 1):
        made = motion.probe(x[layer], seen.label, "attention", 200, 0)
        out.append(round(float((motion.answers(made, y[layer]) == test.label).float().mean()), 4))
    return out


@torch.no_grad()
def rollout(model: TokenVideo, sweep: Sweep) -> dict[str, Any]:
    """What rollouts save of the squared error of repeating the last given frame, as a share of it, on clips that move,
    paired by clip: of the next frame and of all, by greedy codes, by the expected picture, and at best (the true codes,
    which is what the tokenizer can show)."""
    clips = motion.clips("test", sweep.test, 10, sweep.frames, sweep.image)
    video = clips.video[clips.label != 0][: sweep.rollouts]  # not `still`
    true, given = video.float() / 255, sweep.given
    copy = true[:, given - 1 : given].expand_as(true)
    shown = model.codebook.decode(model.codebook.encode(video)[:, given:], sweep.image, true[:, given - 1])
    made = {
        "greedy": model.rollout(video, given)[0],
        "expected": model.rollout(video, given, expected=True)[0],
        "tokenizer": torch.cat([true[:, :given], shown], 1),
    }
    left = (copy - true)[:, given:].square().mean((2, 3, 4))
    out = {}
    for name, x in made.items():
        saved = left - (x - true)[:, given:].square().mean((2, 3, 4))
        for part, g, whole in (("next", saved[:, 0], left[:, 0]), ("all", saved.mean(1), left.mean(1))):
            out[f"{name}_{part}"] = list(vars(mean(g / whole.mean())).values())[:4]
    return out


def track(model: TokenVideo, sweep: Sweep) -> dict[str, Any]:
    """Mean of J and F of label propagation from each layer and of leaving the first mask where it is, with intervals,
    and their difference clip by clip."""
    clips = motion.clips("test", sweep.test, 10, sweep.frames, sweep.image)
    clips = clips[(clips.label != 0).nonzero()[: sweep.tracked, 0]]
    found = tracked(model, zip(clips.video, clips.mask, strict=True), range(model.depth + 1))
    return {k: list(vars(v).values())[:4] for k, v in found.items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / ROWS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def law(points: list[dict[str, Any]]) -> dict[str, Any]:
    """L = a C^-b through (flops, nll): b with Student's 95 % interval over sizes, and r^2, both in log space.

    Losses of one size are averaged over its seeds first: what sizes scatter around the line is more than what seeds or
    held-out clips do, and seeds are no further sizes. `by_seed` has b of each seed that all sizes have. Fewer than four
    sizes give an empty law.
    """
    grid: dict[float, dict[int, float]] = {}
    for p in points:
        if "flops" in p and "nll" in p:
            grid.setdefault(p["flops"], {})[p.get("seed", 0)] = math.log(p["nll"])
    if len(grid) < 4:
        return {}
    x = np.log(sorted(grid))
    y = np.array([np.mean(list(grid[c].values())) for c in sorted(grid)])
    slope, intercept = np.polyfit(x, y, 1)
    left = y - (slope * x + intercept)
    se = math.sqrt((left**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    wide = {2: 4.303, 3: 3.182, 4: 2.776}.get(len(x) - 2, 2.5) * se
    seeds = set.intersection(*(set(v) for v in grid.values()))
    each = [float(-np.polyfit(x, [grid[c][s] for c in sorted(grid)], 1)[0]) for s in sorted(seeds)]
    return {
        "exponent": round(float(-slope), 4),
        "low": round(float(-slope - wide), 4),
        "high": round(float(-slope + wide), 4),
        "r2": round(float(1 - left.var() / y.var()), 4),
        "a": float(np.exp(intercept)),
        "sizes": len(x),
        "by_seed": [round(b, 4) for b in each],
    }


def _say(folder: Path, row: dict[str, Any]) -> None:
    row = {"at": time.strftime("%H:%M:%S"), **row}
    with (folder / ROWS).open("a") as f:
        f.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)  # noqa: T201 - progress of a command line


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), configs.override(Sweep(), sys.argv[2:]))
    print(json.dumps(law(rows(Path(sys.argv[1])))))  # noqa: T201
