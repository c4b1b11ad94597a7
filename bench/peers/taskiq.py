"""taskiq, which runs a plain function in its worker's thread pool."""

from __future__ import annotations

import asyncio
import os

from taskiq_redis import ListQueueBroker

from bench.peers.client import get

BROKER = os.environ["BENCH_BROKER"]

broker = ListQueueBroker(BROKER)


@broker.task(task_name="fetch")  # type: ignore[untyped-decorator]
def fetch(url: str) -> None:
    """One GET."""
    get(url)


def send(url: str, count: int) -> None:
    """Submit `count` jobs."""
    asyncio.run(_send(url, count))


async def _send(url: str, count: int) -> None:
    sender = ListQueueBroker(BROKER)  # connections belong to the event loop that made them
    for _ in range(count):
        await fetch.kicker().with_broker(sender).kiq(url)
    await sender.shutdown()
