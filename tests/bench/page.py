"""Write docs/NUMBERS.md from the parts that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.systems import SYSTEMS
from tests.bench.papers import PAPERS

PAGE = Path(__file__).parents[2] / "docs" / "NUMBERS.md"
ARMS = ("1", "4", "16", "64")
SURE = 6
"""rounds from which smallest and largest hold the median in 95 % of cases"""
GOAL = {"attention_sink", "clip_sae", "vlm_erasure", "diffusion_cf"}


def write(place: Path, page: Path = PAGE) -> Path:
    """The page, from <part>.json in `place`. Returns where it is."""
    parts = {f.stem: json.loads(f.read_text()) for f in sorted(place.glob("*.json"))}
    page.write_text(text(parts))
    return page


def text(parts: dict[str, Any]) -> str:
    """The page as Markdown; what was not measured is said where it would stand."""
    return "\n".join([
        "# Numbers", "",
        "Made by `make bench` (`patchbay bench --all`); who has a GPU fills its columns by the same command.", "",
        *_about(parts), "", *_variants(parts), "", *_arms(parts), "", *_http(parts), "", *_start(parts), "", *_claims(), "",
    ])  # fmt: skip


def _about(parts: dict[str, Any]) -> list[str]:
    if not parts:
        return ["Nothing was measured yet."]
    about = next(iter(parts.values()))["about"]
    commits = ", ".join(sorted({p["about"]["commit"] for p in parts.values()}))
    dates = sorted({p["about"]["date"] for p in parts.values()})
    loads = [p["about"]["load"] for p in parts.values()]
    versions = dict(sorted({k: v for p in parts.values() for k, v in p["about"]["versions"].items() if v}.items()))
    return [
        f"- machine: {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB; GPU: {about['gpu'] or 'none'}",
        f"- commit {commits}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, Python {about['python']}",
        f"- {', '.join(f'{k} {v}' for k, v in versions.items())}",
        f"- load of the machine meanwhile: {min(loads):g} to {max(loads):g}. In-process times are CPU time of one thread, "
        "which other load moves less than waits, and still moves; ratios are medians over interleaved rounds, in brackets their 95 % "
        f"bootstrap interval, in parentheses the rounds. **With fewer than {SURE} rounds the brackets are only the smallest and the largest** "
        "(they hold the true median with 1 - 2^(1 - rounds): 75 % of three), and such a number decides nothing. Times over HTTP are the CPU of the server, and waits",
    ]  # fmt: skip


def _variants(parts: dict[str, Any]) -> list[str]:
    names = ("base again", "patched", "folded", "onnx, base", "onnx, patched")
    out = ["## One row: base, patched, folded, ONNX Runtime", "",
           "Cost of a row, the base's in torch being 1. `base again` is the same code once more: the noise.", "",
           "| system | a row is | base, CPU ms | " + " | ".join(names) + " | CUDA |",
           "|---" * (4 + len(names)) + "|"]  # fmt: skip
    for name in SYSTEMS:
        part = parts.get(name)
        if part is None:
            out.append(f"| `{name}` | not measured |" + " |" * (2 + len(names)))
            continue
        cells = [_ratio(part["ratios"].get(n)) for n in names]
        out.append(f"| `{name}` | {part['row']}; {part['note']} | {part['base_ms']:.3g} | {' | '.join(cells)} | |")
    return [*out, "", "No folded form: patches that look at tokens, pictures or requests, and arms that are models of "
            "their own. ONNX Runtime: CLIP and VideoMAE. A sink patch is folded without its conditions."]  # fmt: skip


def _arms(parts: dict[str, Any]) -> list[str]:
    out = ["## Arms: 1, 4, 16, 64 patches in one batch on one copy of the base", "",
           "Throughput of a batch with a row for each arm; the same batch of base rows is 1. Wanted: .9 at 64 arms. "
           "Arms are copies of one patch, with tensors of their own; those of `vlm_erasure` are alike and go in one call.", "",
           "| system | " + " | ".join(f"{n} arm{'s' * (n != '1')}" for n in ARMS)
           + " | 64 rows of base again | MiB for 64 arms | CUDA |",
           "|---" * (4 + len(ARMS)) + "|"]  # fmt: skip
    for name in SYSTEMS:
        part = parts.get(name)
        if part is None or "arms" not in part:
            continue
        cells = [_ratio(part["arms"].get(n, {}).get("arms")) for n in ARMS]
        noise = _ratio(part["arms"].get("64", {}).get("base again"))
        out.append(f"| `{name}` | {' | '.join(cells)} | {noise} | {part['arms_mib']:.0f} | |")
    there = {n: parts[n]["arms"]["64"]["arms"] for n in sorted(GOAL) if "arms" in parts.get(n, {})}
    said = []
    if low := [n for n, r in there.items() if r["median"] < 0.9]:
        said.append(f"Median below .9 at 64 arms: {', '.join(f'`{n}`' for n in low)}.")
    if few := [n for n, r in there.items() if r["rounds"] < SURE]:
        said.append(f"Too few rounds to decide: {', '.join(f'`{n}`' for n in few)}.")
    if missing := sorted(GOAL - there.keys()):
        said.append(f"Not measured: {', '.join(f'`{n}`' for n in missing)}.")
    return [*out, "", " ".join(said) or "llm, clip, vlm and diffusion all keep .9."]


def _http(parts: dict[str, Any]) -> list[str]:
    out = ["## HTTP over the same work in process", ""]
    part = parts.get("http")
    if part is None:
        return [*out, "Not measured."]
    rounds = next(iter(part["ratios"].values()))["rounds"]
    out += [f"One caller, one picture of 96 x 96 for lab:clip with eight labels, {rounds} rounds; in process "
            f"{part['cpu_ms']['in process']:.3g} ms of CPU, {part['in_process_ms']:.3g} ms of waiting. CPU is the server's, of all its "
            f"processes, over that of the work in process, by blocks of {part['calls']} calls. Every server does the same work in one "
            "process; only patchbay's has arms, tokens, limits and exposures beside it. Waits on a machine that does other "
            "work say most of that.", "",
            "| server | CPU over in process | CPU ms a call | wait over in process | resident MiB |", "|---|---|---|---|---|"]  # fmt: skip
    for name, ratio in sorted(part["cpu"].items(), key=lambda item: item[1]["median"]):
        mib = f"{part['mib'][name]:.0f}" if name in part["mib"] else "-"
        waits = _ratio(part["ratios"][name])
        out.append(f"| {name} | {_ratio(ratio)} | {part['cpu_ms'][name]:.3g} | {waits} | {mib} |")
    out += [f"\nNot measured: {name} ({why})." for name, why in part["missing"].items()]
    return out


def _start(parts: dict[str, Any]) -> list[str]:
    out = ["## Cold start and memory of `patchbay serve`", ""]
    part = parts.get("start")
    if part is None:
        return [*out, "Not measured."]
    out += [
        "| base | ready, s | first answer, s | CPU s | slowest of the runs, s | resident MiB |",
        "|---|---|---|---|---|---|",
    ]
    for base, p in part.items():
        if base != "about":
            numbers = [p["ready_s"], p["answer_s"], p["cpu_s"], p["worst_s"]]
            out.append(f"| {base} | {' | '.join(f'{x:.3g}' for x in numbers)} | {p['mib']:.0f} |")
    return [
        *out,
        "",
        "From typing the command; the fastest of three starts. On a machine that does other work the wait is its share of "
        "the cores; the CPU seconds, of all its processes, are about what an idle one would wait, for imports run on one core.",
    ]


def _claims() -> list[str]:
    out = ["## Each paper's claim, and ours", "",
           "The papers' models and data could not be had where this was made, so nothing here repeats a paper's number; ours is "
           "of lab models, with its control. How each was measured: docs/log.", "",
           "| system | the paper says | we measured | base | patched | control | n |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in SYSTEMS.items():
        c = row.claim
        if c is None:
            continue
        numbers = " | ".join(c.show(x) for x in (c.base, c.patched, c.control))
        out.append(f"| `{name}` ([{row.paper}](https://arxiv.org/abs/{row.paper})) | {PAPERS[name]} | {c.metric} | {numbers} "
                   f"({c.what_control}) | {c.n:,} |")  # fmt: skip
    return out


def _ratio(r: dict[str, float] | None) -> str:
    """The median of so many rounds, in brackets its interval; of fewer than SURE rounds the smallest and largest, which
    hold the true median with 1 - 2^(1 - rounds): 75 % of three rounds."""
    return "-" if r is None else f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}] ({r['rounds']:g})"
