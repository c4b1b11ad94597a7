"""The platform over its control API: the methods of `Platform` that the API can serve, under the same names.

    with RemotePlatform.connect("https://host:8443", key="tpk_…", ca=Path("ca.crt")) as platform:
        job = platform.enqueue("daily_user_report", user="u1")
        platform.history(job.id)

Arguments, records and errors are those of `Platform`; besides, each method can raise ApiUnavailable (a StoreUnavailable), ApiError (a
StoreError) and Forbidden. What differs:

- `enqueue_many` makes each job on its own: when it raises, others may have been made.
- Listings without pages (changes, occurrences, garbage) have at most 500 items.
- A cursor belongs to the way over which it was given.
- Who acts is named in change log and histories by the key: `api:<its name>`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

from taskplatform import answers
from taskplatform.answers import Coming, Moment, Outcome
from taskplatform.apiclient import Answer, ApiClient, error_of
from taskplatform.backfill import DEFAULT_RATE
from taskplatform.errors import ApiError, InvalidInput, TaskPlatformError, UnknownBackfill, UnknownDefinition, UnknownJob, UnknownWorker
from taskplatform.forecast import Forecast, More, read_forecast
from taskplatform.health import Health, Problem, Severity
from taskplatform.model import (
    Job,
    JobState,
    Limit,
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
    format_rate,
    parse_duration,
    schedule_from_json,
)
from taskplatform.platform import LOG_LEVEL_SPAN, MAX_DELAY, MAX_LIMIT, JobRequest, SubscriptionRequest
from taskplatform.store import (
    BACKFILL_COUNTS,
    Backfill,
    BackfillState,
    Beat,
    Breaker,
    BreakerState,
    Change,
    Garbage,
    LimitState,
    LogLevel,
    Occurrence,
    Page,
    SubscribeResult,
    Worker,
)

T = TypeVar("T")
Json = Mapping[str, Any]

#: Bounds of the API: items of a page, and of a batch.
_MOST_ITEMS = 500
_MOST_OF_BATCH = 1000
#: Users that a backfill may be given.
_MOST_GIVEN = 10_000
#: Of what a path of the API takes.
_LONGEST_NAME, _LONGEST_ID = 300, 100
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class RemoteDefinition:
    """What the API tells of a definition. Headers, bodies and values of parameters are not told: they may hold secrets."""

    id: str
    name: str
    domain: str
    schedule: Schedule
    priority: Priority
    window: timedelta
    record: Json
    """All that is told, as JSON has it."""


class RemotePlatform:
    """The operations of the platform over its control API. For one thread at a time."""

    def __init__(self, client: ApiClient) -> None:
        self.client = client

    @classmethod
    def connect(
        cls, url: str, *, key: str, ca: Path | None = None, client_cert: Path | None = None, client_key: Path | None = None
    ) -> RemotePlatform:
        """The platform behind the API at `url`. `ca` is a PEM file of the CAs to trust instead of the usual ones.

        Nothing is sent yet. Raises SettingsError.
        """
        return cls(ApiClient(url, key, ca=ca, client_cert=client_cert, client_key=client_key))

    @property
    def url(self) -> str:
        """Of the API."""
        return self.client.url

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def __enter__(self) -> RemotePlatform:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

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
        """As `Platform.enqueue`; an idempotency key gives the same job over both ways."""
        (made,) = self.enqueue_each(
            [
                JobRequest(
                    definition=definition,
                    user=user,
                    params=params,
                    countdown=countdown,
                    eta=eta,
                    priority=priority,
                    idempotency_key=idempotency_key,
                )
            ]
        )
        if isinstance(made, TaskPlatformError):
            raise made
        return made

    def enqueue_many(self, requests: Iterable[JobRequest]) -> list[Job]:
        """Make many jobs, in this order. Raises the first fault; the others are made all the same."""
        made = self.enqueue_each(list(requests))
        for one in made:
            if isinstance(one, TaskPlatformError):
                raise one
        return [one for one in made if isinstance(one, Job)]

    def enqueue_each(self, requests: Sequence[JobRequest]) -> list[Job | TaskPlatformError]:
        """As `Platform.enqueue_each`."""
        items = [_job_item(request) for request in requests]
        found = [one for answer in self._in_batches("/jobs/batch", items) for one in self._items(answer)]
        with self._read():
            return [_job(one["job"]) if one["job"] else error_of(one["problem"]) for one in found]

    def job(self, job_id: str) -> Job:
        """Raises UnknownJob."""
        return self._get(_job, f"/jobs/{_quoted_job(job_id)}")

    def history(self, job_id: str) -> list[Transition]:
        """Raises UnknownJob."""
        return self._list(_transition, f"/jobs/{_quoted_job(job_id)}/history")

    def held_back(self, job: Job) -> Breaker | None:
        """The host for which a due job waits, where that is held back; else None."""
        return self._get(lambda one: _breaker(one["breaker"]) if one["breaker"] else None, f"/jobs/{_quoted_job(job.id)}/held-back")

    def waits(self, job: Job) -> answers.Waits | None:
        """As `Platform.waits`."""
        if job.state not in (JobState.PENDING, JobState.QUEUED, JobState.RETRYING):
            return None
        return self._get(lambda one: _waits(one["waits"]) if one.get("waits") else None, f"/jobs/{_quoted_job(job.id)}")

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
    ) -> Page[Job]:
        """As `Platform.jobs`; a page is full also where the API looks for it in several steps."""
        states = None if state is None else [state] if isinstance(state, str) else [str(one) for one in state]
        query = {"user": user, "definition": definition, "state": states, "since": _when(since), "until": _when(until)}
        return self._page(_job, "/jobs", cursor, limit, query)

    def cancel(self, job_id: str) -> Job:
        """Raises UnknownJob, Conflict."""
        return self._get(_job, f"/jobs/{_quoted_job(job_id)}/cancel", "POST")

    def retry(self, job_id: str) -> Job:
        """Raises UnknownJob, UnknownDefinition, Conflict."""
        return self._get(_job, f"/jobs/{_quoted_job(job_id)}/retry", "POST")

    def set_priority(self, job_id: str, priority: Priority | str) -> Job:
        """Raises UnknownJob, Conflict, InvalidInput."""
        return self._get(_job, f"/jobs/{_quoted_job(job_id)}/priority", "PUT", {"priority": str(priority)})

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
    ) -> Page[Job]:
        """As `Platform.dead_letters`."""
        _check_filters(definition, user)
        query = {"user": user, "definition": definition, "since": _when(since), "reason": reason or None}
        return self._page(_job, "/dead-letters", cursor, limit, query)

    def redrive(self, job_id: str) -> Job:
        """Raises UnknownJob, UnknownDefinition, Conflict."""
        return self._get(_job, f"/dead-letters/{_quoted_job(job_id)}/redrive", "POST")

    def discard(self, job_id: str) -> None:
        """Nothing, where there is no such job any more. Raises Conflict."""
        with suppress(UnknownJob):
            self.client.call("DELETE", f"/dead-letters/{_quoted_job(job_id)}")

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
        """As `Platform.redrive_all`."""
        redriven = left = 0
        for answer in self._dead("redrive", definition, user, since, reason, limit):
            redriven, left = redriven + answer["redriven"], left + answer["left"]
            if progress is not None:
                progress(redriven + left)
        return redriven, left

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
        """As `Platform.discard_all`."""
        discarded = 0
        for answer in self._dead("discard", definition, user, since, reason, limit):
            discarded += answer["discarded"]
            if progress is not None:
                progress(discarded)
        return discarded

    def _dead(
        self, verb: str, definition: str | None, user: str | None, since: datetime | None, reason: str, limit: int | None
    ) -> Iterator[dict[str, Any]]:
        """Answers to calls that each do the next ones. How many a call did counts as `limit` does: those that were looked at."""
        _check_filters(definition, user)
        given = {"definition": definition, "user": user, "since": _when(since), "reason": reason or None}
        body: dict[str, Any] = {name: value for name, value in given.items() if value is not None} or {"all": True}
        left, cursor = limit, None
        while left is None or left > 0:
            # short steps, so that each is answered in time and progress is seen
            size = 100 if left is None else min(left, 100)
            with self._read():
                answer = self.client.call(
                    "POST", f"/dead-letters/{verb}", {**body, "limit": size, **({"cursor": cursor} if cursor else {})}
                ).body
                cursor = answer["next"]
                yield answer
            if cursor is None:
                return
            left = None if left is None else left - size

    # definitions

    def definition(self, definition: str) -> RemoteDefinition:
        """Raises UnknownDefinition."""
        return self._get(_definition, f"/definitions/{_quoted_definition(definition)}")

    def definitions(self) -> list[RemoteDefinition]:
        """In the order of their files."""
        return self._list(_definition, "/definitions")

    def trigger(self, definition: str, *, window: timedelta | None = None, idempotency_key: str | None = None) -> tuple[datetime, int]:
        """As `Platform.trigger`."""
        body: dict[str, Any] = {} if window is None else {"window": format_duration(window)}
        if idempotency_key is not None:
            body["idempotency_key"] = idempotency_key
        return self._get(
            lambda one: (datetime.fromisoformat(one["at"]), int(one["subscribers"])),
            f"/definitions/{_quoted_definition(definition)}/trigger",
            "POST",
            body,
        )

    def pause_definition(self, definition: str, *, why: str = "") -> bool:
        """Returns whether that changed something."""
        return self.client.call("POST", f"/definitions/{_quoted_definition(definition)}/pause", {"why": why}).changed

    def resume_definition(self, definition: str) -> bool:
        """Returns whether that changed something. What it would spoil `forecast` says before, and is not asked for again."""
        path = f"/definitions/{_quoted_definition(definition)}/resume"
        return self.client.call("POST", path, query={"forecast": "false"}).changed

    def occurrences(self, definition: str, *, since: datetime | None = None, limit: int = 100) -> list[Occurrence]:
        """As `Platform.occurrences`, 500 at the most."""
        query = {"since": _when(since), "limit": _few(limit)}
        return self._list(_occurrence, f"/definitions/{_quoted_definition(definition)}/occurrences", query)

    # processes

    def workers(self) -> list[Worker]:
        """In order of their ids."""
        return self._list(_worker, "/nodes")

    def drain_worker(self, worker: str) -> bool:
        """Returns whether that changed something. Raises UnknownWorker."""
        return self.client.call("POST", f"/nodes/{_quoted_worker(worker)}/drain").changed

    def resume_worker(self, worker: str) -> bool:
        """Returns whether that changed something. Raises UnknownWorker."""
        return self.client.call("POST", f"/nodes/{_quoted_worker(worker)}/resume").changed

    def beats(self) -> list[Beat]:
        """Those that have not signed off."""
        return self._list(_beat, "/beats")

    def now_ms(self) -> int:
        """The server's time."""
        return self.health().at_ms

    # logs

    def log_levels(self) -> dict[str, LogLevel]:
        """What was set live, by whom it is for."""
        return dict(self._list(_log_level, "/log-levels"))

    def set_log_level(self, level: str, *, node: str = "*", span: timedelta = LOG_LEVEL_SPAN) -> None:
        """As `Platform.set_log_level`."""
        self.client.call("PUT", f"/log-levels/{_quoted(node)}", {"level": level, "span": format_duration(span)})

    def reset_log_level(self, *, node: str = "*") -> bool:
        """As `Platform.reset_log_level`."""
        return self.client.call("DELETE", f"/log-levels/{_quoted(node)}").changed

    # limits and hosts

    def limits(self) -> list[LimitState]:
        """The limits in force and how they stand, by name."""
        return self._list(_limit_state, "/limits")

    def set_limit(self, name: str, rate: str | None = None, *, burst: int | None = None, concurrency: int | None = None) -> bool:
        """As `Platform.set_limit`."""
        given = {"rate": rate, "burst": burst, "concurrency": concurrency}
        body: dict[str, Any] = {field: value for field, value in given.items() if value is not None} or {"unlimited": True}
        return self.client.call("PUT", f"/limits/{_quoted(name)}", body).changed

    def reset_limit(self, name: str) -> bool:
        """As `Platform.reset_limit`."""
        return self.client.call("DELETE", f"/limits/{_quoted(name)}").changed

    def breakers(self) -> list[Breaker]:
        """The hosts that are called, and whether their jobs are held back."""
        return self._list(_breaker, "/breakers")

    def open_breaker(self, host: str, *, span: timedelta, reason: str = "") -> None:
        """As `Platform.open_breaker`."""
        if not timedelta(milliseconds=1) <= span <= MAX_DELAY:
            raise InvalidInput(f"span {span} is not accepted: up to {MAX_DELAY.days} days is")
        self.client.call("POST", f"/breakers/{_quoted(check_host(host))}/open", {"span": format_duration(span), "reason": reason})

    def reset_breaker(self, host: str) -> bool:
        """Returns whether its jobs were held back."""
        return self.client.call("POST", f"/breakers/{_quoted(check_host(host))}/reset").changed

    # users

    def create_user(self, user: str, *, name: str = "") -> User:
        """Create a user, or return the one that exists."""
        return self._get(_user, "/users", "POST", {"id": check_user_id(user), "name": name})

    def add_user(self, user: str, *, name: str = "") -> bool:
        """Create a user. Returns False where there is one."""
        return self.client.call("POST", "/users", {"id": check_user_id(user), "name": name}).changed

    def create_users(self, users: Iterable[str]) -> int:
        """Create many, each with a call of its own. Returns how many were new."""
        return sum(self.add_user(user) for user in users)

    def user(self, user: str) -> User:
        """Raises UnknownUser."""
        return self._get(_user, f"/users/{_quoted_user(user)}")

    def users(self, *, cursor: str | None = None, limit: int = 100) -> Page[User]:
        """In order of their ids."""
        return self._page(_user, "/users", cursor, limit, {})

    def count_users(self) -> int:
        """How many users there are."""
        return self._get(lambda one: int(one["users"]), "/counts")

    def delete_user(self, user: str) -> tuple[int, int]:
        """Returns (jobs canceled, subscriptions removed)."""
        return self._get(lambda one: (one["jobs_canceled"], one["subscriptions_removed"]), f"/users/{_quoted_user(user)}", "DELETE")

    def pause_user(self, user: str) -> bool:
        """Returns whether that changed something."""
        return self.client.call("POST", f"/users/{_quoted_user(user)}/pause").changed

    def resume_user(self, user: str) -> bool:
        """Returns whether that changed something."""
        return self.client.call("POST", f"/users/{_quoted_user(user)}/resume").changed

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
        """As `Platform.subscribe`."""
        body = {"enabled": enabled, "params": dict(params or {}), "schedule": _override(schedule)}
        return self._get(_subscription, _path(user, definition), "PUT", body)

    def subscribe_each(
        self, requests: Sequence[SubscriptionRequest], *, create_users: bool = False
    ) -> tuple[list[SubscribeResult | TaskPlatformError], int]:
        """As `Platform.subscribe_each`."""
        items = [
            {
                "user": one.user,
                "definition": one.definition,
                "enabled": one.enabled,
                "params": None if one.params is None else dict(one.params),
                "schedule": _override(one.schedule),
            }
            for one in requests
        ]
        results: list[SubscribeResult | TaskPlatformError] = []
        created = 0
        for answer in self._in_batches("/subscriptions/batch", items, create_users=create_users):
            with self._read():
                created += answer.body["users_created"]
                results += [
                    SubscribeResult[one["result"].upper()] if one["result"] else error_of(one["problem"]) for one in self._items(answer)
                ]
        return results, created

    def set_params(self, user: str, definition: str, params: Mapping[str, Any]) -> Subscription:
        """Replace the parameters of a subscription."""
        return self._get(_subscription, _path(user, definition), "PATCH", {"params": dict(params)})

    def set_schedule(self, user: str, definition: str, schedule: ScheduleOverride | Mapping[str, Any] | None) -> Subscription:
        """Give a subscription an own schedule, or with None the definition's again."""
        return self._get(_subscription, _path(user, definition), "PATCH", {"schedule": _override(schedule)})

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
        """As `Platform.change_subscription`."""
        body: dict[str, Any] = {}
        if params is not None:
            body["params"] = dict(params)
        if schedule is not None or default_schedule:
            body["schedule"] = _override(schedule)
        if enabled is not None:
            body["enabled"] = enabled
        return self._get(_subscription, _path(user, definition), "PATCH", body)

    def enable(self, user: str, definition: str) -> Subscription:
        """Switch a subscription on again."""
        return self.change_subscription(user, definition, enabled=True)

    def disable(self, user: str, definition: str) -> Subscription:
        """Switch a subscription off and cancel what waits of it."""
        return self.change_subscription(user, definition, enabled=False)

    def unsubscribe(self, user: str, definition: str) -> int:
        """Returns how many waiting jobs were canceled."""
        return self._get(lambda one: int(one["jobs_canceled"]), _path(user, definition), "DELETE")

    def subscription(self, user: str, definition: str) -> Subscription:
        """Raises UnknownUser, UnknownSubscription."""
        return self._get(_subscription, _path(user, definition))

    def subscriptions(self, user: str) -> list[Subscription]:
        """Of one user. Raises UnknownUser."""
        return self._list(_subscription, f"/users/{_quoted_user(user)}/subscriptions")

    def subscribers(self, definition: str, *, cursor: str | None = None, limit: int = 100) -> Page[str]:
        """Users that are subscribed to a definition."""
        return self._page(str, f"/definitions/{_quoted_definition(definition)}/subscribers", cursor, limit, {})

    def count_subscribers(self, definition: str) -> int:
        """How many there are."""
        return self._get(lambda one: int(one["subscribers"]), f"/definitions/{_quoted_definition(definition)}/subscribers/count")

    def pause_subscription(self, user: str, definition: str) -> bool:
        """Returns whether that changed something."""
        return self.client.call("POST", f"{_path(user, definition)}/pause").changed

    def resume_subscription(self, user: str, definition: str) -> bool:
        """Returns whether that changed something."""
        return self.client.call("POST", f"{_path(user, definition)}/resume").changed

    # how it is, and what happened

    def health(self) -> Health:
        """As `Platform.health`."""
        return self._get(_health, "/health")

    def changes(self, *, about: Sequence[str] = (), limit: int = 100) -> list[Change]:
        """As `Platform.changes`, 500 at the most."""
        return self._list(_change, "/changes", {"about": list(about) or None, "limit": _few(limit)})

    def garbage(self, *, limit: int = 100) -> list[Garbage]:
        """As `Platform.garbage`, 500 at the most."""
        return self._list(_garbage, "/garbage", {"limit": _few(limit)})

    def clear_garbage(self) -> int:
        """Returns how many were forgotten."""
        return self._get(lambda one: int(one["forgotten"]), "/garbage", "DELETE")

    # what is run afterwards

    def backfill(
        self,
        definition: str,
        *,
        since: datetime,
        until: datetime | None = None,
        users: Sequence[str] | None = None,
        rate: str | RateLimit = DEFAULT_RATE,
        dry_run: bool = False,
        beyond_retention: bool = False,
    ) -> Backfill:
        """As `Platform.backfill`, with 10,000 users at the most."""
        if users is not None and len(users) > _MOST_GIVEN:
            raise InvalidInput(f"users: {len(users):,} are given; over the API {_MOST_GIVEN:,} are accepted", field="users")
        rate = rate.rate if isinstance(rate, RateLimit) else rate
        given = {"definition": definition, "since": _when(since), "until": _when(until), "rate": rate, "users": users and list(users)}
        body = {name: value for name, value in {**given, "beyond_retention": beyond_retention}.items() if value is not None}
        if not dry_run:
            return self._get(_backfill, "/backfills", "POST", body)
        found, cursor = self._get(lambda one: (_backfill(one["counted"]), one["next"]), "/backfills/count", "POST", body)
        while cursor is not None:
            body["cursor"] = cursor
            more, cursor = self._get(lambda one: (_backfill(one["counted"]), one["next"]), "/backfills/count", "POST", body)
            found = found + more
        return found

    def backfills(self, *, limit: int = 100) -> list[Backfill]:
        """As `Platform.backfills`, 500 at the most."""
        return self._list(_backfill, "/backfills", {"limit": _few(limit)})

    def backfill_status(self, backfill: str) -> Backfill:
        """Raises UnknownBackfill."""
        return self._get(_backfill, _backfill_path(backfill))

    def cancel_backfill(self, backfill: str) -> Backfill:
        """As `Platform.cancel_backfill`."""
        return self._get(_backfill, f"{_backfill_path(backfill)}/cancel", "POST")

    def pause_backfill(self, backfill: str) -> bool:
        """Returns whether that changed something."""
        return self.client.call("POST", f"{_backfill_path(backfill)}/pause").changed

    def resume_backfill(self, backfill: str) -> bool:
        """Returns whether that changed something."""
        return self.client.call("POST", f"{_backfill_path(backfill)}/resume").changed

    def forecast(
        self,
        *,
        hours: float = 24,
        enable: Sequence[tuple[str, int] | More] = (),
        limits: Mapping[str, Limit] | None = None,
        slots: int | None = None,
        resume: Sequence[str] = (),
    ) -> Forecast:
        """As `Platform.forecast`."""
        body: dict[str, Any] = {
            "hours": hours,
            "enable": [{"definition": one[0], "users": one[1], "schedule": _override(More(*one).schedule)} for one in enable],
            "limits": {name: _limit_body(limit) for name, limit in (limits or {}).items()},
            "slots": slots,
            **({"resume": list(resume)} if resume else {}),
        }
        answer = self.client.call("POST", "/forecast", body, query={"points": "all"})
        with self._read():
            return read_forecast(answer.body)

    # why, and when

    def why(self, user: str, definition: str, *, at: datetime | date | None = None, last: int = 1) -> list[answers.Answer]:
        """As `Platform.why`."""
        when = at.isoformat() if isinstance(at, date) and not isinstance(at, datetime) else _when(at)
        return self._list(_answer, f"{_path(user, definition)}/why", {"at": when, "last": last})

    def next(self, user: str, definition: str | None = None, *, count: int = 1) -> list[Moment]:
        """As `Platform.next`."""
        return list(self.coming(user, definition, count=count).moments)

    def coming(self, user: str, definition: str | None = None, *, count: int = 1) -> Coming:
        """As `Platform.coming`."""
        _check_filters(definition, user)
        answer = self.client.call("GET", f"/users/{_quoted_user(user)}/next", query={"definition": definition, "count": count})
        with self._read():
            return Coming(tuple(map(_moment, answer.body["items"])), dict(answer.body["none"]))

    # what these share

    def _get(self, read: Callable[[Any], T], path: str, method: str = "GET", body: object = None) -> T:
        answer = self.client.call(method, path, body)
        with self._read():
            return read(answer.body)

    def _list(self, read: Callable[[Any], T], path: str, query: Mapping[str, object] | None = None) -> list[T]:
        answer = self.client.call("GET", path, query=query)
        with self._read():
            return [read(one) for one in answer.body["items"]]

    def _items(self, answer: Answer) -> list[Json]:
        with self._read():
            return list(answer.body["items"])

    def _page(self, read: Callable[[Any], T], path: str, cursor: str | None, limit: int, query: Mapping[str, object]) -> Page[T]:
        """`limit` items, of as many pages of the API as that takes."""
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidInput(f"limit {limit!r} is not accepted: 1 to {MAX_LIMIT} is")
        found: list[T] = []
        while True:
            asked = {**query, "cursor": cursor, "limit": min(limit - len(found), _MOST_ITEMS)}
            answer = self.client.call("GET", path, query=asked)
            with self._read():
                found += [read(one) for one in answer.body["items"]]
                cursor = answer.body["next"]
            if cursor is None or len(found) >= limit:
                return Page(tuple(found), cursor)

    def _in_batches(self, path: str, items: Sequence[Any], **more: object) -> Iterator[Answer]:
        """The answers to all of them, a batch after the other; one that is too large for the API goes in halves."""
        for start in range(0, len(items), _MOST_OF_BATCH):
            yield from self._batch(path, items[start : start + _MOST_OF_BATCH], more)

    def _batch(self, path: str, items: Sequence[Any], more: Mapping[str, object]) -> Iterator[Answer]:
        size = sum(len(json.dumps(item)) for item in items)
        if len(items) == 1 or size <= _MOST_BYTES_OF_BATCH:
            yield self.client.call("POST", path, {"items": list(items), **more})
            return
        middle = len(items) // 2
        yield from self._batch(path, items[:middle], more)
        yield from self._batch(path, items[middle:], more)

    @contextmanager
    def _read(self) -> Iterator[None]:
        """What is not as the API answers is of another version of it, or of something else."""
        try:
            yield
        except TaskPlatformError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as fault:
            raise ApiError(
                f"{self.url} answers what this version does not understand ({type(fault).__name__}: {fault}): is it the control API?"
            ) from None


