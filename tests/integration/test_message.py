"""The release script's message against the one that the installed Celery sends for the same task; and against its readers."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
import redis
from celery import Celery
from celery.worker.request import Request
from kombu import Connection, Consumer, Queue

from taskplatform.local import EmbeddedServer
from taskplatform.message import time_limits
from taskplatform.model import Definition, JobState
from taskplatform.store import Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, define, enqueue, offer, publish

#: Differ by purpose: who sent it, where an answer would go (there is none), and kombu's name for the message.
APART = {"headers": {"origin"}, "properties": {"reply_to", "delivery_tag", "body_encoding"}}
#: What only ours has.
OURS = {"headers": {"delivery"}, "properties": set[str]()}

DEFINITIONS = [
    define("report", priority="high", timeout="30s"),
    define("sync", priority="medium", timeout="10m", max_duration="1m30s", retries=5, rate_limit="10/s"),
    define("backup", priority="low", timeout="2h", max_duration="500ms", backoff={"strategy": "fixed", "base": "1m"}),
]


@pytest.fixture
def celery_app(server: EmbeddedServer) -> Iterator[Celery]:
    """A Celery application as celeryconfig.py makes it, with the definitions as ordinary tasks."""
    app = Celery("reference", set_as_current=False)
    app.config_from_object("celeryconfig")
    app.conf.broker_url = server.url
    app.conf.result_backend = "disabled://"  # the platform's own needs the platform's application
    app.conf.task_routes = {definition.id: {"queue": definition.priority.value} for definition in DEFINITIONS}
    yield app
    app.close()


def reference_task(app: Celery, definition: Definition) -> Any:
    """A task with the options that the platform's own application gives the definition's."""

    def report(user: str) -> str:
        return user

    hard, soft = time_limits(definition)
    limit = definition.rate_limit
    return app.task(
        report,
        name=definition.id,
        shared=False,
        time_limit=hard,
        soft_time_limit=soft,
        max_retries=definition.retries,
        rate_limit=f"{math.ceil(limit.per_second)}/s" if limit else None,
    )


def decoded(raw: str) -> dict[str, Any]:
    """A message with its body as a value."""
    message = cast("dict[str, Any]", json.loads(raw))
    encoding = message["properties"].get("body_encoding")
    body = base64.b64decode(message["body"]) if encoding == "base64" else message["body"]
    return {**message, "body": json.loads(body)}


def popped(client: redis.Redis, definition: Definition) -> str:
    assert client.llen(definition.priority.value) == 1
    return cast("str", client.rpop(definition.priority.value))


def released(
    client: redis.Redis, store: Store, clock: Clock, definition: Definition, user: str = "u1", *, runs: int = 0
) -> tuple[str, str]:
    """(job id, message) of a job that ran so many times before."""
    publish(store, definition)
    store.create_user(user, actor=ACTOR)
    offer(store)
    job_id = enqueue(store, definition.id, user)
    for delivery in range(1, runs + 1):
        popped(client, definition)
        store.start(job_id, delivery=delivery, worker="w1")
        store.finish(job_id, delivery=delivery, worker="w1", state=JobState.RETRYING, reason="busy")
        clock.advance(1)
        store.release()
    return job_id, popped(client, definition)


@pytest.mark.parametrize("runs", [0, 2])
@pytest.mark.parametrize("user", ["u1", "a.b_c@d+e-f"])
@pytest.mark.parametrize("definition", DEFINITIONS, ids=[definition.id for definition in DEFINITIONS])
def test_the_message_equals_what_apply_async_sends(
    client: redis.Redis, store: Store, clock: Clock, celery_app: Celery, definition: Definition, user: str, runs: int
) -> None:
    job_id, raw = released(client, store, clock, definition, user, runs=runs)
    reference_task(celery_app, definition).apply_async(kwargs={"user": user}, task_id=job_id, retries=runs)
    theirs, ours = decoded(popped(client, definition)), decoded(raw)
    for part, names in APART.items():
        for name in names:
            theirs[part].pop(name, None)
            ours[part].pop(name, None)
    for part, names in OURS.items():
        for name in names:
            assert name not in theirs[part], "Celery has a field of this name by now"
            del ours[part][name]
    assert ours == theirs
    assert list(ours) == list(theirs), "in the same order, so that what reads by position does too"


def test_limits_and_names_are_the_definitions(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id, raw = released(client, store, clock, DEFINITIONS[1])
    headers = decoded(raw)["headers"]
    assert (headers["task"], headers["id"], headers["ignore_result"]) == ("sync", job_id, True)
    assert headers["timelimit"] == [600.0, 90.0]


@pytest.mark.parametrize("definition", DEFINITIONS, ids=[definition.id for definition in DEFINITIONS])
def test_kombu_and_a_celery_worker_read_it(
    client: redis.Redis, server: EmbeddedServer, store: Store, clock: Clock, celery_app: Celery, definition: Definition
) -> None:
    job_id, raw = released(client, store, clock, definition)
    reference_task(celery_app, definition)
    priority = definition.priority.value
    client.lpush(priority, raw)
    received: list[Any] = []
    with Connection(server.url) as connection:
        consumer = Consumer(connection, queues=[Queue(priority, routing_key=priority)], accept=["json"], on_message=received.append)
        with consumer:
            connection.drain_events(timeout=60)
        (message,) = received
        assert message.payload == [[], {"user": "u1"}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
        assert message.headers["delivery"] == 1
        assert message.properties["correlation_id"] == job_id
        # under this name kombu keeps what is not acknowledged, and the scripts forget it
        assert message.delivery_tag == f"{job_id}#1"
        assert client.hkeys("unacked") == [f"{job_id}#1"]
        request = Request(message, app=celery_app, hostname="w1@here", eventer=None, task=celery_app.tasks[definition.id])
        assert (request.id, request.name, request.kwargs) == (job_id, definition.id, {"user": "u1"})
        assert tuple(request.time_limits) == time_limits(definition)
        assert request.delivery_info["routing_key"] == priority
        assert request.request_dict["delivery"] == 1
        message.ack()
        assert client.exists("unacked") == 0


def test_reclaim_forgets_what_kombu_keeps_of_a_lost_worker(client: redis.Redis, server: EmbeddedServer, store: Store, clock: Clock) -> None:
    """Else Celery would bring the stale message back after its visibility timeout."""
    job_id, raw = released(client, store, clock, DEFINITIONS[0])
    client.lpush("high", raw)
    with Connection(server.url) as connection:
        channel = connection.channel()
        channel.basic_consume("high", no_ack=False, callback=lambda _: None, consumer_tag="t")
        connection.drain_events(timeout=60)
        assert client.hlen("unacked") == 1
        clock.advance(20)
        assert store.reclaim(patience=timedelta(seconds=15)) == [job_id]
        assert client.exists("unacked", "unacked_index") == 0
        # the worker lives after all and puts back what it holds: there is nothing left
        channel.qos.restore_unacked_once()
        channel.close()
    assert client.llen("high") == 1
