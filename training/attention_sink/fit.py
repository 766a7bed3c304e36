"""Fit attention_sink: find the circuit, judge candidate patches on fitting words and text, seal the best."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patches import artifact
from patches.evidence import write_evidence
from patches.families.base import load_base
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.subject import Subject
from registry.errors import PatchError
from registry.manifest import Manifest
from training.attention_sink.config import Config
from training.attention_sink.find import Circuit, find
from training.attention_sink.measure import fit_words, losses, repeats
from training.attention_sink.phenomena import convergence, sink_attention
from training.choose import Offer, best, worth
from training.data import text
from training.progress import tqdm
from training.tasks.intervals import perplexity


def candidates(config: Config, circuit: Circuit) -> dict[str, SinkConfig]:
    """Return the candidate patches for a model with this circuit, by name."""
    out: dict[str, SinkConfig] = {}
    if circuit.stages:
        out["paper"] = SinkConfig(neurons=circuit.stages[-1])
        last = {layer for layer, _ in circuit.stages[-1]}
        if mine := tuple(n for n in circuit.echoes if n[0] in last):
            out["paper with echoes, at repeats"] = SinkConfig(neurons=circuit.stages[-1] + mine, only_repeats=True)
    later = tuple(range(1, len(circuit.first_norms)))
    for limit in config.limits:
        damped = SinkConfig(damp_layers=(0,), damp_limit=limit)
        out[f"damp {limit:g}"] = damped
        if circuit.stages:
            mended = replace(damped, neurons=circuit.neurons, only_repeats=True)
            out[f"damp {limit:g} + stages at repeats"] = mended
            for run in config.run_limits:
                both = replace(mended, run_layers=later, run_limit=run)
                out[f"damp {limit:g} + runs {run:g} + stages at repeats"] = both
    if config.method == "paper":
        return {k: v for k, v in out.items() if k.startswith("paper")}
    return {k: v for k, v in out.items() if config.method == "auto" or (k.startswith("damp") and "+" not in k)}


def offer(name: str, row: dict[str, Any], config: Config, bound: float) -> Offer[str]:
    """Turn a candidate's measurements into an offer.

    Its worth is the fraction of fitting words it repeats, if its perplexity stays within `bound`; ties go to the higher
    log-probability of the word.
    """
    shares = [v for c in config.fit_contexts for v in row[c].values()]
    score = round(sum(shares) / len(shares), 6)
    kept = sum(row[f"{c} log p"] for c in config.fit_contexts)
    return Offer(name, {**row, "worth": worth(score, -row["perplexity"], -bound)}, kept)


def fit(config: Config, folder: Path) -> Manifest:
    """Find the circuit, try candidate patches on fitting words and text, seal the best with its evidence.

    Raises PatchError if the model has no sink at the first position: there is nothing to patch then.
    """
    base = load_base(config.base, "llm", config.device)
    words = fit_words(base, config)
    top = max(config.copies)
    circuit = find(base, words[:4], min(500, top))
    if circuit.bound_to == "bos":
        raise PatchError(
            f"{base.name} has a sink, but it is bound to its BOS token and not to the first position (an ordinary "
            f"first token reaches norm {max(circuit.plain_norms):.0f}, BOS {max(circuit.first_norms):.0f}): repeats "
            "cannot look like it, so the model is immune and there is nothing to patch."
        )
    tried = candidates(config, circuit)
    if circuit.bound_to == "none" or not tried:
        raise PatchError(f"{base.name} has no attention sink at its first token; there is nothing to patch.")
    model = Subject(base, {name: SinkEdit(c, {}) for name, c in tried.items()})
    docs = [d for s in text.SOURCES for d in text.documents(s, base.processor, 2, config.document_tokens)]
    lengths = tuple(n for n in config.copies if 16 <= n <= config.fit_copies) or config.copies
    table = {}
    for name in tqdm((None, *tried), "candidates", disable=None, leave=False):
        row: dict[str, Any] = {"perplexity": round(perplexity(losses(model, docs, name)).value, 4)}
        for context in config.fit_contexts:
            got = repeats(model, words, context, lengths, name, quiet=True)
            row[context] = {str(n): sum(got.right[n]) / len(words) for n in lengths}
            row[f"{context} log p"] = round(sum(got.log_p[lengths[-1]]) / len(words), 4)
        table[name or "base"] = row
    model.close()

    bound = config.perplexity_bound * table["base"]["perplexity"]
    offers = [offer(name, table[name], config, bound) for name in tried]
    chosen = best(offers).what
    near = convergence(base, words[:4], [n for n in (1, 4, 16, 64, 256) if n <= top])
    found = {
        "chosen": chosen, "circuit": asdict(circuit), "candidates": table,
        "words": [base.processor.decode([w]) for w in words],
        "attention_to_first": sink_attention(base, docs[:2]),
        "convergence": {str(k): v for k, v in near.items()},
    }  # fmt: skip
    write_evidence(folder, found)
    return artifact.save(SinkEdit(tried[chosen], {}), "attention_sink", folder, base=base.label)
