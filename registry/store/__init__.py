"""The index of sealed artifacts, on MLflow: what exists, what it is made of, how it measured.

    experiment  patchbay/<base>   one per base: two runs per pushed digest (the artifact, and its base measured beside
                                  it), with the same metric names, so that MLflow's pages show them side by side
    model       <base>            one per base: the base is one version, every artifact made from it another; each can
                                  be loaded, served and evaluated with MLflow alone
    experiment  patchbay/ab       one run per online experiment, one step per window
    experiment  patchbay/sweeps   a run per sweep that seals nothing, a nested run per row

MLflow is index and display only. Identity is the manifest's digest and every pull is checked against it, for MLflow
checks no bytes; who is live is the ledger's, and MLflow's aliases mirror it. Base weights are never copied here.
Where: $MLFLOW_TRACKING_URI, else sqlite in home(). Pushes are serialised per home(); two hosts pushing one digest to
one server at the same instant make two versions, of which everybody then uses the first.
"""

from __future__ import annotations

import logging
import os

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 makes a server that is down cost minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # else a uv.lock in the working directory decides the requirements
}.items():
    os.environ.setdefault(_name, _value)
logging.getLogger("alembic").setLevel(logging.WARNING)

# MLflow reads the variables above when it is imported, which the modules below do
from registry.store.ab_display import (  # noqa: E402
    begin_experiment,
    log_decision,
    log_window,
    mirror,
    show_experiment,
)
from registry.store.measured import (  # noqa: E402
    Sides,
    card_of,
    figures,
    kept_files,
    log_bench,
    log_figures,
    log_file,
    log_forced,
    log_gate,
    measured,
)
from registry.store.mlflow_client import TAGS, UI, page_answers, tracking_uri, ui_url  # noqa: E402
from registry.store.models import Gate, Pushed, pull, push  # noqa: E402
from registry.store.refs import Ref, parse_ref, resolve  # noqa: E402
from registry.store.shown import Comparison, Difference, Row, compare, compare_url, list_models, show  # noqa: E402
from registry.store.sweeps import log_sweep  # noqa: E402

__all__ = [
    "TAGS",
    "UI",
    "Comparison",
    "Difference",
    "Gate",
    "Pushed",
    "Ref",
    "Row",
    "Sides",
    "begin_experiment",
    "card_of",
    "compare",
    "compare_url",
    "figures",
    "kept_files",
    "list_models",
    "log_bench",
    "log_decision",
    "log_figures",
    "log_file",
    "log_forced",
    "log_gate",
    "log_sweep",
    "log_window",
    "measured",
    "mirror",
    "page_answers",
    "parse_ref",
    "pull",
    "push",
    "resolve",
    "show",
    "show_experiment",
    "tracking_uri",
    "ui_url",
]  # fmt: skip
