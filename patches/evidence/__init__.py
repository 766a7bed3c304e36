"""Read and write what lies in a sealed folder beside the patch: evidence of the fit, cards, galleries, label sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from registry import manifest
from registry.errors import Tampered
from registry.manifest import canonical

FILE = "evidence.json"
"""File that says how the artifact was fitted: candidates, the choice, controls on val"""
FORMERLY = "report.json"
"""The same file's name in older artifacts"""


def content(folder: Path, name: str, digest: str | None = None) -> bytes:
    """Return the bytes of a file beside a patch: if sealed those that were hashed, of a draft the current ones.

    folder: the sealed folder, or one within it. digest: the artifact that it must be. Raises Tampered.
    """
    for root in (folder, folder.parent):
        if (root / manifest.NAME).is_file():
            about = manifest.parse(root)
            if digest is not None and about.digest != digest:
                raise Tampered(f"{root} holds another artifact than sha256:{digest[:16]}. Pull it again.")
            return manifest.take(root, about, (folder / name).relative_to(root).as_posix())
    return (folder / name).read_bytes()


def tensors(folder: Path, name: str, digest: str | None = None) -> dict[str, Tensor]:
    """Load a safetensors file beside a patch from the bytes of `content`."""
    found: dict[str, Tensor] = load(content(folder, name, digest))
    return found


def read_evidence(folder: Path) -> dict[str, Any]:
    """Read how the artifact in a verified folder was fitted; {} if it has no evidence."""
    for name in (FILE, FORMERLY):
        if (folder / name).is_file():
            found: dict[str, Any] = json.loads(content(folder, name))
            return found
    return {}


def write_evidence(folder: Path, found: dict[str, Any]) -> None:
    """Write a fit's evidence as canonical JSON, so that the same fit gives the same digest."""
    (folder / FILE).write_bytes(canonical(json.loads(json.dumps(found))))
