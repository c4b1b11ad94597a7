"""The Python functions of the acceptance tests' definitions. What they did, the target knows: they call it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any, Protocol

import celery
import requests
from celery.exceptions import SoftTimeLimitExceeded


class Job(Protocol):
    """What the platform gives to a function."""

    id: str
    user: str
    params: dict[str, Any]
    attempt: int


def returns(job: Job) -> dict[str, Any]:
    _tell(job, "ran")
    return {"user": job.user, "attempt": job.attempt, "params": dict(job.params)}


def sleeps(job: Job) -> str:
    _tell(job, "began")
    time.sleep(float(job.params["seconds"]))
    _tell(job, "ended")
    return "slept"


def raises(job: Job) -> str:
    _tell(job, "ran")
    if job.attempt <= int(job.params["times"]):
        raise ValueError(f"attempt {job.attempt} went wrong")
    return "went well"


def shouts(job: Job) -> None:
    raise ValueError("!" * 400_000)


def exits(job: Job) -> None:
    _tell(job, "ran")
    raise SystemExit(2)


def dies(job: Job) -> None:
    _tell(job, "ran")
    match job.params["how"]:
        case "segfault":
            ctypes.string_at(0)
        case "killed":  # as the kernel does it where there is no memory left
            os.kill(os.getpid(), signal.SIGKILL)
    os._exit(9)


def retries_itself(job: Job) -> str:
    _tell(job, "ran")
    if job.attempt < 3:
        celery.current_task.retry(countdown=0.7)
    return f"attempt {job.attempt} was the last"


def fails_deeply(job: Job, depth: int = 150) -> None:
    """What its process tells the pool is the length of its traceback: more than a pipe holds (64 KiB, pipe(7))."""
    if depth:
        return fails_deeply(job, depth - 1)
    _tell(job, "began")
    time.sleep(0.5)
    raise celery.current_task.retry(exc=ValueError("deep down"))


def ignores_soft_limit(job: Job) -> None:
    _tell(job, "began")
    while True:
        with suppress(SoftTimeLimitExceeded):
            time.sleep(60)


def hangs_once(job: Job) -> None:
    _tell(job, "began")
    if job.attempt == 1:
        threading.Event().wait()
    _tell(job, "ended")


def refuses_to_stop(job: Job) -> None:
    _tell(job, "began")
    while True:
        with suppress(BaseException):
            time.sleep(60)


def _tell(job: Job, what: str) -> None:
    requests.post(f"{os.environ['TARGET']}/{what}", headers={"X-Job-ID": job.id, "X-User-ID": job.user}, timeout=30)


def blurts(job: Job) -> str:
    """Prints, logs, and returns or raises what of the environment is secret."""
    told = " and ".join(value for name, value in sorted(os.environ.items()) if name.startswith("PLANTED"))
    print(f"printed {told}")
    logging.getLogger(__name__).warning("logged %s", told)
    if job.params["how"] == "raise":
        raise ValueError(f"cannot use {told}")
    return told
