"""How many jobs one process plans in a second, durably recorded.

A planned job has its record, its history, its deduplication and its place in the waiting set, all made by the plan script from
the subscribers in Redis. Beside it, in the same run and on the same server: a loop of Celery's `apply_async` with a pooled
producer, and the limit: prebuilt messages of the same size pushed in pipelines.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from taskplatform.local import embedded_server
from taskplatform.message import message_template
from taskplatform.model import Definition
from taskplatform.planner import published
from taskplatform.store import Opening, Store, Subscribe, connect

ROUNDS = 5
HORIZON = timedelta(hours=1)
BATCH = 250


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures. At scale 1: 200,000 subscriptions, planned five times, beside 5 × 4,000 messages."""
    subscribers = max(1000, int(200_000 * scale))
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as server:
        client = connect(server.url)
        store = Store(client)
        definition = Definition.model_validate(
            {
                "id": "hourly_data_sync",
                "name": "Hourly data sync",
                "interval": {"type": "hourly"},
                "config": {"endpoint": "http://127.0.0.1:1/sync"},
            }
        )
        store.publish(published(definition), actor="bench")
        empty = _memory(client)
        users = [f"user{number}" for number in range(subscribers)]
        store.create_users(users, actor="bench")
        with_users = _memory(client)
        store.subscribe([Subscribe(user, definition.id) for user in users], horizon=timedelta(), actor="bench", log=False)
        subscribed = _memory(client)

        ours, theirs, limit, job_bytes = [], [], [], 0.0
        for number in range(ROUNDS):
            before = _memory(client)
            ours.append(_plan(store, definition, number, subscribers))
            if number == 0:  # later ones reuse what the first left behind
                job_bytes = (_memory(client) - before) / subscribers
            _forget_jobs(client)
            theirs.append(_apply_async(server.url, max(200, int(4000 * scale))))
            limit.append(_push(client, message_template(definition), max(10_000, int(100_000 * scale))))
        client.close()
    return {
        "subscriptions": subscribers,
        "jobs_per_s": round(statistics.median(ours)),
        "jobs_per_s_min_max": [round(min(ours)), round(max(ours))],
        "apply_async_per_s": round(statistics.median(theirs)),
        "apply_async_per_s_min_max": [round(min(theirs)), round(max(theirs))],
        "limit_per_s": round(statistics.median(limit)),
        "ratio_apply_async": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 1),
        "ratio_limit": round(statistics.median(a / b for a, b in zip(ours, limit, strict=True)), 3),
        "planner_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "redis_bytes_per_user": round((with_users - empty) / subscribers),
        "redis_bytes_per_subscription": round((subscribed - with_users) / subscribers),
        "redis_bytes_per_job": round(job_bytes),
    }


def _memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


def _plan(store: Store, definition: Definition, number: int, subscribers: int) -> float:
    group = store.group(definition.id)
    assert group is not None
    at_ms = max(group.cursor_ms, store.now_ms()) + 1000 * (number + 1)
    store.open_occurrences(group, [Opening(at_ms, "schedule", "due")], cursor_ms=at_ms, next_due_ms=None, window_ms=60_000, horizon=HORIZON)
    made = 0
    again: int | None = at_ms
    began = time.perf_counter()
    while again is not None:
        count, again = store.plan(f"{group.id}|{at_ms}", horizon=HORIZON, batch=BATCH)
        made += count
    seconds = time.perf_counter() - began
    assert made == subscribers, f"{made} jobs of {subscribers} were planned"
    return made / seconds


def _forget_jobs(client: redis.Redis) -> None:
    """Empty what planning filled, so that each round begins alike."""
    for pattern in ("tp:job:*", "tp:history:*", "tp:userjobs:*", "tp:jobs:*", "tp:lane:*", "tp:ready:*"):
        batch: list[str] = []
        for key in client.scan_iter(pattern, count=10_000):
            batch.append(key)
            if len(batch) == 5000:
                client.unlink(*batch)
                batch = []
        if batch:
            client.unlink(*batch)


def _apply_async(url: str, count: int) -> float:
    app = Celery("bench", broker=url)
    app.conf.update(task_ignore_result=True, broker_transport_options={"priority_steps": [0]})
    task = app.task(name="bench_task")(_bench_task)
    with app.pool.acquire(block=True) as connection, app.amqp.Producer(connection) as producer:
        for number in range(100):
            task.apply_async(kwargs={"user": f"user{number}"}, queue="bench", producer=producer)
        began = time.perf_counter()
        for number in range(count):
            task.apply_async(kwargs={"user": f"user{number}"}, queue="bench", producer=producer)
        seconds = time.perf_counter() - began
        connection.default_channel.client.delete("bench")
    app.close()
    return count / seconds


def _bench_task(user: str) -> str:
    return user


def _push(client: redis.Redis, message: str, count: int) -> float:
    began = time.perf_counter()
    for start in range(0, count, 1000):
        client.lpush("bench-limit", *[message] * min(1000, count - start))
    seconds = time.perf_counter() - began
    client.delete("bench-limit")
    return count / seconds
