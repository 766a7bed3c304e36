"""What the release before this one sealed, pushed and decided (tests/data/sealed_v1) is still read, served, loaded by
MLflow and rolled back."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import mlflow
import pandas as pd
import pytest

from registry import cli, manifest, store
from registry.ab.ledger import Ledger

DATA = Path(__file__).parent / "data" / "sealed_v1"
FIRST, SECOND = (
    "fccd4f07f79046fd2171cf09074e6f209b0b0d2355130aa630e3b5602f432296",
    "7d9221ebb9593717d08009a48b35fe49eded4371b61326de3b6a131a3ade5d33",
)
CLIP = "65e6d87ec671c5d7c791c8c32bdfde9d383da80fd8bbd1b53d85dd88beaa1bf7"


@pytest.fixture
def old(home: Path):
    """The home of that release."""
    shutil.copytree(DATA, home, ignore=shutil.ignore_patterns("*.sql", "README.md"))
    for name in ("mlflow", "ledger"):
        with closing(sqlite3.connect(home / f"{name}.db")) as db:
            db.executescript((DATA / f"{name}.sql").read_text().replace("{HOME}", str(home)))
    for model in home.glob("mlartifacts/*/models/*/artifacts"):
        if (model / "MLmodel").exists():
            digest = next(d for d in (FIRST, SECOND, CLIP) if d in _digest_of(home, model.parent.name))
            shutil.copytree(home / "artifacts" / digest, model / "artifacts" / "patch")
    yield home
    mlflow.set_tracking_uri(None)


def _digest_of(home: Path, model: str) -> str:
    with closing(sqlite3.connect(home / "mlflow.db")) as db:
        query = "select tag_value from logged_model_tags where model_id = ? and tag_key = 'patch.digest'"
        return str(db.execute(query, (model,)).fetchone()[0])


def test_sealed_folders_keep_their_digests_and_run(home):
    from patches.subject import Subject

    for digest, prompt in ((FIRST, "prompt"), (SECOND, "prompt"), (CLIP, "image")):
        about = manifest.read(DATA / "artifacts" / digest, digest=digest)
        assert (about.schema, list(about.bases)) == (1, ["base"])
        subject = Subject.load(DATA / "artifacts" / digest)
        row = {c.name: c.example for c in subject.family.table.takes}
        assert prompt in row
        assert len(subject.predict(pd.DataFrame([row]), {})) == 1
        subject.close()


def test_references_resolve_as_they_did_and_new_versions_are_counted_on(old, tmp_path):
    ledger = Ledger()
    assert ledger.verify() == 6
    for ref, digest in {
        "attention_sink@2": FIRST, "attention_sink@3": SECOND, "attention_sink": SECOND, "clip_sae@2": CLIP,
        "clip_sae@champion": CLIP, f"sha256:{FIRST[:10]}": FIRST,
    }.items():  # fmt: skip
        assert store.resolve(ref, ledger) == digest
    compared = {r.metric: r.difference for r in store.compare("base", FIRST).rows}
    assert compared == {"quality/accuracy": pytest.approx(-0.1), "target/repeat": pytest.approx(0.8)}

    folder = tmp_path / "new"
    shutil.copytree(old / "artifacts" / FIRST, folder)
    about = manifest.read(folder)
    (folder / "manifest.json").unlink()
    manifest.write(folder, kind="patch", system=about.system, base=about.base, config=about.config, parents=[FIRST])
    assert store.push(folder).version == 4
    version = store.mlflow_client.find_version(FIRST)
    base = store.mlflow_client.find_base(version.name, about.base_digest)
    loaded = mlflow.pyfunc.load_model(f"models:/{base.name}/{base.version}")  # it could not be, before
    assert len(loaded.predict(pd.DataFrame({"prompt": ["a a a"]}))) == 1


def test_versions_are_pulled_and_loaded_and_pushed_again_have_todays_signature(old):
    shutil.rmtree(old / "artifacts" / FIRST)
    assert manifest.read(store.pull(FIRST), digest=FIRST).digest == FIRST
    version = store.mlflow_client.find_version(FIRST)
    name = f"models:/{version.name}/{version.version}"
    assert len(mlflow.pyfunc.load_model(name).predict(["hello there"])) == 1

    again = store.push(old / "artifacts" / CLIP)
    assert again.version == 2
    model = mlflow.pyfunc.load_model(f"models:/{again.model_id}")
    frame = model.input_example
    assert set(model.predict(frame).columns) == {"label", "probability"}
    assert "patchbay.version" not in store.mlflow_client.find_version(CLIP).tags


def test_the_champion_is_served_and_rolled_back(old, capsys):
    from bentos.app import application
    from bentos.runtime import Settings
    from bentos.tokens import Tokens

    async def serve():
        app = application(Settings("attention_sink"), Tokens(None))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as http:

                async def champion():
                    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "temperature": 0}
                    got = await http.post("/v1/chat/completions", json=ask)
                    assert got.status_code == 200, got.text
                    return got.json()["model"]

                before = await champion()
                assert await asyncio.to_thread(cli.main, ["rollback", "attention_sink"]) == 0
                for _ in range(100):
                    if (after := await champion()) != before:
                        break
                    await asyncio.sleep(0.1)
                return before, after

    before, after = asyncio.run(serve())
    assert SECOND[:16] in before
    assert FIRST[:16] in after
    assert Ledger().head("attention_sink").champion == FIRST
