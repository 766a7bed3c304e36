"""The index of sealed artifacts, on MLflow: what exists, what it is made of, how it measured.

    experiment  patchbay/<base>   one per base: two runs per pushed digest (the patch, and its base measured beside it),
                                  with the same metric names, so that MLflow's compare pages show them side by side
    model       <base>            one per base: the base is one version, every patch on it another
    experiment  patchbay/ab       one run per online experiment, one step per window

MLflow is index and display only. Identity is the manifest's digest and every pull is checked against it, for MLflow
checks no bytes; who is live is the ledger's, and MLflow's aliases mirror it. Base weights are never copied here.
Where: $MLFLOW_TRACKING_URI, else sqlite in home(). Pushes are serialised per home(); two hosts pushing one digest to
one server at the same instant make two versions, of which everybody then uses the first.
Longer than a file should be, because no other may import mlflow.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

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

import mlflow  # noqa: E402  the variables above are read at import
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput, Metric, Param  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models import Model, ModelSignature  # noqa: E402
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

from registry import manifest, systems  # noqa: E402
from registry.errors import (  # noqa: E402
    BadArtifact,
    ConfigError,
    NotFound,
    NotReady,
    PatchbayError,
    Tampered,
)
from registry.home import home  # noqa: E402
from registry.manifest import Manifest  # noqa: E402
from registry.measure import Measure, Metrics, flat  # noqa: E402

if TYPE_CHECKING:
    from registry.ab.ledger import Ledger

logging.getLogger("alembic").setLevel(logging.WARNING)

Gate = Literal["pending", "passed", "failed"]
Sides = Mapping[str, Metrics]
"""{"base": {metric: number or Measure}, "patched": ...}, both with the same names; "patched" alone where nothing is
compared. Values are finite; a name is words joined by `/ . : -` and spaces."""

BASE = "base"
PREFIX = "patchbay/"
AB = PREFIX + "ab"
PYFUNC = Path(__file__).parents[2] / "patches" / "pyfunc.py"
SIGNATURE = ModelSignature(
    Schema([ColSpec(DataType.string)]),
    Schema([ColSpec(DataType.string)]),
    ParamSchema([ParamSpec("max_tokens", DataType.long, 32), ParamSpec("strength", DataType.double, 1.0)]),
)
TAGS = (
    "patch.digest", "patch.kind", "patch.op", "system", "base.digest", "base.name", "parent.digest", "data.digest",
    "code.digest", "model.id", "gate.status",
)  # fmt: skip
"""on the version and on the LoggedModel of every artifact; "none" where there is nothing to say"""
NONE = "none"


@dataclass(frozen=True)
class Ref:
    """A parsed reference: a system and which of its artifacts, or a digest (prefix), or a sealed folder."""

    system: str = ""
    which: str = ""
    """champion | challenger | base | a version number"""
    digest: str = ""
    """64 hex digits, or a prefix of at least 8"""
    folder: Path | None = None


@dataclass(frozen=True)
class Pushed:
    """Where an artifact is in MLflow."""

    digest: str
    version: int
    model_id: str
    run_id: str
    url: str
    """of the version's page"""


@dataclass(frozen=True)
class Row:
    """One artifact in the store."""

    digest: str
    system: str
    kind: str
    model: str
    version: int
    base: str
    """name@digest"""
    created: float
    """unix seconds"""
    gate: str
    metrics: dict[str, float]
    aliases: list[str]


@dataclass(frozen=True)
class Difference:
    """One metric of two artifacts; None where one was not measured."""

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    """b - a"""


@dataclass(frozen=True)
class Comparison:
    """Two artifacts by every metric either has."""

    a: str
    b: str
    rows: list[Difference]
    url: str
    """of MLflow's page that compares the two runs"""


# ---- references ------------------------------------------------------------------------------------------------


