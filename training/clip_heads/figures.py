"""Figures of a sealed clip_heads patch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from patches.evidence import read_evidence
from patches.families.clip import maps
from training.tasks import recognition as tasks
from training.tasks.recognition import (
    GOAL,
    KEPT,
)


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Draw the figures: scores of heads by property, candidates beside random heads, heat maps, base beside patched."""
    from matplotlib.figure import Figure

    found, fitted = json.loads((folder / "heads.json").read_text()), read_evidence(folder)
    goal, kept = GOAL[fitted["task"]], KEPT[fitted["task"]]
    heads, names = found["heads"], found["properties"]
    out: dict[str, Any] = {}
    score = torch.tensor([h["scores"] for h in heads])
    f = Figure(figsize=(1.5 + 0.6 * len(names), 1 + 0.17 * len(heads)), layout="constrained")
    a = f.subplots()
    top = float(score.clamp_min(0).flatten().quantile(0.98)) or 1.0
    shown = a.imshow(score.numpy(), aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top)
    a.set_xticks(range(len(names)), names, rotation=40, fontsize=8)
    a.set_yticks(range(len(heads)), [f"{h['layer']}.{h['head']} {h['label']}" for h in heads], fontsize=6)
    f.colorbar(shown, ax=a, shrink=0.5, label="log, against other heads")
    a.set(title="What each head tells apart")
    out["heads"] = f

    f = Figure(figsize=(7, 4), layout="constrained")
    a = f.subplots()
    for name, mode in sorted({(r["property"], r["mode"]) for r in fitted["candidates"]}):
        mine = [r for r in fitted["candidates"] if (r["property"], r["mode"]) == (name, mode)]
        (line,) = a.plot([r["count"] for r in mine], [r[goal] for r in mine], marker="o", label=f"{name}, {mode}")
        a.plot([r["count"] for r in mine], [r[kept] for r in mine], ":", color=line.get_color())
    for r in fitted["random"]:
        a.plot(fitted["chosen"]["count"], r[goal], "x", color="black")
    a.axhline(fitted["base"][goal], color="grey", label="base")
    a.axhline(fitted["base"][kept], color="grey", linestyle=":", label=f"{kept} (dotted)")
    a.set(title=f"Choosing on val: {goal.replace('_', ' ')}; crosses: random heads", xlabel="heads")
    a.grid(alpha=0.25)
    a.legend(fontsize=7)
    out["candidates"] = f

    seen = load_file(folder / "examples.safetensors")
    image, grids = seen["image"].float() / 255, seen["maps"]
    f = Figure(figsize=(1.5 + 1.3 * len(image), 1.4 * (len(grids) + 1)), layout="constrained")
    panels = f.subplots(len(grids) + 1, len(image), squeeze=False)
    for i, picture in enumerate(image):
        panels[0][i].imshow(picture.permute(1, 2, 0).numpy())
        for row, grid in enumerate(grids, 1):
            panels[row][i].imshow(maps.overlay(picture, grid[i], 96).permute(1, 2, 0).numpy())
    for row, name in enumerate(["", *fitted["rows"]]):
        panels[row][0].set_title(name, fontsize=7, loc="left")
    for a in panels.flat:
        a.axis("off")
    out["segments"] = f

    out["test"] = tasks.bars(results)
    return out
