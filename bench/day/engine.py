"""Lets simulated time pass: the real planner, the real scripts, and workers of which only the processes are simulated."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from heapq import heapify, heappop, heappush
from typing import Any, Protocol, TypeVar

import redis
from redis.exceptions import NoScriptError

from taskplatform.catalogue import Catalogue
from taskplatform.model import BreakerRule, CallReport, JobState, Priority
from taskplatform.planner import Planner
from taskplatform.platform import Platform
from taskplatform.settings import Settings
from taskplatform.store import Store
from taskplatform.store.keys import key
from taskplatform.store.scripts import Scripts

T = TypeVar("T")

#: From the release of a job until its start, where a slot is free.
LATENCY_MS = 15
#: So often a worker looks for what may be released, while it waits for a time.
LOOK_MS = 50
_RULE = BreakerRule(share=0.5, calls=20, window=timedelta(seconds=60), pause=timedelta(seconds=30))
_LOSS_BACKOFF = timedelta(seconds=1)


class Clock:
    """Milliseconds since the epoch, which pass only when the simulation says so."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


@dataclass(frozen=True)
class Profile:
    """How the runs of a definition go."""

    mean_s: float = 0.4
    """Of the run times, which have a log-normal distribution."""
    sigma: float = 0.5
    fails: float = 0.02
    times_out: float = 0.002
    calls: str = ""
    """The host whose breaker hears of the call's end."""


@dataclass(slots=True)
class Run:
    """A delivery that runs, and how it will end."""

    job_id: str
    delivery: int
    worker: str
    attempt: int
    started_ms: int
    after_ms: int
    ends_ms: int = 0
    state: JobState = JobState.COMPLETED
    reason: str = "completed"
    retry_in: timedelta | None = None
    recorded: bool = False
    """Whether the platform took its end; else it was canceled or lost meanwhile."""
    lost_ms: int | None = None
    """When its worker died with it."""


class Watcher(Protocol):
    """Who is told what happens."""

    def ticked(self, at_ms: int) -> None:
        """The planner has advanced."""

    def started(self, run: Run) -> None:
        """A delivery runs."""

    def ended(self, run: Run) -> None:
        """Its end was told, or its worker died."""

    def lost(self, job_id: str, at_ms: int, most_losses: int) -> None:
        """A job was taken from a worker that is lost; with so many losses it is a poison pill."""


class Together:
    """Makes many calls of a store's verbs in one round trip, each at an instant of its own."""

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        self._client = client
        self._clock = Clock(0)
        self._real = Scripts(client, namespace)
        self._store = Store(client, namespace=namespace, clock=self._clock)
        self._store._scripts = self  # type: ignore[assignment]
        self._pipe: redis.client.Pipeline | None = None
        self._answer: Any = None
        self._loaded: set[str] = set()

    def run(self, name: str, *args: str | int | float) -> Any:
        """What the store calls: the first time the script is noted, the second time its answer is given."""
        if self._pipe is None:
            return self._answer
        digest, text = self._real._known.get(name) or self._real._read(name)
        if name not in self._loaded:
            self._client.script_load(text)
            self._loaded.add(name)
        self._pipe.execute_command("EVALSHA", digest, 0, self._clock.now_ms, *args)  # type: ignore[no-untyped-call]
        raise _Noted

    def __call__(self, calls: Sequence[tuple[int, Callable[[Store], T]]]) -> list[T]:
        """The answers to the calls, in order. Each must run one script."""
        if not calls:
            return []
        self._pipe = pipe = self._client.pipeline(transaction=False)
        for self._clock.now_ms, call in calls:
            try:
                call(self._store)
            except _Noted:
                continue
            raise AssertionError("a call that ran no script")
        try:
            raw = pipe.execute()
        except NoScriptError:
            # the server forgot them, with the first: nothing has been done
            self._loaded.clear()
            return self(calls)
        finally:
            self._pipe = None
        answers: list[T] = []
        for self._answer, (_, call) in zip(raw, calls, strict=True):
            answers.append(call(self._store))
        return answers


class _Noted(Exception):
    """A script was noted."""


@dataclass(frozen=True)
class Pace:
    """How finely time passes."""

    grid_ms: int = 0
    """What happens in so long is done together, each at its own instant; 0: from instant to instant."""
    tick_ms: int = 1000
    """The planner looks again after this at the earliest."""
    look_ms: int = 200
    """So often, inside what is done together, workers look for what may be released."""
    heartbeat_ms: int = 300_000
    sweep_ms: int = 3_600_000


