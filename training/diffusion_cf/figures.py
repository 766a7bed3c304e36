"""Figures of diffusion_cf: strips of pictures, and what amounts cost and reach."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.diffusion_cf.domains import Pictures


def figures(folder: Path, results: Mapping[str, Mapping[str, float]]) -> dict[str, Figure]:
    """Flips and changes of base and patched; what each amount did on val."""
    evidence = json.loads((folder / "evidence.json").read_text())
    return {"counterfactuals": _bars(results), "amounts": _amounts(evidence)}


def _bars(results: Mapping[str, Mapping[str, float]]) -> Figure:
    from matplotlib.figure import Figure

    names = [k for k in results["patched"] if k.startswith(("target/", "offtarget/"))]
    fig = Figure(figsize=(7, 0.35 * len(names) + 1), layout="constrained")
    ax = fig.subplots()
    for shift, side in ((0.2, "base"), (-0.2, "patched")):
        ax.barh([i + shift for i in range(len(names))], [results[side][n] for n in names], height=0.38, label=side)
    ax.set_yticks(range(len(names)), [n.split("/")[1] for n in names])
    ax.invert_yaxis()
    ax.legend()
    ax.set_title("Counterfactuals of test pictures; base: inverted and given back")
    return fig


def _amounts(evidence: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    rows = evidence["tried"]
    fig = Figure(figsize=(5, 3), layout="constrained")
    ax = fig.subplots()
    ax.plot([r["l1"] for r in rows], [r["nearer"] for r in rows], "o-")
    for r in rows:
        ax.annotate(f"{r['amount']:g}", (r["l1"], r["nearer"]), textcoords="offset points", xytext=(4, -10))
    ax.set_xlabel("mean absolute change of a pixel")
    ax.set_ylabel("nearer to the target (own encoder)")
    ax.set_title("Amounts in class gaps, on val")
    return fig


def strips(source: Pictures, target: Tensor, made: Mapping[str, Tensor], per_domain: int = 2) -> Figure:
    """Rows of pictures: the original, then what each way made of it; `per_domain` of each domain."""
    from matplotlib.figure import Figure

    rows: list[int] = []
    for domain in dict.fromkeys(source.domains):
        mine = [i for i, c in enumerate(source.label.tolist()) if source.domains[c] == domain]
        step = max(1, len(mine) // per_domain)
        rows += mine[::step][:per_domain]
    names = ["original", *made]
    fig = Figure(figsize=(1.2 * len(names) + 1.2, 1.15 * len(rows) + 0.4), layout="constrained")
    axes = fig.subplots(len(rows), len(names), squeeze=False)
    for y, i in enumerate(rows):
        for x, name in enumerate(names):
            ax = axes[y, x]
            ax.imshow((source.x if name == "original" else made[name])[i].permute(1, 2, 0).clamp(0, 1).numpy())
            ax.set_xticks([])
            ax.set_yticks([])
            if y == 0:
                ax.set_title(name, fontsize=8)
            if x == 0:
                a, b = source.classes[int(source.label[i])], source.classes[int(target[i])]
                ax.set_ylabel(f"{a}\nto {b}", fontsize=7)
    return fig
