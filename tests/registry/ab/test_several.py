"""Several metrics and covariates: what is promised of false positives holds where nothing differs, looked at often."""

import math

import numpy as np
import pytest

from registry.ab import experiment as experiments
from registry.ab import several
from registry.ab.events import Events
from registry.ab.experiment import ArmStats, Metric, Summary
from registry.errors import ConfigError, Invalid


def made(**more):
    base = experiments.begin("clip_heads", control="base", treatment="b" * 64, share=0.5)
    return experiments.replace(base, **more)


def stats(values):
    return ArmStats(len(values), len(values), 0, len(values), float(values.sum()), float((values**2).sum()))


def three(y, b, arm):
    """Summaries of an outcome, of a covariate and of their sum. y, b: (n,). arm: (n,) bool, True: treated."""
    return [Summary(stats(v[~arm]), stats(v[arm])) for v in (y, b, y + b)]


def world(seed, n=2000, effect=0.0, weight=0.7):
    """n units in random order whose outcome in [0, 1] leans on what was known before with this weight."""
    g = np.random.default_rng(seed)
    b = g.random(n)
    arm = g.random(n) < 0.5
    y = np.clip(weight * b + (1 - weight) * g.random(n) + effect * arm, 0, 1)
    return y, b, arm


LOOKS = (100, 200, 400, 700, 1000, 1500, 2000)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_with_a_covariate_nothing_is_found_where_nothing_is_however_often_one_looks(weight):
    x, runs, wrong = made(covariate=True), 200, 0
    for seed in range(runs):
        y, b, arm = world(seed, weight=weight)
        found = [several.adjusted(x, *three(y[:n], b[:n], arm[:n])) for n in LOOKS]
        wrong += any(f is not None and (f.low > 0 or f.high < 0) for f in found)
    assert wrong / runs <= 0.05


def test_a_covariate_takes_the_variance_that_it_explains_and_leaves_the_effect():
    x = made(covariate=True)
    got = [several.adjusted(x, *three(*world(seed, effect=0.02))) for seed in range(60)]
    plain = [experiments.compare(x, three(*world(seed, effect=0.02))[0]) for seed in range(60)]
    assert abs(np.mean([f.effect for f in got]) - 0.02) < 0.003
    explained = 0.49 / (0.49 + 0.09)  # of the variance of .7 b + .3 u
    assert abs(np.mean([f.gain for f in got]) - explained) < 0.05
    assert np.var([f.effect for f in got]) < 0.4 * np.var([r.effect for r in plain])
    assert sum(f.low > 0 for f in got) > 3 * sum(r.low > 0 for r in plain)


def test_a_covariate_that_says_nothing_costs_nothing():
    x = made(covariate=True)
    y, b, arm = world(1, weight=0.0)
    got, plain = several.adjusted(x, *three(y, b, arm)), experiments.compare(x, three(y, b, arm)[0])
    assert abs(got.gain) < 0.01
    assert math.isclose(got.high - got.low, plain.high - plain.low, rel_tol=0.02)
    assert several.adjusted(x, *three(y[:20], b[:20], arm[:20])) is None
    short = three(y, b, arm)
    short[1] = three(y[:-1], b[:-1], arm[:-1])[1]
    assert several.adjusted(x, *short) is None  # some units have no covariate


def test_e_bh_keeps_its_promise_where_some_metrics_differ_and_finds_what_is_sure():
    assert several.discoveries({"a": 1e6, "b": 30.0, "c": 1.0}, 0.05) == {"a", "b"}  # 30 >= 3 / (2 * .05)
    assert several.discoveries({"a": 59.0, "b": 0.1, "c": 1.0}, 0.05) == set()
    assert several.discoveries({}, 0.05) == set()
    g, shares = np.random.default_rng(0), []
    for _ in range(400):
        z = g.normal(size=8) + 0.6 * g.normal()  # depend on each other
        null = np.arange(8) >= 3
        mean = np.where(null, 0.0, 4.0)
        e = {str(i): math.exp(3 * (z[i] / 1.166 + mean[i]) - 4.5) for i in range(8)}  # E[e] = 1 under the null
        found = several.discoveries(e, 0.1)
        shares.append(sum(null[int(i)] for i in found) / max(1, len(found)))
    assert np.mean(shares) <= 0.1


def test_a_further_metric_has_the_units_and_arms_of_its_experiment_and_its_own_outcomes():
    x = made(also=(Metric("seconds", "lower", 0.0, 60.0),), covariate=True)
    seconds = several.derived(x, several.metric_of(x, "seconds"))
    assert experiments.load(experiments.plain(x)) == x
    with Events() as log:
        for i in range(200):
            unit, arm = str(i), experiments.assign(x, str(i))
            log.expose(x, unit, arm)
            log.expose(seconds, unit, arm)
            before, total = several.streams(x)
            for stream, value in ((before, 0.5), (total, 1.0)):
                log.expose(stream, unit, arm)
                log.outcome(stream, unit, value)
            log.outcome(x, unit, 0.5)
            last = log.outcome(seconds, unit, 10.0 if arm == "treatment" else 40.0)
        assert last.result(10)
        known = {x.metric: log.summary(x), "seconds": log.summary(seconds)}
        cuped = several.adjusted(x, log.summary(x), *map(log.summary, several.streams(x)))
    got = several.compared(x, known)
    assert got["seconds"].effect > 20
    assert got[x.metric].effect == 0.0
    assert got["seconds"].n_control == got[x.metric].n_control
    assert several.discoveries({k: r.e_value for k, r in got.items()}, x.alpha) == {"seconds"}
    assert cuped is not None
    assert cuped.effect == 0.0
    assert got["seconds"].low < experiments.compare(seconds, known["seconds"]).low  # intervals pay for each other


@pytest.mark.parametrize("also", [("outcome",), ("before",), ("a b",), ("x", "x"), ("n" * 30,)])
def test_metrics_that_cannot_be_told_apart_are_refused(also):
    with pytest.raises(ConfigError, match="also"):
        made(also=tuple(Metric(name) for name in also))
    with pytest.raises(Invalid, match="it counts outcome"):
        several.metric_of(made(), "other")
