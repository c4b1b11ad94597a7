"""Limits: no window of starts above a rate, no more in flight than a concurrency, changed live, for definitions, hosts, users and all."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import cast

import pytest
import redis

from taskplatform.local import EmbeddedServer
from taskplatform.model import START_SLACK_MS, JobState, Limit, Priority
from taskplatform.planner import published
from taskplatform.store import Enqueue, LimitState, Renewal, Store
from taskplatform.store.keys import key
from tests.conftest import Clock
from tests.integration.harness import (
    ACTOR,
    NAMESPACE,
    Message,
    arrive,
    assert_consistent,
    assert_idle,
    define,
    enqueue,
    offer,
    publish,
    queue,
    take,
)

S = JobState
HIGH, MEDIUM, LOW = Priority


def worst_excess(times_ms: Sequence[int], per_second: float, burst: int) -> float:
    """By how many the fullest window holds more than rate × t + burst; over all windows, by the definition."""
    worst = -math.inf
    for first in range(len(times_ms)):
        for last in range(first, len(times_ms)):
            seconds = (times_ms[last] - times_ms[first]) / 1000
            worst = max(worst, last - first + 1 - (per_second * seconds + burst))
    return worst


def publish_on(store: Store, host: str, *names: str, limit: Limit | None = None, priority: str = "low") -> None:
    """Definitions that call a host."""
    for name in names:
        made = published(define(name, priority=priority))
        store.publish(replace(made, host=host, limit=limit or Limit()), actor=ACTOR)


def submit(store: Store, definition: str, count: int, user: str = "ann") -> list[str]:
    """So many jobs."""
    ids = [f"{definition}:{user}:m{number}" for number in range(count)]
    store.enqueue([Enqueue(job_id) for job_id in ids])
    return ids


def start(store: Store, message: Message) -> str:
    """'run', or why not."""
    answer = store.start(message.job_id, delivery=message.delivery, worker="w1")
    return "run" if answer.go else answer.refusal


def start_all(client: redis.Redis, store: Store) -> list[Message]:
    """Start all that is released, and all that this lets go; those that run."""
    begun: list[Message] = []
    while True:
        try:
            message = take(client)
        except LookupError:
            return begun
        if start(store, message) == "run":
            begun.append(message)


def end(store: Store, message: Message) -> None:
    """Complete a run."""
    assert store.finish(message.job_id, delivery=message.delivery, worker="w1", state=S.COMPLETED, reason="done")


def released(client: redis.Redis) -> list[str]:
    """What lies in the queues."""
    return [message.job_id for priority in Priority for message in queue(client, priority)]


def state_of(store: Store, name: str) -> LimitState:
    """The one limit."""
    return next(state for state in store.limit_states() if state.name == name)


@pytest.fixture(autouse=True)
def users(store: Store) -> None:
    """Some users, and a worker of many slots."""
    store.create_users(["ann", "bob", "cyd"], actor=ACTOR)
    offer(store, slots=1000)


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["definition:limited", "total", "host:api"])
@pytest.mark.parametrize(("per_second", "burst"), [(3.0, 1), (7.0, 4), (100 / 60, 2), (40.0, 10)])
def test_no_window_of_starts_exceeds_the_rate(
    client: redis.Redis, store: Store, clock: Clock, name: str, per_second: float, burst: int
) -> None:
    """Also where what was released is started late, all together."""
    publish_on(store, "api", "limited")
    store.set_limit(name, Limit(per_second, burst), actor=ACTOR)
    submit(store, "limited", 130)
    rng = random.Random(3)
    times: list[int] = []
    held: list[Message] = []
    began = clock.now_ms
    while len(times) < 100:
        _, wait = store.release()
        held += [take(client) for _ in released(client)]
        if rng.random() < 0.7:
            for message in held:
                assert start(store, message) == "run", "it has its token"
                times.append(clock.now_ms)
            held.clear()
            _, wait = store.release()
        # as a timer that wakes exactly, a little late, or after a rest in which the bucket fills up
        clock.now_ms += max(1, (wait or 0) + rng.choice([0, 0, 0, 1, 7, 130, 700]))
    assert worst_excess(times, per_second, burst) <= 1e-6
    assert len(times) >= 0.3 * per_second * (clock.now_ms - began) / 1000, "the rate is used"
    assert_consistent(client, store)


def test_calls_that_come_late_keep_to_the_rate(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A call may follow its start after up to 100 ms: so much of the burst is kept back."""
    publish(store, define("limited", rate_limit={"rate": "50/s", "burst": 20}))
    submit(store, "limited", 400)
    rng = random.Random(8)
    calls: list[int] = []
    store.release()
    while len(calls) < 350:
        calls += [clock.now_ms + rng.choice([0, START_SLACK_MS]) for _ in start_all(client, store)]
        clock.now_ms += rng.choice([1, 20, 50, 400])
        store.release()
    assert worst_excess(sorted(calls), 50.0, 20) <= 1e-6


