import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from registry.ab import events
from registry.ab.database import Database
from registry.ab.events import Events
from registry.ab.experiment import CONTROL, TREATMENT, assign, begin, judge
from registry.errors import NotFound, NotReady

A = "a" * 64


@pytest.fixture
def log(where):
    with Events(where("events.db")) as log:
        yield log


def trial(**words):
    return begin("clip_sae", control="base", treatment=A, share=0.5, words=[f"{k}={v}" for k, v in words.items()])


def test_outcomes_are_counted_by_unit_in_the_arm_it_saw_first(log):
    x = trial()
    for unit, values in {"u1": [1, 0], "u2": [1], "u3": []}.items():
        log.expose(x, unit, CONTROL).result()
        for v in values:
            log.outcome(x, unit, v).result()
    log.expose(x, "t1", TREATMENT).result()
    log.outcome(x, "t1", 1).result()
    s = log.summary(x)
    assert (s.control.units, s.control.n, s.control.total) == (3, 2, 1.5)
    assert s.control.squares == pytest.approx(1.25)
    assert (s.treatment.units, s.treatment.n, s.treatment.total) == (1, 1, 1.0)


def test_a_unit_moved_by_a_ramp_counts_where_it_was_first(log):
    x = trial()
    log.expose(x, "u", CONTROL).result()
    log.outcome(x, "u", 1).result()
    log.expose(x, "u", TREATMENT).result()
    log.outcome(x, "u", 0).result()
    s = log.summary(x)
    assert (s.crossovers, s.control.n, s.control.total, s.treatment.units) == (1, 1, 1.0, 0)


def test_the_same_key_counts_once(log):
    x = trial()
    log.expose(x, "u", CONTROL).result()
    assert log.outcome(x, "u", 1, key="k").result() is True
    assert log.outcome(x, "u", 1, key="k").result() is False
    assert log.summary(x).control.total == 1.0


def test_events_of_one_commit_keep_their_order_and_hear_of_their_own_keys(log):
    x = trial()
    event = dict.fromkeys(events._COLUMNS) | {"experiment": x.name, "kind": "outcome", "at": 0.0}
    rows = [event | {"unit": f"u{i}", "key": key} for i, key in enumerate([None, "k", None, None, "k", "l", None])]
    assert log._commit(rows) == [True, True, True, True, False, True, True]
    with log.database.reading() as db:
        units = [row[0] for row in db.execute(text("SELECT unit FROM events ORDER BY id"))]
    assert units == ["u0", "u1", "u2", "u3", "u5", "u6"]


def test_the_same_key_in_another_experiment_is_another_outcome(log):
    x, y = trial(), trial()
    for e in (x, y):
        log.expose(e, "u", CONTROL).result()
        assert log.outcome(e, "u", 1, key="k").result() is True


def test_folding_bit_by_bit_equals_folding_at_once(log, where):
    x = trial()
    for i in range(400):
        unit = str(i % 150)
        log.expose(x, unit, assign(x, unit), status=500 if i % 37 == 0 else 200, latency_ms=float(i % 91)).result()
        if i % 3:
            log.outcome(x, unit, (i % 5) / 4)
        if i % 50 == 0:
            log.summary(x)
    log.outcome(x, "0", 1).result()
    with Events(where("events.db")) as fresh:
        assert fresh.summary(x) == log.summary(x)


def test_shadow_pairs_are_compared_unit_by_unit(log):
    x = trial(mode="shadow")
    for unit, (c, t) in {"a": (0, 1), "b": (1, 0), "c": (1, 1), "d": (0, 1)}.items():
        log.expose(x, unit, CONTROL)
        log.outcome(x, unit, c, arm=CONTROL)
        log.outcome(x, unit, t, arm=TREATMENT).result()
    s = log.summary(x)
    assert (s.pairs, s.wins, s.losses, s.pair_total) == (4, 2, 1, 1.0)


def test_errors_and_slow_calls_are_seen(log):
    x = trial()
    for i in range(300):
        log.expose(x, f"c{i}", CONTROL, latency_ms=10 + i % 7)
    for i in range(300):
        log.expose(x, f"t{i}", TREATMENT, status=500 if i % 10 == 0 else 200, latency_ms=100.0)
    log.expose(x, "last", CONTROL, latency_ms=10).result()
    s = log.summary(x)
    assert (s.treatment.errors, s.control.errors, s.p99_calls) == (30, 0, 300)
    assert max(s.p99_log_e) > 100


def test_an_outcome_of_a_unit_nobody_saw_is_not_found(log):
    with pytest.raises(NotFound, match="never answered"):
        log.arm_of(trial().name, "ghost")


def test_many_writers_share_a_commit(log):
    x, count = trial(), 4000
    start = time.perf_counter()
    with ThreadPoolExecutor(32) as pool:
        futures = list(pool.map(lambda i: log.expose(x, str(i), CONTROL), range(count)))
        assert all(f.result() for f in futures)
    seconds = time.perf_counter() - start
    assert log.summary(x).control.units == count
    print(f"{count / seconds:.0f} durable events/s")


