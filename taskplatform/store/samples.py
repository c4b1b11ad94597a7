"""How the platform was, minute by minute, for two hours: what grows is seen by that. `Store.note_sample`, `Store.samples`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any, cast

import redis

from taskplatform.store.figures import Figures

#: Between two of them, and how many are kept.
EVERY = timedelta(minutes=1)
MOST_SAMPLES = 120


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment. All are counts of jobs but the last."""

    at_ms: int
    waiting: int
    due: int
    """Of those that wait."""
    dead: int
    memory: int
    """Bytes that Redis uses for data."""


def note(client: redis.Redis, key: Callable[..., str], figures: Figures) -> None:
    """Keep one more, and no more than `MOST_SAMPLES`."""
    memory = int(client.info("memory").get("used_memory", 0))
    sample = Sample(figures.now_ms, sum(figures.waiting.values()), sum(figures.due.values()), figures.dead_letters, memory)
    client.xadd(key("samples"), cast("Any", asdict(sample)), maxlen=MOST_SAMPLES, approximate=False)


def read(client: redis.Redis, key: Callable[..., str]) -> list[Sample]:
    """Those that are kept, the oldest first."""
    rows = cast("list[tuple[str, dict[str, str]]]", client.xrevrange(key("samples"), count=MOST_SAMPLES))
    names = [field.name for field in fields(Sample)]
    # what an older or newer release noted may lack some
    return [Sample(*(int(row.get(name, 0)) for name in names)) for _, row in reversed(rows)]
