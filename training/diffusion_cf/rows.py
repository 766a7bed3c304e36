"""What fit, evaluation and report begin with: pictures of a split, how they are inverted, what the class means are
taken of."""

from __future__ import annotations

from pathlib import Path

from patches.families.base import Base
from patches.families.diffusion import levels
from training.diffusion_cf import domains, judges
from training.diffusion_cf.config import Config
from training.diffusion_cf.domains import Pictures
from training.diffusion_cf.edit import Editor, How
from training.diffusion_cf.find import Bank, bank


def pictures(config: Config, base: Base, split: str, per_class: int) -> Pictures:
    """Pictures of a split at the base's own size."""
    if config.data:
        return domains.folder(Path(config.data), split, base.model.size, per_class)
    got = domains.lab(split, per_class, config.seed, config.domains)
    return Pictures(judges.sized(got.x, base.model.size[0]), got.label, got.sprite, got.classes, got.domains)


def how(config: Config, base: Base) -> How:
    """How this config inverts and regenerates on a base."""
    return How(
        config.method,
        levels(base.model, config.levels),
        config.iterations,
        config.guidance,
        config.against,
        0,
        config.norm,
    )


def learned(config: Config, editor: Editor, base: Base) -> tuple[Pictures, Bank]:
    """Train pictures and their unit conditions."""
    train = pictures(config, base, "train", config.examples)
    return train, bank(editor.vectors(editor.conditions(train.x)), train)
