"""What a tick of the planner costs when nothing is due: with no subscriptions, and with very many.

Two servers of their own, the same catalogue; `Planner.advance` on each in turn. At scale 1 the full one has 1,000,000
subscriptions (100,000 users, 10 definitions), so that the run stays under two minutes; at scale 10 it has 10,000,000, which take about
1.5 GB of the server's memory and some minutes to make.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from bench.population import create_users, http_definitions, subscribe_all
from bench.processes import server, wait_for
from taskplatform.planner import Planner
from taskplatform.settings import Settings
from taskplatform.store import Store, connect

ROUNDS = 9
DEFINITIONS = 10
TICKS = 400


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures."""
    users = max(100, int(100_000 * scale))
    with _planner(0) as empty, _planner(users) as full:
        _tick_ms(empty), _tick_ms(full)  # warm-up
        pairs = [(_tick_ms(empty), _tick_ms(full)) for _ in range(ROUNDS)]
    without, beside = zip(*pairs, strict=True)
    ratios = [full_ms / empty_ms for empty_ms, full_ms in pairs]
    return {
        "subscriptions": users * DEFINITIONS,
        "users": users,
        "rounds": ROUNDS,
        "tick_ms_empty": round(statistics.median(without), 4),
        "tick_ms_full": round(statistics.median(beside), 4),
        "tick_ms_empty_min_max": [round(min(without), 4), round(max(without), 4)],
        "tick_ms_full_min_max": [round(min(beside), 4), round(max(beside), 4)],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "beside": {"ratio": "the same planner on a server without users"},
    }


@contextmanager
def _planner(users: int) -> Iterator[Planner]:
    """One that leads, on a server with so many users, each subscribed to all definitions, and has nothing to do."""
    definitions = http_definitions(DEFINITIONS, interval="monthly")
    settings = Settings.model_fields
    with server() as url:
        client = connect(url)
        store = Store(client)
        planner = Planner(
            store,
            {definition.id: definition for definition in definitions},
            horizon=settings["plan_horizon"].default,
            batch=settings["plan_batch"].default,
        )
        planner.lead()
        create_users(store, users)
        subscribe_all(store, users, [definition.id for definition in definitions])
        wait_for(lambda: planner.advance() > timedelta(seconds=10), seconds=60, what="the planner to open what is due")
        # the server rewrites its append-only file after so much was written, in a process beside it
        wait_for(lambda: not client.info("persistence")["aof_rewrite_in_progress"], seconds=600, what="the append-only file")
        yield planner
        client.close()


def _tick_ms(planner: Planner) -> float:
    began = time.perf_counter()
    for _ in range(TICKS):
        planner.advance()
    return (time.perf_counter() - began) / TICKS * 1000
