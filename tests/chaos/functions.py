"""The Python functions of the chaos run's definitions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import requests

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def calls(job: RunningJob) -> int:
    """One call of the target."""
    headers = {"X-Job-ID": job.id, "Idempotency-Key": job.id, "X-Node": os.environ["CHAOS_NODE"]}
    answer = requests.post(f"{os.environ['CHAOS_TARGET']}/steady", headers=headers, timeout=60)
    answer.raise_for_status()
    return answer.status_code


def ends_its_process(job: RunningJob) -> None:
    """As a segmentation fault or the OOM killer would."""
    os._exit(9)
