"""Where patchbay keeps things: `$PATCHBAY_HOME`, else `.patchbay` in the working directory.

    runs/       sealed folders made by fit, one per artifact, named system-digest16
    artifacts/  sealed folders pulled from the store, named by digest
    exports/    checkpoints with a patch folded in
    bentos/     Dockerfile, Kubernetes manifests and contents of each Bento; the Bento itself is in BentoML's store
    mlflow.db   MLflow's default back end, with mlartifacts/ beside it
    ledger.db   who is champion, who challenges, since when
    events.db   exposures and outcomes of experiments

Converted bases are large and the same for everyone, so they live in the user's cache:
`$PATCHBAY_CACHE`, else `~/.cache/patchbay`.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of this deployment, made if missing."""
    path = Path(os.environ.get("PATCHBAY_HOME") or ".patchbay").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def cache() -> Path:
    """The folder of converted bases, made if missing."""
    path = Path(os.environ.get("PATCHBAY_CACHE") or Path.home() / ".cache" / "patchbay").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path
