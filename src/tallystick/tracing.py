"""Traces (OpenTelemetry): a span for each request, each run of a loop that had work, each call and each notification.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set; what sends the spans is the extra `otel`. A span says what was done, how
much of it and for how long, and never for whom: no references, no ids of customers, no URLs, no bodies, and of an error
its class only. The instrumentation that libraries bring says all of that (paths, statements, keys), so none is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import structlog
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tallystick import __version__

log = structlog.get_logger()

# A collector that is away must not hold up a process that is to stop.
EXPORT_SECONDS = 5

# How many things a run of a loop did. Most runs find nothing, twice a second: nobody wants to see those.
DONE = "tallystick.done"

Attribute = str | int

_tracer: Tracer | None = None


@contextmanager
def export_spans(endpoint: str | None, service: str) -> Iterator[None]:
    """Send this process's spans to the OTLP endpoint (HTTP), under this name, until the block ends.

    Without an endpoint nothing happens; without the extra, a warning. The other `OTEL_…` variables are the SDK's own.
    """
    if endpoint is None:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("traces_not_sent", why="the extra is missing: pip install 'tallystick[otel]'")
        yield
        return
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
    with record_spans(BatchSpanProcessor(exporter), service):
        yield


@contextmanager
def record_spans(processor: Any, service: str) -> Iterator[None]:
    """Give the spans of this process to a processor of the SDK's, until the block ends."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

    class WithoutIdleRuns(SpanProcessor):
        def on_start(self, span: Any, parent_context: Context | None = None) -> None:
            processor.on_start(span, parent_context)

        def on_end(self, span: ReadableSpan) -> None:
            if (span.attributes or {}).get(DONE) != 0:
                processor.on_end(span)

        def shutdown(self) -> None:
            processor.shutdown()

    global _tracer  # one a process, as the metrics
    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.version": __version__}), shutdown_on_exit=False
    )
    provider.add_span_processor(WithoutIdleRuns())
    before, _tracer = _tracer, provider.get_tracer("tallystick", __version__)
    try:
        yield
    finally:
        _tracer = before
        provider.shutdown()


def is_on() -> bool:
    """Whether spans go anywhere."""
    return _tracer is not None


def span(name: str, **attributes: Attribute) -> AbstractContextManager[Span]:
    """A span around a piece of work, inside the one that is open. Costs nothing when traces are off."""
    if _tracer is None:
        return nullcontext(INVALID_SPAN)
    return _Opened(_tracer, name, SpanKind.INTERNAL, attributes, None)


def request_span(headers: Sequence[tuple[bytes, bytes]], **attributes: Attribute) -> AbstractContextManager[Span]:
    """A span around a request, inside the one that its `traceparent` names (https://www.w3.org/TR/trace-context/)."""
    if _tracer is None:
        return nullcontext(INVALID_SPAN)
    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
    parent = TraceContextTextMapPropagator().extract(carrier, Context())
    return _Opened(_tracer, "request", SpanKind.SERVER, attributes, parent)


class _Opened(AbstractContextManager[Span]):
    """A span that says by which class of error it was left. The error's text may repeat what was sent."""

    def __init__(self, tracer: Tracer, name: str, kind: SpanKind, attributes: Mapping[str, Attribute], parent: Any):
        self._span = tracer.start_span(name, parent, kind, attributes)
        self._current = use_span(self._span, end_on_exit=True, record_exception=False, set_status_on_exception=False)

    def __enter__(self) -> Span:
        return self._current.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            self._span.set_status(Status(StatusCode.ERROR, kind.__name__))
        self._current.__exit__(kind, error, trace)


def trace_id(opened: Span) -> str:
    """The trace's id as 32 hexadecimal digits, to be found in log lines."""
    return format_trace_id(opened.get_span_context().trace_id)
