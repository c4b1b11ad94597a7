"""rq. This module is also its worker's configuration."""

from __future__ import annotations

import os

from redis import Redis
from rq import Queue

from bench.peers.client import get

REDIS_URL = os.environ["BENCH_BROKER"]

queue = Queue("bench", connection=Redis.from_url(REDIS_URL))


def send(url: str, count: int) -> None:
    """Submit `count` jobs."""
    queue.enqueue_many([Queue.prepare_data(get, (url,), result_ttl=0) for _ in range(count)])
