"""Sealed folders on this host: home()/artifacts/<digest>, every byte verified."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry import manifest
from registry.errors import BadArtifact
from registry.home import home, part_prefix, swept


def keep(folder: Path, digest: str) -> Path:
    """home()/artifacts/<digest>, copied from `folder`, verified, then put in place by one rename."""
    place = home() / "artifacts" / digest
    if not place.is_dir():
        with part_folder() as part:
            shutil.copytree(folder, part / "copy", symlinks=True)
            manifest.read(part / "copy", digest=digest)
            with suppress(OSError):  # somebody else was faster; theirs is verified below
                os.rename(part / "copy", place)
    return verified(place, digest)


def verified(place: Path, digest: str) -> Path:
    try:
        manifest.read(place, digest=digest)
    except BadArtifact as e:
        raise type(e)(f"{e} To have it again, delete {place} first.") from None
    return place


@contextmanager
def part_folder() -> Iterator[Path]:
    """A folder on the disk of artifacts/, so that a rename out of it is atomic."""
    with tempfile.TemporaryDirectory(prefix=part_prefix(), dir=swept(home() / "artifacts")) as part:
        yield Path(part)


def sealed_digest(folder: Path) -> str:
    """The digest of a sealed folder, "" if it is not one."""
    try:
        return manifest.read(folder).digest
    except BadArtifact:
        return ""
