"""The connection to MLflow, and finding runs, versions and experiments in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from registry import manifest
from registry.errors import ConfigError, NotFound, NotReady, unsecret
from registry.home import home

log = logging.getLogger("patchbay")

ACTIVE = LifecycleStage.ACTIVE
BASE = "base"
PREFIX = "patchbay/"
AB = PREFIX + "ab"
TAGS = (
    "patch.digest", "patch.kind", "patch.op", "system", "base.digest", "base.name", "parent.digest", "data.digest",
    "code.digest", "model.id", "gate.status", "patchbay.version",
)  # fmt: skip
"""on the version and on the LoggedModel of every artifact; "none" where there is nothing to say"""
NONE = "none"
UI = "ui.json"
"""file in home() where `patchbay ui` writes its address while it runs"""
BETTER = "patchbay.better"
"""tag of a run: JSON, metric -> "higher" or "lower", where one is better"""


_OPENED: set[str] = set()
"""stores this process has reached"""


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home()}/mlflow.db"


def ui_url() -> str:
    """Where people open MLflow: the tracking server; else the page that `patchbay ui` started, or would start."""
    uri = unsecret(tracking_uri())
    if uri.startswith("http"):
        return uri.rstrip("/")
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((home() / UI).read_text())["url"])
    return "http://127.0.0.1:5000"


def page_answers() -> bool:
    """Whether MLflow's page is there for a browser: a tracking server, or what `patchbay ui` started on this home."""
    if tracking_uri().startswith("http"):
        return True
    if not (home() / UI).is_file():
        return False
    try:
        with urllib.request.urlopen(f"{ui_url()}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


@contextmanager
def connected() -> Iterator[MlflowClient]:
    """A client of the store; what MLflow raises inside the block comes out as one of our errors."""
    uri = tracking_uri()
    try:
        # process-wide, because MLflow's sqlite registry looks LoggedModels up in the global store
        mlflow.set_tracking_uri(uri)
        if uri not in _OPENED:
            with locked():  # MLflow makes a new database table by table, and two processes at once break it
                MlflowClient(uri).search_experiments(max_results=1)
            _OPENED.add(uri)
        yield MlflowClient(uri)
    except SQLAlchemyError as e:
        raise NotReady(f"MLflow's database {unsecret(uri)} failed: {str(e).partition(chr(10))[0][:300]}") from None
    except MlflowException as e:
        text = str(e).partition("\n")[0][:300]
        if e.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise NotFound(f"MLflow at {unsecret(uri)} does not have it: {text}") from None
        if e.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise ConfigError(f"MLflow refused: {text}") from None
        raise NotReady(f"MLflow at {unsecret(uri)} failed: {text} Check MLFLOW_TRACKING_URI and the server.") from None


@contextmanager
def locked() -> Iterator[None]:
    """One writer per home(): find-or-create is not atomic in MLflow."""
    with (home() / "store.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def make_experiment(client: MlflowClient, name: str) -> str:
    """The experiment of that name, made the first time; one that was deleted in MLflow's page is restored."""
    known = client.get_experiment_by_name(name)
    if known is not None:
        if known.lifecycle_stage != ACTIVE:
            client.restore_experiment(known.experiment_id)
            log.warning("MLflow's experiment %s had been deleted; it is restored.", name)
        return str(known.experiment_id)
    local = None if tracking_uri().startswith("http") else (home() / "mlartifacts" / name.replace("/", "-")).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=local))
    except MlflowException:
        made = client.get_experiment_by_name(name)  # another process may have been faster
        if made is None:
            raise
        return str(made.experiment_id)


