"""What a worker's channel keeps of the messages that it holds, with the installed kombu and a real server."""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from kombu import Connection

from taskplatform.consumer import JobTransport, PlatformConsumer
from taskplatform.hearing import Hearing
from taskplatform.local import EmbeddedServer, embedded_server
from taskplatform.store import Store, connect
from tests.conftest import Clock
from tests.integration.harness import ACTOR, define, enqueue, offer, publish
from tests.support import wait_until

QUEUE = "high"
DEFINITION = define("report", priority=QUEUE)


def release_jobs(store: Store, clock: Clock, count: int) -> list[str]:
    """Job ids, in the order in which their messages are to be taken."""
    publish(store, DEFINITION)
    store.create_user("u1", actor=ACTOR)
    offer(store, slots=10)
    jobs = []
    for number in range(count):
        jobs.append(enqueue(store, DEFINITION.id, "u1", f"m{number}"))
        clock.advance(1)
    store.release()
    return jobs


def send_other(client: redis.Redis, *, body: str = "[[], {}, {}]") -> str:
    """A message as kombu makes it for any other task; returns its tag."""
    tag = str(uuid.uuid4())
    properties = {"delivery_info": {"exchange": "", "routing_key": QUEUE}, "delivery_tag": tag, "priority": 0}
    headers = {"task": "other", "id": tag}
    message = {"body": body, "content-type": "application/json", "content-encoding": "utf-8", "headers": headers, "properties": properties}
    client.lpush(QUEUE, json.dumps(message))
    return tag


@contextmanager
def consuming(
    url: str, *, messages: int, prefetch: int = 0, aside: list[tuple[str, bytes | str, str]] | None = None
) -> Iterator[tuple[Any, list[Any]]]:
    """A channel that has taken so many messages, and these. What it set aside goes to `aside`."""
    taken: list[Any] = []
    aside = [] if aside is None else aside
    with Connection(url, transport_options={"priority_steps": [0]}) as connection:
        hearing = Hearing(patience=10, interval=1)
        connection.create_transport = partial(JobTransport, connection, hearing=hearing, set_aside=lambda *told: aside.append(told))
        channel = connection.default_channel
        channel.basic_qos(prefetch_count=prefetch)
        channel.basic_consume(QUEUE, no_ack=False, callback=taken.append, consumer_tag="t")
        while len(taken) < messages:
            connection.drain_events(timeout=60)
        yield channel, taken


def tags(client: redis.Redis) -> list[str]:
    """Of what lies in the queue, next first."""
    return [json.loads(raw)["properties"]["delivery_tag"] for raw in reversed(client.lrange(QUEUE, 0, -1))]


def test_only_messages_of_other_tasks_are_noted(client: redis.Redis, server: EmbeddedServer, store: Store, clock: Clock) -> None:
    (job_id,) = release_jobs(store, clock, 1)
    other = send_other(client)
    with consuming(server.url, messages=2) as (_, taken):
        assert [message.delivery_tag for message in taken] == [f"{job_id}#1", other]
        assert client.hkeys("unacked") == client.zrange("unacked_index", 0, -1) == [other]
        for message in taken:
            message.ack()
        assert client.exists("unacked", "unacked_index") == 0
    assert client.llen(QUEUE) == 0


def test_a_job_that_is_held_takes_a_place(client: redis.Redis, server: EmbeddedServer, store: Store, clock: Clock) -> None:
    release_jobs(store, clock, 3)
    with consuming(server.url, messages=2, prefetch=2) as (channel, taken):
        assert not channel.qos.can_consume()
        taken[0].ack()
        assert channel.qos.can_consume()
        assert channel.qos.can_consume_max_estimate() == 1


def test_what_is_held_goes_back_in_its_old_order(client: redis.Redis, server: EmbeddedServer, store: Store, clock: Clock) -> None:
    jobs = release_jobs(store, clock, 4)
    before = client.lrange(QUEUE, 0, -1)
    with consuming(server.url, messages=3) as (_, taken):
        taken[0].ack()
        assert client.llen(QUEUE) == 1
    assert client.lrange(QUEUE, 0, -1) == before[:3]
    assert tags(client) == [f"{job_id}#1" for job_id in jobs[1:]]
    # and starts there as if it had never been away
    assert store.start(jobs[1], delivery=1, worker="w1").go


