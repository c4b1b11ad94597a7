"""The metrics' names, types and labels: sane, bounded, and as docs/metrics.md has them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from prometheus_client.metrics_core import Metric

from taskplatform import metrics
from taskplatform.api.metrics import Requests
from taskplatform.errors import StoreUnavailable
from taskplatform.metrics import PlatformCollector, ProcessCollector, Recent, beat_metrics, tick_seconds, worker_metrics
from taskplatform.model import JobState, Limit, Priority
from taskplatform.pulse import Pulse
from taskplatform.settings import Settings
from taskplatform.store import BOUNDS_MS, Beat, Breaker, BreakerState, DefinitionCounts, Figures, Histogram, LimitState, Worker
from tests.conftest import ROOT

#: Whose metrics there are, as the document says it.
SCOPES = ("platform", "process", "worker", "beat", "api", "reader")
NOW_MS = 1_800_000_000_000
EMPTY = Histogram((0,) * len(BOUNDS_MS), 0, 0)
FIGURES = Figures(
    now_ms=NOW_MS,
    planner={"tick": str(NOW_MS - 500), "planned": "7", "skipped_missed": "2", "failing_since": "1", "error": "x"},
    oldest_due_ms=NOW_MS - 1500,
    entered=dict.fromkeys(JobState, 3),
    counters={"dead_letters": 1},
    dead_letters=1,
    running={"report": 2, "removed": 1},
    queued=dict.fromkeys(Priority, 1),
    waiting={("report", Priority.LOW): 5, ("other", Priority.HIGH): 1},
    due={("report", Priority.LOW): 4},
    oldest_ms={("report", Priority.LOW): NOW_MS - 9000, ("other", Priority.HIGH): NOW_MS - 90_000, ("report", Priority.MEDIUM): NOW_MS + 1},
    paused=frozenset({"other"}),
    definitions=("other", "report"),
    lags=dict.fromkeys(Priority, EMPTY),
    counts={
        "report": DefinitionCounts(
            {(Priority.LOW, JobState.COMPLETED): 9},
            {Priority.LOW: 2},
            3,
            1,
            Histogram((1, 2, *(3,) * (len(BOUNDS_MS) - 2)), 4, 12_345),
        ),
        "other": DefinitionCounts({}, {}, 0, 0, EMPTY),
    },
    workers=(
        Worker("worker@a#1", NOW_MS - 60_000, 3, ("high",), (), {}),
        Worker("worker@a#2", NOW_MS - 1000, 3, ("high", "low"), (), {}),
    ),
    running_on={"worker@a#1": 2, "worker@a#2": 1},
    beats=(Beat("b1", True, "d", 1, 0, NOW_MS - 100), Beat("b2", False, "d", 1, 0, NOW_MS), Beat("b3", True, "d", 1, 0, NOW_MS - 60_000)),
    limits=(
        LimitState("total", Limit(10.0, 12), None, False, 3.0, 1, None),
        LimitState("user", Limit(concurrency=4), None, False, None, 0, 3),
    ),
    held_by={"total": 2, "user": 0},
    capped_users=1,
    users=7,
    breakers=(
        Breaker("open.example", BreakerState.OPEN, since_ms=1, until_ms=2, calls=20, failures=15),
        Breaker("failed.example:8000", BreakerState.CLOSED, calls=4, failures=1),
        Breaker("well.example", BreakerState.CLOSED),
    ),
    own_priorities={"report": Priority.LOW, "other": Priority.HIGH},
)


def families(scope: str) -> Iterator[Metric]:
    """All that is exported, by whose it is."""
    if scope == "platform":
        settings = Settings()
        for part in (metrics._jobs, metrics._planner, metrics._limits):
            yield from part(FIGURES)
        yield from metrics._hosts(FIGURES.breakers)
        yield from metrics._processes(FIGURES, settings)
    elif scope == "process":
        yield from ProcessCollector("worker", [Pulse("release")], live=lambda: True, ready=lambda: True).collect()
    elif scope == "worker":
        yield from worker_metrics(slots=1, running=1, unrecorded=0)
    elif scope == "api":
        for collector in Requests().collectors:
            for family in collector.collect():
                family._labelnames = collector._labelnames  # type: ignore[attr-defined]
                yield family
    elif scope == "beat":
        yield from beat_metrics(leads=True)
        yield from tick_seconds().collect()
    else:
        yield from PlatformCollector(lambda: None, Settings()).collect()
        yield metrics._gauge("figures_read_seconds", "", 0)


def value(name: str, **labels: str) -> float:
    (found,) = [
        sample.value for family in families("platform") for sample in family.samples if sample.name == name and sample.labels == labels
    ]
    return float(found)


def test_the_document_has_all_and_no_others() -> None:
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(taskplatform_\w+)` \| (\w+) \| ([^|]*) \| (\w+) \|", text, re.MULTILINE)
    exported = sorted(
        (
            family.name + ("_total" if family.type == "counter" else ""),
            family.type,
            ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ())),
            scope,
        )
        for scope in SCOPES
        for family in families(scope)
    )
    assert sorted(rows) == exported


def test_names_are_in_base_units_and_say_what_they_are() -> None:
    for scope in SCOPES:
        for family in families(scope):
            assert re.fullmatch(r"taskplatform_[a-z_]+", family.name)
            assert not re.search(r"_(ms|millis|minutes|percent|total|count|sum|bucket)(_|$)", family.name)
            assert re.fullmatch(r"[A-Z].+\.|", family.documentation), family.name
            assert family.type != "histogram" or family.name.endswith("_seconds")


def test_what_the_figures_become() -> None:
    assert value("taskplatform_oldest_waiting_seconds", priority="low") == 9
    # it is paused; and it is not due yet
    assert value("taskplatform_oldest_waiting_seconds", priority="high") == 0
    assert value("taskplatform_oldest_waiting_seconds", priority="medium") == 0
    assert value("taskplatform_planner_lag_seconds") == 1.5
    assert value("taskplatform_planner_tick_age_seconds") == 0.5
    assert value("taskplatform_planner_failing") == 1
    assert value("taskplatform_occurrences_skipped_total", reason="missed") == 2
    assert value("taskplatform_occurrences_skipped_total", reason="definition_paused") == 0
    # jobs of a definition that was removed run on
    assert value("taskplatform_jobs_in_flight") == 6
    assert value("taskplatform_run_seconds_bucket", definition="report", le="0.01") == 1
    assert value("taskplatform_run_seconds_bucket", definition="report", le="1800") == 3
    assert value("taskplatform_run_seconds_bucket", definition="report", le="+Inf") == 4
    assert value("taskplatform_run_seconds_count", definition="report") == 4
    assert value("taskplatform_run_seconds_sum", definition="report") == 12.345
    # 12 tokens of which a start costs one, as many as fit
    assert 0.7 < value("taskplatform_limit_utilization_ratio", limit="total", kind="rate") < 0.8
    assert value("taskplatform_limit_utilization_ratio", limit="user", kind="concurrency") == 0.75


def test_what_can_be_counted_is_there_before_it_happens() -> None:
    """Else Prometheus would see no increase when it happens first."""
    assert value("taskplatform_retries_total", definition="other", priority="high") == 0
    assert value("taskplatform_jobs_ended_total", definition="other", priority="high", state="failed") == 0
    # what was counted stays
    assert value("taskplatform_retries_total", definition="report", priority="low") == 2
    assert value("taskplatform_jobs_ended_total", definition="report", priority="low", state="completed") == 9
    assert value("taskplatform_timeouts_total", definition="report") == 3
    assert value("taskplatform_events_total", event="dead_letters") == 1
    assert value("taskplatform_events_total", event="workers_lost") == 0


def test_the_events_are_those_that_scripts_count() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "taskplatform/store/lua").glob("*.lua"))
    python = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "taskplatform").rglob("*.py"))
    counted = {name for call in re.findall(r"\bcount\(([^\n)]*)", scripts) for name in re.findall(r"'([a-z]+(?:_[a-z]+)*)'", call)}
    counted -= {"open"}  # what `hold_host` compares with
    counted |= set(re.findall(r"store\.count\(\"(\w+)\"\)", python))
    assert counted == set(metrics.EVENTS)


def test_the_state_of_a_host_is_one_of_all() -> None:
    states = {state: value("taskplatform_breaker_state", host="open.example", state=state) for state in BreakerState}
    assert states == {"open": 1, "closed": 0, "held": 0, "half_open": 0}
    assert value("taskplatform_breaker_state", host="failed.example:8000", state="closed") == 1
    assert value("taskplatform_host_failure_ratio", host="failed.example:8000") == 0.25
    assert [value("taskplatform_hosts_held", state=state) for state in ("open", "held", "half_open")] == [1, 0, 0]
    # there may be as many as definitions
    assert not any(sample.labels.get("host") == "well.example" for family in families("platform") for sample in family.samples)


def test_a_worker_that_was_started_anew_is_one() -> None:
    assert value("taskplatform_workers") == 1
    assert value("taskplatform_worker_running", worker="worker@a") == 1
    assert value("taskplatform_worker_heartbeat_age_seconds", worker="worker@a") == 1
    assert value("taskplatform_slots", priority="low") == 3
    assert value("taskplatform_slots", priority="medium") == 0


def test_beats_that_died_do_not_lead() -> None:
    assert value("taskplatform_beats") == 2
    assert value("taskplatform_leaders") == 1


def test_no_series_is_given_twice() -> None:
    for scope in SCOPES:
        series = [(sample.name, *sorted(sample.labels.items())) for family in families(scope) for sample in family.samples]
        assert len(series) == len(set(series))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_many_scrapes_at_once_read_once() -> None:
    calls: list[float] = []
    go = threading.Event()

    def read() -> int:
        calls.append(time.monotonic())
        go.wait(60)
        return len(calls)

    recent = Recent(read, keep=600, wait=60)
    found: list[int | None] = []
    threads = [threading.Thread(target=lambda: found.append(recent.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert found == [1] * 8
    assert recent.get() == 1


def test_what_was_read_is_kept_for_a_time_only() -> None:
    calls: list[int] = []
    recent = Recent(lambda: calls.append(1) or len(calls), keep=0, wait=60)  # type: ignore[func-returns-value]
    assert [recent.get() for _ in range(3)] == [1, 2, 3]


def test_a_scrape_does_not_wait_for_a_redis_that_does_not_answer() -> None:
    hangs = threading.Event()
    recent = Recent(lambda: hangs.wait(30), keep=0, wait=0.05)
    assert recent.get() is None
    # nor does another one ask it a second time
    before = threading.active_count()
    assert recent.get() is None
    assert threading.active_count() == before
    hangs.set()


@pytest.mark.parametrize("fault", [StoreUnavailable("Redis cannot be reached"), ValueError("not foreseen")])
def test_what_cannot_be_read_is_none_and_no_old_value(fault: Exception) -> None:
    answers: list[int | Exception] = [1, fault, 2]

    def read() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    recent = Recent(read, keep=0)
    assert [recent.get() for _ in range(3)] == [1, None, 2]


def test_the_settings_decide_who_lives() -> None:
    families = list(metrics._processes(FIGURES, Settings(heartbeat_timeout=timedelta(minutes=2))))
    assert [family.samples[0].value for family in families if family.name == "taskplatform_workers"] == [2]
