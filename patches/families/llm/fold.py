"""Fold a patch into a language model's checkpoint in transformers' layout; read it back, check it, seal it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.engine.patch import Patch
from patches.families.base import Base
from patches.families.llm.base import load
from registry import manifest
from registry.errors import PatchError
from registry.manifest import Manifest

PARITY = 1e-5
"""Largest difference of a logit between hooked and folded model, relative to the largest logit (or 1, if that is
larger)"""


def fold(about: Manifest, patch: Patch, base: Base, folder: Path) -> Manifest:
    """Write `base` with `patch` in its weights to `folder` and seal it. Needs the memory of three bases.

    Raises PatchError if the patch has no weight form, or if the written model's logits differ from the hooked one's.
    """
    folded: Any = patch.fold(base.model)
    ids = _probe(base)
    with patch.apply(base.model, root=base.root):
        want = _logits(base, ids)
    folded.save_pretrained(folder)
    base.processor.save_pretrained(folder)
    del folded
    _check_parity(load(f"local-dir:{folder}"), ids, want)
    return manifest.write(
        folder, kind="model", system=about.system, base=about.base, config=about.config, parents=[about.digest]
    )


def _probe(base: Base) -> Tensor:
    """Return probe ids (3, 24): random words, and one of them repeated, for patches that act on repeats only."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.model.config.vocab_size, (3, 24), generator=random)
    ids[2, 4:] = ids[2, 4]
    return ids.to(base.device)


@torch.inference_mode()
def _logits(base: Base, ids: Tensor) -> Tensor:
    out: Tensor = base.model(input_ids=ids).logits.float()
    return out


def _check_parity(written: Base, ids: Tensor, want: Tensor) -> None:
    got = _logits(replace(written, model=written.model.to(ids.device)), ids)
    worst = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
    if not worst <= PARITY:  # written so that NaN fails, too
        raise PatchError(
            f"The folded checkpoint differs from the hooked base by {worst:.1e} of its largest logit; {PARITY:.0e} is "
            "allowed, so it was not written. Serve the patch with hooks."
        )
