"""The full report: the sealed edit on test beside random heads."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tqdm import tqdm

from patches import artifact
from patches.families.base import load_base
from patches.families.clip.direct import Lens
from patches.mechanisms.heads import HeadEdit
from registry import config as configs
from training.clip_heads.config import Config
from training.clip_heads.measure import specificity
from training.clip_heads.silence import silence
from training.tasks.intervals import wilson
from training.tasks.recognition import (
    ask,
    classifier,
    outcomes,
    pictures,
)


def report(folder: Path, out: Path) -> dict[str, Any]:
    """A sealed edit on test beside random heads, and what taking away each property's heads does to each property's own
    question (training/lab/probes.py), beside random heads. docs/LOG.md's tables. Writes JSON as it goes."""
    sealed = json.loads((folder / "recipe.json").read_text())
    config = configs.parse(Config, sealed["config"])
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    lens = Lens(base)
    sealed_as, patch = artifact.load(folder, base=base.digest, device=base.device)
    assert isinstance(patch, HeadEdit)
    fitted = json.loads((folder / "report.json").read_text())
    mean = load_file(folder / "means.safetensors")["mean"].to(base.device)
    c = patch.config
    arms: dict[str, HeadEdit | None] = {"base": None, "clip_heads": patch}
    for i, other in enumerate(fitted["random"]):
        arms[f"random {i}"] = silence(lens, [(a, b) for a, b in other["heads"]], c.mode, c.tokens, mean)
    results: dict[str, Any] = {
        "digest": sealed_as.digest,
        "recipe": sealed["recipe"],
        "chosen": fitted["chosen"],
        "arms": {},
    }
    splits = ["test", *([] if config.data else ["held"])]
    sets = {split: pictures(config, split, config.test_images) for split in splits}
    by = {split: classifier(base, config, s["clean"], folder=folder) for split, s in sets.items()}
    for name, arm in tqdm(arms.items(), "arms", disable=None):
        row: dict[str, Any] = {}
        for split in splits:
            with arm.apply(base.model, root=base.root) if arm else nullcontext():
                said = {k: ask(base, config, d, by[split]) for k, d in sets[split].items()}
            row[split] = {k: wilson(v) for k, v in outcomes(config, said).items()}
            if "average" in row[split]:
                row[split]["worst_group"] = min(v for k, v in row[split].items() if k != "average")
        results["arms"][name] = row
        out.write_text(json.dumps(results, indent=1))
        tqdm.write(f"{name}: {json.dumps(row)}")
    if not config.data and not config.pool:
        results["properties"] = specificity(base, lens, config, folder, mean)
        out.write_text(json.dumps(results, indent=1))
    return results
