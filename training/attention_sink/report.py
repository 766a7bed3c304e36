"""Full report of attention_sink: the sealed patch, its components and controls on test words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.subject import Subject
from training.attention_sink.config import Config
from training.attention_sink.find import Circuit
from training.attention_sink.fit import candidates
from training.attention_sink.measure import (
    continuations,
    held_documents,
    losses,
    measured_words,
    norm_ratio,
    repeats,
)
from training.attention_sink.phenomena import cluster_attack
from training.data import text
from training.evidence import Draft, open_patch
from training.progress import tqdm
from training.tasks.intervals import ratio_interval, wilson

FEW = 16
"""Number of words on which components, controls and BOS-only contexts are measured"""


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Measure a sealed patch against its base on all test words in every context.

    Its components and controls are measured on the first `FEW` words.
    """
    opened = open_patch(folder, config.base, config.device)
    base, patch = opened.base, opened.patch
    circuit = Circuit.of(opened.fitted["circuit"])
    neurons = circuit.neurons
    words, top = measured_words(base, config), max(config.copies)
    rng = torch.Generator().manual_seed(config.seed)
    m = base.model.config.intermediate_size
    random = tuple((layer, int(torch.randint(m, (1,), generator=rng))) for layer, _ in neurons)
    parts = {
        **{k: c for k, c in candidates(config, circuit).items() if k.startswith("paper")},
        "damping alone": replace(patch.config, neurons=(), only_repeats=False, run_layers=()),
        "stages at repeats alone": SinkConfig(neurons=neurons, only_repeats=True),
        "control: random neurons": SinkConfig(neurons=random),
        "control: last stage everywhere": SinkConfig(neurons=circuit.stages[-1], keep_first=False),
    }
    model = Subject(base, {"sealed": patch, **{k: SinkEdit(c, {}) for k, c in parts.items()}})
    docs = {s: held_documents(base, config, s) for s in text.SOURCES}
    plain = {s: losses(model, d, None) for s, d in docs.items()}
    draft = Draft(opened.about)
    for k, (near, random_sets) in cluster_attack(base, circuit).items():
        draft.keep("cluster", f"{k} tokens", value={"near": near, "random": random_sets})
    for name in tqdm(("base", "sealed", *parts), "variants", disable=None):
        arm = None if name == "base" else name
        many = name in ("base", "sealed")
        row: dict[str, Any] = {}
        for context in config.contexts if many else config.fit_contexts:
            some = words if many and context != "bos" else words[:FEW]
            got = repeats(model, some, context, config.copies, arm)
            row[context] = {str(n): wilson(got.right[n]) for n in config.copies}
            row[f"{context} log p"] = {str(n): round(sum(got.log_p[n]) / len(some), 3) for n in config.copies}
        row["perplexity"] = {s: ratio_interval(losses(model, d, arm), plain[s]) for s, d in docs.items()}
        row["norm_ratio"] = round(norm_ratio(model, words[:6], min(500, top), arm), 3)
        if many:
            row["continue"] = wilson(continuations(model, words, config, arm))
        draft.keep("variants", name, value=row)
    model.close()
    return draft
