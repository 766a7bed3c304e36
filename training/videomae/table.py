"""Turns a sweep's rows into its table: accuracy by stage, share of the gap closed, correlations, the paper's figure.

    python -m training.videomae.table FOLDER        # prints Markdown; writes table.json and figures; logs to MLflow

Intervals are bootstraps over seeds of pre-training and clips of test, the same draw for every row, since rows share
seeds and clips; the spread of few seeds is widened by the root of S / (S - 1). The share of the gap closed is told only
where natural - scratch is more than three standard errors; else it is "undefined", in print. What is said of the
progression has n stages alone, so beside the interval stands how often a random order of them does as well.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from registry.measure import Measure
from training.lab.video import actions, stages
from training.lab.video.corruptions import CORRUPTIONS
from training.lab.video.statistics import statistics
from training.videomae.progression import NATURAL, ROWS, SCRATCH, unpack

DRAWS = 1000
Key = tuple[str, str, int]
"""row, protocol, labels"""
STATISTICS = "statistics.json"
SAID = 256
"""clips that a stage's frame statistics are of"""


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
        wide = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 0.0
        of_seed = grid.mean(1) - grid.mean()
        out[key] = grid.mean(0)[columns].mean(1) + wide * of_seed[rows].mean(1)
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
            "high": round(float(share.quantile(0.975)), 3), "gap": round(high_end - low_end, 4),
            "se": round(float(gap.std()), 4)}  # fmt: skip


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    return float(_rho(torch.tensor([list(x), list(y)], dtype=torch.float64))[0])


def _rho(values: Tensor) -> Tensor:
    """Rank correlations (k,) of the first row of values (1 + k, n) with each of the others."""
    smaller = (values[:, None, :] < values[:, :, None]).double().sum(2)
    alike = (values[:, None, :] == values[:, :, None]).double().sum(2)
    ranks = smaller + (alike - 1) / 2
    unit = torch.nn.functional.normalize(ranks - ranks.mean(1, keepdim=True), dim=1)
    return unit[1:] @ unit[0]


def correlated(x: Sequence[float], values: Sequence[float], drawn: Sequence[Tensor]) -> dict[str, Any]:
    """Rank correlation of something known of each stage with its accuracy: rho, its interval over seeds and clips, and
    p, the share of all orders of the stages whose rho is as far from 0 (two-sided, by every permutation of up to 8)."""
    known = torch.tensor([list(x)], dtype=torch.float64)
    rho = spearman(x, values)
    many = _rho(torch.cat([known, torch.stack(list(drawn), 1).double()]))
    p = math.nan
    if len(x) <= 8:
        orders = _rho(torch.cat([known, torch.tensor(list(itertools.permutations(values)), dtype=torch.float64)]))
        p = float((orders.abs() >= abs(rho) - 1e-9).double().mean())
    return {"rho": round(rho, 3), "low": round(float(many.quantile(0.025)), 3),
            "high": round(float(many.quantile(0.975)), 3), "p": round(p, 4), "stages": len(x)}  # fmt: skip


def row_of(stage: str, rows: Sequence[str]) -> str | None:
    """The row that stands for a stage: itself, or static circles as they are (their moving part is empty)."""
    return next((r for r in (stage, f"{stage}@keep") if r in rows), None)


def described(folder: Path) -> dict[str, dict[str, float]]:
    """Frame statistics of every stage beside the natural clips, kept in FOLDER/statistics.json."""
    file = folder / STATISTICS
    if not file.is_file():
        natural = actions.draw("train", 2 * SAID, 30).video
        about = {s: statistics(stages.draw(s, SAID, 7), natural[:SAID]) for s in stages.STAGES}
        about[NATURAL] = statistics(natural[SAID:], natural[:SAID])
        file.write_text(json.dumps(about, indent=1))
    out: dict[str, dict[str, float]] = json.loads(file.read_text())
    return out


