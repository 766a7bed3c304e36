"""Class means from train, the amount from val, sealed as a DirectionEdit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from patches import artifact
from patches.engine.patch import apply
from patches.families.base import Base, load_base
from patches.mechanisms.direction import DirectionConfig, DirectionEdit
from registry.manifest import Manifest, canonical
from training.diffusion_cf.config import Config
from training.diffusion_cf.edit import Editor
from training.diffusion_cf.find import Bank, elsewhere
from training.diffusion_cf.rows import how, learned, pictures
from training.diffusion_cf.tuning import tune
from training.progress import tqdm


def fit(config: Config, folder: Path) -> Manifest:
    """Class means from train, the amount chosen on val by the model's own encoder, sealed as a DirectionEdit."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "diffusion", config.device)
    tuned: dict[str, Tensor] = {}
    if config.tune.steps:
        adapter = tune(config.tune, base, pictures(config, base, "train", config.examples), folder, config.seed)
        for name, (a, b) in adapter.factors.items():
            tuned |= {f"a.denoiser.{name}": a.contiguous(), f"b.denoiser.{name}": b.contiguous()}
    with apply(base.model, {}, root=base.root) as on:
        editor = Editor(_Bare(base, on))
        train, known = learned(config, editor, base)
        means = known.means()
        tried = choose(config, editor, base, known)
    best = chosen(config, tried)
    unit = F.normalize(means, dim=-1)
    pairs = sorted(
        {tuple(sorted((a, int(b)))) for a, b in zip(train.label.tolist(), train.partner().tolist(), strict=True)}
    )
    evidence = {
        "tried": tried, "chosen": best, "classes": list(known.classes), "domains": list(known.domains),
        "examples": [int((known.label == c).sum()) for c in range(len(known.classes))],
        "gaps": [
            {"classes": [known.classes[a], known.classes[b]], "norm": round(float((means[b] - means[a]).norm()), 4),
             "cosine": round(float(unit[a] @ unit[b]), 4)}
            for a, b in pairs
        ],
    }  # fmt: skip
    (folder / "evidence.json").write_bytes(canonical(json.loads(json.dumps(evidence))))
    edit = DirectionEdit(
        DirectionConfig("given.image", known.classes, known.domains, amount=float(best["amount"]), norm=config.norm),
        {"means": means.contiguous(), **tuned},
    )
    return artifact.save(edit, "diffusion_cf", folder, base=base.label)


def chosen(config: Config, tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of `choose` that a config's rule takes."""
    if config.rule == "apart":
        return max(tried, key=lambda row: (round(row["nearer"] - row["control"], 4), -row["amount"]))
    enough = [row for row in tried if row["nearer"] >= config.goal]
    return enough[0] if enough else max(tried, key=lambda row: row["nearer"])


def choose(config: Config, editor: Editor, base: Base, known: Bank) -> list[dict[str, Any]]:
    """What each amount does to val pictures, by the model's own encoder and by how much it changes: ascending amounts.

    nearer: share that lies nearer to the target's mean than to the source's; control: the same of an equal step towards
    a class of another domain.
    """
    val, means = pictures(config, base, "val", config.val_images), known.means()
    conditions = editor.conditions(val.x)
    target, h = val.partner(), how(config, base)
    states = editor.invert(val.x, conditions, h, config.seed)
    d = known.directions(val.label, target)
    other, unit = elsewhere(known, val.label, target, d, config.seed), F.normalize(means, dim=-1)

    def nearer(made: Tensor) -> float:
        e = F.normalize(editor.vectors(editor.conditions(made)), dim=-1)
        return round(float(((e * unit[target]).sum(1) > (e * unit[val.label]).sum(1)).float().mean()), 4)

    rows = []
    for amount in tqdm(sorted(config.amounts), "amounts", disable=None, leave=False):
        made, control = (editor.along(states, conditions, x, amount, h) for x in (d, other))
        l1 = round(float((made - val.x).abs().mean()), 4)
        rows.append({"amount": amount, "nearer": nearer(made), "control": nearer(control), "l1": l1, "n": len(val)})
    return rows


@dataclass(frozen=True)
class _Bare:
    """A base without arms, as a worker wants it."""

    base: Base
    applied: Any
