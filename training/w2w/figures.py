"""Grids of a fitted space for MLflow: edits, samples, a sweep, and what was chosen on val."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor

from patches.evidence import read_evidence
from training.lab.faces import BINARY, sheet
from training.w2w.measure import Lab, edited

COLUMNS = {"edits": "Held-out people: as they are, then each attribute reversed", "samples": "New people, a row each",
           "sweep": "One attribute from -3 to 3 gaps"}  # fmt: skip
"""sheets that a fit draws once, `<name>.webp` in the sealed folder -> what they show"""


def strip(lab: Lab, people: int = 4) -> dict[str, tuple[Tensor, int]]:
    """name -> pictures (n, 3, H, W) of a sheet, and how many stand in a row."""
    n, names = min(people, len(lab.theta)), lab.space.config.attributes
    theta, labels = lab.theta[:n], lab.labels[:n]
    columns = [lab.draw(theta, 1, 5)]
    for row, name in enumerate(names):
        sign = torch.ones(n) if name not in BINARY else 1 - 2 * (labels[:, BINARY.index(name)] > 0.5).float()
        columns.append(lab.draw(edited(lab.space, theta, row, sign, lab.config.strength), 1, 5))
    sampled = lab.space.decode(lab.space.sample(n, Generator().manual_seed(8)))
    out = {"edits": (torch.stack(columns, 1).flatten(0, 1), len(columns)), "samples": (lab.draw(sampled, 4, 9), 4)}
    if names:
        steps = [lab.draw(edited(lab.space, theta, 0, torch.ones(n), s), 1, 5) for s in range(-3, 4)]
        out["sweep"] = (torch.stack(steps, 1).flatten(0, 1), len(steps))
    return out


def save(folder: Path, sheets: Mapping[str, tuple[Tensor, int]]) -> None:
    """Write the sheets into a folder that is about to be sealed."""
    for name, (image, columns) in sheets.items():
        sheet(image, columns).save(folder / f"{name}.webp", quality=88)


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Edits of held-out people, new people, a sweep of one attribute, shares of components, base beside patched."""
    from matplotlib.figure import Figure

    told, out = read_evidence(folder), {}
    for name, title in COLUMNS.items():
        if (folder / f"{name}.webp").is_file():
            out[name] = _shown(Image.open(folder / f"{name}.webp"), title)
    if told.get("share"):
        f = Figure(figsize=(5, 3.2), layout="constrained")
        a = f.subplots()
        a.plot([int(k) for k in told["share"]], list(told["share"].values()), marker="o")
        a.set(xscale="log", xlabel="components", ylabel="share of z-scored variance", ylim=(0, 1))
        a.set_title(f"{told['models']} models of {told['numbers']} numbers")
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


def _shown(picture: Image.Image, title: str) -> Any:
    from matplotlib.figure import Figure

    f = Figure(figsize=(picture.width / 75, picture.height / 75 + 0.4), layout="constrained")
    a = f.subplots()
    a.imshow(picture.convert("RGB"))
    a.axis("off")
    a.set_title(title, fontsize=9)
    return f