def make_run(client: MlflowClient, experiment: str, tags: Mapping[str, str], side: str) -> str:
    """The run of an artifact's side, made the first time."""
    known = find_run(client, tags["patch.digest"], side)
    if known is not None:
        return str(known.info.run_id)
    label = f"{tags['system']}-{tags['patch.digest'][:8]}"
    run = client.create_run(
        experiment,
        tags={k: tags[k] for k in ("patch.digest", "system", "base.digest")} | {"patch.side": side},
        run_name=label if side == "patched" else f"base of {label}",
    )
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def find_run(client: MlflowClient, digest: str, side: str) -> Any:
    """The run of an artifact's side; one that was deleted in MLflow's page is restored."""
    which = f"tags.`patch.digest` = '{digest}' AND tags.`patch.side` = '{side}'"
    found = client.search_runs(
        experiment_ids(client, ViewType.ALL), which, run_view_type=ViewType.ALL, order_by=["attributes.start_time ASC"]
    )
    return alive(client, found[0].info.run_id) if found else None


def alive(client: MlflowClient, run_id: str) -> Any:
    """The run, restored if it or its experiment was deleted in MLflow's page. What is gone for good is not found."""
    run = client.get_run(run_id)
    if run.info.lifecycle_stage == ACTIVE and client.get_experiment(run.info.experiment_id).lifecycle_stage == ACTIVE:
        return run
    make_experiment(client, client.get_experiment(run.info.experiment_id).name)
    if client.get_run(run_id).info.lifecycle_stage != ACTIVE:
        client.restore_run(run_id)
    log.warning("MLflow's run %s (%s) had been deleted; it is restored.", run.info.run_name, run_id)
    return client.get_run(run_id)


def experiment_ids(client: MlflowClient, which: int = ViewType.ACTIVE_ONLY) -> list[str]:
    found = client.search_experiments(which, filter_string=f"name LIKE '{PREFIX}%'", max_results=1000)
    return [e.experiment_id for e in found if e.name != AB]


def side_of(client: MlflowClient, version: Any, side: str) -> tuple[str, str]:
    """(run, LoggedModel) of an artifact or of its base, as measured beside it."""
    experiment = alive(client, version.run_id).info.experiment_id
    if side == "patched":
        return version.run_id, version.tags["model.id"]
    base = find_base(version.name, version.tags["base.digest"])
    if base is None and version.tags["base.digest"] != NONE:
        raise NotFound(
            f"The base's version of {version.name} was deleted in MLflow. Push the artifact again, which makes it: "
            f"patchbay pull sha256:{version.tags['patch.digest'][:16]}, then patchbay push on the folder it names."
        )
    if base is None:
        raise ConfigError(f"{version.tags['system']} was made from no base, so there is no base to log for.")
    return make_run(client, experiment, version.tags, BASE), base.tags["model.id"]


def versions(which: str) -> list[Any]:
    """Model versions, oldest first."""
    with connected() as client:
        found: list[Any] = []
        token = None
        while True:
            page = client.search_model_versions(which, max_results=1000, page_token=token)
            found += page
            if not (token := page.token):
                return sorted(found, key=lambda v: (v.creation_timestamp, v.name, int(v.version)))


def find_version(digest: str) -> Any:
    if not manifest.is_digest(digest):
        raise ConfigError(f"{digest[:80]!r} is not a digest of 64 hex digits; resolve the reference first.")
    return next(iter(versions(f"tags.`patch.digest` = '{digest}'")), None)


def find_base(name: str, digest: str) -> Any:
    which = f"name = '{name}' AND tags.`base.digest` = '{digest}' AND tags.`patch.kind` = '{BASE}'"
    return next(iter(versions(which)), None)


def number_of(version: Any) -> int:
    """N of `system@N`: counted per system. Versions from before the count have MLflow's number, one per base."""
    counted = version.tags.get("patchbay.version", NONE)
    return int(version.version if counted == NONE else counted)


def pushed_version(digest: str) -> Any:
    version = find_version(digest)
    if version is None:
        raise NotFound(f"sha256:{digest[:16]} is not in MLflow. Push its folder: `patchbay push FOLDER`.")
    return version


def set_tags(client: MlflowClient, version: Any, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.version), key, value)
    client.set_logged_model_tags(version.tags["model.id"], dict(tags))
