"""Push and pull: sealed folders into MLflow and back, every byte verified."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Param
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from registry import bucket, manifest, systems
from registry.errors import BadArtifact, NotFound, Tampered
from registry.home import home
from registry.kept import find, keep, part_folder
from registry.manifest import Manifest
from registry.sources import ROOT, sources
from registry.store import notes
from registry.store.measured import Sides, check_sides, log_card, log_images, log_metrics
from registry.store.mlflow_client import (
    BASE,
    NONE,
    PREFIX,
    TAGS,
    alive,
    connected,
    find_base,
    find_version,
    locked,
    make_experiment,
    make_run,
    number_of,
    set_tags,
    tracking_uri,
    ui_url,
    versions,
)
from registry.store.pyfuncs import save_pyfunc

Gate = Literal["pending", "passed", "failed"]
MLMODEL = "patchbay.mlmodel"
"""tag of a base's version that MLflow can load; those that the first releases made cannot be"""


@dataclass(frozen=True)
class Pushed:
    """Where an artifact is in MLflow."""

    digest: str
    version: int
    """N of `system@N`"""
    model_id: str
    run_id: str
    url: str
    """Address of the version's page"""


# ---- push and pull ---------------------------------------------------------------------------------------------


def push(
    folder: Path,
    *,
    metrics: Sides | None = None,
    dataset: tuple[str, str] | None = None,
    figures: Mapping[str, Any] | None = None,
    base_figures: Mapping[str, Any] | None = None,
    tables: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    gate: Gate | None = None,
) -> Pushed:
    """Verify a sealed folder and put it in the store; the same digest again is the same version.

    dataset: (name, digest) the metrics were measured on. figures: name -> matplotlib Figure or image file; those of
    the base under the same names show beside them. tables: name -> columns or a DataFrame. A second push adds what it
    brings; gate None leaves the status as it is ("pending" at first). Raises ConfigError before anything is written
    for a metric that is not finite or that only one side has.
    """
    about = manifest.read(Path(folder))
    check_sides(metrics or {})
    bucket.put(keep(Path(folder), about.digest), about.digest)
    with connected() as client, locked():
        version = find_version(about.digest) or _create(client, about, dataset, params)
        _restore(client, version, about)
        _renew(client, version, about)
        if gate is not None:
            set_tags(client, version, {"gate.status": gate})
        if dataset is not None:
            set_tags(client, version, {"data.digest": dataset[1]})
        log_metrics(client, version, metrics or {}, dataset)
        notes.of_base(client, version)
        if params:
            client.log_batch(version.run_id, params=as_params(params))
        log_images(client, version, figures, base_figures)
        for name, table in (tables or {}).items():
            columns = {k: list(v) for k, v in table.items()} if isinstance(table, Mapping) else table
            client.log_table(version.run_id, columns, f"tables/{name}.json")
        log_card(client, version, home() / "artifacts" / about.digest)
        url = f"{ui_url()}/#/models/{version.name}/versions/{version.version}"
        return Pushed(about.digest, number_of(version), version.tags["model.id"], version.run_id, url)


def pull(digest: str) -> Path:
    """home()/artifacts/<digest>, every byte verified. MLflow is asked only if this host and the bucket lack it."""
    found = find(digest)
    if found is not None:
        return found
    with connected():
        version = find_version(digest)
        if version is None:
            raise NotFound(f"No artifact sha256:{digest[:16]} here or in MLflow. `patchbay list` shows what there is.")
        with part_folder() as part:
            uri = f"models:/{version.tags['model.id']}"
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(part), tracking_uri=tracking_uri())
            try:
                return keep(part / "artifacts" / "patch", digest)
            except BadArtifact as e:
                raise Tampered(
                    f"MLflow's copy of sha256:{digest[:16]} ({uri}) is not what was pushed: {e} "
                    f"Restore it from a back-up, or copy artifacts/{digest[:16]}... from a host that has it."
                ) from None


