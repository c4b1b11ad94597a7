"""The beat scheduler: redbeat's, with the planner in its tick.

Each tick extends the lock, sends what redbeat has due, and advances the planner. A standby does none of it, and in particular
leaves the leader's entries alone until it leads. SIGTERM and SIGINT end it at once, wherever it is: planning goes on at the cursor, and
the lock is released, so that the standby leads at its next look.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from datetime import timedelta
from types import FrameType, SimpleNamespace
from typing import Any

from celery.signals import beat_init
from redbeat.schedulers import RedBeatScheduler, acquire_distributed_beat_lock

from taskplatform.app import platform_when_reachable
from taskplatform.errors import Outage, StoreUnavailable
from taskplatform.outage import OutageLog
from taskplatform.planner import Planner
from taskplatform.settings import environment
from taskplatform.store import LockLost, unavailable

log = logging.getLogger(__name__)

# Celery would swallow what it raises where Redis cannot be used: the first tick does it.
beat_init.disconnect(acquire_distributed_beat_lock)

#: So long a beat that stops waits for Redis, to release its lock; without that the lock ends at its timeout.
_CLOSE_SECONDS = 3.0


class Scheduler(RedBeatScheduler):  # type: ignore[misc]
    """What `celery beat` runs, by `beat_scheduler` in celeryconfig.py."""

    lock: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._leads = False
        _end_at_signals()
        self._outage = OutageLog(log, "beat")
        super().__init__(*args, **kwargs)
        owner = platform_when_reachable()
        self._store = owner.store
        self._settings = owner.settings
        self._name = f"beat@{socket.gethostname()}#{os.getpid()}"
        self._planner = Planner(
            owner.store,
            owner.catalogue,
            horizon=owner.settings.plan_horizon,
            batch=owner.settings.plan_batch,
            name=self._name,
            environment=environment(),
        )

    def setup_schedule(self) -> None:
        """Redbeat's, but only as leader: a standby whose entries differ would delete the leader's."""
        if self._leads:
            super().setup_schedule()

    def tick(self, **kwargs: Any) -> float:
        """One round as leader. Returns the seconds until the next.

        What Redis cannot do for now is tried again; if it cost the lock, this beat stands by until it gets one. Raises LockNotOwnedError
        when another leads by now for another reason; then this one ends, and whoever supervises it starts a standby.
        """
        try:
            wait = self._round(**kwargs)
        except LockLost:
            if not self._outage.lasts:
                raise
            log.warning("beat could not keep its lock while Redis could not be used: it stands by")
            self.lock, self._leads = None, False
            return 0.0
        except Exception as fault:
            outage = unavailable(fault)
            if outage is None:
                raise
            self._make_room(outage)
            return min(self._outage.failed(outage), float(self.max_interval))
        self._outage.over()
        return wait

    def _round(self, **kwargs: Any) -> float:
        if self.lock_key and self.lock is None:
            # returns when the leader has gone
            acquire_distributed_beat_lock(SimpleNamespace(scheduler=self))
        if not self._leads:
            self._take_over()
        else:
            self.lock.extend(int(self.lock_timeout))
        # first: what Redis refuses comes out here, and not in redbeat, that would log it with a traceback for each entry
        wait = self._advance()
        return min(wait, self.max_interval, super().tick(**kwargs))

    def _make_room(self, outage: StoreUnavailable) -> None:
        """Where memory is full the sweep cannot be sent to a worker, because a message takes some."""
        if outage.outage is Outage.MEMORY:
            try:
                self._store.sweep(retention=self._settings.retention)
            except StoreUnavailable as fault:
                log.debug("the sweep: %s", fault)

    def close(self) -> None:
        """Release the lock, if Redis can be reached."""
        lock, token = self.lock, self.lock and self.lock.local.token

        def release() -> None:
            try:
                if lock:
                    lock.local.token = token  # each thread has its own
                super(Scheduler, self).close()
            except Exception as fault:
                log.warning("the lock was not released, because of %s; a standby leads when it has run out", fault)

        # Redbeat's client tries again for half an hour
        thread = threading.Thread(target=release, name="beat-close", daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)
        if thread.is_alive():
            log.warning("the lock was not released within %g s; a standby leads when it has run out", _CLOSE_SECONDS)

    def _take_over(self) -> None:
        self.lock.extend(int(self.lock_timeout))
        self._store.configure_limits(self._settings.limits, actor=self._name)
        self._store.set_options(fairness=self._settings.fairness, share=self._settings.lower_share)
        self._planner.lead(confirm=lambda: self.lock.extend(int(self.lock_timeout)))
        self._leads = True
        self.setup_schedule()
        log.info("beat leads and plans from now on")

    def _advance(self) -> float:
        try:
            # well within the lock's timeout, so that a long plan does not cost the lead
            budget = min(timedelta(seconds=2), self._settings.beat_lock_timeout / 5)
            return self._planner.advance(budget=budget).total_seconds()
        except StoreUnavailable:
            raise
        except Exception:
            log.exception("planning failed; trying again at the next tick")
            return float(self.max_interval)


def _end_at_signals() -> None:
    """In place of Celery's handler. That closes the scheduler, and makes one if there is none: both without end while Redis is away."""
    if threading.current_thread() is not threading.main_thread():
        return  # in a worker's process, that has handlers of its own

    def end(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the end is bounded, and must not be broken off itself
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
