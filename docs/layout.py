"""The tree of modules as docs/architecture.md shows it: `python docs/layout.py` writes it there, a test compares."""

from __future__ import annotations

import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
OPEN, CLOSE = "<!-- layout -->\n```\n", "```\n<!-- /layout -->"
PACKAGES = ("registry", "patches", "training", "bentos")
WIDTH = 31


def layout() -> str:
    """One line a folder (more where it is long): its path, then the modules in it."""
    lines = []
    for package in PACKAGES:
        folders = {f.parent for f in (ROOT / package).rglob("*.py")}
        for folder in sorted(folders):
            names = sorted(f.stem for f in folder.glob("*.py") if f.stem != "__init__")
            where = f"{folder.relative_to(ROOT)}/"
            text = textwrap.wrap(" ".join(names), 118 - WIDTH) or [""]
            lines += [f"{where if i == 0 else '':{WIDTH}}{part}".rstrip() for i, part in enumerate(text)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the block between its marks."""
    before, _, rest = PAGE.read_text().partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    PAGE.write_text(before + OPEN + layout() + CLOSE + after)


if __name__ == "__main__":
    main()
