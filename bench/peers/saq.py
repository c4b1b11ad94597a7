"""saq, whose coroutine makes its call in a thread: the worker's own executor has 4 threads more than the machine has cores."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from saq import Queue

from bench.peers.client import get

BROKER = os.environ["BENCH_BROKER"]
SLOTS = 16

_threads = ThreadPoolExecutor(SLOTS)


async def fetch(_context: dict[str, Any], *, url: str) -> None:
    """One GET."""
    await asyncio.get_running_loop().run_in_executor(_threads, get, url)


settings = {"queue": Queue.from_url(BROKER), "functions": [fetch], "concurrency": SLOTS}


def send(url: str, count: int) -> None:
    """Submit `count` jobs."""
    asyncio.run(_send(url, count))


async def _send(url: str, count: int) -> None:
    queue = Queue.from_url(BROKER)
    for _ in range(count):
        await queue.enqueue("fetch", url=url, ttl=-1)
    await queue.disconnect()
