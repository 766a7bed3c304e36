"""Base and patched by the same metrics, through the arm as it is served."""

from __future__ import annotations

import torch
from torch import Tensor

from patches.families.diffusion import Denoising, Edit
from patches.mechanisms.direction import DirectionEdit
from patches.subject import Subject
from registry.measure import Better, Measure
from training.diffusion_cf import judges
from training.diffusion_cf.config import Config
from training.diffusion_cf.domains import Pictures
from training.diffusion_cf.edit import Editor
from training.diffusion_cf.rows import how, pictures

BETTER: dict[str, Better] = {"flip": "higher", "top1": "higher"}


def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, float | Measure]:
    """Test pictures through the arm, each to the other class of its domain: flips and what else changed. The base
    gives pictures back as it inverts them, so its flips are the judges' own mistakes and its change is that of the
    inversion."""
    test = pictures(config, subject.base, "test", config.test_images)
    made = through(subject, config, test, arm)
    asked = judges.lab_judges(test.classes, config.judges) if not config.data else judges.own_judges(config, test)
    got = judges.judged(asked, test, test.partner(), made).summary()
    out: dict[str, float | Measure] = {}
    for name, (value, low, high, n) in got.items():
        kind = "target" if name.startswith(("flip", "top1")) else "offtarget"
        out[f"{kind}/{name}"] = Measure(value, low, high, int(n), BETTER.get(name.split("_")[0], "lower"))
    return out


def through(subject: Subject, config: Config, source: Pictures, arm: str | None, amount: float | None = None) -> Tensor:
    """(n, 3, H, W) what an arm makes of pictures, each row told its own two classes."""
    editor, h = Editor(subject), how(config, subject.base)
    conditions = editor.conditions(source.x)
    start, target = editor.pipe.latents(source.x), source.partner()
    patch = subject.arms.get(arm) if arm is not None else None
    size = amount if amount is not None else patch.config.amount if isinstance(patch, DirectionEdit) else 0.0
    rows = [
        Denoising(
            condition=c, other=c if h.against == "source" else None, guidance=h.guidance, start=x, seed=config.seed + i,
            program=Edit(h.method, h.levels, h.iterations), arm=arm,
            params={"class": torch.tensor([1.0, float(a), float(b), size])},
        )
        for i, (c, x, a, b) in enumerate(zip(conditions, start, source.label.tolist(), target.tolist(), strict=True))
    ]  # fmt: skip
    return torch.stack([r.picture for r in editor.run(rows, "counterfactuals") if r.picture is not None])
