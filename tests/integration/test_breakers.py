"""Hosts that fail or ask for a pause: counting, opening, probing, and what the jobs of such a host do meanwhile.

That release keeps to its rules with hosts that are held back, whatever else happens, is in test_release_model.py.
"""

# mypy: disable-error-code="func-returns-value"
# (what happens to a probe is one expression, also where it is made of several calls)

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import cast

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskplatform.local import EmbeddedServer, find_port
from taskplatform.model import BREAKER_LONGEST_PAUSE, BREAKER_PROBES, BREAKER_TURN_MS, BreakerRule, CallReport, JobState, Limit, Priority
from taskplatform.planner import Planner, published
from taskplatform.recovery import Ending, Endings, RecoveryLoop
from taskplatform.settings import Settings
from taskplatform.store import Breaker, BreakerState, Enqueue, Renewal, Start, Store
from taskplatform.store.keys import key
from tests.conftest import ROOT, Clock
from tests.integration.harness import (
    ACTOR,
    HORIZON,
    NAMESPACE,
    Message,
    arrive,
    assert_consistent,
    assert_idle,
    define,
    full,
    offer,
    publish,
    queue,
    recover,
    subscribe,
    take,
)

S = JobState
MINUTE = timedelta(minutes=1)
RULE = BreakerRule(share=0.5, calls=4, window=MINUTE, pause=timedelta(seconds=30))
OFF = replace(RULE, calls=0)
HOST = "api.example.com"


@dataclass
class World:
    """A host that two definitions call, one that calls another, and a worker's hands."""

    client: redis.Redis
    store: Store
    clock: Clock
    made: int = 0

    def submit(self, definition: str = "calling", count: int = 1) -> list[str]:
        ids = [f"{definition}:ann:m{self.made + number:03}" for number in range(count)]
        self.made += count
        self.store.enqueue([Enqueue(job_id) for job_id in ids])
        return ids

    def start(self, message: Message, worker: str = "w1") -> Start:
        return self.store.start(message.job_id, delivery=message.delivery, worker=worker)

    def run(self, definition: str = "calling") -> Message:
        """A new job that runs."""
        self.submit(definition)
        return self.begin()

    def begin(self, worker: str = "w1") -> Message:
        """The next message, as a run."""
        message = take(self.client)
        assert self.start(message, worker).go
        return message

    def end(
        self,
        message: Message,
        *,
        failed: bool = False,
        pause_seconds: float = 0,
        rule: BreakerRule = RULE,
        worker: str = "w1",
        host: str = "",
    ) -> bool:
        state = S.RETRYING if failed else S.COMPLETED
        host = host or cast("str", self.client.hget(key(NAMESPACE, "definition", message.job_id.split(":")[0]), "host") or "")
        report = CallReport(host, failed, rule, timedelta(seconds=pause_seconds))
        hour = timedelta(hours=1)
        told = {"reason": "HTTP 500" if failed else "HTTP 200", "retry_in": hour, "call": report}
        return self.store.finish(message.job_id, delivery=message.delivery, worker=worker, state=state, **told)  # type: ignore[arg-type]

    def open(self) -> None:
        """Let the breaker open."""
        runs = [self.run() for _ in range(RULE.calls)]
        for message in runs:
            self.end(message, failed=True)
        assert self.breaker.state is BreakerState.OPEN

    @property
    def breaker(self) -> Breaker:
        return next(one for one in self.store.breakers() if one.host == HOST)

    @property
    def released(self) -> list[str]:
        return [message.job_id for priority in Priority for message in queue(self.client, priority)]


@pytest.fixture
def world(client: redis.Redis, store: Store, clock: Clock) -> World:
    for name, host, priority in (("calling", HOST, "medium"), ("urgent", HOST, "high"), ("other", "other", "low")):
        store.publish(replace(published(define(name, priority=priority)), host=host), actor=ACTOR)
    publish(store, define("local"))
    store.create_user("ann", actor=ACTOR)
    offer(store, slots=1000)
    return World(client, store, clock)


# --- counting --------------------------------------------------------------------------------------------------------


def test_it_opens_on_a_share_of_failures_over_enough_calls(world: World) -> None:
    runs = [world.run() for _ in range(8)]
    for message in runs[:3]:
        world.end(message, failed=True)
    assert (world.breaker.state, world.breaker.calls, world.breaker.failures) == (BreakerState.CLOSED, 3, 3)
    for message in runs[3:7]:
        world.end(message)
    # 4 of 8 is the share
    world.end(runs[7], failed=True)
    breaker = world.breaker
    assert (breaker.state, breaker.calls, breaker.failures, breaker.openings) == (BreakerState.OPEN, 8, 4, 1)
    assert breaker.until_ms == world.clock.now_ms + 30_000
    assert breaker.reason == "4 of 8 calls failed, the last: HTTP 500"
    assert world.store.counters()["breaker_opened"] == 1


