"""What a service counts and measures of itself, as Prometheus reads it at /metrics.

Every service has its own registry, so that several in one process never share a series. Labels are bounded: an arm is
one of ARMS, a digest one of the first MAX_DIGESTS that answered, so no caller can make series without end. Requests are
measured by arm and digest, the worker's steps by digest; `patchbay_arm` joins the two.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from registry.ab.ledger import BASE

ARMS = (BASE, "champion", "challenger", "control", "treatment")
"""Values of the label `arm`, beside NAMED"""
NAMED = "named"
"""Label of an arm that a request named by its digest"""
MAX_DIGESTS = 32
"""Number of digests that get series of their own in one process; later ones share OTHER"""
OTHER = "other"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Counts:
    """Counters and histograms of one service. Any thread may add; adding takes microseconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers: Counter[tuple[str, str, int]] = Counter()
        """(arm, digest, HTTP status) -> answers"""
        self.calls: Counter[int] = Counter()
        """HTTP status -> responses of any route, with those that were refused before they had an arm"""
        self.tokens: Counter[str] = Counter()
        """Arm's digest -> row steps (a token of text, an image, a denoising step)"""
        self.failed: Counter[str] = Counter()
        """Arm's digest -> jobs that failed alone"""
        self.steps = self.rows = 0
        """Numbers of steps of the worker, and of rows over all steps"""
        self.seconds = 0.0
        """Seconds spent in steps"""
        self.shadows_dropped = 0
        self.unwritten = 0
        """Answers sent before their exposure was durable"""
        self.gauges: Mapping[str, float] = {}
        """Name without prefix -> value, set before each reading"""
        self.roles: Mapping[str, str] = {}
        """Role -> digest that has it now, set before each reading"""
        both, one = ("arm", "digest"), ("digest",)
        self.latency = self._histogram("latency_seconds", "From request to whole answer", both, SECONDS)
        self.first = self._histogram("first_token_seconds", "From request to first token", both, SECONDS)
        self.waited = self._histogram("queue_seconds", "From queueing a row to its first step", one, WAITS)
        self.batch = self._histogram("batch_rows", "Rows of one arm in one step", one, ROWS)
        self._shown: dict[str, str] = {BASE: BASE}
        self._lock = threading.Lock()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, says: str, labels: Iterable[str], buckets: Iterable[float]) -> Histogram:
        return Histogram(f"patchbay_{name}", says, labels, buckets=tuple(buckets), registry=self.registry)

    def digest(self, digest: str | None) -> str:
        """Return the label of an arm's digest: 16 hex digits, "base", or OTHER once there are too many."""
        name = digest or BASE
        shown = self._shown.get(name)
        if shown is None:
            with self._lock:
                shown = self._shown.setdefault(name, name[:16] if len(self._shown) < MAX_DIGESTS else OTHER)
                if shown == OTHER:
                    del self._shown[name]  # what is not kept cannot grow
        return shown

    def called(self, status: int) -> None:
        """Count a response of any route."""
        self.calls[status] += 1

    def answered(self, label: str, digest: str, status: int, seconds: float, first_s: float | None = None) -> None:
        """Count an answer. label: the arm as answers name it; seconds, first_s: since the request came."""
        arm, shown = label if label in ARMS else NAMED, self.digest(digest)
        self.answers[arm, shown, status] += 1
        if status < 400:
            self.latency.labels(arm, shown).observe(seconds)
            if first_s is not None:
                self.first.labels(arm, shown).observe(first_s)

    def stepped(self, digests: Counter[str], seconds: float, waits: Iterable[tuple[str, float]]) -> None:
        """Count one step of the worker. digests: arm's digest -> rows in it; waits: digest, seconds of new rows."""
        self.steps += 1
        self.rows += digests.total()
        self.seconds += seconds
        self.tokens.update(digests)
        for digest, rows in digests.items():
            self.batch.labels(self.digest(digest)).observe(rows)
        for digest, waited in waits:
            self.waited.labels(self.digest(digest)).observe(waited)

    def collect(self) -> Iterator[Metric]:
        """Yield counters and gauges, as a collector of prometheus_client."""
        answers = CounterMetricFamily("patchbay_answers", "Answers", labels=("arm", "digest", "status"))
        for (arm, shown, status), n in sorted(self.answers.copy().items()):
            answers.add_metric((arm, shown, str(status)), n)
        yield answers
        calls = CounterMetricFamily("patchbay_calls", "Responses of any route", labels=("status",))
        for status, n in sorted(self.calls.copy().items()):
            calls.add_metric((str(status),), n)
        yield calls
        for name, says, counter in (
            ("tokens", "Row steps: a token, an image, a denoising step", self.tokens),
            ("failed", "Jobs that failed alone", self.failed),
        ):
            family = CounterMetricFamily(f"patchbay_{name}", says, labels=("digest",))
            by_label: Counter[str] = Counter()
            for digest, n in counter.copy().items():
                by_label[self.digest(digest)] += n
            for shown, n in sorted(by_label.items()):
                family.add_metric((shown,), n)
            yield family
        for name, says, value in (
            ("steps", "Steps of the worker", self.steps),
            ("rows", "Rows over all steps", self.rows),
            ("decoding_seconds", "Seconds in steps", self.seconds),
            ("shadows_dropped", "Shadow answers given up under load", self.shadows_dropped),
            ("unwritten", "Answers sent before their exposure was durable", self.unwritten),
        ):
            yield CounterMetricFamily(f"patchbay_{name}", says, value=value)
        for name, level in self.gauges.items():
            yield GaugeMetricFamily(f"patchbay_{name}", name.replace("_", " "), value=level)
        arms = GaugeMetricFamily("patchbay_arm", "Which digest has which role now", labels=("arm", "digest"))
        for role, digest in self.roles.items():
            arms.add_metric((role, self.digest(digest)), 1)
        yield arms

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """Return everything, and its content type, in the format that an Accept header prefers."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind
