"""A/B: which unit gets which arm, and what the outcomes say. Pure functions over values; no I/O, no clock.

Everything here may be looked at as often as one likes: intervals are confidence sequences and tests are e-processes, so
stopping when one likes what one sees costs nothing (a z-test looked at every 50 units calls 40 % of A/A tests a win).

- split: mixture SPRT on the difference of arm means (Johari et al., arXiv 1512.04922). With V the variance of the
  difference and mixing N(0, tau^2): e = sqrt(V/(V+tau^2)) exp(tau^2 d^2 / (2V(V+tau^2))); the interval is what it does
  not reject. Asymptotic in the variance estimate, hence `min_n`.
- shadow: both arms answer the same unit; an exact Beta-mixture e-process on discordant pairs, and the same normal
  mixture on the paired differences for the interval.
- sample ratio: Beta-mixture e-process against the share that was set (Lindon & Malek, arXiv 2011.03567); e >= 1000
  stops the analysis (the sequential form of a chi-squared test at p < 1e-3).
- p99 guardrail: betting e-process (Waudby-Smith & Ramdas, arXiv 2010.09686) on "a treated call exceeds limit x the
  control's p99 so far", which happens in 1 % of calls if the ratio is `limit`; 2 % is allowed, for the noise in p99.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from registry import config as configs
from registry.ab.special import log_beta, x_log_y
from registry.config import STRICT
from registry.errors import ConfigError, Invalid
from registry.manifest import is_digest

BUCKETS = 10_000
Arm = Literal["control", "treatment"]
CONTROL: Arm = "control"
TREATMENT: Arm = "treatment"
OWNER = "\x1f"
"""between the tenant of a token and its unit"""
SRM_E = 1000.0
P99_ALLOWED = 0.02
P99_BETS = (2.0, 8.0, 20.0)
BLIND = 0.05
"""Share of the declared range; outcomes that use less of it can hardly be told apart"""
EVENTS = 10
"""outcomes of the rarer kind expected in each arm before an interval is believed; with fewer it leans to one side"""
FEW_E = 10.0  # an exact test may decide before that if it is so much surer, which adds a tenth of alpha
HEALTH_CALLS, HEALTH_RATE, HEALTH_E = 200, 0.02, 100.0


@dataclass(frozen=True)
class Guardrail:
    """Something that must not get worse; crossing it rolls back at once, at its own error rate."""

    __pydantic_config__ = STRICT

    metric: Literal["quality", "error", "latency_p99_ratio"]
    limit: float
    """quality, error: how much worse is tolerated (absolute); latency_p99_ratio: treated p99 / control p99"""
    alpha: float = 0.01


DEFAULT_GUARDRAILS = (
    Guardrail("quality", 0.0, 0.05),
    Guardrail("error", 0.01, 0.01),
    Guardrail("latency_p99_ratio", 1.5, 0.01),
)


@dataclass(frozen=True)
class Metric:
    """A further metric of an experiment: reported with one correction over all (registry/ab/several.py), deciding
    nothing."""

    __pydantic_config__ = STRICT

    name: str
    better: Literal["higher", "lower"] = "higher"
    low: float = 0.0
    high: float = 1.0
    """outcomes lie between"""


@dataclass(frozen=True)
class Experiment:
    """Two digests and how they are to be told apart. Arms are digests, never aliases: an alias may move."""

    __pydantic_config__ = STRICT

    name: str
    system: str
    control: str
    treatment: str
    """digests, or "base" """
    share: float
    """Share of units that get the treatment"""
    salt: str
    metric: str = "outcome"
    better: Literal["higher", "lower"] = "higher"
    low: float = 0.0
    high: float = 1.0
    """outcomes lie between; 0/1 for yes and no"""
    min_n: int = 50
    """units with an outcome per arm before anything is concluded"""
    alpha: float = 0.05
    margin: float = 0.0
    """non-inferiority: the treatment may be worse by this much (in the outcome's units) and still pass; 0: must win"""
    tau: float = 0.1
    """expected size of an effect, as a share of high - low; tunes power, never validity"""
    mode: Literal["split", "shadow"] = "split"
    guardrails: tuple[Guardrail, ...] = DEFAULT_GUARDRAILS
    promote_on_win: bool = False
    token_share: float = 0.5
    """most of the units that may be one token's, where callers have tokens; the rest do not count. 1: one is trusted"""
    also: tuple[Metric, ...] = ()
    """further metrics"""
    covariate: bool = False
    """outcomes come with `before`, the unit's value before exposure, and the effect is also given adjusted for it"""

    def __post_init__(self) -> None:
        problems = {
            "name: letters a-z, digits, - and _, at most 64": not re.fullmatch(r"[a-z0-9_-]{1,64}", self.name),
            "share: between 0 and 1": not 0.0 <= self.share <= 1.0,
            "alpha: between 0 and 1": not 0.0 < self.alpha < 1.0,
            "margin: 0 or more": self.margin < 0,
            "tau: more than 0": self.tau <= 0,
            "min_n: at least 2": self.min_n < 2,
            "token_share: more than 0, at most 1": not 0.0 < self.token_share <= 1.0,
            "low: below high": not self.low < self.high,
            "control, treatment: digests of 64 hex digits, or base": not all(
                a == "base" or is_digest(a) for a in (self.control, self.treatment)
            ),
            "treatment: another than the control": self.control == self.treatment,
            "also: names of letters a-z, digits and _, at most 20, each once and none reserved; low below high": bool(
                self.also
            )
            and not (
                all(re.fullmatch(r"[a-z0-9_]{1,20}", m.name) and m.low < m.high for m in self.also)
                and len({self.metric, "before", "sum", *(m.name for m in self.also)}) == 3 + len(self.also)
            ),
            "name: at most 40 with further metrics": bool(self.also or self.covariate)
            and len(self.name) > 42
            and "--" not in self.name,
            "guardrails: alpha between 0 and 1": not all(0.0 < g.alpha < 1.0 for g in self.guardrails),
        }
        if wrong := [rule for rule, broken in problems.items() if broken]:
            raise ConfigError(f"This experiment cannot be run. {'; '.join(wrong)}.")

    def arm_digest(self, arm: Arm) -> str:
        return self.treatment if arm == TREATMENT else self.control


def begin(system: str, *, control: str, treatment: str, share: float, words: Iterable[str] = ()) -> Experiment:
    """A new experiment with its own salt. words: key=value for any other field."""
    token = secrets.token_hex(4)
    made = Experiment(f"{system}-{token}", system, control, treatment, share, secrets.token_hex(16))
    return configs.override(made, words)


def load(values: Mapping[str, Any]) -> Experiment:
    """An Experiment from the ledger's plain JSON."""
    return configs.parse(Experiment, values)


def plain(experiment: Experiment) -> dict[str, Any]:
    """As JSON, for the ledger."""
    return {**asdict(experiment), "guardrails": [asdict(g) for g in experiment.guardrails]}


def assign(experiment: Experiment, unit: str) -> Arm:
    """Which arm a unit gets: the same for ever, on every machine; a larger share only ever adds to the treated."""
    digest = hashlib.sha256(f"{experiment.salt}\0{unit}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % BUCKETS
    return TREATMENT if bucket < round(experiment.share * BUCKETS) else CONTROL


def check_value(experiment: Experiment, value: Any) -> float:
    """An outcome as a float within the experiment's bounds. Raises Invalid naming the value."""
    if isinstance(value, bool):
        value = float(value)
    if not isinstance(value, (int, float)) or not experiment.low <= value <= experiment.high:  # NaN fails both
        raise Invalid(
            f"value {str(value)[:40]!r} is not a number from {experiment.low:g} to {experiment.high:g}, "
            f"as experiment {experiment.name} counts."
        )
    return float(value)


# ---- what is known -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArmStats:
    """Sufficient statistics of one arm; all that judging needs, so millions of events are judged in microseconds."""

    units: int = 0
    """by first exposure (intention to treat)"""
    calls: int = 0
    errors: int = 0
    """calls answered 5xx or not at all"""
    n: int = 0
    """units with an outcome"""
    total: float = 0.0
    squares: float = 0.0
    """sum and sum of squares of unit means"""


@dataclass(frozen=True)
class Summary:
    """Everything known about an experiment."""

    control: ArmStats = ArmStats()
    treatment: ArmStats = ArmStats()
    ratio: dict[float, tuple[int, int]] = field(default_factory=dict)
    """share in force -> new units (control, treatment)"""
    crossovers: int = 0
    """units seen in both arms (a ramp moves some); they count where they were first"""
    pairs: int = 0
    wins: int = 0
    losses: int = 0
    """shadow: units with both outcomes, and those where the treatment is higher or lower"""
    pair_total: float = 0.0
    pair_squares: float = 0.0
    """shadow: of treatment - control"""
    p99_log_e: tuple[float, ...] = (0.0,) * len(P99_BETS)
    """log wealth of each bet that treated calls exceed limit x control's p99"""
    p99_calls: int = 0
    dropped: int = 0
    """shadow answers given up under load"""
    tokens: int = 0
    """tenants with units that count; 0 where there are no tokens"""
    uncounted: int = 0
    """units left out, because their token has more than its share"""
    seen_low: float = math.inf
    seen_high: float = -math.inf
    """outcomes so far lie between"""


@dataclass(frozen=True)
class Result:
    """What the outcomes say. effect: treatment - control, signed so that positive is better."""

    effect: float
    low: float
    high: float
    n_control: int
    n_treatment: int
    mean_control: float
    mean_treatment: float
    e_value: float
    """evidence against "no difference"; 1/alpha decides"""
    verdict: Literal["better", "worse", "not_inferior", "undecided", "sample_ratio_mismatch"]


@dataclass(frozen=True)
class Decision:
    """What to do now, and why."""

    experiment: str
    action: Literal["continue", "promote", "rollback", "stop"]
    why: str
    result: Result
    guardrails: dict[str, str]
    """metric -> ok, or what was crossed"""
    summary: Summary

    def evidence(self) -> dict[str, Any]:
        """As JSON, for the ledger: finite numbers only."""
        out = asdict(self)
        out["summary"]["ratio"] = {f"{k:g}": list(v) for k, v in self.summary.ratio.items()}
        return finite(out)


def finite(value: Any) -> Any:
    """The same with infinities as +-1e308, so that it can be sealed."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(1e308, value)
    return value


# ---- inference ---------------------------------------------------------------------------------------------------


def interval(estimate: float, variance: float, tau: float, alpha: float) -> tuple[float, float]:
    """Always-valid interval around an estimate with that variance: the normal mixture's confidence sequence."""
    if variance <= 0 or not math.isfinite(variance):
        return -math.inf, math.inf
    t2 = tau * tau
    half = math.sqrt(variance * (variance + t2) / t2 * math.log((variance + t2) / (variance * alpha * alpha)))
    return estimate - half, estimate + half


def mixture_e(estimate: float, variance: float, tau: float) -> float:
    """Evidence against a true value of 0; >= 1/alpha rejects, at any time."""
    if variance <= 0 or not math.isfinite(variance):
        return 1.0
    t2 = tau * tau
    return math.exp(
        min(700.0, 0.5 * math.log(variance / (variance + t2)) + t2 * estimate**2 / (2 * variance * (variance + t2)))
    )


def _mean_and_variance(n: int, total: float, squares: float, low: float, high: float) -> tuple[float, float]:
    """Mean, and the variance of the mean. Two pseudo-outcomes, one at each bound, keep it from being 0 too early."""
    if n == 0:
        return 0.0, math.inf
    center = (total + low + high) / (n + 2)
    spread = max(0.0, (squares + low * low + high * high) / (n + 2) - center * center)
    return total / n, spread / n


def compare(experiment: Experiment, summary: Summary, alpha: float | None = None) -> Result:
    """The effect so far with its always-valid interval, and the verdict."""
    x, alpha = experiment, experiment.alpha if alpha is None else alpha
    c, t = summary.control, summary.treatment
    sign = 1.0 if x.better == "higher" else -1.0
    mean_c, var_c = _mean_and_variance(c.n, c.total, c.squares, x.low, x.high)
    mean_t, var_t = _mean_and_variance(t.n, t.total, t.squares, x.low, x.high)
    tau = x.tau * (x.high - x.low)
    if x.mode == "shadow":
        width = x.high - x.low
        d, variance = _mean_and_variance(summary.pairs, summary.pair_total, summary.pair_squares, -width, width)
        n_c = n_t = summary.pairs
        k, m = summary.wins, summary.losses
        e = math.exp(min(700.0, log_beta(k + 0.5, m + 0.5) - log_beta(0.5, 0.5) + (k + m) * math.log(2)))
    else:
        # an arm with few outcomes of the rarer kind believes too much in its mean: it has at least both arms' spread
        both = _mean_and_variance(c.n + t.n, c.total + t.total, c.squares + t.squares, x.low, x.high)[1] * (c.n + t.n)
        var_c, var_t = (max(v, both / s.n) if s.n else v for v, s in ((var_c, c), (var_t, t)))
        d, variance = mean_t - mean_c, var_c + var_t
        n_c, n_t = c.n, t.n
        e = mixture_e(d, variance, tau)
    d *= sign
    low, high = interval(d, variance, tau, alpha)
    verdict: Literal["better", "worse", "not_inferior", "undecided", "sample_ratio_mismatch"] = "undecided"
    if sample_ratio_e(summary) >= SRM_E:
        verdict = "sample_ratio_mismatch"
    elif min(n_c, n_t) >= x.min_n:
        # the pair test decides between better and worse exactly; the interval decides how much
        sure = e >= 1 / alpha if x.mode == "shadow" else _enough(x, c, t, alpha)
        if (low > 0 or (x.mode == "shadow" and d > 0)) and sure:
            verdict = "better"
        elif (high < 0 or (x.mode == "shadow" and d < 0)) and sure:
            verdict = "worse"
        elif x.margin > 0 and low > -x.margin:
            verdict = "not_inferior"
    return Result(d, low, high, n_c, n_t, mean_c, mean_t, e, verdict)


def _enough(x: Experiment, c: ArmStats, t: ArmStats, alpha: float) -> bool:
    """Whether the interval may be believed: each arm, were they alike, could be expected to have EVENTS outcomes of the
    rarer kind, or a test that holds for any number of outcomes says that they are not alike."""
    if not c.n or not t.n:
        return False
    mean = (c.total + t.total) / (c.n + t.n)
    rare = min(mean - x.low, x.high - mean) / (x.high - x.low)
    return min(c.n, t.n) * rare >= EVENTS or alike_log_e(x, c, t) >= math.log(FEW_E / alpha)


def alike_log_e(x: Experiment, c: ArmStats, t: ArmStats) -> float:
    """Log evidence against one mean of both arms, exact for bounded outcomes: universal inference (arXiv 1912.11436),
    each arm's Beta(1/2, 1/2) mixture over the best common mean. An outcome y in [0, 1] counts as p^y (1-p)^(1-y), whose
    ratio to that of the true mean has expectation at most 1."""
    arms = [(min(max((s.total - s.n * x.low) / (x.high - x.low), 0.0), s.n), s.n) for s in (c, t)]
    k, n = arms[0][0] + arms[1][0], c.n + t.n
    best = x_log_y(k, k / n) + x_log_y(n - k, 1 - k / n) if n else 0.0
    return sum(log_beta(a + 0.5, m - a + 0.5) - log_beta(0.5, 0.5) for a, m in arms) - best


def power(x: Experiment, difference: float, spread: float = 0.25, target: float = 0.8) -> int:
    """Units, of both arms together, until a true difference is found in `target` of experiments.

    difference: in the outcome's units; spread: variance of an outcome as a share of its range squared (1/4: the most).
    The interval's half width and the estimate's own noise together must be less than the difference.
    """
    width, share = x.high - x.low, min(max(x.share, 1e-6), 1 - 1e-6)
    noise = 0.8416 if target == 0.8 else 2.0
    low, high = 2, 1 << 40
    while low < high:
        n = (low + high) // 2
        variance = spread * width * width / n * (1 / share + 1 / (1 - share))
        _, half = interval(0.0, variance, x.tau * width, x.alpha)
        low, high = (low, n) if half + noise * math.sqrt(variance) <= difference else (n + 1, high)
    return low


def sample_ratio_e(summary: Summary) -> float:
    """Evidence that units are not assigned in the share that was set; one factor per share that was in force."""
    log_e = 0.0
    for share, (c, t) in summary.ratio.items():
        if 0.0 < share < 1.0:
            log_e += split_log_e(share, c, t, 100.0)
        elif (share == 0.0 and t) or (share == 1.0 and c):
            return math.inf
    return math.exp(min(700.0, log_e))


def split_log_e(share: float, c: int, t: int, prior: float) -> float:
    """Log evidence that c + t things do not fall to the treatment in this share: a mixture over other shares, valid
    whenever it is looked at. prior: how many imagined things say that the share is right."""
    a, b = prior * share, prior * (1 - share)
    return log_beta(a + t, b + c) - log_beta(a, b) - t * math.log(share) - c * math.log1p(-share)


def unhealthy(c: ArmStats, t: ArmStats) -> bool:
    """Whether the treatment fails: often, twice as often as the control, and by more than chance may bring about.

    Given that a call failed, it was a treated one with the share of treated calls if the arms are alike; a rule on
    rates alone, looked at again and again, would blame 5 of 200 failures at 1 % on the patch.
    """
    often = t.calls >= HEALTH_CALLS and t.errors > HEALTH_RATE * t.calls
    if not often or t.errors * c.calls <= 2 * c.errors * t.calls:
        return False
    return split_log_e(t.calls / (t.calls + c.calls), c.errors, t.errors, 2.0) >= math.log(HEALTH_E)


def bet_p99(log_e: tuple[float, ...], exceeded: bool) -> tuple[float, ...]:
    """The wealth of each bet after one more treated call."""
    x = float(exceeded) - P99_ALLOWED
    return tuple(w + math.log1p(bet * x) for w, bet in zip(log_e, P99_BETS, strict=True))


def _guard(experiment: Experiment, summary: Summary, rail: Guardrail) -> str:
    c, t = summary.control, summary.treatment
    if rail.metric == "quality":
        result = compare(experiment, summary, rail.alpha)
        few = experiment.mode == "split" and not _enough(experiment, c, t, rail.alpha)
        if few or min(result.n_control, result.n_treatment) < experiment.min_n:
            return "ok"
        worse = result.high < -rail.limit or (result.verdict == "worse" and rail.limit == 0.0)
        return f"worse: effect {result.effect:+.3f}, interval up to {result.high:+.3f}" if worse else "ok"
    if rail.metric == "error":
        if min(c.calls, t.calls) < experiment.min_n:
            return "ok"
        rate_c, var_c = _mean_and_variance(c.calls, c.errors, c.errors, 0.0, 1.0)
        rate_t, var_t = _mean_and_variance(t.calls, t.errors, t.errors, 0.0, 1.0)
        low, _ = interval(rate_t - rate_c, var_c + var_t, 0.02, rail.alpha)
        return f"errors {rate_t:.1%} against {rate_c:.1%}" if low > rail.limit else "ok"
    wealth = sum(math.exp(min(700.0, w)) for w in summary.p99_log_e) / len(summary.p99_log_e)
    crossed = wealth >= 1 / rail.alpha
    return f"more than {P99_ALLOWED:.0%} of calls over {rail.limit:g} x the control's p99" if crossed else "ok"


def judge(experiment: Experiment, summary: Summary) -> Decision:
    """What to do now: hard health, sample ratio, guardrails, then quality. May be asked after every event."""
    result = compare(experiment, summary)
    rails: dict[str, str] = {rail.metric: _guard(experiment, summary, rail) for rail in experiment.guardrails}
    c, t = summary.control, summary.treatment

    def decide(action: Literal["continue", "promote", "rollback", "stop"], why: str) -> Decision:
        return Decision(experiment.name, action, why, result, rails, summary)

    if unhealthy(c, t):
        return decide("rollback", f"health: {t.errors} of {t.calls} treated calls failed")
    if result.verdict == "sample_ratio_mismatch":
        return decide("stop", f"sample ratio: units {c.units} and {t.units} are not the share {experiment.share:g}")
    for metric, state in rails.items():
        if state != "ok":
            return decide("rollback", f"guardrail {metric}: {state}")
    if result.verdict in ("better", "not_inferior"):
        why = f"{result.verdict.replace('_', ' ')}: {result.effect:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"
        if experiment.promote_on_win and summary.tokens == 1 and experiment.token_share < 1.0:
            return decide("continue", f"{why}, but every unit is one token's; token_share=1 trusts it")
        return decide("promote" if experiment.promote_on_win else "continue", why)
    if result.verdict == "worse":
        return decide("rollback", f"worse: {result.effect:+.3f} [{result.low:+.3f}, {result.high:+.3f}]")
    return decide("continue", f"undecided{_blind(experiment, summary)}")


def _blind(x: Experiment, s: Summary) -> str:
    """Why nothing may ever be decided: outcomes that use a sliver of the range they were declared to have."""
    used = s.seen_high - s.seen_low
    if min(s.control.n, s.treatment.n) < x.min_n or used > BLIND * (x.high - x.low):
        return ""
    return f"; outcomes lie from {s.seen_low:g} to {s.seen_high:g} of {x.low:g} to {x.high:g}: declare that range"


def describe(experiment: Experiment, decision: Decision) -> str:
    """For people: a few lines."""
    r, s = decision.result, decision.summary
    lines = [
        f"{experiment.name} ({experiment.mode}, {experiment.share:.0%} treated): {r.verdict.replace('_', ' ')}",
        f"  control   {r.mean_control:.3f}  n {r.n_control}  units {s.control.units}  calls {s.control.calls}"
        f"  errors {s.control.errors}",
        f"  treatment {r.mean_treatment:.3f}  n {r.n_treatment}  units {s.treatment.units}  calls {s.treatment.calls}"
        f"  errors {s.treatment.errors}",
        f"  effect    {r.effect:+.3f}  always-valid {1 - experiment.alpha:.0%} interval [{r.low:+.3f}, {r.high:+.3f}]"
        f"  e-value {r.e_value:.3g}",
        "  guardrails " + ", ".join(f"{k} {v}" for k, v in decision.guardrails.items()),
        f"  {decision.action}: {decision.why}",
    ]
    return "\n".join(lines)


def with_share(experiment: Experiment, share: float) -> Experiment:
    return replace(experiment, share=share)
