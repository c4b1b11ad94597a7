"""Plain Celery as the platform's benchmarks compare themselves with it: late acknowledgement, events on, the same queues."""

from __future__ import annotations

import os

from celery import Celery

from bench.peers.client import get

app = Celery("plain", broker=os.environ.get("BENCH_BROKER", "redis://127.0.0.1:6379/0"))
#: redbeat's own defaults are 300 s, and five times that for its lock.
_INTERVAL = float(os.environ.get("BENCH_BEAT_INTERVAL", "300"))
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="plain",
    worker_prefetch_multiplier=1,
    worker_send_task_events=True,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"priority_steps": [0], "visibility_timeout": int(os.environ.get("BENCH_VISIBILITY", "86400"))},
    beat_scheduler="redbeat.RedBeatScheduler",
    beat_max_loop_interval=_INTERVAL,
    redbeat_redis_url=app.conf.broker_url,
    redbeat_redis_options={},
    beat_schedule={"every-second": {"task": "noop", "schedule": 1.0, "kwargs": {"user": "u1"}, "options": {"queue": "every-second"}}},
)


@app.task(name="noop")  # type: ignore[untyped-decorator]
def noop(user: str) -> str:
    """Nothing."""
    return user


@app.task(name="fetch")  # type: ignore[untyped-decorator]
def fetch(url: str) -> int:
    """One GET."""
    return get(url)
