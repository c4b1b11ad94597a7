"""What is released, in which order, how much of it, and when: the waiting set, limits, pauses and the queues' depth."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskplatform.model import Definition, JobState, Limit, Priority
from taskplatform.store import Enqueue, Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, assert_consistent, define, enqueue, offer, publish, queue, subscribe, take

S = JobState
HIGH, MEDIUM, LOW = Priority


def released(client: redis.Redis) -> list[str]:
    """What lies in the queues, in the order in which a worker of all queues takes it."""
    return [message.job_id for priority in Priority for message in queue(client, priority)]


def drain(client: redis.Redis, store: Store, worker: str = "w1") -> list[str]:
    """Run all that can be run now, one after the other; the ids in the order in which they started."""
    order: list[str] = []
    while True:
        try:
            message = take(client)
        except LookupError:
            return order
        assert store.start(message.job_id, delivery=message.delivery, worker=worker).go
        order.append(message.job_id)
        store.finish(message.job_id, delivery=message.delivery, worker=worker, state=S.COMPLETED, reason="done")


@pytest.fixture
def definitions(store: Store) -> dict[str, Definition]:
    """Two of each priority, and three users."""
    made = {f"{priority}_{letter}": define(f"{priority}_{letter}", priority=priority) for priority in Priority for letter in "ab"}
    publish(store, *made.values())
    store.create_users(["ann", "bob", "cyd"], actor=ACTOR)
    return made


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("definitions")
def test_strict_priority_at_release(client: redis.Redis, store: Store, clock: Clock) -> None:
    offer(store, slots=1)
    first = enqueue(store, "low_a", "ann", "first")
    backlog = [enqueue(store, "low_a", "ann", f"low{number}") for number in range(20)]
    middle = [enqueue(store, "medium_a", "ann", f"medium{number}") for number in range(3)]
    late = [enqueue(store, "high_b", "bob", f"high{number}") for number in range(3)]
    # one of each lies in its queue, the low one longest; a worker empties the high queue first
    assert released(client) == [late[0], middle[0], first]
    assert drain(client, store) == [*late, *middle, first, *backlog]
    assert_consistent(client, store)


@pytest.mark.usefixtures("definitions")
def test_first_come_first_served_inside_a_priority_over_all_definitions(client: redis.Redis, store: Store, clock: Clock) -> None:
    """By execute_after, then by submission; also at the same millisecond, and whatever their names."""
    began = clock.now_ms
    order: list[tuple[int, int, str]] = []
    rng = random.Random(5)
    for number in range(60):
        after = began + rng.choice([0, 0, 1, 2, 500])
        name = rng.choice(["medium_a", "medium_b", "low_a"])
        order.append((after, number, enqueue(store, name, "ann", f"m{number}", execute_after_ms=after, priority=MEDIUM)))
    clock.advance(1)
    offer(store, slots=7)
    store.release()
    assert drain(client, store) == [job_id for _, _, job_id in sorted(order)]


@pytest.mark.usefixtures("definitions")
def test_one_call_enqueues_in_its_order(client: redis.Redis, store: Store) -> None:
    ids = [f"{name}:{user}:m{number}" for number in range(30) for name in ("low_b", "low_a") for user in ("cyd", "ann")]
    store.enqueue([Enqueue(job_id) for job_id in ids])
    offer(store, slots=1000)
    store.release(limit=1000)
    assert released(client) == ids
    assert store.counts()[S.QUEUED] == len(ids)


@pytest.mark.usefixtures("definitions")
def test_a_time_that_has_passed_means_now(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Whoever asks for yesterday does not get before those who wait."""
    first = enqueue(store, "low_a", "ann", "m1")
    clock.advance(1)
    second = enqueue(store, "low_a", "bob", "m2", execute_after_ms=5)
    assert store.job(second).execute_after_ms == clock.now_ms
    offer(store)
    store.release()
    assert released(client) == [first, second]


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("early_ms", [1, 999, 1000])
def test_nothing_is_early(client: redis.Redis, store: Store, clock: Clock, early_ms: int) -> None:
    offer(store)
    job_id = enqueue(store, "high_a", "ann", delay_ms=1000)
    clock.advance((1000 - early_ms) / 1000)
    assert store.release() == (0, early_ms)
    assert released(client) == []
    clock.advance(early_ms / 1000)
    assert store.release() == (1, None)
    assert released(client) == [job_id]


