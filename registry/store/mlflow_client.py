"""The connection to MLflow, and finding runs, versions and experiments in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from registry import manifest
from registry.errors import ConfigError, NotFound, NotReady, unsecret
from registry.home import home

BASE = "base"
PREFIX = "patchbay/"
AB = PREFIX + "ab"
TAGS = (
    "patch.digest", "patch.kind", "patch.op", "system", "base.digest", "base.name", "parent.digest", "data.digest",
    "code.digest", "model.id", "gate.status", "patchbay.version",
)  # fmt: skip
"""on the version and on the LoggedModel of every artifact; "none" where there is nothing to say"""
NONE = "none"
BETTER = "patchbay.better"
"""tag of a run: JSON, metric -> "higher" or "lower", where one is better"""


_OPENED: set[str] = set()
"""stores this process has reached"""


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home()}/mlflow.db"


def ui_url() -> str:
    uri = unsecret(tracking_uri())
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


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
    known = client.get_experiment_by_name(name)
    if known is not None:
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
    which = f"tags.`patch.digest` = '{digest}' AND tags.`patch.side` = '{side}'"
    return next(iter(client.search_runs(experiment_ids(client), which, order_by=["attributes.start_time ASC"])), None)


def experiment_ids(client: MlflowClient) -> list[str]:
    found = client.search_experiments(filter_string=f"name LIKE '{PREFIX}%'", max_results=1000)
    return [e.experiment_id for e in found if e.name != AB]


def side_of(client: MlflowClient, version: Any, side: str) -> tuple[str, str]:
    """(run, LoggedModel) of an artifact or of its base, as measured beside it."""
    if side == "patched":
        return version.run_id, version.tags["model.id"]
    base = find_base(version.name, version.tags["base.digest"])
    if base is None:
        raise ConfigError(f"{version.tags['system']} was made from no base, so there is no base to log for.")
    experiment = client.get_run(version.run_id).info.experiment_id
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
