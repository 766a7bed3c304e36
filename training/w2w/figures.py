"""Grids of a fitted space for MLflow: edits, samples, inversions, and what was chosen on val."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

SHOWN = "shown.safetensors"
"""pictures that fit drew once, as bytes (rows, columns, 3, H, W) by name"""


def strip(lab: Any, pictures: int = 6) -> dict[str, Tensor]:
    """name -> (rows, columns, 3, H, W) in bytes: what the figures show, drawn when the space is fitted."""
    from torch import Generator

    from training.w2w.measure import edited

    n, names = min(pictures, len(lab.theta)), lab.space.config.attributes
    theta, labels = lab.theta[:n], lab.labels[:n]
    columns = [lab.draw(theta, 1, 5)]
    from training.lab.faces import BINARY

    for row, name in enumerate(names):
        sign = torch.ones(n) if name not in BINARY else 1 - 2 * (labels[:, BINARY.index(name)] > 0.5).float()
        columns.append(lab.draw(edited(lab.space, theta, row, sign, lab.config.strength), 1, 5))
    sampled = lab.space.decode(lab.space.sample(n, Generator().manual_seed(8)))
    out = {"edits": torch.stack(columns, 1), "samples": lab.draw(sampled, 4, 9).unflatten(0, (n, 4))}
    sweep = [
        lab.draw(edited(lab.space, theta[:4], 0, torch.ones(min(4, n)), s), 1, 5) for s in (-3, -2, -1, 0, 1, 2, 3)
    ]
    out["sweep"] = torch.stack(sweep, 1)
    return {k: (v * 255).round().byte().contiguous() for k, v in out.items()}


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Edits of held-out people, new people, a sweep of one attribute, shares of components, base beside patched."""
    from matplotlib.figure import Figure

    told = json.loads((folder / "evidence.json").read_text())
    names, out = told.get("attributes", []), {}
    if (folder / SHOWN).is_file():
        shown = load_file(folder / SHOWN)
        out["edits"] = _grid(shown["edits"], ["as they are", *(f"{n} reversed" for n in names)], "Held-out people")
        out["samples"] = _grid(
            shown["samples"], [f"noise {i}" for i in range(shown["samples"].shape[1])], "New people, a row each"
        )
        if names:
            out["sweep"] = _grid(shown["sweep"], [f"{s:+d}" for s in range(-3, 4)], f"{names[0]}, in gaps")
    if told.get("share"):
        f = Figure(figsize=(5, 3.2), layout="constrained")
        a = f.subplots()
        a.plot([int(k) for k in told["share"]], list(told["share"].values()), marker="o")
        a.set(
            xscale="log",
            xlabel="components",
            ylabel="share of z-scored variance",
            ylim=(0, 1),
            title=f"{told['models']} models",
        )
        a.grid(alpha=0.25)
        out["components"] = f
    f = Figure(figsize=(6, 3.2), layout="constrained")
    a = f.subplots()
    keys = sorted(results["patched"])
    for shift, (side, values) in enumerate(results.items()):
        a.barh([i + 0.38 * shift for i in range(len(keys))], [values[k] for k in keys], 0.36, label=side)
    a.set_yticks([i + 0.19 for i in range(len(keys))], keys, fontsize=8)
    a.legend(fontsize=8)
    a.set(title="Held-out people: weights (patched) beside prompts (base)")
    out["test"] = f
    return out


def _grid(image: Tensor, titles: list[str], title: str) -> Any:
    from matplotlib.figure import Figure

    rows, columns = image.shape[:2]
    f = Figure(figsize=(0.9 * columns + 0.3, 0.9 * rows + 0.7), layout="constrained")
    f.suptitle(title, fontsize=9)
    panels = f.subplots(rows, columns, squeeze=False)
    for r in range(rows):
        for c in range(columns):
            panels[r][c].imshow(image[r, c].permute(1, 2, 0).numpy())
            panels[r][c].axis("off")
            if r == 0:
                panels[r][c].set_title(titles[c] if c < len(titles) else "", fontsize=6)
    return f
