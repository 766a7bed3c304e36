"""What an attack did, as one row of docs/DRILL.md, and the page itself."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "DRILL.md"


@dataclass(frozen=True)
class Row:
    """One attack."""

    attack: str
    n: int
    """how often"""
    held: bool
    """whether everything was as it must be"""
    lost: int | None = None
    """acknowledged things that are gone; None: nothing is acknowledged here"""
    wrong: int | None = None
    """answers of another arm than they say, or than they were asked of"""
    hurt: int | None = None
    """calls of others that failed, or answered otherwise"""
    recover_s: float | None = None
    """until everything answers again; None: it never stopped"""
    note: str = ""
    took_s: float = 0.0

    def line(self) -> str:
        def text(v: float | None) -> str:
            return "-" if v is None else f"{v:.1f}" if isinstance(v, float) else f"{v:,}"

        cells = [self.attack, f"{self.n:,}", text(self.lost), text(self.wrong), text(self.hurt), text(self.recover_s)]
        return "| " + " | ".join([*cells, "held" if self.held else "**BROKE**", self.note]) + " |"


def page(rows: Sequence[Row], form: str, seed: int) -> str:
    """docs/DRILL.md: written by the drill, never by hand."""
    cores, when = torch.get_num_threads(), time.strftime("%Y-%m-%d", time.gmtime())
    return "\n".join(
        [
            "# Drill: what broke it once, tried again",
            "",
            f"Written by `python -m tests.drill --{form} --seed {seed} --write` ({when}, Python "
            f"{platform.python_version()}, torch {torch.__version__}, tiny bases, {cores} threads, "
            f"{sum(r.took_s for r in rows):.0f} s). "
            "`make drill` is the short form, which CI runs; `make drill-night` is the long one, and runs the tests "
            "that are marked slow.",
            "",
            "lost: acknowledged and gone. wrong: answers of another arm than was asked for. hurt: calls of others that "
            "failed or changed. recover: seconds until everything answers again.",
            "",
            "| attack | n | lost | wrong arms | neighbours hurt | recover s | | |",
            "|---|---:|---:|---:|---:|---:|---|---|",
            *(r.line() for r in rows),
            "",
        ]
    )
