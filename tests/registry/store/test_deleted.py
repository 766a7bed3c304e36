"""What people delete in MLflow's page is restored, or named with the way out."""

from __future__ import annotations

import mlflow
import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from registry import cli, manifest, store
from registry.ab.ledger import Ledger
from registry.errors import NotFound
from registry.store import mlflow_client

SIDES = {"base": {"quality/x": 0.4}, "patched": {"quality/x": 0.6}}
ONE = {"base": {"quality/y": 1.0}, "patched": {"quality/y": 2.0}}
numbers = iter(range(1, 1000))


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """One home with one MLflow for the file: making its database costs seconds."""
    with pytest.MonkeyPatch.context() as patch:
        where = tmp_path_factory.mktemp("deleted")
        patch.setenv("PATCHBAY_HOME", str(where))
        yield where
    mlflow.set_tracking_uri(None)


@pytest.fixture
def pushed(place, monkeypatch):
    """A patch of its own for every test, with its folder, measured beside its base."""
    monkeypatch.setenv("PATCHBAY_HOME", str(place))
    folder = place / "made" / str(number := next(numbers))
    folder.mkdir(parents=True)
    save_file({"value": np.full(2, number, dtype=np.float32)}, folder / "patch.safetensors")
    base = f"tiny:{number}@{number:064x}"
    manifest.write(
        folder, kind="patch", system="attention_sink", base=base, config={"op": "set", "value": float(number)}
    )
    return folder, store.push(folder, metrics=SIDES)


def delete(what, one):
    """As its button in MLflow's page does."""
    client, version = mlflow.MlflowClient(), mlflow_client.find_version(one.digest)
    base = mlflow_client.find_base(version.name, version.tags["base.digest"])
    run = client.get_run(version.run_id)
    if what == "run":
        client.delete_run(version.run_id)
    elif what == "base run":
        client.delete_run(mlflow_client.find_run(client, one.digest, "base").info.run_id)
    elif what == "experiment":
        client.delete_experiment(run.info.experiment_id)
    elif what == "version":
        client.delete_model_version(version.name, version.version)
    elif what == "base version":
        client.delete_model_version(base.name, base.version)
    elif what == "registered model":
        client.delete_registered_model(version.name)
    elif what == "model":
        client.delete_logged_model(version.tags["model.id"])


RESTORED = ("run", "base run", "experiment", "version", "base version", "registered model")


@pytest.mark.parametrize("what", RESTORED)
def test_it_is_restored_by_the_next_push(what, pushed):
    folder, one = pushed
    delete(what, one)
    again = store.push(folder, metrics=ONE)
    assert again.digest == one.digest
    if "version" not in what and what != "registered model":
        assert again.version == one.version, "a number stays"
    _, sides = store.measured(one.digest)
    assert sides["patched"]["quality/y"].value == 2.0
    assert sides["base"]["quality/y"].value == 1.0
    if what in ("run", "base run", "experiment"):
        assert sides["patched"]["quality/x"].value == 0.6, "what was measured before is there again"
    assert store.compare("base", one.digest).rows
    assert store.mirror("attention_sink", one.digest, None) is None


VERBS = {
    "show": store.show,
    "compare": lambda d: store.compare("base", d),
    "bench": lambda d: store.log_bench(d, ONE),
    "gate": lambda d: store.log_gate(d, "passed", {"gate/latency": 1.0}, {"gate": {}}),
    "measured": store.measured,
}


@pytest.mark.parametrize("what", ["run", "base run", "experiment"])
def test_every_other_verb_restores_it_too(what, pushed):
    _, one = pushed
    for name, verb in VERBS.items():
        delete(what, one)
        verb(one.digest)
        if what != "base run":
            assert mlflow.MlflowClient().get_run(one.run_id).info.lifecycle_stage == "active", name


def test_a_deleted_model_is_named_with_the_way_out(pushed, capsys):
    folder, one = pushed
    delete("model", one)
    with pytest.raises(NotFound, match="Delete that version as well, and push again"):
        store.push(folder)
    assert cli.main(["push", str(folder)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    delete("version", one)
    assert store.push(folder).digest == one.digest


def test_the_experiments_of_the_ab_are_restored(pushed):
    evidence = {"action": "continue", "why": "early"}
    for step, what in enumerate(("nothing", "run", "experiment")):
        client = mlflow.MlflowClient()
        with mlflow_client.connected():
            at = mlflow_client.make_experiment(client, mlflow_client.AB)
            run = store.ab_display.ab_run(client, "sink-9")
        if what == "run":
            client.delete_run(run.info.run_id)
        if what == "experiment":
            client.delete_experiment(at)
        assert store.log_window("sink-9", step, {"ab/effect": 0.1})
        store.log_decision("sink-9", evidence)
        assert store.show_experiment("sink-9", Figure(), evidence) is None
    assert len(client.get_metric_history(run.info.run_id, "ab/effect")) == 3
    assert Ledger().verify() >= 0
