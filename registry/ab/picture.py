"""The picture of an experiment: what one would have seen, had one looked all along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from registry.ab.experiment import Experiment, Summary, compare


def picture(experiment: Experiment, seen: Sequence[Summary]) -> Any:
    """A matplotlib Figure: the effect and its always-valid interval after every few events, and the evidence.

    seen: `Events.trajectory`. Where nothing can be said yet, nothing is drawn.
    """
    from matplotlib.figure import Figure  # not at the top: most verbs draw nothing

    results = [compare(experiment, s) for s in seen]
    points = [(r.n_control + r.n_treatment, r) for r in results if math.isfinite(r.low) and math.isfinite(r.high)]
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    effect, evidence = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    n = [at for at, _ in points]
    effect.fill_between(n, [r.low for _, r in points], [r.high for _, r in points], alpha=0.25, step="post")
    effect.step(n, [r.effect for _, r in points], where="post")
    effect.axhline(0.0, color="gray", linewidth=1)
    if experiment.margin:
        effect.axhline(-experiment.margin, color="firebrick", linestyle="--", linewidth=1, label="margin")
        effect.legend()
    width = experiment.high - experiment.low
    effect.set(
        title=f"{experiment.name}: treatment - control, {1 - experiment.alpha:.0%} interval valid at any time",
        ylabel=f"effect on {experiment.metric}", ylim=(-width, width),
    )  # fmt: skip
    evidence.semilogy(n, [max(r.e_value, 1e-3) for _, r in points], drawstyle="steps-post")
    evidence.axhline(1 / experiment.alpha, color="firebrick", linestyle="--", linewidth=1)
    evidence.set(xlabel="units with an outcome", ylabel="e-value")
    for axis in (effect, evidence):
        axis.grid(alpha=0.25)
    return figure
