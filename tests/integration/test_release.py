"""What is released, in which order, how much of it, and when: the waiting set, limits, pauses and the queues' depth."""

from __future__ import annotations

import json
import random
from datetime import timedelta

import pytest
import redis

from taskplatform.model import Definition, JobState, Priority
from taskplatform.store import Enqueue, Store
from tests.conftest import Clock
from tests.integration.harness import (
    ACTOR,
    assert_consistent,
    assert_idle,
    define,
    enqueue,
    offer,
    publish,
    queue,
    recover,
    subscribe,
    take,
)

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
    recover(store, timedelta(seconds=15))
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
    recover(store, timedelta(seconds=15))
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


# --- turns -----------------------------------------------------------------------------------------------------------


def _start_all(client: redis.Redis, store: Store, count: int) -> list[str]:
    """Run so many, one after the other; the ids in the order in which they started."""
    order: list[str] = []
    while len(order) < count:
        message = take(client)
        assert store.start(message.job_id, delivery=message.delivery, worker="w1").go
        order.append(message.job_id)
        store.finish(message.job_id, delivery=message.delivery, worker="w1", state=S.COMPLETED, reason="done")
    return order


def _users(order: list[str]) -> list[str]:
    return [job_id.split(":")[1] for job_id in order]


@pytest.mark.usefixtures("definitions")
def test_with_turns_a_large_backlog_of_one_user_does_not_hold_back_another(client: redis.Redis, store: Store, clock: Clock) -> None:
    """At most what is in the queues, and one job of each other user, goes before."""
    store.set_options(fairness=True, share=0)
    slots = 4
    offer(store, slots=slots)
    backlog = [f"low_a:ann:m{number}" for number in range(2000)]
    store.enqueue([Enqueue(job_id) for job_id in backlog])
    assert _start_all(client, store, 40) == backlog[:40]
    clock.advance(1)
    late = enqueue(store, "low_b", "bob", "late")
    order = _start_all(client, store, slots + 2)
    assert late in order
    assert_consistent(client, store)
    assert [job_id for job_id in order if job_id != late] == backlog[40 : 40 + slots + 1], "first come first served for each user"


