"""`patchbay doctor` names what is wrong, each thing for itself; and the variables it knows are those that are read."""

import json
import re
import socket
from pathlib import Path

import pytest

from registry import cli, environment
from registry import home as homes
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger

ROOT = Path(__file__).parents[2]


def looked(capsys):
    code = cli.main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)["findings"]


def texts(findings, state):
    return [f["text"] for f in findings if f["state"] == state]


def test_a_new_home_is_well(home, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, found = looked(capsys)
    assert code == 0, texts(found, "wrong")
    assert {f["what"] for f in found} == {
        "program", "home", "disk", "ledger", "artifact", "events", "store", "page", "device", "port",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("variable", "PATCHBAY_DEVISE is read by nobody. Like it: PATCHBAY_DEVICE"),
        ("tokens", "token file"),
        ("device", "no-such-device"),
        ("chain", "is not what was written"),
        ("artifact", "attention_sink's champion: No artifact sha256:aaaaaaaa"),
        ("events", "events.db|file is not a database"),
        ("store", "MLflow"),
    ],
)
def test_each_thing_that_is_wrong_is_named(broken, says, home, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if broken != "store":  # making MLflow's database costs seconds
        monkeypatch.setattr("registry.verbs.doctor._store", lambda: iter(()))
    if broken == "variable":
        monkeypatch.setenv("PATCHBAY_DEVISE", "cpu")
    elif broken == "tokens":
        monkeypatch.setenv("PATCHBAY_TOKENS", str(home / "none.json"))
    elif broken == "device":
        monkeypatch.setenv("PATCHBAY_DEVICE", "no-such-device")
    elif broken in ("chain", "artifact"):
        ledgers.promote(Ledger(), "attention_sink", "a" * 64)
        if broken == "chain":
            import sqlite3

            with sqlite3.connect(homes.home() / "ledger.db") as db:
                db.execute("DROP TRIGGER no_update")
                db.execute("UPDATE entries SET who = 'somebody else'")
    elif broken == "events":
        (homes.home() / "events.db").write_bytes(b"no database " * 400)
    elif broken == "store":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, found = looked(capsys)
    assert code == 1
    assert any(re.search(says, text) for text in texts(found, "wrong")), texts(found, "wrong")
    assert not any("Traceback" in f["text"] for f in found)
    assert len(found) > 6, "the others are looked at all the same"


def test_what_is_only_odd_is_a_note(home, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    left = homes.swept(home / "runs") / ".part-abcd1234"
    left.mkdir()
    import os

    os.utime(left, (1, 1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr("registry.verbs.doctor._store", lambda: iter(()))
        monkeypatch.setattr("registry.verbs.doctor.PORTS", {"serve": taken.getsockname()[1]})
        code, found = looked(capsys)
    assert code == 0
    assert any("half-written" in t for t in texts(found, "note"))
    assert any("is taken" in t for t in texts(found, "note"))


def test_the_table_of_variables_is_what_the_source_reads():
    files = [f for p in ("registry", "patches", "training", "bentos", "tests/bench") for f in (ROOT / p).rglob("*.py")]
    read = {name for f in files for name in re.findall(r"PATCHBAY_[A-Z][A-Z_]*[A-Z]", f.read_text())}
    flags = {f"PATCHBAY_{flag.upper()}" for flag in ("base", "device", "provider", "slots", "context", "tokens")}
    assert read | flags == environment.VARIABLES.keys()
    assert environment.table() in (ROOT / "docs" / "settings.md").read_text(), "docs/settings.md is not the table"
