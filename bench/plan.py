"""How many jobs one process plans in a second, durably recorded, and what it takes.

A planned job has its record, its history, its deduplication and its place in the waiting set, all made by the plan script from
the subscribers in Redis. A process that only plans, the platform's planner, makes the jobs of one occurrence in rounds. After each
round, on the same server: a loop of Celery's `apply_async` with a pooled producer, the same messages through kombu's batch publishing
(a pipeline), and the limit: prebuilt messages, of the size of a released job's, pushed 1,000 in a command.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from celery import Celery

from bench.population import create_users, http_definitions, subscribe_all
from bench.processes import ROOT, server
from taskplatform.message import DELIVERY, ID, QUEUE, RETRIES, USER, message_template
from taskplatform.model import Definition
from taskplatform.planner import published
from taskplatform.store import Store, connect

ROUNDS = 5
DEFINITIONS = 10
KOMBU_BATCH = 250
PUSH_BATCH = 1000
BESIDE = {
    "ratio_apply_async": "a loop of Celery's apply_async with a pooled producer",
    "ratio_kombu_batch": f"the same inside kombu's Producer.batch, {KOMBU_BATCH} messages a pipeline",
    "ratio_limit": f"prebuilt messages of a released job's size, LPUSH of {PUSH_BATCH}",
}


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures. At scale 1: 100,000 users with 10 subscriptions each, planned in 5 rounds, beside 5 × 4,000 messages."""
    users = max(1000, int(100_000 * scale))
    subscriptions = users * DEFINITIONS
    definitions = http_definitions(DEFINITIONS, interval="monthly")
    message = _released(definitions[0])
    with server() as url:
        client = connect(url)
        store = Store(client)
        for definition in definitions:
            store.publish(published(definition), actor="bench")
        empty = _memory(client)
        create_users(store, users)
        with_users = _memory(client)
        subscribe_all(store, users, [definition.id for definition in definitions])
        subscribed = _memory(client)

        rounds: list[dict[str, float]] = []
        with _planner(url) as plan, _celery(url) as app:
            _apply_async(app, 500), _kombu_batch(app, 500), plan(subscriptions // 50)  # warm-up
            for _ in range(ROUNDS):
                planned = plan(subscriptions // (ROUNDS + 1))
                beside = {
                    "apply_async": _apply_async(app, max(200, int(4000 * scale))),
                    "kombu_batch": _kombu_batch(app, max(1000, int(20_000 * scale))),
                    "limit": _push(client, message, max(10_000, int(100_000 * scale))),
                }
                rounds.append({"jobs": planned["made"] / planned["seconds"], **beside})
            planned = plan(subscriptions)  # what is left
        waiting = sum(store.waiting().values())
        assert waiting == subscriptions, f"{waiting} jobs of {subscriptions} were planned"
        job_bytes = (_memory(client) - subscribed) / waiting
        client.close()
    speeds = {kind: [one[kind] for one in rounds] for kind in rounds[0]}
    ratios = {kind: [one["jobs"] / one[kind] for one in rounds] for kind in beside}
    return {
        "subscriptions": subscriptions,
        "users": users,
        "definitions": DEFINITIONS,
        "rounds": ROUNDS,
        **{f"{kind}_per_s": round(statistics.median(values)) for kind, values in speeds.items()},
        **{f"{kind}_per_s_min_max": [round(min(values)), round(max(values))] for kind, values in speeds.items()},
        **{f"ratio_{kind}": round(statistics.median(values), 3) for kind, values in ratios.items()},
        **{f"ratio_{kind}_min_max": [round(min(values), 3), round(max(values), 3)] for kind, values in ratios.items()},
        "planner_rss_mb": round(planned["rss_mb"], 1),
        "redis_bytes_per_user": round((with_users - empty) / users),
        # with their share of the users
        "redis_bytes_per_subscription": round((subscribed - empty) / subscriptions),
        "redis_bytes_per_job": round(job_bytes),
        "message_bytes": len(message),
        "beside": BESIDE,
    }


def _released(definition: Definition) -> str:
    """The message of one of its jobs, as the broker holds it."""
    blanks = {ID: f"{definition.id}:user50000:1767225600000", USER: "user50000", DELIVERY: "1", RETRIES: "0", QUEUE: "medium"}
    message = message_template(definition)
    for blank, value in blanks.items():
        message = message.replace(blank, value)
    return message


def _memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


@contextmanager
def _planner(url: str) -> Iterator[Callable[[int], dict[str, float]]]:
    """Plans at least so many jobs each time it is called, and gives what `bench.planner_process` answers."""
    command = [sys.executable, "-m", "bench.planner_process", url, str(DEFINITIONS)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def plan(count: int) -> dict[str, float]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(count, file=process.stdin, flush=True)
            answer: dict[str, float] = json.loads(process.stdout.readline())
            return answer

        yield plan


@contextmanager
def _celery(url: str) -> Iterator[Celery]:
    app = Celery("bench", broker=url)
    app.conf.update(task_ignore_result=True, broker_transport_options={"priority_steps": [0]})
    yield app
    app.close()


def _apply_async(app: Celery, count: int) -> float:
    """Messages a second."""
    with _producer(app) as producer:
        began = time.perf_counter()
        _send(app, producer, count)
        return count / (time.perf_counter() - began)


def _kombu_batch(app: Celery, count: int) -> float:
    with _producer(app) as producer:
        began = time.perf_counter()
        with producer.batch(max_size=KOMBU_BATCH):
            _send(app, producer, count)
        return count / (time.perf_counter() - began)


@contextmanager
def _producer(app: Celery) -> Iterator[Any]:
    with app.pool.acquire(block=True) as connection, app.amqp.Producer(connection) as producer:
        yield producer
        connection.default_channel.client.delete("bench")


def _send(app: Celery, producer: Any, count: int) -> None:
    task = app.task(name="bench_task", shared=False)(_bench_task)
    for number in range(count):
        task.apply_async(kwargs={"user": f"user{number}"}, queue="bench", producer=producer)


def _bench_task(user: str) -> str:
    return user


def _push(client: redis.Redis, message: str, count: int) -> float:
    began = time.perf_counter()
    for start in range(0, count, PUSH_BATCH):
        client.lpush("bench-limit", *[message] * min(PUSH_BATCH, count - start))
    seconds = time.perf_counter() - began
    client.delete("bench-limit")
    return count / seconds
