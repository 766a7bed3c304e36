"""Online experiments and the ledger's state, as MLflow shows them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, ViewType

from registry import manifest
from registry.errors import ConfigError, PatchbayError
from registry.store import notes
from registry.store.measured import check_sides
from registry.store.mlflow_client import AB, BASE, alive, connected, locked, make_experiment, versions


def begin_experiment(experiment: str, system: str, control: str, treatment: str) -> str | None:
    """An experiment's run, with links to what it compares. Returns why that failed instead of raising."""
    try:
        with connected() as client, locked():
            notes.of_experiment(client, ab_run(client, experiment), experiment, system, (control, treatment))
    except PatchbayError as e:
        return f"MLflow does not show the experiment yet: {e}"
    return None


def log_window(experiment: str, index: int, metrics: Mapping[str, float]) -> bool:
    """One window of an online experiment as step `index` of its run. False if that window is there already."""
    check_sides({"patched": metrics})
    with connected() as client, locked():
        run = ab_run(client, experiment)
        if index <= int(run.data.tags.get("ab.window", "-1")):
            return False
        now = int(time.time() * 1000)
        client.log_batch(run.info.run_id, metrics=[Metric(k, float(v), now, index) for k, v in metrics.items()])
        client.set_tag(run.info.run_id, "ab.window", str(index))
        return True


def log_decision(experiment: str, document: Mapping[str, Any]) -> None:
    """A decision and its evidence, as decisions/<digest16>.json of the experiment's run; the same twice is one file."""
    digest = manifest.digest_of(dict(document))
    with connected() as client, locked():
        run = ab_run(client, experiment)
        client.log_dict(run.info.run_id, dict(document), f"decisions/{digest[:16]}.json")
        client.set_tag(run.info.run_id, "ab.decision", str(document.get("action", ""))[:250])


def show_experiment(experiment: str, figure: Any, evidence: Mapping[str, Any]) -> str | None:
    """The picture and the numbers of an online experiment on its run. Returns why that failed instead of raising."""
    try:
        with connected() as client, locked():
            run = ab_run(client, experiment)
            client.log_figure(run.info.run_id, figure, "figures/effect.png")
            client.log_dict(run.info.run_id, dict(evidence), "evidence.json")
    except PatchbayError as e:
        return f"MLflow does not show it: {e}"
    return None


def mirror(system: str, champion: str, challenger: str | None) -> str | None:
    """Show the ledger's state as MLflow aliases <system>-champion and <system>-challenger, on every base it is on.

    Returns why that failed instead of raising: the ledger has been written, and display may lag behind it.
    """
    try:
        with connected() as client:
            mine = versions(f"tags.`system` = '{system}'")
            bases = versions(f"tags.`patch.kind` = '{BASE}'")
            for name in sorted({v.name for v in mine}):
                has = client.get_registered_model(name).aliases
                for role, digest in (("champion", champion), ("challenger", challenger)):
                    at = [v for v in (bases if digest == BASE else mine) if v.name == name]
                    if digest == BASE:
                        used = {v.tags["base.digest"] for v in mine if v.name == name}
                        at = [v for v in at if v.tags["base.digest"] in used]
                    else:
                        at = [v for v in at if v.tags["patch.digest"] == digest]
                    alias = f"{system}-{role}"
                    if at:
                        client.set_registered_model_alias(name, alias, str(at[0].version))
                    elif alias in has:
                        client.delete_registered_model_alias(name, alias)
            known = {BASE, None, *(v.tags["patch.digest"] for v in mine)}
            if lost := [d for d in (champion, challenger) if d not in known]:
                return (
                    f"sha256:{str(lost[0])[:16]} is live in the ledger but was never pushed, so MLflow shows no alias."
                )
    except PatchbayError as e:
        return f"MLflow's aliases of {system} lag behind the ledger: {e}"
    return None


def ab_run(client: MlflowClient, experiment: str) -> Any:
    at = make_experiment(client, AB)
    if not re.fullmatch(r"[\w.\- ]{1,200}", experiment):
        raise ConfigError(f"Experiment name {experiment[:80]!r}: use letters, digits, spaces and _ . -")
    which = f"tags.`ab.experiment` = '{experiment}'"
    known = client.search_runs([at], which, run_view_type=ViewType.ALL, max_results=1)
    if known:
        return alive(client, known[0].info.run_id)
    run = client.create_run(at, tags={"ab.experiment": experiment}, run_name=experiment)
    client.set_terminated(run.info.run_id)
    return run
