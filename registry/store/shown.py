"""Questions: what is in the store, what is known of one artifact, how two of them compare."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient

from registry import systems
from registry.errors import NotFound
from registry.measure import Measure, contrast, unflat
from registry.store.mlflow_client import (
    BASE,
    BETTER,
    NONE,
    alive,
    connected,
    experiment_ids,
    find_run,
    find_version,
    number_of,
    pushed_version,
    ui_url,
    versions,
)


@dataclass(frozen=True)
class Row:
    """One artifact in the store."""

    digest: str
    system: str
    kind: str
    model: str
    """registered model in MLflow"""
    version: int
    """N of `system@N`"""
    mlflow_version: int
    """Version number of the registered model"""
    base: str
    """name@digest; of a search over several, all names and one digest over them"""
    created: float
    """unix seconds"""
    gate: str
    metrics: dict[str, float]
    """Metrics of the artifact, without their intervals"""
    aliases: list[str]


@dataclass(frozen=True)
class Difference:
    """One metric of two artifacts; None where one was not measured."""

    metric: str
    a: Measure | None
    b: Measure | None

    @property
    def difference(self) -> float | None:
        """b - a"""
        return None if self.a is None or self.b is None else self.b.value - self.a.value

    @property
    def better(self) -> str:
        """Which way is better: "higher", "lower", or "" where neither is."""
        return next((m.better for m in (self.b, self.a) if m is not None), "")

    def plain(self) -> dict[str, Any]:
        """For programs."""
        sides = {k: None if m is None else asdict(m) for k, m in (("a", self.a), ("b", self.b))}
        return {"metric": self.metric, **sides, "difference": self.difference, "better": self.better}


@dataclass(frozen=True)
class Comparison:
    """Two artifacts by every metric either has."""

    a: str
    b: str
    rows: list[Difference]
    url: str
    """Address of MLflow's page that shows both runs, opened on the metric that differs most in units of its interval"""
    table_url: str
    """Address of MLflow's page that lists all metrics, parameters and tags of both runs"""


# ---- questions -------------------------------------------------------------------------------------------------


def list_models(system: str | None = None) -> list[Row]:
    """Every artifact in the store, newest first; bases are not artifacts, they are in each row."""
    if system is not None:
        systems.system(system)
    with connected() as client:
        which = f"tags.`system` = '{system}'" if system else f"tags.`patch.kind` != '{BASE}'"
        found = [v for v in versions(which) if "patch.digest" in v.tags]
        metrics = _metrics_of_runs(client)
        aliases: dict[tuple[str, str], list[str]] = {}
        for name in {v.name for v in found}:
            for alias, number in client.get_registered_model(name).aliases.items():
                aliases.setdefault((name, str(number)), []).append(alias)
        rows = [
            Row(
                digest=v.tags["patch.digest"],
                system=v.tags["system"],
                kind=v.tags["patch.kind"],
                model=v.name,
                version=number_of(v),
                mlflow_version=int(v.version),
                base=f"{v.tags['base.name']}@{v.tags['base.digest']}",
                created=v.creation_timestamp / 1000,
                gate=v.tags["gate.status"],
                metrics=metrics.get(v.run_id, {}),
                aliases=sorted(aliases.get((v.name, str(v.version)), [])),
            )
            for v in found
        ]
        return sorted(rows, key=lambda row: (-row.created, row.model, -row.version))


def show(digest: str) -> dict[str, Any]:
    """Everything the store knows of one artifact, as plain JSON, with `lineage`: base, then parents, then itself."""
    with connected() as client:
        version = pushed_version(digest)
        alive(client, version.run_id)
        base_run = find_run(client, digest, BASE)
        files = [file for folder in ("figures", "tables", "bench") for file in files_of(client, version.run_id, folder)]
        return {
            "digest": digest,
            "system": version.tags["system"],
            "kind": version.tags["patch.kind"],
            "model": version.name,
            "version": number_of(version),
            "mlflow_version": int(version.version),
            "created": version.creation_timestamp / 1000,
            "tags": dict(sorted(version.tags.items())),
            "aliases": sorted(client.get_model_version(version.name, version.version).aliases),
            "params": dict(sorted(client.get_run(version.run_id).data.params.items())),
            "metrics": {
                "patched": dict(sorted(client.get_run(version.run_id).data.metrics.items())),
                "base": dict(sorted(base_run.data.metrics.items())) if base_run else {},
            },
            "files": files,
            "lineage": _lineage(version),
            "url": f"{ui_url()}/#/models/{version.name}/versions/{version.version}",
        }


