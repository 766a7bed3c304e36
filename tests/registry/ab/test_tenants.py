"""No caller decides an experiment alone, and small numbers do not lean."""

import json

import numpy as np
import pytest

from registry.ab import experiment as experiments
from registry.ab.events import TOKEN_UNITS, UNIT_CALLS, Events
from registry.ab.experiment import CONTROL, OWNER, TREATMENT, assign, begin, judge, power

A = "a" * 64


@pytest.fixture
def log(tmp_path):
    with Events(tmp_path / "events.db") as log:
        yield log


def trial(**words):
    given = [f"{k}={json.dumps(v)}" for k, v in words.items()]
    return begin("clip_sae", control="base", treatment=A, share=words.pop("share", 0.5), words=given)


def answer(log, x, unit, value=None, **how):
    side = assign(x, unit)
    log.expose(x, unit, side, **how)
    if value is not None:
        log.outcome(x, unit, value(side) if callable(value) else value)


def owned(tenant, name):
    return f"{tenant}{OWNER}{name}"


def test_one_tenant_alone_neither_promotes_nor_rolls_back(log):
    x = trial(promote_on_win=True)
    for i in range(400):
        answer(log, x, owned("mallory", i), lambda side: float(side == CONTROL), status=200 if i % 3 else 500)
    log.expose(x, "end", CONTROL).result(10)
    s = log.summary(x)
    assert s.control.units + s.treatment.units <= TOKEN_UNITS + 2
    assert (s.tokens, s.uncounted) == (1, 400 - TOKEN_UNITS)
    assert judge(x, s).action == "continue"


def test_a_tenant_beside_honest_ones_has_its_share(log):
    x = trial(token_share=0.5)
    rng = np.random.default_rng(0)
    for i in range(300):
        answer(log, x, owned(f"t{i % 3}", i), float(rng.random() < 0.5))
        for j in range(3):
            answer(log, x, owned("mallory", f"{i}-{j}"), lambda side: float(side == TREATMENT))
    log.expose(x, "end", CONTROL).result(10)
    s = log.summary(x)
    whole = s.control.units + s.treatment.units
    assert s.tokens == 4
    assert whole == pytest.approx(600, abs=30)


def test_one_unit_that_calls_for_ever_is_a_few_calls(log):
    x = trial(token_share=1.0)
    for _ in range(300):
        log.expose(x, owned("mallory", "u"), assign(x, owned("mallory", "u")), status=500)
    log.expose(x, "end", CONTROL).result(10)
    s = log.summary(x)
    assert s.control.errors + s.treatment.errors == UNIT_CALLS


def test_where_there_are_no_tokens_everything_counts(log):
    x = trial()
    for i in range(100):
        answer(log, x, f"u{i}", 1.0)
    log.expose(x, "end", CONTROL).result(10)
    s = log.summary(x)
    assert (s.control.units + s.treatment.units, s.tokens, s.uncounted) == (101, 0, 0)


def test_promotion_wants_units_of_several_tokens_or_trust(log):
    for trusted, action in ((0.99, "continue"), (1.0, "promote")):
        x = trial(promote_on_win=True, token_share=trusted)
        stats = experiments.ArmStats
        s = experiments.Summary(
            stats(units=500, calls=500, n=500, total=100, squares=100),
            stats(units=500, calls=500, n=500, total=400, squares=400), tokens=1, seen_low=0, seen_high=1,
        )  # fmt: skip
        assert judge(x, s).action == action


def test_outcomes_in_a_sliver_of_their_range_are_said_to_be_blind():
    x = trial(low=0.0, high=1000.0)
    stats = experiments.ArmStats
    control, treated = (stats(n=300, total=t, squares=t, units=300) for t in (150, 20))
    s = experiments.Summary(control, treated, seen_low=0.0, seen_high=1.0)
    assert "declare that range" in judge(x, s).why


def test_rare_outcomes_do_not_lean(log):
    """A/A at p = .05 and a share of .1: no more worse than better beyond chance, and few of either."""
    x, rng = trial(share=0.1), np.random.default_rng(1)
    x = experiments.with_share(x, 0.1)
    worse = better = 0
    for _ in range(400):
        units = 3000
        treated = rng.random(units) < 0.1
        good = rng.random(units) < 0.05
        for n in range(200, units + 1, 100):
            stats = [
                experiments.ArmStats(units=k, n=k, total=g, squares=g)
                for k, g in (
                    (int((~treated[:n]).sum()), float(good[:n][~treated[:n]].sum())),
                    (int(treated[:n].sum()), float(good[:n][treated[:n]].sum())),
                )
            ]
            verdict = experiments.compare(x, experiments.Summary(*stats)).verdict
            if verdict in ("worse", "better"):
                worse, better = worse + (verdict == "worse"), better + (verdict == "better")
                break
    assert worse + better <= 0.05 * 400 + 3 * (0.05 * 0.95 * 400) ** 0.5
    print(f"worse {worse}, better {better} of 400")


def test_power_is_what_it_says():
    x = trial(share=0.5)
    n, rng, found = power(x, 0.1), np.random.default_rng(0), 0
    for _ in range(100):
        c, t = rng.random(n // 2) < 0.45, rng.random(n // 2) < 0.55
        stats = [
            experiments.ArmStats(units=len(a), n=len(a), total=float(a.sum()), squares=float(a.sum())) for a in (c, t)
        ]
        found += experiments.compare(x, experiments.Summary(*stats)).verdict == "better"
    assert 70 <= found <= 97
    assert power(x, 0.05) > 3 * n
