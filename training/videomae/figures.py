"""Figures of a sealed checkpoint: base beside it, and a clip with its mask and reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patches.families.video import base as checkpoints
from patches.families.video.model import MaskedVideo
from training.tasks import motion


def figures(folder: Path, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Base beside checkpoint, and a clip, its mask and its reconstruction."""
    from matplotlib.figure import Figure

    names = [n for n in ("target/accuracy", "target/probe") if n in results["patched"]]
    bars = Figure((4.5, 3))
    ax = bars.add_subplot()
    for i, (side, values) in enumerate(results.items()):
        ax.bar([x + 0.38 * i for x in range(len(names))], [values.get(n, 0.0) for n in names], 0.36, label=side)
    ax.axhline(1 / len(motion.CLASSES), color="grey", lw=0.8, ls=":")
    ax.set_xticks([x + 0.19 for x in range(len(names))], ["fine-tuned", "frozen probe"][: len(names)])
    ax.set_ylim(0, 1)
    ax.set_ylabel("accuracy on test (dotted: chance)")
    ax.legend(frameon=False)
    model = checkpoints.read(folder)
    assert isinstance(model, MaskedVideo)
    return {"accuracy": bars, "reconstruction": strip(model)}


@torch.no_grad()
def strip(model: MaskedVideo, seed: int = 3) -> Any:
    """Three rows: a clip of test, what the model sees of it, and what it makes of the rest."""
    from matplotlib.figure import Figure

    clips = motion.clips("test", 66, 10, model.frames, model.size).video[seed : seed + 1]
    shown, hidden, _ = model.reconstruct(clips, 0.75, "tube", seed)
    rows = [clips[0].float() / 255, torch.where(hidden[0][:, None], torch.full_like(shown[0], 0.5), shown[0]), shown[0]]
    figure = Figure((model.frames, 3.2))
    for r, frames in enumerate(rows):
        for t in range(model.frames):
            ax = figure.add_subplot(3, model.frames, r * model.frames + t + 1)
            ax.imshow(frames[t].permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1, 0.03, 0.03)
    return figure
