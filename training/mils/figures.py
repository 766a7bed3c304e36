"""Figures of a search: scores and right objects by round, and what it came to beside the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patches.evidence import read_evidence


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """name -> matplotlib Figure."""
    from matplotlib.figure import Figure

    found = read_evidence(folder)
    curve = Figure(figsize=(6, 3.4), layout="constrained")
    left = curve.subplots()
    rounds = range(len(found["val_f1_by_round"]))
    left.plot(rounds, found["val_f1_by_round"], "o-", color="tab:green", label="F1 of exact objects (val)")
    left.axvline(found["rounds"], color="grey", linewidth=0.8)
    left.set(xlabel="round (0: best line of the bank)", ylabel="F1", ylim=(0, 1))
    right = left.twinx()
    right.plot(
        range(len(found["val_score_by_round"])), found["val_score_by_round"], "s--", color="tab:blue", label="score"
    )
    right.set_ylabel("best score, mean over items")
    left.legend(handles=[*left.get_lines()[:1], *right.get_lines()], loc="lower right", fontsize=8)
    bars = Figure(figsize=(6, 3.4), layout="constrained")
    axis = bars.subplots()
    shown = [m for m in results["patched"] if m.startswith(("target/", "quality/")) and m != "quality/cider_d"]
    for k, side in enumerate(("base", "patched")):
        axis.bar([i + 0.4 * k for i in range(len(shown))], [results[side][m] for m in shown], 0.4,
                 label={"base": "best of the bank", "patched": "search"}[side])  # fmt: skip
    axis.set_xticks([i + 0.2 for i in range(len(shown))], [m.partition("/")[2] for m in shown])
    axis.legend()
    return {"rounds": curve, "beside_the_bank": bars}
