"""No-op jobs through a worker, beside plain Celery with the same pool, late acknowledgement and events on.

A platform job has its record, its fence, its history and its limits; a plain one is a message. Both run the same function body in one
worker of the same pool, alone on the machine, in turn. All jobs are submitted before the worker starts, so that neither side's way of
submitting takes part, and time runs from the tenth part of them to the last, so that neither's start does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import plain
from bench.processes import ROOT, celery, wait_for
from taskplatform.catalogue import load
from taskplatform.local import embedded_server
from taskplatform.model import JobState
from taskplatform.platform import JobRequest, Platform
from taskplatform.settings import load_settings
from taskplatform.store import connect

ROUNDS = 5
POOLS = {"prefork": 2, "threads": 8}
QUIET = ("--loglevel", "WARNING", "-E", "--without-gossip", "--without-mingle")


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures; at scale 1, 5 × 3,000 jobs for each pool and side."""
    count = max(200, int(3000 * scale))
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    ratio: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder) / "valkey") as server:
        plain.app.conf.broker_url = server.url
        measured = {pool: _rounds(server.url, Path(folder), pool, slots, count) for pool, slots in POOLS.items()}
        plain.app.close()
    for pool, pairs in measured.items():
        ours[pool] = round(statistics.median(a for a, _ in pairs))
        theirs[pool] = round(statistics.median(b for _, b in pairs))
        ratio[pool] = round(statistics.median(a / b for a, b in pairs), 2)
    return {"jobs": count, "jobs_per_s": ours, "celery_per_s": theirs, "ratio_celery": ratio}


def _rounds(url: str, folder: Path, pool: str, slots: int, count: int) -> list[tuple[float, float]]:
    env = {"TASKPLATFORM_REDIS_URL": url, "TASKPLATFORM_TASKS_DIR": str(ROOT / "bench" / "definitions"), "BENCH_BROKER": url}
    settings = load_settings(redis_url=url, tasks_dir=ROOT / "bench" / "definitions")
    platform = Platform.connect(settings, catalogue=load(settings.tasks_dir), actor="bench")
    platform.create_user("u1")
    client = connect(url)

    def ours() -> float:
        before = platform.store.counts()[JobState.COMPLETED]
        platform.enqueue_many(JobRequest(definition="noop", user="u1") for _ in range(count))
        return drained("taskplatform.app", lambda: platform.store.counts()[JobState.COMPLETED] - before)

    def theirs() -> float:
        with plain.app.pool.acquire(block=True) as connection, plain.app.amqp.Producer(connection) as producer:
            for _ in range(count):
                plain.noop.apply_async(kwargs={"user": "u1"}, producer=producer)
        return drained("bench.plain", lambda: count - client.llen("plain") - client.hlen("unacked"))

    def drained(app: str, done: Callable[[], int]) -> float:
        command = ["worker", "--pool", pool, "--concurrency", str(slots), *QUIET]
        with celery(app, command, env=env, log=folder / f"{app}.log", ready=lambda: done() >= count // 10):
            began, first = time.perf_counter(), done()
            wait_for(lambda: done() >= count, seconds=300, what="the jobs")
            return (count - first) / (time.perf_counter() - began)

    pairs = []
    for number in range(ROUNDS):
        if number % 2:
            mine, other = ours(), theirs()
        else:
            other, mine = theirs(), ours()
        pairs.append((mine, other))
    client.close()
    platform.close()
    return pairs
