"""Says that this worker lives, and takes the jobs of those that do not.

Each worker heartbeats, and watches the heartbeats of the others. Besides, it looks for released jobs whose message was lost between
broker and worker, and for its own runs that are stuck or have gone.

Who is lost is decided by spans that the watching worker measures itself, by a clock that nobody sets, and only while it watches: no
step of any machine's clock, no time in which Redis was away, and no time in which the watcher itself was stopped counts against anybody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from taskplatform.errors import StoreError, StoreUnavailable
from taskplatform.health import Alarm
from taskplatform.logs import LevelFollower
from taskplatform.model import Backoff, CallReport, JobState, format_duration
from taskplatform.node import ClockGauge
from taskplatform.outage import OutageLog
from taskplatform.process import has_ended
from taskplatform.pulse import Pulse
from taskplatform.settings import Settings
from taskplatform.store import Stop, Store

log = logging.getLogger(__name__)

#: Before the next run of a job whose worker was lost; doubled by each further loss.
LOSS_BACKOFF = timedelta(seconds=1)
#: The longest between two looks at the heartbeats of others; shorter where heartbeats are more frequent.
_LOOK = timedelta(seconds=1)
#: The longest between two looks for lost messages and for this worker's own runs.
_CARE = timedelta(seconds=3)
#: A run that goes on so long after its hard time limit is stuck: what should have ended it did not.
STUCK_MARGIN = timedelta(seconds=5)

Clock = Callable[[], float]


class WatchedTime:
    """How much time passed from one look to the next, as far as somebody looked: never more than `most` seconds."""

    def __init__(self, most: float, clock: Clock = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._last: float | None = None

    def passed(self) -> float:
        """Since the last call; to be called before the look that it is for."""
        last, self._last = self._last, self._clock()
        return 0.0 if last is None else min(self._last - last, self._most)


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker that is lost."""

    worker: str
    seen_ms: int
    """Its last heartbeat. Should there be another by now, it is not lost."""
    how: str


@dataclass(slots=True)
class _Watched:
    seen_ms: int
    silent: float = 0.0
    info: Mapping[str, str] | None = None


class Observer:
    """Watches the heartbeats of other workers.

    A worker is lost when its last heartbeat has stayed the same for `timeout`, or when its process ran on this machine and has ended.
    An observer that begins, or that was itself stopped, knows nothing and may have to wait for the whole timeout.
    """

    def __init__(
        self,
        *,
        timeout: timedelta,
        own: str,
        ended: Callable[[Mapping[str, str]], bool] = has_ended,
    ) -> None:
        self._timeout = timeout
        self._own = own
        self._ended = ended
        self._watched: dict[str, _Watched] = {}

    def look(self, beats: Mapping[str, int], passed: float, info: Callable[[Sequence[str]], Sequence[Mapping[str, str]]]) -> list[Lost]:
        """Who is lost, by heartbeats that were read just now, `passed` seconds of watching after the last ones.

        `info` gives what workers say of themselves.
        """
        before = self._watched
        self._watched = {worker: before.get(worker) or _Watched(at_ms) for worker, at_ms in beats.items() if worker != self._own}
        # one that started a job before its first heartbeat, or after it was declared lost, has not said anything yet
        new = [worker for worker, one in self._watched.items() if not one.info]
        for worker, said in zip(new, info(new) if new else (), strict=True):
            self._watched[worker].info = said
        lost = []
        for worker, one in self._watched.items():
            if beats[worker] != one.seen_ms:
                one.seen_ms, one.silent = beats[worker], 0.0
            elif worker in before:
                one.silent += passed
            if self._ended(one.info or {}):
                lost.append(Lost(worker, one.seen_ms, "its process has ended"))
            elif one.silent >= self._timeout.total_seconds():
                lost.append(Lost(worker, one.seen_ms, f"silent for {format_duration(self._timeout)}"))
        return lost


@dataclass(slots=True)
class _OwnRun:
    """A run that is recorded here."""

    delivery: int
    ran: float = 0.0
    missing: bool = False
    """It was not found here the last time."""


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
    call: CallReport | None = None
    late: bool = False
    """A time limit ended it."""

    def record(self, store: Store) -> JobState:
        """Tell Redis; as often as need be, because it knows one that it has. Returns the state. Raises StoreError and Discarded."""
        counted = store.finish(
            self.job_id,
            delivery=self.delivery,
            worker=self.worker,
            state=self.state,
            reason=self.reason,
            detail=self.detail,
            retry_in=self.retry_in,
            call=self.call,
            late=self.late,
        )
        if not counted:
            raise Discarded(f"job {self.job_id}: result {self.state} of delivery {self.delivery} discarded: it is not the current one")
        return self.state


