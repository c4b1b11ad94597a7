"""The beat scheduler: redbeat's, with the planner in its tick.

Each tick of the leader extends the lock, sends what redbeat has due, and advances the planner. A standby looks in each tick whether
the lock is free, and leaves the leader's entries alone until it leads and may publish. A leader that has lost the lock, because it stood
still for too long, becomes a standby.

Beats with different catalogues may run side by side, as in a rolling deployment. The newest leads: an older leader steps down for it.
Where an older one must lead, because the newer ones died, it publishes nothing for a while: it plans what is published, as far
as that is the same in its own catalogue. A beat that is stopped signs off, so that going back to an older release takes effect at once.

SIGTERM and SIGINT end a beat at once, wherever it is: planning goes on at the cursor, and the lock is released, so that the standby leads
at its next look. What Redis cannot do for now is tried again, in this process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import FrameType
from typing import Any

from celery.apps.beat import Beat
from celery.signals import beat_init
from redbeat.schedulers import LUA_EXTEND_TO_SCRIPT, REDBEAT_REDIS_KEY, RedBeatScheduler, acquire_distributed_beat_lock, get_redis

from taskplatform import logs, tracing
from taskplatform.app import platform_when_reachable
from taskplatform.errors import Conflict, Outage, StoreError, StoreUnavailable
from taskplatform.metrics import PlatformCollector, beat_metrics, tick_seconds
from taskplatform.node import ClockGauge, celery_settings, digest, versions
from taskplatform.ops import OpsServer, Process
from taskplatform.outage import OutageLog
from taskplatform.planner import Planner
from taskplatform.platform import Platform
from taskplatform.process import identity
from taskplatform.pulse import Pulse
from taskplatform.settings import environment, settings
from taskplatform.store import SAMPLE_EVERY, LockLost, Newer, Store, connect, unavailable

log = logging.getLogger(__name__)

# Redbeat would wait for the lock before the first tick: a standby could not say that it lives, and a beat that lost its lock had to end.
beat_init.disconnect(acquire_distributed_beat_lock)

#: A beat that died, and did not sign off, counts for so many times the lock's timeout: 5 minutes as the settings are by themselves.
_ACCOUNT = 20


#: So long a beat that stops waits for Redis, to release its lock; without that the lock ends at its timeout.
_CLOSE_SECONDS = 3.0


class _Telling:
    """What this process tells of its beat over HTTP. Celery makes a scheduler to print its settings, and another one to run it."""

    def __init__(self) -> None:
        chosen = settings()
        between = 3 * chosen.beat_interval.total_seconds()
        self.scheduler: Scheduler | None = None
        self.pulse = Pulse("tick")
        self.seconds = tick_seconds()
        process = Process(
            role="beat",
            pulses=[self.pulse],
            patience=max(chosen.ops_patience.total_seconds(), between),
            fresh=max(chosen.beat_lock_timeout.total_seconds(), between),
            facts=lambda: {"beat": _name(), "leads": self._leads},
            metrics=lambda: beat_metrics(leads=self._leads),
        )
        self.ops = OpsServer(process, chosen, collectors=[PlatformCollector(self._store, chosen), self.seconds])
        self.ops.start()

    @property
    def _leads(self) -> bool:
        return self.scheduler is not None and self.scheduler.leads

    def _store(self) -> Store | None:
        owner = self.scheduler and self.scheduler._platform
        return owner.store if owner else None


@lru_cache(maxsize=1)
def _telling(_pid: int) -> _Telling:
    return _Telling()


def _name() -> str:
    return f"beat@{socket.gethostname()}#{os.getpid()}"


class Scheduler(RedBeatScheduler):  # type: ignore[misc]
    """What `celery beat` runs, by `beat_scheduler` in celeryconfig.py."""

    lock: Any = None

    def __init__(self, app: Any, *args: Any, **kwargs: Any) -> None:
        _end_at_signals()
        self._outage = OutageLog(log, "beat")
        self._term: int | None = None
        self._published = False
        self._number: int | None = None
        self._newer = Newer.NONE
        self._signs_off = False
        self._sample_at = 0.0
        self._settings = settings()
        if self._settings.sentinel is not None and getattr(app, REDBEAT_REDIS_KEY, None) is None:
            # of Sentinels redbeat makes a new pool, and asks them anew, each time that it needs a connection
            setattr(app, REDBEAT_REDIS_KEY, connect(self._settings.redis_url, tls=self._settings.redis_tls))
        super().__init__(app, *args, **kwargs)
        self._name = _name()
        self._log_level = logs.LevelFollower("beat", self._name)
        self._platform: Platform | None = None
        self._telling = _telling(os.getpid())
        self._telling.scheduler = self
        self._pulse = self._telling.pulse
        self._platform = owner = platform_when_reachable(failed=self._pulse.failed)
        self._store = owner.store
        self._catalogue = owner.catalogue
        self._planner = Planner(
            owner.store,
            owner.catalogue,
            horizon=owner.settings.plan_horizon,
            batch=owner.settings.plan_batch,
            name=self._name,
            environment=environment(),
        )
        self._digest = self._digest_of_all()
        self._gauge = ClockGauge(owner.store.now_ms)
        self._info = self._told()

    @property
    def leads(self) -> bool:
        """Whether it leads, as far as it knows."""
        return self._term is not None

    def setup_schedule(self) -> None:
        """Redbeat's, but only by a leader that publishes: any other whose entries differ would delete those that are in force."""
        if self._published:
            super().setup_schedule()

    def tick(self, **kwargs: Any) -> float:
        """One round as leader or as standby. Returns the seconds until the next."""
        self._log_level.end()
        try:
            with self._telling.seconds.time():
                wait = self._tick(**kwargs)
            self._log_level.look(self._store.log_levels)
        except (LockLost, Conflict):
            self._step_down(self._why_lost())
            self._pulse.succeeded()
            return float(self.max_interval)
        except Exception as fault:
            outage = unavailable(fault)
            if outage is None:
                # this ends the process, and not in good order
                self._signs_off = False
                raise
            self._pulse.failed(outage)
            self._make_room(outage)
            return min(self._outage.failed(outage), float(self.max_interval))
        self._outage.over()
        self._pulse.succeeded()
        return wait

    def _make_room(self, outage: StoreUnavailable) -> None:
        """Where memory is full the sweep cannot be sent to a worker, because a message takes some."""
        if outage.outage is Outage.MEMORY and self._platform is not None:
            try:
                self._platform.sweep(budget=timedelta())
            except StoreUnavailable as fault:
                log.debug("the sweep: %s", fault)

    def close(self) -> None:
        """Give the lock back if this beat leads, and sign off unless it was broken by an error; if Redis can be reached."""
        lock, token = self.lock, self.lock and self.lock.local.token

        self._telling.ops.stop()
        tracing.flush()

        def release() -> None:
            try:
                if self._signs_off:
                    self._signs_off = False
                    self._store.sign_off(self._name)
                if lock:
                    lock.local.token = token  # each thread has its own
                super(Scheduler, self).close()
            except Exception as fault:
                log.warning("the lock may not be released, because of %s; then a standby leads when it has run out", fault)

        # Redbeat's client tries again for half an hour
        thread = threading.Thread(target=release, name="beat-close", daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)
        if thread.is_alive():
            log.warning("the lock was not released within %g s; a standby leads when it has run out", _CLOSE_SECONDS)

    # --- leader or standby -----------------------------------------------------------------------------------------

    def _tick(self, **kwargs: Any) -> float:
        self._attend()
        if self._newer is Newer.LIVES:
            # also where a takeover failed after it had the lock
            if self._term is not None or self.lock is not None:
                self._step_down("a beat with a newer catalogue is here")
            return float(self.max_interval)
        if self._term is None and not self._take_over():
            return float(self.max_interval)
        if not self._published and self._newer is Newer.NONE:
            self._publish()
        self._extend()
        # first: what Redis refuses comes out here, and not in redbeat, that would log it with a traceback for each entry
        wait = self._advance()
        self._note_sample()
        return float(min(wait, self.max_interval, super().tick(**kwargs)))

    def _attend(self) -> None:
        """Say that this beat lives, and see whether another has something newer."""
        alive = self._settings.beat_lock_timeout
        self._number, self._newer = self._store.attend(
            self._name,
            catalogue=self._digest,
            number=self._number,
            leads=self._term is not None,
            alive=alive,
            account=_ACCOUNT * alive,
            info={**self._info, "clock": self._gauge.text()},
        )
        self._signs_off = True

    def _take_over(self) -> bool:
        """Lead, if nobody does."""
        if self.lock_key and not self._acquire():
            return False
        self._extend()
        self._published = False
        self._term = self._planner.begin(confirm=self._extend)
        log.info("beat leads and plans from now on")
        if self._newer is not Newer.NONE:
            log.warning(
                "a beat with a newer catalogue was here not long ago: this one plans what is published, as far as it has the same, and "
                "publishes its own only when the newer one stays away"
            )
        return True

    def _acquire(self) -> bool:
        if self.lock is not None:
            return True  # what came after it failed
        client = get_redis(self.app)
        lock = client.lock(self.lock_key, timeout=self.lock_timeout)
        # redbeat's: to so many seconds from now on, not by so many
        lock.lua_extend = client.register_script(LUA_EXTEND_TO_SCRIPT)
        if lock.acquire(blocking=False):
            self.lock = lock
        return self.lock is not None

    def _extend(self) -> None:
        self._pulse.step()
        if self.lock is not None:
            self.lock.extend(int(self.lock_timeout))

    def _step_down(self, why: str) -> None:
        """Be a standby."""
        log.warning("%s: stepping down", why)
        lock, self.lock = self.lock, None
        self._term, self._published = None, False
        if lock is not None:
            with suppress(LockLost):
                lock.release()

    def _why_lost(self) -> str:
        with suppress(StoreError):
            planner = self._store.planner()
            if planner.get("leader") != self._name:
                since = datetime.fromtimestamp(int(planner.get("since", 0)) / 1000, UTC)
                return f"another beat, {planner.get('leader')}, leads since {since:%Y-%m-%dT%H:%M:%SZ}"
        return "the lock was lost"

    # --- as leader -------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Put this beat's catalogue and settings in force."""
        settings, term = self._settings, self._term
        assert term is not None
        self._store.configure_limits(settings.limits, actor=self._name, term=term)
        self._store.set_options(fairness=settings.fairness, share=settings.lower_share, term=term, retention=settings.retention)
        self._planner.publish(term, confirm=self._extend)
        self._extend()
        self._published = True
        self.setup_schedule()

    def _note_sample(self) -> None:
        """For who asks later what grew."""
        if time.monotonic() >= self._sample_at:
            self._sample_at = time.monotonic() + SAMPLE_EVERY.total_seconds()
            self._store.note_sample()

    def _digest_of_all(self) -> str:
        """Of what `_publish` puts in force."""
        content = {
            "definitions": {name: definition.version for name, definition in self._catalogue.items()},
            "limits": {name: str(limit) for name, limit in self._settings.limits.items()},
            "options": [self._settings.fairness, self._settings.lower_share],
            "entries": self.app.redbeat_conf.schedule,
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _told(self) -> dict[str, str]:
        """What others can compare."""
        return {
            "host": socket.gethostname(),
            "conf": json.dumps(celery_settings(self.app.conf, redbeat_lock_timeout=self.lock_timeout)),
            "definitions": digest({name: one.version for name, one in self._catalogue.items()}),
            **versions(),
            **identity(),
        }

    def _advance(self) -> float:
        try:
            # well within the lock's timeout, so that a long plan does not cost the lead
            budget = min(timedelta(seconds=2), self._settings.beat_lock_timeout / 5)
            return self._planner.advance(budget=budget).total_seconds()
        except StoreUnavailable:
            raise
        except Exception as fault:
            self._planner.failed(fault)
            return float(self.max_interval)


class PlatformBeat(Beat):  # type: ignore[misc]
    """Celery's beat program, without its banner where programs read what it writes."""

    def run(self) -> None:
        """Until it is ended."""
        self.quiet: bool = self.quiet or not logs.is_for_people(settings())
        super().run()


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
