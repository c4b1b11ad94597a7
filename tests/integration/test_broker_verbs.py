"""What a worker does with a message that it cannot take: it gives a job back, and sets aside what is none."""

from __future__ import annotations

from datetime import timedelta

import pytest
import redis

from taskplatform.model import JobState
from taskplatform.store import Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, assert_consistent, assert_idle, define, enqueue, offer, publish, queue, take

WHY = "worker w1 does not know definition report"


@pytest.fixture
def job(store: Store) -> str:
    """A job that has been released, and whose message a worker has taken."""
    publish(store, define("report", rate_limit="100/s", concurrency=5, retries=3))
    store.create_user("u1", actor=ACTOR)
    offer(store)
    job_id = enqueue(store)
    store.release()
    return job_id


def refuse(store: Store, job_id: str, delivery: int) -> str:
    return store.refuse(job_id, delivery=delivery, worker="w1", why=WHY)


def test_a_refused_delivery_waits_and_goes_to_another(client: redis.Redis, store: Store, clock: Clock, job: str) -> None:
    taken = take(client)
    assert refuse(store, job, taken.delivery) == "given back"
    assert_consistent(client, store)
    assert (store.job(job).state, store.job(job).attempt) == (JobState.PENDING, 0)
    assert store.history(job)[-1].reason == f"{WHY}: given back"
    assert store.history(job)[-1].worker == "w1"
    clock.advance(4.9)
    assert store.release()[0] == 0
    clock.advance(0.1)
    assert store.release()[0] == 1
    again = take(client)
    assert again.delivery == taken.delivery + 1
    assert not store.start(job, delivery=taken.delivery, worker="w1").go
    start = store.start(job, delivery=again.delivery, worker="w2")
    assert (start.go, start.attempt) == (True, 1)
    assert store.counters()["refused"] == 1
    assert_consistent(client, store)


def test_a_refusal_costs_no_retry(client: redis.Redis, store: Store, clock: Clock, job: str) -> None:
    first = take(client)
    assert store.start(job, delivery=first.delivery, worker="w2").go
    store.finish(job, delivery=first.delivery, worker="w2", state=JobState.RETRYING, reason="no", retry_in=timedelta(seconds=1))
    clock.advance(1)
    store.release()
    assert refuse(store, job, take(client).delivery) == "given back"
    assert store.job(job).state is JobState.RETRYING
    clock.advance(5)
    store.release()
    start = store.start(job, delivery=take(client).delivery, worker="w2")
    assert (start.attempt, start.failures) == (2, 1)
    assert_consistent(client, store)


def test_what_nobody_takes_is_rejected_in_the_end(client: redis.Redis, store: Store, clock: Clock, job: str) -> None:
    began = clock.now_ms
    for number in range(1, 20):
        assert refuse(store, job, take(client).delivery) == "given back"
        clock.advance(5 * number)
        assert store.release()[0] == 1
    assert refuse(store, job, take(client).delivery) == "rejected"
    assert store.job(job).state is JobState.REJECTED
    assert store.job(job).reason == f"{WHY}; given back 20 times"
    assert clock.now_ms - began == 5 * 190 * 1000
    assert_consistent(client, store)
    assert_idle(client)
    # by hand, it has all its chances again
    store.retry(job, reason="now it is known")
    store.release()
    assert refuse(store, job, take(client).delivery) == "given back"


def test_a_refusal_of_what_is_not_current_changes_nothing(client: redis.Redis, store: Store, job: str) -> None:
    delivery = take(client).delivery
    assert refuse(store, job, delivery + 1) == "queued"
    assert refuse(store, job, delivery) == "given back"
    assert refuse(store, job, delivery) == "pending"
    assert refuse(store, "report:u1:none", 1) == "unknown"
    assert refuse(store, "none", 1) == "unknown"
    assert store.counters()["refused"] == 1


def test_a_job_whose_definition_has_gone_is_rejected_at_once(client: redis.Redis, store: Store, job: str) -> None:
    delivery = take(client).delivery
    store.retract("report", actor=ACTOR)
    assert refuse(store, job, delivery) == "rejected"
    assert store.job(job).reason == "definition report does not exist any more"
    assert_consistent(client, store)


def test_what_is_set_aside_is_kept_and_counted(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.set_aside("high", b"\xff\x00{", reason="not UTF-8", worker="w1")
    clock.advance(1)
    store.set_aside("low", "ä" * 5000 + "\ud800", reason="too long", worker="w2")
    long, binary = store.garbage()
    assert (binary.at_ms, binary.queue, binary.reason, binary.worker, binary.text) == (
        clock.now_ms - 1000,
        "high",
        "not UTF-8",
        "w1",
        "\\xff\x00{",
    )
    assert long.text == "ä" * 2048
    assert [one.queue for one in store.garbage(limit=1)] == ["low"]
    assert store.counters()["garbage"] == 2
    assert_consistent(client, store)


def test_the_newest_are_kept(store: Store) -> None:
    for number in range(1003):
        store.set_aside("low", str(number), reason="no", worker="w1")
    assert [one.text for one in store.garbage(limit=2000)] == [str(number) for number in range(1002, 2, -1)]
    assert store.clear_garbage() == 1000
    assert store.clear_garbage() == 0
    assert store.garbage() == []
    assert store.counters()["garbage"] == 1003


def test_heads_of_queues(client: redis.Redis, store: Store, job: str) -> None:
    store.count("deaf")
    assert store.counters()["deaf"] == 1
    first = store.heads(["high", "medium", "low"])
    assert len(first) == 1
    client.rpush("high", b"\xff")
    assert store.heads(["medium", "low"]) == first
    assert store.heads(["high", "medium", "low"]).keys() == {"high", *first}
    assert [message.job_id for message in queue(client, "medium")] == [job]
