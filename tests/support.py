"""What tests of all kinds share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, seconds: float = 25, message: str = "") -> T:
    """The first truthy value of `condition`, which is asked again and again. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(message or f"not true within {seconds:g} s; the last value was {value!r}")
        time.sleep(0.02)
    return value
