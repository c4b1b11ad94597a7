"""OpenTelemetry traces: of each job plan → release → run → HTTP call, as an extra (`pip install taskplatform[otel]`).

On where OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, and OTEL_SDK_DISABLED and OTEL_TRACES_EXPORTER do not say
no; the SDK reads all its other variables itself. Off, nothing is imported, and a job costs nothing but the question.

The trace id of a job is the BLAKE2b of its id, so every process and every retry knows it, and nothing of it has to be kept:

    plan <definition>       from when the job was made to when it is due     its span id is made of the job's id
      release <definition>  from due to started, of each attempt             made of the job's id and the delivery
        run <definition>    an attempt
          <METHOD>          its call; the target gets this one's `traceparent`

The first two are told by whoever runs the job, from the ledger, when the run has ended. Beat's `plan batch` spans make a trace for each
occurrence, to which the job's first span has a link.

What it promises: no fault of a span or of the collector reaches a job, and neither a job nor the end of a process waits for the collector
(but for `_FLUSH_SECONDS` in all when a process ends).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Link, Span, SpanContext

log = logging.getLogger(__name__)

#: W3C Trace Context, https://www.w3.org/TR/trace-context/
TRACEPARENT = "traceparent"
#: When a process ends it waits so long for the collector.
_FLUSH_SECONDS = 1.0
#: Between two lines of the SDK about a collector that is away.
_SAY_EVERY_SECONDS = 60.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

T = TypeVar("T")

_role = "taskplatform"


def identify(role: str) -> None:
    """Say which part of the platform this process is: its service is `taskplatform-<role>`, unless OTEL_SERVICE_NAME names it."""
    global _role
    _role = role


@lru_cache(maxsize=1)
def is_on() -> bool:
    """Whether this process tells of what it does. Asked of the environment once."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return False
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.exporter.otlp") is None:
        log.warning("no traces: %s is set, but the packages are missing; install taskplatform[otel]", " or ".join(_ENDPOINTS))
        return False
    return True


# --- what is told ----------------------------------------------------------------------------------------------------


class Run(Protocol):
    """An attempt."""

    @property
    def job_id(self) -> str:
        """Of the ledger."""

    @property
    def delivery(self) -> int:
        """The number of its release."""

    @property
    def worker(self) -> str:
        """Where it runs."""

    @property
    def start(self) -> Any:
        """A `store.Start`."""


_OFF: AbstractContextManager[None] = nullcontext()


def run(run: Run, created_ms: Callable[[], int]) -> AbstractContextManager[None]:
    """Around an attempt. `created_ms` asks the ledger when the job was made, after the run and where that is told."""
    return _run(run, created_ms) if is_on() else _OFF


def call(method: str, url: str, headers: Mapping[str, str]) -> AbstractContextManager[_Call]:
    """Around an HTTP call of a run."""
    return _call(method, url, headers) if is_on() else nullcontext(_Call(headers))


@dataclass(slots=True)
class _Call:
    """An HTTP call."""

    headers: Mapping[str, str]
    """What to send: what was given, and `traceparent` unless that was given."""
    span: Any = None

    def ended(self, status: int | None, reason: str, *, failed: bool) -> None:
        """What became of it."""
        if self.span is None:
            return
        with _harmless():
            if status is not None:
                self.span.set_attribute("http.response.status_code", status)
            if failed:
                self.span.set_attribute("error.type", str(status or reason))
                self.span.set_status(_status_error(reason))


def planned(oid: str, made: int, began_ns: int) -> None:
    """A batch of an occurrence (`<group>|<suffix>`) was planned, and made so many jobs. `began_ns` is since the epoch."""
    if is_on() and made:
        with _harmless():
            _planned(oid, made, began_ns)


def caused_by(traceparent: str | None) -> AbstractContextManager[None]:
    """What is submitted in here was asked for by a span of another program."""
    return _caused_by(traceparent) if traceparent and is_on() else _OFF


def enqueued(job_id: str) -> None:
    """A job was submitted: the trace that is current here, of this program or of `caused_by`, gets a span with a link to the job's own."""
    if is_on() or "opentelemetry.sdk.trace" in sys.modules:
        with _harmless():
            _enqueued(job_id)


def flush() -> None:
    """Before the process ends: send what was not sent yet, as far as that takes no time."""
    # it may never have begun
    if not is_on() or _provider.cache_info().currsize == 0:
        return
    thread = threading.Thread(target=_shut_down, args=(_provider(os.getpid()),), name="tracing-flush", daemon=True)
    thread.start()
    thread.join(_FLUSH_SECONDS)


