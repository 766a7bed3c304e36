"""Arms that are models or searches pass through everything that patches do: fit, eval, push, compare, pyfunc, split,
serve and build; export refuses them in one line."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import httpx
import mlflow
import pandas as pd
import pytest

from registry import cli, manifest, store

from . import standin
from .standin import MODEL, SEARCH

BASE_Y = {MODEL: 2.0 * 2.0, SEARCH: 2.0 * 3.0 * 2.0}
"""what the base makes of 2"""
FACTOR = 5.0
PATCHED_Y = {MODEL: FACTOR * 2.0, SEARCH: FACTOR * BASE_Y[SEARCH]}

pytestmark = pytest.mark.parametrize("name", [MODEL, SEARCH])


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """One home with one MLflow for the file: making its database costs seconds."""
    with standin.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp("kinds")))
        yield
    mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def _at_home(place, tmp_path_factory, monkeypatch):
    home = next(Path(tmp_path_factory.getbasetemp()).glob("kinds*"))
    monkeypatch.setenv("PATCHBAY_HOME", str(home))


def said(capsys, *words):
    """What a verb answers programs."""
    capsys.readouterr()
    code = cli.main([*words, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def pushed(name, capsys):
    """The artifact, pushed; it is the champion."""
    made = said(capsys, "fit", f"{name}/tiny")
    got = said(capsys, "push", made["folder"])
    said(capsys, "gate", f"{name}@{got['version']}")
    said(capsys, "promote", f"{name}@{got['version']}")
    return got


def test_both_sides_are_measured_drawn_and_compared(name, pushed, capsys):
    got = said(capsys, "eval", f"{name}@{pushed['version']}")
    assert got["metrics"]["base"]["quality/y"]["value"] == BASE_Y[name]
    assert got["metrics"]["patched"]["quality/y"] == {
        "value": PATCHED_Y[name], "low": PATCHED_Y[name] - 1, "high": PATCHED_Y[name] + 1, "n": 7, "better": "higher"
    }  # fmt: skip
    assert "%22quality%2Fy%22" in got["url"]  # x does not differ
    base = store.mlflow_client.find_run(mlflow.MlflowClient(), pushed["digest"], "base")
    for run in (base.info.run_id, pushed["run_id"]):
        files = store.shown.files_of(mlflow.MlflowClient(), run, "figures")
        assert files == ["figures/bars.png"]
    assert cli.main(["compare", f"{name}@base", f"{name}@champion"]) == 0
    table = capsys.readouterr().out
    assert "higher" in table
    assert f"[{BASE_Y[name] - 1:.3g}, {BASE_Y[name] + 1:.3g}]" in table


def test_mlflow_loads_and_runs_it_and_its_base(name, pushed):
    frame = pd.DataFrame({"x": [2.0]})
    assert mlflow.pyfunc.load_model(f"models:/{pushed['model_id']}").predict(frame)["y"].tolist() == [PATCHED_Y[name]]
    version = store.mlflow_client.find_version(pushed["digest"])
    base = store.mlflow_client.find_base(version.name, version.tags["base.digest"])
    bare = mlflow.pyfunc.load_model(f"models:/{base.name}/{base.version}")
    assert bare.predict(frame)["y"].tolist() == [BASE_Y[name]]
    assert bare.predict(bare.input_example).shape == (1, 1)


def test_it_is_served_and_split_against_its_base(name, pushed, capsys):
    from bentos.app import application
    from bentos.runtime import Settings
    from bentos.tokens import Tokens

    said(capsys, "promote", f"{name}@base")
    said(capsys, "split", name, f"{name}@{pushed['version']}", "0.5")

    async def ask():
        app = application(Settings(name), Tokens(None)) if name == SEARCH else application(
            Settings(name, base="tiny"), Tokens(None)
        )  # fmt: skip
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as http:

                async def one(headers):
                    got = await http.post("/v1/times", json={"x": 2.0}, headers=headers)
                    assert got.status_code == 200, got.text
                    return got.json()["y"]

                by_arm = [await one({"x-patchbay-arm": arm}) for arm in ("base", f"sha256:{pushed['digest']}")]
                units = [await one({"x-patchbay-unit": f"u{i}"}) for i in range(24)]
                return by_arm, units

    by_arm, units = asyncio.run(ask())
    assert by_arm == [BASE_Y[name], PATCHED_Y[name]]
    assert set(units) == set(by_arm)
    said(capsys, "split", name, "0")


def test_a_deployment_carries_it_and_serves_it_without_a_store(name, pushed, tmp_path):
    from bentos import build
    from bentos.runtime import Runtime, Settings
    from registry.systems import system

    for digest, want in ((pushed["digest"], PATCHED_Y[name]), ("base", BASE_Y[name])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATCHBAY_BASE", "tiny:0,tiny:1" if name == SEARCH else "tiny:0")
            about = build._carry(system(name), digest, tmp_path / digest[:8], ())
        assert about.bases == manifest.read(store.pull(pushed["digest"])).bases
        runtime = Runtime(Settings(name, pinned=tmp_path / digest[:8]))
        runtime.start()
        try:
            arm = runtime.table.champion if digest != "base" else None
            assert float(runtime.call(partial(runtime.worker.proof, arm))) == want / 2
        finally:
            runtime.stop()


def test_it_has_nothing_to_fold(name, pushed, capsys):
    assert cli.main(["export", f"{name}@{pushed['version']}"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert ("is a model" if name == MODEL else "is a search") in told
