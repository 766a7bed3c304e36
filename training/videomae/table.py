"""Turns a sweep's rows into its table: accuracy by stage, share of the gap closed, correlations, the paper's figure.

    python -m training.videomae.table FOLDER        # prints Markdown; writes table.json and progression.png

Intervals are bootstraps over seeds of pre-training and clips of test, both drawn again each time, the same draw for
every row, since rows share seeds and clips. The share of the gap closed is told only where natural - scratch is more
than three standard errors; else it is "undefined", in print.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.lab.video import stages
from training.videomae.progression import NATURAL, ROWS, SCRATCH, unpack

DRAWS = 1000
Key = tuple[str, str, int]
"""row, protocol, labels"""


@dataclass(frozen=True)
class Number:
    """A mean over seeds and clips with its 95 % interval."""

    value: float
    low: float
    high: float
    seeds: int
    clips: int


def read(folder: Path) -> dict[Key, dict[int, Tensor]]:
    """(row, protocol, labels) -> seed -> (clips,) right or wrong."""
    out: dict[Key, dict[int, Tensor]] = {}
    for line in (folder / ROWS).read_text().splitlines():
        row = json.loads(line)
        if "right" in row:
            key = (row["row"], row["protocol"], row["labels"])
            out.setdefault(key, {})[row["seed"]] = unpack(row["right"], row["n"]).float()
    return out


def draws(found: Mapping[Key, Mapping[int, Tensor]], count: int = DRAWS) -> dict[Key, Tensor]:
    """(row, protocol, labels) -> (count,) means, seeds and clips drawn alike for all that share them."""
    out = {}
    for key, by_seed in found.items():
        grid = torch.stack([by_seed[s] for s in sorted(by_seed)])  # (seeds, clips)
        seeds, clips = grid.shape
        g = torch.Generator().manual_seed(seeds * 100_003 + clips)  # the same for equal shapes
        rows = torch.randint(seeds, (count, seeds), generator=g)
        columns = torch.randint(clips, (count, clips), generator=g)
        per_clip = grid[rows].mean(1)  # (count, clips)
        out[key] = per_clip.gather(1, columns).mean(1)
    return out


def number(by_seed: Mapping[int, Tensor], drawn: Tensor) -> Number:
    grid = torch.stack(list(by_seed.values()))
    low, high = drawn.quantile(0.025), drawn.quantile(0.975)
    return Number(float(grid.mean()), float(low), float(high), len(grid), grid.shape[1])


def closed(stage: Tensor, scratch: Tensor, natural: Tensor, values: tuple[float, float, float]) -> dict[str, Any]:
    """The share of the gap between scratch and natural that a stage closes, of means drawn together (count,).

    values: the three means themselves. "undefined" unless natural - scratch is above three standard errors."""
    gap = natural - scratch
    got, low_end, high_end = values
    if high_end - low_end <= 3 * float(gap.std()):
        return {"share": "undefined", "gap": round(high_end - low_end, 4), "se": round(float(gap.std()), 4)}
    share = ((stage - scratch) / gap.clamp_min(1e-6)).clamp(-10, 10)
    return {"share": round((got - low_end) / (high_end - low_end), 3), "low": round(float(share.quantile(0.025)), 3),
            "high": round(float(share.quantile(0.975)), 3), "gap": round(high_end - low_end, 4)}  # fmt: skip


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    a, b = (_ranks(torch.tensor(v, dtype=torch.float64)) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-12))


def _ranks(x: Tensor) -> Tensor:
    return torch.stack([((x < v).sum() + ((x == v).sum() - 1) / 2).double() for v in x])


def table(folder: Path) -> dict[str, Any]:
    """Everything that is said of a sweep: numbers, shares, the rank correlation, the largest step."""
    found = read(folder)
    drawn = draws(found)
    numbers = {key: number(found[key], drawn[key]) for key in found}
    out: dict[str, Any] = {"numbers": {"|".join(map(str, k)): vars(v) for k, v in numbers.items()}, "protocols": {}}
    for protocol, labels in sorted({k[1:] for k in found if k[1] != "control" and not k[1].startswith("corrupted")}):
        there = [s for s in stages.STAGES if (s, protocol, labels) in found]
        ends = [(e, protocol, labels) for e in (SCRATCH, NATURAL)]
        about: dict[str, Any] = {}
        if all(e in found for e in ends):
            seeds = min(len(found[e]) for e in ends)
            for s in there:
                key = (s, protocol, labels)
                if len(found[key]) == seeds:
                    values = (numbers[key].value, numbers[ends[0]].value, numbers[ends[1]].value)
                    about[s] = closed(drawn[key], drawn[ends[0]], drawn[ends[1]], values)
        if len(there) >= 3:
            about["rank_correlation"] = _progress(there, protocol, labels, numbers, drawn)
        out["protocols"][f"{protocol} {labels}"] = about
    return out


def _progress(
    there: Sequence[str], protocol: str, labels: int, numbers: Mapping[Key, Number], drawn: Mapping[Key, Tensor]
) -> dict[str, Any]:
    """Spearman's correlation of a stage's place with its accuracy, and the largest step."""
    places = [stages.STAGES.index(s) for s in there]
    values = [numbers[s, protocol, labels].value for s in there]
    many = torch.tensor([spearman(places, [float(drawn[s, protocol, labels][i]) for s in there]) for i in range(200)])
    steps = {f"{a} -> {b}": round(v - u, 4) for a, b, u, v in zip(there, there[1:], values, values[1:], strict=False)}
    return {"rho": round(spearman(places, values), 3), "low": round(float(many.quantile(0.025)), 3),
            "high": round(float(many.quantile(0.975)), 3), "stages": len(there),
            "largest_step": max(steps.items(), key=lambda kv: kv[1])}  # fmt: skip


def markdown(folder: Path) -> str:
    """The table as it stands in the log."""
    whole = table(folder)
    keys = [tuple(k.split("|")) for k in whole["numbers"]]
    columns = sorted({(p, n) for _, p, n in keys if p != "control" and not p.startswith("corrupted")})
    rows = [r for r in (SCRATCH, *stages.STAGES, NATURAL) if any(k[0] == r for k in keys)]
    lines = [
        "| pre-training | " + " | ".join(f"{p}, {n} labels" for p, n in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = []
        for p, n in columns:
            got = whole["numbers"].get(f"{row}|{p}|{n}")
            cells.append(
                f"{100 * got['value']:.1f} ({100 * got['low']:.1f}, {100 * got['high']:.1f}; {got['seeds']})"
                if got
                else ""
            )
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    for k, got in whole["numbers"].items():
        row, protocol, labels = k.split("|")
        if protocol == "control":
            lines.append(
                f"\n{row}, {labels} labels: {100 * got['value']:.1f} ({100 * got['low']:.1f}, {100 * got['high']:.1f})"
            )
    for name, about in whole["protocols"].items():
        lines.append(f"\n{name}: {json.dumps(about)}")
    return "\n".join(lines)


def figure(folder: Path) -> Any:
    """Accuracy along the progression, scratch and natural as lines: the paper's figure 2."""
    from matplotlib.figure import Figure

    numbers = {tuple(k.split("|")): v for k, v in table(folder)["numbers"].items()}
    panels = sorted({k[1:] for k in numbers if k[1] != "control" and not k[1].startswith("corrupted")})
    f = Figure((3.2 * max(1, len(panels)), 3.2), layout="constrained")
    for i, (protocol, labels) in enumerate(panels):
        ax = f.add_subplot(1, len(panels), i + 1)
        there = [s for s in stages.STAGES if (s, protocol, labels) in numbers]
        got = [numbers[s, protocol, labels] for s in there]
        ax.errorbar(
            [stages.STAGES.index(s) for s in there],
            [g["value"] for g in got],
            [[g["value"] - g["low"] for g in got], [g["high"] - g["value"] for g in got]],
            marker="o",
        )
        for end, style in ((SCRATCH, ":"), (NATURAL, "--")):
            if (end, protocol, labels) in numbers:
                ax.axhline(numbers[end, protocol, labels]["value"], ls=style, color="grey", label=end)
        ax.set(title=f"{protocol}, {labels} labels", ylabel="accuracy")
        ax.set_xticks(range(len(stages.STAGES)), [s.replace("_", "\n") for s in stages.STAGES], fontsize=6)
        ax.legend(frameon=False, fontsize=7)
    return f


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    print(markdown(_folder))  # noqa: T201 - what a command line prints
    (_folder / "table.json").write_text(json.dumps(table(_folder), indent=1))
    figure(_folder).savefig(_folder / "progression.png", dpi=130)
