"""What this process answered, for Prometheus (docs/metrics.md).

A route is named by its template, so that there are as many series as routes, whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import Collector

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Requests:
    """Those of one process."""

    def __init__(self) -> None:
        labels = ("method", "route")
        self._answered = Counter("taskplatform_api_requests", "Requests that were answered.", (*labels, "status"), registry=None)
        self._seconds = Histogram(
            "taskplatform_api_request_seconds",
            "Requests, by the time from their headers to the end of their answer.",
            labels,
            buckets=_SECONDS,
            registry=None,
        )
        self._in_flight = Gauge("taskplatform_api_requests_in_flight", "Requests that are being answered.", registry=None)
        self.collectors: tuple[Collector, ...] = (self._answered, self._seconds, self._in_flight)

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
        self._answered.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
