"""A change of priority reaches everything that waits: of a job, and of a definition by a new catalogue."""

from __future__ import annotations

from datetime import timedelta

import pytest
import redis

from taskplatform.model import JobState, Limit, Priority
from taskplatform.planner import Planner
from taskplatform.store import Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, assert_consistent, define, enqueue, offer, publish, queue, subscribe, take

HIGH, MEDIUM, LOW = Priority


@pytest.fixture
def waiting(store: Store, clock: Clock) -> list[str]:
    """Five low jobs: due, due later, of a paused user, of a user at the cap, and one that was given its priority by hand."""
    publish(store, define("report", priority="low"))
    store.create_users(["ann", "bob", "cyd"], actor=ACTOR)
    store.pause_user("bob", actor=ACTOR)
    ids = [enqueue(store, "report", "ann", "due"), enqueue(store, "report", "ann", "later", delay_ms=60_000)]
    ids += [enqueue(store, "report", "bob", "held"), enqueue(store, "report", "cyd", "first"), enqueue(store, "report", "cyd", "capped")]
    ids.append(enqueue(store, "report", "ann", "own", priority=LOW))
    return ids


@pytest.mark.parametrize("fairness", [False, True])
def test_a_definition_with_another_priority(client: redis.Redis, store: Store, clock: Clock, waiting: list[str], fairness: bool) -> None:
    due, later, held, first, capped, own = waiting
    store.set_options(fairness=fairness, share=0)
    store.set_limit("user:cyd", Limit(concurrency=1), actor=ACTOR)
    offer(store, slots=3)
    store.release()
    # what a worker is about to run is left to it; one is set aside for its user's cap
    assert [message.job_id for message in queue(client, LOW)] == [due, first, own]
    assert store.waiting()[LOW] == 2
    Planner(store, {"report": define("report", priority="high")}, horizon=HORIZON, batch=10).lead()
    assert {job_id: store.job(job_id).priority for job_id in (later, own)} == {later: HIGH, own: LOW}
    assert store.history(later)[-1].reason == "priority high, as its definition has it"
    # those that are set aside follow when they come back
    store.resume_user("bob", actor=ACTOR)
    assert store.job(held).priority is HIGH
    message = take(client, HIGH)
    assert message.job_id == held
    for each in (message, *(take(client, LOW) for _ in range(3))):
        assert store.start(each.job_id, delivery=each.delivery, worker="w1").go
        store.finish(each.job_id, delivery=each.delivery, worker="w1", state=JobState.COMPLETED, reason="done")
    assert store.job(capped).priority is HIGH
    assert [message.job_id for message in queue(client, HIGH)] == [capped]
    assert_consistent(client, store)
    clock.advance(60)
    store.release()
    assert [message.job_id for message in queue(client, HIGH)] == [capped, later]


def test_a_retry_follows_its_definition(client: redis.Redis, store: Store) -> None:
    publish(store, define("report", priority="low"))
    store.create_users(["ann"], actor=ACTOR)
    job_id = enqueue(store, "report", "ann")
    offer(store)
    store.release()
    store.start(job_id, delivery=1, worker="w1")
    publish(store, define("report", priority="high"))
    store.finish(job_id, delivery=1, worker="w1", state=JobState.RETRYING, reason="busy", retry_in=timedelta(seconds=1))
    assert store.job(job_id).priority is HIGH
    assert_consistent(client, store)


def test_more_than_a_batch_follows(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Those with a priority of their own stand between and stay."""
    definition = define("report", priority="medium", window=0)
    publish(store, definition)
    users = [f"u{number}" for number in range(1100)]
    store.create_users(users, actor=ACTOR)
    own = [enqueue(store, "report", user, "own", delay_ms=5000, priority=MEDIUM) for user in users[:600]]
    for user in users:
        enqueue(store, "report", user, "m1", delay_ms=5000)
    publish(store, define("report", priority="low", window=0))
    assert store.follow_priority("report", LOW) == len(users)
    assert store.waiting() == {HIGH: 0, MEDIUM: len(own), LOW: len(users)}
    assert_consistent(client, store)


def test_one_job(client: redis.Redis, store: Store, clock: Clock) -> None:
    """It overtakes those of its new priority that are due later or were submitted later, and follows its definition no more."""
    publish(store, define("report", priority="low"))
    store.create_users(["ann"], actor=ACTOR)
    subscribe(store, "ann", "report")
    first = enqueue(store, "report", "ann", "m1")
    second = enqueue(store, "report", "ann", "m2", priority=HIGH)
    assert store.prioritize(first, HIGH, reason="it is urgent") is JobState.PENDING
    assert (store.job(first).priority, store.job(first).reason) == (HIGH, "it is urgent")
    publish(store, define("report", priority="medium"))
    assert store.follow_priority("report", MEDIUM) == 0
    offer(store)
    store.release()
    assert [message.job_id for message in queue(client, HIGH)] == [first, second]
    assert store.prioritize(first, LOW, reason="too late") is JobState.QUEUED
    assert store.job(first).priority is HIGH
    assert_consistent(client, store)
