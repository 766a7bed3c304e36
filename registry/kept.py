"""Sealed folders on this host, home()/artifacts/<digest>, and where else they are looked for; every byte verified."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from registry import bucket, manifest
from registry.errors import BadArtifact, ConfigError
from registry.home import home, part_prefix, swept


def find(digest: str, carried: Sequence[Path] = ()) -> Path | None:
    """The verified sealed folder of an artifact: one that a Bento carries, else this host's, else the bucket's (then
    it is kept here); None if none of them has it. Raises Tampered for a copy that is not what was sealed."""
    if not manifest.is_digest(digest):
        raise ConfigError(f"{digest[:80]!r} is not a digest of 64 hex digits; resolve the reference first.")
    for folder in carried:
        if manifest.parse(folder).digest == digest:
            return verified(folder, digest)
    folder = home() / "artifacts" / digest
    if folder.is_dir():
        return verified(folder, digest)
    for run in (home() / "runs").glob(f"*-{digest[:16]}"):
        if sealed_digest(run) == digest:
            return keep(run, digest)
    if bucket.address() is None:
        return None
    with part_folder() as part:
        return keep(part / digest, digest) if bucket.get(digest, part / digest) else None


def keep(folder: Path, digest: str) -> Path:
    """home()/artifacts/<digest>, copied from `folder`, verified, then put in place by one rename."""
    return copied(folder, digest, home() / "artifacts" / digest)


def copied(folder: Path, digest: str, place: Path) -> Path:
    """Copy a sealed folder to `place` in the home, verified, then put in place by one rename. Raises Tampered."""
    if not place.is_dir():
        with part_folder() as part:
            shutil.copytree(folder, part / "copy", symlinks=True)
            manifest.read(part / "copy", digest=digest)
            place.parent.mkdir(parents=True, exist_ok=True)
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