def _create(
    client: MlflowClient, about: Manifest, dataset: tuple[str, str] | None, params: Mapping[str, Any] | None
) -> Any:
    """Runs, LoggedModel, files, and last the version: a push that died half-way leaves nothing that is found."""
    name = model_name(about)
    experiment = make_experiment(client, PREFIX + name)
    described = _flat(about.config, "config.")
    tags = _tags(about, dataset)
    run = make_run(client, experiment, tags, "patched")
    if about.bases:
        _provide_base(client, experiment, name, about, tags)
    client.log_batch(run, params=as_params(described))
    number = 1 + max((number_of(v) for v in versions(f"tags.`system` = '{about.system}'")), default=0)
    tags["patchbay.version"] = str(number)
    model_id = client.create_logged_model(
        experiment,
        name=f"{about.system}-{about.digest[:16]}",
        source_run_id=run,
        tags=tags,
        params={p.key: p.value for p in as_params({**described, **(params or {})})},
        model_type=about.kind,
    ).model_id
    tags["model.id"] = model_id
    sealed = home() / "artifacts" / about.digest
    if _runs(about):
        _log_pyfunc(client, sealed, about, model_id, run)
    else:  # its files alone, where a model's would be
        client.log_model_artifacts(model_id, str(sealed), "artifacts/patch")
    client.set_logged_model_tags(model_id, tags)
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run, models=[LoggedModelOutput(model_id, step=0)])
    title = f"{about.system}@{number}: {systems.system(about.system).title}"
    version = _register(client, name, model_id, run, tags, title)
    notes.of_version(client, version, sealed)
    return version


def _runs(about: Manifest) -> bool:
    """Whether MLflow can run it: not what is only to be read, nor towers exported for ONNX Runtime, which hold no
    tensors that torch reads."""
    return about.kind in ("patch", "search") or (about.kind == "model" and bool(about.tensors or not about.files))


def _provide_base(client: MlflowClient, experiment: str, name: str, about: Manifest, patch: Mapping[str, str]) -> None:
    """The base of an artifact with the tags `patch`, as a LoggedModel and version of its own; made the first time.

    What is stored is a sealed folder of kind "model" that names the base and holds no file, so it loads as the base.
    """
    known = find_base(name, patch["base.digest"])
    if known is not None and MLMODEL in known.tags:
        return
    tags = {key: NONE for key in TAGS} | {k: patch[k] for k in ("base.digest", "base.name")}
    tags |= {"patch.kind": BASE, "gate.status": "passed", MLMODEL: "1"}
    run = make_run(client, experiment, patch, BASE)
    model_id = known.tags["model.id"] if known is not None else _base_model(client, experiment, run, tags)
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder, "base")
        bare.mkdir()
        sealed = manifest.write(bare, kind="model", system=about.system, bases=about.bases, config={})
        _log_pyfunc(client, bare, sealed, model_id, run)
    if known is not None:
        set_tags(client, known, {MLMODEL: "1"})
        return
    tags["model.id"] = model_id
    client.set_logged_model_tags(model_id, tags)
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run, models=[LoggedModelOutput(model_id, step=0)])
    _register(client, name, model_id, run, tags, f"{tags['base.name']}, unpatched; its weights are not kept here")


def _restore(client: MlflowClient, version: Any, about: Manifest) -> None:
    """Bring back what was deleted in MLflow's page of a pushed artifact: runs, experiments, the base's version.

    Raises NotFound, naming it, for what MLflow cannot bring back.
    """
    experiment = alive(client, version.run_id).info.experiment_id
    if about.bases:
        _provide_base(client, experiment, version.name, about, version.tags)
    try:
        client.get_logged_model(version.tags["model.id"])
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise NotFound(
            f"The model {version.tags['model.id']} behind version {version.version} of {version.name} was deleted in "
            "MLflow, which cannot restore it. Delete that version as well, and push again: both are made anew."
        ) from None


