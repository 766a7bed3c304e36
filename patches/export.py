"""Fold a patch into a checkpoint that needs none of us, its digest sealed in: a language model without hooks in
transformers' layout, a CLIP's two towers as ONNX graphs.

What is written is read back and must answer as the hooked base does (`PARITY`), so a checkpoint that exists is one that
was checked. A patch whose edits depend on tokens or positions has no weights to be folded into and is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches import artifact
from patches.engine.patch import Patch
from patches.families.base import Base, load_base
from registry import manifest
from registry.errors import Conflict, PatchError, Unsealed
from registry.home import home
from registry.manifest import Manifest
from registry.systems import system

PARITY = 1e-5
"""the largest difference of a logit between hooked and folded, as a part of the largest logit (or of 1, if larger)"""


def export(folder: Path, out: Path | None = None, base: Base | str | None = None) -> Path:
    """Fold the sealed patch in `folder`; the folder of the checkpoint, sealed as a model whose parent is the patch.

    out: default home()/exports/<system>-<digest16>. base: default the one the patch names. The same patch gives the
    same digest. Takes the memory of three bases. Raises PatchError if the patch has no weight form, or if what was
    written does not answer as the hooked base does; Conflict if `out` holds something else.
    """
    about, patch = artifact.load(Path(folder))
    row = system(about.system)
    if row.families[0] not in WRITERS:
        raise PatchError(
            f"{row.name} edits a {' + '.join(row.families)} base; only {', '.join(WRITERS)} bases are exported. "
            f"Serve it with hooks: patchbay serve {row.name}"
        )
    if not isinstance(base, Base):
        base = load_base(base or about.base.rpartition("@")[0], row.families[0])
    manifest.read(Path(folder), digest=about.digest, base=base.digest)
    place = Path(out) if out is not None else home() / "exports" / f"{row.name}-{about.digest[:16]}"
    _check_place(place, about)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=place.parent, prefix=".part-"))
    try:
        made = WRITERS[row.families[0]](about, patch, base, part)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        if not place.exists():
            os.replace(part, place)
        elif manifest.read(place).digest != made.digest:
            raise Conflict(f"{place} was folded from the same patch and is another checkpoint. Delete it first.")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


def _checkpoint(about: Manifest, patch: Patch, base: Base, part: Path) -> Manifest:
    """A language model whose weights are changed."""
    folded: Any = patch.fold(base.model)
    ids = _probe(base)
    with patch.apply(base.model, root=base.root):
        want = _logits(base, ids)
    folded.save_pretrained(part)
    base.processor.save_pretrained(part)
    del folded
    _check_parity(load_base(f"local-dir:{part}", "llm"), ids, want)
    return manifest.write(
        part, kind="model", system=about.system, base=about.base, config=about.config, parents=[about.digest]
    )


def _towers(about: Manifest, patch: Patch, base: Base, part: Path) -> Manifest:
    """Both towers of a CLIP, the patch traced into its graph."""
    from patches.families.clip.towers import export_towers

    return export_towers(base, part, patch, system=about.system, parents=[about.digest])


WRITERS: dict[str, Callable[[Manifest, Patch, Base, Path], Manifest]] = {"llm": _checkpoint, "clip": _towers}
"""family -> what writes and checks"""


def _check_place(place: Path, about: Manifest) -> None:
    """Never write over what somebody else put there."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        mine = manifest.read(place).parents == [about.digest]
    except Unsealed:
        mine = False
    if not mine:
        raise Conflict(f"{place} exists and is not an export of sha256:{about.digest[:16]}. Name another --out.")


def _probe(base: Base) -> Tensor:
    """(3, 24) ids: words at random, and one of them repeated, for patches that only repeats wake."""
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
    if not worst <= PARITY:  # also if it is NaN
        raise PatchError(
            f"The folded checkpoint differs from the hooked base by {worst:.1e} of its largest logit; {PARITY:.0e} is "
            "allowed, so it was not written. Serve the patch with hooks."
        )
