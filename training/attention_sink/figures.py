"""Figures of a sealed attention_sink patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patches.evidence import read_evidence


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Draw the figures: norms by layer, accuracy by number of copies, candidates as a heat map, convergence."""
    from matplotlib.figure import Figure

    found = read_evidence(folder)
    circuit, out = found["circuit"], {}

    def figure(title: str, x: str, y: str) -> tuple[Any, Any]:
        f = Figure(figsize=(7, 4.2), layout="constrained")
        a = f.subplots()
        a.set(title=title, xlabel=x, ylabel=y)
        a.grid(alpha=0.25)
        return f, a

    f, a = figure("Residual norm after each layer", "layer", "norm (log)")
    for key, label in (
        ("first_norms", "first token"),
        ("repeat_norms", "last of many repeats"),
        ("other_norms", "other tokens"),
    ):
        a.semilogy(circuit[key], marker=".", label=label)
    for layer, neuron in [n for stage in circuit["stages"] for n in stage]:
        a.annotate(f"{layer}.{neuron}", (layer, circuit["first_norms"][layer]), fontsize=7, rotation=60)
    a.legend()
    out["norms"] = f
    contexts = sorted({k.split("_")[1] for k in results["base"] if k.startswith("quality/repeat_")})
    f = Figure(figsize=(3.6 * len(contexts), 3.6), layout="constrained")
    for a, context in zip(f.subplots(1, len(contexts), squeeze=False)[0], contexts, strict=True):
        for side, values in results.items():
            points = sorted(
                (int(k.split("_")[2]), v) for k, v in values.items() if k.startswith(f"quality/repeat_{context}_")
            )
            a.semilogx(*zip(*points, strict=True), marker="o", label=side)
        a.set(title=context, xlabel="copies", ylabel="next token right", ylim=(-0.03, 1.03))
        a.grid(alpha=0.25)
    a.legend()
    out["repeats"] = f
    names = list(found["candidates"])
    columns = [(c, n) for c in contexts if c in found["candidates"]["base"] for n in found["candidates"]["base"][c]]
    grid = [[found["candidates"][name][c][n] for c, n in columns] for name in names]
    f = Figure(figsize=(1.2 + 0.6 * len(columns), 1.6 + 0.4 * len(names)), layout="constrained")
    a = f.subplots()
    a.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    a.set_xticks(range(len(columns)), [f"{c} {n}" for c, n in columns], rotation=60, fontsize=7)
    a.set_yticks(range(len(names)), [f"{n} *" if n == found["chosen"] else n for n in names], fontsize=7)
    for i, row in enumerate(grid):
        for j, v in enumerate(row):
            a.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=6, color="white" if v < 0.6 else "black")
    a.set_title("Candidates on fitting words (* chosen)")
    out["candidates"] = f
    f, a = figure("First attention: the N-th repeat becomes a lone token", "copies", "cosine with the lone token")
    a.semilogx(
        *zip(*((int(k), v) for k, v in sorted(found["convergence"].items(), key=lambda i: int(i[0]))), strict=True),
        marker="o",
    )
    out["convergence"] = f
    f, a = figure("Attention on the first token, ordinary text", "layer", "share")
    a.bar(range(len(found["attention_to_first"])), found["attention_to_first"])
    out["attention_to_first"] = f
    return out
