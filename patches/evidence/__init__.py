"""What lies in a sealed folder beside the patch: how it was chosen and what it was chosen from."""

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
"""how the artifact was fitted: candidates, the choice, controls on val"""
FORMERLY = "report.json"
"""the same file in artifacts sealed before it got its name"""


def content(folder: Path, name: str, digest: str | None = None) -> bytes:
    """Bytes of a file that lies beside a patch: of a sealed folder those that were hashed, of a draft as they are.

    folder: the sealed folder, or one within it. digest: the artifact it must be. Raises Tampered.
    """
    for root in (folder, folder.parent):
        if (root / manifest.NAME).is_file():
            about = manifest.parse(root)
            if digest is not None and about.digest != digest:
                raise Tampered(f"{root} holds another artifact than sha256:{digest[:16]}. Pull it again.")
            return manifest.take(root, about, (folder / name).relative_to(root).as_posix())
    return (folder / name).read_bytes()


def tensors(folder: Path, name: str, digest: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file beside a patch, from the bytes of `content`."""
    found: dict[str, Tensor] = load(content(folder, name, digest))
    return found


def read_evidence(folder: Path) -> dict[str, Any]:
    """How the artifact in a verified folder was fitted; {} if it says nothing of it."""
    for name in (FILE, FORMERLY):
        if (folder / name).is_file():
            found: dict[str, Any] = json.loads(content(folder, name))
            return found
    return {}


def write_evidence(folder: Path, found: dict[str, Any]) -> None:
    """Keep what a fit found, in canonical JSON, so that the same fit gives the same digest."""
    (folder / FILE).write_bytes(canonical(json.loads(json.dumps(found))))