#: Half of the smallest body that an API is likely to take.
_MOST_BYTES_OF_BATCH = 400_000


# --- what is asked ---------------------------------------------------------------------------------------------------


def _quoted(text: str, fault: TaskPlatformError | None = None) -> str:
    """One step of a path. What would be more steps, or a step up, can be the name of nothing: raises `fault`, or InvalidInput."""
    if text in ("", ".", "..") or "/" in text:
        raise fault or InvalidInput(f"{text!r} is not accepted as a name")
    return quote(text, safe="")


def _quoted_job(job_id: str) -> str:
    fault = UnknownJob(f"no job {job_id!r}: it never was, or its record is past the retention")
    if len(job_id) > _LONGEST_NAME:
        raise fault
    return _quoted(job_id, fault)


def _quoted_worker(worker: str) -> str:
    fault = UnknownWorker(f"no worker {worker!r}: it never was, or it has ended")
    if len(worker) > _LONGEST_NAME:
        raise fault
    return _quoted(worker, fault)


def _quoted_user(user: str) -> str:
    return _quoted(check_user_id(user))


def _quoted_definition(definition: str) -> str:
    fault = UnknownDefinition(f"no definition {definition!r}; `taskplatform tasks list` shows all")
    if len(definition) > _LONGEST_ID:
        raise fault
    return _quoted(definition, fault)


