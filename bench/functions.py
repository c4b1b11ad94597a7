"""What the benchmarks' definitions call."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def noop(job: RunningJob) -> str:
    """Nothing."""
    return job.user


def lag_ms(job: RunningJob) -> float:
    """How long ago it was due. The server's clock, by which it was due, is this machine's."""
    return time.time() * 1000 - job.execute_after_ms
