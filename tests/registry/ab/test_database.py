"""Two databases, one behaviour: turns, migration, outages, and what is refused."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import text

from registry.ab import events
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.database import Database
from registry.ab.events import Events
from registry.ab.experiment import CONTROL, TREATMENT
from registry.ab.ledger import BASE, Ledger
from registry.ab.migrate import main, migrate
from registry.errors import ConfigError, Conflict, Invalid, NotFound, NotReady, Tampered

from .conftest import meddle

A = "a" * 64


def trial(name="clip_sae"):
    return experiments.begin(name, control=BASE, treatment=A, share=0.5)


def test_one_process_has_the_turn_and_hands_it_on(where):
    first, second = (Database(where("l.db")).turn("judge-x") for _ in range(2))
    other = Database(where("l.db")).turn("judge-y")
    assert first.mine()
    assert first.mine()
    assert not second.mine()
    assert second.holder.strip(), "it says who has it"
    assert other.mine(), "another system is another turn"
    first.close()
    assert second.mine()
    for turn in (second, other):
        turn.close()


def test_a_judge_whose_session_ends_has_lost_its_turn(postgres):
    url = postgres.database()
    first, second = (Database(url).turn("judge-x") for _ in range(2))
    assert first.mine()
    with Database(url).reading() as db:
        db.execute(text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"))
    assert second.mine()
    with pytest.raises(NotReady, match="whose turn"):
        first.mine()
    assert not first.mine(), "asked again, it asks the database"
    second.close()
    assert first.mine()
    first.close()


def test_numbers_grow_in_the_order_of_commits(where):
    """A reader that has seen number n never finds a smaller new one, however many write at once."""
    place, x = where("e.db"), trial()
    Events(place).close()
    seen, late, over = [0], [], threading.Event()

    def read():
        database = Database(place)
        while not over.is_set():
            with database.reading() as db:
                new = [i for (i,) in db.execute(text("SELECT id FROM events ORDER BY id"))]
            late.extend(set(new) - set(range(1, seen[0] + 1)) - {i for i in new if i > seen[0]})
            late.extend(i for i in new if i <= seen[0] and i not in known)
            known.update(new)
            seen[0] = max(new, default=0)

    known: set[int] = set()
    reader = threading.Thread(target=read)
    logs = [Events(place) for _ in range(4)]
    reader.start()
    waits = [log.expose(x, f"{i}-{k}", CONTROL) for i in range(60) for k, log in enumerate(logs)]
    assert all(w.result(20) for w in waits)
    over.set()
    reader.join()
    for log in logs:
        log.close()
    assert late == []
    with Events(place) as log:
        assert log.summary(x).control.units == 240


def test_a_key_counts_once_from_any_process(where):
    x = trial()
    with Events(where("e.db")) as one, Events(where("e.db")) as two:
        one.expose(x, "u", TREATMENT).result(5)
        kept = [log.outcome(x, "u", 1, key="k") for log in (one, two) * 5]
        assert sum(k.result(5) for k in kept) == 1
        assert one.summary(x).treatment.total == two.summary(x).treatment.total == 1.0


def test_a_home_moves_to_postgres_without_loss(home, postgres, capsys):
    home.mkdir(parents=True)
    ledger, x = Ledger(home / "ledger.db"), trial()
    ledgers.promote(ledger, "mils", A, evidence={"why": [0.1, 1 / 3]})
    ledgers.split(ledger, "clip_sae", experiments.plain(x))
    with Events(home / "events.db") as log:
        for i in range(50):
            log.expose(x, f"u{i}", experiments.assign(x, f"u{i}"), latency_ms=i / 7)
            log.outcome(x, f"u{i}", i % 2, key=f"k{i}").result(5)
        before = log.summary(x)
    url = postgres.database()
    assert main([url]) == 0
    assert "2 entries and 100 events" in capsys.readouterr().out
    there = Ledger(url)
    assert there.verify() == 2
    assert [there.head(s) for s in ("mils", "clip_sae")] == [ledger.head(s) for s in ("mils", "clip_sae")]
    with Events(url) as log:
        assert log.summary(x) == before
        assert log.outcome(x, "u1", 1, key="k1").result(5) is False, "keys came along"
        assert log.expose(x, "new", CONTROL).result(5) is True, "numbers go on where they ended"
    with pytest.raises(Conflict, match="already"):
        migrate(url)


def test_a_chain_that_does_not_hold_is_not_copied(home, postgres):
    home.mkdir(parents=True)
    ledgers.promote(Ledger(home / "ledger.db"), "mils", A)
    meddle(home / "ledger.db", "DROP TRIGGER no_update", "UPDATE entries SET who = 'x'")
    url = postgres.database()
    with pytest.raises(Tampered):
        migrate(url)
    assert Ledger(url).version() == 0


def test_wrong_places_are_refused_in_words(home, tmp_path, monkeypatch):
    for url, words in (
        ("mysql://h/x", "mysql"),
        ("postgresql://h:port/x", "no database URL"),
        ("://x", "no database URL"),
    ):
        monkeypatch.setenv("PATCHBAY_DB", url)
        with pytest.raises(ConfigError, match=words):
            Ledger()
    monkeypatch.setenv("PATCHBAY_DB", "postgresql://somebody:secret@127.0.0.1:1/x?connect_timeout=1")
    pytest.importorskip("psycopg")
    with pytest.raises(NotReady, match="cannot be used") as refused:
        Ledger()
    assert "secret" not in str(refused.value)
    home.mkdir(parents=True)
    with pytest.raises(NotFound, match="neither"):
        migrate("postgresql://127.0.0.1/x")
    Ledger(home / "ledger.db")
    with pytest.raises(Invalid, match="no PostgreSQL"):
        migrate(str(tmp_path / "other.db"))
    assert main([]) == 2


def test_a_database_that_comes_back_is_used_again(postgres, monkeypatch):
    """The server is stopped at once and started again under a service's logs."""
    from tests.postgres import running

    monkeypatch.setattr(events, "GIVE_UP_S", 60.0)  # starting a server takes what a busy machine takes
    x = trial()
    with running() as server:
        url = server.database()
        ledger = Ledger(url)
        ledgers.promote(ledger, "mils", A)
        with Events(url) as log:
            acked = [log.expose(x, f"a{i}", CONTROL) for i in range(20)]
            assert all(w.result(30) for w in acked)
            server.stop()
            with pytest.raises(NotReady):
                ledger.head("mils")
            waiting = log.expose(x, "meanwhile", CONTROL)
            time.sleep(0.3)
            assert not waiting.done()
            server.start()
            assert waiting.result(60) is True
            assert log.summary(x).control.units == 21
        assert ledger.head("mils").champion == A
        assert ledger.verify() == 1
