"""Notes with links: how one walks in MLflow's page from an endpoint's digest to the run that was fitted, and back.

digest in an answer's header -> tags.`patch.digest` of a version -> its run (recipe, config, evidence, base)
run -> its version -> aliases (champion, challenger) -> the experiments on users that it took part in, and back
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from registry.store.mlflow_client import BASE, NONE, find_run, find_version, number_of

NOTE = "mlflow.note.content"
"""tag of a run that MLflow's page shows as its description, in Markdown"""
AB = "ab.experiments"
"""tag of a version: names of the experiments on users that it took part in"""
FIT = ("recipe.json", "evidence.json")
MOST = 4 << 20
"""Bytes of a fit's evidence that are shown with the run; more stays with the version's files alone"""


def of_version(client: MlflowClient, version: Any, sealed: Path) -> None:
    """On the run of a new version: where its version, its base's run and its parents are; the fit's recipe and
    evidence as files under fit/."""
    tags, run = version.tags, client.get_run(version.run_id)
    recipe = ""
    for name in FIT:
        file = sealed / name
        if file.is_file() and file.stat().st_size <= MOST:
            client.log_artifact(version.run_id, str(file), "fit")
    if (sealed / FIT[0]).is_file():
        recipe = str(json.loads((sealed / FIT[0]).read_text()).get("recipe", ""))
        client.set_tag(version.run_id, "recipe", recipe)
    lines = [
        f"`{tags['system']}@{number_of(version)}`, sha256:{tags['patch.digest']}",
        f"- recipe: {recipe or 'unknown'}; config under Parameters, what the fit found under Artifacts: fit/",
        f"- version: {link(version)}",
    ]
    for parent in tags["parent.digest"].split(","):
        if parent != NONE and (made := find_version(parent)) is not None:
            lines.append(f"- made from {link(made)}")
    client.set_tag(version.run_id, NOTE, "\n".join(lines))
    about = client.get_model_version(version.name, version.version).description or ""
    text = f"{about}\n\nsha256:{tags['patch.digest']}; fitted and measured in run [{run.info.run_name}]({_run(run)})"
    client.update_model_version(version.name, version.version, text)


def of_base(client: MlflowClient, version: Any) -> None:
    """On the runs of an artifact and of its base, once that was measured beside it: where the other one is."""
    base = find_run(client, version.tags["patch.digest"], BASE)
    if base is None or NOTE in base.data.tags:
        return
    run = client.get_run(version.run_id)
    back = f"The base of {link(version)}, measured beside it: [{run.info.run_name}]({_run(run)})"
    client.set_tag(base.info.run_id, NOTE, back)
    line = f"- its base {version.tags['base.name']}, measured beside it: [{base.info.run_name}]({_run(base)})"
    client.set_tag(run.info.run_id, NOTE, f"{run.data.tags.get(NOTE, '')}\n{line}".strip())


def of_experiment(client: MlflowClient, run: Any, name: str, system: str, arms: Sequence[str]) -> None:
    """On the run of an experiment on users: links to what was compared; on those versions, and their runs, back to it.

    arms: digests of control and treatment, or "base".
    """
    shown = {}
    for role, digest in zip(("control", "treatment"), arms, strict=True):
        client.set_tag(run.info.run_id, f"ab.{role}", digest)
        version = None if digest == BASE else find_version(digest)
        shown[role] = BASE if digest == BASE else link(version) if version is not None else f"sha256:{digest[:16]}"
        if version is not None:
            _mention(client, version, run, name)
    lines = [f"{system}, an experiment on users", *(f"- {role}: {text}" for role, text in shown.items())]
    client.set_tag(run.info.run_id, NOTE, "\n".join(lines))


def _mention(client: MlflowClient, version: Any, run: Any, name: str) -> None:
    known = [n for n in version.tags.get(AB, "").split(",") if n]
    if name in known:
        return
    client.set_model_version_tag(version.name, str(version.version), AB, ",".join([*known, name])[-5000:])
    about = client.get_model_version(version.name, version.version).description or ""
    line = f"- tried on users in [{name}]({_run(run)})"
    client.update_model_version(version.name, version.version, f"{about}\n{line}"[-5000:])
    note = client.get_run(version.run_id).data.tags.get(NOTE, "")
    client.set_tag(version.run_id, NOTE, f"{note}\n{line}"[-5000:])


def link(version: Any) -> str:
    """A version as Markdown that leads to its page."""
    about = f"{version.tags.get('system', '')}@{number_of(version)}"
    return f"[{about} ({version.name}, version {version.version})](#/models/{version.name}/versions/{version.version})"


def _run(run: Any) -> str:
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
