"""Figures of a sealed second_order patch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patches.evidence import read_evidence
from patches.evidence.neuron_cards import load_neurons
from patches.families.clip.second_order import (
    MOVES,
)
from training.second_order.questions import BINS, REPLACEMENTS
from training.tasks import recognition as tasks
from training.tasks.recognition import (
    GOAL,
)


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Draw the figures: variance explained by one direction, ablations, error of the lens, heads that carry neurons,
    candidates, neuron cards, base beside patched on test."""
    from matplotlib.figure import Figure

    found = read_evidence(folder)
    asked, out = found["questions"], {}
    names = sorted(asked["layers"], key=int)

    f = Figure(figsize=(9, 3.4), layout="constrained")
    for a, key, title in zip(
        f.subplots(1, 2), ("explained", "explained_all"),
        ("largest effects, first direction", "all pictures, along the direction"), strict=True,
    ):  # fmt: skip
        for name in names:
            got = asked["layers"][name]
            edges = [(i + 0.5) / BINS for i in range(BINS)]
            label = f"layer {name}, of {got['directions']}: median {got[key]['quartiles'][1]:.2f}"
            a.step(edges, got[key]["histogram"], where="mid", label=label)
        a.set(title=f"Explained variance: {title}", xlabel="share", ylabel="neurons")
        a.legend(fontsize=7)
    out["explained"] = f

    f = Figure(figsize=(7, 3.4), layout="constrained")
    a = f.subplots()
    for i, name in enumerate(names):
        rows = asked["ablations"]["layers"][name]
        a.bar([n + 0.8 * i / len(names) - 0.4 for n in range(4)], [rows[k] for k in REPLACEMENTS],
              width=0.8 / len(names), align="edge", label=f"layer {name}")  # fmt: skip
    a.axhline(asked["ablations"]["base"], color="black", linestyle=":", label="nothing replaced")
    a.set_xticks(range(4), REPLACEMENTS)
    a.set(title=f"Accuracy with a layer's effects replaced, val, n = {asked['ablations']['n']}", ylim=(0, 1.02))
    a.legend(fontsize=7)
    out["ablations"] = f

    f = Figure(figsize=(7, 3.4), layout="constrained")
    a = f.subplots()
    for i, name in enumerate(names):
        for kind, line in (("heavy", "-"), ("random", ":")):
            steps = asked["layers"][name]["paths"][kind]["steps"]
            a.semilogy(MOVES, [steps[m]["error"] for m in MOVES], line, marker="o", color=f"C{i}",
                       label=f"layer {name}, {kind} neurons")  # fmt: skip
    a.axhline(1.0, color="grey", linewidth=0.8)
    a.set(
        title="Squared error of the lens as things move",
        xlabel="moves too (cumulative)",
        ylabel="|phi - true|² / |true|²",
    )
    a.legend(fontsize=7)
    a.grid(alpha=0.25)
    out["linearisation"] = f

    f = Figure(figsize=(2.6 * len(names) + 1, 3), layout="constrained")
    for a, name in zip(f.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        table = asked["layers"][name]["carried_by"]
        shown = a.imshow(table, cmap="viridis", vmin=0)
        a.set_yticks(range(len(table)), [str(int(name) + 1 + i) for i in range(len(table))])
        a.set(title=f"neurons of layer {name}", xlabel="head", ylabel="layer")
        f.colorbar(shown, ax=a, shrink=0.7)
    f.suptitle("Mean share of a neuron's effects that a head carries", fontsize=9)
    out["carriers"] = f

    out["candidates"] = _candidates(found)
    out["neurons"] = _cards(folder, found)

    out["test"] = tasks.bars(results)
    return out


def _candidates(found: Mapping[str, Any]) -> Any:
    """Draw the goal on val by layer, edit and number of neurons, beside base and control."""
    from matplotlib.figure import Figure

    goal, rows = GOAL[found["task"]], found["candidates"]
    f = Figure(figsize=(7, 3.8), layout="constrained")
    a = f.subplots()
    for layer, edit in sorted({(r["layer"], r["edit"]) for r in rows}):
        mine = [r for r in rows if (r["layer"], r["edit"]) == (layer, edit)]
        a.semilogx([r["count"] for r in mine], [r[goal] for r in mine], "o-" if edit == "effects" else "s--",
                   color=f"C{layer}", label=f"layer {layer}, {edit}")  # fmt: skip
        hollow = [r for r in mine if r["worth"] < 0]  # hollow marker: costs more than the bound
        a.plot([r["count"] for r in hollow], [r[goal] for r in hollow], "o", markerfacecolor="white", color=f"C{layer}")
    a.axhline(found["base"][goal], color="grey", linestyle=":", label="base")
    a.plot(found["chosen"]["count"], found["random"][goal], "x", color="black", label="random neurons")
    a.set(title=f"Choosing on val: {goal.replace('_', ' ')} (hollow: costs too much)", xlabel="neurons", ylabel=goal)
    a.legend(fontsize=7)
    a.grid(alpha=0.25)
    return f


def _cards(folder: Path, found: Mapping[str, Any], rows: int = 6, columns: int = 5) -> Any:
    """Draw cards of the chosen layer's neurons that texts describe best and that matter: words and strongest images."""
    from matplotlib.figure import Figure

    cards, layer = load_neurons(folder), found["chosen"]["layer"]
    one = cards.layers[layer]
    shown = (one.known.spread * one.known.explained_all).topk(min(rows, len(one.told))).indices.tolist()
    f = Figure(figsize=(9, 1.15 * len(shown)), layout="constrained")
    grid = f.subplots(len(shown), columns + 1, squeeze=False, width_ratios=[4] + [1] * columns)
    for n, row in zip(shown, grid, strict=True):
        about = cards.card(layer, n, 1, 4)
        words = ", ".join(f"{w['text']} {w['coefficient']:+.2f}" for w in about["texts"])
        row[0].text(0, 0.5, f"{layer}.{n}  (direction {about['explained_all']:.0%})\n{words}", fontsize=7, va="center",
                    wrap=True)  # fmt: skip
        for a in row:
            a.axis("off")
        for a, seen in zip(row[1:], about["pictures"], strict=False):
            a.imshow(cards.thumbs[seen["picture"]].permute(1, 2, 0).numpy())
            a.set_title(f"{seen['projection']:+.2f}", fontsize=6)
    return f
