"""Metrics, figures and benchmarks of artifacts, on the runs of both sides."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric

from registry import manifest
from registry.card import NAME, card
from registry.errors import ConfigError
from registry.home import home
from registry.kept import part_folder
from registry.measure import Measure, Metrics, flat, measures, unflat
from registry.store.mlflow_client import (
    BASE,
    BETTER,
    alive,
    connected,
    find_run,
    locked,
    pushed_version,
    set_tags,
    side_of,
)

Sides = Mapping[str, Metrics]
"""{"base": {metric: number or Measure}, "patched": ...}, both with the same names; "patched" alone where nothing is
compared. Values are finite; a name is words joined by `/ . : -` and spaces."""


# ---- measurements ----------------------------------------------------------------------------------------------


def log_bench(digest: str, results: Sides, file: Path | None = None) -> None:
    """Timings of a pushed artifact, as metrics of both runs; `file`: the raw report, kept as bench/<its name>."""
    check_sides(results)
    with connected() as client, locked():
        version = pushed_version(digest)
        log_metrics(client, version, results, None)
        if file is not None:
            client.log_artifact(version.run_id, str(file), "bench")


def measured(digest: str) -> tuple[str, dict[str, dict[str, Measure]]]:
    """Digest of the data that a pushed artifact was last measured on, and "base" and "patched" -> metric -> measure."""
    with connected() as client:
        version = pushed_version(digest)
        return version.tags["data.digest"], _sides(client, version)


def _sides(client: MlflowClient, version: Any) -> dict[str, dict[str, Measure]]:
    runs = {"patched": alive(client, version.run_id), BASE: find_run(client, version.tags["patch.digest"], BASE)}
    better = {side: json.loads(run.data.tags.get(BETTER, "{}")) for side, run in runs.items() if run is not None}
    return {side: unflat(runs[side].data.metrics, ways) for side, ways in better.items()}


def log_card(client: MlflowClient, version: Any, sealed: Path, gate: Mapping[str, Any] | None = None) -> str:
    """Write a version's model card anew from what there is of it, as README.md of its run. Returns its text.

    gate: what its gate said; by default what the store has of that.
    """
    if gate is None:
        gate = _gate(client, version.run_id)
    signed = [Path(f.path).name for f in client.list_artifacts(version.run_id, "signatures")]
    text = card(sealed, manifest.read(sealed), _sides(client, version), gate, signed)
    client.log_text(version.run_id, text, NAME)
    return text


def _gate(client: MlflowClient, run: str) -> dict[str, Any] | None:
    if not any(f.path == "gate.json" for f in client.list_artifacts(run)):
        return None
    with part_folder() as part:
        said = json.loads(Path(client.download_artifacts(run, "gate.json", str(part))).read_text())
    found: dict[str, Any] | None = said.get("gate")
    return found


def card_of(digest: str, sealed: Path) -> str:
    """The model card of a pushed artifact whose sealed folder is at `sealed`, written anew."""
    with connected() as client, locked():
        return log_card(client, pushed_version(digest), sealed)


def log_file(digest: str, file: Path, folder: str) -> None:
    """A file of a pushed artifact (a signature, a card), under `folder` of its run."""
    with connected() as client, locked():
        client.log_artifact(pushed_version(digest).run_id, str(file), folder)


def kept_files(digest: str, folder: str, place: Path) -> list[Path]:
    """The files that `log_file` put under `folder` of a pushed artifact's run, brought to `place`."""
    with connected() as client:
        run = pushed_version(digest).run_id
        names = [f.path for f in client.list_artifacts(run, folder) if not f.is_dir]
        place.mkdir(parents=True, exist_ok=True)
        with part_folder() as part:
            for name in names:
                got = Path(client.download_artifacts(run, name, str(part)))
                shutil.copyfile(got, place / got.name)
    return sorted(place.iterdir())


def figures(digest: str, place: Path) -> dict[str, dict[str, Path]]:
    """ "base" and "patched" -> name -> image file that was drawn of that side, brought to `place`."""
    out: dict[str, dict[str, Path]] = {}
    with connected() as client:
        version = pushed_version(digest)
        runs = {"patched": version.run_id}
        if (base := find_run(client, digest, BASE)) is not None:
            runs[BASE] = base.info.run_id
        for side, run in runs.items():
            to = place / digest[:16] / side
            to.mkdir(parents=True, exist_ok=True)
            for f in client.list_artifacts(run, "figures"):
                out.setdefault(side, {})[Path(f.path).name] = Path(client.download_artifacts(run, f.path, str(to)))
    return out