def table(folder: Path, described: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, Any]:
    """Everything that is said of a sweep: numbers, shares, rank correlations with place and with frame statistics,
    the largest step, corruptions."""
    found = read(folder)
    drawn = draws(found)
    numbers = {key: number(found[key], drawn[key]) for key in found}
    out: dict[str, Any] = {"numbers": {"|".join(map(str, k)): vars(v) for k, v in numbers.items()}, "protocols": {}}
    for protocol, labels in sorted({k[1:] for k in found if k[1] != "control" and not k[1].startswith("corrupted")}):
        rows = [r for r, p, n in found if (p, n) == (protocol, labels)]
        ends = [(e, protocol, labels) for e in (SCRATCH, NATURAL)]
        about: dict[str, Any] = {}
        for row in rows:
            key = (row, protocol, labels)
            if row not in (SCRATCH, NATURAL) and all(e in found for e in ends):
                together = _together(found, [key, *ends])
                if together:
                    (a, b, c), values = together
                    about[row] = closed(a, b, c, (values[0], values[1], values[2]))
        there = [(s, r) for s in stages.STAGES if (r := row_of(s, rows))]
        if len(there) >= 3:
            keys = [(r, protocol, labels) for _, r in there]
            values_ = [numbers[k].value for k in keys]
            parts = [drawn[k] for k in keys]
            about["progression"] = correlated([stages.STAGES.index(s) for s, _ in there], values_, parts)
            about["steps"] = _steps(there, keys, found)
            about["statistics"] = {
                name: correlated([described[s][name] for s, _ in there], values_, parts)
                for name in (described[there[0][0]] if described else ())
            } if described else {}  # fmt: skip
        out["protocols"][f"{protocol} {labels}"] = about
    return out


def _together(
    found: Mapping[Key, Mapping[int, Tensor]], keys: Sequence[Key]
) -> tuple[list[Tensor], list[float]] | None:  # fmt: skip
    """Draw means of several rows on the seeds that all of them have, and their means there; None without any."""
    seeds = set.intersection(*(set(found[k]) for k in keys))
    if not seeds:
        return None
    part = {k: {s: found[k][s] for s in seeds} for k in keys}
    drawn = draws(part)
    return [drawn[k] for k in keys], [float(torch.stack(list(part[k].values())).mean()) for k in keys]


def _steps(
    there: Sequence[tuple[str, str]], keys: Sequence[Key], found: Mapping[Key, Mapping[int, Tensor]]
) -> dict[str, list[float]]:
    """Compute what each stage adds to the one before it, with its interval, on the seeds that both have."""
    out = {}
    for (stage, _), a, b in zip(there[1:], keys, keys[1:], strict=False):
        together = _together(found, [a, b])
        if together:
            (x, y), (u, v) = together
            d = y - x
            out[stage] = [round(n, 4) for n in (v - u, float(d.quantile(0.025)), float(d.quantile(0.975)))]
    return out


