"""Sweeps: one run per row of a comparison that seals nothing, under one run that holds its figures and files.

experiment  patchbay/sweeps   a run per sweep, a nested run per row, all rows with the same metric names, so that
                              MLflow's table of runs is the table of the sweep
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from registry import manifest
from registry.errors import ConfigError
from registry.measure import Metrics, flat
from registry.store.measured import check_sides
from registry.store.mlflow_client import PREFIX, connected, locked, make_experiment, ui_url

SWEEPS = PREFIX + "sweeps"


def log_sweep(
    system: str, rows: Mapping[str, Metrics], params: Mapping[str, Any], figures: Mapping[str, Any] | None = None,
    files: Mapping[str, Path] | None = None,
) -> str:  # fmt: skip
    """Log a sweep of a system; the address of its page.

    rows: row -> its metrics. The same rows and params are logged once, whoever asks again. Raises ConfigError for no
    rows, and for what `check_sides` refuses.
    """
    if not rows:
        raise ConfigError("A sweep without rows has nothing to log. Run some of it first.")
    for metrics in rows.values():
        check_sides({"patched": metrics})
    known = {row: flat(metrics) for row, metrics in rows.items()}
    digest = manifest.digest_of({"system": system, "rows": known, "params": {k: str(v) for k, v in params.items()}})
    with connected() as client, locked():
        experiment = make_experiment(client, SWEEPS)
        found = client.search_runs([experiment], f"tags.`sweep.digest` = '{digest}'", max_results=1)
        if found:
            return f"{ui_url()}/#/experiments/{experiment}/runs/{found[0].info.run_id}"
        tags = {"system": system, "sweep.digest": digest}
        parent = client.create_run(experiment, tags=tags, run_name=f"{system}-{digest[:8]}").info.run_id
        now = int(time.time() * 1000)
        given = [Param(k, str(v)[:500]) for k, v in params.items()]
        client.log_batch(parent, params=given)
        for row, numbers in known.items():
            about = {"system": system, "row": row, MLFLOW_PARENT_RUN_ID: parent}
            run = client.create_run(experiment, run_name=row, tags=about).info.run_id
            client.log_batch(run, metrics=[Metric(k, v, now, 0) for k, v in numbers.items()], params=given)
            client.set_terminated(run)
        for name, figure in (figures or {}).items():
            client.log_figure(parent, figure, f"figures/{name}.png")
        for name, file in (files or {}).items():
            client.log_artifact(parent, str(file), name)
        client.set_terminated(parent)
    return f"{ui_url()}/#/experiments/{experiment}/runs/{parent}"