def trace_id(job_id: str) -> int:
    """The trace of a job: 128 bits, not 0."""
    return _bits(f"trace {job_id}", 16)


# --- spans -----------------------------------------------------------------------------------------------------------


def _bits(text: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest()) or 1


def _plan_id(job_id: str) -> int:
    return _bits(f"plan {job_id}", 8)


def _release_id(job_id: str, delivery: int) -> int:
    return _bits(f"release {job_id}#{delivery}", 8)


def _occurrence(oid: str) -> tuple[int, int]:
    """Trace and span of an occurrence's first batch. A job's id does not say whether its group has a schedule of its own."""
    group, _, suffix = oid.rpartition("|")
    return _bits(f"occurrence {group.partition('~')[0]}|{suffix}", 16), _bits(f"occurrence {group.partition('~')[0]}|{suffix}", 8)


@contextmanager
def _harmless() -> Iterator[None]:
    try:
        yield
    except SoftTimeLimitExceeded:
        raise
    except Exception:
        log.debug("a span failed", exc_info=True)


def _try(make: Callable[[], T]) -> T | None:
    with _harmless():
        return make()
    return None


@contextmanager
def _run(run: Run, created_ms: Callable[[], int]) -> Iterator[None]:
    span = _try(lambda: _start_run(run))
    if span is None:
        yield
        return
    from opentelemetry import context, trace

    token = context.attach(trace.set_span_in_context(span))
    try:
        yield
        outcome = ""
    except BaseException as fault:
        outcome = type(fault).__name__
        raise
    finally:
        context.detach(token)
        with _harmless():
            _end_run(span, run, outcome, created_ms)


def _start_run(run: Run) -> Any:
    definition, user, _ = run.job_id.split(":", 2)
    attributes = {
        "taskplatform.job.id": run.job_id,
        "taskplatform.definition": definition,
        "taskplatform.user": user,
        "taskplatform.attempt": run.start.attempt,
        "taskplatform.delivery": run.delivery,
        "taskplatform.worker": run.worker,
    }
    above = _context(trace_id(run.job_id), _release_id(run.job_id, run.delivery))
    return _tracer().start_span(f"run {definition}", context=above, kind=_kind("CONSUMER"), attributes=attributes)


def _end_run(span: Span, run: Run, outcome: str, created_ms: Callable[[], int]) -> None:
    ended_ns = time.time_ns()
    # Retry, Ignore and what else Celery ends a run with are how it goes; the job's history says what became of it
    if outcome and outcome not in ("Retry", "Ignore"):
        span.set_status(_status_error(outcome))
    if outcome:
        span.set_attribute("taskplatform.outcome", outcome)
    span.end(ended_ns)
    if not span.get_span_context().trace_flags.sampled:
        return
    job_id, definition, due_ms = run.job_id, run.job_id.partition(":")[0], run.start.execute_after_ms
    attributes = {"taskplatform.job.id": job_id, "taskplatform.delivery": run.delivery}
    plan = _context(trace_id(job_id), _plan_id(job_id))
    with _with_ids(span_id=_release_id(job_id, run.delivery)):
        release = _tracer().start_span(f"release {definition}", context=plan, start_time=_ns(due_ms), attributes=attributes)
    release.end(_ns(max(due_ms, run.start.now_ms)))
    if run.start.attempt != 1 + run.start.losses:
        return  # an earlier attempt told how the job began
    began_ms = min(created_ms(), due_ms)
    suffix = job_id.rsplit(":", 1)[1]
    links = [] if suffix[0] in "mk" else [_link(*_occurrence(f"{definition}|{suffix}"))]
    with _with_ids(trace_id(job_id), _plan_id(job_id)):
        first = _tracer().start_span(
            f"plan {definition}",
            context=_no_context(),
            kind=_kind("PRODUCER"),
            start_time=_ns(began_ms),
            attributes={"taskplatform.job.id": job_id, "taskplatform.source": "enqueue" if suffix[0] in "mk" else "schedule"},
            links=links,
        )
    first.end(_ns(due_ms))


@contextmanager
def _call(method: str, url: str, headers: Mapping[str, str]) -> Iterator[_Call]:
    span = _try(lambda: _start_call(method, url))
    if span is None:
        yield _Call(headers)
        return
    try:
        if not any(name.lower() == TRACEPARENT for name in headers):
            headers = {**headers, TRACEPARENT: _traceparent(span.get_span_context())}
        yield _Call(headers, span)
    finally:
        with _harmless():
            span.end()