@pytest.mark.usefixtures("definitions")
def test_retries_wait_their_turn(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A retry is ordered by its own time, and among equals by when it was decided."""
    offer(store, slots=1)
    retried = enqueue(store, "low_a", "ann", "m1")
    take(client)
    store.start(retried, delivery=1, worker="w1")
    before = enqueue(store, "low_b", "ann", "m2", delay_ms=2000)
    store.finish(retried, delivery=1, worker="w1", state=S.RETRYING, reason="busy", retry_in=timedelta(seconds=2))
    after = enqueue(store, "low_a", "ann", "m3", delay_ms=2000)
    clock.advance(1)
    earlier = enqueue(store, "low_a", "ann", "m4", delay_ms=500)
    clock.advance(1)
    later = enqueue(store, "low_a", "ann", "m5", delay_ms=1)
    clock.advance(0.001)
    store.release()
    assert drain(client, store) == [earlier, before, retried, after, later]


@pytest.mark.usefixtures("definitions")
def test_a_release_stops_where_it_was_told(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.enqueue([Enqueue(f"low_a:ann:m{number}") for number in range(10)])
    offer(store, slots=100)
    assert store.release(limit=4) == (4, 0)
    assert store.release(limit=4) == (4, 0)
    assert store.release(limit=4) == (2, None)


# --- depth -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize(("slots", "buffer", "depth"), [(1, 1.0, 1), (3, 1.0, 3), (3, 0.5, 2), (4, 2.0, 8), (2, 0.0, 1)])
def test_queues_are_shallow(client: redis.Redis, store: Store, slots: int, buffer: float, depth: int) -> None:
    store.heartbeat("w1", slots=slots, queues=list(Priority), buffer=buffer)
    store.enqueue([Enqueue(f"low_a:ann:m{number}") for number in range(30)])
    store.release()
    assert len(queue(client, LOW)) == depth
    store.enqueue([Enqueue(f"high_a:ann:m{number}") for number in range(30)])
    store.release()
    # higher ones may go over lower ones, and fill the queues for both
    assert (len(queue(client, HIGH)), len(queue(client, LOW))) == (depth, depth)
    store.enqueue([Enqueue(f"medium_a:ann:m{number}") for number in range(30)])
    assert len(queue(client, MEDIUM)) == 0
    assert store.queued() == {HIGH: depth, MEDIUM: 0, LOW: depth}
    assert_consistent(client, store)


@pytest.mark.usefixtures("definitions")
def test_the_depth_follows_the_workers(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.enqueue([Enqueue(f"low_a:ann:m{number}") for number in range(30)])
    assert store.release() == (0, None)
    offer(store, "w1", slots=2)
    offer(store, "w2", slots=3)
    assert store.release()[0] == 5
    offer(store, "w1", slots=4)
    assert store.release()[0] == 2
    store.leave("w1")
    assert store.release()[0] == 0
    clock.advance(60)
    store.recover(silence=timedelta(seconds=15), max_losses=3, backoff=timedelta(seconds=1))
    drain(client, store, "w3")
    assert store.release()[0] == 0
    assert_consistent(client, store)


@pytest.mark.usefixtures("definitions")
def test_workers_of_one_queue_do_not_wait_for_another(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A full high queue that its own workers empty, or that nobody serves any more, holds back no worker of the low one alone."""
    offer(store, "high1", slots=2, queues=["high"])
    offer(store, "low1", slots=3, queues=["low"])
    for name in ("high_a", "low_a"):
        store.enqueue([Enqueue(f"{name}:ann:m{number}") for number in range(10)])
    store.release()
    assert {priority: len(queue(client, priority)) for priority in Priority} == {HIGH: 2, MEDIUM: 0, LOW: 3}
    # the high worker is gone
    clock.advance(60)
    offer(store, "low1", slots=3, queues=["low"])
    store.recover(silence=timedelta(seconds=15), max_losses=3, backoff=timedelta(seconds=1))
    for _ in range(3):
        take(client, LOW)
    for number in range(3):
        store.start(f"low_a:ann:m{number}", delivery=1, worker="low1")
    assert {priority: len(queue(client, priority)) for priority in Priority} == {HIGH: 2, MEDIUM: 0, LOW: 3}
    # one that serves both comes, and takes the high ones first: three slots for both, and three for the low ones alone
    offer(store, "both1", slots=3, queues=["high", "low"])
    store.release()
    assert {priority: len(queue(client, priority)) for priority in Priority} == {HIGH: 3, MEDIUM: 0, LOW: 3}
    assert_consistent(client, store)


# --- pauses ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("what", ["definition", "user", "subscription"])
def test_a_pause_holds_back_nobody_else_and_keeps_the_order(client: redis.Redis, store: Store, clock: Clock, what: str) -> None:
    for user in ("ann", "bob"):
        subscribe(store, user, "low_a")
    ids = [enqueue(store, "low_a" if number % 3 else "low_b", "ann" if number % 2 else "bob", f"m{number}") for number in range(24)]

    def is_paused(job_id: str) -> bool:
        definition, user, _ = job_id.split(":")
        return {"definition": definition == "low_a", "user": user == "ann", "subscription": (definition, user) == ("low_a", "ann")}[what]

    if what == "definition":
        assert store.pause_definition("low_a", why="test", actor=ACTOR)
        assert not store.pause_definition("low_a", why="again", actor=ACTOR)
        assert store.definition_pauses() == {"low_a": "test"}
    elif what == "user":
        assert store.pause_user("ann", actor=ACTOR)
        assert not store.pause_user("ann", actor=ACTOR)
    else:
        assert store.pause_subscription("ann", "low_a", actor=ACTOR)
        assert not store.pause_subscription("ann", "low_a", actor=ACTOR)
    offer(store, slots=3)
    store.release()
    assert drain(client, store) == [job_id for job_id in ids if not is_paused(job_id)]
    assert_consistent(client, store)
    held = [job_id for job_id in ids if is_paused(job_id)]
    assert {store.job(job_id).state for job_id in held} == {S.PENDING}
    clock.advance(5)
    late = enqueue(store, "low_b", "bob", "late")
    drain(client, store)
    assert store.job(late).state is S.COMPLETED
    if what == "definition":
        assert store.resume_definition("low_a", actor=ACTOR)
        assert not store.resume_definition("low_a", actor=ACTOR)
    elif what == "user":
        assert store.resume_user("ann", actor=ACTOR)
        assert not store.resume_user("ann", actor=ACTOR)
    else:
        assert store.resume_subscription("ann", "low_a", actor=ACTOR)
        assert not store.resume_subscription("ann", "low_a", actor=ACTOR)
    after = enqueue(store, "low_a", "ann", "after")
    assert drain(client, store) == [*held, after]
    assert_consistent(client, store)
    if what != "definition":
        reasons = [line.reason for line in store.history(held[0])]
        assert reasons[1:3] == [f"held: {what} paused", "no longer held"]


@pytest.mark.usefixtures("definitions")
def test_two_pauses_on_one_job(client: redis.Redis, store: Store) -> None:
    subscribe(store, "ann", "low_a")
    job_id = enqueue(store, "low_a", "ann")
    offer(store, slots=0)
    store.pause_user("ann", actor=ACTOR)
    store.pause_subscription("ann", "low_a", actor=ACTOR)
    store.pause_definition("low_a", why="test", actor=ACTOR)
    offer(store)
    store.resume_definition("low_a", actor=ACTOR)
    assert_consistent(client, store)
    store.resume_user("ann", actor=ACTOR)
    assert released(client) == []
    store.resume_subscription("ann", "low_a", actor=ACTOR)
    assert released(client) == [job_id]
    assert_consistent(client, store)


@pytest.mark.usefixtures("definitions")
def test_the_end_of_a_paused_subscription_lets_go_what_was_submitted_by_hand(client: redis.Redis, store: Store) -> None:
    subscribe(store, "ann", "low_a")
    store.pause_subscription("ann", "low_a", actor=ACTOR)
    offer(store)
    job_id = enqueue(store, "low_a", "ann")
    assert released(client) == []
    assert store.unsubscribe("ann", "low_a", actor=ACTOR) == 0
    assert released(client) == [job_id]
    assert_consistent(client, store)


@pytest.mark.usefixtures("definitions")
def test_a_word_in_the_parameters_is_no_pause(client: redis.Redis, store: Store) -> None:
    subscribe(store, "ann", "low_a", params={"paused": 1, "x": {"paused": 1}})
    offer(store)
    job_id = enqueue(store, "low_a", "ann")
    assert released(client) == [job_id]


def test_what_is_paused_takes_no_token(client: redis.Redis, store: Store, clock: Clock) -> None:
    publish(store, define("limited", rate_limit="1/m"))
    store.create_users(["ann", "bob"], actor=ACTOR)
    store.pause_user("ann", actor=ACTOR)
    offer(store)
    enqueue(store, "limited", "ann", "m1")
    job_id = enqueue(store, "limited", "bob", "m2")
    assert released(client) == [job_id]


# --- removed definitions ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("definitions")
def test_what_waits_of_a_removed_definition_is_rejected_and_holds_back_nobody(client: redis.Redis, store: Store, clock: Clock) -> None:
    gone = [enqueue(store, "high_a", "ann", f"m{number}") for number in range(3)]
    later = enqueue(store, "high_a", "ann", "later", delay_ms=60_000)
    other = enqueue(store, "high_b", "ann", "other")
    store.pause_definition("high_a", why="test", actor=ACTOR)
    assert store.retract("high_a", actor=ACTOR)
    assert not store.retract("high_a", actor=ACTOR)
    offer(store)
    assert store.release() == (1, 60_000)
    assert released(client) == [other]
    assert {store.job(job_id).state for job_id in gone} == {S.REJECTED}
    assert {store.job(job_id).reason for job_id in gone} == {"definition high_a does not exist any more"}
    assert store.job(later).state is S.PENDING
    clock.advance(60)
    store.release()
    assert store.job(later).state is S.REJECTED
    assert_consistent(client, store)


# --- limits ----------------------------------------------------------------------------------------------------------


def worst_excess(times_ms: Sequence[int], per_second: float, burst: int) -> float:
    """By how many the fullest window holds more than rate × t + burst; from GCRA, by its definition over all windows."""
    worst = -math.inf
    for first in range(len(times_ms)):
        for last in range(first, len(times_ms)):
            seconds = (times_ms[last] - times_ms[first]) / 1000
            worst = max(worst, last - first + 1 - (per_second * seconds + burst))
    return worst


@pytest.mark.parametrize("which", ["definition", "global"])
@pytest.mark.parametrize(("rate", "per_second", "burst"), [("3/s", 3.0, 1), ("7/s", 7.0, 4), ("100/m", 100 / 60, 2), ("40/s", 40.0, 10)])
def test_no_window_holds_more_than_the_limit(
    client: redis.Redis, store: Store, clock: Clock, which: str, rate: str, per_second: float, burst: int
) -> None:
    limit = {"rate": rate, "burst": burst}
    publish(store, define("limited", rate_limit=limit if which == "definition" else None))
    if which == "global":
        store.set_limit("total", Limit(per_second, burst), actor=ACTOR)
    store.create_users(["ann"], actor=ACTOR)
    store.enqueue([Enqueue(f"limited:ann:m{number}") for number in range(150)])
    offer(store, slots=1000)
    rng = random.Random(3)
    times: list[int] = []
    began = clock.now_ms
    quiet = False
    while len(times) < 120:
        count, wait = store.release()
        times += [clock.now_ms] * count
        assert wait is not None
        # as a timer that wakes exactly, a little late, or after a rest in which the burst fills up
        rest = rng.choice([0, 0, 0, 1, 7, 130])
        if len(times) > 60 and not quiet:
            quiet, rest = True, 10_000
        clock.now_ms += max(1, wait + rest)
    assert worst_excess(times, per_second, burst) <= 1e-6
    busy = (times[-1] - began - 10_000) / 1000
    assert len(times) >= 0.6 * per_second * busy, "the limit is used"
    assert_consistent(client, store)


def test_a_long_run_at_an_odd_rate_stays_below_the_limit(client: redis.Redis, store: Store, clock: Clock) -> None:
    """No sum of roundings goes beyond it."""
    publish(store, define("limited", rate_limit={"rate": "7/s", "burst": 50}))
    store.create_users(["ann"], actor=ACTOR)
    store.enqueue([Enqueue(f"limited:ann:m{number}") for number in range(1500)])
    offer(store, slots=10_000)
    began, total = clock.now_ms, 0
    while total < 1450:
        total += store.release(limit=1000)[0]
        assert total <= 7 * (clock.now_ms - began) / 1000 + 50
        clock.advance(0.937)


def test_a_limited_definition_holds_back_nobody_else(client: redis.Redis, store: Store, clock: Clock) -> None:
    publish(store, define("limited", priority="high", rate_limit="1/m"), define("free", priority="high"), define("low_one", priority="low"))
    store.create_users(["ann"], actor=ACTOR)
    limited = [enqueue(store, "limited", "ann", f"m{number}") for number in range(5)]
    free = [enqueue(store, "free", "ann", f"m{number}") for number in range(5)]
    low = enqueue(store, "low_one", "ann")
    offer(store, slots=3)
    store.release()
    assert drain(client, store) == [limited[0], *free, low]
    assert released(client) == [], "what may not go takes no place in a queue"
    assert store.release() == (0, 60_000)
    assert_consistent(client, store)
    clock.advance(59.999)
    assert store.release()[0] == 0
    clock.advance(0.001)
    assert store.release()[0] == 1
    assert drain(client, store) == [limited[1]]


def test_a_job_takes_both_limits_or_none(client: redis.Redis, store: Store, clock: Clock) -> None:
    """What the one limit holds back uses up nothing of the other."""
    publish(store, define("limited", rate_limit="1/m"), define("free"))
    store.create_users(["ann"], actor=ACTOR)
    store.set_limit("total", Limit(1, 2), actor=ACTOR)
    enqueue(store, "limited", "ann", "m1")
    enqueue(store, "limited", "ann", "m2")
    free = [enqueue(store, "free", "ann", f"m{number}") for number in range(2)]
    offer(store)
    store.release()
    # the second limited one came before, and its own limit let the global token go to the free one
    assert released(client) == ["limited:ann:m1", free[0]]
    clock.advance(1)
    store.release()
    assert released(client) == ["limited:ann:m1", *free]


def test_a_limit_that_changes(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A lane that the old limit blocked for an hour goes on under the new one, and without one; and never above the new one."""
    store.create_users(["ann"], actor=ACTOR)
    publish(store, define("limited", rate_limit="1/h"))
    store.enqueue([Enqueue(f"limited:ann:m{number}") for number in range(30)])
    offer(store, slots=1000)
    assert store.release() == (1, 3_600_000)
    publish(store, define("limited", rate_limit={"rate": "2/s", "burst": 2}))
    times = []
    for _ in range(40):
        times += [clock.now_ms] * store.release()[0]
        clock.advance(0.1)
    assert worst_excess(times, 2, 2) <= 1e-6
    assert len(times) >= 6
    store.pause_definition("limited", why="test", actor=ACTOR)
    publish(store, define("limited"))
    assert store.release()[0] == 0
    store.resume_definition("limited", actor=ACTOR)
    assert len(released(client)) == 30
    assert_consistent(client, store)


def test_a_global_limit_that_is_lifted(client: redis.Redis, store: Store) -> None:
    publish(store, define("report"))
    store.create_users(["ann"], actor=ACTOR)
    store.set_limit("total", Limit(1 / 60, 1), actor=ACTOR)
    store.enqueue([Enqueue(f"report:ann:m{number}") for number in range(5)])
    offer(store)
    assert store.release() == (1, 60_000)
    store.reset_limit("total", actor=ACTOR)
    assert store.release() == (4, None)


# --- the message -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["u1", "a.b_c@d+e-f", "x@@ID@@", "Q@@QUEUE@@RETRIES@@", "0" * 128])
def test_the_message_names_the_job(client: redis.Redis, store: Store, clock: Clock, user: str) -> None:
    publish(store, define("report", timeout="30s"))
    store.create_users([user], actor=ACTOR)
    job_id = enqueue(store, "report", user, "k1", priority=LOW)
    offer(store)
    for delivery in (1, 2):
        store.release()
        message = json.loads(take(client, "low").raw)
        headers, properties = message["headers"], message["properties"]
        assert (headers["id"], headers["root_id"], properties["correlation_id"]) == (job_id,) * 3
        assert (headers["task"], headers["delivery"], headers["retries"]) == ("report", delivery, delivery - 1)
        assert properties["delivery_tag"] == f"{job_id}#{delivery}"
        assert properties["delivery_info"] == {"exchange": "", "routing_key": "low"}
        assert json.loads(message["body"])[:2] == [[], {"user": user}]
        assert headers["kwargsrepr"] == repr({"user": user})
        assert "@@" not in json.dumps(message).replace(user, "")
        store.start(job_id, delivery=delivery, worker="w1")
        store.finish(job_id, delivery=delivery, worker="w1", state=S.RETRYING, reason="busy", retry_in=timedelta(seconds=1))
        clock.advance(1)


# --- against a model -------------------------------------------------------------------------------------------------


@dataclass
class Waiting:
    job_id: str
    priority: Priority
    after_ms: int
    number: int

    @property
    def definition(self) -> str:
        return self.job_id.split(":")[0]

    @property
    def user(self) -> str:
        return self.job_id.split(":")[1]


@dataclass
class Model:
    """The rules, without any index: at each release the best of all that may go, as long as there is room."""

    intervals: dict[str, tuple[float, int]]
    """Limit → milliseconds between two and burst."""
    waiting: list[Waiting] = field(default_factory=list)
    queues: dict[Priority, list[str]] = field(default_factory=lambda: {priority: [] for priority in Priority})
    arrivals: dict[str, float] = field(default_factory=dict)
    paused_definitions: set[str] = field(default_factory=set)
    paused_users: set[str] = field(default_factory=set)
    depth: int = 0

    def may(self, limit: str, now_ms: int) -> bool:
        if limit not in self.intervals:
            return True
        interval, burst = self.intervals[limit]
        return max(self.arrivals.get(limit, 0), now_ms) - (burst - 1) * interval <= now_ms

    def take(self, limit: str, now_ms: int) -> None:
        if limit in self.intervals:
            self.arrivals[limit] = max(self.arrivals.get(limit, 0), now_ms) + self.intervals[limit][0]

    def release(self, now_ms: int) -> None:
        room = self.depth
        for priority in Priority:
            room -= len(self.queues[priority])
            while room > 0:
                able = [
                    job
                    for job in self.waiting
                    if job.priority is priority
                    and job.after_ms <= now_ms
                    and job.definition not in self.paused_definitions
                    and job.user not in self.paused_users
                    and self.may(job.definition, now_ms)
                ]
                if not able:
                    break
                if not self.may("global", now_ms):
                    return
                best = min(able, key=lambda job: (job.after_ms, job.number))
                self.take("global", now_ms)
                self.take(best.definition, now_ms)
                self.waiting.remove(best)
                self.queues[priority].append(best.job_id)
                room -= 1


DEFINITIONS = ("high_a", "high_b", "medium_a", "low_a", "low_b")
STEP = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(DEFINITIONS), st.sampled_from(["ann", "bob"]), st.sampled_from([0, 0, 1, 250, 3000])),
    st.tuples(st.just("submit"), st.sampled_from(DEFINITIONS), st.sampled_from(["ann", "bob"]), st.sampled_from([0, 0, 1, 250, 3000])),
    st.tuples(st.just("raise"), st.sampled_from(DEFINITIONS), st.sampled_from(["ann", "bob"]), st.sampled_from([0, 1])),
    st.tuples(st.just("wait"), st.sampled_from([1, 99, 250, 500, 1000, 5000])),
    st.tuples(st.just("wait"), st.sampled_from([1, 99, 250, 500, 1000, 5000])),
    st.tuples(st.just("run")),
    st.tuples(st.just("run")),
    st.tuples(st.just("pause definition"), st.sampled_from(DEFINITIONS)),
    st.tuples(st.just("resume definition"), st.sampled_from(DEFINITIONS)),
    st.tuples(st.just("pause user"), st.sampled_from(["ann", "bob"])),
    st.tuples(st.just("resume user"), st.sampled_from(["ann", "bob"])),
    st.tuples(st.just("slots"), st.integers(0, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
)


@settings(deadline=None, database=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    steps=st.lists(STEP, min_size=5, max_size=40),
    limits=st.dictionaries(
        st.sampled_from(["global", "high_a", "low_a"]), st.tuples(st.sampled_from([100, 500, 2000]), st.integers(1, 3)), max_size=2
    ),
)
def test_release_agrees_with_the_rules(
    client: redis.Redis, store: Store, clock: Clock, steps: list[tuple[Any, ...]], limits: dict[str, tuple[int, int]]
) -> None:
    client.flushall()
    model = Model({name: (float(interval), burst) for name, (interval, burst) in limits.items()}, depth=2)
    for name in DEFINITIONS:
        interval, burst = limits.get(name, (0, 0))
        limit = {"rate": f"{1000 / interval:g}/s", "burst": burst} if interval else None
        publish(store, define(name, priority=name.split("_")[0], rate_limit=limit))
    if "global" in limits:
        store.set_limit("total", Limit(1000 / limits["global"][0], limits["global"][1]), actor=ACTOR)
    store.create_users(["ann", "bob"], actor=ACTOR)
    offer(store, slots=2)
    every: list[str] = []
    for number, (what, *args) in enumerate(steps):
        if what in ("submit", "raise"):
            definition, user, delay = args
            priority = HIGH if what == "raise" else Priority(definition.split("_")[0])
            every.append(enqueue(store, definition, user, f"m{number}", delay_ms=delay, priority=HIGH if what == "raise" else None))
            model.waiting.append(Waiting(every[-1], priority, clock.now_ms + delay, number))
        elif what == "wait":
            clock.now_ms += args[0]
            store.release()
        elif what == "run":
            filled = [priority for priority in Priority if model.queues[priority]]
            if filled:
                message = take(client)
                assert message.job_id == model.queues[filled[0]].pop(0)
                assert store.start(message.job_id, delivery=message.delivery, worker="w1").go
                assert store.job(message.job_id).execute_after_ms <= clock.now_ms
                model.release(clock.now_ms)
                store.finish(message.job_id, delivery=message.delivery, worker="w1", state=S.COMPLETED, reason="done")
        elif what == "pause definition":
            store.pause_definition(args[0], why="test", actor=ACTOR)
            model.paused_definitions.add(args[0])
        elif what == "resume definition":
            store.resume_definition(args[0], actor=ACTOR)
            model.paused_definitions.discard(args[0])
        elif what == "pause user":
            store.pause_user(args[0], actor=ACTOR)
            model.paused_users.add(args[0])
        elif what == "resume user":
            store.resume_user(args[0], actor=ACTOR)
            model.paused_users.discard(args[0])
        elif what == "slots":
            offer(store, slots=args[0])
            store.release()
            model.depth = args[0]
        elif model.waiting:
            job = model.waiting.pop(args[0] % len(model.waiting))
            store.cancel(job.job_id, reason="not wanted")
        store.release()
        model.release(clock.now_ms)
        found = {priority: [message.job_id for message in queue(client, priority)] for priority in Priority}
        assert found == model.queues, f"after step {number}, {what} {args}"
    assert_consistent(client, store)
    assert Counter(store.job(job_id).state for job_id in every)[S.PENDING] == len(model.waiting)
