"""A Bento that carries champion and challenger, on its own and as a process that follows a ledger on PostgreSQL."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import httpx
import pytest

from bentos import settings as deployed
from bentos.build import build
from bentos.runtime import Runtime, Settings
from patches.families import llm
from registry import cli
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.errors import NotFound, WrongBase
from registry.home import home as place
from tests import s3
from tests.drill.replicas import until

from .conftest import CONFIGS, SYSTEM, seal
from .test_build import free_port, until_ready

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}


def carries(built):
    inside = built.bento / "src"
    return [inside / "carried", *sorted((inside / "beside").iterdir())]


def test_without_a_ledger_it_serves_both_by_name(home, tiny_llm, monkeypatch):
    home.mkdir(parents=True, exist_ok=True)
    one, two = (seal(tiny_llm, c) for c in CONFIGS[:2])
    built = build(SYSTEM, one, beside=[two, one])
    folders = carries(built)
    assert [f.name for f in folders] == ["carried", two]
    assert built.tag != build(SYSTEM, one).tag
    monkeypatch.setattr(deployed, "CARRIED", folders[0])
    monkeypatch.setattr(deployed, "BESIDE", folders[0].with_name("beside"))
    settings = Settings.from_environment({})
    assert (settings.system, settings.pinned, settings.beside) == (SYSTEM, folders[0], (folders[1],))
    runtime = Runtime(settings)
    try:
        runtime.start()
        assert (runtime.table.champion, runtime.table.challenger) == (one, two)
        assert runtime.folder(two) == folders[1]
    finally:
        runtime.stop()
    # with a ledger to follow it is no longer alone, and has what it carries without asking anybody
    shutil.rmtree(home / "artifacts")
    assert Settings.from_environment({"PATCHBAY_DB": "postgresql://h/n"}).pinned is None
    assert [deployed.sealed(d) for d in (one, two)] == folders
    with pytest.raises(NotFound):
        deployed.sealed("0" * 64)


def test_the_base_with_a_challenger_needs_nobody_to_name_it(home, tiny_llm):
    home.mkdir(parents=True, exist_ok=True)
    built = build(SYSTEM, "base", beside=[seal(tiny_llm, CONFIGS[0])])
    table = Runtime(Settings(SYSTEM, pinned=carries(built)[0], beside=(carries(built)[1],)))
    try:
        table.start()
        assert table.table.champion == "base"
    finally:
        table.stop()
    with pytest.raises(WrongBase, match="one base"):
        build(SYSTEM, seal(llm.tiny(7), CONFIGS[0]), beside=[seal(tiny_llm, CONFIGS[1])])


@contextlib.contextmanager
def bento(tag, folder, **env):
    """The Bento as BentoML serves it, in a home of its own, and a client for it."""
    port = free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PATCHBAY_", "MLFLOW_", "PYTHONPATH"))}
    clean |= {"PATCHBAY_HOME": str(folder), "PATCHBAY_CACHE": str(folder / "cache"), **env}
    process = subprocess.Popen(
        [sys.executable, "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(port)],
        cwd=folder.parent, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            until_ready(http, process)
            yield http
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bento_process_splits_counts_and_decides_on_postgresql(
    home, tiny_llm, postgres, tmp_path, monkeypatch, capsys
):
    """Champion and challenger come with it; a third arm comes from the store by its digest; MLflow is nowhere."""
    home.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PATCHBAY_DB", postgres.database())
    one, two, three = (seal(tiny_llm, c) for c in CONFIGS)
    with s3.running() as store:
        for name, value in store.env.items():
            monkeypatch.setenv(name, value)
        ledgers.promote(Ledger(), SYSTEM, one)
        assert cli.main(["push", str(place() / "artifacts" / three)]) == 0
        ledgers.challenge(Ledger(), SYSTEM, two)
        capsys.readouterr()
        assert cli.main(["build", SYSTEM, "--json"]) == 0
        built = capsys.readouterr().out
        assert one in built
        assert two in built
        tag = f"{SYSTEM}:" + built.partition(f'"tag": "{SYSTEM}:')[2].partition('"')[0]
        env = {k: os.environ[k] for k in ("PATCHBAY_DB", *store.env)}
        with bento(tag, tmp_path / "other", **env) as http:
            split = ["split", SYSTEM, f"sha256:{two}", "0.5", "min_n=10", "tau=0.5", "--force", "tests"]
            assert cli.main(split) == 0
            until(lambda: http.get("/v1/experiments/live").json()["experiment"])
            x = experiments.load(Ledger().head(SYSTEM).experiment)
            for i in range(80):
                got = http.post("/v1/chat/completions", json=ASK, headers={"x-patchbay-unit": f"u{i}"})
                assert got.headers["x-patchbay-patch"] == x.arm_digest(experiments.assign(x, f"u{i}"))
            for i in range(80):
                good = i % 7 != 0 if experiments.assign(x, f"u{i}") == experiments.CONTROL else i % 5 == 0
                body = {"unit": f"u{i}", "value": good, "key": f"k{i}", "experiment": x.name}
                for again in (False, True):  # a client that tries again
                    said = http.post("/v1/outcomes", json=body).json()
                    assert said["status"] == ("duplicate" if again else "counted")
            until(lambda: Ledger().head(SYSTEM).action == "rollback")
            assert [e.who for e in Ledger().history(SYSTEM) if e.action == "rollback"] == ["judge"]
            capsys.readouterr()
            assert cli.main(["report", SYSTEM, "--json"]) == 0
            counted = json.loads(capsys.readouterr().out)["summary"]
            assert counted["control"]["n"] + counted["treatment"]["n"] == 80
            assert http.get("/v1/models").json()["patchbay"]["judge"] == "this process"
            ledgers.promote(Ledger(), SYSTEM, three)
            until(lambda: http.post("/v1/chat/completions", json=ASK).headers["x-patchbay-patch"] == three)
            assert (tmp_path / "other" / "artifacts" / three).is_dir()
            assert not (tmp_path / "other" / "artifacts" / two).exists()
            assert not list((tmp_path / "other").glob("*.db"))
