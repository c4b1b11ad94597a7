"""No-op jobs through the whole way, beside plain Celery with the same pool, late acknowledgement and events on.

A platform job has its record, its fence, its history and its limits; a plain one is a message. Both run the same function body in one
worker of the same pool. Time runs from the first submission until the last is acknowledged.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import redis

from bench import plain
from bench.processes import ROOT, celery, wait_for
from taskplatform.catalogue import load
from taskplatform.local import embedded_server
from taskplatform.model import JobState
from taskplatform.platform import JobRequest, Platform
from taskplatform.settings import load_settings
from taskplatform.store import connect

ROUNDS = 3
POOLS = {"prefork": 2, "threads": 8}
QUIET = ("--loglevel", "WARNING", "-E", "--without-gossip", "--without-mingle")


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures; at scale 1, 3 × 3,000 jobs for each pool and side."""
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
    options = ["worker", "--pool", pool, "--concurrency", str(slots), *QUIET]
    pairs = []
    # one side's worker at a time, in turn, so that neither takes the other's share of the machine
    for number in range(ROUNDS + 1):
        with celery(
            "taskplatform.app",
            [*options, "-n", "ours@%h"],
            env=env,
            log=folder / f"ours{number}.log",
            ready=lambda: bool(platform.store.workers()),
        ):
            mine = _ours(platform, count)
        with celery("bench.plain", [*options, "-n", "plain@%h"], env=env, log=folder / f"plain{number}.log", ready=_answers):
            other = _theirs(client, count)
        if number:  # the first round warms up
            pairs.append((mine, other))
    client.close()
    platform.close()
    return pairs


def _ours(platform: Platform, count: int) -> float:
    before = platform.store.counts()[JobState.COMPLETED]
    began = time.perf_counter()
    platform.enqueue_many(JobRequest(definition="noop", user="u1") for _ in range(count))
    wait_for(lambda: platform.store.counts()[JobState.COMPLETED] - before >= count, seconds=120, what="the jobs")
    return count / (time.perf_counter() - began)


def _answers() -> bool:
    return bool(plain.app.control.ping(timeout=0.5))


def _theirs(client: redis.Redis, count: int) -> float:
    began = time.perf_counter()
    with plain.app.pool.acquire(block=True) as connection, plain.app.amqp.Producer(connection) as producer:
        for _ in range(count):
            plain.noop.apply_async(kwargs={"user": "u1"}, producer=producer)
    wait_for(lambda: client.llen("plain") == 0 and client.hlen("unacked") == 0, seconds=120, what="the messages")
    return count / (time.perf_counter() - began)