def log_gate(digest: str, status: str, metrics: Metrics, evidence: Mapping[str, Any]) -> None:
    """What a gate said of a pushed artifact: tag `gate.status`, metrics gate/..., the evidence as gate.json."""
    check_sides({"patched": metrics})
    with connected() as client, locked():
        version = pushed_version(digest)
        alive(client, version.run_id)
        set_tags(client, version, {"gate.status": status})
        log_metrics(client, version, {"patched": metrics}, None)
        client.log_dict(version.run_id, dict(evidence), "gate.json")
        if (sealed := home() / "artifacts" / digest).is_dir():
            log_card(client, version, sealed, evidence.get("gate"))


def log_forced(digest: str, reason: str) -> None:
    """Why a pushed artifact went on without its gate, as the tag `gate.forced`."""
    with connected() as client, locked():
        set_tags(client, pushed_version(digest), {"gate.forced": reason[:500]})


def log_figures(digest: str, figures: Mapping[str, Any], base_figures: Mapping[str, Any] | None = None) -> None:
    """Figures or image files of a pushed artifact, under figures/ of its run; the base's beside them."""
    with connected() as client, locked():
        log_images(client, pushed_version(digest), figures, base_figures)


def check_sides(sides: Sides) -> None:
    """Raises ConfigError for what MLflow would store as something else, or could not lay side by side."""
    if unknown := sides.keys() - {BASE, "patched"}:
        raise ConfigError(f"Metrics are given for {sorted(unknown)[0]!r}; the sides are 'base' and 'patched'.")
    for side, values in sides.items():
        for name, value in values.items():
            if not re.fullmatch(r"[\w.\-/: ]{1,240}", name) or ".." in name or name[:1] in "/.":
                raise ConfigError(f"Metric name {name[:80]!r}: use letters, digits and _ . - / : or spaces.")
            m = value if isinstance(value, Measure) else Measure(value)
            for number in (x for x in (m.value, m.low, m.high, m.n) if x is not None or x is m.value):
                if not isinstance(number, Real) or not math.isfinite(number):
                    raise ConfigError(
                        f"Metric {name!r} of {side} is {number!r}; log finite numbers only (leave it out)."
                    )
    if len(sides) == 2 and (odd := sides[BASE].keys() ^ sides["patched"].keys()):
        raise ConfigError(
            f"Metric {sorted(odd)[0]!r} is given for one side only; base and patched need the same names "
            "(a ratio to the base is 1 for the base)."
        )


def log_metrics(client: MlflowClient, version: Any, sides: Sides, dataset: tuple[str, str] | None) -> None:
    """Log what changed, to each side's run and LoggedModel: `name`, `name/low`, `name/high`, `name/n`."""
    for side, metrics in sides.items():
        run_id, model_id = side_of(client, version, side)
        run = client.get_run(run_id)
        new = {k: v for k, v in flat(metrics).items() if run.data.metrics.get(k) != v}
        name, digest = (dataset[0], dataset[1][:32]) if dataset else (None, None)  # MLflow allows 36 characters
        if dataset and not (run.inputs and any(d.dataset.digest == digest for d in run.inputs.dataset_inputs)):
            about = Dataset(dataset[0], dataset[1][:32], "patchbay", json.dumps({"digest": dataset[1]}))
            client.log_inputs(run_id, datasets=[DatasetInput(about)])
        known = json.loads(run.data.tags.get(BETTER, "{}"))
        better = known | {k: m.better for k, m in measures(metrics).items() if m.better}
        if better != known and len(json.dumps(better)) < 8000:  # the most that MLflow takes
            client.set_tag(run_id, BETTER, json.dumps(better, sort_keys=True))
        now = int(time.time() * 1000)
        of = {"model_id": model_id, "dataset_name": name, "dataset_digest": digest, "run_id": run_id}
        points = [Metric(k, v, now, 0, **of) for k, v in new.items()]
        for start in range(0, len(points), 1000):
            client.log_batch(run_id, metrics=points[start : start + 1000])


def log_images(
    client: MlflowClient, version: Any, figures: Mapping[str, Any] | None, base_figures: Mapping[str, Any] | None
) -> None:
    for side, images in (("patched", figures), (BASE, base_figures)):
        for name, image in (images or {}).items():
            run, _ = side_of(client, version, side)
            if not isinstance(image, (str, Path)):
                client.log_figure(run, image, f"figures/{name}.png")
                continue
            with part_folder() as part:
                file = part / "figures" / f"{name}{Path(image).suffix}"
                file.parent.mkdir(parents=True)
                shutil.copyfile(image, file)
                client.log_artifacts(run, str(part))