def columns(numbers: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(protocol, labels) of what was measured, corruptions and controls left out."""
    keys = [k.split("|") for k in numbers]
    return sorted({(p, int(n)) for _, p, n in keys if p != "control" and not p.startswith("corrupted")})


def ordered(numbers: Mapping[str, Any]) -> list[str]:
    """Rows as they are printed: none, the stages in order with their other forms, natural."""
    rows = {k.split("|")[0] for k in numbers if not k.startswith("control")}
    place = {s: i for i, s in enumerate((SCRATCH, *stages.STAGES, NATURAL))}
    return sorted(rows, key=lambda r: (place[r.partition("@")[0]], r))


def markdown(whole: Mapping[str, Any]) -> str:
    """The table as it stands in the log."""
    numbers, names = whole["numbers"], columns(whole["numbers"])
    lines = ["| pre-training (seeds) | " + " | ".join(f"{p}, {n}" for p, n in names) + " |",
             "|---" * (len(names) + 1) + "|"]  # fmt: skip
    for row in ordered(numbers):
        got = [numbers.get(f"{row}|{p}|{n}") for p, n in names]
        seeds = max(g["seeds"] for g in got if g)
        lines.append(f"| {row} ({seeds}) | " + " | ".join(_cell(g) for g in got) + " |")
    lines += [f"\n{k.replace('|', ', ')}: {_cell(g)} (n = {g['clips']})" for k, g in numbers.items() if "control" in k]
    kinds = [k for k in CORRUPTIONS if any(f"|corrupted {k}|" in name for name in numbers)]
    if kinds:
        lines += ["", "| corrupted | " + " | ".join(ordered(numbers)) + " |",
                  "|---" * (len(ordered(numbers)) + 1) + "|"]  # fmt: skip
        labels = next(name.rpartition("|")[2] for name in numbers if "|corrupted" in name)
        for kind in kinds:
            got = [numbers.get(f"{row}|corrupted {kind}|{labels}") for row in ordered(numbers)]
            lines.append(f"| {kind} | " + " | ".join(f"{g['value']:.3f}" if g else "" for g in got) + " |")
    for name, about in whole["protocols"].items():
        lines += ["", f"{name}:"] + [f"- {k}: {json.dumps(v)}" for k, v in about.items() if k != "statistics"]
        lines += [f"- {k}: {json.dumps(v)}" for k, v in about.get("statistics", {}).items()]
    return "\n".join(lines)


def _cell(got: Mapping[str, float] | None) -> str:
    return f"{got['value']:.3f} [{got['low']:.3f}, {got['high']:.3f}]" if got else ""


def measures(whole: Mapping[str, Any]) -> dict[str, dict[str, Measure]]:
    """row -> metric -> number with its interval, for MLflow's table of runs."""
    out: dict[str, dict[str, Measure]] = {}
    for key, got in whole["numbers"].items():
        row, protocol, labels = key.split("|")
        out.setdefault(row, {})[f"{protocol} {labels}"] = Measure(
            got["value"], got["low"], got["high"], got["clips"], "higher"
        )
    for name, about in whole["protocols"].items():
        for row, said in about.items():
            if row in out and isinstance(said.get("share"), float):
                out[row][f"closed {name}"] = Measure(said["share"], said["low"], said["high"], None, "higher")
    return out


def figure(whole: Mapping[str, Any]) -> Any:
    """Accuracy along the progression, scratch and natural as lines: the paper's figure 2."""
    from matplotlib.figure import Figure

    numbers, panels = whole["numbers"], columns(whole["numbers"])
    f = Figure((3.4 * max(1, (len(panels) + 1) // 2), 6.4 if len(panels) > 1 else 3.2), layout="constrained")
    for i, (protocol, labels) in enumerate(panels):
        ax = f.add_subplot(2 if len(panels) > 1 else 1, max(1, (len(panels) + 1) // 2), i + 1)
        rows = [k.split("|")[0] for k in numbers if k.endswith(f"|{protocol}|{labels}")]
        there = [
            (j, numbers[f"{r}|{protocol}|{labels}"]) for j, s in enumerate(stages.STAGES) if (r := row_of(s, rows))
        ]
        x, got = [j for j, _ in there], [g for _, g in there]
        spread = [[g["value"] - g["low"] for g in got], [g["high"] - g["value"] for g in got]]
        ax.errorbar(x, [g["value"] for g in got], spread, marker="o", capsize=2)
        for end, style, colour in ((SCRATCH, ":", "grey"), (NATURAL, "--", "black")):
            if g := numbers.get(f"{end}|{protocol}|{labels}"):
                ax.axhline(g["value"], ls=style, color=colour, label=end)
                ax.axhspan(g["low"], g["high"], color=colour, alpha=0.12, lw=0)
        ax.set(title=f"{protocol}, {labels} labels", ylabel="accuracy on test")
        ax.set_xticks(range(len(stages.STAGES)), [s.replace("_", "\n") for s in stages.STAGES], fontsize=6, rotation=40)
        ax.legend(frameon=False, fontsize=7)
    return f


def main(folder: Path) -> None:
    """Print the table, write it with its figure, log both to MLflow."""
    from registry import store

    whole = table(folder, described(folder))
    text = markdown(whole)
    (folder / "table.json").write_text(json.dumps(whole, indent=1))
    (folder / "table.md").write_text(text + "\n")
    shown = figure(whole)
    shown.savefig(folder / "progression.png", dpi=130)
    how = json.loads((folder / "sweep.json").read_text())
    params = {k: v for k, v in how.items() if k != "size"} | how["size"]
    files = {"table": folder / "table.md", "numbers": folder / "table.json", "clips": folder / STATISTICS}
    url = store.log_sweep("videomae", measures(whole), params, {"progression": shown}, files)
    print(text, f"\n{url}")  # noqa: T201 - what a command line prints


if __name__ == "__main__":
    main(Path(sys.argv[1]))
