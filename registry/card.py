"""Model cards: what an artifact is, how it was made and how it measured, in Hugging Face's format.

YAML front matter and Markdown, made from the sealed folder, its recipe and evidence, what the store measured of both
sides, and its gate; nothing is said that none of them says. A card is no part of the artifact: it changes when
something is measured, the digest does not (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.manifest import Manifest
from registry.measure import Measure
from registry.systems import system

NAME = "README.md"
MOST = 40
"""metrics and fields that are listed; the store has the others"""
TASKS = {
    "generate": "text-generation", "classify": "zero-shot-image-classification", "render": "image-to-image",
    "embed": "feature-extraction", "caption": "image-to-text",
}  # fmt: skip
"""shape of API -> the hub's name of what is done"""
OWN = ("lab:", "pypi:smollm2", "tiny")
"""references of bases whose licence is that of this repository, or the same one"""


def card(
    folder: Path,
    about: Manifest,
    sides: Mapping[str, Mapping[str, Measure]] | None = None,
    gate: Mapping[str, Any] | None = None,
    signers: Sequence[str] = (),
) -> str:
    """The card of the artifact in `folder`.

    sides: "base" and "patched" -> metric -> what was measured. gate: as `registry.gate.Gated.evidence` has it, inner
    part. signers: names of its signatures.
    """
    from huggingface_hub import ModelCardData

    row, sides = system(about.system), sides or {}
    refs = {role: label.rpartition("@")[0] for role, label in about.bases.items()}
    recipe = _json(folder / "recipe.json")
    hub = [r.removeprefix("hf-hub:").partition("@")[0] for r in refs.values() if r.startswith("hf-hub:")]
    ours = all(r.startswith(OWN) for r in refs.values())
    task = next((TASKS[s] for s in row.services if s in TASKS), "other")
    data = ModelCardData(
        license="apache-2.0" if ours else "other",
        library_name="patchbay",
        base_model=hub or None,
        pipeline_tag=task,
        tags=["patchbay", "interpretability", about.system, about.kind],
        model_name=f"{about.system}-{about.digest[:16]}",
        eval_results=_results(sides.get("patched", {}), task, about, gate) or None,
    )
    if not ours:
        data.license_name = "as-its-base"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {row.title}",
        f"An artifact of kind `{about.kind}` made by patchbay's system `{about.system}`, "
        f"after {_paper(row.paper)}. It is named by its digest, which covers every byte and every tensor's name, type "
        f"and shape:\n\n`sha256:{about.digest}`",
        _lines("Bases", [f"`{role}`: `{at}`" for role, at in about.bases.items()] or ["none: it is a model itself"]),
        _lines("Made from", [f"`sha256:{p}`" for p in about.parents]),
        _lines("Configuration", _fields(about.config)),
        _lines("How it was made", [f"recipe `{recipe.get('recipe', 'unknown')}`", *_fields(recipe.get("config", {}))])
        if recipe else "",
        _lines("What the fit found", _fields(_json(folder / "evidence.json"))),
        _measured(sides),
        _gate(gate),
        _limits(row),
        _lines("Signatures", [f"`{name}`" for name in signers]),
        f"## Use\n\n```sh\npatchbay pull sha256:{about.digest}\npatchbay serve {about.system}\n```",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(patched: Mapping[str, Measure], task: str, about: Manifest, gate: Mapping[str, Any] | None) -> list[Any]:
    from huggingface_hub import EvalResult

    name = str((gate or {}).get("dataset", ["lab", ""])[0]) or "lab"
    return [
        EvalResult(task, name, name, metric, round(m.value, 6), metric_name=metric, verified=False)
        for metric, m in list(patched.items())[:MOST]
    ]


def _measured(sides: Mapping[str, Mapping[str, Measure]]) -> str:
    base, patched = sides.get("base", {}), sides.get("patched", {})
    names = sorted({*base, *patched})
    if not names:
        return "## Measured\n\nNothing was measured yet: `patchbay eval`."
    rows = [
        f"| {n} | {_number(base.get(n))} | {_number(patched.get(n))} | {_count(base, patched, n)} |"
        for n in names[:MOST]
    ]
    more = f"\n\n{len(names) - MOST} more are in the store." if len(names) > MOST else ""
    head = "| metric | base | patched | n |\n|---|---|---|---|\n"
    return f"## Measured\n\nWith 95 % intervals, both sides on the same data.\n\n{head}" + "\n".join(rows) + more


def _gate(gate: Mapping[str, Any] | None) -> str:
    if not gate:
        return "## Gate\n\nIt has not been through its gate: `patchbay gate`."
    promises = [f"{'kept' if p['kept'] else 'BROKEN'}: {p['says']}" for p in gate["promises"]]
    on = f"on {gate['dataset'][0]} (`{gate['dataset'][1][:16]}`)"
    return _lines(f"Gate: {gate['status']}", [f"promised by `{gate['recipe']}`, measured {on}", *promises])


def _limits(row: Any) -> str:
    claim = row.claim
    if claim is None:
        return ""
    return (
        f"## Limits\n\nThe system's claim ({claim.metric}) is of artifact `{claim.digest}`, n = {claim.n}: base "
        f"{claim.show(claim.base)}, patched {claim.show(claim.patched)}, control {claim.show(claim.control)} "
        f"({claim.what_control}). Beside it: {claim.beside or 'nothing'}. On other data and other bases "
        "nothing is known until it is measured."
    )


def _paper(paper: str) -> str:
    return f"[arXiv {paper}](https://arxiv.org/abs/{paper})" if paper else "no paper: others made it"


def _number(m: Measure | None) -> str:
    if m is None:
        return "-"
    return f"{m.value:.4g}" + (f" [{m.low:.3g}, {m.high:.3g}]" if m.low is not None and m.high is not None else "")


def _count(base: Mapping[str, Measure], patched: Mapping[str, Measure], name: str) -> str:
    counts = dict.fromkeys(str(s[name].n) for s in (base, patched) if name in s and s[name].n is not None)
    return "/".join(counts) or "-"


def _fields(values: Any, before: str = "") -> list[str]:
    """Nested fields as lines, long values cut."""
    out: list[str] = []
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict) and len(out) < MOST:
            out += _fields(value, f"{before}{key}.")
        elif value not in ("", None, [], {}):
            text = json.dumps(value, ensure_ascii=False)
            out.append(f"`{before}{key}`: {text if len(text) <= 120 else text[:117] + '...'}")
    return out[:MOST]


def _lines(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
