"""How a worker stops: within its grace, whatever blocks it, and with nothing left to find.

The first SIGTERM or SIGINT begins it, Celery's remote control too. The worker takes nothing new, and gives back at once what it
has taken and not started. What runs may go on for the grace. Then, or after a second signal, or a SIGQUIT, what still runs is broken
off and given back. The exit code is 0, however it went.

Celery's own warm shutdown waits for running tasks without end, and for a broker that does not answer; its cold one tells nobody
whose jobs they were. So a thread watches over it, which touches neither: what it asks of Redis it asks in another thread,
and waits for the answer only so long.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from celery.apps.worker import Worker
from celery.concurrency import get_implementation
from celery.worker import state

from taskplatform import logs
from taskplatform.consumer import PlatformConsumer
from taskplatform.recovery import RecoveryLoop
from taskplatform.settings import settings

log = logging.getLogger(__name__)

PREFORK = "celery.concurrency.prefork"
_POOLS = (PREFORK, "celery.concurrency.thread", "celery.concurrency.solo")

#: A run that is broken off may use this time to tidy up, before its process is killed.
TIDY_SECONDS = 3.0
#: So long the end waits for Redis, and for Celery to let go of the broker. With the above it makes the 10 seconds after the grace.
_REDIS_SECONDS = 2.0
_RELEASE_SECONDS = 3.0
#: With nothing running any more Celery is at its end in less, unless something blocks it.
_IDLE_SECONDS = 5.0
_LOOK_SECONDS = 0.05

_under_way = threading.Event()


def is_stopping() -> bool:
    """Whether this worker is about to end: then a run that breaks off does so because of that."""
    return _under_way.is_set()


def snapshot(requests: Iterable[Any]) -> list[Any]:
    """The members of one of Celery's sets, which another thread may change meanwhile."""
    while True:
        try:
            return list(requests)
        except RuntimeError:
            continue


class PlatformWorker(Worker):  # type: ignore[misc]
    """Celery's worker program, with this stop."""

    ending: Ending | None = None

    def on_before_init(self, quiet: bool = False, **kwargs: Any) -> None:
        """Celery warns of some things before it sets up its logs."""
        chosen = settings()
        logs.log_to_stderr(chosen, lambda: chosen.secrets, role="worker")
        super().on_before_init(quiet=quiet or not logs.is_for_people(chosen), **kwargs)

    def on_after_init(self, **kwargs: Any) -> None:
        """Refuse a pool that would get no jobs: the platform's loops are threads, which green ones do not run."""
        super().on_after_init(**kwargs)
        pool = get_implementation(self.pool_cls)
        if pool.__module__ not in _POOLS:
            raise SystemExit(
                f"taskplatform cannot start:\nthe pool {pool.__module__} is not accepted: --pool takes prefork, threads or solo"
            )

    def install_platform_tweaks(self, worker: Any) -> None:
        """Celery's signal handlers, and over three of them ours. Before anything is started."""
        super().install_platform_tweaks(worker)
        self.ending = ending = Ending(self, grace=settings().stop_grace)
        begin_warm, owner = signal.getsignal(signal.SIGTERM), os.getpid()
        asked = False

        def on_signal(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            if os.getpid() != owner:
                os._exit(128 + number)  # a pool process, before it has handlers of its own
            ending.ask(signal.Signals(number))
            if not asked and callable(begin_warm):
                asked = True
                begin_warm(number, frame)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, on_signal)

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        """Also where no signal asked for it."""
        if self.ending is not None:
            self.ending.ask(None)
        super().stop(in_sighandler=in_sighandler, exitcode=exitcode)


