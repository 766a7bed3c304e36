"""README's table of systems, made from the table."""

from __future__ import annotations

from pathlib import Path

from registry.errors import ConfigError
from registry.systems import SYSTEMS
from registry.verbs.said import Says

ROOT = Path(__file__).parents[2]
SEALED = "patches/lab/sealed"
"""where the artifacts lie that ship with their base's name, one folder per system"""


def write_readme() -> Says:
    """README's table of systems between its two marks."""
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text().partition("<!-- systems -->\n")
    _, end, after = rest.partition("<!-- /systems -->")
    if not mark or not end:
        raise ConfigError("README.md has lost its <!-- systems --> marks.")
    readme.write_text(before + mark + readme_table() + end + after)
    return Says("README.md: the table of systems is written.")


def readme_table() -> str:
    """The table of systems as README shows it: one claim a row, with its control and n."""
    lines = [
        "| system | claim | base | patched | control | n | artifact, and how to measure it again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in SYSTEMS.values():
        name = f"`{row.name}` ([{row.paper}](https://arxiv.org/abs/{row.paper}))<br>{row.title}"
        if (c := row.claim) is None:
            lines.append(f"| {name} | {'planned' if row.planned else 'not measured yet'} | | | | | |")
            continue
        metric = c.metric + (f"<br>{c.beside}" if c.beside else "")
        control = f"{c.show(c.control)} ({c.what_control})"
        shipped = (ROOT / SEALED / row.name).is_dir()
        made = f"`patchbay push {SEALED}/{row.name}`" if shipped else f"`patchbay fit {row.name}`, push"
        again = f"`{c.digest}`<br>{made}, then<br>`patchbay eval {row.name}@challenger --full`"
        numbers = f"{c.show(c.base)} | **{c.show(c.patched)}** | {control} | {c.n:,} | {again}"
        lines.append(f"| {name} | {metric} | {numbers} |")
    return "\n".join(lines) + "\n"
