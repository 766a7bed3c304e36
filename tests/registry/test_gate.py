"""Promises are kept or broken by the numbers and their intervals alone; what was not measured keeps none."""

import pytest

from registry import gate
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.errors import Conflict
from registry.measure import Measure

A, B = "a" * 64, "b" * 64


def verdict(promise, base=None, patched=None):
    sides = {side: {promise.metric: m} for side, m in (("base", base), ("patched", patched)) if m is not None}
    return gate.judge(A, "some/lab", ("data", "0" * 16), [promise], sides)


HALF, MORE = Measure(0.5, 0.4, 0.6, 100, "higher"), Measure(0.55, 0.45, 0.65, 100, "higher")
FAR = Measure(0.9, 0.82, 0.95, 100, "higher")


@pytest.mark.parametrize(
    ("promise", "base", "patched", "passed"),
    [
        (gate.gain("x"), HALF, FAR, True),
        (gate.gain("x"), HALF, MORE, False),  # better, and it may be chance
        (gate.gain("x", sure=False), HALF, MORE, True),
        (gate.gain("x", sure=False), HALF, HALF, False),  # nothing is no gain
        (gate.gain("x", 0.5), HALF, FAR, False),
        (gate.loss("x", 0.02), HALF, HALF, True),
        (gate.loss("x", 0.02), MORE, HALF, False),
        (gate.loss("x", 0.05), Measure(0.5, better="lower"), Measure(0.6, better="lower"), False),
        (gate.gain("x", sure=False), Measure(3.0, better="lower"), Measure(2.0, better="lower"), True),
        (gate.ratio("x", 1.01), Measure(20.0, 10.0, 40.0, 9), Measure(20.1, 10.0, 40.0, 9), True),
        (gate.ratio("x", 1.01), Measure(20.0), Measure(21.0), False),
        (gate.ratio("x", 1.01), Measure(0.0), Measure(0.0), False),
        (gate.Promise("x", "least", 0.9), None, FAR, True),
        (gate.Promise("x", "least", 0.9, sure=True), None, FAR, False),
        (gate.Promise("x", "most", 0.9), None, FAR, True),
        (gate.latency(1.5), None, Measure(1.4, 1.2, 1.6, 24, "lower"), True),
        (gate.latency(1.5), None, Measure(1.6, 1.4, 1.8, 24, "lower"), False),
        (gate.gain("x"), None, FAR, False),  # the base was not measured
        (gate.latency(1.5), None, None, False),
        (gate.Promise("x", "least", 0.0), None, Measure(float("nan")), False),
    ],
)
def test_a_promise_is_kept_or_broken(promise, base, patched, passed):
    got = verdict(promise, base, patched)
    assert got.passed is passed
    assert got.status == ("passed" if passed else "failed")
    assert ("BROKEN" in str(got.verdicts[0])) is not passed


def test_without_promises_nothing_passes():
    assert not gate.judge(A, "some/lab", ("data", ""), [], {}).passed


def test_a_distance_has_the_interval_of_both_arms():
    """Newcombe's example of method 10: 56 of 70 beside 48 of 80 is .2000 [.0524, .3339]."""
    a, b = Measure(48 / 80, 0.4904, 0.7004, 80), Measure(56 / 70, 0.6918, 0.8769, 70)
    d = gate.distance(a, b)
    assert (d.value, d.low, d.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-4)
    assert gate.distance(b, a).value == pytest.approx(-0.2)


def gated(ledger, digest, passed):
    limit = 1.5 if passed else 0.5
    found = gate.judge(digest, "s/lab", ("d", ""), [gate.latency(limit)], {"patched": {"latency": Measure(1.0, n=9)}})
    return ledgers.gate(ledger, "clip_sae", found.evidence(), who="test")


def test_the_ledger_keeps_the_gate_and_nothing_else_changes(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    ledgers.promote(ledger, "clip_sae", B)
    ledgers.challenge(ledger, "clip_sae", A)
    with pytest.raises(Conflict, match="has not been through its gate.*patchbay gate"):
        ledgers.check_gate(ledger, "clip_sae", A)
    before = ledger.head("clip_sae")
    entry = gated(ledger, A, passed=False)
    assert (entry.champion, entry.challenger, entry.experiment) == (before.champion, before.challenger, None)
    with pytest.raises(Conflict, match=r"did not pass its gate \(BROKEN  latency at most 0.5: 1"):
        ledgers.check_gate(ledger, "clip_sae", A)
    gated(ledger, A, passed=True)
    ledgers.check_gate(ledger, "clip_sae", A)
    ledgers.check_gate(ledger, "clip_sae", "base")
    with pytest.raises(Conflict):  # another artifact's gate is not its own
        ledgers.check_gate(ledger, "clip_sae", B)
    gated(ledger, A, passed=False)  # the newest counts
    with pytest.raises(Conflict):
        ledgers.check_gate(ledger, "clip_sae", A)
    assert ledger.verify() == 5
    ledgers.promote(ledger, "clip_sae", A, evidence={"forced": "a test"})
    assert ledgers.rollback(ledger, "clip_sae").champion == B, "gates do not count as promotions"


def test_the_judge_promotes_nothing_that_has_not_passed(tmp_path, monkeypatch):
    from bentos.runtime import judge as judges

    ledger = Ledger(tmp_path / "ledger.db")
    x = experiments.begin("clip_sae", control="base", treatment=A, share=0.5, words=["promote_on_win=true"])
    ledgers.split(ledger, "clip_sae", experiments.plain(x))
    many = experiments.ArmStats(units=400, calls=400, n=400, total=40, squares=40)
    won = experiments.Summary(control=many, treatment=experiments.ArmStats(400, 400, 0, 400, 360, 360))

    class Runtime:
        events = type("Events", (), {"summary": staticmethod(lambda _: won)})
        settings = type("Settings", (), {"system": "clip_sae"})

    runtime = Runtime()
    runtime.ledger = ledger
    judge = judges.Judge(runtime)
    said = judge.once()
    assert said.action == "continue"
    assert "patchbay gate" in said.why
    assert ledger.head("clip_sae").champion == "base"
    gated(ledger, A, passed=True)
    assert judge.once().action == "promote"
    assert ledger.head("clip_sae").champion == A
