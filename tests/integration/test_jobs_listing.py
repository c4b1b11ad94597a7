"""What can be asked for: jobs, users and subscribers in pages, counts; and what is forgotten when."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import redis

from taskplatform.errors import InvalidInput, UnknownJob, UnknownSubscription, UnknownUser
from taskplatform.model import Job, JobState, Priority, slot
from taskplatform.planner import Planner
from taskplatform.store import Enqueue, Page, Store, SubscribeResult
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, assert_consistent, define, enqueue, offer, publish, subscribe, take

S = JobState
NAMES = ("alpha", "beta", "gamma")
USERS = ("ann", "bob", "cyd", "dan")


@pytest.fixture(autouse=True)
def _published(store: Store) -> None:
    publish(store, *(define(name) for name in NAMES))
    store.create_users(USERS, actor=ACTOR)


def pages(read: Callable[..., Page[Any]], *, limit: int, between: Callable[[], object] = lambda: None, **filters: Any) -> list[Any]:
    """All items of a listing, read page by page."""
    found: list[Any] = []
    cursor: str | None = None
    while True:
        page = read(cursor=cursor, limit=limit, **filters)
        assert len(page.items) <= limit
        found += page.items
        cursor = page.cursor
        if cursor is None:
            return found
        assert len(page.items) == limit, "only the last page may be short"
        between()


def newest_first(jobs: list[Job]) -> list[str]:
    return [job.id for job in sorted(jobs, key=lambda job: (job.created_ms, job.id), reverse=True)]


def fill(store: Store, clock: Clock, count: int, *, step: float = 0.0) -> list[str]:
    """So many jobs, `step` seconds apart."""
    ids = []
    for number in range(count):
        ids.append(enqueue(store, NAMES[number % 3], USERS[number % 4], f"m{number:04}"))
        clock.advance(step)
    return ids


# --- jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
@pytest.mark.parametrize("step", [0.0, 0.001])
def test_pages_hold_each_job_once_the_newest_first(store: Store, clock: Clock, limit: int, step: float) -> None:
    """Also where many were made in one millisecond, as the planner does."""
    ids = fill(store, clock, 61, step=step)
    everything = store.jobs_by_id(ids)
    assert [job.id for job in pages(store.jobs, limit=limit)] == newest_first(everything)
    for name in NAMES:
        wanted = [job for job in everything if job.definition == name]
        assert [job.id for job in pages(store.jobs, limit=limit, definition=name)] == newest_first(wanted)
        both = [job for job in wanted if job.user == "ann"]
        assert [job.id for job in pages(store.jobs, limit=limit, definition=name, user="ann")] == newest_first(both)
    for user in USERS:
        wanted = [job for job in everything if job.user == user]
        assert [job.id for job in pages(store.jobs, limit=limit, user=user)] == newest_first(wanted)


def test_pages_over_definitions_of_unequal_size(store: Store, clock: Clock) -> None:
    """One has many jobs in one millisecond; the others' older ones must not come before the rest of it."""
    older = [enqueue(store, "beta", "ann", f"old{number}") for number in range(30)]
    clock.advance(1)
    store.enqueue([Enqueue(f"alpha:ann:m{number:04}") for number in range(300)])
    clock.advance(1)
    newer = [enqueue(store, "gamma", "ann", f"new{number}") for number in range(5)]
    found = [job.id for job in pages(store.jobs, limit=20)]
    assert len(found) == len(set(found)) == 335
    assert sorted(found[:5]) == sorted(newer)
    assert sorted(found[305:]) == sorted(older)


def test_paging_is_stable_while_jobs_come_and_go(client: redis.Redis, store: Store, clock: Clock) -> None:
    ids = fill(store, clock, 90, step=0.001)
    for job_id in ids[:30]:
        store.cancel(job_id, reason="old")
    clock.advance(3600)
    rng = random.Random(7)
    later: list[str] = []

    def meddle() -> None:
        later.append(enqueue(store, rng.choice(NAMES), "ann", f"later{len(later)}"))
        clock.advance(0.001)
        if len(later) == 6:
            store.sweep(retention=timedelta(minutes=1))
        if len(later) == 8:
            store.cancel(ids[70], reason="not wanted")

    found = [job.id for job in pages(store.jobs, limit=7, between=meddle)]
    assert len(found) == len(set(found))
    assert found[:60] == list(reversed(ids[30:])), "what stays is there once, in order; what came later is not"
    assert set(found) <= set(ids)