def test_other_messages_go_back_too(client: redis.Redis, server: EmbeddedServer) -> None:
    other = send_other(client)
    with consuming(server.url, messages=1):
        pass
    assert tags(client) == [other]
    assert client.exists("unacked", "unacked_index") == 0


def test_a_refused_message_goes_behind_the_others(client: redis.Redis, server: EmbeddedServer, store: Store, clock: Clock) -> None:
    jobs = release_jobs(store, clock, 3)
    with consuming(server.url, messages=2) as (_, taken):
        taken[0].reject()
        taken[1].requeue()
        assert tags(client) == [f"{jobs[2]}#1", f"{jobs[1]}#1"]
    assert tags(client) == [f"{jobs[2]}#1", f"{jobs[1]}#1"]


def test_without_a_server_nothing_is_put_back_and_nothing_breaks(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """kombu would write the messages to a temporary file; here the ledger has them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with embedded_server(tmp_path / "valkey") as server:
        client = connect(server.url)
        (job_id,) = release_jobs(Store(client, clock=clock), clock, 1)
        client.close()
        with consuming(server.url, messages=1) as (_, (message,)):
            server.kill()
            before = sorted(tmp_path.iterdir())
        # the run goes on, and ends
        message.ack()
    assert sorted(tmp_path.iterdir()) == before
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("not put back")
    assert warnings[0].endswith(f": {job_id}#1")


def test_a_message_that_came_too_late_goes_back_as_it_was(client: redis.Redis, server: EmbeddedServer, store: Store, clock: Clock) -> None:
    """A worker that stops has asked for the next message already, and nobody reads the answer."""
    with consuming(server.url, messages=0) as (channel, taken):
        connection = channel.connection.client
        connection.transport.cycle._register_BRPOP(channel)
        consumer = object.__new__(PlatformConsumer)
        consumer.task_consumer = SimpleNamespace(channel=channel)
        first, second = release_jobs(store, clock, 2)
        wait_until(lambda: client.llen(QUEUE) == 1, message="the first message was not taken")
        channel.basic_cancel("t")
        consumer._put_back_last()
        assert tags(client) == [f"{first}#1", f"{second}#1"]
        consumer._put_back_last()
        assert consumer.held() == []
        assert taken == []
    assert tags(client) == [f"{first}#1", f"{second}#1"]


def test_what_is_no_message_is_set_aside_and_the_next_one_taken(
    client: redis.Redis, server: EmbeddedServer, store: Store, clock: Clock
) -> None:
    for raw in (b"\xff\x00", b"[]", b'{"body": 7}'):
        client.lpush(QUEUE, raw)
    other = send_other(client, body="[[], {}, {}]")
    aside: list[tuple[str, bytes | str, str]] = []
    with consuming(server.url, messages=1, prefetch=1, aside=aside) as (channel, taken):
        assert [message.delivery_tag for message in taken] == [other]
        assert [(queue, raw) for queue, raw, _ in aside] == [(QUEUE, b"\xff\x00"), (QUEUE, b"[]"), (QUEUE, b'{"body": 7}')]
        assert all(reason for _, _, reason in aside)
        taken[0].ack()
        assert channel.qos.can_consume()
    assert client.llen(QUEUE) == 0


def test_a_message_that_breaks_its_handler_is_set_aside_and_holds_no_slot(client: redis.Redis, server: EmbeddedServer) -> None:
    aside: list[tuple[str, bytes | str, str]] = []
    with consuming(server.url, messages=0, prefetch=1, aside=aside) as (channel, _):
        other = send_other(client)
        channel.connection._callbacks[QUEUE] = _breaking(channel.connection._callbacks[QUEUE])
        for _ in range(20):
            if aside:
                break
            with suppress(TimeoutError):
                channel.connection.client.drain_events(timeout=1)
        assert channel.qos.can_consume()
    ((queue, message, reason),) = aside
    assert (queue, reason) == (QUEUE, "breaks its handler: ZeroDivisionError: division by zero")
    assert json.loads(message)["properties"]["delivery_tag"] == other
    assert client.exists("unacked", "unacked_index", QUEUE) == 0


def _breaking(callback: Any) -> Any:
    def handle(message: Any) -> None:
        callback(message)
        1 / 0  # noqa: B018

    return handle
