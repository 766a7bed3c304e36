"""Versions as MLflow's users meet them: loaded, evaluated, and served by `mlflow models serve`."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from registry import store
from registry.store import mlflow_client

ROOT = Path(__file__).parents[3]
SEALED = ROOT / "tests" / "data" / "sealed_v1" / "artifacts"
LLM = SEALED / "fccd4f07f79046fd2171cf09074e6f209b0b0d2355130aa630e3b5602f432296"
CLIP = SEALED / "65e6d87ec671c5d7c791c8c32bdfde9d383da80fd8bbd1b53d85dd88beaa1bf7"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("pyfunc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHBAY_HOME", str(place))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield place
    mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def _at_home(place, monkeypatch):
    monkeypatch.setenv("PATCHBAY_HOME", str(place))


@pytest.fixture(scope="module")
def versions(place) -> dict[str, dict[str, str]]:
    """family -> base, patched -> models:/ URI"""
    out = {}
    for name, folder in (("llm", LLM), ("clip", CLIP)):
        version = mlflow_client.find_version(store.push(folder).digest)
        base = mlflow_client.find_base(version.name, version.tags["base.digest"])
        out[name] = {
            "base": f"models:/{base.name}/{base.version}",
            "patched": f"models:/{version.name}/{version.version}",
        }
    return out


def _families() -> list[str]:
    from patches.families.family import families

    return families()


@pytest.mark.parametrize("name", _families())
def test_what_a_familys_table_takes_and_gives_is_what_it_predicts(name):
    from patches.families.family import family
    from patches.families.table import example, table, wheels
    from patches.subject import Subject
    from registry.systems import SYSTEMS

    about = family(name)
    assert (table(name), dict(wheels(name))) == (about.table, dict(about.wheels))
    roles = next((row.roles for row in SYSTEMS.values() if row.family == name and row.roles), {"base": name})
    subject = Subject({role: family(kind).tiny(0) for role, kind in roles.items()}, about=about)
    frame = example(about.table)
    got = subject.predict(frame, {})
    subject.close()
    names = list(got.columns) if isinstance(got, pd.DataFrame) else [about.table.gives[0].name]
    assert len(got) == 1
    assert names == [c.name for c in about.table.gives]


@pytest.mark.parametrize("side", ["base", "patched"])
@pytest.mark.parametrize("name", ["llm", "clip"])
def test_a_version_predicts_its_own_example(versions, name, side):
    model = mlflow.pyfunc.load_model(versions[name][side])
    assert model.input_example is not None
    got = model.predict(model.input_example)
    gives = model.metadata.signature.outputs.input_names()
    assert (list(got.columns) if isinstance(got, pd.DataFrame) else gives) == gives
    assert len(got) == 1


def test_a_picture_may_be_bytes_base64_or_a_path_and_labels_a_list(versions, place, monkeypatch):
    from patches.families.clip.labelled import example

    (place / "seen").mkdir(exist_ok=True)
    (place / "seen" / "a.png").write_bytes(example())
    monkeypatch.setenv("PATCHBAY_PICTURES", str(place / "seen"))
    model = mlflow.pyfunc.load_model(versions["clip"]["patched"])
    pictures = [example(), base64.b64encode(example()).decode(), "a.png"]
    answers = [model.predict(pd.DataFrame({"image": [p], "labels": ['["cat", "sun"]']})) for p in pictures]
    assert answers[0].equals(answers[1])
    assert answers[0].equals(answers[2])
    assert answers[0]["label"][0] in ("cat", "sun")
    off = model.predict(pd.DataFrame({"image": [pictures[1]], "labels": ['["cat", "sun"]']}), params={"strength": 0.0})
    base = mlflow.pyfunc.load_model(versions["clip"]["base"])
    assert off.equals(base.predict(pd.DataFrame({"image": [pictures[1]], "labels": ['["cat", "sun"]']})))


def test_mlflow_evaluates_versions(versions, place):
    from patches.families.clip.table import EXAMPLE

    def right(predictions: Any, targets: Any, metrics: Any) -> Any:
        same = [float(a == b) for a, b in zip(predictions, targets, strict=True)]
        return mlflow.metrics.MetricValue(scores=same, aggregate_results={"mean": sum(same) / len(same)})

    metric = mlflow.models.make_metric(eval_fn=right, greater_is_better=True, name="right")
    pictures = pd.DataFrame({"image": [EXAMPLE] * 3, "labels": ['["cat", "sun"]'] * 3, "truth": ["cat", "sun", "cat"]})
    prompts = pd.DataFrame({"prompt": ["hello", "a a"], "truth": ["", ""]})
    at = mlflow.create_experiment("evaluations", (place / "evaluations").as_uri())  # by default: ./mlruns
    mlflow.set_experiment(experiment_id=at)
    for name, table, of in (("clip", pictures, {"predictions": "label"}), ("llm", prompts, {})):
        for side in ("base", "patched"):
            with mlflow.start_run():
                got = mlflow.models.evaluate(
                    model=versions[name][side], data=table, targets="truth", extra_metrics=[metric], **of
                )
            assert 0.0 <= got.metrics["right/mean"] <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "side"), [("llm", "base"), ("clip", "patched")])
def test_mlflow_serves_it(versions, place, name, side):
    """`mlflow models serve --env-manager local`, really started and asked over HTTP."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": mlflow_client.tracking_uri(),
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", versions[name][side], "--env-manager", "local"]
    process = subprocess.Popen([*command, "--port", str(port)], env=env, cwd=place, start_new_session=True)
    example = json.loads(_example(versions[name][side]).read_text())
    try:
        got = _ask(f"http://127.0.0.1:{port}", example)
        assert len(got["predictions"]) == 1
        broken = {"dataframe_split": {"columns": ["nothing"], "data": [["x"]]}}
        with pytest.raises(urllib.error.HTTPError) as e:
            _ask(f"http://127.0.0.1:{port}", broken)
        assert e.value.code == 400
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    want = mlflow.pyfunc.load_model(versions[name][side]).predict(pd.DataFrame(**example["dataframe_split"]))
    if isinstance(want, pd.DataFrame):
        assert got["predictions"][0]["label"] == want["label"][0]
    else:
        assert got["predictions"] == list(want) or got["predictions"][0] == want[0]


def _example(uri: str) -> Path:
    """The request that MLflow wrote down beside the model."""
    return Path(mlflow.artifacts.download_artifacts(f"{uri}/serving_input_example.json"))


def _ask(url: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(1200):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(url)


def test_an_exported_checkpoint_stands_alone_and_answers_as_the_patch(place, tmp_path):
    from patches import artifact
    from patches.export import export
    from patches.families import llm
    from patches.mechanisms.sink import SinkConfig, SinkEdit

    edit = SinkEdit(SinkConfig(neurons=((0, 1), (0, 7), (1, 3), (2, 5)), keep_first=False), {})
    artifact.save(edit, "attention_sink", tmp_path / "sealed", base=llm.tiny().label)
    patch, whole = store.push(tmp_path / "sealed"), store.push(export(tmp_path / "sealed"))
    frame = pd.DataFrame({"prompt": ["hello there", "a a a"]})
    answers = [mlflow.pyfunc.load_model(f"models:/{p.model_id}").predict(frame) for p in (patch, whole)]
    assert answers[0] == answers[1]