@dataclass
class World:
    """The platform at one instant after the other. `at` puts something on the agenda, `run_until` lets time pass."""

    client: redis.Redis
    clock: Clock
    catalogue: Catalogue
    settings: Settings
    watcher: Watcher
    rng: random.Random
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: int = 4
    slots: int = 8
    pace: Pace = field(default_factory=Pace)
    steps: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        namespace = self.settings.namespace
        self.store = Store(self.client, namespace=namespace, clock=self.clock)
        self.platform = Platform(self.store, self.catalogue, self.settings, actor="day")
        self._together = Together(self.client, namespace)
        self._queued = {priority: key(namespace, "queued", priority) for priority in Priority}
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0
        self._runs: list[tuple[int, int, Run]] = []
        self._free: list[tuple[int, int, str]] = []
        self._alive: set[str] = set()
        self._tick_ms: int | None = None
        self._last_tick_ms = 0
        self._release_ms: int | None = None
        self.planner: Planner | None = None
        for number in range(self.workers):
            self.arrive(f"celery@worker{number}")
        self.at(self.clock.now_ms, self._upkeep)
        self.at(self.clock.now_ms + self.pace.sweep_ms, self._sweep)

    # --- what can be done to it

    def at(self, when_ms: int, what: Callable[[], None]) -> None:
        """Put something on the agenda."""
        self._count += 1
        heappush(self._agenda, (when_ms, self._count, what))

    def lead(self, catalogue: Catalogue | None = None, name: str = "celery@beat") -> None:
        """A beat leads from now on, with this catalogue."""
        if catalogue is not None:
            self.catalogue = catalogue
            self.platform = Platform(self.store, catalogue, self.settings, actor="day")
        chosen = self.settings
        self.planner = Planner(
            self.store, self.catalogue, horizon=chosen.plan_horizon, batch=chosen.plan_batch, name=name, environment=self.environment
        )
        term = self.planner.begin()
        self.store.configure_limits(chosen.limits, actor=name, term=term)
        self.planner.publish(term)
        self._tick_ms = self.clock.now_ms

    def stop_planner(self) -> None:
        """No beat leads until `lead`."""
        self.planner, self._tick_ms = None, None

    def arrive(self, worker: str) -> None:
        """A worker starts."""
        self._alive.add(worker)
        for _ in range(self.slots):
            self._count += 1
            heappush(self._free, (self.clock.now_ms, self._count, worker))
        self._beat(worker)

    def die(self, worker: str, *, most_losses: int | None = None) -> None:
        """A worker ends without a word: what it runs is lost, and found when its heartbeat is missed.

        With `most_losses`, what is lost for the so-manieth time is a poison pill.
        """
        self._alive.discard(worker)
        self._free = [slot for slot in self._free if slot[2] != worker]
        heapify(self._free)
        for ends_ms, _, run in self._runs:
            if run.worker == worker and ends_ms > self.clock.now_ms:
                run.lost_ms = self.clock.now_ms
                self.watcher.ended(run)
        self._runs = [entry for entry in self._runs if entry[2].lost_ms is None]
        heapify(self._runs)
        silence_ms = 2 * self.pace.heartbeat_ms + 60_000
        self.at(self.clock.now_ms + silence_ms, lambda: self._recover(worker, most_losses or self.settings.max_losses))

    def leave(self) -> None:
        """All workers end in good order."""
        for worker in sorted(self._alive):
            self.store.leave(worker)
        self._alive.clear()
        self._free.clear()
        self._runs.clear()

    def tell(self) -> None:
        """All workers that live say so: they do that every few seconds, and here only when it counts."""
        for worker in sorted(self._alive):
            self._beat(worker)

    def poke(self) -> None:
        """Something was changed: the planner and the workers look soon."""
        now_ms = self.clock.now_ms
        if self.planner is not None:
            wanted = max(now_ms, self._last_tick_ms + self.pace.tick_ms)
            self._tick_ms = wanted if self._tick_ms is None else min(self._tick_ms, wanted)
        self._release_ms = now_ms

    # --- time passes

    def run_until(self, end_ms: int) -> None:
        """Let all happen up to and including this instant."""
        while (upcoming := self._next()) is not None and upcoming <= end_ms:
            self._step(self._horizon(upcoming, end_ms))
        self.clock.now_ms = max(self.clock.now_ms, end_ms)

    def _next(self) -> int | None:
        times = [self._tick_ms, self._release_ms, *(heap[0][0] for heap in (self._agenda, self._runs) if heap)]
        known = [time for time in times if time is not None]
        return max(self.clock.now_ms, min(known)) if known else None

    def _horizon(self, upcoming: int, end_ms: int) -> int:
        """Up to when things are done together that begin at `upcoming`."""
        if not self.pace.grid_ms:
            return upcoming
        grid = (upcoming // self.pace.grid_ms + 1) * self.pace.grid_ms
        return max(upcoming, min(grid, end_ms, self._agenda[0][0] if self._agenda else grid))

    def _step(self, until_ms: int) -> None:
        self.steps["steps"] += 1
        while self._tick_ms is not None and self._tick_ms <= until_ms:
            self._set(self._tick_ms)
            self._tick()
        self._work(until_ms)
        self._set(until_ms)
        while self._agenda and self._agenda[0][0] <= until_ms:
            heappop(self._agenda)[2]()
            self.poke()

    def _set(self, now_ms: int) -> None:
        self.clock.now_ms = max(self.clock.now_ms, now_ms)

    def _tick(self) -> None:
        assert self.planner is not None
        self.steps["ticks"] += 1
        wait = self.planner.advance(budget=timedelta(minutes=10))
        now_ms = self.clock.now_ms
        self._last_tick_ms = now_ms
        self._tick_ms = now_ms + max(self.pace.tick_ms, math.ceil(wait / timedelta(milliseconds=1)))
        self._release_ms = now_ms if self._release_ms is None else min(now_ms, self._release_ms)
        self.watcher.ticked(now_ms)

    def _work(self, until_ms: int) -> None:
        """Release, start and end what can be up to this instant."""
        if self._release_ms is None and not (self._runs and self._runs[0][0] <= until_ms):
            return
        while True:
            if self._release_ms is not None and self._release_ms <= until_ms:
                self._release(until_ms)
            moved = 0
            while progress := self._start(until_ms) + self._finish(until_ms):
                moved += progress
            if moved:
                # what ended made room
                self._release_ms = min(until_ms, self._release_ms if self._release_ms is not None else until_ms)
            if self._release_ms is None or self._release_ms > until_ms or not moved:
                return

    def _release(self, until_ms: int) -> None:
        assert self._release_ms is not None
        first = min(max(self._release_ms, self.clock.now_ms), until_ms)
        instants = [*range(first, until_ms, self.pace.look_ms), until_ms]
        self.steps["releases"] += len(instants)
        answers = self._together([(instant, lambda store: store.release(limit=1000)) for instant in instants])
        _, wait_ms = answers[-1]
        self._release_ms = None if wait_ms is None else until_ms + max(LOOK_MS, wait_ms)

    def _start(self, until_ms: int) -> int:
        slots = self._room(until_ms)
        messages: list[tuple[str, int, Priority]] = []
        while len(messages) < slots:
            found: Any = self.client.lmpop(3, *Priority, direction="RIGHT", count=slots - len(messages))
            if not found:
                break
            for raw in found[1]:
                headers = json.loads(raw)["headers"]
                messages.append((headers["id"], headers["delivery"], Priority(found[0])))
        if not messages:
            return 0
        pipe = self.client.pipeline(transaction=False)
        for job_id, _, queue in messages:
            pipe.zscore(self._queued[queue], job_id)
        calls, plans, begun = [], [], 0
        for (job_id, delivery, _), released in zip(messages, pipe.execute(), strict=True):
            free_ms, _, worker = heappop(self._free)
            at_ms = min(until_ms, max(free_ms, int(released or 0) + LATENCY_MS)) if self.pace.grid_ms else until_ms
            calls.append((at_ms, _starting(job_id, delivery, worker)))
            plans.append((at_ms, job_id, delivery, worker))
        for (at_ms, job_id, delivery, worker), start in zip(plans, self._together(calls), strict=True):
            if not start.go:
                self.steps[f"refused {start.refusal}"] += 1
                self._give_slot(at_ms, worker)
                continue
            run = Run(job_id, delivery, worker, start.attempt, at_ms, start.execute_after_ms)
            self._decide(run, start.failures)
            self._count += 1
            heappush(self._runs, (run.ends_ms, self._count, run))
            self.watcher.started(run)
            begun += 1
        self.steps["starts"] += begun
        return begun

    def _room(self, until_ms: int) -> int:
        return sum(free_ms <= until_ms for free_ms, _, _ in self._free)

    def _give_slot(self, at_ms: int, worker: str) -> None:
        if worker in self._alive:
            self._count += 1
            heappush(self._free, (at_ms, self._count, worker))

    def _decide(self, run: Run, failures: int) -> None:
        """How long it takes and how it ends."""
        name = run.job_id.split(":", 1)[0]
        definition, profile, rng = self.catalogue.get(name), self.profiles.get(name, Profile()), self.rng
        run.ends_ms = run.started_ms + max(5, round(1000 * profile.mean_s * rng.lognormvariate(-(profile.sigma**2) / 2, profile.sigma)))
        if definition is None:
            return
        luck = rng.random()
        late = run.ends_ms > run.started_ms + definition.timeout / timedelta(milliseconds=1)
        if late or luck < profile.times_out:
            run.ends_ms = run.started_ms + round(definition.timeout / timedelta(milliseconds=1))
            run.state, run.reason = JobState.TIMED_OUT, f"no end within {definition.timeout.total_seconds():g} s"
        elif luck < profile.times_out + profile.fails:
            run.state, run.reason = JobState.FAILED, "HTTP 503 Service Unavailable"
        else:
            return
        if failures < definition.retries:
            run.state = JobState.RETRYING
            run.retry_in = definition.backoff.delay(failures + 1, random_share=rng.random())

    def _finish(self, until_ms: int) -> int:
        ended: list[Run] = []
        while self._runs and self._runs[0][0] <= until_ms:
            ended.append(heappop(self._runs)[2])
        answers = self._together([(run.ends_ms, self._ending(run)) for run in ended])
        for run, recorded in zip(ended, answers, strict=True):
            run.recorded = recorded
            self._give_slot(run.ends_ms, run.worker)
            self.watcher.ended(run)
        self.steps["ends"] += len(ended)
        return len(ended)

    def _ending(self, run: Run) -> Callable[[Store], bool]:
        host = self.profiles.get(run.job_id.split(":", 1)[0], Profile()).calls
        failed = run.reason != "completed"
        call = CallReport(host=host, failed=failed, rule=_RULE) if host else None
        late = run.reason.startswith("no end")
        return lambda store: store.finish(
            run.job_id,
            delivery=run.delivery,
            worker=run.worker,
            state=run.state,
            reason=run.reason,
            retry_in=run.retry_in,
            call=call,
            late=late and run.state is JobState.RETRYING,
        )

    # --- at intervals

    def _beat(self, worker: str) -> None:
        orders = self.store.heartbeat(worker, slots=self.slots, queues=list(Priority), buffer=self.settings.queue_buffer)
        for stop in orders.stops:
            self.store.stopped(worker, stop)

    def _upkeep(self) -> None:
        self.tell()
        self.store.reclaim(patience=timedelta(milliseconds=self.pace.heartbeat_ms))
        self.at(self.clock.now_ms + self.pace.heartbeat_ms, self._upkeep)

    def _sweep(self) -> None:
        self.platform.sweep()
        self.at(self.clock.now_ms + self.pace.sweep_ms, self._sweep)

    def _recover(self, worker: str, most_losses: int) -> None:
        """What the other workers do when they miss its heartbeat."""
        seen_ms = self.store.heartbeats().get(worker)
        if worker in self._alive or seen_ms is None:
            return
        silence = timedelta(milliseconds=self.clock.now_ms - seen_ms)
        taken = self.store.recover(
            worker,
            seen_ms=seen_ms,
            how=f"silent for {silence.total_seconds():g}s",
            max_losses=most_losses,
            backoff=_LOSS_BACKOFF,
            limit=10_000,
        )
        for kind, name in taken:
            if kind == "job":
                self.watcher.lost(name, self.clock.now_ms, most_losses)


def _starting(job_id: str, delivery: int, worker: str) -> Callable[[Store], Any]:
    return lambda store: store.start(job_id, delivery=delivery, worker=worker)
