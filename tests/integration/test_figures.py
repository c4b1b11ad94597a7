"""What metrics are made of, on a real server: each start and each end is counted once, and nothing is left of what was removed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis

from taskplatform.metrics import PlatformCollector
from taskplatform.model import BreakerRule, CallReport, JobState, Limit, Priority
from taskplatform.planner import Planner, published
from taskplatform.settings import Settings
from taskplatform.store import BOUNDS_MS, Enqueue, Figures, Store
from taskplatform.store.keys import key
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, define, enqueue, offer, publish, recover, subscribe

S = JobState
SECOND = timedelta(seconds=1)
HIGH, MEDIUM, LOW = Priority


@pytest.fixture
def ready(store: Store) -> Store:
    """With two definitions and a worker."""
    publish(store, define("report", priority="medium"), define("sync", priority="low"))
    store.create_users(["u1", "u2"], actor=ACTOR)
    offer(store)
    return store


def start(store: Store, job_id: str, worker: str = "w1") -> None:
    assert store.start(job_id, delivery=store.job(job_id).delivery, worker=worker).go


def finish(store: Store, job_id: str, state: JobState, worker: str = "w1", *, late: bool = False) -> None:
    delivery = store.job(job_id).delivery
    assert store.finish(job_id, delivery=delivery, worker=worker, state=state, reason="as it went", retry_in=SECOND, late=late)


def spans(store: Store) -> Iterator[tuple[str, int, int, int]]:
    """Of what was counted, whose it is, how many, in all (ms), and the first bound that has all of them."""
    figures = store.figures()
    named = {**{str(priority): one for priority, one in figures.lags.items()}, **{name: one.runs for name, one in figures.counts.items()}}
    for name, one in named.items():
        if one.total:
            yield (
                name,
                one.total,
                one.sum_ms,
                next((bound for bound, upto in zip(BOUNDS_MS, one.upto, strict=True) if upto == one.total), -1),
            )


def test_lag_and_run_time_of_every_attempt(ready: Store, clock: Clock) -> None:
    job_id = enqueue(ready)
    clock.advance(0.2)
    start(ready, job_id)
    clock.advance(3)
    finish(ready, job_id, S.RETRYING, late=True)
    assert list(spans(ready)) == [("medium", 1, 200, 250), ("report", 1, 3000, 5000)]
    clock.advance(1)
    ready.release()
    start(ready, job_id)
    clock.advance(4000)
    finish(ready, job_id, S.COMPLETED)
    # 4000 s are more than the last bound
    assert list(spans(ready)) == [("medium", 2, 200, 250), ("report", 2, 4_003_000, -1)]
    counts = ready.figures().counts["report"]
    assert counts.ended == {(MEDIUM, S.COMPLETED): 1}
    assert counts.retried == {MEDIUM: 1}
    assert (counts.late, counts.lost) == (1, 0)
    # the last time limit of a job counts too, what else failed does not
    for state in (S.TIMED_OUT, S.FAILED):
        other = enqueue(ready, name=state)
        start(ready, other)
        finish(ready, other, state)
    counts = ready.figures().counts["report"]
    assert counts.ended == {(MEDIUM, S.COMPLETED): 1, (MEDIUM, S.TIMED_OUT): 1, (MEDIUM, S.FAILED): 1}
    assert (counts.late, counts.runs.total) == (2, 4)


def test_a_repeated_or_late_end_counts_once(ready: Store, clock: Clock) -> None:
    job_id = enqueue(ready)
    start(ready, job_id)
    for _ in range(3):
        finish(ready, job_id, S.COMPLETED)
    assert not ready.finish(job_id, delivery=1, worker="other", state=S.FAILED, reason="late")
    assert ready.figures().counts["report"].ended == {(MEDIUM, S.COMPLETED): 1}
    assert ready.figures().counts["report"].runs.total == 1


def test_losses_have_no_run_time(ready: Store, clock: Clock) -> None:
    job_id = enqueue(ready)
    start(ready, job_id)
    clock.advance(60)
    assert recover(ready, 5 * SECOND, max_losses=1)
    counts = ready.figures().counts["report"]
    assert (counts.lost, counts.runs.total, counts.ended) == (1, 0, {(MEDIUM, S.FAILED): 1})
    assert ready.figures().dead_letters == 1


def test_ends_by_the_priority_that_the_job_has(ready: Store) -> None:
    for name, priority in (("a", HIGH), ("b", None), ("c", LOW)):
        ready.enqueue([Enqueue(f"report:u1:{name}", priority=priority)])
    ready.cancel("report:u1:a", reason="by hand")
    ready.cancel("report:u1:c", reason="by hand")
    assert ready.figures().counts["report"].ended == {(HIGH, S.CANCELED): 1, (LOW, S.CANCELED): 1}


def test_what_waits_is_due_and_runs(ready: Store, clock: Clock) -> None:
    ready.set_limit("definition:sync", Limit(concurrency=1), actor=ACTOR)
    for number in range(3):
        ready.enqueue([Enqueue(f"sync:u1:n{number}")])
    ready.enqueue([Enqueue("report:u1:later", delay_ms=60_000)])
    ready.pause_definition("report", why="by hand", actor=ACTOR)
    start(ready, "sync:u1:n0")
    clock.advance(7)
    figures = ready.figures()
    assert figures.waiting == {("sync", LOW): 2, ("report", MEDIUM): 1}
    assert figures.due == {("sync", LOW): 2}
    assert figures.running == {"sync": 1}
    assert figures.now_ms - figures.oldest_ms["sync", LOW] == 7000
    assert figures.oldest_ms["report", MEDIUM] - figures.now_ms == 53_000
    assert figures.paused == {"report"}
    assert figures.held_by["definition:sync"] == 2
    assert [(one.name, one.in_flight) for one in figures.limits] == [("definition:sync", 1)]


def test_with_fairness_the_first_in_turn_counts(ready: Store, clock: Clock) -> None:
    ready.set_options(fairness=True, share=0)
    ready.set_limit("definition:sync", Limit(concurrency=1), actor=ACTOR)
    for number in range(4):
        ready.enqueue([Enqueue(f"sync:u1:n{number}")])
        clock.advance(1)
    start(ready, "sync:u1:n0")
    figures = ready.figures()
    assert figures.waiting == figures.due == {("sync", LOW): 3}
    assert figures.now_ms - figures.oldest_ms["sync", LOW] == 3000


def test_what_a_host_or_the_whole_holds_back(ready: Store, client: redis.Redis) -> None:
    fetch = define("fetch", config={"endpoint": "https://api.example.com/"}, call=None, priority="high")
    ready.publish(published(fetch, {}), actor=ACTOR)
    ready.set_limit("host:api.example.com", Limit(concurrency=1), actor=ACTOR)
    ready.set_limit("user:u1", Limit(concurrency=100), actor=ACTOR)
    for number in range(3):
        ready.enqueue([Enqueue(f"fetch:u1:n{number}")])
    assert ready.figures().held_by["host:api.example.com"] == 2
    ready.set_limit("total", Limit(0.001, 1), actor=ACTOR)
    for number in range(4):
        ready.enqueue([Enqueue(f"report:u1:n{number}")])
    held = ready.figures().held_by
    assert (held["host:api.example.com"], held["total"]) == (2, 4 - len(client.lrange("medium", 0, -1)))
    # those of single users are not among them
    assert {one.name for one in ready.figures().limits} == {"total", "host:api.example.com"}


def test_hosts_that_fail_or_are_held_back(ready: Store) -> None:
    hosts = ("failing.example.com", "well.example.com")
    for host in hosts:
        fetch = define(host.partition(".")[0], config={"endpoint": f"https://{host}/"}, call=None)
        ready.publish(published(fetch, {}), actor=ACTOR)
    rule = BreakerRule(0.5, 4, timedelta(minutes=1), timedelta(seconds=30))

    numbers = itertools.count()

    def call(host: str, *, failed: bool) -> None:
        job_id = enqueue(ready, host.partition(".")[0], name=f"n{next(numbers)}")
        start(ready, job_id)
        report = CallReport(host, failed, rule)
        state = S.FAILED if failed else S.COMPLETED
        delivery = ready.job(job_id).delivery
        assert ready.finish(job_id, delivery=delivery, worker="w1", state=state, reason="as it went", call=report)

    def exported(name: str) -> dict[tuple[str, ...], float]:
        families = PlatformCollector(lambda: ready, Settings(), keep=0).collect()
        return {
            tuple(one.labels.values()): one.value for family in families for one in family.samples if one.name == f"taskplatform_{name}"
        }

    call("well.example.com", failed=False)
    assert exported("breaker_state") == exported("host_failure_ratio") == {}
    for failed in (True, True, False):
        call("failing.example.com", failed=failed)
    assert exported("host_failure_ratio") == {("failing.example.com",): 0.667}
    assert exported("breaker_state")["failing.example.com", "closed"] == 1
    call("failing.example.com", failed=True)
    assert exported("breaker_state")["failing.example.com", "open"] == 1
    assert exported("hosts_held") == {("open",): 1, ("held",): 0, ("half_open",): 0}
    assert exported("events_total")["breaker_opened",] == 1
    # one that nobody's definition calls
    ready.hold_host("other.example.com", span=timedelta(minutes=1), why="maintenance", actor=ACTOR)
    assert {host for host, _ in exported("breaker_state")} == {"failing.example.com", "other.example.com"}
    ready.free_host("failing.example.com", actor=ACTOR)
    assert {host for host, _ in exported("breaker_state")} == {"other.example.com"}


def test_skipped_occurrences_by_reason(ready: Store, clock: Clock) -> None:
    definition = define("hourly", interval={"type": "hourly"}, window="10s")
    planner = Planner(ready, {"hourly": definition}, horizon=HORIZON, batch=10)
    planner.lead()
    subscribe(ready, "u1", "hourly")
    ready.pause_definition("hourly", why="by hand", actor=ACTOR)
    clock.advance(3600)
    planner.advance()
    planner_says = ready.planner()
    assert planner_says["skipped_paused"] == "1"
    ready.resume_definition("hourly", actor=ACTOR)
    # the last of five is caught up, as `latest` has it
    clock.advance(5 * 3600 + 1800)
    planner.advance()
    assert int(ready.planner()["skipped_missed"]) - int(planner_says.get("skipped_missed", 0)) == 4


def test_nothing_is_left_of_a_definition_that_was_removed(ready: Store, client: redis.Redis) -> None:
    runs, waits = enqueue(ready, name="runs"), enqueue(ready, name="waits", delay_ms=60_000)
    start(ready, runs)
    ready.cancel(waits, reason="by hand")
    assert client.exists(key("tp", "stats", "report"))
    ready.retract("report", actor=ACTOR)
    assert not client.exists(key("tp", "stats", "report"))
    # what still ends brings nothing back
    finish(ready, runs, S.COMPLETED)
    assert not client.exists(key("tp", "stats", "report"))
    assert "report" not in ready.figures().counts


def test_buckets_of_another_release_are_counted(ready: Store, client: redis.Redis) -> None:
    client.hset(key("tp", "stats", "report"), mapping={"high|completed|75": 1, "low|failed|75": 1, "low|failed|99999999": 1, "ms": 5})
    runs = ready.figures().counts["report"].runs
    assert (runs.total, runs.sum_ms) == (3, 5)
    assert dict(zip(BOUNDS_MS, runs.upto, strict=True))[100] == 2
    assert runs.upto[-1] == 2


def test_an_empty_database_has_figures(store: Store) -> None:
    figures = store.figures()
    assert isinstance(figures, Figures)
    assert (figures.waiting, figures.workers, figures.definitions, figures.oldest_due_ms) == ({}, (), (), None)
    assert len(list(PlatformCollector(lambda: store, Settings()).collect())) > 30


# --- counters that go back -------------------------------------------------------------------------------------------


def samples(collector: PlatformCollector) -> dict[tuple[Any, ...], float]:
    return {(sample.name, *sample.labels.values()): sample.value for family in collector.collect() for sample in family.samples}


def test_a_server_that_lost_its_last_second_does_not_set_counters_back(ready: Store, client: redis.Redis) -> None:
    collector = PlatformCollector(lambda: ready, Settings(), keep=0)
    name = ("taskplatform_job_states_total", "completed")

    def after(count: int) -> float:
        client.hset(key("tp", "counts"), "completed", count)
        return samples(collector)[name]

    assert [after(1000), after(995), after(999), after(1001), after(1002)] == [1000, 1000, 1000, 1001, 1002]
    # another database is another counter
    assert [after(3), after(2), after(3), after(4)] == [3, 2, 3, 4]


def test_a_scrape_asks_redis_once_a_second_and_otherwise_never(ready: Store, client: redis.Redis) -> None:
    def commands() -> int:
        return sum(one["calls"] for name, one in client.info("commandstats").items() if name in ("cmdstat_hgetall", "cmdstat_zrange"))

    collector = PlatformCollector(lambda: ready, Settings(), keep=60)
    before = commands()
    time.sleep(0.05)
    assert commands() == before
    samples(collector)
    once = commands()
    assert once > before
    for _ in range(5):
        samples(collector)
    assert commands() == once
