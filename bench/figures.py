"""What each benchmark gives and must reach, in one place, and the table of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One figure of a benchmark's result.

    `path` leads to it, with a dot before each further key. Where an object lies there, each of its values is meant. Without a
    bar it is shown only.
    """

    path: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def must_reach(self) -> str:
        """The bar, as the table shows it."""
        bounds = (("≥", self.at_least), ("≤", self.at_most))
        return " and ".join(f"{sign} {bound:,g}" for sign, bound in bounds if bound is not None)

    def verdict(self, value: float) -> str:
        """`ok`, `short`, or nothing where there is no bar."""
        if not self.must_reach:
            return ""
        high_enough = self.at_least is None or value >= self.at_least
        low_enough = self.at_most is None or value <= self.at_most
        return "ok" if high_enough and low_enough else "short"

    def values(self, result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """The figure's values in a result, each with its path. Raises KeyError for one that is not there."""
        found: Any = result
        for key in self.path.split("."):
            found = found[key]
        if isinstance(found, Mapping):
            yield from ((f"{self.path}.{key}", value) for key, value in found.items())
        else:
            yield self.path, found


#: By benchmark, in the order of the table. The name is that of the module in this package whose `run` measures it.
FIGURES: dict[str, tuple[Figure, ...]] = {
    "plan": (
        Figure("jobs_per_s"),
        Figure("ratio_apply_async", at_least=25),
        Figure("ratio_kombu_batch"),
        Figure("ratio_limit"),
        Figure("planner_rss_mb", at_most=120),
        Figure("redis_bytes_per_subscription", at_most=250),
        Figure("redis_bytes_per_job", at_most=1100),
    ),
    "footprint": (
        Figure("bytes_per_user"),
        Figure("bytes_per_subscription"),
        Figure("bytes_per_waiting_job"),
        Figure("bytes_per_finished_job"),
    ),
    "idle": (Figure("tick_ms_empty"), Figure("tick_ms_full"), Figure("ratio", at_most=1.5)),
    "execute": (Figure("jobs_per_s"), Figure("ratio_celery", at_least=0.9)),
    "http": (Figure("ratio_ceiling", at_least=0.95), Figure("ratio_peers", at_least=1.0)),
    "lag": (
        Figure("100.p50_ms", at_most=50),
        Figure("100.p99_ms", at_most=300),
        Figure("500.p50_ms", at_most=50),
        Figure("500.p99_ms", at_most=300),
    ),
    "limiter": (
        Figure("achieved_ratio", at_least=0.98, at_most=1.0),
        Figure("worst_window_excess", at_most=0),
        Figure("redis_calls_per_job"),
    ),
    "priority": (Figure("high_wait_p99_ms"), Figure("order_violations", at_most=0)),
    "forecast": (
        Figure("forecast_s"),
        Figure("forecast_cpu_s", at_most=10),
        Figure("what_if_cpu_s"),
        Figure("rss_mb", at_most=400),
        Figure("ratio_reading"),
    ),
    "memory": (Figure("beat_mb", at_most=80), Figure("worker_mb", at_most=200)),
}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each figure of each result; a result with an `error` has one line that says so."""
    rows = [("benchmark", "figure", "value", "must reach", "")]
    for name, result in results.items():
        if "error" in result:
            rows.append((name, "did not run", "", "", "short"))
            continue
        for figure in {**FIGURES, **BY_NAME}[name]:
            for path, value in figure.values(result):
                rows.append((name, path, f"{value:,.10g}", figure.must_reach, figure.verdict(value)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        f"{name:<{widths[0]}}  {path:<{widths[1]}}  {value:>{widths[2]}}  {bar:<{widths[3]}}  {verdict}".rstrip()
        for name, path, value, bar, verdict in rows
    )


#: Those that take minutes: they run by their names alone.
BY_NAME: dict[str, tuple[Figure, ...]] = {
    "recovery": (Figure("worker_s", at_most=20), Figure("worker_plain_s"), Figure("beat_s", at_most=20), Figure("beat_plain_s")),
}
