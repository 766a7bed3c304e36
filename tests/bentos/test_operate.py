"""What a service says of itself: metrics that are bounded and its own, traces where asked for, logs without secrets,
and dashboards and alerts that ask for nothing that is not there."""

import asyncio
import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import bentos
from bentos import logs, traces
from bentos.metrics import MAX_DIGESTS, Counts
from registry.errors import ConfigError, unsecret

OPERATE = Path(bentos.__path__[0]) / "operate"
HEX = re.compile(r"[0-9a-f]{16}")


def samples(text):
    return {s.name for family in text_string_to_metric_families(text) for s in family.samples}


def test_histograms_are_by_arm_and_digest_and_each_service_has_its_own(service):
    async def work():
        async with service() as s:
            assert (await s.chat()).status_code == 200
            assert (await s.chat(stream=True)).status_code == 200
            assert (await s.chat(headers={"x-patchbay-arm": f"sha256:{s.digests[1][:12]}"})).status_code == 200
            found = {}
            for family in text_string_to_metric_families((await s.http.get("/metrics")).text):
                for one in family.samples:
                    found[one.name, tuple(sorted(one.labels.items()))] = one.value
            champion = (("arm", "champion"), ("digest", s.digests[0][:16]))
            for name in ("latency", "first_token"):
                assert found[f"patchbay_{name}_seconds_count", champion] == 2
                named = (("arm", "named"), ("digest", s.digests[1][:16]))
                assert found[f"patchbay_{name}_seconds_count", named] == 1
            assert found["patchbay_calls_total", (("status", "200"),)] == 3
            only = champion[1:]
            assert found["patchbay_queue_seconds_count", only] == 2
            assert found["patchbay_batch_rows_count", only] >= 2 * 8
            assert found["patchbay_arm", champion] == 1
            assert not s.runtime.loop._since  # nothing is remembered of jobs that are done
        async with service() as other:
            assert "patchbay_latency_seconds_count{" not in (await other.http.get("/metrics")).text

    asyncio.run(work())


def test_what_is_refused_before_it_has_an_arm_is_counted(service, tokens):
    async def work():
        async with service(tokens(mine={"name": "shop", "scopes": ["generate"]})) as s:
            for headers in ({"authorization": "Bearer mine"}, {}, {"authorization": "Bearer nobody"}):
                await s.http.post("/v1/chat/completions", json={"messages": []}, headers=headers)
            return dict(s.runtime.counts.calls), dict(s.runtime.counts.answers)

    calls, answers = asyncio.run(work())
    assert calls == {400: 1, 401: 2}
    assert answers == {}


def test_labels_cannot_grow_without_end():
    counts = Counts()
    for i in range(10 * MAX_DIGESTS):
        counts.answered(f"sha256:{i:016x}", f"{i:064x}", 200, 0.1)
        counts.stepped(counts.tokens.__class__({f"{i:064x}": 1}), 0.1, [(f"{i:064x}", 0.1)])
    text = counts.text()[0].decode()
    assert len(set(HEX.findall(text))) < MAX_DIGESTS
    assert f'patchbay_latency_seconds_count{{arm="named",digest="other"}} {9 * MAX_DIGESTS + 1:.1f}' in text
    assert set(re.findall(r'arm="(\w+)"', text)) == {"named"}


def test_a_stream_whose_caller_left_is_counted_once(service):
    async def work():
        async with service() as s:
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 64, "stream": True}
            async with s.http.stream("POST", "/v1/chat/completions", json=body) as got:
                await got.aclose()
            await s.until(lambda: s.runtime.counts.answers)
            assert sum(s.runtime.counts.answers.values()) == 1

    asyncio.run(work())


@pytest.fixture(name="scraped", scope="module")
def _scraped():
    """Names of every sample that a service can show."""
    counts = Counts()
    counts.gauges = {"queue_rows": 0, "warnings": 0, "ill": 0}
    counts.roles = {"base": "base"}
    counts.answered("champion", "base", 200, 0.1, 0.1)
    counts.stepped(counts.tokens.__class__({"base": 1}), 0.1, [("base", 0.1)])
    counts.failed["base"] += 1
    counts.called(200)
    return samples(counts.text()[0].decode())