def _backfill_path(backfill: str) -> str:
    fault = UnknownBackfill(f"no backfill {backfill!r}: `taskplatform backfills list` shows all")
    if len(backfill) > _LONGEST_ID:
        raise fault
    return f"/backfills/{_quoted(backfill, fault)}"


def _path(user: str, definition: str) -> str:
    return f"/users/{_quoted_user(user)}/subscriptions/{_quoted(check_definition_id(definition))}"


def _check_filters(definition: str | None, user: str | None) -> None:
    if definition is not None:
        check_definition_id(definition)
    if user is not None:
        check_user_id(user)


def _when(instant: datetime | None) -> str | None:
    if instant is None:
        return None
    if instant.tzinfo is None:
        raise InvalidInput(f"{instant!r} is not accepted: a datetime with a time zone is")
    return instant.astimezone(UTC).isoformat()


def _few(limit: int) -> int:
    if not 1 <= limit <= _MOST_ITEMS:
        raise InvalidInput(f"limit {limit!r} is not accepted: over the API 1 to {_MOST_ITEMS} is")
    return limit


def _job_item(request: JobRequest) -> dict[str, Any]:
    if request.countdown is not None and request.eta is not None:
        raise InvalidInput("countdown and eta exclude each other")
    countdown = request.countdown.total_seconds() if isinstance(request.countdown, timedelta) else request.countdown
    given = {
        "definition": check_definition_id(request.definition),
        "user": check_user_id(request.user),
        "params": None if request.params is None else dict(request.params),
        "countdown": countdown,
        "eta": _when(request.eta),
        "priority": None if request.priority is None else str(request.priority),
        "idempotency_key": request.idempotency_key,
    }
    return {name: value for name, value in given.items() if value is not None}


