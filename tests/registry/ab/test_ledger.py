import json
import subprocess
import sys
import threading
import time

import pytest
from sqlalchemy.exc import DBAPIError

from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.ledger import BASE, Ledger
from registry.errors import Conflict, NotFound, NotReady, Tampered

from .conftest import meddle

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def ledger(where):
    return Ledger(where("ledger.db"))


def trial(treatment, control=BASE):
    return experiments.plain(experiments.begin("clip_sae", control=control, treatment=treatment, share=0.1))


def test_a_fresh_system_has_the_base_as_champion(ledger):
    assert ledger.head("clip_sae") is None
    assert ledgers.challenge(ledger, "clip_sae", A).champion == BASE


def test_promote_then_roll_back_walks_back_through_champions(ledger):
    for digest in (A, B, C):
        ledgers.promote(ledger, "clip_sae", digest)
    assert [ledgers.rollback(ledger, "clip_sae").champion for _ in range(3)] == [B, A, BASE]
    with pytest.raises(NotFound, match="nothing to roll back"):
        ledgers.rollback(ledger, "clip_sae")


def test_after_a_roll_back_a_promotion_starts_from_there(ledger):
    ledgers.promote(ledger, "clip_sae", A)
    ledgers.promote(ledger, "clip_sae", B)
    ledgers.rollback(ledger, "clip_sae")
    ledgers.promote(ledger, "clip_sae", C)
    assert ledgers.rollback(ledger, "clip_sae").champion == A


def test_rolling_back_a_running_experiment_keeps_the_champion(ledger):
    ledgers.promote(ledger, "clip_sae", A)
    ledgers.split(ledger, "clip_sae", trial(B, A))
    entry = ledgers.rollback(ledger, "clip_sae", evidence={"why": "worse"})
    assert (entry.champion, entry.challenger, entry.experiment) == (A, None, None)
    assert entry.evidence == {"why": "worse"}


def test_one_live_experiment_per_system(ledger):
    ledgers.split(ledger, "clip_sae", trial(A))
    with pytest.raises(Conflict, match="already runs"):
        ledgers.split(ledger, "clip_sae", trial(B))
    ledgers.stop(ledger, "clip_sae")
    ledgers.split(ledger, "clip_sae", trial(B))


def test_the_control_must_be_the_champion(ledger):
    ledgers.promote(ledger, "clip_sae", A)
    with pytest.raises(Conflict, match="not the champion"):
        ledgers.split(ledger, "clip_sae", trial(B))


def test_a_ramp_only_grows(ledger):
    ledgers.split(ledger, "clip_sae", trial(A))
    assert ledgers.ramp(ledger, "clip_sae", 0.5).experiment["share"] == 0.5
    with pytest.raises(Conflict, match="take the treatment from units"):
        ledgers.ramp(ledger, "clip_sae", 0.2)


def test_what_was_live_at_a_time(ledger):
    ledgers.promote(ledger, "clip_sae", A)
    time.sleep(0.02)
    between = time.time()
    time.sleep(0.02)
    ledgers.promote(ledger, "clip_sae", B)
    assert ledger.live_at("clip_sae", between).champion == A
    assert ledger.live_at("clip_sae", time.time()).champion == B
    assert ledger.live_at("clip_sae", 0.0) is None


def test_who_read_an_old_head_is_refused(ledger):
    old = ledgers.challenge(ledger, "clip_sae", A)
    ledgers.promote(ledger, "clip_sae", B)
    with pytest.raises(Conflict, match="decided first"):
        ledgers.promote(ledger, "clip_sae", A, expect=old.hash)