def parse_ref(text: str) -> Ref:
    """`system`, `system@champion|challenger|base|<version>`, `sha256:<8 to 64 hex>`, or a path (with a slash or a dot).

    Raises ConfigError or NotFound, and looks nothing up.
    """
    if text.startswith("sha256:") or manifest.is_digest(text):
        digest = text.removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
            raise ConfigError(f"{text[:80]!r} is not a digest: write sha256: and 8 to 64 hex digits.")
        return Ref(digest=digest)
    if "/" in text or text.startswith((".", "~")):
        return Ref(folder=Path(text).expanduser())
    name, at, which = text.partition("@")
    if name not in systems.SYSTEMS and re.fullmatch(r"[0-9a-f]{8,63}", name):
        raise ConfigError(f"{text[:80]!r} looks like a digest; write sha256:{name}.")
    systems.system(name)
    if at and not re.fullmatch(r"champion|challenger|base|[1-9][0-9]{0,8}", which):
        raise ConfigError(f"{text[:80]!r}: after the @ comes champion, challenger, base or a version number.")
    return Ref(system=name, which=which or "champion")


def resolve(ref: str | Ref, ledger: Ledger) -> str:
    """The digest a reference means now, or "base". Champion and challenger are the ledger's, never MLflow's aliases.

    Raises NotFound, or ConfigError for a prefix or a version that several artifacts share.
    """
    ref = parse_ref(ref) if isinstance(ref, str) else ref
    if ref.folder is not None:
        return manifest.read(ref.folder).digest
    if ref.digest:
        return ref.digest if manifest.is_digest(ref.digest) else _by_prefix(ref.digest)
    if ref.which == BASE:
        return BASE
    if ref.which.isdigit():
        return _by_version(ref.system, ref.which)
    head = ledger.head(ref.system)
    if ref.which == "champion":
        return head.champion if head else BASE
    if head is None or head.challenger is None:
        raise NotFound(f"{ref.system} has no challenger. Push one: `patchbay push FOLDER`.")
    return head.challenger


def _by_prefix(prefix: str) -> str:
    found = {folder.name for folder in (home() / "artifacts").glob(f"{prefix}*") if manifest.is_digest(folder.name)}
    found |= {d for folder in (home() / "runs").glob(f"*-{prefix[:16]}*") if (d := _sealed(folder)).startswith(prefix)}
    down = ""
    try:
        found |= {v.tags["patch.digest"] for v in _versions(f"tags.`patch.digest` LIKE '{prefix}%'")}
    except NotReady as e:
        down = f" {e}"
    if len(found) == 1:
        return found.pop()
    if found:
        raise ConfigError(f"sha256:{prefix} is ambiguous: {', '.join(sorted(found))}. Write more digits.")
    raise NotFound(f"No artifact begins with sha256:{prefix}. `patchbay list` shows what there is.{down}")


def _by_version(name: str, version: str) -> str:
    same = [v for v in _versions(f"tags.`system` = '{name}'") if str(v.version) == version]
    if len(same) == 1:
        return str(same[0].tags["patch.digest"])
    if same:
        several = ", ".join(f"{v.name} has sha256:{v.tags['patch.digest'][:16]}" for v in same)
        raise ConfigError(f"{name}@{version} is ambiguous, one per base: {several}. Name the digest.")
    raise NotFound(f"{name} has no version {version}. `patchbay list {name}` shows its versions.")


def _sealed(folder: Path) -> str:
    """The digest of a sealed folder, "" if it is not one."""
    try:
        return manifest.read(folder).digest
    except BadArtifact:
        return ""


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
    metrics = _sides(metrics)
    _keep(Path(folder), about.digest)
    with _mlflow() as client, _lock():
        version = _version(about.digest) or _create(client, about, dataset, params)
        if gate is not None:
            _tag(client, version, {"gate.status": gate})
        if dataset is not None:
            _tag(client, version, {"data.digest": dataset[1]})
        _measure(client, version, metrics, dataset)
        if params:
            client.log_batch(version.run_id, params=_params(params))
        _draw(client, version, figures, base_figures)
        for name, table in (tables or {}).items():
            columns = {k: list(v) for k, v in table.items()} if isinstance(table, Mapping) else table
            client.log_table(version.run_id, columns, f"tables/{name}.json")
        url = f"{_ui()}/#/models/{version.name}/versions/{version.version}"
        return Pushed(about.digest, int(version.version), version.tags["model.id"], version.run_id, url)


