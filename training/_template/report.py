"""The full report: the sealed patch on test beside random directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patches.subject import Subject
from training._template.config import Config
from training._template.fit import control
from training._template.measure import costs
from training._template.mechanism import WithoutDirection
from training.evidence import Draft, open_patch

DRAWS = 3


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Perplexity of each kind of text on test: base, patched, and `DRAWS` random directions of the same layer."""
    opened = open_patch(folder, config.base, config.device)
    assert isinstance(opened.patch, WithoutDirection)
    arms = {"patched": opened.patch}
    arms |= {f"random {i}": control(opened.patch, config.seed + i) for i in range(DRAWS)}
    model, draft = Subject(opened.base, arms), Draft(opened.about)
    for name in (None, *arms):
        draft.keep("perplexity", name or "base", value=costs(model, config, name, "test"))
    model.close()
    return draft