def test_of_many_threads_exactly_one_wins(ledger):
    head = ledgers.challenge(ledger, "clip_sae", A)
    won, lost = [], []

    def race(digest):
        try:
            won.append(ledgers.promote(ledger, "clip_sae", digest, expect=head.hash))
        except Conflict:
            lost.append(digest)

    threads = [threading.Thread(target=race, args=(f"{i:064x}",)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (len(won), len(lost)) == (1, 15)


def test_of_two_processes_exactly_one_wins(ledger):
    head = ledgers.challenge(ledger, "clip_sae", A)
    code = (
        "import sys; from registry.ab import ledger as l; from registry.errors import Conflict\n"
        "book = l.Ledger(sys.argv[1]); sys.stdin.readline()\n"
        "try: l.promote(book, 'clip_sae', sys.argv[2], expect=sys.argv[3]); print('won')\n"
        "except Conflict: print('lost')"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(ledger.database), digest, head.hash],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for digest in (B, C)
    ]  # fmt: skip
    for r in racers:
        r.stdin.write("go\n")
        r.stdin.flush()
    said = sorted(r.communicate(timeout=60)[0].strip() for r in racers)
    assert said == ["lost", "won"]


def test_the_file_refuses_to_be_rewritten(ledger):
    ledgers.promote(ledger, "clip_sae", A)
    for statement in ("UPDATE entries SET champion = 'x'", "DELETE FROM entries"):
        with pytest.raises(DBAPIError, match="append only"):
            meddle(ledger.database, statement)


def test_tampering_around_the_triggers_is_found(ledger):
    ledgers.promote(ledger, "clip_sae", A)
    ledgers.promote(ledger, "clip_sae", B)
    assert ledger.verify() == 2
    meddle(ledger.database, "DROP TRIGGER no_update", f"UPDATE entries SET champion = '{C}' WHERE seq = 1")
    with pytest.raises(Tampered, match="Entry 1"):
        ledger.verify("clip_sae")


def test_what_is_no_digest_is_refused(ledger):
    with pytest.raises(NotFound, match="neither a digest"):
        ledgers.promote(ledger, "clip_sae", "clip_sae@challenger")


def test_an_experiment_survives_the_ledger(ledger):
    made = experiments.begin("clip_sae", control=BASE, treatment=A, share=0.25, words=["margin=0.02", "mode=shadow"])
    ledgers.split(ledger, "clip_sae", experiments.plain(made))
    assert experiments.load(ledger.head("clip_sae").experiment) == made
    assert json.dumps(ledger.head("clip_sae").experiment)


def test_a_forged_entry_is_seen_by_who_follows(ledger):
    """Inserted, changed or cut off: `sound` says so, and again until it is mended."""
    for i in range(3):
        ledgers.promote(ledger, "clip_sae", f"{i:064x}")
    assert ledger.sound("clip_sae").champion == f"{2:064x}"
    meddle(
        ledger.database,
        "DROP TRIGGER no_update",
        "DROP TRIGGER no_delete",
        "CREATE TABLE good AS SELECT * FROM entries",
    )
    for forgery in (
        f"UPDATE entries SET champion = '{'f' * 64}' WHERE seq = 3",
        "DELETE FROM entries WHERE seq = 3",
        f"INSERT INTO entries SELECT 4, at, who, system, action, '{'f' * 64}', NULL, NULL, NULL, hash, 'x' "
        "FROM entries WHERE seq = 3",
        "UPDATE entries SET evidence = '{' WHERE seq = 3",
    ):
        meddle(ledger.database, forgery)
        for _ in range(2):
            with pytest.raises(Tampered):
                ledger.sound("clip_sae")
        meddle(ledger.database, "DELETE FROM entries", "INSERT INTO entries SELECT * FROM good")
        assert ledger.sound("clip_sae").seq == 3
    meddle(ledger.database, "DROP TABLE entries")
    with pytest.raises(NotReady, match="cannot be used"):
        ledger.head("clip_sae")


def test_what_is_asked_of_one_artifact_or_of_promotions_does_not_read_the_other_entries(ledger, monkeypatch):
    promoted, many = ["a" * 64, "b" * 64], [f"{i:064x}" for i in range(5)]
    for digest in promoted:
        ledgers.promote(ledger, "clip_sae", digest)
        for other in many:
            gate = {"digest": other, "status": "passed", "beside": promoted}
            ledgers.gate(ledger, "clip_sae", {"gate": gate})
    read, entry = [], ledgers._entry
    monkeypatch.setattr(ledgers, "_entry", lambda row: read.append(row.action) or entry(row))
    assert ledger.gate("clip_sae", many[3])["digest"] == many[3]
    assert read == ["gate", "gate"]
    assert ledger.gate("clip_sae", promoted[0]) is None  # beside others, and never gated itself
    assert ledger.gate("clip_sae", "%") is None
    assert ledger.gate("clip_sae", 'x"') is None
    read.clear()
    assert ledgers.rollback(ledger, "clip_sae").champion == promoted[0]
    assert read == ["gate", "promote", "promote"]  # the head, and what was ever promoted
