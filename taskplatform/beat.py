"""The beat scheduler: redbeat's, with the planner in its tick.

Each tick extends the lock, sends what redbeat has due, and advances the planner. A standby does none of it, and in particular
leaves the leader's entries alone until it leads.
"""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta
from typing import Any

from redbeat.schedulers import RedBeatScheduler

from taskplatform.app import platform_when_reachable
from taskplatform.errors import StoreError
from taskplatform.planner import Planner
from taskplatform.settings import environment

log = logging.getLogger(__name__)


class Scheduler(RedBeatScheduler):  # type: ignore[misc]
    """What `celery beat` runs, by `beat_scheduler` in celeryconfig.py."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._leads = False
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

        Raises LockNotOwnedError when another beat leads by now; then this one ends, and whoever supervises it starts a standby.
        """
        if self.lock_key and self.lock is None:
            raise StoreError("beat could not get its lock; see the lines above")
        if not self._leads:
            self._take_over()
        wait: float = min(super().tick(**kwargs), self.max_interval)
        return min(wait, self._advance())

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
        except Exception:
            log.exception("planning failed; trying again at the next tick")
            return float(self.max_interval)
