"""What `patchbay fit` offers: recipes of every system and the keys of its config, read from source without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from registry.errors import NotFound, nearest
from registry.systems import SYSTEMS, System, system

ROOT = Path(__file__).parent.parent
USUAL = ("lab", "smollm", "tiny")
"""recipes that are taken where none is named: the first of these that a system has"""


@dataclass(frozen=True)
class Offer:
    """A system's recipes and keys."""

    recipes: Mapping[str, str]
    """name -> what the job's documentation says of it: what it makes, and how long that takes"""
    keys: Mapping[str, str]
    """name -> type and default, as they stand in the source"""

    @property
    def default(self) -> str:
        """The recipe that is taken where none is named."""
        return next((k for k in USUAL if k in self.recipes), next(iter(self.recipes)))


@cache
def offer(name: str) -> Offer:
    """What system `name` offers. Raises NotFound while it is planned."""
    row = system(name)
    folder = ROOT / row.job.replace(".", "/")
    if row.planned:
        raise NotFound(f"{name} is planned: its job {row.job} is not written yet. See `patchbay systems`.")
    if not folder.is_dir():  # a job from elsewhere
        return Offer(dict.fromkeys(row.load_job().RECIPES, ""), {})
    about = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    tree = ast.parse((folder / "config.py").read_text())
    recipes: list[object] = []
    keys: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    default = f" = {ast.unparse(field.value)}" if field.value is not None else ""
                    keys[field.target.id] = f"{ast.unparse(field.annotation)}{default}"
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "RECIPES"
            and isinstance(node.value, ast.Dict)
        ):
            recipes = [k.value for k in node.value.keys if isinstance(k, ast.Constant)]
    return Offer({str(k): said(about, name, str(k)) for k in recipes}, keys)


def said(about: str, name: str, key: str) -> str:
    """What a job's documentation says after `patchbay fit name/key ... #`; "" for nothing."""
    found = re.search(rf"patchbay fit {name}/{key}\b[^#\n]*#\s*(.+)", about)
    return found[1].strip() if found else ""


def split(name: str) -> tuple[System, str, bool]:
    """`system/recipe`, or `system` alone -> its row, the recipe, whether it was named. Raises NotFound listing what
    there is, the nearest first."""
    which, slash, key = name.partition("/")
    row, there = system(which), offer(which)
    if slash and key not in there.recipes:
        raise NotFound(f"{which} has no recipe {key[:60]!r}. Recipes: {nearest(key, there.recipes)}.")
    return row, key or there.default, bool(key)


def listed(name: str = "") -> str:
    """For people: every system's recipes; of one system also its keys."""
    lines = []
    for which in [name] if name else [n for n, row in SYSTEMS.items() if not row.planned]:
        there = offer(which)
        lines.append(f"{which}  (without a recipe: {there.default})")
        lines += [f"  {which}/{key:14}{text}".rstrip() for key, text in there.recipes.items()]
        if name:
            lines += ["keys, as key=value:", *(f"  {key}: {text}" for key, text in there.keys.items())]
    if not name:
        lines.append("keys of one system: patchbay fit SYSTEM --help")
    return "\n".join(lines)
