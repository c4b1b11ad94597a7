"""Keeps jobs moving from the waiting set to the broker's queues.

Under load the start and the end of each job release the next ones, inside their own scripts. This loop is for the rest: what
becomes due while workers are idle. It sleeps until then.

A start is released for its time. `renew` is for a run whose process was stopped or starved after it.
"""

from __future__ import annotations

import logging
import threading
import time

from taskplatform.model import START_SLACK_MS
from taskplatform.outage import OutageLog
from taskplatform.pulse import Pulse
from taskplatform.store import Renewal, Store

log = logging.getLogger(__name__)

#: The longest sleep in seconds: a job that was put in by another process is seen after this at the latest.
LONGEST_SLEEP = 0.25
#: So often a run that is held up asks for its place in a rate limit, before it gives up this attempt.
_MOST_RENEWALS = 3


def renew(store: Store, job_id: str, *, delivery: int, worker: str, asked: float) -> Renewal | None:
    """Whether a run may make its call now, whose start was asked for at `asked` by the monotonic clock, in seconds.

    Within the slack it may. Later another worker may have its job, or others its place in a rate limit: it asks again. None where
    Redis answers too slowly for that: each answer comes after the slack, and takes a token from others.
    """
    for _ in range(_MOST_RENEWALS):
        if time.monotonic() - asked <= START_SLACK_MS / 1000:
            return Renewal.IN_TIME
        asked = time.monotonic()
        renewal = store.renew(job_id, delivery=delivery, worker=worker)
        if renewal is not Renewal.IN_TIME:
            return renewal
    return Renewal.IN_TIME if time.monotonic() - asked <= START_SLACK_MS / 1000 else None


class ReleaseLoop:
    """Releases what is due, until `stop`."""

    def __init__(self, store: Store, *, pulse: Pulse | None = None) -> None:
        self._store = store
        self._pulse = pulse or Pulse("release")
        self._stopped = threading.Event()

    def run(self) -> None:
        """Never raises: without Redis it waits for it."""
        outage = OutageLog(log, "release")
        while not self._stopped.is_set():
            try:
                released, wait_ms = self._store.release()
            except Exception as fault:
                self._pulse.failed(fault)
                self._stopped.wait(outage.failed(fault))
                continue
            self._pulse.succeeded()
            outage.over()
            if released and not wait_ms:
                continue
            sleep = LONGEST_SLEEP if wait_ms is None else min(LONGEST_SLEEP, wait_ms / 1000)
            self._stopped.wait(max(sleep, 0.001))

    def stop(self) -> None:
        """Let `run` return soon."""
        self._stopped.set()
