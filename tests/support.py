"""What tests of all kinds share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_ROUND_SECONDS = 0.1
_MOST = 4


def wait_until(condition: Callable[[], T], *, seconds: float = 60, message: str = "") -> T:
    """The first truthy value of `condition`, which is asked again and again. Raises AssertionError after `seconds`.

    Time in which the machine lets nobody run does not count, so that a busy one fails no test: of each round at most
    `_ROUND_SECONDS`, up to `_MOST` times as many seconds in all.
    """
    began = before = time.monotonic()
    counted = 0.0
    while not (value := condition()):
        if counted > seconds or before - began > _MOST * seconds:
            raise AssertionError(message or f"not true within {seconds:g} s; the last value was {value!r}")
        time.sleep(0.02)
        now = time.monotonic()
        counted += min(now - before, _ROUND_SECONDS)
        before = now
    return value