def pull(digest: str) -> Path:
    """home()/artifacts/<digest>, every byte verified. MLflow is asked only if the artifact is on this host nowhere."""
    if not manifest.is_digest(digest):
        raise ConfigError(f"{digest[:80]!r} is not a digest of 64 hex digits; resolve the reference first.")
    folder = home() / "artifacts" / digest
    if folder.is_dir():
        return _verified(folder, digest)
    for run in (home() / "runs").glob(f"*-{digest[:16]}"):
        if _sealed(run) == digest:
            return _keep(run, digest)
    with _mlflow():
        version = _version(digest)
        if version is None:
            raise NotFound(f"No artifact sha256:{digest[:16]} here or in MLflow. `patchbay list` shows what there is.")
        with _part() as part:
            uri = f"models:/{version.tags['model.id']}"
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(part), tracking_uri=_uri())
            try:
                return _keep(part / "artifacts" / "patch", digest)
            except BadArtifact as e:
                raise Tampered(
                    f"MLflow's copy of sha256:{digest[:16]} ({uri}) is not what was pushed: {e} "
                    f"Restore it from a back-up, or copy artifacts/{digest[:16]}... from a host that has it."
                ) from None


def _keep(folder: Path, digest: str) -> Path:
    """home()/artifacts/<digest>, copied from `folder`, verified, then put in place by one rename."""
    place = home() / "artifacts" / digest
    if not place.is_dir():
        with _part() as part:
            shutil.copytree(folder, part / "copy", symlinks=True)
            manifest.read(part / "copy", digest=digest)
            with suppress(OSError):  # somebody else was faster; theirs is verified below
                os.rename(part / "copy", place)
    return _verified(place, digest)


def _verified(place: Path, digest: str) -> Path:
    try:
        manifest.read(place, digest=digest)
    except BadArtifact as e:
        raise type(e)(f"{e} To have it again, delete {place} first.") from None
    return place


@contextmanager
def _part() -> Iterator[Path]:
    """A folder on the disk of artifacts/, so that a rename out of it is atomic."""
    (home() / "artifacts").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=home() / "artifacts") as part:
        yield Path(part)


def _create(
    client: MlflowClient, about: Manifest, dataset: tuple[str, str] | None, params: Mapping[str, Any] | None
) -> Any:
    """Runs, LoggedModel, files, and last the version: a push that died half-way leaves nothing that is found."""
    name = _model_name(about)
    experiment = _experiment(client, PREFIX + name)
    described = _flat(about.config, "config.")
    tags = _tags(about, dataset)
    run = _run(client, experiment, tags, "patched")
    if about.base and _base_version(name, about.base_digest) is None:
        _create_base(client, experiment, name, tags)
    client.log_batch(run, params=_params(described))
    model_id = client.create_logged_model(
        experiment,
        name=f"{about.system}-{about.digest[:16]}",
        source_run_id=run,
        tags=tags,
        params={p.key: p.value for p in _params({**described, **(params or {})})},
        model_type=about.kind,
    ).model_id
    tags["model.id"] = model_id
    sealed = home() / "artifacts" / about.digest
    if about.kind == "patch":
        with _part() as part:
            _save_pyfunc(sealed, part, Model(model_id=model_id, model_uuid=model_id, run_id=run))
            client.log_model_artifacts(model_id, str(part / "model"))
    else:  # a model or a report is no Subject: its files alone, where a patch's would be
        client.log_model_artifacts(model_id, str(sealed), "artifacts/patch")
    client.set_logged_model_tags(model_id, tags)
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run, models=[LoggedModelOutput(model_id, step=0)])
    return _register(client, name, model_id, run, tags, systems.system(about.system).title)


def _save_pyfunc(sealed: Path, part: Path, model: Model) -> None:
    shutil.copytree(sealed, part / "patch")  # MLflow keeps an artifact under its folder's own name
    with warnings.catch_warnings():
        # advice: give an input example (megabytes of JSON for images), type hints (they would drop the parameters)
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            part / "model",
            python_model=str(PYFUNC),
            artifacts={"patch": str(part / "patch")},
            signature=SIGNATURE,
            # never patchbay itself: it is not on a package index, and whatever else bears that name must not be fetched
            pip_requirements=[
                f"{p}=={metadata.version(p)}" for p in ("mlflow", "safetensors", "torch", "transformers")
            ],
            mlflow_model=model,
        )


