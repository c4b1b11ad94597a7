"""What the benchmarks' definitions call."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def noop(job: RunningJob) -> str:
    """Nothing."""
    return job.user