def _limit_body(limit: Limit) -> dict[str, Any]:
    if limit == Limit():
        return {"unlimited": True}
    rate = None if limit.per_second is None else format_rate(limit.per_second)
    return {"rate": rate, "burst": limit.burst, "concurrency": limit.concurrency}


def _override(schedule: ScheduleOverride | Mapping[str, Any] | None) -> Any:
    if isinstance(schedule, ScheduleOverride):
        return schedule.model_dump(mode="json", exclude_none=True)
    return None if schedule is None else dict(schedule)


# --- what is answered ------------------------------------------------------------------------------------------------


def _ms(text: str) -> int:
    return (datetime.fromisoformat(text) - _EPOCH) // timedelta(milliseconds=1)


def _some_ms(text: str | None) -> int | None:
    return None if text is None else _ms(text)


def _schedule(found: Any) -> Schedule:
    return schedule_from_json(json.dumps(found))


def _job(one: Json) -> Job:
    same = ("id", "definition", "user", "attempt", "failures", "delivery", "params", "worker", "reason", "source", "version")
    return Job(
        **{name: one[name] for name in same},
        state=JobState(one["state"]),
        priority=Priority(one["priority"]),
        execute_after_ms=_ms(one["execute_after"]),
        created_ms=_ms(one["created"]),
        occurrence_ms=_some_ms(one["occurrence"]),
        started_ms=_some_ms(one["started"]),
        finished_ms=_some_ms(one["finished"]),
    )