def _create_base(client: MlflowClient, experiment: str, name: str, patch: Mapping[str, str]) -> None:
    """The base of a patch with these tags as its own LoggedModel and version: a description, never the weights."""
    tags = {key: NONE for key in TAGS} | {k: patch[k] for k in ("base.digest", "base.name")}
    tags |= {"patch.kind": BASE, "gate.status": "passed"}
    run = _run(client, experiment, patch, BASE)
    model_id = client.create_logged_model(
        experiment, name=f"{BASE}-{tags['base.digest'][:16]}", source_run_id=run, tags=tags, model_type=BASE
    ).model_id
    tags["model.id"] = model_id
    with _part() as part:
        file = part / "base_ref.json"
        about = {"name": name, "digest": tags["base.digest"], "source": tags["base.name"]}
        file.write_bytes(manifest.canonical(about))
        client.log_model_artifact(model_id, str(file))
    client.set_logged_model_tags(model_id, tags)
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run, models=[LoggedModelOutput(model_id, step=0)])
    _register(client, name, model_id, run, tags, f"{tags['base.name']}, unpatched; its weights are not kept here")


def _register(client: MlflowClient, name: str, model_id: str, run: str, tags: dict[str, str], text: str) -> Any:
    try:
        client.create_registered_model(name, description=f"{name} and the patches made on it (patchbay)")
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name, f"models:/{model_id}", run_id=run, tags=tags, description=text, model_id=model_id
    )


def _tags(about: Manifest, dataset: tuple[str, str] | None) -> dict[str, str]:
    patch = systems.system(about.system).patch
    return {
        "patch.digest": about.digest,
        "patch.kind": about.kind,
        "patch.op": patch.partition(":")[2] if patch else NONE,
        "system": about.system,
        "base.digest": about.base_digest or NONE,
        "base.name": _base_ref(about) or NONE,
        "parent.digest": ",".join(about.parents) or NONE,
        "data.digest": dataset[1] if dataset else NONE,
        "code.digest": _code(about.system),
        "model.id": NONE,
        "gate.status": "pending",
    }


def _code(name: str) -> str:
    """Digest of the source that pushed: registry, patches, the system's job and what jobs share."""
    root = PYFUNC.parent.parent
    others = {root / "training" / other for other in systems.SYSTEMS if other != name}
    shared = [f for f in root.glob("training/**/*.py") if not others & {*f.parents}]
    files = [*root.glob("registry/**/*.py"), *root.glob("patches/**/*.py"), *shared]
    return manifest.digest_of({f.relative_to(root).as_posix(): manifest.sha256(f) for f in files})


def _base_ref(about: Manifest) -> str:
    return about.base.rpartition("@")[0]


def _model_name(about: Manifest) -> str:
    """`pypi:smollm2` and `hf-hub:org/SmolLM2@rev` are `smollm2`; `lab:clip` is `lab-clip`; no base: the system."""
    ref = _base_ref(about).partition("@")[0]
    scheme, _, rest = ref.rpartition(":")
    if scheme in ("pypi", "hf-hub", "local", "local-dir", "gguf"):
        ref = rest
    return re.sub(r"[^a-z0-9_.]+", "-", ref.rpartition("/")[2].lower()).strip("-.") or about.system


# ---- measurements ----------------------------------------------------------------------------------------------


def log_bench(digest: str, results: Sides, file: Path | None = None) -> None:
    """Timings of a pushed artifact, as metrics of both runs; `file`: the raw report, kept as bench/<its name>."""
    results = _sides(results)
    with _mlflow() as client, _lock():
        version = _pushed(digest)
        _measure(client, version, results, None)
        if file is not None:
            client.log_artifact(version.run_id, str(file), "bench")


def log_figures(digest: str, figures: Mapping[str, Any], base_figures: Mapping[str, Any] | None = None) -> None:
    """Figures or image files of a pushed artifact, under figures/ of its run; the base's beside them."""
    with _mlflow() as client, _lock():
        _draw(client, _pushed(digest), figures, base_figures)


def log_window(experiment: str, index: int, metrics: Mapping[str, float]) -> bool:
    """One window of an online experiment as step `index` of its run. False if that window is there already."""
    _check({"patched": metrics})
    with _mlflow() as client, _lock():
        run = _ab_run(client, experiment)
        if index <= int(run.data.tags.get("ab.window", "-1")):
            return False
        now = int(time.time() * 1000)
        client.log_batch(run.info.run_id, metrics=[Metric(k, float(v), now, index) for k, v in metrics.items()])
        client.set_tag(run.info.run_id, "ab.window", str(index))
        return True


