"""What MLflow loads, serves and evaluates: signature, input example and requirements of every version."""

from __future__ import annotations

import importlib
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from registry import manifest, sources
from registry.manifest import Manifest
from registry.systems import System, system

PYFUNC = Path(__file__).parents[2] / "patches" / "pyfunc.py"
RUNS = ("patches.subject", "patches.pyfunc")
"""modules that run whatever was pushed, beside its own family and mechanism"""
OTHERS = ("registry.store", "training")
"""what a loaded version never imports"""
ENGINES = frozenset({"onnx", "onnxruntime"})
"""imported by services alone, when they are told to; MLflow runs torch"""


def save_pyfunc(sealed: Path, about: Manifest, part: Path, model: Model) -> Path:
    """An MLflow model folder in `part` around a copy of the sealed folder.

    Its code is `patches/pyfunc.py` as text, so nothing is pickled; its columns are those of the family's table.
    """
    row = system(about.system)
    tables = importlib.import_module("patches.families.table")
    table = tables.table(row.family)
    shutil.copytree(sealed, part / "patch")  # MLflow keeps an artifact under its folder's own name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice: type hints, which would drop the parameters
        mlflow.pyfunc.save_model(
            part / "model",
            python_model=str(PYFUNC),
            artifacts={"patch": str(part / "patch")},
            signature=signature(table),
            input_example=tables.example(table),
            pip_requirements=requirements(row, about),
            mlflow_model=model,
        )
    return part / "model"


def signature(table: Any) -> ModelSignature:
    """What a family's table takes and gives, and its parameters with their defaults."""

    def schema(columns: Any) -> Schema:
        return Schema([ColSpec(DataType[c.type], c.name, required=c.required) for c in columns])

    params = [ParamSpec(name, DataType[kind], default) for name, (kind, default) in table.params.items()]
    return ModelSignature(schema(table.takes), schema(table.gives), ParamSchema(params))


def requirements(row: System, about: Manifest) -> list[str]:
    """`name==version` of what a version imports where it is loaded, and of the wheels that carry its base.

    Never patchbay itself: it is on no package index, and whatever else bears that name must not be fetched.
    """
    modules = [*RUNS, *(f"patches.families.{kind}" for kind in dict.fromkeys((row.family, *row.bases.values())))]
    modules += [row.patch.partition(":")[0]] if row.patch else []
    _, others = sources.sources(modules, OTHERS)
    return [*sources.pinned(others - ENGINES), *_wheels(row, about)]


def _wheels(row: System, about: Manifest) -> list[str]:
    """The distributions of bases that come in wheels."""
    refs = (manifest.split_dtype(label.rpartition("@")[0])[0] for label in about.bases.values())
    keys = {ref[5:] for ref in refs if ref.startswith("pypi:")}
    table = importlib.import_module("patches.families.table")
    wheels = {k: v for kind in row.bases.values() for k, v in table.wheels(kind).items()}
    names = sorted({name for key in keys for name in wheels.get(key, ())})
    return [f"{name}=={metadata.version(name)}" for name in names if _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
