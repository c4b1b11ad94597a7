"""What the verification's jobs run in a worker: bounded sleeps and failures. Every worker imports this, so it imports little."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

_LONGEST_SECONDS = 10.0
_LONGEST_HOLD_SECONDS = 60.0


class Job(Protocol):
    """What the platform gives to a function."""

    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def attempt(self) -> int: ...


class AsAsked(RuntimeError):
    """A failure that the job's parameters ask for."""


def quick(job: Job) -> dict[str, int]:
    """Return."""
    return {"attempt": job.attempt}


def work(job: Job) -> dict[str, int]:
    """Sleep for `seconds`, and fail where this is one of the first `failures` attempts."""
    _sleep(_number(job.params.get("seconds")), _LONGEST_SECONDS)
    if job.attempt <= _number(job.params.get("failures")):
        raise AsAsked(f"attempt {job.attempt} fails, as asked")
    return {"attempt": job.attempt}


def hold(job: Job) -> dict[str, int]:
    """In the first attempt sleep for `seconds`: long enough to be killed meanwhile. Else return at once."""
    if job.attempt == 1:
        _sleep(_number(job.params.get("seconds", _LONGEST_HOLD_SECONDS)), _LONGEST_HOLD_SECONDS)
    return {"attempt": job.attempt}


def _sleep(seconds: float, longest: float) -> None:
    time.sleep(min(max(0.0, seconds), longest))


def _number(value: Any) -> float:
    """Whatever somebody submits; what is no number is 0."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else 0.0
