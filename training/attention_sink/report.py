"""The full report: the sealed patch, its parts and controls on test words."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from patches import artifact
from patches.families.base import load_base
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.subject import Subject
from registry import config as configs
from training.attention_sink.config import Config
from training.attention_sink.find import Circuit
from training.attention_sink.fit import candidates
from training.attention_sink.measure import (
    continuations,
    held_documents,
    losses,
    norm_ratio,
    repeats,
    test_words,
)
from training.attention_sink.phenomena import cluster_attack
from training.data import text
from training.tasks.intervals import ratio_interval, wilson


def report(folder: Path, out: Path, few: int = 16) -> dict[str, Any]:
    """A sealed patch against its base on all test words in every context, and every part and control on the first
    `few` words; shares with intervals. docs/LOG.md's tables. Writes JSON as it goes."""
    sealed = json.loads((folder / "recipe.json").read_text())
    config = configs.parse(Config, sealed["config"])
    base = load_base(config.base, "llm", config.device)
    about, patch = artifact.load(folder, base=base.digest, device=base.device)
    found = json.loads((folder / "report.json").read_text())["circuit"]
    stages = [tuple((int(layer), int(j)) for layer, j in stage) for stage in found["stages"]]
    circuit = Circuit(**{**found, "stages": tuple(stages), "echoes": tuple(tuple(e) for e in found.get("echoes", ()))})
    neurons = circuit.neurons
    words, top = test_words(base, config), max(config.copies)
    rng = torch.Generator().manual_seed(config.seed)
    m = base.model.config.intermediate_size
    random = tuple((layer, int(torch.randint(m, (1,), generator=rng))) for layer, _ in neurons)
    parts = {
        **{k: c for k, c in candidates(config, circuit).items() if k.startswith("paper")},
        "damping alone": replace(patch.config, neurons=(), only_repeats=False, run_layers=()),
        "stages at repeats alone": SinkConfig(neurons=neurons, only_repeats=True),
        "control: random neurons": SinkConfig(neurons=random),
        "control: last stage everywhere": SinkConfig(neurons=stages[-1], keep_first=False),
    }
    model = Subject(base, {"sealed": patch, **{k: SinkEdit(c, {}) for k, c in parts.items()}})
    docs = {s: held_documents(base, config, s) for s in text.SOURCES}
    plain = {s: losses(model, d, None) for s, d in docs.items()}
    results: dict[str, Any] = {"digest": about.digest, "patch": asdict(patch.config), "variants": {}}
    results["cluster"] = {str(k): v for k, v in cluster_attack(base, circuit).items()}
    for name in ("base", "sealed", *parts):
        arm = None if name == "base" else name
        many = name in ("base", "sealed")
        row: dict[str, Any] = {}
        for context in config.contexts if many else config.fit_contexts:
            some = words if many and context != "bos" else words[:few]
            got = repeats(model, some, context, config.copies, arm)
            row[context] = {str(n): wilson(got.right[n]) for n in config.copies}
            row[f"{context} log p"] = {str(n): round(sum(got.log_p[n]) / len(some), 3) for n in config.copies}
        row["perplexity"] = {s: ratio_interval(losses(model, d, arm), plain[s]) for s, d in docs.items()}
        row["norm_ratio"] = round(norm_ratio(model, words[:6], min(500, top), arm), 3)
        if many:
            row["continue"] = wilson(continuations(model, words, config, arm))
        results["variants"][name] = row
        out.write_text(json.dumps(results, indent=1))
        tqdm.write(f"{name}: {json.dumps(row)}")
    model.close()
    return results
