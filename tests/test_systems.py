"""Conformance over the table of systems: fit, seal, eval, push, load, compare, serve, ask, split and build.

All by the row alone: a new system is in here as soon as its row has a job; one whose shape is new says in
tests/asking.py how it is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math

import httpx
import pandas as pd
import pytest

from registry import cli, manifest
from registry.systems import SYSTEMS, System

from .asking import SHAPES, routed

TEMPLATE = System(
    "_template", "The smallest complete system", "0000.00000", "llm",
    "training._template.mechanism:WithoutDirection", ("generate",),
)  # fmt: skip
"""what docs/tutorials/add-a-system.md copies"""
READY = [name for name, row in SYSTEMS.items() if not row.planned] + [TEMPLATE.name]

DEAR = {
    "clip_sae": "fits four other defences; tests/training/clip_sae/test_report.py runs it in short",
    "second_order": "composes two thousand pictures; tests/test_devices.py runs it",
}
"""systems whose report is not for every test run, with the reason"""

pytestmark = pytest.mark.parametrize("name", READY)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """One home with one MLflow for the file: making its database costs seconds."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        where = tmp_path_factory.mktemp("systems")
        patch.setenv("PATCHBAY_HOME", str(where))
        patch.setitem(SYSTEMS, TEMPLATE.name, TEMPLATE)
        yield where
    mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def _at_home(place, monkeypatch):
    monkeypatch.setenv("PATCHBAY_HOME", str(place))


