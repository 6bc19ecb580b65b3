"""What an operator sees: request ids, the access log, log records as JSON lines, Prometheus metrics,
OpenTelemetry spans. No torch.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

from litestar.types import ASGIApp
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rdlm.errors import UserError
from serve.engine.engine import Engine, Histogram, State

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Identifier of the request that the current task answers."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FACTS = "rdlm_facts"
"""Key of the ASGI scope: a dictionary that routes may add to, and that the access log writes."""
UNTRACED = "health,ping,ready,metrics"
"""Paths that are asked for all the time and mean nothing."""


class JsonLines(logging.Formatter):
    """One JSON object per record: time (UTC seconds), level, logger, message, request_id, the access log's
    fields, traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(), "request_id": request_id.get(),
        }  # fmt: skip
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(log_format: Literal["text", "json"]) -> None:
    """Send this process's log to stderr: text is warnings, errors and a line for each answer but those to
    probes; json is all, one object a line."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonLines())
        logging.getLogger("rdlm").setLevel(logging.INFO)
    else:
        logging.getLogger("rdlm.serve.access").setLevel(logging.INFO)
        handler.addFilter(lambda record: not _is_probe(record))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _is_probe(record: logging.LogRecord) -> bool:
    path: str = getattr(record, "facts", {}).get("path", "")
    return path[1:] in UNTRACED.split(",")


class Metrics(Collector):
    """One application's metrics in a registry of its own. The engine thread writes its totals; this only
    reads them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.refusals: Counter[int] = Counter()
        """Answers of status 400 and above, by status; written on the event loop."""
        self.brownouts = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing up front: the engine may still be loading."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        engine = self._engine
        loaded = engine.state in (State.READY, State.DRAINING)
        slots = engine.served.scheduler.num_slots if loaded else 0
        yield GaugeMetricFamily("rdlm_ready", "1 while requests are accepted", engine.state is State.READY)
        yield GaugeMetricFamily("rdlm_queue_sequences", "sequences that wait for a slot", engine.num_waiting)
        yield GaugeMetricFamily("rdlm_running_sequences", "sequences that own a slot", engine.num_running)
        yield GaugeMetricFamily("rdlm_kv_slots", "slots of the key-value cache", slots)
        yield GaugeMetricFamily("rdlm_kv_slots_used", "slots in use", engine.num_running)

    def _counters(self) -> Iterator[Metric]:
        counters = self._engine.counters
        totals = {
            "rdlm_core_steps": ("forwards of the core, each over all rows in flight", counters.steps),
            "rdlm_prompt_tokens": ("prompt tokens of finished sequences", counters.prompt_tokens),
            "rdlm_cached_prompt_tokens": (
                "prompt tokens of finished sequences whose keys were in the prefix cache",
                counters.cached_tokens,
            ),
            "rdlm_cached_row_steps": (
                "core steps of positions that the prefix cache spared, finished sequences",
                counters.cached_steps,
            ),
            "rdlm_tokens": ("tokens drawn", counters.tokens),
            "rdlm_draft_tokens": (
                "tokens drafted, or guessed in a wavefront, of finished sequences",
                counters.drafted,
            ),
            "rdlm_accepted_draft_tokens": (
                "of these, the tokens that became part of an answer",
                counters.accepted,
            ),
            "rdlm_exits": (
                "tokens of finished sequences whose position left before its last step",
                counters.exits,
            ),
            "rdlm_saved_row_steps": (
                "core steps of positions that exits spared, finished sequences",
                counters.saved_steps,
            ),
            "rdlm_flops": ("floating-point operations of ended sequences' rows", counters.flops),
            "rdlm_lowered_tokens": (
                "tokens and prompt chunks with fewer steps than asked for, to meet a deadline",
                counters.lowered,
            ),
            "rdlm_deadline_hits": ("sequences that a deadline ended", counters.overdue),
            "rdlm_brownouts": (
                "requests that got fewer steps than the default because too many waited",
                self.brownouts,
            ),
            "rdlm_model_seconds": ("time in the model", counters.model_s),
            "rdlm_busy_seconds": (
                "time in engine steps, scheduling and bookkeeping included",
                counters.busy_s,
            ),
        }
        for name, (meaning, value) in totals.items():
            yield CounterMetricFamily(name, meaning, value)
        cpu = CounterMetricFamily(
            "rdlm_cpu_seconds",
            "CPU time of the engine thread, of the event loop that speaks HTTP, and of the whole process",
            labels=["of"],
        )
        seconds = (
            ("engine", self._engine.cpu_s),
            ("event_loop", time.thread_time()),  # the route of /metrics runs there
            ("process", time.process_time()),
        )
        for name, spent in seconds:
            cpu.add_metric([name], spent)
        yield cpu
        ended = CounterMetricFamily(
            "rdlm_sequences", "sequences that ended, by reason; abort is a cancellation", labels=["finish"]
        )
        for reason, count in counters.ended.items():
            ended.add_metric([reason], count)
        yield ended
        refused = CounterMetricFamily(
            "rdlm_refusals", "HTTP answers that are errors, by status", labels=["status"]
        )
        for status, count in sorted(self.refusals.items()):
            refused.add_metric([str(status)], count)
        yield refused

    def _histograms(self) -> Iterator[Metric]:
        counters = self._engine.counters
        families = {
            "rdlm_rows_per_core_step": ("rows that shared one forward of the core", counters.rows),
            "rdlm_steps_per_token": ("core steps of the position a token was drawn from; sum / count is the mean K",
                                     counters.token_steps),
            "rdlm_queue_seconds": ("wait for a slot, finished sequences", counters.queue_s),
            "rdlm_time_to_first_token_seconds": ("from submission to the first token", counters.first_token_s),
            "rdlm_inter_token_seconds": ("from one token of a sequence to its next", counters.between_tokens_s),
            "rdlm_request_seconds": ("from submission to the end, finished sequences", counters.total_s),
        }  # fmt: skip
        for name, (meaning, histogram) in families.items():
            yield HistogramMetricFamily(name, meaning, buckets=_buckets(histogram), sum_value=histogram.sum)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, as Prometheus wants them."""
    total, buckets = 0, []
    for bound, count in zip(
        [*(str(float(bound)) for bound in histogram.bounds), "+Inf"], list(histogram.counts), strict=True
    ):
        total += count
        buckets.append((bound, float(total)))
    return buckets


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
        app, excluded_urls=UNTRACED, tracer_provider=provider, exclude_spans=["send", "receive"]
    )
