"""What Prometheus reads: what this process answered, and what the store tells cheaply.

A route is named by its template, so that there are as many series as routes, whatever is asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from taskplatform.errors import StoreError
from taskplatform.store import Store

log = logging.getLogger(__name__)

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Of one process. `read` may run in any thread."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfStore(store))
        labels = ("method", "route")
        self._requests = Counter("taskplatform_api_requests", "Requests that were answered.", (*labels, "status"), registry=self._registry)
        self._seconds = Histogram(
            "taskplatform_api_request_seconds",
            "From a request's headers to the end of its answer.",
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge("taskplatform_api_requests_in_flight", "Requests that are being answered.", registry=self._registry)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """While a request is being answered."""
        self._in_flight.inc()
        try:
            yield
        finally:
            self._in_flight.dec()

    def answered(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """One request was."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def read(self) -> bytes:
        """All of it, as Prometheus has it."""
        return generate_latest(self._registry)


class _OfStore(Collector):
    """What the store tells in some ten cheap commands. While Redis is away only the process's own figures are there."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> list[Metric]:
        """Nothing is asked for when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Asked for at each read."""
        up = GaugeMetricFamily("taskplatform_redis_up", "Whether Redis answers.")
        began = time.monotonic()
        try:
            found = list(self._read())
        except StoreError as fault:
            log.warning("metrics without what Redis knows, after %.1f s: %s", time.monotonic() - began, fault)
            up.add_metric((), 0)
            yield up
            return
        up.add_metric((), 1)
        yield up
        yield from found

    def _read(self) -> Iterator[Metric]:
        store = self._store
        entered = CounterMetricFamily("taskplatform_jobs_entered", "Jobs that entered a state.", labels=("state",))
        for state, count in store.counts().items():
            entered.add_metric((state.value,), count)
        yield entered
        events = CounterMetricFamily("taskplatform_events", "What should be rare, see docs/architecture.md.", labels=("event",))
        for name, count in sorted(store.counters().items()):
            events.add_metric((name,), count)
        yield events
        for name, text, by_priority in (
            ("waiting", "Jobs that wait; held ones are not counted.", store.waiting()),
            ("queued", "Jobs that are released and not started.", store.queued()),
        ):
            gauge = GaugeMetricFamily(f"taskplatform_jobs_{name}", text, labels=("priority",))
            for priority, count in by_priority.items():
                gauge.add_metric((priority.value,), count)
            yield gauge
        yield GaugeMetricFamily("taskplatform_jobs_running", "Jobs that run.", value=store.running())
        yield GaugeMetricFamily("taskplatform_users", "Users.", value=store.count_users())
        yield GaugeMetricFamily("taskplatform_workers", "Workers that have not been lost.", value=len(store.heartbeats()))
