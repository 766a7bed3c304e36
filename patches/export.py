"""Fold a patch into a checkpoint that needs none of us, its digest sealed in; in which layout, its family says.

What is written is read back and must answer as the hooked base does (`PARITY`), so a checkpoint that exists is one that
was checked. A patch whose edits depend on tokens or positions has no weights to be folded into and is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from patches import artifact
from patches.families.base import Base, load_base
from patches.families.family import family
from registry import manifest
from registry.errors import Conflict, PatchError, Unsealed
from registry.home import home, part_prefix, swept
from registry.manifest import Manifest
from registry.systems import system


def export(folder: Path, out: Path | None = None, base: Base | str | None = None) -> Path:
    """Fold the sealed patch in `folder`; the folder of the checkpoint, sealed as a model whose parent is the patch.

    out: default home()/exports/<system>-<digest16>. base: default the one the patch names. The same patch gives the
    same digest. Takes the memory of three bases. Raises PatchError if the patch has no weight form, or if what was
    written does not answer as the hooked base does; Conflict if `out` holds something else.
    """
    about = manifest.read(Path(folder))
    row = system(about.system)
    if about.kind != "patch":
        raise PatchError(
            f"sha256:{about.digest[:16]} is a {about.kind} of {row.name}: there is no patch to fold into its base. "
            f"Serve it as it is: patchbay serve {row.name}"
        )
    _, patch = artifact.load(Path(folder))
    fold = family(row.family).fold
    if fold is None:
        raise PatchError(f"No {row.family} base is exported. Serve it with hooks: patchbay serve {row.name}")
    if not isinstance(base, Base):
        base = load_base(base or about.base.rpartition("@")[0], row.family)
    manifest.read(Path(folder), digest=about.digest, base=base.digest)
    place = Path(out) if out is not None else home() / "exports" / f"{row.name}-{about.digest[:16]}"
    _check_place(place, about)
    part = Path(tempfile.mkdtemp(dir=swept(place.parent), prefix=part_prefix()))
    try:
        made = fold(about, patch, base, part)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        if not place.exists():
            os.replace(part, place)
        elif manifest.read(place).digest != made.digest:
            raise Conflict(f"{place} was folded from the same patch and is another checkpoint. Delete it first.")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


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