def _transition(one: Json) -> Transition:
    return Transition(
        at_ms=_ms(one["at"]),
        from_state=None if one["from_state"] is None else JobState(one["from_state"]),
        to_state=JobState(one["to_state"]),
        attempt=one["attempt"],
        worker=one["worker"],
        reason=one["reason"],
        detail=one["detail"],
    )


def _user(one: Json) -> User:
    return User(one["id"], _ms(one["created"]), paused=one["paused"], name=one["name"])


def _subscription(one: Json) -> Subscription:
    return Subscription(
        user=one["user"],
        definition=one["definition"],
        enabled=one["enabled"],
        paused=one["paused"],
        params=one["params"],
        schedule=None if one["schedule"] is None else _schedule(one["schedule"]),
        since_ms=_ms(one["since"]),
    )


def _definition(one: Json) -> RemoteDefinition:
    return RemoteDefinition(
        id=one["id"],
        name=one["name"],
        domain=one["domain"],
        schedule=_schedule(one["schedule"]),
        priority=Priority(one["priority"]),
        window=parse_duration(one["window"]),
        record=one,
    )


def _occurrence(one: Json) -> Occurrence:
    same = ("id", "definition", "group", "window_ms", "asked_ms", "state", "source", "reason", "planned", "paused", "disabled")
    return Occurrence(**{name: one[name] for name in same}, at_ms=_ms(one["at"]), last_ms=_ms(one["last"]), base_ms=_ms(one["begins"]))


