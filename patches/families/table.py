"""What MLflow's pyfunc takes and gives, family by family. Importing this, or a family's table, costs no torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Column:
    """One column of the table that MLflow's pyfunc takes or gives."""

    name: str
    type: Literal["string", "binary", "double", "long", "boolean"]
    example: Any
    """None: left out of the input example, which base and patched alike must be able to answer"""
    required: bool = True


@dataclass(frozen=True)
class Table:
    """What MLflow's pyfunc takes and gives: the signature, its parameters and an input example."""

    takes: tuple[Column, ...]
    gives: tuple[Column, ...]
    params: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """name -> (type, default)"""


def example(about: Table) -> Any:
    """The input example: a DataFrame of one row."""
    import pandas as pd

    return pd.DataFrame({c.name: [c.example] for c in about.takes if c.example is not None})


def table(family: str) -> Table:
    """The table of a family. One that has a `table.py` with TABLE is read without its package, which imports torch."""
    module = _module(family)
    found: Table = module.TABLE if module else _family(family).table
    return found


def wheels(family: str) -> Mapping[str, tuple[str, ...]]:
    """`Family.wheels`: pypi:<key> references -> distributions; WHEELS of its `table.py` where there is one."""
    module = _module(family)
    found: Mapping[str, tuple[str, ...]] = getattr(module, "WHEELS", {}) if module else _family(family).wheels
    return found


@cache
def _module(family: str) -> ModuleType | None:
    file = HERE / family / "table.py"
    spec = importlib.util.spec_from_file_location(f"_table_of_{family}", file) if file.is_file() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _family(name: str) -> Any:
    return importlib.import_module("patches.families.family").family(name)
