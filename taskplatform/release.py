"""Keeps jobs moving from the waiting set to the broker's queues.

Under load the start and the end of each job release the next ones, inside their own scripts. This loop is for the rest: what
becomes due while workers are idle. It sleeps until then.
"""

from __future__ import annotations

import logging
import threading

from taskplatform.store import Store

log = logging.getLogger(__name__)

#: The longest sleep in seconds: a job that was put in by another process is seen after this at the latest.
LONGEST_SLEEP = 0.25


class ReleaseLoop:
    """Releases what is due, until `stop`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stopped = threading.Event()

    def run(self) -> None:
        """Never raises: without Redis it waits for it."""
        failures = 0
        while not self._stopped.is_set():
            try:
                released, wait_ms = self._store.release()
                failures = 0
            except Exception as fault:
                failures += 1
                log.warning("release: %s; trying again", fault)
                self._stopped.wait(min(5.0, 0.2 * 2 ** min(failures, 5)))
                continue
            if released and not wait_ms:
                continue
            sleep = LONGEST_SLEEP if wait_ms is None else min(LONGEST_SLEEP, wait_ms / 1000)
            self._stopped.wait(max(sleep, 0.001))

    def stop(self) -> None:
        """Let `run` return soon."""
        self._stopped.set()