def test_filters(store: Store, clock: Clock) -> None:
    offer(store, slots=0)
    ids = fill(store, clock, 24, step=1)
    for job_id in ids[::2]:
        store.cancel(job_id, reason="not wanted")
    every = store.jobs_by_id(ids)
    for states in (frozenset({S.CANCELED}), frozenset({S.PENDING}), frozenset({S.PENDING, S.CANCELED}), frozenset({S.FAILED})):
        wanted = [job for job in every if job.state in states]
        assert [job.id for job in pages(store.jobs, limit=5, states=states)] == newest_first(wanted)
    since, until = every[5].created_ms, every[15].created_ms
    wanted = [job for job in every if since <= job.created_ms <= until]
    assert len(wanted) == 11
    assert [job.id for job in pages(store.jobs, limit=4, since_ms=since, until_ms=until)] == newest_first(wanted)
    mixed = [job for job in wanted if job.user == "bob" and job.definition == "beta" and job.state is S.PENDING]
    assert mixed
    found = pages(store.jobs, limit=1, since_ms=since, until_ms=until, user="bob", definition="beta", states=frozenset({S.PENDING}))
    assert [job.id for job in found] == newest_first(mixed)
    assert store.jobs(until_ms=since - 10_000_000).items == ()
    assert store.jobs(user="nobody").items == ()
    assert store.jobs(definition="nothing").items == ()


@pytest.mark.parametrize("cursor", ["x", "12", "|", "12|", "x|alpha:ann:m1", "-1|alpha:ann:m1"])
def test_a_cursor_that_no_listing_gave(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidInput, match="cursor"):
        store.jobs(cursor=cursor)


def test_jobs_by_id_keeps_the_order(store: Store, clock: Clock) -> None:
    ids = fill(store, clock, 10)
    random.Random(1).shuffle(ids)
    assert [job.id for job in store.jobs_by_id([*ids[:5], "alpha:ann:none", *ids[5:]])] == ids
    with pytest.raises(UnknownJob):
        store.job("alpha:ann:none")
    with pytest.raises(UnknownJob):
        store.history("alpha:ann:none")


def test_a_planned_job_says_where_it_is_from(store: Store, clock: Clock) -> None:
    planner = Planner(store, {"alpha": define("alpha")}, horizon=HORIZON, batch=10)
    subscribe(store, "ann", "alpha")
    planner.advance()
    at, _ = store.trigger("alpha", window=timedelta(), actor=ACTOR)
    planner.advance()
    (job,) = store.jobs(user="ann").items
    assert (job.id, job.source, job.occurrence_ms) == (f"alpha:ann:t{at}", "trigger", at)
    assert job.reason == "planned by a trigger"
    by_hand = store.job(enqueue(store, "alpha", "ann", "k1"))
    assert (by_hand.source, by_hand.occurrence_ms, by_hand.reason) == ("api", None, "submitted")


# --- counts ----------------------------------------------------------------------------------------------------------


def test_counts_are_of_transitions(client: redis.Redis, store: Store, clock: Clock) -> None:
    offer(store)
    ids = fill(store, clock, 4)
    store.release()
    assert store.queued() == {Priority.HIGH: 0, Priority.MEDIUM: 4, Priority.LOW: 0}
    for job_id in ids[:3]:
        take(client)
        store.start(job_id, delivery=1, worker="w1")
    assert store.running() == 3
    store.finish(ids[0], delivery=1, worker="w1", state=S.COMPLETED, reason="done")
    store.finish(ids[1], delivery=1, worker="w1", state=S.RETRYING, reason="busy", retry_in=timedelta(seconds=9))
    store.cancel(ids[2], reason="not wanted")
    store.retry(ids[2], reason="once more")
    counts = {state: count for state, count in store.counts().items() if count}
    assert counts == {S.PENDING: 5, S.QUEUED: 5, S.ASSIGNED: 3, S.RUNNING: 3, S.COMPLETED: 1, S.RETRYING: 1, S.CANCELED: 1}
    assert store.waiting() == {Priority.HIGH: 0, Priority.MEDIUM: 1, Priority.LOW: 0}
    assert store.running() == 0
    assert_consistent(client, store)


