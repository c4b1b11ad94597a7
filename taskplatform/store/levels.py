"""From which level on processes log, where that is set live. Reached as `Store.log_levels`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import redis

from taskplatform.store.scripts import Clock, Scripts

#: The levels that can be asked for.
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, slots=True)
class LogLevel:
    """What was set for some processes, and by whom."""

    level: str
    until_ms: int
    actor: str


class LogLevels:
    """The verbs. Safe to share between threads."""

    def __init__(self, client: redis.Redis, scripts: Scripts, key: Callable[..., str], clock: Clock | None) -> None:
        self._redis = client
        self._scripts = scripts
        self._key = key
        self._clock = clock

    def read(self) -> tuple[int, dict[str, LogLevel]]:
        """The server's time, and what holds, by whom it is for. One round trip."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()
        pipe.hgetall(self._key("log_levels"))
        (seconds, microseconds), kept = pipe.execute()
        now_ms = seconds * 1000 + microseconds // 1000 if self._clock is None else self._clock()
        levels = {}
        for node, value in cast("dict[str, str]", kept).items():
            level, until, actor = value.split(" ", 2)
            if int(until) > now_ms:
                levels[node] = LogLevel(level, int(until), actor)
        return now_ms, levels

    def set(self, node: str, level: str, *, span: timedelta, actor: str, log_size: int) -> None:
        """Let those log from `level` on for `span`; they hear of it with their next heartbeat or tick."""
        self._scripts.run("log_level", node, level, round(span / timedelta(milliseconds=1)), actor, log_size)

    def reset(self, node: str, *, actor: str, log_size: int) -> bool:
        """Take that back. Returns False where nothing was set."""
        return bool(self._scripts.run("log_level", node, "", 0, actor, log_size))
