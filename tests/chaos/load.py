"""The load of a chaos run: subscriptions before it, and during it callers of the API who remember what they asked for.

A caller that does not learn the outcome of a call makes it again, as an honest client does: a submission with the same idempotency key.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from taskplatform.errors import Conflict, StoreError
from taskplatform.model import JobState, Limit, Priority
from taskplatform.platform import JobRequest, Platform, SubscriptionRequest
from tests.chaos.evidence import Expected, Rule
from tests.chaos.model import PLANS, Subscribed
from tests.chaos.target import now_ms

T = TypeVar("T")

#: How many users are subscribed to each definition, at scale 1.
SUBSCRIBERS = {
    "high_planned": 200,
    "medium_planned": 300,
    "low_planned": 400,
    "limited": 60,
    "capped": 60,
    "hosted": 60,
    "paused": 60,
    "triggered": 25,
}
#: Of the subscribers of `medium_planned`, every so many has a schedule of its own.
OWN_SCHEDULES: tuple[tuple[int, int, dict[str, object]], ...] = (
    (5, 2, {"interval": {"type": "minutely", "value": 2}}),
    (7, 3, {"cron": "*/3 * * * *"}),
)
#: A caller gives up what it cannot learn: then something is wrong.
PATIENCE_SECONDS = 120.0


class GaveUp(Exception):
    """The API did not answer for as long as a caller waits."""


@dataclass
class _LimitChange:
    name: str
    limit: Limit
    before_ms: int
    after_ms: int


@dataclass
class Load:
    """What was asked for, kept by threads that ask."""

    platform: Platform
    seed: int
    host: str
    """Of the definition `hosted`, as limits name it."""
    subscribers: dict[str, int] = field(default_factory=lambda: dict(SUBSCRIBERS))
    callers: int = 3
    per_second: float = 8.0
    """Submissions, all callers together."""

    def __post_init__(self) -> None:
        self.expected: dict[str, Expected] = {}
        self.subscribed: list[Subscribed] = []
        self.triggers: list[int] = []
        #: (before, after) of triggers whose outcome nobody learnt
        self.unknown_triggers: list[tuple[int, int]] = []
        self.disagreements: list[str] = []
        #: (definition, before, after) with the whole time in which it may have been paused, and that in which it surely was
        self.maybe_paused: list[tuple[str, int, int]] = []
        self.surely_paused: list[tuple[str, int, int]] = []
        self.asked_twice = 0
        self._keys: dict[str, JobRequest] = {}
        self._limits: list[_LimitChange] = []
        self._lock = threading.Lock()
        #: Of limits, and of pauses, there is one change at a time: else nobody knows which came last.
        self._limiting, self._pausing = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._numbers = iter(range(1, 10**9))

    # before the run

    def subscribe(self) -> None:
        """Users and subscriptions."""
        most = max(self.subscribers.values())
        self.platform.create_users(f"u{number}" for number in range(most))
        requests = []
        for definition, count in self.subscribers.items():
            for number in range(count):
                _, schedule = _own(definition, number)
                requests.append(SubscriptionRequest(user=f"u{number}", definition=definition, schedule=schedule))
        self.platform.subscribe_many(requests)
        for number in range(most):
            for one in self.platform.subscriptions(f"u{number}"):
                if one.definition in PLANS:
                    self.subscribed.append(Subscribed(one.user, one.definition, one.since_ms, _own(one.definition, number)[0]))
        start_ms = now_ms()
        for name, definition in (("limited", "limited"), ("capped", "capped")):
            known = self.platform.definition(definition)
            rate = known.rate_limit
            limit = Limit(rate.per_second if rate else None, rate.burst if rate else None, known.concurrency)
            self._limits.append(_LimitChange(f"definition:{name}", limit, start_ms, start_ms))

    # during the run

    def start(self) -> None:
        """Let the callers ask."""
        for number in range(self.callers):
            thread = threading.Thread(target=self._call, args=(random.Random(f"{self.seed} caller {number}"),), name=f"caller{number}")
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Returns when all that was asked for is known."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self, rng: random.Random) -> None:
        try:
            while not self._stop.wait(rng.expovariate(self.per_second / self.callers)):
                lot = rng.random()
                if lot < 0.04:
                    self._ask_again(rng)
                elif lot < 0.07:
                    self._cancel(rng)
                elif lot < 0.08:
                    self.trigger()
                else:
                    self._submit(rng)
        except Exception as fault:
            self._disagree(f"a caller of the API ended: {type(fault).__name__}: {fault}\n{traceback.format_exc()[-3000:]}")

    def _submit(self, rng: random.Random) -> None:
        definition = rng.choices(["asked", "function", "limited", "capped", "hosted"], [80, 6, 4, 5, 5])[0]
        request = JobRequest(
            definition=definition,
            user=f"u{rng.randrange(min(self.subscribers.values()))}",
            countdown=rng.choice([None, None, None, 0.5, rng.uniform(0, 3)]),
            priority=rng.choice([None, *Priority]) if definition == "asked" else None,
            idempotency_key=f"key{self._number()}",
        )
        self.submit([request])

    def submit(self, requests: Sequence[JobRequest], *, poison: bool = False) -> list[str]:
        """Submit these, all or none, until the outcome is known. Returns the ids."""
        before_ms = now_ms()
        jobs = self._until_known(lambda: self.platform.enqueue_many(requests))
        with self._lock:
            for request, job in zip(requests, jobs, strict=True):
                seconds = request.countdown if isinstance(request.countdown, float) else 0.0
                self.expected[job.id] = Expected(job.id, before_ms + int(seconds * 1000), poison=poison)
                assert request.idempotency_key is not None
                self._keys[job.id] = request
        return [job.id for job in jobs]

    def burst(self, rng: random.Random, count: int) -> None:
        """Many at once."""
        self.submit([
            JobRequest(
                definition="asked",
                user=f"u{rng.randrange(min(self.subscribers.values()))}",
                priority=rng.choice(list(Priority)),
                idempotency_key=f"key{self._number()}",
            )
            for _ in range(count)
        ])  # fmt: skip

    def poison(self) -> None:
        """A job that takes its process down."""
        self.submit([JobRequest(definition="poison", user="u0", idempotency_key=f"key{self._number()}")], poison=True)

    def _ask_again(self, rng: random.Random) -> None:
        """The same key gives the same job, whatever became of it."""
        with self._lock:
            known = list(self._keys.items())
        if known:
            job_id, request = rng.choice(known[-200:])
            again = self._until_known(lambda: self.platform.enqueue_many([request]))[0].id
            self.asked_twice += 1
            if again != job_id:
                self._disagree(f"{request.idempotency_key} gave {job_id}, and then {again}")

    def _cancel(self, rng: random.Random) -> None:
        with self._lock:
            mine = [job_id for job_id in list(self._keys)[-50:] if not self.expected[job_id].poison]
            if not mine:
                return
            job_id = rng.choice(mine)
            self.expected[job_id] = replace(self.expected[job_id], may_be_canceled=True)
        try:
            job = self._until_known(lambda: self.platform.cancel(job_id))
        except Conflict:
            return
        if job.state is not JobState.CANCELED:
            self._disagree(f"{job_id} was canceled, and is {job.state}")
        with self._lock:
            self.expected[job_id] = replace(self.expected[job_id], must_be_canceled=True)

    def trigger(self) -> None:
        """There is no key for a trigger: one whose outcome is not known is not made again."""
        before_ms = now_ms()
        try:
            at, _ = self.platform.trigger("triggered")
        except StoreError:
            with self._lock:
                self.unknown_triggers.append((before_ms, now_ms()))
        else:
            with self._lock:
                self.triggers.append(round(at.timestamp() * 1000))

    # changes that people make

    def change_limit(self, rng: random.Random) -> str:
        """Another limit, at once. Returns what."""
        name = rng.choice(["definition:limited", "definition:capped", f"host:{self.host}"])
        rate, burst, concurrency = rng.randint(3, 12), rng.randint(2, 8), rng.choice([None, 4])
        if name == "definition:capped":
            self._set_limit(name, None, None, most := rng.randint(2, 6))
            return f"{name} {most} at a time"
        self._set_limit(name, rate, burst, concurrency)
        return f"{name} {rate}/s, burst {burst}, {concurrency or 'any number'} at a time"

    def _set_limit(self, name: str, rate: int | None, burst: int | None, concurrency: int | None) -> None:
        text = None if rate is None else f"{rate}/s"
        with self._limiting:
            before_ms = now_ms()
            self._until_known(lambda: self.platform.set_limit(name, text, burst=burst, concurrency=concurrency))
            self._limits.append(_LimitChange(name, Limit(rate, burst, concurrency), before_ms, now_ms()))

    def lift_limits(self) -> None:
        """At the end, so that what waits can go."""
        for name in ("definition:limited", "definition:capped", f"host:{self.host}"):
            self._set_limit(name, 200, 50, None)

    def rules(self) -> list[Rule]:
        """The limits that were in force, each for as long as that is certain."""
        covers = {"definition:limited": "limited", "definition:capped": "capped", f"host:{self.host}": "hosted"}
        found = []
        for name, definition in covers.items():
            changes = sorted((one for one in self._limits if one.name == name), key=lambda one: one.before_ms)
            ends = [*(one.before_ms for one in changes[1:]), now_ms()]
            for change, end_ms in zip(changes, ends, strict=True):
                if change.after_ms < end_ms:
                    found.append(Rule(name, change.limit, change.after_ms, end_ms, frozenset({definition})))
        return found

    def pause(self, seconds: float) -> None:
        """Pause a definition and resume it."""
        with self._pausing:
            before_ms = now_ms()
            self._until_known(lambda: self.platform.pause_definition("paused"))
            since_ms = now_ms()
            self._stop.wait(seconds)
            until_ms = now_ms()
            self._until_known(lambda: self.platform.resume_definition("paused"))
            self.maybe_paused.append(("paused", before_ms, now_ms()))
            self.surely_paused.append(("paused", since_ms, until_ms))

    # how

    def _until_known(self, ask: Callable[[], T]) -> T:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return ask()
            except StoreError as fault:
                if time.monotonic() > deadline:
                    raise GaveUp(f"no answer for {PATIENCE_SECONDS:g} s: {fault}") from fault
                time.sleep(0.2)

    def _number(self) -> int:
        with self._lock:
            return next(self._numbers)

    def _disagree(self, text: str) -> None:
        with self._lock:
            self.disagreements.append(text)


def _own(definition: str, number: int) -> tuple[int | None, dict[str, object] | None]:
    """How many minutes lie between the user's own occurrences, and the schedule that says so."""
    for every, minutes, schedule in OWN_SCHEDULES if definition == "medium_planned" else ():
        if number % every == 0:
            return minutes, schedule
    return None, None