def compare(a: str, b: str, ui: str | None = None) -> Comparison:
    """The metrics of two artifacts, b - a. `a` may be "base": the base of `b`, as it was measured beside b.

    ui: where people open MLflow; by default the tracking server, or port 5000 of this host.
    """
    with connected() as client:
        second = alive(client, pushed_version(b).run_id)
        first = find_run(client, b, BASE) if a == BASE else alive(client, pushed_version(a).run_id)
        if first is None:
            raise NotFound(
                f"The base of sha256:{b[:16]} was not measured. Push the artifact with metrics of both sides."
            )
        x, y = _measures(first), _measures(second)
        rows = [Difference(k, x.get(k), y.get(k)) for k in sorted({*x, *y})]
        runs = json.dumps([first.info.run_id, second.info.run_id])
        experiments = json.dumps(sorted({first.info.experiment_id, second.info.experiment_id}))
        both = f"runs={quote(runs)}&experiments={quote(experiments)}"
        table = f"{ui or ui_url()}/#/compare-runs?{both}"
        return Comparison(a, b, rows, _page(rows, both, ui or ui_url()) or table, table)


def compare_url(digest: str) -> str:
    """MLflow's page of an artifact beside its base (`Comparison.url`); "" if they were not measured side by side."""
    try:
        return compare(BASE, digest).url
    except NotFound:
        return ""


def _measures(run: Any) -> dict[str, Measure]:
    return unflat(run.data.metrics, json.loads(run.data.tags.get(BETTER, "{}")))


def _page(rows: list[Difference], runs: str, ui: str) -> str:
    """MLflow's compare page itself opens on whatever shared metric comes first, so its page of one metric is named,
    which shows the runs as bars, lets any other metric be added, and leads back to the table of all."""
    shared = [(contrast(r.a, r.b), r.metric) for r in rows if r.a is not None and r.b is not None]
    if not shared:
        return ""
    most = max(apart for apart, _ in shared)
    name = next(metric for apart, metric in shared if apart == most)
    one, keys = quote(json.dumps(name), safe=""), quote(json.dumps([name]), safe="")
    layout = quote(json.dumps({"autosize": True}))
    return f"{ui}/#/metric?{runs}&metric={one}&plot_metric_keys={keys}&plot_layout={layout}&x_axis=step"


def _lineage(version: Any) -> list[dict[str, str]]:
    """base -> parents, deepest first -> the artifact; a parent that was never pushed is named by its digest alone."""
    out: dict[str, dict[str, str]] = {}

    def visit(digest: str) -> None:
        if digest in out:
            return
        v = version if digest == version.tags["patch.digest"] else find_version(digest)
        if v is None:
            out[digest] = {"digest": digest, "kind": "unknown", "name": ""}
            return
        if (base := v.tags["base.digest"]) != NONE:
            out.setdefault(base, {"digest": base, "kind": BASE, "name": v.tags["base.name"]})
        for parent in v.tags["parent.digest"].split(","):
            if parent != NONE:
                visit(parent)
        name = f"{v.tags['system']}@{number_of(v)}"
        out[digest] = {"digest": digest, "kind": v.tags["patch.kind"], "name": name}

    visit(version.tags["patch.digest"])
    return list(out.values())


def files_of(client: MlflowClient, run: str, folder: str) -> list[str]:
    out: list[str] = []
    for file in client.list_artifacts(run, folder):
        out += files_of(client, run, file.path) if file.is_dir else [file.path]
    return sorted(out)


def _metrics_of_runs(client: MlflowClient) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    experiments, token, more = experiment_ids(client), None, True
    while more and experiments:
        page = client.search_runs(experiments, "tags.`patch.side` = 'patched'", max_results=1000, page_token=token)
        out |= {r.info.run_id: {k: m.value for k, m in _measures(r).items()} for r in page}
        token, more = page.token, bool(page.token)
    return out