def log_decision(experiment: str, document: Mapping[str, Any]) -> None:
    """A decision and its evidence, as decisions/<digest16>.json of the experiment's run; the same twice is one file."""
    digest = manifest.digest_of(dict(document))
    with _mlflow() as client, _lock():
        run = _ab_run(client, experiment)
        client.log_dict(run.info.run_id, dict(document), f"decisions/{digest[:16]}.json")
        client.set_tag(run.info.run_id, "ab.decision", str(document.get("action", ""))[:250])


def show_experiment(experiment: str, figure: Any, evidence: Mapping[str, Any]) -> str | None:
    """The picture and the numbers of an online experiment on its run. Returns why that failed instead of raising."""
    try:
        with _mlflow() as client, _lock():
            run = _ab_run(client, experiment)
            client.log_figure(run.info.run_id, figure, "figures/effect.png")
            client.log_dict(run.info.run_id, dict(evidence), "evidence.json")
    except PatchbayError as e:
        return f"MLflow does not show it: {e}"
    return None


def _sides(sides: Sides | None) -> dict[str, dict[str, float]]:
    """Plain numbers, intervals and n beside them. Raises as `_check`."""
    _check(sides or {})
    out = {side: flat(values) for side, values in (sides or {}).items()}
    _check(out)
    return out


def _check(sides: Sides) -> None:
    """Raises ConfigError for what MLflow would store as something else, or could not lay side by side."""
    if unknown := sides.keys() - {BASE, "patched"}:
        raise ConfigError(f"Metrics are given for {sorted(unknown)[0]!r}; the sides are 'base' and 'patched'.")
    for side, values in sides.items():
        for name, value in values.items():
            if not re.fullmatch(r"[\w.\-/: ]{1,250}", name) or ".." in name or name[:1] in "/.":
                raise ConfigError(f"Metric name {name[:80]!r}: use letters, digits and _ . - / : or spaces.")
            value = value.value if isinstance(value, Measure) else value
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ConfigError(f"Metric {name!r} of {side} is {value!r}; log finite numbers only (leave it out).")
    if len(sides) == 2 and (odd := sides[BASE].keys() ^ sides["patched"].keys()):
        raise ConfigError(
            f"Metric {sorted(odd)[0]!r} is given for one side only; base and patched need the same names "
            "(a ratio to the base is 1 for the base)."
        )


def _measure(client: MlflowClient, version: Any, sides: Sides, dataset: tuple[str, str] | None) -> None:
    """Log what changed, to each side's run and LoggedModel."""
    for side, values in sides.items():
        run_id, model_id = _side(client, version, side)
        run = client.get_run(run_id)
        new = {k: float(v) for k, v in values.items() if run.data.metrics.get(k) != float(v)}
        name, digest = (dataset[0], dataset[1][:32]) if dataset else (None, None)  # MLflow allows 36 characters
        if dataset and not (run.inputs and any(d.dataset.digest == digest for d in run.inputs.dataset_inputs)):
            about = Dataset(dataset[0], dataset[1][:32], "patchbay", json.dumps({"digest": dataset[1]}))
            client.log_inputs(run_id, datasets=[DatasetInput(about)])
        now = int(time.time() * 1000)
        of = {"model_id": model_id, "dataset_name": name, "dataset_digest": digest, "run_id": run_id}
        points = [Metric(k, v, now, 0, **of) for k, v in new.items()]
        for start in range(0, len(points), 1000):
            client.log_batch(run_id, metrics=points[start : start + 1000])


def _draw(
    client: MlflowClient, version: Any, figures: Mapping[str, Any] | None, base_figures: Mapping[str, Any] | None
) -> None:
    for side, images in (("patched", figures), (BASE, base_figures)):
        for name, image in (images or {}).items():
            run, _ = _side(client, version, side)
            if not isinstance(image, (str, Path)):
                client.log_figure(run, image, f"figures/{name}.png")
                continue
            with _part() as part:
                file = part / "figures" / f"{name}{Path(image).suffix}"
                file.parent.mkdir(parents=True)
                shutil.copyfile(image, file)
                client.log_artifacts(run, str(part))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _params(values: Mapping[str, Any]) -> list[Param]:
    """The first hundred, as text of at most 6000 characters: MLflow's limits for one batch."""
    return [Param(key, str(value)[:6000]) for key, value in list(values.items())[:100]]


# ---- questions -------------------------------------------------------------------------------------------------