# --- what is forgotten -----------------------------------------------------------------------------------------------


def test_sweep_forgets_what_ended_long_ago_and_nothing_else(client: redis.Redis, store: Store, clock: Clock) -> None:
    offer(store, slots=0)
    ids = fill(store, clock, 40)
    for job_id in ids[:10]:
        store.cancel(job_id, reason="first")
    clock.advance(100)
    for job_id in ids[10:20]:
        store.cancel(job_id, reason="second")
    clock.advance(100)
    assert store.sweep(retention=timedelta(seconds=201)) == 0
    assert store.sweep(retention=timedelta(seconds=200), limit=4) == 4
    assert_consistent(client, store, complete=False)
    assert store.sweep(retention=timedelta(seconds=200), limit=100) == 6
    assert store.sweep(retention=timedelta(seconds=200)) == 0
    assert {job.id for job in store.jobs().items} == set(ids[10:])
    with pytest.raises(UnknownJob):
        store.job(ids[0])
    assert_consistent(client, store, complete=False)
    # one that was retried is not old any more
    store.retry(ids[10], reason="once more")
    clock.advance(1_000_000)
    store.sweep(retention=timedelta(seconds=1))
    assert {job.id for job in store.jobs().items} == {ids[10], *ids[20:]}
    assert_consistent(client, store, complete=False)
    # and the id may be used again
    assert store.enqueue([Enqueue(ids[0])]) == [True]


def test_sweep_forgets_occurrences(client: redis.Redis, store: Store, clock: Clock) -> None:
    definition = define("alpha", interval={"type": "minutely"}, window=0)
    publish(store, definition)
    planner = Planner(store, {"alpha": definition}, horizon=HORIZON, batch=10)
    subscribe(store, "ann", "alpha")
    for _ in range(30):
        clock.advance(10)
        planner.advance()
    assert len(store.occurrences("alpha")) == 5
    assert len(store.occurrences("alpha", limit=2)) == 2
    swept = store.sweep(retention=timedelta(seconds=150))
    left = store.occurrences("alpha")
    assert swept == 5 - len(left)
    assert 1 <= len(left) <= 3
    assert_consistent(client, store)
    # the cursor, not the record, is what keeps an occurrence from being planned again
    before = {job.id for job in store.jobs().items}
    store.sweep(retention=timedelta())
    planner.advance()
    assert {job.id for job in store.jobs().items} == before
    assert_consistent(client, store)


# --- users -----------------------------------------------------------------------------------------------------------


def test_users_in_pages(client: redis.Redis, store: Store, clock: Clock) -> None:
    names = [f"user{number:03}" for number in range(50)]
    assert store.create_users([*names, *names[:5]], actor=ACTOR) == 50
    assert store.create_user("user000", actor=ACTOR) is False
    assert store.create_user("zoe", name="Zoë Ünal", actor=ACTOR) is True
    everybody = sorted([*names, *USERS, "zoe"])
    assert store.count_users() == len(everybody)
    for limit in (1, 7, 55, 100):
        assert [user.id for user in pages(store.users, limit=limit)] == everybody
    gone: list[str] = []

    def meddle() -> None:
        # one that was seen, one that was not, and one that is new
        for name in (names[len(gone)], names[-1 - len(gone)]):
            gone.append(name)
            store.delete_user(name, actor=ACTOR)
        store.create_user(f"aaa{len(gone)}", actor=ACTOR)

    found = [user.id for user in pages(store.users, limit=10, between=meddle)]
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert set(everybody) - set(gone) <= set(found)
    zoe = store.user("zoe")
    assert (zoe.name, zoe.paused, zoe.created_ms) == ("Zoë Ünal", False, clock.now_ms)
    assert store.missing_users(["ann", "nobody", "ann"]) == {"nobody"}
    for verb in (store.user, store.subscriptions_of):
        with pytest.raises(UnknownUser):
            verb("nobody")
    assert_consistent(client, store)