def _backfill(one: Json) -> Backfill:
    same = ("id", "definition", "reason", "actor", "users", *BACKFILL_COUNTS)
    return Backfill(
        **{name: one[name] for name in same},
        since_ms=_ms(one["since"]),
        until_ms=_ms(one["until"]),
        begun_ms=_ms(one["begun"]),
        state=BackfillState(one["state"]),
        per_second=RateLimit.model_validate(one["rate"]).per_second,
        ended_ms=_some_ms(one["ended"]),
        at_ms=_some_ms(one["at"]),
    )


def _change(one: Json) -> Change:
    return Change(at_ms=_ms(one["at"]), actor=one["actor"], kind=one["kind"], subject=one["subject"], detail=one["detail"])


def _limit(one: Json | None) -> Limit | None:
    if one is None:
        return None
    per_second = None if one["rate"] is None else RateLimit.model_validate({"rate": one["rate"], "burst": one["burst"]}).per_second
    return Limit(per_second, one["burst"], one["concurrency"])


def _limit_state(one: Json) -> LimitState:
    return LimitState(
        name=one["name"],
        limit=_limit(one) or Limit(),
        configured=_limit(one["configured"]),
        live=one["source"] == "live",
        tokens=one["tokens"],
        reserved=one["reserved"],
        in_flight=one["in_flight"],
        held_until_ms=_some_ms(one["held_until"]),
    )