def expressions():
    board = json.loads((OPERATE / "grafana.json").read_text())
    asked = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]
    groups = yaml.safe_load((OPERATE / "alerts.yaml").read_text())["groups"]
    return asked + [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


@pytest.mark.parametrize(("title", "asked"), expressions(), ids=lambda p: p[:30])
def test_dashboard_and_alerts_ask_for_metrics_and_labels_that_exist(title, asked, scraped):
    del title
    names = re.findall(r"\b((?:patchbay|process)_\w+)", asked)
    assert names or asked.startswith("up{")
    assert set(names) <= scraped
    labels = {w for group in re.findall(r"by \(([^)]*)\)", asked) for w in group.replace(" ", "").split(",")}
    assert labels <= {"arm", "digest", "status", "le", "instance"}


def test_a_span_says_who_answered_by_the_conventions_and_nothing_that_was_said(service, monkeypatch):
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    made = traces.made(SimpleSpanProcessor(kept))
    monkeypatch.setattr(traces, "tracer", lambda: made)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def work():
        async with service() as s:
            whole = await s.chat("a very private question", headers={"traceparent": parent})
            streamed = await s.chat("a very private question", stream=True)
            wrong = await s.http.post("/v1/chat/completions", json={"messages": []})
            assert [r.status_code for r in (whole, streamed, wrong)] == [200, 200, 400]
            return whole.json()["usage"], s.digests

    used, digests = asyncio.run(work())
    one, two, bad = kept.get_finished_spans()
    for span in (one, two):
        assert span.name == span.attributes["gen_ai.operation.name"] == "chat"
        assert span.attributes["gen_ai.response.model"] == digests[0]
        assert span.attributes["gen_ai.request.model"] == "champion"
        assert span.attributes["gen_ai.usage.output_tokens"] > 0
        assert "private" not in str(dict(span.attributes))
    assert one.attributes["gen_ai.usage.input_tokens"] == used["prompt_tokens"]
    assert f"{one.context.trace_id:032x}" == parent.split("-")[1]
    assert bad.attributes["error.type"] == "400"


def test_traces_need_an_endpoint_and_the_extra_is_named(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert traces.tracer() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(traces, "EXPORTER", "opentelemetry.no_such_exporter")
    with pytest.raises(ConfigError, match=r"patchbay\[tracing\]"):
        traces.tracer()


def test_logs_are_json_lines_without_secrets(service, monkeypatch, capsys):
    before = {name: (lg.handlers, lg.propagate, lg.level) for name in ("patchbay", "patchbay.access")
              for lg in [logging.getLogger(name)]}  # fmt: skip
    formatters = [(h, h.formatter) for h in logging.root.handlers]
    with pytest.raises(ConfigError, match="xml"):
        logs.install({"PATCHBAY_LOG": "xml"})
    logs.install({"PATCHBAY_LOG": "json"})
    try:

        async def work():
            async with service() as s:
                await s.chat("a very private question", headers={"authorization": "Bearer not-to-be-seen"})

        asyncio.run(work())
        try:
            raise ValueError("postgresql://me:hidden@host/db said authorization: Bearer hidden-too")
        except ValueError:
            logging.getLogger("patchbay").exception("with password=hidden and api_key: 'hidden'")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        for name, (handlers, propagate, level) in before.items():
            one = logging.getLogger(name)
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
        for handler, formatter in formatters:
            handler.setFormatter(formatter)
    (asked,) = [line for line in lines if line["message"] == "answered"]
    assert (asked["route"], asked["status"], asked["arm"]) == ("/v1/chat/completions", 200, "champion")
    assert lines[-1]["error"] == "ValueError"
    for secret in ("private", "hidden", "not-to-be-seen"):
        assert secret not in json.dumps(lines)


@pytest.mark.parametrize(
    "text", ["password=a-b", "Authorization: Bearer x.y", "api-key='k'", "http://u:p@h/", "secret: z"]
)
def test_a_secret_is_masked_and_what_is_none_stays(text):
    assert "***" in unsecret(text)
    assert unsecret("token_share=0.5, key=value") == "token_share=0.5, key=value"


def test_a_table_of_the_dashboard_asks_for_rows_of_now_and_has_no_option_of_another_panel():
    """Grafana's published types, against which the whole file was checked (docs/log/production.md)."""
    panels = {p["title"]: p for p in json.loads((OPERATE / "grafana.json").read_text())["panels"]}
    options = {"stat": {"reduceOptions"}, "table": {"showHeader"}, "timeseries": {"legend"}}
    for panel in panels.values():
        assert panel["options"].keys() <= options[panel["type"]]
        asked = {(t.get("format"), t.get("instant")) for t in panel["targets"]}
        assert asked == ({("table", True)} if panel["type"] == "table" else {(None, None)})
