"""What this process tells of itself: whether it makes progress, whether it can do its work, and its metrics.

On its HTTPS port, where metrics ask for a key, and as every other process on its port for health and metrics (`ops`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from prometheus_client import generate_latest

from taskplatform.api.metrics import Requests
from taskplatform.api.records import Readiness
from taskplatform.errors import StoreError
from taskplatform.metrics import PlatformCollector, Recent
from taskplatform.ops import Check, OpsServer, Process
from taskplatform.platform import Platform
from taskplatform.pulse import Pulse
from taskplatform.settings import Settings
from taskplatform.store import Store

#: A look at whether all is ready serves all who ask in this time, and is waited for so long.
_READY_SECONDS = 1.0
_LOOK_SECONDS = 2.0
#: The event loop says so often that it turns. One that has not for so long answers too late to be ready.
_TURN_SECONDS = 0.5
_FRESH_SECONDS = 5.0
_NOT_KNOWN = Readiness(ready=False, redis=False, leader=None, workers=None)


class Telling:
    """Of one process. It tells from its start on, and of the platform once it `serves` it."""

    def __init__(self, settings: Settings) -> None:
        self.pulse = Pulse("requests")
        self.requests = Requests()
        self.stopping: Callable[[], bool] = lambda: False
        self._platform: Platform | None = None
        self._recent = Recent(self._look, keep=_READY_SECONDS, wait=_LOOK_SECONDS)
        self._last, self._until = _NOT_KNOWN, 0.0
        self._looking: asyncio.Future[Readiness] | None = None
        process = Process(
            role="api",
            pulses=[self.pulse],
            patience=settings.ops_patience.total_seconds(),
            fresh=_FRESH_SECONDS,
            looks_at=self._checks,
            stopping=lambda: self.stopping(),
        )
        self.ops = OpsServer(process, settings, collectors=[PlatformCollector(self._store, settings), *self.requests.collectors])

    def serves(self, platform: Platform) -> None:
        """Redis was reached."""
        self._platform = platform

    async def turn(self) -> None:
        """Say that the event loop turns, for as long as it does."""
        while True:
            self.pulse.succeeded()
            await asyncio.sleep(_TURN_SECONDS)

    def metrics(self) -> bytes:
        """All of them, as Prometheus has it. It may ask Redis."""
        return generate_latest(self.ops.registry)

    async def ready(self) -> Readiness:
        """As it was a second ago at the latest. One look at a time, however many ask, and none waits long."""
        if time.monotonic() < self._until:
            return self._last
        if self._looking is None or self._looking.done():
            # a thread of its own: those of the calls may all be waiting for Redis
            self._looking = asyncio.get_running_loop().run_in_executor(None, self._look)
        try:
            self._last = await asyncio.wait_for(asyncio.shield(self._looking), _LOOK_SECONDS)
        except TimeoutError:
            self._last = _NOT_KNOWN
        self._until = time.monotonic() + _READY_SECONDS
        return self._last

    def _checks(self) -> Iterator[Check]:
        """The same for `ops`, whose threads must not wait for the event loop."""
        if self._platform is None:
            return  # the pulse says why
        found = self._recent.get() or _NOT_KNOWN
        yield Check("redis", "" if found.redis else "Redis does not answer", {})
        yield Check("leader", "" if found.leader else "no beat leads" if found.redis else "not known", {"workers": found.workers})

    def _look(self) -> Readiness:
        """Whether Redis answers and a beat leads."""
        if self._platform is None:
            return _NOT_KNOWN
        store, settings = self._platform.store, self._platform.settings
        try:
            now_ms, planner, beats = store.now_ms(), store.planner(), store.heartbeats()
        except StoreError:
            return _NOT_KNOWN
        last = int(planner.get("tick") or planner.get("since") or 0)
        patience = settings.beat_lock_timeout + max(timedelta(seconds=5), 2 * settings.beat_interval)
        leads = timedelta(milliseconds=now_ms - last) <= patience
        alive = sum(timedelta(milliseconds=now_ms - at) <= settings.heartbeat_timeout for at in beats.values())
        return Readiness(ready=leads, redis=True, leader=leads, workers=alive)

    def _store(self) -> Store | None:
        return None if self._platform is None else self._platform.store
