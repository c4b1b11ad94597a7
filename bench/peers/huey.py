"""huey."""

from __future__ import annotations

import os

from huey import RedisHuey

from bench.peers.client import get

app = RedisHuey("bench", url=os.environ["BENCH_BROKER"], results=False)


@app.task()  # type: ignore[untyped-decorator]
def fetch(url: str) -> None:
    """One GET."""
    get(url)


def send(url: str, count: int) -> None:
    """Submit `count` jobs."""
    for _ in range(count):
        fetch(url)