# --- subscribers -----------------------------------------------------------------------------------------------------


def test_subscribers_in_pages_while_they_come_and_go(client: redis.Redis, store: Store) -> None:
    names = [f"user{number:03}" for number in range(60)]
    store.create_users(names, actor=ACTOR)
    own: dict[str, Any] = {"schedule": define(interval={"type": "weekly"}).schedule, "own_schedule": True}
    for number, name in enumerate(names):
        subscribe(store, name, "alpha", **(own if number % 3 == 0 else {}))
    # who moves is in two groups until the last moment in the old one has passed, and yet one subscriber
    movers = names[1:20:3]
    for name in movers:
        assert subscribe(store, name, "alpha", **own) is SubscribeResult.CHANGED
    assert store.count_subscribers("alpha") == 60
    for limit in (1, 7, 60, 100):
        assert sorted(pages(lambda **page: store.subscribers_of("alpha", **page), limit=limit)) == names
    page = store.subscribers_of("alpha", limit=100)
    default = [name for number, name in enumerate(names) if number % 3 and name not in movers]
    assert list(page.items[: len(default)]) == sorted(default, key=lambda name: slot(name, "alpha"))
    seen: list[str] = []
    left: list[str] = []

    def read(**page: Any) -> Page[str]:
        found = store.subscribers_of("alpha", **page)
        seen.extend(found.items)
        return found

    def meddle() -> None:
        for name in (seen[0], seen[-1], next(name for name in names if name not in [*seen, *left])):
            if name not in left:
                left.append(name)
                store.unsubscribe(name, "alpha", actor=ACTOR)

    found = pages(read, limit=9, between=meddle)
    assert len(set(found)) == len(found)
    assert set(names) - set(left) <= set(found)
    assert store.count_subscribers("alpha") == 60 - len(left)
    assert store.count_subscribers("beta") == 0
    assert_consistent(client, store)


@pytest.mark.parametrize("cursor", ["x", "|", "alpha|", "alpha|no id", "|ann"])
def test_a_subscribers_cursor_that_no_listing_gave(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidInput, match="cursor"):
        store.subscribers_of("alpha", cursor=cursor)


# --- subscriptions ---------------------------------------------------------------------------------------------------


def test_a_subscription_is_what_was_last_said(client: redis.Redis, store: Store, clock: Clock) -> None:
    schedule = define(interval={"type": "weekly"}).schedule
    assert subscribe(store, "ann", "alpha") is SubscribeResult.CREATED
    assert subscribe(store, "ann", "alpha") is SubscribeResult.UNCHANGED
    assert subscribe(store, "ann", "alpha", params={"a": 1}) is SubscribeResult.CHANGED
    assert subscribe(store, "ann", "alpha", own_schedule=None) is SubscribeResult.UNCHANGED
    clock.advance(60)
    assert subscribe(store, "ann", "alpha", own_schedule=True, schedule=schedule) is SubscribeResult.CHANGED
    found = store.subscription("ann", "alpha")
    assert (found.params, found.schedule, found.enabled, found.paused) == ({"a": 1}, schedule, True, False)
    assert found.since_ms == clock.now_ms + HORIZON / timedelta(milliseconds=1)
    assert subscribe(store, "ann", "alpha", own_schedule=None, enabled=False) is SubscribeResult.CHANGED
    store.pause_subscription("ann", "alpha", actor=ACTOR)
    found = store.subscription("ann", "alpha")
    assert (found.params, found.schedule, found.enabled, found.paused) == ({"a": 1}, schedule, False, True)
    assert subscribe(store, "ann", "alpha", params={}) is SubscribeResult.CHANGED
    assert store.subscription("ann", "alpha").params == {}
    assert store.subscription("ann", "alpha").schedule is None
    assert store.subscription_params([("ann", "alpha"), ("bob", "alpha")]) == {}
    assert subscribe(store, "nobody", "alpha") is SubscribeResult.UNKNOWN_USER
    assert subscribe(store, "ann", "nothing") is SubscribeResult.UNKNOWN_DEFINITION
    subscribe(store, "ann", "gamma", params={"b": []})
    assert [one.definition for one in store.subscriptions_of("ann")] == ["alpha", "gamma"]
    assert store.subscription_params([("ann", "alpha"), ("ann", "gamma")]) == {("ann", "gamma"): {"b": []}}
    for verb in (store.pause_subscription, store.resume_subscription, store.unsubscribe):
        with pytest.raises(UnknownUser):
            verb("nobody", "alpha", actor=ACTOR)
        with pytest.raises(UnknownSubscription):
            verb("bob", "alpha", actor=ACTOR)
    with pytest.raises(UnknownSubscription):
        store.subscription("ann", "@created")
    kinds = Counter(change.kind for change in store.changes())
    assert kinds["subscribed"] == 2
    assert kinds["subscription changed"] == 4
    assert kinds["subscription paused"] == 1
    assert_consistent(client, store)


