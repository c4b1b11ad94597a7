"""Says that this worker lives, and takes the jobs of those that do not.

Each worker heartbeats. In the same rhythm it looks for workers whose heartbeat stopped, whose jobs it gives back, and for
released jobs whose message was lost between broker and worker.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta

from taskplatform.settings import Settings
from taskplatform.store import Store

log = logging.getLogger(__name__)

#: Before the next run of a job whose worker was lost; doubled by each further loss.
LOSS_BACKOFF = timedelta(seconds=1)


class RecoveryLoop:
    """Heartbeats and recovers, until `stop`.

    `slots` and `queues` are asked each time, because remote control can change them. `stop_job` is called with the id of each
    job that was canceled while it ran here.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        worker: str,
        slots: Callable[[], int],
        queues: Callable[[], list[str]],
        stop_job: Callable[[str], None],
        info: Mapping[str, str],
    ) -> None:
        self._store = store
        self._settings = settings
        self._worker = worker
        self._slots = slots
        self._queues = queues
        self._stop_job = stop_job
        self._info = info
        self._draining = False
        self._stopped = threading.Event()

    def run(self) -> None:
        """Never raises: without Redis it waits for it."""
        interval = self._settings.heartbeat_interval.total_seconds()
        while not self._stopped.is_set():
            try:
                self.beat()
                self.recover()
            except Exception as fault:
                log.warning("heartbeat: %s; trying again", fault)
            self._stopped.wait(interval)

    def beat(self) -> None:
        """One heartbeat, and what it brings."""
        slots = 0 if self._draining else self._slots()
        queues = self._queues()
        for job_id in self._store.heartbeat(self._worker, slots=slots, queues=queues, buffer=self._settings.queue_buffer, info=self._info):
            self._stop_job(job_id)

    def recover(self) -> None:
        """Take what lost workers left."""
        settings = self._settings
        taken = self._store.recover(silence=settings.heartbeat_timeout, max_losses=settings.max_losses, backoff=LOSS_BACKOFF)
        for kind, name in taken:
            log.warning("%s %s: recovered, its worker was silent for %s", kind, name, settings.heartbeat_timeout)
        for job_id in self._store.reclaim(patience=settings.heartbeat_timeout):
            log.warning("job %s: its message was lost, released again", job_id)

    def drain(self) -> None:
        """From now on offer no slots."""
        self._draining = True
        self.beat()

    def stop(self) -> None:
        """Let `run` return, and give back what still runs here."""
        self._stopped.set()
        given = self._store.leave(self._worker)
        if given:
            log.warning("gave back %d jobs that were still running", given)