def test_a_host_in_good_health_leaves_no_trace(world: World) -> None:
    for _ in range(RULE.calls):
        world.end(world.run())
    assert world.client.keys(key(NAMESPACE, "calls", "*")) == []
    assert world.client.exists(key(NAMESPACE, "breakers")) == 0


def test_what_is_counted_is_forgotten(world: World) -> None:
    world.end(world.run(), failed=True)
    assert 0 < world.client.pttl(key(NAMESPACE, "calls", HOST)) <= 60_000


def test_without_a_rule_nothing_opens(world: World) -> None:
    for _ in range(20):
        world.end(world.run(), failed=True, rule=OFF)
    assert world.breaker == Breaker(HOST, BreakerState.CLOSED)


def test_functions_and_calls_without_a_verdict_do_not_count(world: World) -> None:
    for definition in ("local", "calling"):
        message = world.run(definition)
        world.store.finish(message.job_id, delivery=message.delivery, worker="w1", state=S.FAILED, reason="it went wrong")
    for _ in range(RULE.calls):
        world.end(world.run("local"), failed=True)
    assert [one.failures for one in world.store.breakers()] == [0, 0]


@dataclass
class Counted:
    """The calls of a host, each with when it ended; and the window by the clock, in halves."""

    ended: list[tuple[int, bool]]

    def window(self, now_ms: int) -> tuple[int, int]:
        """(calls, failures) of this half minute and the one before, from the first failure on that is not followed by a clean window."""
        counted: list[tuple[int, bool]] = []
        for at_ms, failed in self.ended:
            counted = [one for one in counted if at_ms // 30_000 - one[0] // 30_000 <= 1]
            if failed or any(bad for _, bad in counted):
                counted.append((at_ms, failed))
        inside = [failed for at_ms, failed in counted if now_ms // 30_000 - at_ms // 30_000 <= 1]
        return len(inside), sum(inside)


@settings(deadline=None, database=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(calls=st.lists(st.tuples(st.sampled_from([0, 1, 5_000, 14_000, 31_000, 95_000]), st.booleans()), max_size=25))
def test_counting_against_a_list_of_all_calls(client: redis.Redis, store: Store, clock: Clock, calls: list[tuple[int, bool]]) -> None:
    client.flushall()
    store.publish(replace(published(define("calling")), host=HOST), actor=ACTOR)
    store.create_user("ann", actor=ACTOR)
    world, judge = World(client, store, clock), Counted([])
    for wait_ms, failed in calls:
        clock.now_ms += wait_ms
        if wait_ms >= 60_000:
            client.delete(key(NAMESPACE, "calls", HOST))  # the server's own clock forgets it, which the test's does not move
        offer(store, slots=1000)
        world.end(world.run(), failed=failed)
        judge.ended.append((clock.now_ms, failed))
        count, failures = judge.window(clock.now_ms)
        breaker = world.breaker
        if failed and count >= RULE.calls and failures >= RULE.share * count:
            assert (breaker.state, breaker.calls, breaker.failures) == (BreakerState.OPEN, count, failures)
            return
        assert breaker.state is BreakerState.CLOSED
        assert failures == 0 or (breaker.calls, breaker.failures) == (count, failures)


# --- held back -------------------------------------------------------------------------------------------------------


def test_jobs_of_the_host_wait_and_nobody_elses(world: World) -> None:
    world.open()
    waiting = world.submit(count=3)
    others = [*world.submit("other", 2), *world.submit("local", 2)]
    assert sorted(world.released) == sorted(others)
    for job_id in waiting:
        job = world.store.job(job_id)
        assert (job.state, job.attempt, job.delivery) == (S.PENDING, 0, 0)
    assert_consistent(world.client, world.store)


def test_what_lies_in_the_queue_is_given_back_when_it_opens(world: World) -> None:
    runs = [world.run() for _ in range(RULE.calls)]
    (job_id,) = world.submit()
    message = take(world.client)
    before = world.store.job(job_id)
    for one in runs:
        world.end(one, failed=True)
    answer = world.start(message)
    assert (answer.go, answer.refusal) == (False, "held")
    job = world.store.job(job_id)
    assert (job.state, job.attempt, job.failures, job.execute_after_ms) == (S.PENDING, 0, 0, before.execute_after_ms)
    assert job.reason == f"given back: its host {HOST} is held back: 4 of 4 calls failed, the last: HTTP 500"
    assert_consistent(world.client, world.store)


def test_a_run_that_was_held_up_before_its_call_does_not_make_it(world: World) -> None:
    runs = [world.run() for _ in range(RULE.calls + 1)]
    for one in runs[1:]:
        world.end(one, failed=True)
    assert world.store.renew(runs[0].job_id, delivery=runs[0].delivery, worker="w1") is Renewal.NEVER
    job = world.store.job(runs[0].job_id)
    assert (job.state, job.failures) == (S.RETRYING, 0)
    assert_consistent(world.client, world.store)


def test_after_the_pause_one_at_a_time_probes_in_strict_priority(world: World) -> None:
    world.open()
    first, second = world.submit(count=2)
    (urgent,) = world.submit("urgent")
    _, wait_ms = world.store.release()
    assert wait_ms == 30_000
    world.clock.now_ms += 30_000
    offer(world.store, slots=1000)
    world.store.release()
    assert world.released == [urgent]
    assert (world.breaker.state, world.breaker.probe) == (BreakerState.HALF_OPEN, urgent)
    assert world.store.job(urgent).reason == "released, to probe its host"
    for _, following in zip(range(BREAKER_PROBES - 1), (first, second), strict=True):
        world.end(world.begin())
        assert world.released == [following]
    later = world.submit(count=3)
    world.end(world.begin())
    assert world.breaker.state is BreakerState.CLOSED
    assert world.released == later
    assert world.store.counters()["breaker_closed"] == 1
    assert_consistent(world.client, world.store)


def test_each_probe_that_fails_doubles_the_pause_up_to_a_cap(world: World) -> None:
    world.open()
    world.submit(count=8)
    spans = []
    for _ in range(7):
        world.clock.now_ms = (world.breaker.until_ms or 0) + BREAKER_TURN_MS
        offer(world.store, slots=1000)
        world.store.release()
        world.end(world.begin(), failed=True)
        assert world.breaker.until_ms is not None
        spans.append((world.breaker.until_ms - world.clock.now_ms) // 1000)
    assert spans == [60, 120, 240, 480, 480, 480, 480]
    assert spans[-1] == 30 * BREAKER_LONGEST_PAUSE


ENDS: dict[str, Callable[[World, Message], object]] = {
    "its worker is lost": lambda world, _: (world.clock.advance(20), recover(world.store, MINUTE / 4))[1:],
    "its process dies": lambda world, one: world.store.lose(
        one.job_id, delivery=one.delivery, worker="w1", what="it died", max_losses=9, backoff=MINUTE
    ),
    "it is a poison pill": lambda world, one: world.store.lose(
        one.job_id, delivery=one.delivery, worker="w1", what="it died", max_losses=1, backoff=MINUTE
    ),
    "its worker stops": lambda world, one: world.store.withdraw("w1", [f"{one.job_id}#{one.delivery}"], also_running=True),
    "its worker leaves": lambda world, _: world.store.leave("w1"),
    "it is canceled": lambda world, one: world.store.cancel(one.job_id, reason="not wanted"),
    "its user is deleted": lambda world, _: world.store.delete_user("ann", actor=ACTOR),
    "its definition is removed": lambda world, _: world.store.retract("calling", actor=ACTOR),
    "its definition calls another host": lambda world, _: world.store.publish(
        replace(published(define("calling", priority="medium")), host="other"), actor=ACTOR
    ),
    "it says nothing of the host": lambda world, one: world.store.finish(
        one.job_id, delivery=one.delivery, worker="w1", state=S.FAILED, reason="no such address"
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_probe_that_comes_to_nothing_makes_room_for_the_next(world: World, how: str) -> None:
    world.open()
    world.submit()
    world.clock.now_ms += 30_000
    offer(world.store, slots=1000)
    world.store.release()
    probe = world.begin()
    world.store.create_user("bob", actor=ACTOR)
    world.store.enqueue([Enqueue("urgent:bob:next", priority=Priority.LOW)])
    assert world.released == []
    ENDS[how](world, probe)
    offer(world.store, slots=1000)
    world.store.release()
    found = world.released
    assert len(found) == 1, "no job, or more than one, probes the host"
    assert world.breaker.probe == found[0]
    assert world.breaker.passed == 0
    assert world.store.start(found[0], delivery=world.store.job(found[0]).delivery, worker="w2").go
    assert_consistent(world.client, world.store, complete=how != "its user is deleted")


def test_a_message_of_a_probe_that_is_lost_makes_room_for_the_next(world: World) -> None:
    world.open()
    world.submit(count=2)
    world.clock.now_ms += 30_000
    offer(world.store, slots=1000)
    world.store.release()
    lost = take(world.client)
    world.clock.now_ms += 20_000
    assert world.store.reclaim(patience=timedelta(seconds=10)) == [lost.job_id]
    again = world.begin()
    assert world.start(lost).refusal == "stale"
    assert world.breaker.probe == again.job_id
    assert_consistent(world.client, world.store)


def test_what_began_before_it_opened_neither_closes_nor_opens_it(world: World) -> None:
    late = [world.run() for _ in range(12)]
    world.clock.now_ms += 1000
    world.open()
    until_ms = world.breaker.until_ms
    for message in late[:4]:
        world.end(message)
    for message in late[4:6]:
        world.end(message, failed=True)
    assert (world.breaker.until_ms, world.breaker.openings, world.breaker.passed) == (until_ms, 1, 0)
    world.submit(count=BREAKER_PROBES)
    world.clock.now_ms += 30_000
    offer(world.store, slots=1000)
    world.store.release()
    for number in range(BREAKER_PROBES):
        probe = world.begin()
        world.end(late[6 + number], failed=True)
        world.end(probe)
    assert world.breaker.state is BreakerState.CLOSED
    world.clock.now_ms += 1000
    for message in late[9:]:
        world.end(message, failed=True)
    assert (world.breaker.state, world.breaker.failures) == (BreakerState.CLOSED, 0)


def test_a_result_that_is_discarded_says_nothing_of_the_host(world: World) -> None:
    runs = [world.run() for _ in range(RULE.calls)]
    for message in runs:
        world.store.cancel(message.job_id, reason="not wanted")
        assert not world.end(message, failed=True)
    assert world.breaker == Breaker(HOST, BreakerState.CLOSED)


def test_a_result_that_is_told_twice_counts_once(world: World) -> None:
    message = world.run()
    assert world.end(message, failed=True)
    assert world.end(message, failed=True)
    assert world.breaker.failures == 1


# --- pauses that a host asks for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, Limit(1000.0, 500), Limit(concurrency=50)])
def test_a_host_that_asks_for_a_pause_gets_it_and_then_one_probe(world: World, limit: Limit | None) -> None:
    if limit is not None:
        world.store.set_limit(f"host:{HOST}", limit, actor=ACTOR)
    world.end(world.run(), failed=True, pause_seconds=2)
    assert (world.breaker.state, world.breaker.openings) == (BreakerState.HELD, 0)
    (state,) = [one for one in world.store.limit_states() if one.name == f"host:{HOST}"]
    assert state.held_until_ms == world.clock.now_ms + 2000
    assert state.limit == (limit or Limit())
    waiting = world.submit(count=4)
    assert world.released == []
    world.clock.now_ms += 1999
    assert world.store.release() == (0, 1)
    world.clock.now_ms += 1
    world.store.release()
    assert world.released == waiting[:1]
    world.end(world.begin())
    assert world.breaker.state is BreakerState.CLOSED
    assert world.released == waiting[1:]
    assert_consistent(world.client, world.store)


def test_a_probe_that_is_asked_for_another_pause_gets_it(world: World) -> None:
    world.end(world.run(), failed=True, pause_seconds=2)
    world.submit(count=2)
    world.clock.now_ms += 2000
    world.store.release()
    world.end(world.begin(), failed=True, pause_seconds=5)
    assert (world.breaker.state, world.breaker.openings) == (BreakerState.HELD, 0)
    assert world.breaker.until_ms == world.clock.now_ms + 5000
    world.clock.now_ms += 5000 + BREAKER_TURN_MS
    world.store.release()
    # another failure is one of the host
    world.end(world.begin(), failed=True)
    assert (world.breaker.state, world.breaker.openings) == (BreakerState.OPEN, 1)
    assert world.breaker.until_ms == world.clock.now_ms + 30_000


def test_the_longest_pause_that_was_asked_for_counts(world: World) -> None:
    runs = [world.run() for _ in range(3)]
    for message, seconds in zip(runs, (5, 9, 2), strict=True):
        world.end(message, failed=True, pause_seconds=seconds)
    assert world.breaker.until_ms == world.clock.now_ms + 9000


def test_a_probe_that_was_released_before_a_longer_pause_does_not_start(world: World) -> None:
    late = world.run()
    world.end(world.run(), failed=True, pause_seconds=2)
    (job_id,) = world.submit()
    world.clock.now_ms += 2000
    world.store.release()
    probe = take(world.client)
    world.end(late, failed=True, pause_seconds=5)
    assert world.start(probe).refusal == "held"
    assert (world.store.job(job_id).attempt, world.breaker.probe) == (0, "")
    world.clock.now_ms += 5000
    world.store.release()
    assert world.start(take(world.client)).go
    assert "breaker_closed" not in world.store.counters()
    assert_consistent(world.client, world.store)


def test_a_pause_is_kept_also_without_breakers(world: World) -> None:
    world.end(world.run(), failed=True, pause_seconds=2, rule=OFF)
    world.submit(count=2)
    assert world.released == []
    world.clock.now_ms += 2000
    world.store.release()
    world.end(world.begin(), rule=OFF)
    assert world.breaker.state is BreakerState.CLOSED
    assert len(world.released) == 1


@pytest.mark.parametrize("by_hand", [True, False])
def test_without_breakers_a_probe_that_fails_lets_nothing_go(world: World, by_hand: bool) -> None:
    if by_hand:
        world.store.hold_host(HOST, span=MINUTE, why="maintenance", actor=ACTOR)
    else:
        world.end(world.run(), failed=True, pause_seconds=60, rule=OFF)
    before = world.breaker
    world.submit(count=3)
    for seconds in (60, 30, 30):
        world.clock.now_ms += seconds * 1000 + BREAKER_TURN_MS
        offer(world.store, slots=1000)
        world.store.release()
        world.end(world.begin(), failed=True, rule=OFF)
        assert (world.breaker.state, world.breaker.openings) == (before.state, before.openings)
        assert world.breaker.until_ms == world.clock.now_ms + 30_000
        assert world.released == []
    assert "breaker_closed" not in world.store.counters()
    assert_consistent(world.client, world.store)


# --- probes that come late, or never ---------------------------------------------------------------------------------


def _half_open(world: World) -> None:
    world.store.hold_host(HOST, span=MINUTE, why="maintenance", actor=ACTOR)
    world.clock.now_ms += 60_000
    offer(world.store, slots=1000)
    assert world.breaker.state is BreakerState.HALF_OPEN


PATIENCE = timedelta(seconds=15)


def _reclaim(world: World, seconds: float = 15, *, clock_set: bool = False) -> None:
    world.clock.advance(seconds)
    offer(world.store, slots=1000)
    world.store.reclaim(patience=PATIENCE, clock_set=clock_set)


@pytest.mark.parametrize("how", ["leaves", "is drained", "is lost", "is busy"])
def test_a_probe_whose_message_nobody_takes_makes_room_for_the_next(world: World, how: str) -> None:
    _half_open(world)
    offer(world.store, "w1", 10, ["high", "medium"])
    offer(world.store, "w2", 10, ["low"])
    world.store.enqueue([Enqueue("calling:ann:low", priority=Priority.LOW)])
    assert world.breaker.probe == "calling:ann:low"
    waiting = world.submit("urgent", 5)
    if how == "leaves":
        world.store.leave("w2")
    elif how == "is drained":
        offer(world.store, "w2", 0, ["low"])
    assert world.released == ["calling:ann:low"]
    world.clock.advance(14.999)
    offer(world.store, "w1", 10, ["high", "medium"])
    if how == "is lost":
        recover(world.store, timedelta(seconds=10))
    world.store.reclaim(patience=PATIENCE)
    assert world.released == ["calling:ann:low"]
    world.clock.advance(0.001)
    world.store.reclaim(patience=PATIENCE)
    assert world.released == [waiting[0], "calling:ann:low"]
    assert world.breaker.probe == waiting[0]
    assert_consistent(world.client, world.store)
    for _ in range(BREAKER_PROBES):
        world.end(world.begin())
    assert world.breaker.state is BreakerState.CLOSED
    assert world.released == [*waiting[BREAKER_PROBES:], "calling:ann:low"]


def test_who_starts_first_probes_and_nobody_beside_it(world: World) -> None:
    _half_open(world)
    (slow,) = world.submit()
    waiting = world.submit("urgent", 2)
    _reclaim(world)
    assert world.released == [waiting[0], slow]
    late = take(world.client, Priority.MEDIUM)
    assert world.start(late).go, "nobody probes the host yet"
    assert world.store.history(slow)[-1].reason == "started, to probe its host"
    assert world.breaker.probe == slow
    assert world.breaker.probed_ms == world.clock.now_ms
    assert world.start(take(world.client)).refusal == "held"
    assert world.released == []
    assert_consistent(world.client, world.store)
    world.end(late)
    assert (world.breaker.passed, world.released) == (1, waiting[:1])


def test_probes_that_always_wait_for_longer_than_anybody_s_patience_come_to_an_end(world: World) -> None:
    _half_open(world)
    ids = world.submit(count=12)
    for _ in range(60):
        _reclaim(world)
        if len(world.released) >= 4 or not world.store.jobs(states=frozenset({S.PENDING})).items:
            one = take(world.client)
            if world.start(one).go:
                world.end(one)
            if not world.store.jobs(states=frozenset({S.PENDING, S.QUEUED})).items:
                break
            if world.breaker.state is BreakerState.CLOSED:
                _half_open(world)
    assert {world.store.job(job_id).state for job_id in ids} == {S.COMPLETED}


def test_a_probe_that_runs_is_waited_for(world: World) -> None:
    _half_open(world)
    world.submit(count=2)
    probe = world.begin()
    for _ in range(10):
        _reclaim(world)
    assert (world.breaker.probe, world.released) == (probe.job_id, [])


@pytest.mark.parametrize("at_start", [True, False])
def test_a_probe_that_a_worker_of_an_older_version_ended_makes_room(world: World, at_start: bool) -> None:
    _half_open(world)
    first, second, *_ = world.submit(count=3)
    probe = world.begin()
    record = cast("str", world.client.hget(key(NAMESPACE, "breakers"), HOST))
    world.store.finish(probe.job_id, delivery=probe.delivery, worker="w1", state=S.COMPLETED, reason="HTTP 200")
    if at_start:
        # its scripts know of no breakers: the record stays as it was
        (message,) = queue(world.client, Priority.MEDIUM)
        world.client.hset(key(NAMESPACE, "breakers"), HOST, record)
        assert world.start(message).go
        assert world.breaker.probe == second
        return
    world.store.cancel(second, reason="not wanted")
    take(world.client)
    take(world.client)
    world.client.hset(key(NAMESPACE, "breakers"), HOST, record)
    assert world.breaker.probe == first
    before = world.store.counters().get("breaker_closed")
    _reclaim(world, 0.001)
    assert world.breaker.probe != first
    assert world.store.counters().get("breaker_closed") == before
    (after,) = world.submit("urgent")
    assert after in [*world.released, world.breaker.probe] or world.breaker.probe


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_a_clock_that_is_set_frees_no_host_and_displaces_no_probe(world: World, seconds: int) -> None:
    _half_open(world)
    _reclaim(world, seconds, clock_set=True)
    assert world.breaker.state is not BreakerState.CLOSED
    _reclaim(world, 61)
    (probe,) = world.submit()
    assert world.released == [probe]
    _reclaim(world, seconds, clock_set=True)
    (urgent,) = world.submit("urgent")
    _reclaim(world, 14)
    assert (world.breaker.probe, world.released) == (probe, [probe])
    _reclaim(world, 1 if seconds > 0 else 61)
    assert urgent in world.released
    assert_consistent(world.client, world.store, clock_set_back=True)


# --- several definitions of one host ---------------------------------------------------------------------------------


def test_a_definition_that_always_fails_does_not_keep_the_host_s_others_from_it(world: World) -> None:
    world.open()
    world.store.publish(replace(published(define("third", priority="low")), host=HOST), actor=ACTOR)
    world.submit("urgent", 40)
    world.submit("calling", 40)
    world.submit("third", 40)
    probed: list[str] = []
    while len(probed) < 9:
        world.clock.now_ms = world.breaker.until_ms or 0
        offer(world.store, slots=1000)
        world.store.release()
        if not world.released:
            # all others have had their turn
            world.clock.now_ms += BREAKER_TURN_MS
            offer(world.store, slots=1000)
            world.store.release()
        (job_id,) = world.released
        probed.append(job_id.split(":")[0])
        world.end(world.begin(), failed=True)
    assert probed == ["urgent", "calling", "third"] * 3
    assert_consistent(world.client, world.store)


def test_while_the_others_do_well_the_one_that_failed_stays_behind(world: World) -> None:
    world.open()
    (urgent,) = world.submit("urgent")
    others = world.submit("calling", 5)
    world.clock.now_ms += 30_000
    offer(world.store, slots=1000)
    world.store.release()
    assert world.released == [urgent]
    world.end(world.begin(), failed=True)
    (urgent,) = world.submit("urgent")
    world.clock.now_ms += 60_000
    offer(world.store, slots=1000)
    world.store.release()
    for number in range(BREAKER_PROBES):
        # each of them is slow
        assert world.released == [others[number]]
        probe = world.begin()
        world.clock.now_ms += 5000
        world.store.release()
        offer(world.store, slots=1000)
        world.end(probe)
    assert world.breaker.state is BreakerState.CLOSED
    assert sorted(world.released) == sorted([urgent, *others[BREAKER_PROBES:]])
    assert_consistent(world.client, world.store)


def test_where_no_other_can_go_the_one_that_failed_goes_again(world: World) -> None:
    world.open()
    waiting = world.submit("urgent", 2)
    world.submit("calling")
    world.store.pause_definition("calling", why="broken", actor=ACTOR)
    for job_id in waiting:
        world.clock.now_ms = (world.breaker.until_ms or 0) + (BREAKER_TURN_MS if job_id == waiting[1] else 0)
        offer(world.store, slots=1000)
        if job_id == waiting[1]:
            world.clock.now_ms -= 1
            assert world.store.release() == (0, 1)
            world.clock.now_ms += 1
        world.store.release()
        assert world.released == [job_id]
        world.end(world.begin(), failed=True)


def test_a_run_that_called_another_host_is_not_charged_to_this_one(world: World) -> None:
    runs = [world.run("other") for _ in range(20)]
    world.store.publish(replace(published(define("other", priority="low")), host=HOST), actor=ACTOR)
    for message in runs:
        world.end(message, failed=True, pause_seconds=5, host="other")
    assert world.breaker == Breaker(HOST, BreakerState.CLOSED)
    # and by a worker that was not deployed yet, a probe says nothing of it
    _half_open(world)
    world.submit("other")
    world.end(world.begin(), failed=True, host="other")
    assert (world.breaker.state, world.breaker.openings, world.breaker.probe) == (BreakerState.HALF_OPEN, 1, "")


# --- while Redis cannot be used --------------------------------------------------------------------------------------


def test_an_end_that_is_recorded_late_says_nothing_of_the_host(world: World) -> None:
    endings = Endings()
    report = CallReport(HOST, True, RULE, MINUTE)
    for _ in range(2 * RULE.calls):
        one = world.run()
        endings.keep(Ending(one.job_id, one.delivery, "w1", S.FAILED, "HTTP 503", None, None, report))
    endings.record(world.store)
    assert world.breaker == Breaker(HOST, BreakerState.CLOSED)
    # a probe makes room, no more
    _half_open(world)
    first, second = world.submit(count=2)
    probe = world.begin()
    endings.keep(Ending(first, probe.delivery, "w1", S.COMPLETED, "HTTP 200", None, None, replace(report, failed=False)))
    endings.record(world.store)
    assert (world.breaker.probe, world.breaker.passed) == (second, 0)


@pytest.mark.parametrize("why", ["its host is held back", "its rate has no token"])
def test_a_run_that_was_held_up_is_given_back_also_when_redis_is_full(world: World, why: str) -> None:
    run = world.run()
    if why == "its host is held back":
        world.store.hold_host(HOST, span=MINUTE, why="maintenance", actor=ACTOR)
    else:
        world.store.set_limit(f"host:{HOST}", Limit(0.1, 1), actor=ACTOR)
        arrive(world.client, world.clock, "another")
    with full(world.client):
        assert world.store.renew(run.job_id, delivery=run.delivery, worker="w1") is Renewal.NEVER
    job = world.store.job(run.job_id)
    assert (job.state, job.failures) == (S.RETRYING, 0)
    assert_consistent(world.client, world.store)


def _in_worker(server: EmbeddedServer, script: str, **chosen: str) -> str:
    """Run a script as a worker's process would, on this server. Returns what it prints."""
    preface = """
    import time
    from datetime import timedelta
    from celery.exceptions import Ignore
    from taskplatform import app
    from taskplatform.http import Outcome, OutcomeKind
    from taskplatform.store import Start
    """
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "API_BASE_URL": "http://127.0.0.1:1", "API_TOKEN": "x"}
    environment |= {f"TASKPLATFORM_{name}": value for name, value in {"REDIS_URL": server.url, **chosen}.items()}
    text = textwrap.dedent(preface) + textwrap.dedent(script)
    ran = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_run_that_cannot_ask_for_its_place_is_no_failed_attempt(world: World, server: EmbeddedServer) -> None:
    world.store.set_limit(f"host:{HOST}", Limit(1000.0, 500), actor=ACTOR)
    message = world.run()
    script = f"""
    run = app._Run({message.job_id!r}, {message.delivery}, "w1", Start(go=True, attempt=1), time.monotonic() - 60)
    store = app.platform().store
    store._redis.replicaof("127.0.0.1", {find_port()})
    try:
        app.PlatformTask()._check_place(run)
    except Ignore:
        print("ignored")
    finally:
        store._redis.replicaof("NO", "ONE")
    """
    assert _in_worker(server, script) == "ignored\n"
    # the worker that has nothing of it gives it up
    loop = RecoveryLoop(
        world.store,
        Settings(),
        worker="w1",
        slots=lambda: 1,
        queues=lambda: ["medium"],
        stop_run=lambda _: None,
        consume=lambda _: None,
        has_run=lambda *_: False,
        limit_of=lambda _: None,
        endings=Endings(),
        info={},
    )
    for _ in range(3):
        loop.care()
    job = world.store.job(message.job_id)
    assert (job.state, job.attempt, job.failures) == (S.RETRYING, 1, 0)
    assert job.reason == "its run ended without a record; again in 1 s"


# --- what a worker says ----------------------------------------------------------------------------------------------


def test_a_target_holds_back_its_host_for_so_long_at_the_most(server: EmbeddedServer) -> None:
    script = """
    for status, seconds in ((429, 3600), (503, 20), (500, 20)):
        outcome = Outcome(OutcomeKind.RETRY, "", status, 5, "", timedelta(seconds=seconds), timed_out=False)
        report = app._report(outcome, "north")
        print(report.host, report.pause.total_seconds(), outcome.retry_after.total_seconds())
    """
    assert _in_worker(server, script) == "north 300.0 3600.0\nnorth 20.0 20.0\nnorth 0.0 20.0\n"
    assert _in_worker(server, script, HTTP_MAX_HOLD="2s") == "north 2.0 3600.0\nnorth 2.0 20.0\nnorth 0.0 20.0\n"
    assert _in_worker(server, script, HTTP_MAX_HOLD="0s") == "north 0.0 3600.0\nnorth 0.0 20.0\nnorth 0.0 20.0\n"


# --- together with the rest ------------------------------------------------------------------------------------------


def test_packed_jobs_that_come_due_wait_too(world: World) -> None:
    definition = define("calling", priority="medium", interval={"type": "minutely"}, window="0s")
    world.store.publish(replace(published(definition), host=HOST), actor=ACTOR)
    for user in ("bob", "cyd"):
        world.store.create_user(user, actor=ACTOR)
        subscribe(world.store, user, "calling")
    world.store.hold_host(HOST, span=10 * MINUTE, why="maintenance", actor=ACTOR)
    planner = Planner(world.store, {"calling": definition}, horizon=HORIZON, batch=50)
    for _ in range(70):
        world.clock.advance(1)
        planner.advance()
        world.store.release()
    waiting = [job for user in ("bob", "cyd") for job in world.store.jobs(user=user).items]
    assert len(waiting) >= 2
    assert {job.state for job in waiting} == {S.PENDING}
    assert {len(world.store.history(job.id)) for job in waiting} == {1}, "they cost nothing while they wait"
    assert world.released == []
    assert_consistent(world.client, world.store)


def test_what_waits_can_be_canceled_paused_and_given_another_priority(world: World) -> None:
    world.store.hold_host(HOST, span=MINUTE, why="maintenance", actor=ACTOR)
    first, second, third = world.submit(count=3)
    world.store.cancel(first, reason="not wanted")
    world.store.prioritize(third, Priority.HIGH, reason="given")
    world.store.pause_definition("urgent", why="broken", actor=ACTOR)
    world.submit("urgent")
    assert_consistent(world.client, world.store)
    world.clock.now_ms += 60_000
    offer(world.store, slots=1000)
    world.store.release()
    assert world.released == [third]
    world.end(world.begin())
    assert world.released == [second]


def test_a_host_is_held_back_and_let_go_by_hand(world: World) -> None:
    world.store.hold_host(HOST, span=MINUTE, why="maintenance", actor="eve")
    waiting = world.submit(count=5)
    assert world.released == []
    assert world.store.breaker_of("calling") == world.breaker
    assert world.store.breaker_of("other") is None
    assert world.store.breaker_of("local") is None
    assert world.store.free_host(HOST, actor="eve")
    assert world.released == waiting
    assert not world.store.free_host(HOST, actor="eve")
    told = [(one.actor, one.kind, one.subject, one.detail) for one in world.store.changes(about=[HOST])]
    assert told == [("eve", "breaker reset", HOST, "maintenance"), ("eve", "breaker opened", HOST, "60 s: maintenance")]
    assert_consistent(world.client, world.store)


def test_a_shorter_time_by_hand_counts(world: World) -> None:
    world.store.hold_host(HOST, span=10 * MINUTE, why="maintenance", actor=ACTOR)
    (job_id,) = world.submit()
    world.store.hold_host(HOST, span=MINUTE, why="nearly done", actor=ACTOR)
    assert world.store.release() == (0, 60_000)
    world.clock.now_ms += 60_000
    offer(world.store, slots=1000)
    world.store.release()
    assert world.released == [job_id]


def test_a_clock_that_is_set_back_makes_no_pause_longer(world: World) -> None:
    world.open()
    (job_id,) = world.submit()
    world.clock.now_ms -= 3_600_000
    assert world.breaker.until_ms == world.clock.now_ms + 30_000
    offer(world.store, slots=1000)
    world.store.reclaim(patience=MINUTE, clock_set=True)
    world.clock.now_ms += 30_000
    offer(world.store, slots=1000)
    world.store.release()
    # the job waits for an instant; another, made now, need not
    assert world.store.job(job_id).state is S.PENDING
    (made,) = world.submit()
    assert world.released == [made]


def test_a_host_that_nobody_calls_is_forgotten_after_an_hour(world: World) -> None:
    world.open()
    world.clock.now_ms += 30_000 + 3_599_999
    world.store.reclaim(patience=MINUTE)
    assert [one.state for one in world.store.breakers() if one.host == HOST] == [BreakerState.HALF_OPEN]
    world.clock.now_ms += 1
    world.store.reclaim(patience=MINUTE)
    assert [one.state for one in world.store.breakers() if one.host == HOST] == [BreakerState.CLOSED]
    assert world.client.exists(key(NAMESPACE, "breakers")) == 0
    assert_consistent(world.client, world.store)


def test_everything_ends(world: World) -> None:
    world.open()
    ids = [*world.submit(count=6), *world.submit("urgent", 6)]
    for _ in range(40):
        world.clock.now_ms += 30_000
        offer(world.store, slots=1000)
        world.store.release()
        while world.released:
            world.end(world.begin())
    assert {world.store.job(job_id).state for job_id in ids} == {S.COMPLETED}
    for job in world.store.jobs(states=frozenset({S.RETRYING})).items:
        world.store.cancel(job.id, reason="test")
    assert_idle(world.client)
