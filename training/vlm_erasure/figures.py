"""The figures of a fit: the sweep over depths and weights, and base beside patched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from patches.evidence import read_evidence

SHOWN = {"gone": "invented mentions gone", "kept": "true mentions kept", "invented instead": "invented instead"}


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """`sweep`: gone, kept and invented instead by depths, direction and weight, on val. `chair`: base and patched."""
    from matplotlib.figure import Figure

    found = read_evidence(folder)
    out = {"sweep": sweep(found)}
    f = Figure(figsize=(9, 3.6), layout="constrained")
    a = f.subplots()
    names = [k for k in next(iter(results.values())) if not k.endswith("mentions")]
    for i, (side, values) in enumerate(results.items()):
        at = [x + (i - 0.5) * 0.4 for x in range(len(names))]
        bars = a.bar(at, [values[n] for n in names], width=0.38, label=side)
        a.bar_label(bars, fmt="%.2f", fontsize=6)
    a.set_xticks(
        range(len(names)), [n.split("/")[1].replace("_", " ") for n in names], rotation=35, ha="right", fontsize=7
    )
    a.set(ylim=(0, 1.08), title="Base beside automatic erasure, unseen pictures")
    a.legend()
    out["chair"] = f
    return out


def sweep(found: dict[str, Any]) -> Any:
    """Three heat-maps over settings (rows) and weights (columns); a star where the chosen one is."""
    from matplotlib.figure import Figure

    rows: dict[str, dict[float, dict[str, float]]] = {}
    for name, values in found["sweep"].items():
        setting, weight = re.fullmatch(r"(.*) weight ([\d.]+)", name).groups()  # type: ignore[union-attr]
        rows.setdefault(setting, {})[float(weight)] = values
    weights = sorted({w for row in rows.values() for w in row})
    f = Figure(figsize=(11, 1.4 + 0.26 * len(rows)), layout="constrained")
    for a, (key, title) in zip(f.subplots(1, 3), SHOWN.items(), strict=True):
        grid = [[row[w][key] if w in row else float("nan") for w in weights] for row in rows.values()]
        a.imshow(grid, vmin=0, vmax=1, cmap="viridis" if key != "invented instead" else "magma_r", aspect="auto")
        for i, (setting, line) in enumerate(zip(rows, grid, strict=True)):
            for j, v in enumerate(line):
                star = "*" if found["chosen"] == f"{setting} weight {weights[j]:g}" else ""
                a.text(
                    j, i, f"{v:.2f}{star}", ha="center", va="center", fontsize=6, color="white" if v < 0.6 else "black"
                )
        a.set_xticks(range(len(weights)), [f"{w:g}" for w in weights], fontsize=7)
        a.set_yticks(range(len(rows)), list(rows) if key == "gone" else [], fontsize=6)
        a.set(title=title, xlabel="weight")
    return f
