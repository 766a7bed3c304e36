"""Toto's scaling curve: several sizes on the same clips, the loss each reaches, and the power law through them.

    python -m training.toto.scaling FOLDER [steps=400 ...]

One size is one line of FOLDER/rows.jsonl, written when it is done: what was held out, the loss by frame, the attentive
probe of every layer, rollouts against copying the last frame, tracking against copying the mask. A sweep that is
stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from patches.families.video import base as checkpoints
from patches.families.video.tokens import TokenVideo
from registry import config as configs
from registry.config import STRICT
from training.lab.video import actions
from training.tasks import motion
from training.tasks.tracking import copied, tracked
from training.toto import learn as fitting
from training.toto.sizes import SIZES

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Sweep:
    """What the sizes share."""

    __pydantic_config__ = STRICT

    sizes: tuple[str, ...] = ("w24", "w32", "w48", "lab", "w96")
    steps: int = 400
    batch: int = 32
    codes: int = 256
    residual: bool = True
    pool: int = 4096
    held: int = 550
    labels: int = 550
    test: int = 1100
    rollouts: int = 110
    given: int = 4
    frames: int = actions.FRAMES
    image: int = actions.SIZE
    seed: int = 0


def run(folder: Path, sweep: Sweep) -> None:
    """Run the sizes that are not done yet."""
    folder.mkdir(parents=True, exist_ok=True)
    done = {row["size"] for row in rows(folder)}
    video = fitting.pool(sweep.pool, sweep.frames, sweep.image)
    codebook = fitting.tokenizer(video[:1024], sweep.codes, residual=sweep.residual, seed=sweep.seed)
    ids = fitting.tokenise(video, codebook)
    stills = fitting.tokenise_pictures(video, codebook, sweep.frames, Generator().manual_seed(sweep.seed))
    held = fitting.tokenise(
        motion.clips("test", sweep.test, 10, sweep.frames, sweep.image).video[: sweep.held], codebook
    )
    use = torch.bincount((ids[:, 1:-1] - 4).flatten(), minlength=sweep.codes).float()
    use = use / use.sum()
    entropy = float(-(use * use.clamp_min(1e-12).log()).sum())
    if "codes" not in done:
        _say(folder, {"size": "codes", "used": int((use > 0).sum()), "of": sweep.codes,
                      "largest_share": round(float(use.max()), 4), "entropy": round(entropy, 4)})  # fmt: skip
    for name in sweep.sizes:
        for trained in (True, False) if name == "lab" else (True,):
            key = name if trained else f"{name} untrained"
            if key in done:
                continue
            model = fitting.new(SIZES[name], codebook, sweep.frames, sweep.image, sweep.seed)
            log: dict[str, Any] = {"size": key, "width": SIZES[name].width, "depth": SIZES[name].depth}
            if trained:
                log |= fitting.fit(model, ids, stills, fitting.Plan(sweep.steps, sweep.batch, seed=sweep.seed), held)
            log |= {"probe": layers(model, sweep)}
            if trained:
                log |= rollout(model, sweep) | track(model, sweep)
            checkpoints.save(model, folder / key.replace(" ", "-"))
            _say(folder, log)


def layers(model: TokenVideo, sweep: Sweep) -> list[float]:
    """Test accuracy of the attentive probe after each layer, the embedding first."""
    seen = motion.clips("train", 1650, 20, sweep.frames, sweep.image)[: sweep.labels]
    test = motion.clips("test", sweep.test, 10, sweep.frames, sweep.image)
    x, y = (fitting.features(model, fitting.tokenise(c.video, model.codebook)) for c in (seen, test))
    out = []
    for layer in range(model.depth + 1):
        made = motion.probe(x[layer], seen.label, "attention", 200, sweep.seed)
        out.append(round(float((motion.answers(made, y[layer]) == test.label).float().mean()), 4))
    return out


@torch.no_grad()
def rollout(model: TokenVideo, sweep: Sweep) -> dict[str, Any]:
    """Squared error of greedy rollouts and of repeating the last given frame, on clips that move, paired by clip.

    Both are compared with the true frames as the tokenizer can show them (what is lost there is nobody's fault) and as
    they are.
    """
    clips = motion.clips("test", sweep.test, 10, sweep.frames, sweep.image)
    video = clips.video[clips.label != 0][: sweep.rollouts]  # not `still`
    made, _ = model.rollout(video, sweep.given)
    true = video.float() / 255
    copy = true[:, sweep.given - 1 : sweep.given].expand_as(true)
    shown = torch.cat([true[:, : sweep.given], model.codebook.decode(
        model.codebook.encode(video)[:, sweep.given :], sweep.image, true[:, sweep.given - 1])], 1)  # fmt: skip
    errors = {
        name: (x - true)[:, sweep.given :].square().mean((2, 3, 4))
        for name, x in (("rollout", made), ("copy", copy), ("tokenizer", shown))
    }
    first = errors["copy"][:, 0] - errors["rollout"][:, 0]
    gain = (errors["copy"] - errors["rollout"]).mean(1)
    return {
        "rollouts": len(video),
        **{f"mse_{k}": [round(x, 6) for x in v.mean(0).tolist()] for k, v in errors.items()},
        "gain": round(float(gain.mean()), 6),
        "gain_se": round(float(gain.std() / len(gain) ** 0.5), 6),
        "gain_first": round(float(first.mean()), 6),
        "gain_first_se": round(float(first.std() / len(first) ** 0.5), 6),
    }


def track(model: TokenVideo, sweep: Sweep) -> dict[str, Any]:
    """J and F of label propagation from each layer, and of leaving the first mask where it is."""
    clips = motion.clips("test", sweep.test, 10, sweep.frames, sweep.image)
    clips = clips[(clips.label != 0).nonzero()[: sweep.rollouts, 0]]
    states = fitting.features(model, fitting.tokenise(clips.video, model.codebook))
    out: dict[str, Any] = {"track_copy": copied(clips.mask)}
    out["track"] = [tracked(x, clips.mask, model.grid) for x in states]
    return out


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / ROWS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def law(points: list[dict[str, Any]], draws: int = 2000) -> dict[str, Any]:
    """L = a C^-b through (flops, nll) of the sizes: b with a 95 % interval (resampling the held-out error of each size
    and the sizes), and r^2 in log space. Raises nothing: fewer than four sizes give an empty law."""
    found = [p for p in points if "flops" in p and "nll" in p]
    if len(found) < 4:
        return {}
    x = np.log([p["flops"] for p in found])
    y = np.log([p["nll"] for p in found])
    slope, intercept = np.polyfit(x, y, 1)
    left = y - (slope * x + intercept)
    r2 = 1 - left.var() / y.var()
    # Student's interval of the slope: sizes are few, and their scatter is more than the held-out clips' error
    se = math.sqrt((left**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    wide = {2: 4.303, 3: 3.182, 4: 2.776}.get(len(x) - 2, 2.5) * se
    del draws
    return {
        "exponent": round(float(-slope), 4),
        "low": round(float(-slope - wide), 4),
        "high": round(float(-slope + wide), 4),
        "r2": round(float(r2), 4),
        "a": float(np.exp(intercept)),
        "sizes": len(found),
    }


def _say(folder: Path, row: dict[str, Any]) -> None:
    row = {"at": time.strftime("%H:%M:%S"), **row}
    with (folder / ROWS).open("a") as f:
        f.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)  # noqa: T201 - progress of a command line


def spaced(x: Tensor, count: int) -> Tensor:
    return x[:: max(1, len(x) // count)][:count]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), configs.override(replace(Sweep()), sys.argv[2:]))
    print(json.dumps(law(rows(Path(sys.argv[1])))))  # noqa: T201