def list_models(system: str | None = None) -> list[Row]:
    """Every artifact in the store, newest first; bases are not artifacts, they are in each row."""
    if system is not None:
        systems.system(system)
    with _mlflow() as client:
        which = f"tags.`system` = '{system}'" if system else f"tags.`patch.kind` != '{BASE}'"
        found = [v for v in _versions(which) if "patch.digest" in v.tags]
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
                version=int(v.version),
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
    with _mlflow() as client:
        version = _pushed(digest)
        base_run = _find_run(client, digest, BASE)
        files = [file for folder in ("figures", "tables", "bench") for file in _files(client, version.run_id, folder)]
        return {
            "digest": digest,
            "system": version.tags["system"],
            "kind": version.tags["patch.kind"],
            "model": version.name,
            "version": int(version.version),
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
            "url": f"{_ui()}/#/models/{version.name}/versions/{version.version}",
        }


def compare(a: str, b: str, ui: str | None = None) -> Comparison:
    """The metrics of two artifacts, b - a. `a` may be "base": the base of `b`, as it was measured beside b.

    ui: where people open MLflow; by default the tracking server, or port 5000 of this host.
    """
    with _mlflow() as client:
        second = client.get_run(_pushed(b).run_id)
        first = _find_run(client, b, BASE) if a == BASE else client.get_run(_pushed(a).run_id)
        if first is None:
            raise NotFound(
                f"The base of sha256:{b[:16]} was not measured. Push the artifact with metrics of both sides."
            )
        x, y = first.data.metrics, second.data.metrics
        rows = [Difference(k, x.get(k), y.get(k), y[k] - x[k] if k in x and k in y else None) for k in sorted({*x, *y})]
        runs = json.dumps([first.info.run_id, second.info.run_id])
        experiments = json.dumps(sorted({first.info.experiment_id, second.info.experiment_id}))
        url = f"{ui or _ui()}/#/compare-runs?runs={quote(runs)}&experiments={quote(experiments)}"
        return Comparison(a, b, rows, url)


def mirror(system: str, champion: str, challenger: str | None) -> str | None:
    """Show the ledger's state as MLflow aliases <system>-champion and <system>-challenger, on every base it is on.

    Returns why that failed instead of raising: the ledger has been written, and display may lag behind it.
    """
    try:
        with _mlflow() as client:
            mine = _versions(f"tags.`system` = '{system}'")
            bases = _versions(f"tags.`patch.kind` = '{BASE}'")
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


def _lineage(version: Any) -> list[dict[str, str]]:
    """base -> parents, deepest first -> the artifact; a parent that was never pushed is named by its digest alone."""
    out: dict[str, dict[str, str]] = {}

    def visit(digest: str) -> None:
        if digest in out:
            return
        v = version if digest == version.tags["patch.digest"] else _version(digest)
        if v is None:
            out[digest] = {"digest": digest, "kind": "unknown", "name": ""}
            return
        if (base := v.tags["base.digest"]) != NONE:
            out.setdefault(base, {"digest": base, "kind": BASE, "name": v.tags["base.name"]})
        for parent in v.tags["parent.digest"].split(","):
            if parent != NONE:
                visit(parent)
        out[digest] = {"digest": digest, "kind": v.tags["patch.kind"], "name": f"{v.tags['system']} v{v.version}"}

    visit(version.tags["patch.digest"])
    return list(out.values())


def _files(client: MlflowClient, run: str, folder: str) -> list[str]:
    out: list[str] = []
    for file in client.list_artifacts(run, folder):
        out += _files(client, run, file.path) if file.is_dir else [file.path]
    return sorted(out)


# ---- MLflow itself ---------------------------------------------------------------------------------------------


_OPENED: set[str] = set()
"""stores this process has reached"""


def _uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home()}/mlflow.db"


def _ui() -> str:
    uri = _uri()
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


@contextmanager
def _mlflow() -> Iterator[MlflowClient]:
    """A client of the store; what MLflow raises inside the block comes out as one of our errors."""
    uri = _uri()
    try:
        # process-wide, because MLflow's sqlite registry looks LoggedModels up in the global store
        mlflow.set_tracking_uri(uri)
        if uri not in _OPENED:
            with _lock():  # MLflow makes a new database table by table, and two processes at once break it
                MlflowClient(uri).search_experiments(max_results=1)
            _OPENED.add(uri)
        yield MlflowClient(uri)
    except SQLAlchemyError as e:
        raise NotReady(f"MLflow's database {uri} failed: {str(e).partition(chr(10))[0][:300]}") from None
    except MlflowException as e:
        text = str(e).partition("\n")[0][:300]
        if e.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise NotFound(f"MLflow at {uri} does not have it: {text}") from None
        if e.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise ConfigError(f"MLflow refused: {text}") from None
        raise NotReady(f"MLflow at {uri} failed: {text} Check MLFLOW_TRACKING_URI and the server.") from None


