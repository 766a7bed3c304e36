"""Figures of a sealed clip_sae patch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from patches.evidence import read_evidence
from training.clip_sae.quality import BINS
from training.tasks import recognition as tasks
from training.tasks.recognition import (
    GOAL,
)


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Draw the figures: candidates by layer and count, sparsity, densities, examples, base beside patched."""
    from matplotlib.figure import Figure

    found = read_evidence(folder)
    goal = GOAL[found["task"]]
    out: dict[str, Any] = {}
    rows = found["candidates"]
    f = Figure(figsize=(7, 4.2), layout="constrained")
    a = f.subplots()

    def line(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["layer"], r["rank"], r.get("strength", 1.0), r.get("level", 0.0)

    for layer, how, much, left in sorted({line(r) for r in rows}):
        mine = [r for r in rows if line(r) == (layer, how, much, left)]
        label = f"layer {layer}, {how}" + (f" x {much:g}" if much != 1 else "") + (f", {left:g} left" if left else "")
        a.semilogx([r["count"] for r in mine], [r[goal] for r in mine], marker="o", label=label)
    base = next(iter(found["layers"].values()))["base"]
    a.axhline(base[goal], color="grey", linestyle=":", label="base")
    if found["random"]:
        a.plot(found["chosen"]["count"], found["random"][goal], "x", color="black", label="random features")
    if "blank" in base:
        a.axhline(base["blank"], color="grey", linestyle="--", label="strip without letters")
    a.set(title=f"Choosing on val: {goal.replace('_', ' ')}", xlabel="features", ylabel=goal.replace("_", " "))
    a.grid(alpha=0.25)
    a.legend(fontsize=7)
    out["candidates"] = f

    if len(found["layers"]) > 1:
        out["layers"] = _layers(found, goal)

    mine = found["layers"][str(found["chosen"]["layer"])]
    f = Figure(figsize=(7, 3.4), layout="constrained")
    left, right = f.subplots(1, 2)
    patches = torch.tensor(mine["l0_map"][1:])
    side = int(len(patches) ** 0.5)
    shown = left.imshow(patches[: side * side].view(side, side).numpy(), cmap="viridis")
    f.colorbar(shown, ax=left, shrink=0.8)
    left.set(title=f"L0 by position (class token {mine['l0_map'][0]:.0f})", xticks=[], yticks=[])
    right.bar(BINS[:-1], mine["all"]["density"], width=BINS[1] - BINS[0], align="edge")
    right.set(title="Densities", xlabel="log10 of the share of tokens", ylabel="features")
    out["positions"] = f

    seen = load_file(folder / "examples.safetensors")["image"]
    f = Figure(figsize=(1.7 * len(seen), 2.5), layout="constrained")
    for i, a in enumerate(f.subplots(1, len(seen), squeeze=False)[0]):
        a.imshow(seen[i].permute(1, 2, 0).numpy())
        said = [found["examples"][side][i] for side in ("is", "base", "patched")]
        a.set_title("{}\nbase: {}\npatched: {}".format(*said), fontsize=7)
        a.axis("off")
    out["examples"] = f

    out["test"] = tasks.bars(results)
    return out


def _layers(found: Mapping[str, Any], goal: str) -> Any:
    """Draw a panel each for every layer's best edit on val, sparsity per token type, fraction of steering features."""
    from matplotlib.figure import Figure

    names = sorted(found["layers"], key=int)
    layers = [found["layers"][n] for n in names]
    ground = layers[0]["base"]
    best = []
    for name in names:
        rows = [r for r in found["candidates"] if str(r["layer"]) == name]
        best.append(max(rows, key=lambda r: r["worth"]))
    f = Figure(figsize=(11, 3.4), layout="constrained")
    panels = f.subplots(1, 3 if "steerability" in layers[0] else 2)
    a = panels[0]
    a.plot(names, [r[goal] for r in best], marker="o", color="C0", label="chosen features")
    for r, name in zip(best, names, strict=True):
        if r["worth"] < 0:  # hollow marker: no edit of this layer meets the bound
            a.plot(name, r[goal], "o", markerfacecolor="white", color="C0")
    a.plot(names, [x["random"][goal] for x in layers], marker=".", color="C7", label="random features")
    if "mean_direction" in layers[0]:
        a.plot(names, [x["mean_direction"][goal] for x in layers], marker=".", color="C1", label="mean direction")
    a.axhline(ground[goal], color="black", linestyle=":", label="base")
    if "blank" in ground:
        a.axhline(ground["blank"], color="black", linestyle="--", label="strip without letters")
    a.set(title=f"{goal.replace('_', ' ')}, val", xlabel="layer", ylim=(0, None))
    a.legend(fontsize=7)
    a = panels[1]
    for kind, label in (("cls", "class token"), ("patches", "patches"), ("all", "all")):
        a.plot(names, [x[kind]["l0_mean"] for x in layers], marker="o", label=label)
    a.set(title="features that fire per token", xlabel="layer", ylim=(0, None))
    a.legend(fontsize=7)
    if "steerability" in layers[0]:
        a = panels[2]
        strengths = list(layers[0]["steerability"]["features"])
        for i, kind in enumerate(("features", "neurons", "random")):
            for strength in strengths:
                shares = [x["steerability"][kind][strength]["steerable_share"] for x in layers]
                last = strength == strengths[-1]
                a.plot(names, shares, "o-" if last else ":", color=f"C{i}", label=kind if last else None)
        a.set(title=f"share that steers at {' (dotted), '.join(strengths)} norms", xlabel="layer", ylim=(0, 1))
        a.legend(fontsize=7)
    for a in panels:
        a.grid(alpha=0.25)
    return f
