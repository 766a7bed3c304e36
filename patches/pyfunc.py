"""MLflow models-from-code around a Subject: what `mlflow.pyfunc.load_model` runs for whatever we pushed.

Logged as this source file beside the sealed folder, so nothing is pickled. Needs patchbay installed where it is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Patched(PythonModel):
    """Rows as the family's table says in, one answer per row out; a base without arms answers as it is."""

    def load_context(self, context: PythonModelContext) -> None:
        """Verify the sealed folder and load what it holds on the base it names."""
        # not at the top: MLflow runs this file at push, which needs no torch
        from patches.subject import Subject
        from registry import manifest

        folder = Path(context.artifacts["patch"])
        local = any(label.startswith("local:") for label in manifest.read(folder).bases.values())
        base = os.environ.get("PATCHBAY_BASE") if local else None  # where a base made from a folder lies here
        self.subject = Subject.load(folder, base, os.environ.get("PATCHBAY_DEVICE") or "cpu")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """What the arm says to each row. params: the family's own, such as max_tokens and strength (0 is the base)."""
        return self.subject.predict(model_input, params or {})


set_model(Patched())