def _start_call(method: str, url: str) -> Any:
    from urllib.parse import urlsplit

    # not the whole URL: path and query may hold what is secret
    parts = urlsplit(url)
    attributes: dict[str, str | int] = {"http.request.method": method, "server.address": parts.hostname or "", "url.scheme": parts.scheme}
    if parts.port is not None:
        attributes["server.port"] = parts.port
    return _tracer().start_span(method, kind=_kind("CLIENT"), attributes=attributes)


def _planned(oid: str, made: int, began_ns: int) -> None:
    trace, span = _occurrence(oid)
    attributes = {"taskplatform.occurrence": oid, "taskplatform.jobs": made}
    definition = oid.partition("|")[0].partition("~")[0]
    with _with_ids(trace, None if oid in _told else span):
        _tracer().start_span(f"plan batch {definition}", context=_no_context(), start_time=began_ns, attributes=attributes).end()
    _told[oid] = None
    while len(_told) > _MOST_TOLD:
        del _told[next(iter(_told))]


#: Occurrences of which this process has told a batch: the next ones get span ids of their own.
_told: dict[str, None] = {}
_MOST_TOLD = 10_000


@contextmanager
def _caused_by(traceparent: str) -> Iterator[None]:
    from opentelemetry import context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    token = context.attach(TraceContextTextMapPropagator().extract({TRACEPARENT: traceparent}, context=_no_context()))
    try:
        yield
    finally:
        context.detach(token)


def _enqueued(job_id: str) -> None:
    from opentelemetry import trace

    if not trace.get_current_span().get_span_context().is_valid:
        return
    # a program that has a provider of its own knows better where its spans go
    has_own = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    if not has_own and not is_on():
        return
    tracer = trace.get_tracer("taskplatform") if has_own else _tracer()
    links = [_link(trace_id(job_id), _plan_id(job_id))]
    attributes = {"taskplatform.job.id": job_id}
    tracer.start_span(f"enqueue {job_id.partition(':')[0]}", kind=_kind("PRODUCER"), attributes=attributes, links=links).end()


def _ns(instant_ms: int) -> int:
    return instant_ms * 1_000_000


def _traceparent(of: SpanContext) -> str:
    return f"00-{of.trace_id:032x}-{of.span_id:016x}-{int(of.trace_flags):02x}"


def _span_context(trace: int, span: int) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _link(trace: int, span: int) -> Link:
    from opentelemetry.trace import Link

    return Link(_span_context(trace, span))


def _context(trace: int, span: int) -> Context:
    """Below a span of which only the ids are known. Whether its trace is sampled says the sampler, by the trace's id."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    return set_span_in_context(NonRecordingSpan(_span_context(trace, span)), Context())


def _no_context() -> Context:
    from opentelemetry.context import Context

    return Context()


def _kind(name: str) -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind[name]


def _status_error(text: str) -> Any:
    from opentelemetry.trace import Status, StatusCode

    return Status(StatusCode.ERROR, text[:200])


# --- the SDK ---------------------------------------------------------------------------------------------------------


_ids = threading.local()


@contextmanager
def _with_ids(trace_id: int | None = None, span_id: int | None = None) -> Iterator[None]:
    """What this thread begins in here has these ids."""
    _ids.trace_id, _ids.span_id = trace_id, span_id
    try:
        yield
    finally:
        _ids.trace_id = _ids.span_id = None


def _tracer() -> Any:
    return _provider(os.getpid()).get_tracer("taskplatform")


def _shut_down(provider: TracerProvider) -> None:
    with _harmless():
        provider.shutdown()


@lru_cache(maxsize=1)
def _provider(_pid: int) -> TracerProvider:
    """A process's own, with its own thread: made at the first span, and so after a fork."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return getattr(_ids, "trace_id", None) or super().generate_trace_id()

        def generate_span_id(self) -> int:
            return getattr(_ids, "span_id", None) or super().generate_span_id()

    own = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": f"taskplatform-{_role}"}
    resource = Resource.create({**own, "process.pid": os.getpid()})
    # not at exit: that would wait for the collector
    provider = TracerProvider(resource=resource, id_generator=Ids(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _quieten()
    return provider


def _quieten() -> None:
    """The SDK logs each batch that it could not send, with a traceback."""
    for name in ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal"):
        logger = logging.getLogger(name)
        if not any(isinstance(one, _OnceAMinute) for one in logger.filters):
            logger.addFilter(_OnceAMinute())


class _OnceAMinute(logging.Filter):
    """Lets a line through, without its traceback, and then none for a while."""

    _said = -_SAY_EVERY_SECONDS

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now = time.monotonic()
        if now - self._said < _SAY_EVERY_SECONDS:
            return False
        self._said = now
        record.exc_info = record.exc_text = None
        return True
