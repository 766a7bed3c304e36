"""Traces of requests by OpenTelemetry's conventions for generative AI, only where an endpoint is named.

Without OTEL_EXPORTER_OTLP_ENDPOINT (or its form for traces) nothing is imported and nothing is made. A span carries who
answered (arm, digest, experiment), tokens and errors, never what was asked or answered, nor the caller's token.
Attributes: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from registry.errors import ConfigError

if TYPE_CHECKING:
    from bentos.runtime.arms import Choice

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
"""Route -> operation as the conventions name it; other routes are named by their last words"""


def tracer() -> Any:
    """Return the tracer of this process; None where no endpoint is named. Raises ConfigError without the exporter."""
    where = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
    return _tracer(where) if where else None


@functools.cache
def _tracer(where: str) -> Any:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        exporter = importlib.import_module(EXPORTER).OTLPSpanExporter()
    except ImportError:
        raise ConfigError(
            f"Traces are to go to {where}, and nothing here can send them. Install the extra: pip install "
            "'patchbay[tracing]', or unset OTEL_EXPORTER_OTLP_ENDPOINT."
        ) from None
    return made(BatchSpanProcessor(exporter))


def made(processor: Any) -> Any:
    """Return a tracer of its own provider, whose spans go to `processor`; the process's global one stays as it is."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    about = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "patchbay")}
    if system := os.environ.get("PATCHBAY_SYSTEM"):
        about["patchbay.system"] = system
    provider = TracerProvider(resource=Resource.create(about))
    provider.add_span_processor(processor)
    return provider.get_tracer("patchbay")


def begin(request: Request, path: str) -> None:
    """Begin the span of a request to route `path`, as a child of the caller's where its headers name one."""
    if request.method != "POST" or (tracing := tracer()) is None:
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    name = OPERATIONS.get(path) or path.removeprefix("/v1/").replace("/", " ")
    around = TraceContextTextMapPropagator().extract(dict(request.headers))
    about = {
        "gen_ai.operation.name": name, "gen_ai.provider.name": "patchbay", "http.request.method": "POST",
        "http.route": path, "patchbay.request": request.state.number,
    }  # fmt: skip
    request.state.span = tracing.start_span(name, around, SpanKind.SERVER, about)


def note(request: Request, choice: Choice, status: int) -> None:
    """Say in the request's span, if there is one, which arm answered with which status."""
    if (span := getattr(request.state, "span", None)) is None:
        return
    label, digest = choice.shown
    span.set_attribute("gen_ai.request.model", label)
    span.set_attribute("gen_ai.response.model", digest)
    span.set_attribute("patchbay.arm", label)
    span.set_attribute("http.response.status_code", status)
    if choice.experiment is not None:
        span.set_attribute("patchbay.experiment", choice.experiment.name)


def used(request: Request, usage: Mapping[str, int]) -> None:
    """Say in the request's span how many tokens were read and written; usage: as OpenAI's API reports it."""
    if (span := getattr(request.state, "span", None)) is not None:
        span.set_attribute("gen_ai.usage.input_tokens", usage["prompt_tokens"])
        span.set_attribute("gen_ai.usage.output_tokens", usage["completion_tokens"])


def end(request: Request, response: Response) -> None:
    """End the request's span with its response; of a stream, when its last part was sent."""
    if (span := getattr(request.state, "span", None)) is None:
        return
    if response.status_code >= 400:
        from opentelemetry.trace import Status, StatusCode

        span.set_attribute("http.response.status_code", response.status_code)
        span.set_attribute("error.type", str(response.status_code))
        if response.status_code >= 500:
            span.set_status(Status(StatusCode.ERROR))
    if isinstance(response, StreamingResponse):
        response.body_iterator = _until_sent(span, response.body_iterator)
    else:
        span.end()


async def _until_sent(span: Any, parts: Any) -> AsyncIterator[Any]:
    try:
        async for part in parts:
            yield part
    finally:
        if (close := getattr(parts, "aclose", None)) is not None:
            await close()  # what the shape does at a stream's end belongs to the span
        span.end()
