"""Plain Celery, with late acknowledgement and events."""

from __future__ import annotations

import os

from bench.plain import app, fetch

BROKER = os.environ["BENCH_BROKER"]


def send(url: str, count: int) -> None:
    """Submit `count` jobs."""
    with app.connection_for_write(BROKER) as connection, app.amqp.Producer(connection) as producer:
        for _ in range(count):
            fetch.apply_async(kwargs={"url": url}, producer=producer)