def said(*words):
    """What a verb answers programs."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*map(str, words), "--json"])
    assert code == 0, err.getvalue()
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def pushed(place):
    """name -> what `fit` and `push` answered of its tiny recipe; made once for this file."""
    made = {}

    def once(name):
        if name not in made:
            fitted = said("fit", f"{name}/tiny")
            made[name] = {**fitted, **said("push", fitted["folder"])}
        return made[name]

    return once


@pytest.fixture(scope="module")
def measured(pushed):
    """name -> what `eval` answered, with the full report where it is cheap; made once for this file."""
    made = {}

    def once(name):
        if name not in made:
            full = ["--full"] if name not in DEAR and hasattr(SYSTEMS[name].load_job(), "report") else []
            made[name] = said("eval", f"sha256:{pushed(name)['digest']}", *full)
        return made[name]

    return once


def test_a_fit_is_sealed_under_its_name_with_its_evidence(name, pushed):
    row, made = SYSTEMS[name], pushed(name)
    about = manifest.read(made["folder"], digest=made["digest"])
    assert about.system == name
    assert about.bases.keys() == row.bases.keys()
    assert about.kind == "patch" if row.patch else about.kind in ("model", "search")
    assert {"recipe.json", "evidence.json"} <= about.files.keys()


def test_both_sides_are_measured_and_compared(name, pushed, measured):
    """Every number with its interval, or none; the same names on both sides."""
    made = pushed(name)
    got = measured(name)["metrics"]
    assert got["base"].keys() == got["patched"].keys()
    for metric, m in (*got["base"].items(), *got["patched"].items()):
        assert metric.split("/")[0] in ("quality", "target", "offtarget")
        assert math.isfinite(m["value"])
        assert m["n"], f"{metric} says not how many it was measured on"
        if m["low"] is not None:
            assert m["low"] <= m["value"] <= m["high"], metric
    rows = said("compare", f"{name}@base", f"sha256:{made['digest']}")["metrics"]
    assert {r["metric"] for r in rows} >= got["base"].keys()


def test_its_gate_holds_it_to_what_its_recipe_promises(name, pushed, measured):
    """Not promoted before; afterwards the ledger and the version say what was promised, and what came."""
    from registry import gate
    from registry.ab.ledger import Ledger
    from registry.store import mlflow_client

    made, known = pushed(name), measured(name)["metrics"]
    if Ledger().gate(name, made["digest"]) is None:
        assert cli.main(["promote", f"sha256:{made['digest']}"]) == 1
    got = said("gate", f"sha256:{made['digest']}")
    assert got["status"] == "passed"
    assert [p["promise"]["metric"] for p in got["promises"]][-1] == gate.LATENCY
    assert len(got["promises"]) > 1
    for p in got["promises"]:
        assert p["n"], p["says"]
        if p["promise"]["asks"] in ("least", "most") and p["promise"]["metric"] != gate.LATENCY:
            assert p["value"] == known["patched"][p["promise"]["metric"]]["value"], "it was measured once more"
    assert Ledger().gate(name, made["digest"]) == got
    version = mlflow_client.find_version(made["digest"])
    assert version.tags["gate.status"] == "passed"
    with mlflow_client.connected() as client:
        assert f"gate/{gate.LATENCY}" in client.get_run(version.run_id).data.metrics


def test_mlflow_loads_it_and_its_base_and_both_predict(name, pushed):
    import mlflow

    from patches.families.family import family
    from registry.store import mlflow_client

    made, table = pushed(name), family(SYSTEMS[name].family).table
    frame = pd.DataFrame({c.name: [c.example] for c in table.takes})
    version = mlflow_client.find_version(made["digest"])
    base = mlflow_client.find_base(version.name, version.tags["base.digest"])
    for which in (version, base):
        model = mlflow.pyfunc.load_model(f"models:/{which.name}/{which.version}")
        assert model.metadata.signature is not None
        got = model.predict(frame)
        assert len(got) == 1
        if isinstance(got, pd.DataFrame):
            assert list(got.columns) == [c.name for c in table.gives]


def test_every_shape_answers_and_an_experiment_reaches_both_arms(name, pushed):
    """Served in this process; the base is the one the artifact names."""
    from bentos.app import application
    from bentos.runtime import Settings
    from bentos.tokens import Tokens

    made, row = pushed(name), SYSTEMS[name]
    said("gate", f"sha256:{made['digest']}")
    said("promote", f"sha256:{made['digest']}")

    async def work():
        app = application(Settings(name), Tokens(None))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=120) as http:

                async def one(shape, **headers):
                    ask = SHAPES[shape]
                    names = {f"x-patchbay-{k}": v for k, v in headers.items()}
                    if ask.body is None:
                        got = await http.get(ask.path, headers=names)
                    else:
                        got = await http.post(ask.path, json=ask.body(), headers=names)
                    assert got.status_code == 200, f"{shape}: {got.text[:400]}"
                    return got

                for shape in row.services:
                    got = await one(shape)
                    assert got.headers["x-patchbay-patch"] == made["digest"], shape
                shape = routed(row.services)
                for arm in ("base", "champion", f"sha256:{made['digest']}"):
                    got = await one(shape, arm=arm)
                    assert got.headers["x-patchbay-patch"] == ("base" if arm == "base" else made["digest"])
                await asyncio.to_thread(said, "promote", f"{name}@base")
                await asyncio.to_thread(said, "split", name, f"sha256:{made['digest']}", "0.5")
                for _ in range(200):
                    if app.state.desk.runtime.table.experiment:
                        break
                    await asyncio.sleep(0.05)
                units = [await one(shape, unit=f"u{i}") for i in range(12)]
                sides = {u.headers["x-patchbay-patch"] for u in units}
                assert all("x-patchbay-experiment" in u.headers for u in units)
                again = await one(shape, unit="u0")
                assert again.headers["x-patchbay-patch"] == units[0].headers["x-patchbay-patch"]
                rows = [{"unit": f"u{i}", "value": 1.0} for i in range(12)]
                outcomes = await http.post("/v1/outcomes", json={"outcomes": rows})
                assert outcomes.status_code == 200, outcomes.text
                return sides

    assert asyncio.run(work()) == {"base", made["digest"]}
    assert said("report", name)["picture"]
    said("split", name, "0")


def test_its_full_report_stands_with_the_version(name, pushed, measured):
    import mlflow

    if not hasattr(SYSTEMS[name].load_job(), "report"):
        pytest.skip("gives no report")
    if name in DEAR:
        pytest.skip(DEAR[name])
    from registry.store import mlflow_client

    made = pushed(name)
    got = measured(name)
    assert got["tables"]
    for columns in got["tables"].values():
        assert set(columns) == {"what", "value", "low", "high", "n"}
        assert len({len(v) for v in columns.values()}) == 1
    run = mlflow_client.find_version(made["digest"]).run_id
    kept = {f.path for f in mlflow.MlflowClient().list_artifacts(run, "tables")}
    assert {f"tables/{t}.json" for t in got["tables"]} <= kept


def test_a_bento_of_it_is_built(name, pushed):
    from bentos.build import build

    if name == TEMPLATE.name:
        pytest.skip("its mechanism lies in training, which no Bento carries; a real one lies in patches/mechanisms")
    made = build(name, pushed(name)["digest"])
    shapes = [f"bentos/shapes/{s.replace('.', '/')}.py" for s in SYSTEMS[name].services]
    assert set(shapes) <= made.contents.keys()
    assert not any(f.startswith("training/") for f in made.contents)


def test_its_bench_times_base_and_artifact_and_knows_what_else_measures_it(name, pushed, monkeypatch):
    from patches.subject import Subject
    from registry import store
    from tests.bench import bench_jobs
    from tests.bench import conftest as benches

    made, row = pushed(name), SYSTEMS[name]
    with Subject.load(store.pull(made["digest"])) as subject:
        took = bench_jobs.times(bench_jobs.runner(subject, 2), subject.only, seconds=0)
    assert took.keys() == {"base", "base again", "patched"}
    assert all(len(t) == 1 and t[0] > 0 for t in took.values())
    monkeypatch.setenv("PATCHBAY_BENCH", made["digest"])
    for family in ("llm", "clip"):
        if row.family == family:
            base, _, who = benches.pushed(family)
            assert (base.family, who) == (family, name)
        else:
            with pytest.raises(pytest.skip.Exception, match="no system of the family"):
                benches.pushed(family)
