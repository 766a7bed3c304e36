"""The store against a real MLflow on sqlite, one for the whole file: making its database costs seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import mlflow
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from safetensors.numpy import save_file

from registry import manifest, store
from registry.ab.ledger import Ledger
from registry.errors import ConfigError, NotFound, NotReady, Tampered
from registry.measure import Measure
from registry.store import mlflow_client, shown

BASE = "b" * 64
DATASET = ("repeats", "d" * 64)
QUALITY = {"quality/accuracy": 0.5, "target/repeat": 0.1}
BETTER = {"quality/accuracy": 0.4, "target/repeat": 0.9}
SIDES = {"base": QUALITY, "patched": BETTER}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with a store of its own, for every test of this file."""
    place = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHBAY_HOME", str(place))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield place
    mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def _at_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHBAY_HOME", str(place))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def seal(place: Path) -> Callable[..., Path]:
    """seal(value, ...) -> a sealed patch folder; another value is another artifact."""

    def seal(value: float, **about: Any) -> Path:
        folder = place / "made" / f"{len(list(place.glob('made/*')))}"
        folder.mkdir(parents=True)
        save_file({"value": np.full(3, value, dtype=np.float32)}, folder / "patch.safetensors")
        about = {"kind": "patch", "system": "attention_sink", "base": f"pypi:smollm2@{BASE}", "config": {}} | about
        manifest.write(folder, **about)
        return folder

    return seal


@dataclass
class Given:
    """Two artifacts on one base, both pushed with metrics."""

    first: store.Pushed
    second: store.Pushed
    folder: Path


@pytest.fixture(scope="module")
def given(place: Path, seal: Callable[..., Path]) -> Given:
    figure = Figure()
    figure.subplots().plot([1, 2])
    folder = seal(1.0, config={"neurons": [[0, 3]], "inner": {"limit": 8}})
    first = store.push(
        folder,
        metrics=SIDES,
        dataset=DATASET,
        figures={"curves/repeats": figure},
        base_figures={"curves/repeats": figure},
        tables={"words": {"word": ["a", "b"], "score": [0.1, 0.2]}},
        params={"seed": 3},
    )
    parent = manifest.read(folder).digest
    second = store.push(seal(2.0, parents=[parent]), metrics=SIDES, dataset=DATASET)
    return Given(first, second, folder)


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_client.tracking_uri())


def in_mlflow(place: Path, model_id: str) -> Path:
    (folder,) = place.glob(f"mlartifacts/*/models/{model_id}/artifacts")
    return folder


# ---- references ----


