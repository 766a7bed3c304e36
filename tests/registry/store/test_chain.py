"""From an endpoint's digest to the run that was fitted, and back, by what MLflow's pages show: tags and links."""

from __future__ import annotations

import json
import re

import mlflow
import numpy as np
import pytest
from safetensors.numpy import save_file

from registry import manifest, store
from registry.store import mlflow_client
from registry.store.notes import NOTE


@pytest.fixture
def pushed(home):
    """A patch made from another one, with a recipe and evidence."""
    made = []
    for number, parents in ((1, []), (2, [0])):
        folder = home / "made" / str(number)
        folder.mkdir(parents=True)
        save_file({"value": np.full(2, number, dtype=np.float32)}, folder / "patch.safetensors")
        (folder / "recipe.json").write_text(json.dumps({"recipe": "attention_sink/lab", "config": {}}))
        (folder / "evidence.json").write_text("{}")
        manifest.write(folder, kind="patch", system="attention_sink", base=f"tiny:0@{'b' * 64}", config={},
                       parents=[made[i].digest for i in parents])  # fmt: skip
        made.append(store.push(folder, metrics={"base": {"quality/x": 1.0}, "patched": {"quality/x": 2.0}}))
    yield made
    mlflow.set_tracking_uri(None)


FIT = {"fit/recipe.json", "fit/evidence.json"}


def links(text):
    return dict(re.findall(r"\[([^\]]+)\]\((#/[^)]+)\)", text))


def follow(client, address):
    """The run or version that a page's address shows."""
    if run := re.fullmatch(r"#/experiments/(\w+)/runs/(\w+)", address):
        found = client.get_run(run[2])
        assert found.info.experiment_id == run[1]
        return found
    name, number = re.fullmatch(r"#/models/([\w.-]+)/versions/(\d+)", address).groups()
    return client.get_model_version(name, number)


def test_the_chain_is_walked_both_ways(pushed):
    first, second = pushed
    with mlflow_client.connected() as client:
        assert store.begin_experiment("sink-1", "attention_sink", first.digest, second.digest) is None
        assert store.begin_experiment("sink-1", "attention_sink", first.digest, second.digest) is None  # once is enough
        assert store.mirror("attention_sink", first.digest, second.digest) is None

        # an answer's header says the digest; the page's search finds the version
        (version,) = client.search_model_versions(f"tags.`patch.digest` = '{second.digest}'")
        run = client.get_run(version.run_id)
        assert run.data.tags["recipe"] == "attention_sink/lab"
        assert {f.path for f in client.list_artifacts(run.info.run_id, "fit")} == {
            "fit/recipe.json",
            "fit/evidence.json",
        }

        # from the run: its version, the base's run beside it, the parent, the experiment
        shown = [follow(client, a) for a in links(run.data.tags[NOTE]).values()]
        names = [getattr(s, "name", "") or s.info.run_name for s in shown]
        assert any(getattr(s, "run_id", "") == run.info.run_id for s in shown), names
        assert any(getattr(s, "run_id", "") == first.run_id for s in shown), "its parent"
        (trial,) = [s for s in shown if hasattr(s, "info") and s.info.run_name == "sink-1"]
        (base,) = [s for s in shown if hasattr(s, "info") and s.data.tags.get("patch.side") == "base"]
        assert follow(client, next(iter(links(base.data.tags[NOTE]).values()))).run_id == run.info.run_id

        # from the experiment on users to both arms, and from the version to the run and to the experiment
        assert trial.data.tags["ab.control"] == first.digest
        arms = [follow(client, a).run_id for a in links(trial.data.tags[NOTE]).values()]
        assert arms == [first.run_id, second.run_id]
        back = [
            follow(client, a)
            for a in links(client.get_model_version(version.name, version.version).description).values()
        ]
        assert {b.info.run_id for b in back} == {run.info.run_id, trial.info.run_id}
        aliases = {d: client.get_model_version(v.name, v.version).aliases for d, v in
                   ((p.digest, mlflow_client.find_version(p.digest)) for p in pushed)}  # fmt: skip
        assert aliases == {first.digest: ["attention_sink-champion"], second.digest: ["attention_sink-challenger"]}