def test_what_was_acknowledged_survives_kill_9(where):
    """A writer is killed in the middle of its work; every event it was told is durable is there."""
    code = (
        "import sys; from registry.ab.events import Events; from registry.ab.experiment import CONTROL, begin\n"
        "log = Events(sys.argv[1]); x = begin('clip_sae', control='base', treatment='a' * 64, share=0.5)\n"
        "waiting = []\n"
        "for i in range(10**6):\n"
        "    waiting.append((i, log.expose(x, str(i), CONTROL)))\n"
        "    if len(waiting) == 20:\n"
        "        for j, f in waiting:\n"
        "            f.result(); print(j, flush=True)\n"
        "        waiting = []\n"
    )
    file = where("events.db")
    writer = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    said = [int(writer.stdout.readline()) for _ in range(300)]
    os.kill(writer.pid, signal.SIGKILL)
    said += [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    with Events(file) as log:
        assert log.count() >= len(said)
        with log.database.reading() as db:
            there = {int(u) for (u,) in db.execute(text("SELECT unit FROM events"))}
    assert set(said) <= there


def test_the_trajectory_ends_where_the_summary_stands(log):
    x = trial(min_n=2)
    for i in range(40):
        arm = assign(x, f"u{i}")
        log.expose(x, f"u{i}", arm).result()
        log.outcome(x, f"u{i}", float(arm == TREATMENT)).result()
    seen = log.trajectory(x, points=10)
    assert seen[-1] == log.summary(x)
    assert [s.control.n + s.treatment.n for s in seen] == sorted(s.control.n + s.treatment.n for s in seen)
    assert 10 <= len(seen) <= 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_a_a_experiments_through_the_log_raise_at_most_ten_alarms(log):
    """As in production: hashed assignment, exposures with latency and errors, outcomes, judged every hundred units."""
    rng, alarms, units = np.random.default_rng(11), [], 500
    for _ in range(200):
        x = trial()
        for at in range(units):
            unit, arm = str(at), assign(x, str(at))
            status = 500 if rng.random() < 0.01 else 200
            log.expose(x, unit, arm, status=status, latency_ms=float(rng.lognormal(3, 0.3)))
            last = log.outcome(x, unit, float(rng.random() < 0.8))
            if at % 100 == 99:
                last.result()
                decision = judge(x, log.summary(x))
                if decision.action != "continue" or decision.result.verdict != "undecided":
                    alarms.append(decision.why)
                    break
    print(f"{len(alarms)} of 200 A/A experiments raised an alarm: {alarms}")
    assert len(alarms) <= 10


# ---- nobody ends the writer ----------------------------------------------------------------------------------------


def test_whoever_stops_waiting_stops_neither_the_event_nor_the_writer(log):
    x = trial()
    waits = [log.expose(x, str(i), CONTROL) for i in range(200)]
    assert not any(w.cancel() for w in waits)
    assert log.expose(x, "last", CONTROL).result(5) is True
    assert log.summary(x).control.units == 201
    assert log.problem() == ""


def test_a_future_that_is_settled_already_does_not_end_the_writer(log):
    """The sibling: whatever state a future is in, its batch's neighbours are written and told."""
    x = trial()
    odd = log.expose(x, "a", CONTROL)
    odd.set_running_or_notify_cancel()
    odd.settle(True)
    assert log.expose(x, "b", CONTROL).result(5) is True


def test_an_event_that_cannot_be_stored_fails_alone(log):
    x = trial()
    waits = [log.expose(x, str(i), CONTROL) for i in range(20)]
    bad = [log.expose(x, "lone \ud800", CONTROL), log.outcome(x, "0", {}), log.expose(x, object(), CONTROL)]
    waits += [log.expose(x, str(i), CONTROL) for i in range(20, 40)]
    assert all(w.result(5) for w in waits)
    assert all(b.exception(5) is not None for b in bad)
    assert log.lost == {x.name: 3}
    assert log.problem() == ""


def test_a_lock_that_goes_away_loses_nothing(log):
    x = trial()
    log.expose(x, "first", CONTROL).result(5)
    with Database(str(log.database)).writing():
        waits = [log.expose(x, str(i), CONTROL) for i in range(10)]
        time.sleep(0.3)
        assert not any(w.done() for w in waits)
    assert all(w.result(5) for w in waits)
    assert not log.lost


def test_a_disk_that_stays_full_is_given_up_and_counted(log, monkeypatch):
    monkeypatch.setattr(events, "GIVE_UP_S", 0.2)
    x = trial()

    def full(rows):
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    monkeypatch.setattr(log, "_commit", full)
    waits = [log.expose(x, str(i), CONTROL) for i in range(5)]
    with pytest.raises(NotReady):
        waits[-1].result(10)
    assert log.lost[x.name] == sum(w.exception(10) is not None for w in waits) == 5
    monkeypatch.undo()
    assert log.expose(x, "after", CONTROL).result(5) is True


def test_a_writer_that_ended_all_the_same_is_begun_again(log, monkeypatch):
    x = trial()

    def gone(*_):
        raise SystemExit

    monkeypatch.setattr(log, "_keep", gone)
    monkeypatch.setattr(log, "_give_up", gone)
    log.expose(x, "a", CONTROL)
    log._writer.join(5)
    assert "ended" in log.problem()
    monkeypatch.undo()
    assert log.expose(x, "b", CONTROL).result(5) is True
    assert log.problem() == ""


def test_a_full_queue_refuses_at_once(log, monkeypatch):
    monkeypatch.setattr(events, "MAX_WAITING", 0)
    with pytest.raises(NotReady, match="no more events"):
        log.expose(trial(), "u", CONTROL).result(0)


def test_closing_ends_though_the_disk_hangs(where):
    log, x = Events(where("e.db")), trial()
    other = Database(where("e.db")).writing()
    other.__enter__()
    waits = [log.expose(x, "u", CONTROL), log.expose(x, "v", CONTROL)]
    start = time.monotonic()
    log.close()
    assert time.monotonic() - start < 5.5
    assert all(isinstance(w.exception(5), NotReady) for w in waits)
    assert isinstance(log.expose(x, "w", CONTROL).exception(0), NotReady)
    other.__exit__(None, None, None)
