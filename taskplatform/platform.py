"""The Python API: users, subscriptions, jobs, pauses.

    platform = Platform.connect()
    platform.create_user("u1")
    platform.subscribe("u1", "hourly_data_sync", params={"source": "crm"})
    job = platform.enqueue("daily_user_report", user="u1", countdown=30, priority="high")
    platform.history(job.id)

Every method checks its input before it changes anything, and raises one of `taskplatform.errors`. Names of people or programs
for the change log come from `actor`.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import Any

from pydantic import ValidationError

from taskplatform import backfill as backfilling
from taskplatform import tracing
from taskplatform.answers import Answer, Coming, Moment, Waits, coming, waits, why
from taskplatform.catalogue import Catalogue, deployed
from taskplatform.errors import Conflict, InvalidInput, TaskPlatformError, UnknownBackfill, UnknownDefinition, UnknownUser
from taskplatform.faults import did_you_mean, explain
from taskplatform.forecast import Added, Forecast, More, look_ahead
from taskplatform.health import Health, check
from taskplatform.model import (
    MAX_PARAMS_BYTES,
    Definition,
    Job,
    JobState,
    Limit,
    LimitRule,
    Priority,
    RateLimit,
    Schedule,
    ScheduleOverride,
    Subscription,
    Transition,
    User,
    check_definition_id,
    check_host,
    check_user_id,
    format_duration,
)
from taskplatform.planner import published
from taskplatform.settings import Settings, environment, settings
from taskplatform.store import (
    LOG_LEVELS,
    Backfill,
    Beat,
    Breaker,
    Change,
    DeadLetterResult,
    Enqueue,
    Garbage,
    LimitState,
    LogLevel,
    Occurrence,
    Page,
    Store,
    Subscribe,
    SubscribeResult,
    Worker,
)
from taskplatform.windows import Due, Window, Windows, hosts_of

log = logging.getLogger(__name__)

#: The longest that a job may be put off.
MAX_DELAY = timedelta(days=366)
MAX_KEY_LENGTH = 255
#: The most items of one page of a listing.
MAX_LIMIT = 10_000
#: A log level that is set live holds so long, and at the most.
LOG_LEVEL_SPAN = timedelta(minutes=10)
LONGEST_LOG_LEVEL = timedelta(days=1)
#: Dead letters that are redriven or discarded in one step.
_DEAD_BATCH = 100
#: And when they are only counted.
_DEAD_COUNTED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """One job for `enqueue_many`; the fields are those of `Platform.enqueue`."""

    definition: str
    user: str
    params: Mapping[str, Any] | None = None
    countdown: float | timedelta | None = None
    eta: datetime | None = None
    priority: Priority | str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFilters:
    """Which dead letters: those that all of these fit."""

    definition: str | None = None
    user: str | None = None
    since: datetime | None = None
    """Died since."""
    reason: str = ""
    """A part of the reason; "poison pill" finds those that took their workers down."""

    @property
    def checked(self) -> dict[str, Any]:
        """As the store takes them. Raises InvalidInput."""
        return {
            "definition": None if self.definition is None else check_definition_id(self.definition),
            "user": None if self.user is None else check_user_id(self.user),
            "since_ms": None if self.since is None else _instant(self.since, "since"),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionRequest:
    """One subscription for `subscribe_many`; the fields are those of `Platform.subscribe`."""

    user: str
    definition: str
    params: Mapping[str, Any] | None = None
    schedule: ScheduleOverride | Mapping[str, Any] | None = None
    enabled: bool = True


class Platform:
    """All operations of the platform. Safe to share between threads."""

    def __init__(self, store: Store, catalogue: Catalogue, settings: Settings, *, actor: str | None = None) -> None:
        self.store = store
        self.catalogue = catalogue
        self.settings = settings
        self._actor = actor or _who()

    @classmethod
    def connect(cls, settings_: Settings | None = None, *, catalogue: Catalogue | None = None, actor: str | None = None) -> Platform:
        """The platform that the settings describe.

        Definitions that no beat has published yet are published, so that jobs can be submitted before beat runs.
        Raises SettingsError, CatalogueError, StoreError.
        """
        chosen = settings_ or settings()
        store = Store.connect(chosen.redis_url, tls=chosen.redis_tls, namespace=chosen.namespace, change_log_size=chosen.change_log_size)
        try:
            platform = cls(store, catalogue if catalogue is not None else deployed(chosen), chosen, actor=actor)
            store.ping()
            platform.publish_missing()
        except BaseException:
            store.close()
            raise
        return platform

    @property
    def actor(self) -> str:
        """Who acts, as the change log and the audit log name it."""
        return self._actor

    def acting_as(self, actor: str) -> Platform:
        """The same platform over the same connections, for another person or program."""
        return Platform(self.store, self.catalogue, self.settings, actor=actor)

    def publish_missing(self) -> None:
        """Publish the definitions that Redis does not know; changed ones are published by the beat that leads."""
        missing = sorted(self.catalogue.keys() - self.store.published())
        for name in missing:
            self.store.publish(published(self.catalogue[name]), actor=self._actor, only_new=True)
        if missing:
            self.store.announce(actor=self._actor)

    def close(self) -> None:
        """Close the connections."""
        self.store.close()

    # jobs

    def enqueue(
        self,
        definition: str,
        *,
        user: str,
        params: Mapping[str, Any] | None = None,
        countdown: float | timedelta | None = None,
        eta: datetime | None = None,
        priority: Priority | str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Make a job, now or for later.

        `countdown` is in seconds, `eta` an aware datetime; a time in the past means now. `params` go over those of the
        subscription, which go over those of the definition. The same `idempotency_key` for the same definition and user
        gives the same job, for as long as its record is kept.

        Raises UnknownDefinition, UnknownUser, InvalidInput; then nothing is enqueued.
        """
        request = JobRequest(
            definition=definition,
            user=user,
            params=params,
            countdown=countdown,
            eta=eta,
            priority=priority,
            idempotency_key=idempotency_key,
        )
        return self.enqueue_many([request])[0]

    def enqueue_many(self, requests: Iterable[JobRequest]) -> list[Job]:
        """Make many jobs, in this order: all of them, or none when one is not acceptable."""
        jobs = self._enqueues(list(requests))
        if len(jobs) > 1:
            missing = self.store.missing_users(job.id.split(":", 2)[1] for job in jobs)
            if missing:
                raise InvalidInput(f"unknown users: {', '.join(sorted(missing)[:10])}{', …' if len(missing) > 10 else ''}")
        self.store.enqueue(jobs)
        for job in jobs:
            tracing.enqueued(job.id)
        return self.store.jobs_by_id([job.id for job in jobs])

    def enqueue_each(self, requests: Sequence[JobRequest]) -> list[Job | TaskPlatformError]:
        """Make many jobs, each on its own: in this order the job, or why there is none (InvalidInput, UnknownDefinition, UnknownUser)."""
        results: list[Job | TaskPlatformError | None] = [None] * len(requests)
        made: dict[int, Enqueue] = {}
        now_ms = cache(self.store.now_ms)
        pairs = [(request.user, request.definition) for request in requests]
        subscribed = self.store.subscription_params(pairs)
        for place, request in enumerate(requests):
            try:
                made[place] = self._enqueue(request, subscribed.get((request.user, request.definition), {}), now_ms)
            except (InvalidInput, UnknownDefinition) as fault:
                results[place] = fault
        missing = self.store.missing_users(requests[place].user for place in made)
        for place in [place for place in made if requests[place].user in missing]:
            del made[place]
            results[place] = UnknownUser(f"no user {requests[place].user!r}")
        try:
            self.store.enqueue(list(made.values()))
        except (UnknownUser, UnknownDefinition):
            # somebody deleted a user or a definition just now; what of it was made is found by its id
            for place, one in list(made.items()):
                try:
                    self.store.enqueue([one])
                except (UnknownUser, UnknownDefinition) as fault:
                    del made[place]
                    results[place] = fault
        jobs = {job.id: job for job in self.store.jobs_by_id([one.id for one in made.values()])}
        for place, one in made.items():
            tracing.enqueued(one.id)
            results[place] = jobs.get(one.id) or UnknownUser(f"no user {requests[place].user!r}")
        return [result for result in results if result is not None]

    def _enqueues(self, requests: Sequence[JobRequest]) -> list[Enqueue]:
        pairs = [(request.user, request.definition) for request in requests if isinstance(request.user, str)]
        subscribed = self.store.subscription_params(pairs)
        now_ms = cache(self.store.now_ms)
        return [self._enqueue(request, subscribed.get((request.user, request.definition), {}), now_ms) for request in requests]

    def _enqueue(self, request: JobRequest, subscribed: Mapping[str, Any], now_ms: Callable[[], int]) -> Enqueue:
        definition = self.definition(request.definition)
        user = check_user_id(request.user)
        params = {**subscribed, **_check_params(request.params, definition, subscribed)}
        after_ms, delay_ms = _when(request.countdown, request.eta, now_ms)
        key = request.idempotency_key
        suffix = f"m{secrets.token_hex(8)}" if key is None else f"k{_digest(key)}"
        return Enqueue(
            id=f"{definition.id}:{user}:{suffix}",
            priority=None if request.priority is None else _priority(request.priority),
            execute_after_ms=after_ms,
            delay_ms=delay_ms,
            params=params,
        )

    def job(self, job_id: str) -> Job:
        """Raises UnknownJob."""
        return self.store.job(job_id)

    def history(self, job_id: str) -> list[Transition]:
        """Every transition of a job, with when, attempt, worker and reason. Raises UnknownJob."""
        return self.store.history(job_id)

    def jobs(
        self,
        *,
        user: str | None = None,
        definition: str | None = None,
        state: JobState | str | Iterable[JobState | str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        cursor: str | None = None,
        limit: int = 100,
        scan: int | None = None,
    ) -> Page[Job]:
        """Jobs that fit all filters, the newest first; `cursor` is the last page's.

        With `scan` about so many jobs are looked at, at the most: a page may then be short, or empty, and yet have a cursor.
        Raises UnknownDefinition, InvalidInput.
        """
        if definition is not None:
            self.definition(definition)
        return self.store.jobs(
            user=None if user is None else check_user_id(user),
            definition=definition,
            states=_states(state),
            since_ms=None if since is None else _instant(since, "since"),
            until_ms=None if until is None else _instant(until, "until"),
            cursor=cursor,
            limit=_limit(limit),
            scan=scan,
        )

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that is not finished; one that is canceled already stays so.

        A waiting job never starts. A running one is stopped where the pool can do that; else its result is discarded.
        Raises UnknownJob, and Conflict when the job ended otherwise.
        """
        before = self.store.cancel(job_id, reason=f"canceled by {self._actor}")
        if before.terminal and before is not JobState.CANCELED:
            raise Conflict(f"job {job_id} is {before}: it cannot be canceled any more")
        return self.job(job_id)

    def retry(self, job_id: str) -> Job:
        """Run a job again that failed, timed out, was rejected or canceled.

        One that was retried already, and has not ended so again, stays as it is. Raises UnknownJob, Conflict, and
        UnknownDefinition when its definition was removed.
        """
        self.store.retry(job_id, reason=f"retried by {self._actor}")
        return self.job(job_id)

    def set_priority(self, job_id: str, priority: Priority | str) -> Job:
        """Give a job that waits another priority; it keeps its place among those of its time. Raises UnknownJob, Conflict, InvalidInput."""
        wanted = _priority(priority)
        state = self.store.prioritize(job_id, wanted, reason=f"priority {wanted} given by {self._actor}")
        if state not in (JobState.PENDING, JobState.RETRYING):
            raise Conflict(f"job {job_id} is {state}: the priority of a job that waits can be changed")
        return self.job(job_id)

    # dead letters

    def dead_letters(
        self,
        *,
        definition: str | None = None,
        user: str | None = None,
        since: datetime | None = None,
        reason: str = "",
        cursor: str | None = None,
        limit: int = 100,
        scan: int | None = None,
    ) -> Page[Job]:
        """Jobs that failed or timed out for good, the newest first; `cursor` is the last page's, `scan` as of `jobs`.

        They are kept with their histories until they are redriven or discarded, or for the setting `dead_retention`. `reason`
        is a part of the reason; "poison pill" finds those that took their workers down. Also of definitions that were removed.
        """
        filters = DeadFilters(definition=definition, user=user, since=since, reason=reason)
        return self.store.dead_letters(**filters.checked, cursor=cursor, limit=_limit(limit), scan=scan)

    def redrive(self, job_id: str) -> Job:
        """Run a dead letter again with a fresh budget of retries and losses. It keeps its id, and so its Idempotency-Key.

        One that was redriven already, and has not died again, stays as it is. Raises UnknownJob, Conflict, and
        UnknownDefinition when its definition was removed.
        """
        (result,) = self.store.redrive([job_id], reason=self._redriven)
        if result is DeadLetterResult.REMOVED:
            raise UnknownDefinition(f"job {job_id} cannot be redriven: its definition was removed from the catalogue")
        job = self.job(job_id)
        if result is DeadLetterResult.NOT_DEAD:
            raise Conflict(f"job {job_id} is {job.state} and no dead letter; `taskplatform dead-letters list` shows those")
        return job

    def redrive_all(
        self,
        *,
        definition: str | None = None,
        user: str | None = None,
        since: datetime | None = None,
        reason: str = "",
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[int, int]:
        """The same for all that `dead_letters` lists now, a batch after the other; what dies meanwhile again is left.

        With `limit`, for the newest so many. `progress` is told after each batch how many were looked at. Returns how many were
        redriven, and how many were left because their definition was removed.
        """
        filters = DeadFilters(definition=definition, user=user, since=since, reason=reason)
        redriven, left, _ = self.redrive_page(filters, limit=limit, progress=progress)
        return redriven, left

    def redrive_page(
        self,
        filters: DeadFilters,
        *,
        cursor: str | None = None,
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[int, int, str | None]:
        """The same for those after `cursor`; also returns where to go on, None at the end."""
        redriven = left = 0
        for page in self._dead_pages(filters, cursor, limit, progress):
            answers = self.store.redrive([job.id for job in page.items], reason=self._redriven)
            left += answers.count(DeadLetterResult.REMOVED)
            redriven += answers.count(DeadLetterResult.DONE)
            cursor = page.cursor
        return redriven, left, cursor

    @property
    def _redriven(self) -> str:
        return f"redriven by {self._actor}"

    def discard(self, job_id: str) -> None:
        """Forget a dead letter now, with its history; the change log says so. Nothing, where there is no such job any more.

        Raises Conflict for a job that is no dead letter.
        """
        found = self.store.jobs_by_id([job_id])
        subject = f"{found[0].user} {found[0].definition}" if found else ""
        detail = f"{job_id}: {found[0].reason}" if found else ""
        (result,) = self.store.discard([job_id], actor=self._actor, subject=subject, detail=detail)
        if result is DeadLetterResult.NOT_DEAD:
            raise Conflict(f"job {job_id} is {self.job(job_id).state} and no dead letter; `taskplatform dead-letters list` shows those")

    def discard_all(
        self,
        *,
        definition: str | None = None,
        user: str | None = None,
        since: datetime | None = None,
        reason: str = "",
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """The same for all that `dead_letters` lists now, or the newest `limit`, a batch after the other. Returns how many."""
        filters = DeadFilters(definition=definition, user=user, since=since, reason=reason)
        return self.discard_page(filters, limit=limit, progress=progress)[0]

    def discard_page(
        self,
        filters: DeadFilters,
        *,
        cursor: str | None = None,
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[int, str | None]:
        """The same for those after `cursor`; also returns where to go on, None at the end."""
        discarded = 0
        subject = " ".join(filter(None, (filters.user, filters.definition)))
        detail = f"reason contains {filters.reason!r}" if filters.reason else ""
        for page in self._dead_pages(filters, cursor, limit, progress):
            answers = self.store.discard([job.id for job in page.items], actor=self._actor, subject=subject, detail=detail)
            discarded += answers.count(DeadLetterResult.DONE)
            cursor = page.cursor
        return discarded, cursor

    def count_dead(self, filters: DeadFilters, *, cursor: str | None = None, budget: timedelta) -> tuple[int, bool, str]:
        """How many dead letters there are now that `filters` fit, after `cursor`, counted for about `budget`; whether that is all of them;
        and the cursor with which `redrive_page` and `discard_page` go through these, and through none that dies later. Raises
        InvalidInput."""
        checked, until_ms, deadline = filters.checked, self.store.now_ms(), time.monotonic() + budget.total_seconds()
        # no id begins with that: the place before all that have died by now
        count, begin = 0, cursor or f"{until_ms + 1}|!"
        while True:
            page = self.store.dead_letters(**checked, until_ms=until_ms, cursor=cursor, limit=_DEAD_COUNTED, scan=_DEAD_COUNTED)
            count, cursor = count + len(page.items), page.cursor
            if cursor is None or time.monotonic() >= deadline:
                return count, cursor is None, begin

    def _dead_pages(
        self, filters: DeadFilters, cursor: str | None, limit: int | None, progress: Callable[[int], None] | None
    ) -> Iterator[Page[Job]]:
        """The dead letters that there are now, or the newest `limit`, after `cursor`; the next page is read when this one is done."""
        checked, until_ms = filters.checked, self.store.now_ms()
        wanted = sys.maxsize if limit is None else limit
        done = 0
        while done < wanted:
            page = self.store.dead_letters(**checked, until_ms=until_ms, cursor=cursor, limit=min(wanted - done, _DEAD_BATCH))
            yield page
            done += len(page.items)
            if progress is not None:
                progress(done)
            cursor = page.cursor
            if cursor is None:
                return

    def sweep(self, *, budget: timedelta = timedelta(seconds=10)) -> int:
        """Forget what is past its retention, for about `budget` at the most; the next call goes on. Returns how much it was."""
        deadline = time.monotonic() + budget.total_seconds()
        chosen, total = self.settings, 0
        while forgotten := self.store.sweep(retention=chosen.retention, dead_retention=chosen.dead_retention, dead_max=chosen.dead_max):
            total += forgotten
            if time.monotonic() >= deadline:
                break
        return total

    # triggers

    def trigger(self, definition: str, *, window: timedelta | None = None, idempotency_key: str | None = None) -> tuple[datetime, int]:
        """An extra occurrence now, for all subscribers, spread over the definition's window or the one given.

        The window is wider where limits cannot carry so many jobs in it. The same `idempotency_key` for the same definition
        gives the same occurrence, for the setting `retention`; without one each call is another.

        Returns its time and how many subscribers there are. Raises UnknownDefinition, InvalidInput.
        """
        known = self.definition(definition)
        key = "" if idempotency_key is None else _digest(idempotency_key)
        if window is not None and not timedelta() <= window <= MAX_DELAY:
            raise InvalidInput(f"window {window} is not accepted: 0 to 366 days is", field="window")
        asked = known.window if window is None else window
        used = self._window(known, asked)
        if used.note:
            log.info("%s, triggered: %s", known.id, used.note)
        at_ms, subscribers = self.store.trigger(
            known.id,
            window=asked,
            actor=self._actor,
            window_ms=used.window_ms,
            delay_ms=used.delay_ms,
            note=used.note,
            idempotency_key=key,
        )
        return datetime.fromtimestamp(at_ms / 1000, UTC), subscribers

    def _window(self, definition: Definition, asked: timedelta) -> Window:
        windows = Windows(self.store, self.catalogue, horizon=self.settings.plan_horizon, hosts=hosts_of(self.catalogue, environment()))
        rates = windows.rates()
        jobs = self.store.count_subscribers(definition.id) if rates and definition.id not in self.store.definition_pauses() else 0
        return windows.fit([Due(definition, jobs, self.store.now_ms(), round(asked / timedelta(milliseconds=1)))], rates)[0]

    # definitions

    def definition(self, definition: str) -> Definition:
        """Raises UnknownDefinition."""
        try:
            return self.catalogue[definition]
        except (KeyError, TypeError):  # TypeError: not hashable
            raise UnknownDefinition(f"no definition {definition!r}; `taskplatform tasks list` shows all") from None

    def pause_definition(self, definition: str, *, why: str = "") -> bool:
        """Nothing of it is planned or released until it is resumed. Returns whether that changed something."""
        return self.store.pause_definition(self.definition(definition).id, why=why or f"by {self._actor}", actor=self._actor)

    def resume_definition(self, definition: str) -> bool:
        """The reverse of `pause_definition`."""
        return self.store.resume_definition(self.definition(definition).id, actor=self._actor)

    # workers

    def workers(self) -> list[Worker]:
        """In order of their ids."""
        return self.store.workers()

    def drain_worker(self, worker: str) -> bool:
        """Let a worker take nothing new. What it has goes on; it lives, and stays drained until it is resumed or ends.

        It follows with its next heartbeat. Returns whether that changed something. Raises UnknownWorker.
        """
        return self.store.drain_worker(worker, actor=self._actor)

    def resume_worker(self, worker: str) -> bool:
        """The reverse of `drain_worker`."""
        return self.store.resume_worker(worker, actor=self._actor)

    def beats(self) -> list[Beat]:
        """Those that have not signed off, and which of them leads."""
        return self.store.beats()

    def now_ms(self) -> int:
        """The server's time, by which all instants are told."""
        return self.store.now_ms()

    # logs

    def log_levels(self) -> dict[str, LogLevel]:
        """What was set live, by whom it is for."""
        return self.store.log_levels.read()[1]

    def set_log_level(self, level: str, *, node: str = "*", span: timedelta = LOG_LEVEL_SPAN) -> None:
        """Let processes log from `level` on for `span`: all (*), a role (beat, worker, api), a node (celery@host) or one process.

        They follow with their next heartbeat or tick. What is said of fewer goes before. Raises InvalidInput.
        """
        if level not in LOG_LEVELS:
            raise InvalidInput(f"log level {level!r} is not accepted: {', '.join(LOG_LEVELS)} are", field="level")
        if not timedelta(seconds=1) <= span <= LONGEST_LOG_LEVEL:
            raise InvalidInput(f"a log level is set for 1s to {format_duration(LONGEST_LOG_LEVEL)}", field="span")
        self.store.log_levels.set(_log_node(node), level, span=span, actor=self._actor, log_size=self.settings.change_log_size)

    def reset_log_level(self, *, node: str = "*") -> bool:
        """Take back what `set_log_level` said of the same. Returns False where there was nothing."""
        return self.store.log_levels.reset(_log_node(node), actor=self._actor, log_size=self.settings.change_log_size)

    # limits

    def limits(self) -> list[LimitState]:
        """The limits in force and how they stand, by name."""
        return self.store.limit_states()

    def set_limit(self, name: str, rate: str | None = None, *, burst: int | None = None, concurrency: int | None = None) -> bool:
        """Set a limit for all workers, at once. Returns whether that changed what is in force.

        `name` is total, definition:<id>, host:<host>, user (each user) or user:<id>; `rate` is written as "10/s". It holds until
        `reset_limit`, over restarts and whatever settings and definitions say. With neither rate nor concurrency there is no
        limit under this name. Raises InvalidInput, UnknownDefinition.
        """
        return self.store.set_limit(name, self.limit_of(name, rate, burst=burst, concurrency=concurrency), actor=self._actor)

    def limit_of(self, name: str, rate: str | None = None, *, burst: int | None = None, concurrency: int | None = None) -> Limit:
        """What `set_limit` would set. Raises as that does."""
        kind, of = _limit_name(name)
        if kind == "definition":
            self.catalogue.require(of)
        if rate is None and concurrency is None and burst is None:
            return Limit()
        given = {"rate": rate, "burst": burst, "concurrency": concurrency}
        try:
            rule = LimitRule.model_validate({field: value for field, value in given.items() if value is not None})
        except ValidationError as fault:
            faults = (f"{'.'.join(map(str, place))}: {message}" if place else message for place, message in explain(fault, LimitRule))
            raise InvalidInput(f"limit {name}: {'; '.join(faults)}") from None
        if kind == "user" and rate is not None:
            raise InvalidInput(f"limit {name}: takes concurrency; a rate goes with total, definition:… and host:…")
        if kind == "total" and concurrency is not None:
            raise InvalidInput(f"limit {name}: takes rate and burst; how many run at a time is what the workers' slots say")
        return rule.limit

    def reset_limit(self, name: str) -> bool:
        """Take back what `set_limit` set: what settings and definitions say is in force again.

        Returns whether that changed what is in force. Raises InvalidInput.
        """
        # also of a definition that is no longer in the catalogue
        _limit_name(name)
        return self.store.reset_limit(name, actor=self._actor)

    # hosts

    def breakers(self) -> list[Breaker]:
        """The hosts that are called, in order of their names, and whether their jobs are held back."""
        return self.store.breakers()

    def held_back(self, job: Job) -> Breaker | None:
        """The host for which a due job waits, where that is held back; else None."""
        waits = job.state in (JobState.PENDING, JobState.RETRYING) and job.execute_after_ms <= self.store.now_ms()
        return self.store.breaker_of(job.definition) if waits else None

    def waits(self, job: Job) -> Waits | None:
        """For what a job waits that was not started, in a sentence that says by whom it is held back and behind how many it is. None
        for one that runs or has ended."""
        return waits(self.store, self.catalogue, job)

    def open_breaker(self, host: str, *, span: timedelta, reason: str = "") -> None:
        """Hold a host's jobs back for so long, up to 366 days. Then it is probed, as after failures. Raises InvalidInput."""
        if not timedelta(milliseconds=1) <= span <= MAX_DELAY:
            raise InvalidInput(f"span {span} is not accepted: up to {MAX_DELAY.days} days is")
        self.store.hold_host(check_host(host), span=span, why=reason or f"opened by {self._actor}", actor=self._actor)

    def reset_breaker(self, host: str) -> bool:
        """Hold a host's jobs back no longer, whyever they are, and probe it no more. Returns whether they were. Raises InvalidInput."""
        return self.store.free_host(check_host(host), actor=self._actor)

    # users

    def create_user(self, user: str, *, name: str = "") -> User:
        """Create a user, or return the one that exists."""
        self.store.create_user(check_user_id(user), name=name, actor=self._actor)
        return self.store.user(user)

    def add_user(self, user: str, *, name: str = "") -> bool:
        """Create a user. Returns False, and changes nothing, where there is one."""
        return self.store.create_user(check_user_id(user), name=name, actor=self._actor)

    def create_users(self, users: Iterable[str]) -> int:
        """Create many. Returns how many were new."""
        return self.store.create_users([check_user_id(user) for user in users], actor=self._actor)

    def user(self, user: str) -> User:
        """Raises UnknownUser."""
        return self.store.user(check_user_id(user))

    def users(self, *, cursor: str | None = None, limit: int = 100) -> Page[User]:
        """In order of their ids."""
        return self.store.users(cursor=cursor, limit=_limit(limit))

    def count_users(self) -> int:
        """How many users there are."""
        return self.store.count_users()

    def delete_user(self, user: str) -> tuple[int, int]:
        """Delete a user with subscriptions, jobs and histories. Returns (jobs canceled, subscriptions removed)."""
        return self.store.delete_user(check_user_id(user), actor=self._actor)

    def pause_user(self, user: str) -> bool:
        """Nothing is planned or released for the user until they are resumed. Returns whether that changed something."""
        return self.store.pause_user(check_user_id(user), actor=self._actor)

    def resume_user(self, user: str) -> bool:
        """The reverse of `pause_user`."""
        return self.store.resume_user(check_user_id(user), actor=self._actor)

    # subscriptions

    def subscribe(
        self,
        user: str,
        definition: str,
        *,
        params: Mapping[str, Any] | None = None,
        schedule: ScheduleOverride | Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> Subscription:
        """Subscribe a user, or set an existing subscription to just this.

        `schedule` is an own interval or cron, or an own timezone or at_time for the definition's interval; None means the
        definition's schedule. It takes effect after the planning horizon: earlier moments still belong to the old one.
        Raises UnknownUser, UnknownDefinition, InvalidInput.
        """
        request = SubscriptionRequest(user=user, definition=definition, params=params, schedule=schedule, enabled=enabled)
        self._subscribe_one(self.prepare(request))
        return self.subscription(user, definition)

    def subscribe_many(self, requests: Iterable[SubscriptionRequest]) -> list[SubscribeResult]:
        """Many at once, each on its own: what became of each, in this order. Raises InvalidInput before any is made."""
        return self.subscribe_prepared([self.prepare(request) for request in requests])

    def subscribe_prepared(self, prepared: Sequence[Subscribe]) -> list[SubscribeResult]:
        """The second half of `subscribe_many`, for what `prepare` gave."""
        return self.store.subscribe(prepared, horizon=self.settings.plan_horizon, actor=self._actor, log=len(prepared) == 1)

    def prepare(self, request: SubscriptionRequest) -> Subscribe:
        """The checked form of a request. Raises UnknownDefinition, InvalidInput."""
        definition = self.definition(request.definition)
        params = _check_params(request.params, definition, {})
        schedule = None if request.schedule is None else _override(request.schedule, definition)
        return Subscribe(
            user=check_user_id(request.user),
            definition=definition.id,
            schedule=schedule,
            own_schedule=schedule is not None,
            params=params,
            enabled=request.enabled,
        )

    def subscribe_each(
        self, requests: Sequence[SubscriptionRequest], *, create_users: bool = False
    ) -> tuple[list[SubscribeResult | TaskPlatformError], int]:
        """Make many, each on its own: in this order what became of each, or why it was not made (InvalidInput, UnknownDefinition,
        UnknownUser). With `create_users` users that do not exist are created; also returns how many were.
        """
        found: list[SubscribeResult | TaskPlatformError] = []
        prepared: dict[int, Subscribe] = {}
        for place, request in enumerate(requests):
            found.append(SubscribeResult.UNCHANGED)
            try:
                prepared[place] = self.prepare(request)
            except (InvalidInput, UnknownDefinition) as fault:
                found[place] = fault
        created = self.create_users(dict.fromkeys(one.user for one in prepared.values())) if create_users else 0
        for (place, one), result in zip(prepared.items(), self.subscribe_prepared(list(prepared.values())), strict=True):
            match result:
                case SubscribeResult.UNKNOWN_USER:
                    found[place] = UnknownUser(f"no user {one.user!r}")
                case SubscribeResult.UNKNOWN_DEFINITION:
                    found[place] = UnknownDefinition(f"definition {one.definition!r} is not published")
                case _:
                    found[place] = result
        return found, created

    def set_params(self, user: str, definition: str, params: Mapping[str, Any]) -> Subscription:
        """Replace the parameters of a subscription."""
        known = self.definition(definition)
        return self._change(user, known, params=_check_params(params, known, {}))

    def set_schedule(self, user: str, definition: str, schedule: ScheduleOverride | Mapping[str, Any] | None) -> Subscription:
        """Give a subscription an own schedule, or with None the definition's again; see `subscribe`."""
        known = self.definition(definition)
        own = None if schedule is None else _override(schedule, known)
        return self._change(user, known, schedule=own, own_schedule=own is not None)

    def change_subscription(
        self,
        user: str,
        definition: str,
        *,
        params: Mapping[str, Any] | None = None,
        schedule: ScheduleOverride | Mapping[str, Any] | None = None,
        default_schedule: bool = False,
        enabled: bool | None = None,
    ) -> Subscription:
        """Change some things of a subscription in one step; None keeps what is. `default_schedule` gives it the definition's again.

        Raises UnknownUser, UnknownSubscription, UnknownDefinition, InvalidInput.
        """
        known = self.definition(definition)
        changes: dict[str, Any] = {"enabled": enabled}
        if params is not None:
            changes["params"] = _check_params(params, known, {})
        if schedule is not None:
            changes.update(schedule=_override(schedule, known), own_schedule=True)
        elif default_schedule:
            changes["own_schedule"] = False
        return self._change(user, known, **changes)

    def enable(self, user: str, definition: str) -> Subscription:
        """Switch a subscription on again."""
        return self._change(user, self.definition(definition), enabled=True)

    def disable(self, user: str, definition: str) -> Subscription:
        """Switch a subscription off and cancel what waits of it; its parameters and schedule are kept."""
        return self._change(user, self.definition(definition), enabled=False)

    def _change(self, user: str, definition: Definition, **changes: Any) -> Subscription:
        self.subscription(user, definition.id)
        self._subscribe_one(Subscribe(**{"user": user, "definition": definition.id, "own_schedule": None, **changes}))
        return self.subscription(user, definition.id)

    def _subscribe_one(self, subscribe: Subscribe) -> None:
        (result,) = self.store.subscribe([subscribe], horizon=self.settings.plan_horizon, actor=self._actor)
        if result is SubscribeResult.UNKNOWN_USER:
            self.store.user(subscribe.user)
        if result is SubscribeResult.UNKNOWN_DEFINITION:
            raise UnknownDefinition(f"definition {subscribe.definition!r} is not published")

    def unsubscribe(self, user: str, definition: str) -> int:
        """End a subscription. Returns how many waiting jobs were canceled. Raises UnknownUser, UnknownSubscription."""
        return self.store.unsubscribe(check_user_id(user), check_definition_id(definition), actor=self._actor)

    def subscription(self, user: str, definition: str) -> Subscription:
        """Raises UnknownUser, UnknownSubscription."""
        return self.store.subscription(check_user_id(user), check_definition_id(definition))

    def subscriptions(self, user: str) -> list[Subscription]:
        """Of one user. Raises UnknownUser."""
        return self.store.subscriptions_of(check_user_id(user))

    def subscribers(self, definition: str, *, cursor: str | None = None, limit: int = 100) -> Page[str]:
        """Users that are subscribed to a definition."""
        return self.store.subscribers_of(self.definition(definition).id, cursor=cursor, limit=_limit(limit))

    def count_subscribers(self, definition: str) -> int:
        """How many users are subscribed to a definition. Raises UnknownDefinition."""
        return self.store.count_subscribers(self.definition(definition).id)

    def pause_subscription(self, user: str, definition: str) -> bool:
        """Nothing of it is planned or released until it is resumed. Returns whether that changed something."""
        return self.store.pause_subscription(check_user_id(user), check_definition_id(definition), actor=self._actor)

    def resume_subscription(self, user: str, definition: str) -> bool:
        """The reverse of `pause_subscription`."""
        return self.store.resume_subscription(check_user_id(user), check_definition_id(definition), actor=self._actor)

    # health

    def health(self) -> Health:
        """What is wrong with the platform, if anything is, since when, and what to do. Cheap enough for every few seconds.

        Raises StoreError, and StoreUnavailable where Redis cannot be reached.
        """
        return check(self.store, self.settings)

    # what happened

    def occurrences(self, definition: str, *, since: datetime | None = None, limit: int = 100) -> list[Occurrence]:
        """What became of a definition's occurrences, the newest first: planned, or skipped and why. Raises UnknownDefinition."""
        since_ms = 0 if since is None else _instant(since, "since")
        return self.store.occurrences(self.definition(definition).id, since_ms=since_ms, limit=_limit(limit))

    def changes(self, *, about: Sequence[str] = (), limit: int = 100) -> list[Change]:
        """The newest changes that people and beat made to users, subscriptions and definitions.

        With `about`, those that name each of these users or definitions.
        """
        return self.store.changes(about=about, limit=_limit(limit))

    # what came out of a queue and was no message

    def garbage(self, *, limit: int = 100) -> list[Garbage]:
        """What workers set aside because it was no message, the newest first."""
        return self.store.garbage(limit=_limit(limit))

    def clear_garbage(self) -> int:
        """Forget what was set aside. Returns how many."""
        return self.store.clear_garbage()

    # what is run afterwards

    def backfill(
        self,
        definition: str,
        *,
        since: datetime,
        until: datetime | None = None,
        users: Sequence[str] | None = None,
        rate: str | RateLimit = backfilling.DEFAULT_RATE,
        dry_run: bool = False,
        beyond_retention: bool = False,
        idempotency_key: str | None = None,
    ) -> Backfill:
        """Run what a definition was due for from `since` on and before `until` (None: now), for its subscribers or those of `users`.

        A job that exists is not made again. With `dry_run` it is only counted, and nothing is written. The same `idempotency_key` gives
        the same backfill, for the setting `retention`. See docs/backfill.md.
        Raises UnknownDefinition, UnknownUser, InvalidInput, Conflict.
        """
        if dry_run:
            counted, _ = self.count_backfill(
                definition, since=since, until=until, users=users, rate=rate, beyond_retention=beyond_retention, cursor=None, budget=None
            )
            return counted
        id_ = "" if idempotency_key is None else _digest(idempotency_key)
        span = self._span(definition, since, until, rate, beyond_retention)
        return backfilling.begin(self.store, span, users, actor=self._actor, id_=id_)

    def count_backfill(
        self,
        definition: str,
        *,
        since: datetime,
        until: datetime | None,
        users: Sequence[str] | None,
        rate: str | RateLimit,
        beyond_retention: bool,
        cursor: str | None,
        budget: timedelta | None,
    ) -> tuple[Backfill, str | None]:
        """A dry run in parts, each of about `budget`: counts, and the cursor from which the next goes on (None: that was all)."""
        span = self._span(definition, since, until, rate, beyond_retention)
        return backfilling.count(self.store, span, users, actor=self._actor, cursor=cursor, budget=budget)

    def _span(
        self, definition: str, since: datetime, until: datetime | None, rate: str | RateLimit, beyond_retention: bool
    ) -> backfilling.Span:
        return backfilling.check(
            self.definition(definition).id,
            since=since,
            until=until,
            rate=rate,
            now_ms=self.store.now_ms(),
            # how it ended is known for as long as both are kept: what completed, and what died
            retention=min(self.settings.retention, self.settings.dead_retention),
            beyond_retention=beyond_retention,
        )

    def backfills(self, *, limit: int = 100) -> list[Backfill]:
        """The newest first, for as long as finished jobs are kept."""
        return self.store.backfills.newest(limit=_limit(limit))

    def backfill_status(self, backfill: str) -> Backfill:
        """How far one is. Raises UnknownBackfill."""
        return self.store.backfills.get(_backfill_id(backfill))

    def cancel_backfill(self, backfill: str) -> Backfill:
        """Make nothing more of it, and cancel what waits; what runs goes on. Raises UnknownBackfill, Conflict."""
        self.store.backfills.cancel(_backfill_id(backfill), actor=self._actor)
        return self.store.backfills.get(backfill)

    def pause_backfill(self, backfill: str) -> bool:
        """Make nothing more of it until it is resumed. Returns whether that changed something. Raises UnknownBackfill, Conflict."""
        return self.store.backfills.pause(_backfill_id(backfill), actor=self._actor)

    def resume_backfill(self, backfill: str) -> bool:
        """The reverse. Raises UnknownBackfill, Conflict."""
        return self.store.backfills.resume(_backfill_id(backfill), actor=self._actor)

    # why, and when

    def why(self, user: str, definition: str, *, at: datetime | date | None = None, last: int = 1) -> list[Answer]:
        """What became of a user's occurrences of a definition, the newest first: of the last so many, or of the one to which the time
        `at` belongs, or of all of a day (a date, in the zone of the schedule).

        Raises UnknownUser, which tells who deleted the user as far as that is known, UnknownDefinition, InvalidInput.
        """
        return why(self.store, self.catalogue, check_user_id(user), check_definition_id(definition), at=at, last=last)

    def next(self, user: str, definition: str | None = None, *, count: int = 1) -> list[Moment]:
        """The next `count` moments of each definition that a user subscribes to, or of one, in order of the moments. See `coming`."""
        return list(self.coming(user, definition, count=count).moments)

    def coming(self, user: str, definition: str | None = None, *, count: int = 1) -> Coming:
        """The same, and of which definitions nothing comes, and why. Raises UnknownUser, UnknownDefinition, InvalidInput."""
        return coming(
            self.store,
            self.catalogue,
            check_user_id(user),
            None if definition is None else check_definition_id(definition),
            count=count,
            horizon=self.settings.plan_horizon,
            environment=environment(),
        )

    # what comes

    def forecast(
        self,
        *,
        hours: float = 24,
        enable: Sequence[tuple[str, int] | More] = (),
        limits: Mapping[str, Limit] | None = None,
        slots: int | None = None,
        came: Sequence[tuple[str, int] | More] = (),
        resume: Sequence[str] = (),
    ) -> Forecast:
        """What the next hours bring: jobs and requests, what limits and workers can carry, and what waits.

        `enable` are definitions with so many more subscribers, on the definition's schedule unless `More` gives another; `limits` go before
        those in force, each as a whole (`limit_of` makes them), and `slots` is how many places workers have, in place of those of the
        workers that live; `resume` are definitions that are not paused any more. With any of them `Forecast.before` is the same without;
        with `came` it is as it was before these came. It changes nothing. Raises InvalidInput, UnknownDefinition, StoreError.
        """
        for name in limits or {}:
            _limit_name(name)
        return look_ahead(
            self.store,
            self.catalogue,
            self.settings,
            hours=hours,
            enable=[self._added(*one) for one in enable],
            limits=limits,
            slots=slots,
            came=[self._added(*one) for one in came],
            resume=resume,
        )

    def subscribed(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each of these (user, definition) is subscribed."""
        return self.store.subscribed(pairs)

    def _added(self, definition: str, users: int, schedule: ScheduleOverride | Mapping[str, Any] | None = None) -> Added:
        own = None if schedule is None else _override(schedule, self.definition(definition))
        return Added(definition, users, own)


# --- checks ----------------------------------------------------------------------------------------------------------


_to_json = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode


def _check_params(params: Mapping[str, Any] | None, definition: Definition, given: Mapping[str, Any]) -> dict[str, Any]:
    if params is None:
        params = {}
    if not isinstance(params, Mapping) or not all(isinstance(name, str) for name in params):
        raise InvalidInput(
            f"params of {definition.id}: a mapping of names to JSON values is expected, not {type(params).__name__}", field="params"
        )
    try:
        # not all that Python takes for text is Unicode: half a surrogate pair cannot be encoded
        encoded = _to_json(params).encode() if params else b""
    except (TypeError, ValueError, RecursionError) as fault:
        raise InvalidInput(f"params of {definition.id}: not JSON: {fault}", field="params") from None
    if len(encoded) > MAX_PARAMS_BYTES:
        raise InvalidInput(
            f"params of {definition.id}: {len(encoded)} bytes of JSON, at most {MAX_PARAMS_BYTES} are accepted", field="params"
        )
    missing = definition.missing_params({**given, **params})
    if missing:
        raise InvalidInput(f"params of {definition.id}: {', '.join(missing)} missing", field="params")
    return dict(params)


def _when(countdown: float | timedelta | None, eta: datetime | None, now_ms: Callable[[], int]) -> tuple[int | None, int]:
    """(execute_after in ms, or None for a delay), delay in ms."""
    if countdown is not None and eta is not None:
        raise InvalidInput("countdown and eta exclude each other")
    if eta is not None:
        at_ms = _instant(eta, "eta")
        if at_ms > now_ms() + MAX_DELAY / timedelta(milliseconds=1):
            raise InvalidInput(f"eta {eta.isoformat()} is more than {MAX_DELAY.days} days ahead", field="eta")
        return at_ms, 0
    if countdown is None:
        return None, 0
    if isinstance(countdown, bool) or not isinstance(countdown, int | float | timedelta):
        raise InvalidInput(f"countdown {countdown!r} is not a number of seconds or a timedelta", field="countdown")
    seconds = countdown.total_seconds() if isinstance(countdown, timedelta) else countdown
    if not 0 <= seconds <= MAX_DELAY.total_seconds():
        raise InvalidInput(f"countdown {countdown!r} is not accepted: 0 to {MAX_DELAY.days} days is", field="countdown")
    return None, round(seconds * 1000)


def _digest(key: str) -> str:
    """What an idempotency key is known by."""
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY_LENGTH:
        raise InvalidInput(
            f"idempotency_key {key!r} is not accepted: a text of 1 to {MAX_KEY_LENGTH} characters is", field="idempotency_key"
        )
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _instant(value: datetime, name: str) -> int:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise InvalidInput(f"{name} {value!r} is not accepted: a datetime with a time zone is", field=name)
    return max(0, int(value.timestamp() * 1000))


def _backfill_id(backfill: str) -> str:
    if not isinstance(backfill, str) or not re.fullmatch(r"[0-9a-f]{1,32}", backfill):
        raise UnknownBackfill(f"no backfill {backfill!r}: `taskplatform backfills list` shows all")
    return backfill


def _limit(value: int) -> int:
    if not isinstance(value, int) or not 1 <= value <= MAX_LIMIT:
        raise InvalidInput(f"limit {value!r} is not accepted: 1 to {MAX_LIMIT} is")
    return value


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container that runs under a bare number
        return f"uid {os.getuid()}"


def _priority(value: Priority | str) -> Priority:
    try:
        return Priority(value)
    except ValueError:
        raise InvalidInput(f"priority {value!r} is not accepted: {', '.join(Priority)} are", field="priority") from None


def _states(value: JobState | str | Iterable[JobState | str] | None) -> frozenset[JobState]:
    if value is None:
        return frozenset()
    wanted = [value] if isinstance(value, str) else list(value)
    try:
        return frozenset(JobState(state) for state in wanted)
    except ValueError:
        raise InvalidInput(f"state {', '.join(map(str, wanted))} is not accepted: {', '.join(JobState)} are", field="state") from None


def _log_node(node: str) -> str:
    if not isinstance(node, str) or not re.fullmatch(r"[!-~]{1,300}", node):
        raise InvalidInput(f"{node!r} is no process: * is, a role (beat, worker, api), a node, or an id as `nodes` shows it", field="node")
    return node


def _limit_name(name: str) -> tuple[str, str]:
    """The kind of the limit, and of what it is."""
    kind, separator, of = name.partition(":") if isinstance(name, str) else ("", "", "")
    alone, checks = ("total", "user"), {"definition": check_definition_id, "host": check_host, "user": check_user_id}
    if separator and kind in checks:
        return kind, checks[kind](of)
    if separator or kind not in alone:
        hint = did_you_mean(kind, checks if separator else alone)
        raise InvalidInput(f"limit {name!r} is not known{hint}: total, definition:ID, host:HOST, user and user:ID are", field="name")
    return kind, ""


def _override(value: ScheduleOverride | Mapping[str, Any], definition: Definition) -> Schedule:
    try:
        override = value if isinstance(value, ScheduleOverride) else ScheduleOverride.model_validate(value)
        return override.apply(definition.schedule)
    except ValidationError as fault:
        faults = (f"{'.'.join(map(str, place))}: {message}" if place else message for place, message in explain(fault, ScheduleOverride))
        raise InvalidInput(f"schedule for {definition.id}: {'; '.join(faults)}", field="schedule") from None
    except ValueError as fault:
        raise InvalidInput(f"schedule for {definition.id}: {fault}", field="schedule") from None
