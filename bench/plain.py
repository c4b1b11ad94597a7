"""Plain Celery as the platform's benchmarks compare themselves with it: late acknowledgement, events on, the same queues."""

from __future__ import annotations

import os

from celery import Celery

from bench.peers.client import get

app = Celery("plain", broker=os.environ.get("BENCH_BROKER", "redis://127.0.0.1:6379/0"))
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="plain",
    worker_prefetch_multiplier=1,
    worker_send_task_events=True,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"priority_steps": [0], "visibility_timeout": 86_400},
)


@app.task(name="noop")  # type: ignore[untyped-decorator]
def noop(user: str) -> str:
    """Nothing."""
    return user


@app.task(name="fetch")  # type: ignore[untyped-decorator]
def fetch(url: str) -> int:
    """One GET."""
    return get(url)
