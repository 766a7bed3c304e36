"""What lies in a sealed folder beside the patch: how it was chosen and what it was chosen from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.manifest import canonical

FILE = "evidence.json"
"""how the artifact was fitted: candidates, the choice, controls on val"""
FORMERLY = "report.json"
"""the same file in artifacts sealed before it got its name"""


def read_evidence(folder: Path) -> dict[str, Any]:
    """How the artifact in a verified folder was fitted; {} if it says nothing of it."""
    for name in (FILE, FORMERLY):
        if (folder / name).is_file():
            found: dict[str, Any] = json.loads((folder / name).read_text())
            return found
    return {}


def write_evidence(folder: Path, found: dict[str, Any]) -> None:
    """Keep what a fit found, in canonical JSON, so that the same fit gives the same digest."""
    (folder / FILE).write_bytes(canonical(json.loads(json.dumps(found))))
