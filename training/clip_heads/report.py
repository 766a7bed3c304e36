"""Full report of clip_heads: the sealed edit beside random heads on test, and each property's heads on each probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from patches.families.clip.direct import Lens
from patches.mechanisms.heads import HeadEdit
from training.clip_heads.config import Config
from training.clip_heads.measure import specificity
from training.clip_heads.silence import silence
from training.evidence import Draft, open_patch
from training.tasks.recognition import Arm, report_arms


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Measure a sealed edit beside random heads on test, and each property's heads on each property's probe.

    Probes: training/lab/probes.py.
    """
    opened = open_patch(folder, config.base, config.device)
    base, patch, lens = opened.base, opened.patch, Lens(opened.base)
    assert isinstance(patch, HeadEdit)
    mean, c = load_file(folder / "means.safetensors")["mean"].to(base.device), patch.config
    arms = {"base": Arm(), "clip_heads": Arm(patch, about=opened.fitted["chosen"])}
    for i, other in enumerate(opened.fitted["random"]):
        arms[f"random {i}"] = Arm(silence(lens, [(a, b) for a, b in other["heads"]], c.mode, c.tokens, mean))
    draft = Draft(opened.about)
    report_arms(base, config, arms.items(), folder, draft)
    if not config.data and not config.pool:
        draft.keep("properties", value=specificity(base, lens, config, folder, mean))
    return draft