def test_a_long_run_at_an_odd_rate_stays_below_the_limit(client: redis.Redis, store: Store, clock: Clock) -> None:
    """No sum of roundings goes beyond it."""
    publish(store, define("limited", rate_limit={"rate": "7/s", "burst": 50}))
    submit(store, "limited", 600)
    began, total = clock.now_ms, 0
    store.release()
    while total < 550:
        total += len(start_all(client, store))
        assert total <= 7 * (clock.now_ms - began) / 1000 + 50
        clock.advance(0.937)
        store.release()


def test_what_is_released_and_stalls_takes_its_token_only_once(client: redis.Redis, store: Store, clock: Clock) -> None:
    """However long it lies: the reserved tokens are not given to others, and do not pile up beside the bucket."""
    store.set_limit("total", Limit(1.0, 3), actor=ACTOR)
    publish(store, define("limited"))
    submit(store, "limited", 10)
    assert len(released(client)) == 2, "3, without what comes in 100 ms, are 2 whole tokens"
    clock.advance(3600)
    assert store.release() == (0, 100), "all of the bucket is reserved: only a start brings more, which release looks for"
    assert state_of(store, "total").reserved == 2
    begun = start_all(client, store)
    assert len(begun) == 2
    clock.advance(1)
    store.release()
    assert len(start_all(client, store)) == 1
    assert_consistent(client, store)


def test_a_limited_definition_holds_back_nobody_else(client: redis.Redis, store: Store, clock: Clock) -> None:
    publish(store, define("limited", priority="high", rate_limit="1/m"), define("free", priority="high"), define("low_one", priority="low"))
    limited, free = submit(store, "limited", 5), submit(store, "free", 5)
    low = enqueue(store, "low_one", "ann")
    assert released(client) == [limited[0], *free, low]
    start_all(client, store)
    # a burst of 1 leaves nothing for a call that comes late after its start: the next start is later by so much
    assert store.release() == (0, 60_100)
    assert_consistent(client, store)
    clock.advance(60.099)
    assert store.release() == (0, 1)
    clock.advance(0.001)
    assert store.release()[0] == 1
    assert released(client) == [limited[1]]


def test_a_job_takes_all_tokens_or_none(client: redis.Redis, store: Store, clock: Clock) -> None:
    """What the one limit holds back uses up nothing of the other."""
    publish(store, define("limited", rate_limit="1/m"), define("free"))
    store.set_limit("total", Limit(1, 2, None), actor=ACTOR)
    enqueue(store, "limited", "ann", "m1")
    assert [message.job_id for message in start_all(client, store)] == ["limited:ann:m1"]
    clock.advance(1)
    enqueue(store, "limited", "ann", "m2")
    free = enqueue(store, "free", "ann", "m1")
    # the second limited one came before, and its own limit let the token of all go to the free one
    assert released(client) == [free]
    assert state_of(store, "definition:limited").reserved == 0


def test_what_never_starts_gives_its_token_back(client: redis.Redis, store: Store, clock: Clock) -> None:
    publish(store, define("limited", rate_limit="1/h"))
    first, second, third = submit(store, "limited", 3)
    assert released(client) == [first]
    store.cancel(first, reason="not wanted")
    assert released(client) == [first, second]
    take(client)
    take(client)
    clock.advance(60)
    assert store.reclaim(patience=timedelta(seconds=5)) == [second]
    assert released(client) == [second]
    assert start(store, take(client)) == "run"
    assert store.release() == (0, 3_600_100)
    assert store.job(third).state is S.PENDING
    assert_consistent(client, store)