@dataclass(frozen=True, slots=True)
class KilledEnding:
    """How a run ended whose process was killed at its hard time limit. How often the job had failed before, Redis has to say."""

    job_id: str
    delivery: int
    worker: str
    reason: str
    retries: int
    backoff: Backoff

    def record(self, store: Store) -> JobState:
        """The same as `Ending.record`."""
        failures = store.job(self.job_id).failures
        again = failures < self.retries
        return Ending(
            self.job_id,
            self.delivery,
            self.worker,
            JobState.RETRYING if again else JobState.TIMED_OUT,
            self.reason,
            retry_in=self.backoff.delay(failures + 1) if again else None,
            late=True,
        ).record(store)


class Discarded(Exception):
    """The run no longer counted."""


class Endings:
    """Ends of runs that Redis could not be told: they are kept until it can, because the work is done. For all threads."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Ending | KilledEnding] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def keep(self, ending: Ending | KilledEnding) -> None:
        """One more. Of the host that it called it says nothing any more: what that was like, it was then."""
        if isinstance(ending, Ending):
            ending = replace(ending, call=None)
        self._kept[ending.job_id, ending.delivery] = ending

    def __contains__(self, place: tuple[str, int]) -> bool:
        """Whether there is one of this job and delivery."""
        return place in self._kept

    def record(self, store: Store) -> None:
        """Tell Redis all of them. Raises StoreUnavailable, and keeps those that it was not told."""
        for place, ending in tuple(self._kept.items()):
            try:
                state = ending.record(store)
                log.info("job %s: recorded late that it is %s", ending.job_id, state)
            except StoreUnavailable:
                raise
            except (Discarded, StoreError) as fault:
                log.warning("%s", fault)
            del self._kept[place]


class RecoveryLoop:
    """Heartbeats and recovers, until `stop`.

    `slots` and `queues` are asked each time, because remote control can change them. `stop_run` is called with each run that is to be
    stopped here, until it is told to the store, and `consume` with whether this worker is to take messages. `has_run` says whether this
    process runs a job's delivery or is about to, or has its end, `limit_of` in which span a run of a definition must have ended (None: it
    is not known). `endings` are those that wait for Redis. `log_level` is looked at with each heartbeat.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        worker: str,
        slots: Callable[[], int],
        queues: Callable[[], list[str]],
        stop_run: Callable[[Stop], None],
        consume: Callable[[bool], None],
        has_run: Callable[[str, int], bool],
        limit_of: Callable[[str], timedelta | None],
        endings: Endings,
        info: Mapping[str, str],
        clock: Clock = time.monotonic,
        pulse: Pulse | None = None,
        log_level: LevelFollower | None = None,
    ) -> None:
        self._pulse = pulse or Pulse("recovery")
        self._log_level = log_level
        self._store = store
        self._settings = settings
        self._worker = worker
        self._slots = slots
        self._queues = queues
        self._stop_run = stop_run
        self._consume = consume
        self._has_run = has_run
        self._limit_of = limit_of
        self._endings = endings
        self._info = info
        self._gauge = ClockGauge(store.now_ms)
        self._clock = clock
        self._alarm = Alarm(store, settings)
        #: This worker stops; and what people told it by `taskplatform nodes drain`.
        self._draining = self._drained = False
        self._stopped = threading.Event()
        look = self._look_seconds
        self._observer = Observer(timeout=settings.heartbeat_timeout, own=worker)
        self._observed = WatchedTime(2 * look, clock)
        self._cared = WatchedTime(2 * self._care_seconds, clock)
        self._cared_for = 0.0
        #: The server's clock and the own one, in seconds, at the last look for lost messages.
        self._last_clocks: tuple[float, float] | None = None
        self._own_runs: dict[str, _OwnRun] = {}
        #: Stuck runs that may still hold a slot here.
        self._stuck: set[tuple[str, int]] = set()
        #: A heartbeat after `leave` would bring the worker back to life.
        self._alive = threading.Lock()

    @property
    def _look_seconds(self) -> float:
        return min(_LOOK, self._settings.heartbeat_interval).total_seconds()

    @property
    def _care_seconds(self) -> float:
        return min(_CARE, self._settings.heartbeat_interval).total_seconds()

    def run(self) -> None:
        """Never raises: without Redis it waits for it."""
        outage = OutageLog(log, "recovery")
        next_beat = next_care = self._clock()
        while not self._stopped.is_set():
            wait = self._look_seconds
            now = self._clock()
            try:
                # its own first: who comes back from a long stop must say so, and learn what is no longer its own
                if self._log_level is not None:
                    self._log_level.end()
                if now >= next_beat:
                    self.beat()
                    if self._log_level is not None:
                        self._log_level.look(self._store.log_levels)
                    next_beat = now + self._settings.heartbeat_interval.total_seconds()
                self._endings.record(self._store)
                self.observe()
                if now >= next_care:
                    self.care()
                    next_care = now + self._care_seconds
                self._alarm.sound()
            except Exception as fault:
                self._pulse.failed(fault)
                wait = min(self._settings.heartbeat_interval.total_seconds(), outage.failed(fault))
            else:
                self._pulse.succeeded()
                outage.over()
            self._stopped.wait(wait)

    def beat(self) -> None:
        """One heartbeat, and what it brings."""
        self._stuck = {run for run in self._stuck if self._has_run(*run)}
        with self._alive:
            if self._stopped.is_set():
                return
            orders = self._store.heartbeat(
                self._worker,
                # what is stuck and cannot be stopped has its slot for ever
                slots=0 if self._draining else max(0, self._slots() - len(self._stuck)),
                queues=self._queues(),
                buffer=self._settings.queue_buffer,
                drained=self._drained,
                info={**self._info, "clock": self._gauge.text()},
            )
        if orders.drained is not self._drained:
            self._drained = orders.drained
            log.warning("this worker %s", "is drained: it takes nothing new" if self._drained else "takes jobs again")
        if not self._draining:
            self._consume(not self._drained)
        for stop in orders.stops:
            self._stop_run(stop)

    def observe(self) -> None:
        """Take what lost workers left."""
        passed = self._observed.passed()
        for lost in self._observer.look(self._store.heartbeats(), passed, self._store.worker_info):
            self._recover(lost)

    def _recover(self, lost: Lost) -> None:
        settings, all_taken = self._settings, False
        while not all_taken:
            taken = self._store.recover(
                lost.worker, seen_ms=lost.seen_ms, how=lost.how, max_losses=settings.max_losses, backoff=LOSS_BACKOFF
            )
            for kind, name in taken:
                log.warning("%s %s: recovered, worker %s is lost: %s", kind, name, lost.worker, lost.how)
            # nothing: another took it, or it lives
            all_taken = not taken or taken[-1][0] == "worker"

    def care(self) -> None:
        """Look for lost messages, and at what is recorded as running here."""
        passed = self._cared.passed()
        patience = self._settings.heartbeat_timeout
        clock_set = self._clock_was_set(patience / 3)
        self._cared_for += passed
        # who has just begun does not know whether the clock was set before, and so for how long anything was queued
        if clock_set or self._cared_for >= patience.total_seconds():
            for job_id in self._store.reclaim(patience=patience, clock_set=clock_set):
                log.warning("job %s: its message was lost, released again", job_id)
        recorded = self._store.running_on(self._worker)
        before, self._own_runs = self._own_runs, {}
        known = {job_id: one for job_id, one in before.items() if job_id in recorded}
        for job in self._store.jobs_by_id(sorted(recorded - known.keys())):
            if job.state is JobState.RUNNING and job.worker == self._worker:
                self._own_runs[job.id] = _OwnRun(job.delivery)
        for job_id, one in known.items():
            one.ran += passed
            if self._keep(job_id, one):
                self._own_runs[job_id] = one

    def _clock_was_set(self, tolerance: timedelta) -> bool:
        """Whether the server's clock has gone otherwise than this machine's spans since the last call."""
        last, self._last_clocks = self._last_clocks, (self._store.now_ms() / 1000, self._clock())
        if last is None:
            return False
        server, own = (now - before for now, before in zip(self._last_clocks, last, strict=True))
        was_set = abs(server - own) > tolerance.total_seconds()
        if was_set:
            log.warning("the clock of Redis was set by %+.0f s", server - own)
        return was_set

    def _keep(self, job_id: str, one: _OwnRun) -> bool:
        """Whether a run that was known goes on; else it is given up, or was another."""
        limit = self._limit_of(job_id.partition(":")[0])
        if not self._has_run(job_id, one.delivery):
            # seen twice: between the end of a run and its record there may be a moment
            if not one.missing:
                one.missing = True
                return True
            if self._lose(job_id, one, "its run ended without a record"):
                log.warning("job %s: its run ended here without a record", job_id)
            return False
        one.missing = False
        if limit is None or one.ran <= (limit + STUCK_MARGIN).total_seconds():
            return True
        what = f"stuck: ran longer than its time limit of {format_duration(limit)}"
        if self._lose(job_id, one, what, stuck=True):
            log.error("job %s: %s, and nothing ended it; given up, its result will be discarded", job_id, what)
            self._stuck.add((job_id, one.delivery))
        return False

    def _lose(self, job_id: str, one: _OwnRun, what: str, *, stuck: bool = False) -> bool:
        return self._store.lose(
            job_id,
            delivery=one.delivery,
            worker=self._worker,
            what=what,
            max_losses=self._settings.max_losses,
            backoff=LOSS_BACKOFF,
            stuck=stuck,
        )

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
