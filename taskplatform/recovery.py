"""Says that this worker lives, and takes the jobs of those that do not.

Each worker heartbeats. In the same rhythm it looks for workers whose heartbeat stopped, whose jobs it gives back, and for
released jobs whose message was lost between broker and worker.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from taskplatform.errors import NotFound, StoreError, StoreUnavailable
from taskplatform.model import JobState
from taskplatform.outage import OutageLog
from taskplatform.settings import Settings
from taskplatform.store import Store

log = logging.getLogger(__name__)

#: Before the next run of a job whose worker was lost; doubled by each further loss.
LOSS_BACKOFF = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    job_id: str
    delivery: int
    worker: str
    state: JobState
    reason: str
    detail: Mapping[str, Any] | None = None
    retry_in: timedelta | None = None

    def record(self, store: Store) -> None:
        """Tell Redis; as often as need be, because it knows one that it has. Raises StoreError."""
        counted = store.finish(
            self.job_id,
            delivery=self.delivery,
            worker=self.worker,
            state=self.state,
            reason=self.reason,
            detail=self.detail,
            retry_in=self.retry_in,
        )
        if not counted:
            raise Discarded(f"job {self.job_id}: result {self.state} of delivery {self.delivery} discarded: it is not the current one")


class Discarded(Exception):
    """The run no longer counted."""


class Endings:
    """Ends of runs that Redis could not be told: they are kept until it can, because the work is done. For all threads."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Ending] = {}

    def keep(self, ending: Ending) -> None:
        """One more."""
        self._kept[ending.job_id, ending.delivery] = ending

    def __contains__(self, job_id: object) -> bool:
        return any(kept == job_id for kept, _ in tuple(self._kept))

    def record(self, store: Store) -> None:
        """Tell Redis all of them. Raises StoreUnavailable, and keeps those that it was not told."""
        for place, ending in tuple(self._kept.items()):
            try:
                ending.record(store)
                log.info("job %s: recorded late that it is %s", ending.job_id, ending.state)
            except StoreUnavailable:
                raise
            except (Discarded, StoreError) as fault:
                log.warning("%s", fault)
            del self._kept[place]


class RecoveryLoop:
    """Heartbeats and recovers, until `stop`.

    `slots` and `queues` are asked each time, because remote control can change them. `stop_run` is called with job id and
    delivery of each run that was canceled here. `has_job` says whether this process runs a job or is about to. `endings` are those
    that wait for Redis.
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
        endings: Endings,
        info: Mapping[str, str],
    ) -> None:
        self._store = store
        self._settings = settings
        self._worker = worker
        self._slots = slots
        self._queues = queues
        self._stop_run = stop_run
        self._has_job = has_job
        self._endings = endings
        self._info = info
        #: Since when, by the monotonic clock, no heartbeat of this worker failed or was late; and its last one.
        self._heard_since = -math.inf
        self._last_beat = math.inf
        self._draining = False
        self._stopped = threading.Event()
        #: Jobs that are recorded as running here and were not found the last time.
        self._gone: set[str] = set()
        #: A heartbeat after `leave` would bring the worker back to life.
        self._alive = threading.Lock()

    def run(self) -> None:
        """Never raises: without Redis it waits for it."""
        interval = self._settings.heartbeat_interval.total_seconds()
        outage = OutageLog(log, "recovery")
        while not self._stopped.is_set():
            wait = interval
            try:
                self.beat()
                self._endings.record(self._store)
                self.recover()
            except Exception as fault:
                wait = min(interval, outage.failed(fault))
            else:
                outage.over()
            self._stopped.wait(wait)

    def beat(self) -> None:
        """One heartbeat, and what it brings."""
        with self._alive:
            if self._stopped.is_set():
                return
            before, self._last_beat = self._last_beat, -math.inf
            stops = self._store.heartbeat(
                self._worker,
                slots=0 if self._draining else self._slots(),
                queues=self._queues(),
                buffer=self._settings.queue_buffer,
                info=self._info,
            )
        now = time.monotonic()
        if now - before > self._settings.heartbeat_timeout.total_seconds():
            self._heard_since = now
        self._last_beat = now
        for job_id, delivery in stops:
            self._stop_run(job_id, delivery)

    def recover(self) -> None:
        """Take what lost workers left."""
        settings = self._settings
        # where this one was not heard for a time, because of Redis, others may be silent for the same reason: they get their time again
        if time.monotonic() - self._heard_since >= settings.heartbeat_timeout.total_seconds():
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

    def drain(self, held: Sequence[str]) -> None:
        """From now on offer no slots. What of the deliveries that are held here has not started is given back."""
        self._draining = True
        self.beat()
        self.withdraw(held)

    def withdraw(self, held: Sequence[str], *, also_running: bool = False) -> None:
        """Give back what of these has not started; with `also_running` runs of it were broken off, and have ended."""
        given = self._store.withdraw(self._worker, held, also_running=also_running) if held else 0
        if given:
            log.warning("gave back %d %s", given, "runs that were broken off" if also_running else "jobs that had not started")

    def stop(self, held: Sequence[str] = ()) -> None:
        """Let `run` return, and give back what still runs here, or is held here. Where Redis cannot be told, others find it."""
        self._stopped.set()
        with self._alive:
            try:
                self._endings.record(self._store)
                given = self._store.leave(self._worker, held)
            except StoreUnavailable as fault:
                log.warning("left without a word: %s", fault)
                return
        if given:
            log.warning("gave back %d jobs that were still running or had not started", given)