@pytest.mark.parametrize("name", ["definition:limited", "host:api", "total"])
def test_a_limit_lets_go_on_when_the_clock_is_set_back(client: redis.Redis, store: Store, clock: Clock, name: str) -> None:
    """By an hour: what waits for a time of the old clock looks again at the guardian's next round."""
    publish_on(store, "api", "limited")
    store.set_limit(name, Limit(1.0, 1), actor=ACTOR)
    ids = submit(store, "limited", 3)
    assert len(start_all(client, store)) == 1
    clock.advance(-3600)
    # those who wait since the old clock have times that come again in an hour
    later = enqueue(store, "limited", "bob", "now")
    store.reclaim(patience=timedelta(seconds=5))
    store.release()
    clock.advance(1.1)
    store.release()
    assert released(client) == [later]
    assert store.job(ids[1]).state is S.PENDING
    assert_consistent(client, store, clock_set_back=True)


# --- another server --------------------------------------------------------------------------------------------------


def test_on_another_server_the_buckets_are_empty_and_what_was_released_is_given_back(
    client: redis.Redis, store: Store, clock: Clock
) -> None:
    """It may not know the last starts. Nothing counts as another server but another run id."""
    store.set_limit("total", Limit(10.0, 6), actor=ACTOR)
    publish(store, define("limited"))
    submit(store, "limited", 30)
    arrive(client, clock, "one")
    clock.advance(10)
    store.release()
    assert len(released(client)) == 5
    assert not arrive(client, clock, "one")
    assert state_of(store, "total").tokens == 0.0
    assert arrive(client, clock, "two")
    assert state_of(store, "total").tokens == -5.0
    times = [clock.now_ms for _ in start_all(client, store)]
    assert times == []
    assert_consistent(client, store)
    for _ in range(20):
        clock.advance(0.1)
        store.release()
        times += [clock.now_ms for _ in start_all(client, store)]
    assert times[0] == clock.now_ms - 1900
    assert len(times) == 20
    history = [line.reason for line in store.history("limited:ann:m0")]
    assert "given back: its limit has no place for it now" in history
    assert_consistent(client, store)


def test_every_connection_says_on_which_server_it_is(client: redis.Redis, server: EmbeddedServer) -> None:
    """Before anything else: data that was used on another server has empty buckets from then on."""
    used = Store.connect(server.url)
    used.set_limit("total", Limit(1.0, 5), actor=ACTOR)
    run_id = cast("dict[str, str]", client.info("server"))["run_id"]
    assert client.get(key(NAMESPACE, "server")) == run_id
    client.set(key(NAMESPACE, "server"), "another")
    assert (state_of(used, "total").tokens or 0) > 4, "this connection was made before"
    again = Store.connect(server.url)
    assert (state_of(again, "total").tokens or 0) < 4
    assert client.get(key(NAMESPACE, "server")) == run_id
    used.close()
    again.close()


@pytest.mark.parametrize("name", ["definition:limited", "host:api"])
def test_a_token_that_comes_back_lets_the_next_go_at_once(client: redis.Redis, store: Store, name: str) -> None:
    """It waited for the time at which there would be another."""
    publish_on(store, "api", "limited")
    store.set_limit(name, Limit(1.0, 4), actor=ACTOR)
    *_, third, fourth = submit(store, "limited", 4)
    for message in [take(client) for _ in range(2)]:
        assert start(store, message) == "run"
    assert store.release() == (0, 100)
    store.cancel(third, reason="not wanted")
    assert released(client) == [third, fourth]
    assert_consistent(client, store)


# --- a run that was held up ------------------------------------------------------------------------------------------


