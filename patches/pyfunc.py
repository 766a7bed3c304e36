"""MLflow models-from-code around PatchedModel: what `mlflow.pyfunc.load_model` runs for a patch we pushed.

Logged as this source file beside the sealed folder, so nothing is pickled. Needs patchbay installed where it is loaded.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Patched(PythonModel):
    """One column of prompts in, one text per prompt out. params: max_tokens, strength (0 is the base)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Verify the sealed folder and put its patch on the base it names."""
        from patches.subject import PatchedModel  # not at the top: MLflow runs this file at push, which needs no torch

        self.model = PatchedModel.load(context.artifacts["patch"], device="cpu")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Greedy answers to the prompts of the first column."""
        prompts = [str(prompt) for prompt in model_input.iloc[:, 0]]
        how = {"max_tokens": 32, "strength": 1.0, **(params or {})}
        return self.model.generate(prompts, max_tokens=int(how["max_tokens"]), strength=float(how["strength"]))


set_model(Patched())