def _breaker(one: Json) -> Breaker:
    return Breaker(
        host=one["host"],
        state=BreakerState(one["state"]),
        since_ms=_some_ms(one["since"]),
        until_ms=_some_ms(one["until"]),
        probed_ms=_some_ms(one["probed"]),
        **{name: one[name] for name in ("calls", "failures", "openings", "passed", "probe", "reason")},
    )


def _worker(one: Json) -> Worker:
    return Worker(
        id=one["id"],
        heartbeat_ms=_ms(one["heartbeat"]),
        slots=one["slots"],
        queues=tuple(one["queues"]),
        running=tuple(one["running"]),
        info=one["info"],
        drained=one["drained"],
    )


def _beat(one: Json) -> Beat:
    same = {name: one[name] for name in ("id", "leads", "catalogue", "number")}
    return Beat(**same, since_ms=_ms(one["since"]), heartbeat_ms=_ms(one["heartbeat"]), info=one.get("info", {}))


def _log_level(one: Json) -> tuple[str, LogLevel]:
    return one["node"], LogLevel(level=one["level"], until_ms=_ms(one["until"]), actor=one["actor"])


def _garbage(one: Json) -> Garbage:
    return Garbage(at_ms=_ms(one["at"]), queue=one["queue"], reason=one["reason"], worker=one["worker"], text=one["text"])


def _answer(one: Json) -> answers.Answer:
    return answers.Answer(
        **{name: one[name] for name in ("user", "definition", "reason", "job_id", "mend")},
        occurrence_ms=_ms(one["occurrence"]),
        moment_ms=_some_ms(one["moment"]),
        outcome=Outcome(one["outcome"]),
        history=tuple(map(_transition, one["history"])),
        facts=tuple(one["facts"].items()),
    )


def _waits(one: Json) -> answers.Waits:
    return answers.Waits(one["reason"], one["mend"], tuple(one["facts"].items()))


def _moment(one: Json) -> Moment:
    same = ("user", "definition", "timezone", "local", "slot", "window_ms", "certain", "note")
    return Moment(**{name: one[name] for name in same}, occurrence_ms=_ms(one["occurrence"]), moment_ms=_ms(one["moment"]))


def _health(one: Json) -> Health:
    problems = [
        Problem(
            code=found["code"],
            severity=Severity(found["severity"]),
            subject=found["subject"],
            since_ms=_some_ms(found["since"]),
            text=found["text"],
        )
        for found in one["problems"]
    ]
    return Health(at_ms=_ms(one["at"]), problems=tuple(problems), counters=one["counters"])