def test_a_run_that_was_held_up_takes_another_token_or_goes_back(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.set_limit("total", Limit(1.0, 3), actor=ACTOR)
    publish(store, define("limited", retries=0))
    first, second, third = submit(store, "limited", 3)
    assert released(client) == [first, second]
    message = take(client)
    assert start(store, message) == "run"
    # 1.9 are left, of which one is reserved for the second; who has started goes before it
    assert store.renew(first, delivery=message.delivery, worker="w1") is Renewal.IN_TIME
    assert store.renew(first, delivery=message.delivery, worker="w1") is Renewal.NEVER
    job = store.job(first)
    assert (job.state, job.attempt, job.failures) == (S.RETRYING, 1, 0)
    assert_consistent(client, store)
    assert store.renew(first, delivery=message.delivery, worker="w1") is Renewal.NEVER, "it has ended"
    assert store.job(first).state is S.RETRYING
    clock.advance(5)
    assert start(store, take(client)) == "run"
    again = take(client)
    assert again.job_id == first, "it has its old place, before the third"
    assert start(store, again) == "run"
    assert released(client) == []
    clock.advance(2)
    assert store.renew(first, delivery=again.delivery, worker="w1") is Renewal.IN_TIME
    assert store.renew(first, delivery=message.delivery, worker="w1") is Renewal.NEVER, "that delivery was given back"
    assert round(state_of(store, "total").tokens or 0, 9) == 1.9
    store.release()
    assert released(client) == [third]
    assert_consistent(client, store)


# --- concurrency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["definition:busy", "host:api", "user", "user:ann"])
def test_no_more_in_flight_than_the_concurrency(client: redis.Redis, store: Store, name: str) -> None:
    """Released and not ended; others are not held back; each end lets the next one go, in order."""
    publish_on(store, "api", "busy", "other_of_host")
    publish(store, define("free", priority="low"))
    store.set_limit(name, Limit(concurrency=3), actor=ACTOR)
    ids = submit(store, "busy", 12)
    free = enqueue(store, "free", "bob")
    order: list[str] = []
    running = start_all(client, store)
    assert [message.job_id for message in running] == [*ids[:3], free]
    order += [message.job_id for message in running if message.job_id != free]
    assert state_of(store, name).in_flight == 3
    while len(order) < 12:
        assert_consistent(client, store)
        end(store, running.pop(0))
        begun = start_all(client, store)
        order += [message.job_id for message in begun]
        running += begun
        assert sum(message.job_id != free for message in running) <= 3
    assert order == ids
    for message in running:
        end(store, message)
    assert_idle(client)
    assert state_of(store, name).in_flight == 0


def test_a_cap_of_a_user_wins_over_that_of_all(client: redis.Redis, store: Store) -> None:
    publish(store, define("report"))
    store.set_limit("user", Limit(concurrency=1), actor=ACTOR)
    store.set_limit("user:bob", Limit(concurrency=2), actor=ACTOR)
    for user in ("ann", "bob", "cyd"):
        submit(store, "report", 4, user)
    running = start_all(client, store)
    assert sorted(message.user for message in running) == ["ann", "bob", "bob", "cyd"]
    assert state_of(store, "user").in_flight == 2
    store.reset_limit("user:bob", actor=ACTOR)
    assert released(client) == []
    store.set_limit("user", Limit(concurrency=3), actor=ACTOR)
    assert sorted(message.user for message in start_all(client, store)) == ["ann", "ann", "bob", "cyd", "cyd"]
    store.reset_limit("user", actor=ACTOR)
    assert len(released(client)) == 3
    assert_consistent(client, store)


def test_a_cap_that_is_lifted_lets_go_all_that_was_set_aside(client: redis.Redis, store: Store) -> None:
    publish(store, define("report"))
    store.set_limit("user:ann", Limit(concurrency=1), actor=ACTOR)
    ids = submit(store, "report", 700)
    for _ in range(8):
        store.release()
    assert len(released(client)) == 1
    assert sum(store.waiting().values()) == 699
    store.reset_limit("user:ann", actor=ACTOR)
    while store.release()[0]:
        pass
    assert released(client) == ids
    assert_consistent(client, store)


def test_a_capped_users_jobs_do_not_wait_behind_one_that_cannot_go(client: redis.Redis, store: Store) -> None:
    """Of what was set aside, the first waits for a pause: the next goes."""
    publish(store, define("paused_one"), define("free"))
    store.set_limit("user:ann", Limit(concurrency=1), actor=ACTOR)
    first = enqueue(store, "free", "ann", "first")
    submit(store, "paused_one", 5)
    last = enqueue(store, "free", "ann", "last")
    store.pause_definition("paused_one", why="test", actor=ACTOR)
    (message,) = start_all(client, store)
    assert message.job_id == first
    end(store, message)
    assert released(client) == [last]
    assert_consistent(client, store)


# --- changes ---------------------------------------------------------------------------------------------------------


def test_a_limit_that_changes_holds_at_once(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A lane that the old rate blocked for an hour goes on under the new one, and without one; and never above the new one."""
    publish(store, define("limited", rate_limit="1/h"))
    submit(store, "limited", 60)
    assert len(start_all(client, store)) == 1
    assert store.release() == (0, 3_600_100)
    publish(store, define("limited", rate_limit={"rate": "2/s", "burst": 2}))
    times = []
    for _ in range(40):
        store.release()
        times += [clock.now_ms for _ in start_all(client, store)]
        clock.advance(0.1)
    assert worst_excess(times, 2, 2) <= 1e-6
    assert len(times) >= 6
    store.pause_definition("limited", why="test", actor=ACTOR)
    publish(store, define("limited"))
    assert store.release()[0] == 0
    store.resume_definition("limited", actor=ACTOR)
    assert len(released(client)) == 60 - 1 - len(times)
    assert_consistent(client, store)


@pytest.mark.parametrize("name", ["definition:limited", "total", "host:api"])
def test_a_lower_rate_holds_for_what_is_released_already(client: redis.Redis, store: Store, clock: Clock, name: str) -> None:
    publish_on(store, "api", "limited")
    store.set_limit(name, Limit(100.0, 50), actor=ACTOR)
    submit(store, "limited", 60)
    assert len(released(client)) == 40
    store.set_limit(name, Limit(1.0, 3), actor=ACTOR)
    assert_consistent(client, store)
    times = []
    for _ in range(50):
        times += [clock.now_ms for _ in start_all(client, store)]
        clock.advance(0.1)
        store.release()
    assert worst_excess(times, 1.0, 3) <= 1e-6
    assert len(times) >= 6
    assert_consistent(client, store)


def test_a_lower_concurrency_holds_from_the_next_release(client: redis.Redis, store: Store) -> None:
    publish(store, define("busy"))
    submit(store, "busy", 20)
    running = start_all(client, store)[:6]
    store.set_limit("definition:busy", Limit(concurrency=2), actor=ACTOR)
    assert state_of(store, "definition:busy").in_flight == 20
    for message in running:
        end(store, message)
    assert state_of(store, "definition:busy").in_flight == 14
    assert_consistent(client, store)


def test_live_wins_over_configured_until_it_is_reset(client: redis.Redis, store: Store) -> None:
    publish(store, define("limited", rate_limit={"rate": "5/s", "burst": 4}, concurrency=7))
    configured = Limit(5.0, 4, 7)
    assert state_of(store, "definition:limited") == LimitState("definition:limited", configured, configured, False, 3.5, 0, 0)
    assert store.set_limit("definition:limited", Limit(1.0, 2), actor="ann@example")
    assert not store.set_limit("definition:limited", Limit(1.0, 2), actor="ann@example")
    assert store.limits() == {"definition:limited": Limit(1.0, 2)}
    assert state_of(store, "definition:limited") == LimitState("definition:limited", Limit(1.0, 2), configured, True, 1.9, 0, None)
    publish(store, define("limited", rate_limit="9/s"))
    assert store.limits() == {"definition:limited": Limit(1.0, 2)}, "what is configured waits"
    assert store.reset_limit("definition:limited", actor="ann@example")
    assert not store.reset_limit("definition:limited", actor="ann@example")
    assert store.limits() == {"definition:limited": Limit(9.0, 2)}
    log = [(one.actor, one.kind, one.subject, one.detail) for one in store.changes() if one.kind == "limit changed"]
    assert [(actor, subject) for actor, _, subject, _ in log] == [("ann@example", "definition:limited")] * 2
    assert_consistent(client, store)


def test_none_live_lifts_what_is_configured(client: redis.Redis, store: Store) -> None:
    store.configure_limits({"total": Limit(1.0, 1), "host:api": Limit(concurrency=1)}, actor=ACTOR)
    publish_on(store, "api", "report")
    submit(store, "report", 5)
    assert len(released(client)) == 1
    store.set_limit("host:api", Limit(), actor=ACTOR)
    store.set_limit("total", Limit(), actor=ACTOR)
    assert len(released(client)) == 5
    assert state_of(store, "total") == LimitState("total", Limit(), Limit(1.0, 1), True, None, 0, None)
    store.configure_limits({"host:api": Limit(concurrency=2)}, actor=ACTOR)
    store.reset_limit("total", actor=ACTOR)
    assert store.limits() == {"host:api": Limit()}
    assert_consistent(client, store)


def test_figures_of_a_limit(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.set_limit("host:api", Limit(2.0, 5, 4), actor=ACTOR)
    publish_on(store, "api", "report")
    submit(store, "report", 6)
    state = state_of(store, "host:api")
    assert (state.tokens, state.reserved, state.in_flight) == (4.8 - 4, 4, 4)
    begun = start_all(client, store)
    state = state_of(store, "host:api")
    assert (round(state.tokens or 0, 9), state.reserved, state.in_flight) == (0.8, 0, 4)
    end(store, begun[0])
    clock.advance(0.6)
    store.release()
    state = state_of(store, "host:api")
    assert (round(state.tokens or 0, 9), state.reserved, state.in_flight) == (1.0, 1, 4)


# --- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [Limit(1.0, 2), Limit(concurrency=1), Limit(1.0, 2, 1)])
def test_a_definition_moves_to_another_host_while_its_jobs_wait_and_run(
    client: redis.Redis, store: Store, clock: Clock, limit: Limit
) -> None:
    """Nobody waits for ever at the host that it left, and it counts at the new one."""
    store.set_limit("host:north", limit, actor=ACTOR)
    store.set_limit("host:south", limit, actor=ACTOR)
    publish_on(store, "north", "stays", "moves")
    submit(store, "moves", 3)
    submit(store, "stays", 3, "bob")
    assert_consistent(client, store)
    publish_on(store, "south", "moves")
    assert_consistent(client, store)
    store.release()
    assert [job_id for job_id in released(client) if job_id.startswith("stays")], "the host that it left lets others go"
    for _ in range(12):
        for message in start_all(client, store):
            end(store, message)
        clock.advance(1)
        store.release()
    assert store.counts()[S.COMPLETED] == 6
    assert_idle(client)
    assert_consistent(client, store)


def test_a_definition_that_is_removed_wakes_the_line_of_its_host(client: redis.Redis, store: Store) -> None:
    store.set_limit("host:north", Limit(concurrency=1), actor=ACTOR)
    publish_on(store, "north", "goes", "stays")
    submit(store, "goes", 2)
    kept = submit(store, "stays", 2)
    running = start_all(client, store)
    assert len(running) == 1
    store.retract("goes", actor=ACTOR)
    assert_consistent(client, store)
    store.release()
    assert released(client) == kept[:1]


def test_a_line_is_in_order_and_not_held_up_by_what_is_later(client: redis.Redis, store: Store, clock: Clock) -> None:
    """The lane that may look is that of a paused user; behind it its next job is an hour away."""
    store.set_limit("host:north", Limit(1.0, 2), actor=ACTOR)
    publish_on(store, "north", "first", "second", "third")
    for name in ("first", "second", "third"):
        enqueue(store, name, "ann", "m1", delay_ms=1)
    blocker = enqueue(store, "first", "bob", "m2", delay_ms=2)
    enqueue(store, "first", "bob", "late", delay_ms=3_600_000)
    others = [enqueue(store, name, "cyd", "m3", delay_ms=3) for name in ("second", "third")]
    clock.advance(0.003)
    order: list[str] = []
    for number in range(8):
        store.release()
        order += [message.job_id for message in start_all(client, store)]
        assert_consistent(client, store)
        if number == 0:
            store.pause_user("bob", actor=ACTOR)
        clock.advance(1)
    assert sorted(order[:3]) == ["first:ann:m1", "second:ann:m1", "third:ann:m1"]
    assert sorted(order[3:]) == others
    assert store.job(blocker).state is S.PENDING


@pytest.mark.parametrize("lanes", [30, 300])
def test_a_token_costs_the_same_whatever_the_number_of_definitions_of_its_host(
    client: redis.Redis, store: Store, clock: Clock, lanes: int
) -> None:
    """Commands of Redis for each job that goes, with all that lets it go."""
    store.set_limit("host:north", Limit(10.0, 2), actor=ACTOR)
    names = [f"d{number}" for number in range(lanes)]
    publish_on(store, "north", *names)
    store.enqueue([Enqueue(f"{name}:ann:m{number}") for number in range(2) for name in names])
    # once, all lanes look and find the host busy
    while store.release(limit=1000)[1] == 0:
        pass
    start_all(client, store)
    before = _commands(client)
    begun = 0
    for _ in range(40):
        clock.advance(0.1)
        store.release()
        begun += len(start_all(client, store))
    assert begun == 40
    assert (_commands(client) - before) / begun < 200
    assert_consistent(client, store)


def _commands(client: redis.Redis) -> int:
    """How many Redis has done, in scripts too."""
    return sum(int(one["calls"]) for one in client.info("commandstats").values())


# --- priorities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fair", [False, True])
def test_another_priority_for_a_job_that_waits(client: redis.Redis, store: Store, clock: Clock, fair: bool) -> None:
    """It keeps its time and its place; wherever it waits: in its lane, for its turn, held, or set aside."""
    store.set_options(fairness=fair, share=0)
    publish(store, define("report", priority="low"), define("urgent", priority="high"))
    offer(store, slots=1)
    first, *others = submit(store, "report", 4)
    taken = take(client)
    assert taken.job_id == first
    assert store.prioritize(first, HIGH, reason="test") is S.QUEUED
    for number in range(3):
        enqueue(store, "urgent", "bob", f"m{number}", delay_ms=1000)
    future = enqueue(store, "report", "ann", "future", delay_ms=1500)
    assert store.prioritize(future, HIGH, reason="test") is S.PENDING
    assert store.prioritize(others[2], HIGH, reason="it is needed") is S.PENDING
    assert released(client) == [others[2]]
    assert store.history(others[2])[1].reason == "it is needed"
    assert_consistent(client, store)
    store.pause_user("ann", actor=ACTOR)
    assert store.prioritize(others[1], MEDIUM, reason="test") is S.PENDING
    store.set_limit("user:cyd", Limit(concurrency=1), actor=ACTOR)
    assert_consistent(client, store)
    store.resume_user("ann", actor=ACTOR)
    clock.advance(2)
    order = [taken.job_id]
    assert start(store, taken) == "run"
    end(store, taken)
    while released(client):
        message = take(client)
        order.append(message.job_id)
        assert start(store, message) == "run"
        end(store, message)
    urgent = [f"urgent:bob:m{number}" for number in range(3)]
    if fair:
        assert order[:2] == [first, others[2]]
        assert [job_id for job_id in order if "urgent" in job_id] == urgent
        assert order[-2:] == [others[1], others[0]]
    else:
        assert order == [first, others[2], *urgent, future, others[1], others[0]]
    assert_idle(client)
    assert_consistent(client, store)


def test_another_priority_for_a_job_that_is_set_aside(client: redis.Redis, store: Store) -> None:
    publish(store, define("report", priority="low"))
    store.set_limit("user:ann", Limit(concurrency=1), actor=ACTOR)
    first, second, third = submit(store, "report", 3)
    assert released(client) == [first]
    store.prioritize(third, HIGH, reason="test")
    assert_consistent(client, store)
    (message,) = start_all(client, store)
    end(store, message)
    assert released(client) == [third]
    assert store.job(second).state is S.PENDING


def test_a_full_queue_does_not_let_a_rate_oversleep(client: redis.Redis, store: Store, clock: Clock) -> None:
    """What starts makes room, and then the rate may hold back: nobody would look again at the right time."""
    publish(store, define("limited", rate_limit={"rate": "100/s", "burst": 50}), define("free", priority="low"))
    store.create_users(["ann"], actor=ACTOR)
    offer(store, slots=2)
    store.enqueue([Enqueue(f"limited:ann:m{number}") for number in range(10)])
    assert store.release() == (0, 25)
    store.enqueue([Enqueue(f"free:ann:m{number}", priority=Priority.HIGH) for number in range(10)])
    store.pause_definition("limited", why="test", actor=ACTOR)
    assert store.release() == (0, None), "without a rate each start and each end releases what there is room for"


def test_a_run_without_a_rate_needs_no_place(client: redis.Redis, store: Store, clock: Clock) -> None:
    publish(store, define("free"))
    submit(store, "free", 1)
    message = take(client)
    assert start(store, message) == "run"
    assert store.renew(message.job_id, delivery=message.delivery, worker="w1") is Renewal.ANY_TIME


def test_a_run_that_is_held_up_for_ever_fails(client: redis.Redis, store: Store, clock: Clock) -> None:
    publish(store, define("limited", rate_limit="1/s"))
    (job_id,) = submit(store, "limited", 1)
    for _ in range(100):
        clock.advance(2)
        store.release()
        if store.job(job_id).state.terminal:
            break
        message = take(client)
        assert start(store, message) == "run"
        assert store.renew(job_id, delivery=message.delivery, worker="w1") is Renewal.NEVER
    job = store.job(job_id)
    assert (job.state, job.reason) == (S.FAILED, "held up before its call again and again, and its place in the limit has passed")
    assert job.attempt == 21
    assert_consistent(client, store)


@pytest.mark.parametrize("how", ["retract", "move"])
@pytest.mark.parametrize("fairness", [False, True])
def test_a_line_goes_on_when_the_lane_that_might_go_is_gone(
    client: redis.Redis, store: Store, clock: Clock, how: str, fairness: bool
) -> None:
    """The gate was open, and no worker had room to use it."""
    store.set_options(fairness=fairness, share=0)
    publish_on(store, "api", "first", "second")
    store.set_limit("host:api", Limit(1.0, 2), actor=ACTOR)
    for name in ("first", "second"):
        submit(store, name, 3)
    start_all(client, store)
    offer(store, slots=0)
    clock.advance(5)
    store.release()
    if how == "retract":
        store.retract("first", actor=ACTOR)
    else:
        publish_on(store, "elsewhere", "first")
    offer(store, slots=50)
    for _ in range(10):
        clock.advance(5)
        store.release()
        start_all(client, store)
    assert store.waiting() == dict.fromkeys(Priority, 0)
    assert_consistent(client, store)


def test_what_is_queued_of_a_removed_definition_does_not_start(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Its host is not known any more, and so not what it would take from the host's limit."""
    publish_on(store, "api", "gone")
    (job_id,) = submit(store, "gone", 1)
    assert released(client) == [job_id]
    store.retract("gone", actor=ACTOR)
    assert start(store, take(client)) == "rejected"
    assert (store.job(job_id).state, store.job(job_id).reason) == (S.REJECTED, "definition gone does not exist any more")
    assert_consistent(client, store)


def test_fairness_that_is_switched_off_leaves_a_pause_in_force(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.set_options(fairness=True, share=0)
    publish(store, define("report"), define("other"))
    store.create_users(["ann"], actor=ACTOR)
    offer(store)
    later = enqueue(store, "report", "ann", delay_ms=60_000)
    store.pause_definition("report", why="test", actor=ACTOR)
    store.set_options(fairness=False, share=0)
    clock.advance(100)
    assert store.release() == (0, None)
    free = enqueue(store, "other", "ann")
    assert released(client) == [free]
    assert_consistent(client, store)
    store.resume_definition("report", actor=ACTOR)
    assert released(client) == [free, later]


def test_a_deleted_user_leaves_no_limit(client: redis.Redis, store: Store) -> None:
    store.create_user("ann", actor=ACTOR)
    store.set_limit("user:ann", Limit(concurrency=1), actor=ACTOR)
    store.delete_user("ann", actor=ACTOR)
    assert store.limits() == {}
