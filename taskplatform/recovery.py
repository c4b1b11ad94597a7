"""Says that this worker lives, and takes the jobs of those that do not.

Each worker heartbeats. In the same rhythm it looks for workers whose heartbeat stopped, whose jobs it gives back, and for
released jobs whose message was lost between broker and worker.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta

from taskplatform.errors import NotFound
from taskplatform.model import JobState
from taskplatform.settings import Settings
from taskplatform.store import Store

log = logging.getLogger(__name__)

#: Before the next run of a job whose worker was lost; doubled by each further loss.
LOSS_BACKOFF = timedelta(seconds=1)


class RecoveryLoop:
    """Heartbeats and recovers, until `stop`.

    `slots` and `queues` are asked each time, because remote control can change them. `stop_run` is called with job id and
    delivery of each run that was canceled here. `has_job` says whether this process runs a job or is about to.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        worker: str,
        slots: Callable[[], int],
        queues: Callable[[], list[str]],
        stop_run: Callable[[str, int], None],
        has_job: Callable[[str], bool],
        info: Mapping[str, str],
    ) -> None:
        self._store = store
        self._settings = settings
        self._worker = worker
        self._slots = slots
        self._queues = queues
        self._stop_run = stop_run
        self._has_job = has_job
        self._info = info
        self._draining = False
        self._stopped = threading.Event()
        #: Jobs that are recorded as running here and were not found the last time.
        self._gone: set[str] = set()
        #: A heartbeat after `leave` would bring the worker back to life.
        self._alive = threading.Lock()

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
        with self._alive:
            if self._stopped.is_set():
                return
            stops = self._store.heartbeat(
                self._worker,
                slots=0 if self._draining else self._slots(),
                queues=self._queues(),
                buffer=self._settings.queue_buffer,
                info=self._info,
            )
        for job_id, delivery in stops:
            self._stop_run(job_id, delivery)

    def recover(self) -> None:
        """Take what lost workers left."""
        settings = self._settings
        taken = self._store.recover(silence=settings.heartbeat_timeout, max_losses=settings.max_losses, backoff=LOSS_BACKOFF)
        for kind, name in taken:
            log.warning("%s %s: recovered, its worker was silent for %s", kind, name, settings.heartbeat_timeout)
        for job_id in self._store.reclaim(patience=settings.heartbeat_timeout):
            log.warning("job %s: its message was lost, released again", job_id)
        gone = {job_id for job_id in self._store.running_on(self._worker) if not self._has_job(job_id)}
        # seen twice: between the end of a run and its record there may be a moment
        for job_id in gone & self._gone:
            self._give_up(job_id)
        self._gone = gone

    def _give_up(self, job_id: str) -> None:
        """A run ended here and its end could not be recorded, because Redis was away."""
        with suppress(NotFound):
            job = self._store.job(job_id)
            if job.state is JobState.RUNNING and job.worker == self._worker and not self._has_job(job_id):
                self._store.lose(
                    job_id,
                    delivery=job.delivery,
                    worker=self._worker,
                    what="its run ended without a record",
                    max_losses=self._settings.max_losses,
                    backoff=LOSS_BACKOFF,
                )
                log.warning("job %s: its run ended here without a record", job_id)

    def drain(self) -> None:
        """From now on offer no slots."""
        self._draining = True
        self.beat()

    def stop(self) -> None:
        """Let `run` return, and give back what still runs here."""
        with self._alive:
            self._stopped.set()
            given = self._store.leave(self._worker)
        if given:
            log.warning("gave back %d jobs that were still running", given)