def _renew(client: MlflowClient, version: Any, about: Manifest) -> None:
    """What the first releases pushed had another signature, which only language models could answer, and no base that
    loads: pushed again, it gets today's. Its number stays."""
    if "patchbay.version" in version.tags or MLMODEL in version.tags:
        return
    if _runs(about):
        _log_pyfunc(client, home() / "artifacts" / about.digest, about, version.tags["model.id"], version.run_id)
    set_tags(client, version, {MLMODEL: "1"})


def _base_model(client: MlflowClient, experiment: str, run: str, tags: dict[str, str]) -> str:
    name = f"{BASE}-{tags['base.digest'][:16]}"
    made = client.create_logged_model(experiment, name=name, source_run_id=run, tags=tags, model_type=BASE)
    return str(made.model_id)


def _log_pyfunc(client: MlflowClient, sealed: Path, about: Manifest, model_id: str, run: str) -> None:
    with part_folder() as part:
        folder = save_pyfunc(sealed, about, part, Model(model_id=model_id, model_uuid=model_id, run_id=run))
        client.log_model_artifacts(model_id, str(folder))


def _register(client: MlflowClient, name: str, model_id: str, run: str, tags: dict[str, str], text: str) -> Any:
    try:
        client.create_registered_model(name, description=f"{name} and what was made from it (patchbay)")
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name, f"models:/{model_id}", run_id=run, tags=tags, description=text, model_id=model_id
    )


def _tags(about: Manifest, dataset: tuple[str, str] | None) -> dict[str, str]:
    patch = systems.system(about.system).patch
    name, digest = base_of(about)
    return {
        "patch.digest": about.digest,
        "patch.kind": about.kind,
        "patch.op": patch.partition(":")[2] if patch else NONE,
        "system": about.system,
        "base.digest": digest or NONE,
        "base.name": name or NONE,
        "parent.digest": ",".join(about.parents) or NONE,
        "data.digest": dataset[1] if dataset else NONE,
        "code.digest": _code(systems.system(about.system)),
        "model.id": NONE,
        "gate.status": "pending",
        "patchbay.version": NONE,
    }


def _code(row: systems.System) -> str:
    """Digest of the source that made and measured it: all that the system's job imports, and its mechanism."""
    modules = ["training.run", row.job, *(f"patches.families.{kind}" for kind in row.bases.values())]
    files, _ = sources([*modules, row.patch.partition(":")[0]] if row.patch else modules)
    return manifest.digest_of({f: manifest.sha256(ROOT / f) for f in files if f.endswith(".py")})


def base_of(about: Manifest) -> tuple[str, str]:
    """Name and digest of what an artifact was made from; of several bases, all names and one digest over them."""
    if len(about.bases) < 2:
        return about.base.rpartition("@")[0], about.base_digest
    names = (f"{role}={label.rpartition('@')[0]}" for role, label in sorted(about.bases.items()))
    return " ".join(names), manifest.digest_of(about.bases)


def model_name(about: Manifest) -> str:
    """`pypi:smollm2` and `hf-hub:org/SmolLM2@rev` are `smollm2`; `lab:clip` is `lab-clip`; no base, or several: the
    system."""
    ref = manifest.split_dtype(about.base.rpartition("@")[0])[0].partition("@")[0] if len(about.bases) == 1 else ""
    scheme, _, rest = ref.rpartition(":")
    if scheme in ("pypi", "hf-hub", "local", "local-dir", "gguf"):
        ref = rest
    return re.sub(r"[^a-z0-9_.]+", "-", ref.rpartition("/")[2].lower()).strip("-.") or about.system


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def as_params(values: Mapping[str, Any]) -> list[Param]:
    """The first hundred, as text of at most 6000 characters: MLflow's limits for one batch."""
    return [Param(key, str(value)[:6000]) for key, value in list(values.items())[:100]]
