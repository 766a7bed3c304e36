"""Figures of a sealed patch: the candidates, and base beside patched on test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patches.evidence import read_evidence


def figures(folder: Path, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """name -> matplotlib Figure."""
    from matplotlib.figure import Figure

    found = read_evidence(folder)
    f = Figure(figsize=(7, 3), layout="constrained")
    left, right = f.subplots(1, 2)
    left.bar([r["name"] for r in found["candidates"]], [r["code"] / found["base"]["code"] for r in found["candidates"]])
    left.set(title="Choosing on val", ylabel="perplexity on code over the base's")
    for i, (side, values) in enumerate(results.items()):
        right.bar([n + 0.4 * i for n in range(len(values))], list(values.values()), width=0.4, label=side)
    right.set_xticks(range(len(values)), [k.rpartition("_")[2] for k in values])
    right.set(title="Perplexity on test")
    right.legend()
    return {"perplexity": f}
