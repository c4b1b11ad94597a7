"""What the verification's jobs run in a worker: bounded sleeps and failures. Every worker imports this, so it imports little."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

from taskplatform.drills import LONGEST


class Job(Protocol):
    """What the platform gives to a function."""

    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def attempt(self) -> int: ...


class AsAsked(RuntimeError):
    """A failure that the job's parameters ask for."""


def work(job: Job) -> dict[str, int]:
    """Sleep for `seconds`, and fail where this is one of the first `failures` attempts."""
    time.sleep(_seconds(job, 0))
    if job.attempt <= _number(job.params.get("failures", 0)):
        raise AsAsked(f"attempt {job.attempt} fails, as asked")
    return {"attempt": job.attempt}


def hold(job: Job) -> dict[str, int]:
    """In the first attempt sleep for `seconds`: long enough to be killed meanwhile. Else return at once."""
    if job.attempt == 1:
        time.sleep(_seconds(job, 45))
    return {"attempt": job.attempt}


def _seconds(job: Job, default: float) -> float:
    return min(max(0.0, _number(job.params.get("seconds", default))), LONGEST.total_seconds())


def _number(value: Any) -> float:
    """Whatever somebody submits; what is no number is 0."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else 0.0
