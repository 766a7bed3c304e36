"""Several metrics of one experiment with one correction, and outcomes adjusted for what was known before (CUPED).

A further metric, and what a covariate needs, are streams of outcomes in the same event log, each under a name of its
own (`derived`), by the same units in the same arms; nothing is stored that an experiment of one metric does not store.

- e-BH (Wang & Ramdas, arXiv 2009.02824): e-values of any dependence, the k largest are discoveries where the k-th is at
  least m / (k alpha). Each is an e-process, so it may be asked at any time.
- CUPED (Deng et al., WSDM 2013): y - theta b, with b the unit's value before exposure and theta the slope of y on b
  within arms; the effect is the same in expectation, its variance smaller by the share of y's variance that b explains.
  Here on sums: of y, of b, and of y + b, whose squares give the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from registry.ab.experiment import ArmStats, Experiment, Metric, Result, Summary, compare, interval, mixture_e
from registry.errors import Invalid

BEFORE, SUM = "before", "sum"
"""names of the two streams that a covariate needs"""


def metric_of(x: Experiment, name: str) -> Metric:
    """The further metric of that name. Raises Invalid naming those there are."""
    for metric in x.also:
        if metric.name == name:
            return metric
    known = ", ".join([x.metric, *(m.name for m in x.also)])
    raise Invalid(f"metric {name[:40]!r} is none of experiment {x.name}; it counts {known}.")


def derived(x: Experiment, metric: Metric) -> Experiment:
    """The experiment on a further metric: the same units, arms and salt, outcomes of its own; it decides nothing."""
    return replace(
        x, name=f"{x.name}--{metric.name}", metric=metric.name, better=metric.better, low=metric.low, high=metric.high,
        margin=0.0, guardrails=(), promote_on_win=False, also=(), covariate=False,
    )  # fmt: skip


def streams(x: Experiment) -> tuple[Experiment, Experiment]:
    """The streams of the covariate and of its sum with the outcome."""
    before = derived(x, Metric(BEFORE, x.better, x.low, x.high))
    return before, derived(x, Metric(SUM, x.better, 2 * x.low, 2 * x.high))


def discoveries(e_values: Mapping[str, float], alpha: float) -> set[str]:
    """Names that differ, by e-BH: of them at most `alpha` are expected not to."""
    ranked = sorted(e_values, key=lambda name: -e_values[name])
    count = max((k for k, name in enumerate(ranked, 1) if e_values[name] >= len(ranked) / (k * alpha)), default=0)
    return set(ranked[:count])


def compared(x: Experiment, summaries: Mapping[str, Summary]) -> dict[str, Result]:
    """Metric -> result of every metric, with intervals that hold together (alpha shared by Bonferroni).

    summaries: metric -> what is known of it; the experiment's own metric among them.
    """
    share = x.alpha / (1 + len(x.also))
    own = {x.metric: x, **{m.name: derived(x, m) for m in x.also}}
    return {name: compare(one, summaries[name], share) for name, one in own.items() if name in summaries}


@dataclass(frozen=True)
class Adjusted:
    """An effect adjusted for a covariate, beside what it is without."""

    effect: float
    """treatment - control, signed so that positive is better"""
    low: float
    high: float
    e_value: float
    theta: float
    """slope of the outcome on the covariate within arms"""
    gain: float
    """Share of the variance of the plain effect that the covariate took away; 0 where it explains nothing"""
    n: int
    """units with outcome and covariate"""


def adjusted(x: Experiment, y: Summary, before: Summary, total: Summary) -> Adjusted | None:
    """The effect on the outcome, adjusted. None until each arm has min_n units, or unless all have a covariate."""
    arms = [(y.control, before.control, total.control), (y.treatment, before.treatment, total.treatment)]
    if any(len({one.n for one in arm}) != 1 or arm[0].n < x.min_n for arm in arms):
        return None
    moments = [_moments(*arm) for arm in arms]
    sxx, sxy = sum(m[3] for m in moments), sum(m[4] for m in moments)
    theta = sxy / sxx if sxx > 0 else 0.0
    (yc, bc, *_), (yt, bt, *_) = moments
    plain = [syy for _, _, syy, _, _ in moments]
    left = [max(0.0, syy - 2 * theta * sxy_a + theta**2 * sxx_a) for _, _, syy, sxx_a, sxy_a in moments]
    sizes = [arm[0].n for arm in arms]
    range_squared = 0.5 * (x.high - x.low) ** 2  # of two pseudo-outcomes, one at each bound, as for plain outcomes
    spread = [(s + range_squared) / (n + 2) for s, n in zip(left, sizes, strict=True)]
    before_spread = [(s + range_squared) / (n + 2) for s, n in zip(plain, sizes, strict=True)]
    variance = sum(s / n for s, n in zip(spread, sizes, strict=True))
    without = sum(s / n for s, n in zip(before_spread, sizes, strict=True))
    sign = 1.0 if x.better == "higher" else -1.0
    effect = (yt - yc) - theta * (bt - bc)
    tau = x.tau * (x.high - x.low)
    low, high = interval(sign * effect, variance, tau, x.alpha)
    return Adjusted(
        sign * effect, low, high, mixture_e(effect, variance, tau), theta, 1 - variance / without, sum(sizes)
    )


def _moments(y: ArmStats, b: ArmStats, total: ArmStats) -> tuple[float, float, float, float, float]:
    """Means of outcome and covariate, and sums of squares and products about them."""
    n = y.n
    my, mb = y.total / n, b.total / n
    product = 0.5 * (total.squares - y.squares - b.squares)
    return my, mb, y.squares - n * my * my, b.squares - n * mb * mb, product - n * my * mb