@pytest.mark.usefixtures("definitions")
def test_turns_go_round(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Each user with work has one job in each round, whatever their definitions, and each user's own order stays."""
    store.set_options(fairness=True, share=0)
    counts = {"ann": 9, "bob": 3, "cyd": 5}
    ids = [f"{('low_a', 'low_b')[number % 2]}:{user}:m{number}" for user, count in counts.items() for number in range(count)]
    store.enqueue([Enqueue(job_id) for job_id in ids])
    offer(store, slots=2)
    store.release()
    order = _start_all(client, store, len(ids))
    # the one that was released before the second round came, then three by three
    assert [sorted(_users(order[first : first + 3])) for first in (0, 3, 6)] == [["ann", "bob", "cyd"]] * 3
    assert [sorted(_users(order[first : first + 2])) for first in (9, 11)] == [["ann", "cyd"]] * 2
    assert _users(order[13:]) == ["ann"] * 4
    for user in counts:
        assert [job_id for job_id in order if f":{user}:" in job_id] == [job_id for job_id in ids if f":{user}:" in job_id]
    assert_consistent(client, store)
    assert_idle(client)


@pytest.mark.usefixtures("definitions")
def test_turns_stay_inside_a_priority(client: redis.Redis, store: Store) -> None:
    store.set_options(fairness=True, share=0)
    low = enqueue(store, "low_a", "bob", "low")
    high = [enqueue(store, "high_a", "ann", f"m{number}") for number in range(20)]
    offer(store, slots=1)
    store.release()
    order = _start_all(client, store, 21)
    assert order == [*high, low]


@pytest.mark.usefixtures("definitions")
def test_who_was_away_has_saved_up_nothing(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.set_options(fairness=True, share=0)
    offer(store, slots=1)
    store.enqueue([Enqueue(f"low_a:ann:m{number}") for number in range(60)])
    _start_all(client, store, 40)
    clock.advance(10)
    store.enqueue([Enqueue(f"low_a:bob:m{number}") for number in range(20)])
    order = _users(_start_all(client, store, 40))
    for end in range(2, 41):
        assert abs(order[:end].count("ann") - order[:end].count("bob")) <= 2, order[:end]


@pytest.mark.usefixtures("definitions")
def test_turns_are_switched_on_and_off_with_a_backlog(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Nothing is lost, and the order of each user stays; without turns it is that of submission again."""
    rng = random.Random(4)
    ids = [f"low_{rng.choice('ab')}:{rng.choice(['ann', 'ann', 'ann', 'bob', 'cyd'])}:m{number}" for number in range(260)]
    store.enqueue([Enqueue(job_id) for job_id in ids])
    store.pause_definition("low_b", why="test", actor=ACTOR)
    offer(store, slots=3)
    store.release()
    order = _start_all(client, store, 30)
    for fair in (True, False, True):
        store.set_options(fairness=fair, share=0)
        assert_consistent(client, store)
        order += _start_all(client, store, 25)
        assert_consistent(client, store)
    store.resume_definition("low_b", actor=ACTOR)
    store.set_options(fairness=False, share=0)
    store.release()
    rest = _start_all(client, store, len(ids) - len(order))
    assert sorted([*order, *rest]) == sorted(ids)
    # up to three had been released, and waited in the queue, when turns ended
    assert sorted(rest[3:], key=ids.index) == rest[3:]
    for user in ("ann", "bob", "cyd"):
        mine = [job_id for job_id in order if job_id.startswith(f"low_a:{user}:")]
        assert mine == sorted(mine, key=ids.index)
    assert_idle(client)


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("fair", [False, True])
def test_a_share_reaches_the_low_ones_under_a_permanent_backlog(client: redis.Redis, store: Store, fair: bool) -> None:
    """5 % of any 1000 releases in a row, one more or less, and each lower priority has its own."""
    store.set_options(fairness=fair, share=0.05)
    for name, user, count in (("high_a", "ann", 1500), ("medium_a", "ann", 120), ("low_a", "bob", 120)):
        store.enqueue([Enqueue(f"{name}:{user}:m{number}") for number in range(count)])
    # the queue of the high ones takes so many, the share of the others included
    offer(store, slots=1500)
    while len(queue(client, HIGH)) < 1500:
        assert store.release()[0]
    order = [message.job_id.split("_")[0] for message in queue(client, HIGH)]
    assert_consistent(client, store)
    for first in range(0, 501):
        for lower in ("medium", "low"):
            assert 49 <= order[first : first + 1000].count(lower) <= 51, f"{lower} from {first}"
    assert store.job("low_a:bob:m5").priority is LOW


@pytest.mark.usefixtures("definitions")
def test_an_idle_priority_saves_up_no_share(client: redis.Redis, store: Store) -> None:
    store.set_options(fairness=False, share=0.1)
    store.enqueue([Enqueue(f"high_a:ann:m{number}") for number in range(400)])
    offer(store, slots=1)
    store.release()
    assert {job_id.split("_")[0] for job_id in _start_all(client, store, 200)} == {"high"}
    store.enqueue([Enqueue(f"low_a:ann:m{number}") for number in range(50)])
    # a worker of one slot finds at once the low one that its own queue holds, and then each tenth
    order = [job_id.split("_")[0] for job_id in _start_all(client, store, 100)]
    assert order.count("low") <= 11
    assert order[:20].count("low") <= 3


@pytest.mark.usefixtures("definitions")
def test_without_a_share_priority_is_strict_again(client: redis.Redis, store: Store) -> None:
    store.set_options(fairness=False, share=0.2)
    store.enqueue([Enqueue(f"high_a:ann:m{number}") for number in range(200)])
    store.enqueue([Enqueue(f"low_a:bob:m{number}") for number in range(50)])
    offer(store, slots=1)
    store.release()
    order = [job_id.split("_")[0] for job_id in _start_all(client, store, 50)]
    assert 9 <= order.count("low") <= 11
    store.set_options(fairness=False, share=0)
    order = [job_id.split("_")[0] for job_id in _start_all(client, store, 50)]
    assert order[1:] == ["high"] * 49
    assert_consistent(client, store)