@contextmanager
def _lock() -> Iterator[None]:
    """One writer per home(): find-or-create is not atomic in MLflow."""
    with (home() / "store.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _experiment(client: MlflowClient, name: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    local = None if _uri().startswith("http") else (home() / "mlartifacts" / name.replace("/", "-")).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=local))
    except MlflowException:
        made = client.get_experiment_by_name(name)  # another process may have been faster
        if made is None:
            raise
        return str(made.experiment_id)


def _run(client: MlflowClient, experiment: str, tags: Mapping[str, str], side: str) -> str:
    """The run of an artifact's side, made the first time."""
    known = _find_run(client, tags["patch.digest"], side)
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


def _find_run(client: MlflowClient, digest: str, side: str) -> Any:
    which = f"tags.`patch.digest` = '{digest}' AND tags.`patch.side` = '{side}'"
    return next(iter(client.search_runs(_experiments(client), which, order_by=["attributes.start_time ASC"])), None)


def _experiments(client: MlflowClient) -> list[str]:
    found = client.search_experiments(filter_string=f"name LIKE '{PREFIX}%'", max_results=1000)
    return [e.experiment_id for e in found if e.name != AB]


def _side(client: MlflowClient, version: Any, side: str) -> tuple[str, str]:
    """(run, LoggedModel) of an artifact or of its base, as measured beside it."""
    if side == "patched":
        return version.run_id, version.tags["model.id"]
    base = _base_version(version.name, version.tags["base.digest"])
    if base is None:
        raise ConfigError(f"{version.tags['system']} was made from no base, so there is no base to log for.")
    experiment = client.get_run(version.run_id).info.experiment_id
    return _run(client, experiment, version.tags, BASE), base.tags["model.id"]


def _versions(which: str) -> list[Any]:
    """Model versions, oldest first."""
    with _mlflow() as client:
        found: list[Any] = []
        token = None
        while True:
            page = client.search_model_versions(which, max_results=1000, page_token=token)
            found += page
            if not (token := page.token):
                return sorted(found, key=lambda v: (v.creation_timestamp, v.name, int(v.version)))


def _version(digest: str) -> Any:
    if not manifest.is_digest(digest):
        raise ConfigError(f"{digest[:80]!r} is not a digest of 64 hex digits; resolve the reference first.")
    return next(iter(_versions(f"tags.`patch.digest` = '{digest}'")), None)


def _base_version(name: str, digest: str) -> Any:
    which = f"name = '{name}' AND tags.`base.digest` = '{digest}' AND tags.`patch.kind` = '{BASE}'"
    return next(iter(_versions(which)), None)


def _pushed(digest: str) -> Any:
    version = _version(digest)
    if version is None:
        raise NotFound(f"sha256:{digest[:16]} is not in MLflow. Push its folder: `patchbay push FOLDER`.")
    return version


def _tag(client: MlflowClient, version: Any, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.version), key, value)
    client.set_logged_model_tags(version.tags["model.id"], dict(tags))


def _metrics_of_runs(client: MlflowClient) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    experiments, token, more = _experiments(client), None, True
    while more and experiments:
        page = client.search_runs(experiments, "tags.`patch.side` = 'patched'", max_results=1000, page_token=token)
        out |= {run.info.run_id: dict(run.data.metrics) for run in page}
        token, more = page.token, bool(page.token)
    return out


def _ab_run(client: MlflowClient, experiment: str) -> Any:
    at = _experiment(client, AB)
    if not re.fullmatch(r"[\w.\- ]{1,200}", experiment):
        raise ConfigError(f"Experiment name {experiment[:80]!r}: use letters, digits, spaces and _ . -")
    known = client.search_runs([at], f"tags.`ab.experiment` = '{experiment}'", max_results=1)
    if known:
        return known[0]
    run = client.create_run(at, tags={"ab.experiment": experiment}, run_name=experiment)
    client.set_terminated(run.info.run_id)
    return run
