"""dramatiq, with its own middleware."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from bench.peers.client import get

broker = RedisBroker(url=os.environ["BENCH_BROKER"])


@dramatiq.actor(broker=broker)  # type: ignore[untyped-decorator]
def fetch(url: str) -> None:
    """One GET."""
    get(url)


def send(url: str, count: int) -> None:
    """Submit `count` jobs."""
    for _ in range(count):
        fetch.send(url)
