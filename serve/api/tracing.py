"""OpenTelemetry as an option: one span for each HTTP request, sent where the standard OTEL_* variables say."""

from __future__ import annotations

from typing import Any

from litestar.types import ASGIApp

from rdlm.errors import UserError

QUIET = "health,ready,metrics"
"""Paths that are asked all the time and say nothing."""


def traced(app: ASGIApp, exporter: Any = None) -> ASGIApp:
    """``app`` with a span around each request, a child of the caller's where it sent ``traceparent``.

    exporter: of opentelemetry-sdk; by default OTLP over HTTP. Raises UserError without the extra.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    except ImportError as error:
        raise UserError(
            "--tracing", True, f"{error.name} is not installed", "install the extra otel of this package"
        ) from None
    resource = Resource({"service.name": "rdlm"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    processor = BatchSpanProcessor(OTLPSpanExporter()) if exporter is None else SimpleSpanProcessor(exporter)
    provider.add_span_processor(processor)
    return OpenTelemetryMiddleware(
        app, excluded_urls=QUIET, tracer_provider=provider, exclude_spans=["send", "receive"]
    )