def test_references_parse_to_what_they_say() -> None:
    assert store.parse_ref("attention_sink") == store.Ref(system="attention_sink", which="champion")
    assert store.parse_ref("attention_sink@challenger") == store.Ref(system="attention_sink", which="challenger")
    assert store.parse_ref("attention_sink@base") == store.Ref(system="attention_sink", which="base")
    assert store.parse_ref("attention_sink@3") == store.Ref(system="attention_sink", which="3")
    assert store.parse_ref("sha256:AB12cd34") == store.Ref(digest="ab12cd34")
    assert store.parse_ref("c" * 64) == store.Ref(digest="c" * 64)
    assert store.parse_ref("./runs/x") == store.Ref(folder=Path("runs/x"))


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("no_such_system", NotFound, "no_such_system"),
        ("attention_sink@", ConfigError, "champion, challenger, base or a version"),
        ("attention_sink@latest", ConfigError, "attention_sink@latest"),
        ("attention_sink@0", ConfigError, "attention_sink@0"),
        ("sha256:ab12", ConfigError, "8 to 64"),
        ("sha256:" + "a" * 65, ConfigError, "8 to 64"),
        ("sha256:ab12zz34", ConfigError, "hex"),
        ("ab12cd34ef", ConfigError, "sha256:ab12cd34ef"),
        ("", NotFound, "''"),
    ],
)
def test_a_bad_reference_is_refused_with_its_value(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as e:
        store.parse_ref(text)
    assert says in str(e.value)


def test_champion_and_challenger_come_from_the_ledger(given: Given, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    assert store.resolve("attention_sink", ledger) == "base"
    with pytest.raises(NotFound, match="no challenger"):
        store.resolve("attention_sink@challenger", ledger)
    one, two = given.first.digest, given.second.digest
    entry = ledger.append("attention_sink", "promote", expect="", champion=one, challenger=None, who="test")
    ledger.append("attention_sink", "challenge", expect=entry.hash, champion=one, challenger=two, who="test")
    # an alias that says otherwise is display, and is not believed
    store.mirror("attention_sink", two, one)
    assert store.resolve("attention_sink@champion", ledger) == one
    assert store.resolve("attention_sink@challenger", ledger) == two
    assert store.resolve("attention_sink@base", ledger) == "base"


def test_version_digest_prefix_and_folder_resolve(given: Given, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    assert store.resolve(f"attention_sink@{given.second.version}", ledger) == given.second.digest
    assert store.resolve(f"sha256:{given.first.digest[:9]}", ledger) == given.first.digest
    assert store.resolve(given.first.digest, ledger) == given.first.digest
    assert store.resolve(str(given.folder), ledger) == given.first.digest
    with pytest.raises(NotFound, match="no version 99"):
        store.resolve("attention_sink@99", ledger)
    with pytest.raises(NotFound, match="sha256:00000000"):
        store.resolve("sha256:00000000", ledger)


def test_an_ambiguous_prefix_is_refused_with_both_digests(given: Given, place: Path, tmp_path: Path) -> None:
    twin = given.first.digest[:10] + "0" * 54
    (place / "artifacts" / twin).mkdir()
    try:
        with pytest.raises(ConfigError, match=twin):
            store.resolve(f"sha256:{twin[:10]}", Ledger(tmp_path / "ledger.db"))
    finally:
        (place / "artifacts" / twin).rmdir()


# ---- push ----


def test_pushing_the_same_digest_twice_is_one_version(given: Given) -> None:
    before = len(list(mlflow_client.versions("name = 'smollm2'")))
    again = store.push(given.folder, metrics={"patched": {"extra": 1.0}, "base": {"extra": 0.0}})
    assert again == given.first
    assert len(mlflow_client.versions("name = 'smollm2'")) == before
    assert store.show(given.first.digest)["metrics"]["patched"]["extra"] == 1.0


def test_measuring_the_same_again_adds_no_point(given: Given) -> None:
    def points() -> int:
        return len(client().get_metric_history(given.second.run_id, "target/repeat"))

    assert points() == 1
    store.log_bench(given.second.digest, SIDES)
    assert points() == 1


def test_base_and_patched_share_experiment_dataset_and_metric_names(given: Given) -> None:
    patched = client().get_run(given.second.run_id)
    base = mlflow_client.find_run(client(), given.second.digest, "base")
    assert base.info.experiment_id == patched.info.experiment_id
    assert client().get_experiment(base.info.experiment_id).name == "patchbay/smollm2"
    assert base.data.metrics.keys() == patched.data.metrics.keys() == QUALITY.keys()
    assert [d.dataset.name for d in base.inputs.dataset_inputs] == ["repeats"]
    assert patched.inputs.dataset_inputs[0].dataset.digest == "d" * 32
    for model_id in (given.second.model_id, mlflow_client.find_base("smollm2", BASE).tags["model.id"]):
        metrics = client().get_logged_model(model_id).metrics or []
        assert QUALITY.keys() <= {m.key for m in metrics}
        assert {m.dataset_name for m in metrics if m.key in QUALITY} == {"repeats"}


def test_the_base_is_stored_once_without_weights(given: Given, place: Path) -> None:
    versions = [v for v in mlflow_client.versions("name = 'smollm2'") if v.tags["patch.kind"] == "base"]
    assert len(versions) == 1
    folder = in_mlflow(place, versions[0].tags["model.id"])
    sealed = folder / "artifacts" / "patch"
    assert [p.name for p in sealed.iterdir()] == ["manifest.json"]
    about = manifest.read(sealed)
    assert (about.kind, about.bases, about.files) == ("model", {"base": f"pypi:smollm2@{BASE}"}, {})
    assert (folder / "MLmodel").is_file()


def test_every_tag_is_on_the_version_and_on_the_model(given: Given) -> None:
    version = mlflow_client.find_version(given.second.digest)
    assert version.tags.keys() == set(store.TAGS)
    model = client().get_logged_model(given.second.model_id)
    assert {k: model.tags[k] for k in store.TAGS} == version.tags
    assert version.tags["parent.digest"] == given.first.digest
    assert version.tags["patch.op"] == "SinkEdit"
    assert version.tags["data.digest"] == DATASET[1]
    assert version.tags["gate.status"] == "pending"
    assert version.source == f"models:/{given.second.model_id}"


def test_a_gate_is_recorded_on_the_second_push(given: Given) -> None:
    store.push(given.folder, gate="passed")
    assert mlflow_client.find_version(given.first.digest).tags["gate.status"] == "passed"
    store.push(given.folder)
    assert mlflow_client.find_version(given.first.digest).tags["gate.status"] == "passed"


def test_figures_and_tables_are_artifacts_of_both_runs(given: Given) -> None:
    assert {"figures/curves/repeats.png", "tables/words.json"} <= set(store.show(given.first.digest)["files"])
    base = mlflow_client.find_run(client(), given.first.digest, "base")
    assert shown.files_of(client(), base.info.run_id, "figures") == ["figures/curves/repeats.png"]


def test_a_figure_may_be_a_file(given: Given, tmp_path: Path) -> None:
    (tmp_path / "x.svg").write_text("<svg/>")
    store.log_figures(given.second.digest, {"maps/heat": tmp_path / "x.svg"})
    assert "figures/maps/heat.svg" in store.show(given.second.digest)["files"]


def test_nothing_pickled_is_logged(given: Given, place: Path) -> None:
    files = [p for p in in_mlflow(place, given.first.model_id).rglob("*") if p.is_file()]
    assert {"MLmodel", "pyfunc.py", "manifest.json", "patch.safetensors"} <= {p.name for p in files}
    assert not [p for p in files if p.suffix in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"}]
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert sum(p.stat().st_size for p in files) < 40_000


def test_the_requirements_name_what_is_imported_and_never_patchbay(given: Given, place: Path) -> None:
    folder = in_mlflow(place, given.first.model_id)
    for name in ("requirements.txt", "conda.yaml"):
        assert "patchbay" not in (folder / name).read_text()
    needs = {line.partition("==")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert {"mlflow", "torch", "transformers", "safetensors", "psutil", "pandas", "gguf"} <= needs
    assert not needs & {"bentoml", "matplotlib", "onnxruntime-gpu"}


def test_signature_and_input_example_are_the_familys_table(given: Given, place: Path) -> None:
    about = mlflow.models.get_model_info(f"models:/{given.first.model_id}")
    assert about.signature.inputs.input_names() == ["prompt"]
    assert about.signature.outputs.input_names() == ["text"]
    assert {p.name: p.default for p in about.signature.params} == {"max_tokens": 32, "strength": 1.0}
    assert about.saved_input_example_info is not None
    assert (in_mlflow(place, given.first.model_id) / "serving_input_example.json").is_file()


def test_a_system_counts_its_versions_over_all_its_bases(
    given: Given, seal: Callable[..., Path], tmp_path: Path
) -> None:
    """MLflow counts per registered model, and there is one per base: @2 would have been two artifacts."""
    other = store.push(seal(12.0, base=f"pypi:gemma3@{'c' * 64}"))
    third = store.push(seal(13.0))
    numbers = [p.version for p in (given.first, given.second, other, third)]
    assert len(set(numbers)) == 4
    assert numbers == sorted(numbers)
    ledger = Ledger(tmp_path / "ledger.db")
    assert [store.resolve(f"attention_sink@{n}", ledger) for n in numbers] == [
        given.first.digest, given.second.digest, other.digest, third.digest
    ]  # fmt: skip
    rows = {r.digest: (r.model, r.version) for r in store.list_models("attention_sink")}
    assert rows[other.digest] == ("gemma3", other.version)


def test_intervals_and_n_are_beside_the_number_and_come_back(given: Given, seal: Callable[..., Path]) -> None:
    flat, moved = Measure(0.5, 0.4, 0.6, 100, "higher"), Measure(0.9, 0.85, 0.94, 100, "higher")
    noisy = Measure(0.2, 0.0, 0.9, 3, "lower")
    sides = {
        "base": {"a/same": flat, "quality/moved": flat, "z/noisy": noisy},
        "patched": {"a/same": flat, "quality/moved": moved, "z/noisy": Measure(0.8, 0.1, 1.0, 3, "lower")},
    }
    pushed = store.push(seal(14.0), metrics=sides)
    logged = client().get_run(pushed.run_id).data.metrics
    assert logged["quality/moved/low"] == 0.85
    assert logged["quality/moved/n"] == 100
    got = store.compare("base", pushed.digest)
    assert {r.metric: (r.a, r.b) for r in got.rows} == {k: (sides["base"][k], v) for k, v in sides["patched"].items()}
    page, _, query = got.url.partition("?")
    assert page.endswith("/#/metric")
    asked = {k: json.loads(v) for k, (v,) in parse_qs(query).items() if k != "x_axis"}
    assert asked["metric"] == "quality/moved"  # what differs most in units of its interval, not the first by name
    assert asked["plot_metric_keys"] == ["quality/moved"]
    assert asked["runs"][1] == pushed.run_id
    assert store.compare_url(pushed.digest) == got.url


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"patched": {"p99": float("inf")}}, "p99"),
        ({"patched": {"p99": float("nan")}}, "p99"),
        ({"patched": {"a@b": 1.0}}, "a@b"),
        ({"patched": {"../a": 1.0}}, "../a"),
        ({"control": {"a": 1.0}}, "control"),
        ({"base": {"a": 1.0}, "patched": {"a": 1.0, "ratio": 2.0}}, "ratio"),
    ],
)
def test_a_bad_metric_is_refused_before_anything_is_written(
    metrics: store.Sides, says: str, seal: Callable[..., Path], given: Given
) -> None:
    folder = seal(-1.0)
    with pytest.raises(ConfigError, match=says):
        store.push(folder, metrics=metrics)
    with pytest.raises(NotFound):
        store.show(manifest.read(folder).digest)


def test_a_folder_that_was_tampered_with_is_not_pushed(seal: Callable[..., Path]) -> None:
    folder = seal(5.0)
    flip(folder / "patch.safetensors")
    with pytest.raises(Tampered):
        store.push(folder)


def test_what_is_only_to_be_read_has_no_model_and_what_has_no_base_is_named_as_its_system(
    seal: Callable[..., Path], place: Path
) -> None:
    pushed = store.push(seal(6.0, kind="finding", system="videomae", base=""), metrics={"patched": {"loss": 1.0}})
    assert mlflow_client.find_version(pushed.digest).name == "videomae"
    assert not (in_mlflow(place, pushed.model_id) / "MLmodel").exists()
    with pytest.raises(ConfigError, match="no base"):
        store.log_bench(pushed.digest, {"base": {"loss": 1.0}})


# ---- pull ----


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def forget(place: Path, digest: str) -> Path:
    """Take the artifact off this host; returns where it was put."""
    away = place / "away" / digest
    away.parent.mkdir(exist_ok=True)
    (place / "artifacts" / digest).rename(away)
    return away


def test_pull_brings_back_what_was_pushed(given: Given, place: Path) -> None:
    forget(place, given.first.digest)
    folder = store.pull(given.first.digest)
    assert folder == place / "artifacts" / given.first.digest
    assert manifest.read(folder) == manifest.read(given.folder)
    assert not list((place / "artifacts").glob(".part-*"))


def test_pull_refuses_a_flipped_byte_in_mlflow(seal: Callable[..., Path], place: Path) -> None:
    pushed = store.push(seal(7.0))
    forget(place, pushed.digest)
    flip(in_mlflow(place, pushed.model_id) / "artifacts" / "patch" / "patch.safetensors")
    with pytest.raises(Tampered, match="MLflow's copy"):
        store.pull(pushed.digest)
    assert not (place / "artifacts" / pushed.digest).exists()


def test_pull_refuses_a_local_copy_that_changed_and_says_what_to_delete(seal: Callable[..., Path], place: Path) -> None:
    pushed = store.push(seal(8.0))
    folder = store.pull(pushed.digest)
    flip(folder / "patch.safetensors")
    with pytest.raises(Tampered, match="delete"):
        store.pull(pushed.digest)


def test_what_is_here_is_pulled_without_mlflow(
    given: Given, seal: Callable[..., Path], place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fitted = seal(9.0)
    digest = manifest.read(fitted).digest
    (place / "runs").mkdir(exist_ok=True)
    fitted.rename(place / "runs" / f"attention_sink-{digest[:16]}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    assert store.pull(given.first.digest).name == given.first.digest
    assert store.resolve(f"sha256:{digest[:12]}", Ledger(tmp_path / "ledger.db")) == digest
    assert store.pull(digest) == place / "artifacts" / digest
    with pytest.raises(NotReady, match="127.0.0.1:9"):
        store.pull("e" * 64)
    warning = store.mirror("attention_sink", given.first.digest, None)
    assert warning is not None
    assert "lag behind the ledger" in warning


def test_an_unknown_digest_is_not_found_and_a_prefix_is_not_a_digest(given: Given) -> None:
    with pytest.raises(NotFound, match="eeeeeeee"):
        store.pull("e" * 64)
    with pytest.raises(ConfigError, match="64 hex"):
        store.pull("../../etc")


# ---- questions ----


def test_list_shows_artifacts_with_metrics_and_aliases(given: Given) -> None:
    assert store.mirror("attention_sink", "base", given.second.digest) is None
    rows = {row.digest: row for row in store.list_models("attention_sink")}
    row = rows[given.second.digest]
    assert (row.base, row.kind, row.model) == (f"pypi:smollm2@{BASE}", "patch", "smollm2")
    assert row.metrics == BETTER
    assert row.aliases == ["attention_sink-challenger"]
    assert "base" not in {row.kind for row in store.list_models()}
    with pytest.raises(NotFound, match="nobody"):
        store.list_models("nobody")


def test_aliases_follow_the_ledger(given: Given) -> None:
    def alias() -> dict[str, str]:
        return cast("dict[str, str]", client().get_registered_model("smollm2").aliases)

    base = mlflow_client.find_base("smollm2", BASE)
    assert store.mirror("attention_sink", "base", given.first.digest) is None
    assert int(alias()["attention_sink-champion"]) == int(base.version)
    first = int(mlflow_client.find_version(given.first.digest).version)
    assert int(alias()["attention_sink-challenger"]) == first
    assert store.mirror("attention_sink", given.first.digest, None) is None
    assert int(alias()["attention_sink-champion"]) == first
    assert "attention_sink-challenger" not in alias()
    assert "never pushed" in (store.mirror("attention_sink", "f" * 64, None) or "")


def test_show_tells_the_lineage_from_the_base_to_the_patch(given: Given) -> None:
    shown = store.show(given.second.digest)
    assert [step["digest"] for step in shown["lineage"]] == [BASE, given.first.digest, given.second.digest]
    assert [step["kind"] for step in shown["lineage"]] == ["base", "patch", "patch"]
    manifest.canonical(shown)  # plain JSON


def test_compare_subtracts_the_base_measured_beside_it(given: Given) -> None:
    table = store.compare("base", given.second.digest, ui="http://mlflow.example")
    differences = {row.metric: row.difference for row in table.rows}
    assert differences["target/repeat"] == pytest.approx(0.8)
    assert table.table_url.startswith("http://mlflow.example/#/compare-runs?runs=%5B%22")
    assert table.url.startswith("http://mlflow.example/#/metric?runs=%5B%22")
    assert given.second.run_id in table.url
    both = store.compare(given.first.digest, given.second.digest)
    assert {row.difference for row in both.rows if row.metric in QUALITY} == {0.0}
    assert [row.b for row in both.rows if row.metric == "extra"] in ([], [None])


def test_an_artifact_measured_alone_has_no_base_to_compare_with(seal: Callable[..., Path], given: Given) -> None:
    alone = store.push(seal(10.0))
    with pytest.raises(NotFound, match="both sides"):
        store.compare("base", alone.digest)


def test_a_bench_report_is_kept_beside_its_metrics(given: Given, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    times = {"base": {"latency/p50_ms": 10.0}, "patched": {"latency/p50_ms": 11.0}}
    store.log_bench(given.first.digest, times, tmp_path / "bench.json")
    shown = store.show(given.first.digest)
    assert shown["metrics"]["base"]["latency/p50_ms"] == 10.0
    assert "bench/bench.json" in shown["files"]


def test_a_window_is_logged_once_and_decisions_keep_their_evidence(place: Path) -> None:
    assert store.log_window("sink-1", 0, {"ab/e_value": 1.0})
    assert store.log_window("sink-1", 1, {"ab/e_value": 3.0})
    assert not store.log_window("sink-1", 1, {"ab/e_value": 9.0})
    store.log_decision("sink-1", {"action": "promote", "why": "e-value"})
    store.log_decision("sink-1", {"action": "promote", "why": "e-value"})
    experiment = client().get_experiment_by_name("patchbay/ab")
    assert experiment is not None
    (run,) = client().search_runs([experiment.experiment_id], "tags.`ab.experiment` = 'sink-1'")
    assert [(m.step, m.value) for m in client().get_metric_history(run.info.run_id, "ab/e_value")] == [
        (0, 1.0),
        (1, 3.0),
    ]
    assert len(client().list_artifacts(run.info.run_id, "decisions")) == 1
    assert run.data.tags["ab.decision"] == "promote"


# ---- what MLflow runs ----


def test_mlflow_loads_and_runs_a_pushed_patch(place: Path) -> None:
    llm = pytest.importorskip("patches.families.llm")
    from patches import artifact
    from patches.mechanisms.sink import SinkConfig, SinkEdit
    from patches.subject import Subject

    base = llm.tiny()
    folder = place / "made" / "tiny"
    edit = SinkEdit(SinkConfig(neurons=tuple((2, j) for j in range(24))), {})
    about = artifact.save(edit, "attention_sink", folder, base=base.label)
    pushed = store.push(folder)
    model = mlflow.pyfunc.load_model(f"models:/{pushed.model_id}")
    prompts = ["hello there", "a a a a a a"]
    table = pd.DataFrame({"prompt": prompts})
    patched = llm.generate(Subject.load(folder), prompts, max_tokens=32)
    untouched = llm.generate(Subject(llm.tiny()), prompts, max_tokens=32)
    assert model.predict(table) == patched
    assert model.predict(table, params={"strength": 0.0}) == untouched != patched
    assert model.predict(table, params={"max_tokens": 0}) != patched
    assert about.digest == pushed.digest
    version = mlflow_client.find_base(mlflow_client.find_version(about.digest).name, base.digest)
    bare = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    assert bare.predict(table) == untouched
    with pytest.raises(MlflowException, match="prompt"):
        bare.predict(pd.DataFrame({"text": prompts}))


def test_two_processes_push_one_artifact_at_once_and_neither_needs_torch(
    seal: Callable[..., Path], given: Given
) -> None:
    folder = seal(11.0)
    code = (
        "import sys; from pathlib import Path; from registry import store; "
        f"store.push(Path({str(folder)!r})); sys.exit('torch' in sys.modules)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len(mlflow_client.versions(f"tags.`patch.digest` = '{manifest.read(folder).digest}'")) == 1