@pytest.mark.parametrize("end", ["unsubscribe", "disable", "delete"])
def test_the_end_of_a_subscription_cancels_what_waits_of_it(client: redis.Redis, store: Store, clock: Clock, end: str) -> None:
    planner = Planner(store, {"alpha": define("alpha")}, horizon=HORIZON, batch=10)
    for user in ("ann", "bob"):
        subscribe(store, user, "alpha")
    planner.advance()
    offer(store, slots=1)
    for _ in range(3):
        clock.advance(1)
        store.trigger("alpha", window=timedelta(), actor=ACTOR)
        planner.advance()
    store.release()
    running = take(client)
    store.start(running.job_id, delivery=1, worker="w1")
    by_hand = enqueue(store, "alpha", running.user, "m1")
    planned = {job.id for job in store.jobs(user=running.user).items} - {running.job_id, by_hand}
    assert len(planned) == 2
    other = {job.id: job.state for job in store.jobs().items if job.user != running.user}
    if end == "unsubscribe":
        assert store.unsubscribe(running.user, "alpha", actor=ACTOR) == 2
    elif end == "disable":
        subscribe(store, running.user, "alpha", own_schedule=None, enabled=False)
    else:
        assert store.delete_user(running.user, actor=ACTOR) == (4, 1)
        assert store.jobs(user=running.user).items == ()
        with pytest.raises(UnknownUser):
            store.delete_user(running.user, actor=ACTOR)
    assert {job.id: job.state for job in store.jobs().items if job.user != running.user}.keys() == other.keys()
    if end != "delete":
        assert {store.job(job_id).state for job_id in planned} == {S.CANCELED}
        assert store.job(running.job_id).state is S.RUNNING
        assert not store.job(by_hand).state.terminal
        what = {"unsubscribe": "unsubscribed by test", "disable": "subscription disabled by test"}[end]
        assert {store.job(job_id).reason for job_id in planned} == {what}
    assert_consistent(client, store, complete=end != "delete")


# --- definitions -----------------------------------------------------------------------------------------------------


def test_publishing_is_logged_once(client: redis.Redis, store: Store) -> None:
    before = len(store.changes())
    publish(store, define("alpha"))
    assert len(store.changes()) == before
    (old,) = store.versions(["alpha"])
    publish(store, define("alpha", priority="high", rate_limit="5/s"))
    (new,) = store.versions(["alpha"])
    change = store.changes(limit=1)[0]
    assert (change.kind, change.subject) == ("definition changed", "alpha")
    assert sorted(change.detail.split(", ")) == ["limit", "priority", f"version {old} -> {new}"]
    publish(store, define("alpha", priority="high"))
    assert store.limits() == {}
    assert_consistent(client, store)