class Ending:
    """Sees to it that the worker ends. `recovery`, and what breaks off calls in threads, are set once the worker can have jobs."""

    def __init__(self, worker: PlatformWorker, *, grace: timedelta) -> None:
        self._worker = worker
        self._grace_seconds = grace.total_seconds()
        #: A signal handler may put into it whatever the interrupted code holds.
        self._asked: SimpleQueue[signal.Signals | None] = SimpleQueue()
        self.recovery: RecoveryLoop | None = None
        self.break_off_calls: Callable[[], None] = lambda: None
        threading.Thread(target=self._run, name="platform-stop", daemon=True).start()

    def ask(self, number: signal.Signals | None) -> None:
        """Stop, because of this signal or for another reason. A second signal, or SIGQUIT, makes it give all back now."""
        self._asked.put(number)

    def _run(self) -> None:
        first = self._asked.get()
        _under_way.set()
        _start(self._take_nothing_new, "what has not started may not have been given back")
        why = self._wait(first)
        log.warning("stopping now, %s: what still runs is broken off and given back", why)
        consumer = self._consumer()
        if consumer is not None and self._worker.blueprint.started == len(self._worker.steps):
            # what it is just about to take would start after all was given back
            consumer.stopped.wait(_RELEASE_SECONDS)
        self._break_off()
        _start(self._leave, "others find its jobs when they miss its heartbeat").join(_REDIS_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        # not by an exception: nothing here must wait for threads that run jobs, nor for a broker that does not answer
        os._exit(self._worker.exitcode or 0)

    def _take_nothing_new(self) -> None:
        consumer = self._consumer()
        if self.recovery is None:
            return
        self.recovery.drain(self._held())
        if consumer is not None and consumer.stopped.wait(_RELEASE_SECONDS):
            self.recovery.withdraw(self._held())  # what came while the signal did

    def _wait(self, first: signal.Signals | None) -> str:
        """Until the runs must end. Returns why; where they end before, Celery ends the process meanwhile."""
        if first is signal.SIGQUIT:
            return "because of SIGQUIT"
        signals = 0 if first is None else 1
        end = time.monotonic() + self._grace_seconds
        idle_since: float | None = None
        while (now := time.monotonic()) < end:
            with suppress(Empty):
                number = self._asked.get(timeout=_LOOK_SECONDS)
                signals += number is not None
                if number is not None and (number is signal.SIGQUIT or signals > 1):
                    return f"{number.name} after the first signal"
            if snapshot(state.active_requests) or snapshot(state.reserved_requests):
                idle_since = None
            elif idle_since is None:
                idle_since = now
            elif now - idle_since > _IDLE_SECONDS:
                return "nothing runs any more, and something holds up the end"
        return f"the grace of {self._grace_seconds:g} s is over"

    def _break_off(self) -> None:
        """End the pool's processes, or what calls its threads make. A Python function in a thread ends with this process."""
        pool = self._worker.pool
        if pool is None or type(pool).__module__ != PREFORK:
            self.break_off_calls()
            return
        told: set[int] = set()
        begun = time.monotonic()
        while processes := [one for one in _processes(pool) if _lives(one)]:
            waited = time.monotonic() - begun
            if waited > TIDY_SECONDS + 1:
                return
            for one in processes:
                number = signal.SIGKILL if waited > TIDY_SECONDS else signal.SIGTERM
                if number is signal.SIGKILL or one.pid not in told:
                    told.add(one.pid)
                    with suppress(OSError):
                        pool.terminate_job(one.pid, number)
            time.sleep(_LOOK_SECONDS)

    def _leave(self) -> None:
        held, consumer = self._held(), self._consumer()
        try:
            if consumer is not None:
                consumer.let_go()
        finally:
            # the last of all: where threads run jobs, they go on until this process ends
            if self.recovery is not None:
                self.recovery.stop(held)

    def _held(self) -> list[str]:
        consumer = self._consumer()
        return [] if consumer is None else consumer.held()

    def _consumer(self) -> PlatformConsumer | None:
        consumer = getattr(self._worker, "consumer", None)
        return consumer if isinstance(consumer, PlatformConsumer) else None


def _start(call: Callable[[], None], otherwise: str) -> threading.Thread:
    """In a thread of its own: Redis may not answer."""

    def run() -> None:
        try:
            call()
        except Exception as fault:
            log.warning("%s; %s", fault, otherwise)

    thread = threading.Thread(target=run, name="platform-stop-redis", daemon=True)
    thread.start()
    return thread


def _processes(pool: Any) -> list[Any]:
    inner = pool._pool
    return [] if inner is None else list(inner._pool)


def _lives(process: Any) -> bool:
    return process.pid is not None and process.exitcode is None
