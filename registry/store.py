"""The index of sealed artifacts, on MLflow: what exists, what it is made of, how it measured.   (INTERFACE, body follows)

MLflow is index and display. Identity is the manifest's digest, the live arm is the ledger's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from registry.ledger import Ledger

Gate = Literal["pending", "passed", "failed"]
Sides = Mapping[str, Mapping[str, float]]
"""{"base": {metric: value}, "patched": {metric: value}}, both with the same names; "patched" alone where there is no base"""


@dataclass(frozen=True)
class Ref:
    """A parsed reference: a system and which of its artifacts, or a digest (prefix), or a sealed folder."""

    system: str = ""
    which: str = ""
    """champion | challenger | base | a version number"""
    digest: str = ""
    """64 hex digits or a prefix of at least 8"""
    folder: Path | None = None


@dataclass(frozen=True)
class Pushed:
    digest: str
    version: int
    model_id: str
    run_id: str
    url: str


@dataclass(frozen=True)
class Row:
    digest: str
    system: str
    kind: str
    model: str
    version: int
    base: str
    """name@digest"""
    created: float
    gate: str
    metrics: dict[str, float]
    aliases: list[str]


@dataclass(frozen=True)
class Difference:
    metric: str
    a: float | None
    b: float | None
    difference: float | None
    """b - a"""


@dataclass(frozen=True)
class Comparison:
    a: str
    b: str
    rows: list[Difference]
    url: str


def parse_ref(text: str) -> Ref: ...
def resolve(ref: str | Ref, ledger: Ledger | None = None) -> str: ...
def push(folder: Path, *, metrics: Sides | None = None, dataset: tuple[str, str] | None = None,
         figures: Mapping[str, Any] | None = None, base_figures: Mapping[str, Any] | None = None,
         tables: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None,
         gate: Gate | None = None, source: str = "") -> Pushed: ...
def pull(digest: str) -> Path: ...
def list_models(system: str | None = None) -> list[Row]: ...
def show(digest: str) -> dict[str, Any]: ...
def log_bench(digest: str, results: Sides, file: Path | None = None) -> None: ...
def log_figures(digest: str, figures: Mapping[str, Any], base_figures: Mapping[str, Any] | None = None) -> None: ...
def log_window(experiment: str, index: int, metrics: Mapping[str, float]) -> None: ...
def log_decision(experiment: str, document: Mapping[str, Any]) -> None: ...
def compare(a: str, b: str, ui: str = "http://127.0.0.1:5000") -> Comparison: ...
def mirror(system: str, champion: str, challenger: str | None) -> str | None: ...
