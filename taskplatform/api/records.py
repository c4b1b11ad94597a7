"""What the API takes and gives, as JSON has it. Each has an example, which the OpenAPI document shows.

Instants are text, ISO 8601 in UTC with milliseconds; durations are written as "90s" or "1h30m". What is given is made of the platform's
own values (`model_validate`), what is taken is checked strictly and refuses fields that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, StringConstraints, WithJsonSchema, field_validator

from taskplatform.catalogue import Catalogue
from taskplatform.health import Health, Severity
from taskplatform.model import (
    DEFINITION_ID,
    USER_ID,
    Backoff,
    Cron,
    Definition,
    Duration,
    Interval,
    JobState,
    LimitRule,
    Priority,
    RateLimit,
    ScheduleOverride,
    format_duration,
    format_rate,
    schedule_to_json,
)
from taskplatform.platform import LOG_LEVEL_SPAN, LONGEST_LOG_LEVEL, MAX_DELAY, MAX_KEY_LENGTH
from taskplatform.store import BreakerState, LimitState, LogLevel, Worker

MAX_BATCH = 1000
"""Jobs of one batch."""
MOST_DEAD = 1000
"""Dead letters that one call redrives or discards."""


def _instant_text(instant_ms: int) -> str:
    seconds, milliseconds = divmod(instant_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03}Z"


Instant = Annotated[int, PlainSerializer(_instant_text), WithJsonSchema({"type": "string", "format": "date-time"})]
OwnSchedule = Annotated[
    Interval | Cron,
    PlainSerializer(lambda schedule: json.loads(schedule_to_json(schedule))),
    WithJsonSchema({"type": "object", "description": 'as it was given: {"interval": …} or {"cron": …}'}),
]
UserId = Annotated[str, StringConstraints(pattern=f"^{USER_ID.pattern}$")]
DefinitionId = Annotated[str, StringConstraints(pattern=f"^{DEFINITION_ID.pattern}$")]
Params = dict[str, Any]


class _Given(BaseModel):
    model_config = ConfigDict(from_attributes=True, frozen=True)


class _Taken(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [values]})


# --- jobs ------------------------------------------------------------------------------------------------------------

_JOB = {
    "id": "daily_user_report:u1:1800057600000",
    "definition": "daily_user_report",
    "user": "u1",
    "state": "completed",
    "priority": "high",
    "execute_after": "2027-01-16T00:00:03.250Z",
    "created": "2027-01-15T23:59:58.250Z",
    "occurrence": "2027-01-16T00:00:00.000Z",
    "attempt": 1,
    "failures": 0,
    "delivery": 1,
    "params": {"format": "pdf"},
    "worker": "celery@host#1a2b3c4d",
    "started": "2027-01-16T00:00:03.262Z",
    "finished": "2027-01-16T00:00:03.655Z",
    "reason": "HTTP 200",
    "source": "schedule",
    "version": "0a1b2c3d",
    "poison": False,
}
_TRANSITION = {
    "at": "2027-01-16T00:00:03.655Z",
    "from_state": "running",
    "to_state": "completed",
    "attempt": 1,
    "worker": "celery@host#1a2b3c4d",
    "reason": "HTTP 200",
    "detail": {"status": 200, "duration_ms": 390},
}


class JobRecord(_Given):
    """One run for one user."""

    model_config = _example(**_JOB)

    id: str
    definition: str
    user: str
    state: JobState
    priority: Priority
    execute_after: Instant = Field(validation_alias="execute_after_ms", description="not before this")
    created: Instant = Field(validation_alias="created_ms")
    occurrence: Instant | None = Field(validation_alias="occurrence_ms", description="null: it was submitted by hand")
    attempt: int = Field(description="how many runs have started")
    failures: int = Field(description="how many runs before the last one failed and count against its retries")
    delivery: int = Field(description="how often it was released to the broker")
    params: Params
    worker: str
    started: Instant | None = Field(validation_alias="started_ms")
    finished: Instant | None = Field(validation_alias="finished_ms")
    reason: str = Field(description="of the last line of its history; of a dead letter why it died")
    source: str = Field(description="schedule, catch_up, trigger, backfill or api")
    version: str = Field(description="of the definition, as its last run had it")
    poison: bool = Field(description="it ended because its workers or processes died with it again and again")


_WAITS: dict[str, object] = {
    "reason": "it waits for a pause to end: definition daily_user_report is paused by anna at 2027-01-15 23:50:00 UTC (the API is down)",
    "mend": "taskplatform resume daily_user_report",
    "facts": {"before it": "3 of its priority by time", "workers": "2 serve the queue high, with 8 slots"},
}


class WaitsRecord(_Given):
    """For what a job waits."""

    model_config = _example(**_WAITS)

    reason: str = Field(description="one sentence: what holds it back, by whom and since when")
    mend: str = Field(description="a command that helps; empty where nothing needs to be mended")
    facts: dict[str, str] = Field(description="more, by name: limits, behind how many, workers")

    @field_validator("facts", mode="before")
    @classmethod
    def _by_name(cls, pairs: object) -> object:
        return dict(pairs) if isinstance(pairs, tuple) else pairs


class OneJob(JobRecord):
    """A job, and for what it waits."""

    model_config = _example(**_JOB, waits=None)

    waits: WaitsRecord | None = Field(description="null: it runs or has ended")


class JobPage(_Given):
    """Some of the jobs, the newest first. It may have fewer than `limit`, or none, and yet a `next`."""

    model_config = _example(items=[_JOB], next="MTgwMDA1NzU5ODI1MHxkYWls")

    items: list[JobRecord]
    next: str | None = Field(description="goes into `cursor` for what follows; null: there is nothing more")


class TransitionRecord(_Given):
    """One line of a history. Where both states are the same it is a note."""

    model_config = _example(**_TRANSITION)

    at: Instant = Field(validation_alias="at_ms")
    from_state: JobState | None
    to_state: JobState
    attempt: int
    worker: str
    reason: str
    detail: Params


class History(_Given):
    """Every transition of a job, from the first to the last."""

    model_config = _example(items=[_TRANSITION])

    items: list[TransitionRecord]


class DeadLetter(JobRecord):
    """A dead letter with its history."""

    model_config = _example(**{**_JOB, "state": "failed", "reason": "HTTP 500"}, history=[_TRANSITION])

    history: list[TransitionRecord]


_SUBMISSION = {"definition": "daily_user_report", "user": "u1", "params": {"format": "pdf"}, "countdown": 30, "priority": "high"}


class Submission(_Taken):
    """A job to be made. `params` go over those of the subscription, which go over those of the definition."""

    model_config = _example(**_SUBMISSION)

    definition: DefinitionId
    user: UserId
    params: Params | None = None
    countdown: float | None = Field(default=None, ge=0, le=MAX_DELAY.total_seconds(), description="seconds; excludes eta")
    eta: AwareDatetime | None = Field(default=None, description="not before this; a time in the past is now")
    priority: Priority | None = Field(default=None, description="default: the definition's")


class BatchItem(Submission):
    """One job of a batch."""

    model_config = _example(**_SUBMISSION, idempotency_key="report-2027-01")

    idempotency_key: str | None = Field(
        default=None, min_length=1, max_length=MAX_KEY_LENGTH, description="the same key for the same definition and user is the same job"
    )


class Batch(_Taken):
    """Jobs to be made, each on its own."""

    model_config = _example(
        items=[{**_SUBMISSION, "idempotency_key": "report-2027-01"}, {"definition": "daily_user_report", "user": "nobody"}]
    )

    items: list[BatchItem] = Field(min_length=1, max_length=MAX_BATCH)


class FieldFault(_Given):
    """What is wrong with one field or parameter."""

    pointer: str | None = Field(default=None, description="JSON pointer into the body")
    parameter: str | None = Field(default=None, description="of the path or the query")
    detail: str


class ProblemRecord(_Given):
    """Problem details (RFC 9457)."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"type": "about:blank", "title": "Not Found", "status": 404}]})

    type: str
    title: str
    status: int
    detail: str = ""
    kind: str | None = Field(default=None, description="which of the platform's errors it is, such as unknown_user, conflict")
    instance: str | None = Field(default=None, description="of a fault of the platform: under what its log has it")
    errors: list[FieldFault] = Field(default_factory=list)


_REFUSED = {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "no user 'nobody'"}


class BatchResult(_Given):
    """What became of one: the job, or the problem."""

    model_config = _example(status=201, job=_JOB, problem=None)

    status: int = Field(description="what a call for this job alone would have answered")
    job: JobRecord | None = None
    problem: ProblemRecord | None = None


class BatchResults(_Given):
    """What became of each, in the order of the batch."""

    model_config = _example(items=[{"status": 201, "job": _JOB, "problem": None}, {"status": 422, "job": None, "problem": _REFUSED}])

    items: list[BatchResult]


class NewPriority(_Taken):
    """The priority for a job that waits."""

    model_config = _example(priority="high")

    priority: Priority


# --- users and subscriptions -----------------------------------------------------------------------------------------

_USER = {"id": "u1", "name": "Ada", "created": "2027-01-01T09:00:00.000Z", "paused": False}
_SUBSCRIPTION = {
    "user": "u1",
    "definition": "daily_user_report",
    "enabled": True,
    "paused": False,
    "params": {"format": "pdf"},
    "schedule": {"interval": {"type": "daily", "timezone": "Europe/Berlin", "at_time": {"hour": 7, "minute": 30}}},
    "since": "2027-01-01T09:00:00.000Z",
}


class NewUser(_Taken):
    """A user to be created."""

    model_config = _example(id="u1", name="Ada")

    id: UserId
    name: str = Field(default="", max_length=200)


class UserRecord(_Given):
    """A user whose jobs run."""

    model_config = _example(**_USER)

    id: str
    name: str
    created: Instant = Field(validation_alias="created_ms")
    paused: bool


class UserPage(_Given):
    """Some of the users, in order of their ids."""

    model_config = _example(items=[_USER], next="dTE")

    items: list[UserRecord]
    next: str | None = Field(description="goes into `cursor` for what follows; null: there is nothing more")


class Deletion(_Given):
    """What went with a user."""

    model_config = _example(jobs_canceled=2, subscriptions_removed=1)

    jobs_canceled: int
    subscriptions_removed: int


class Unsubscription(_Given):
    """What went with a subscription."""

    model_config = _example(jobs_canceled=1)

    jobs_canceled: int


class SubscriptionRecord(_Given):
    """That a user wants a definition's jobs."""

    model_config = _example(**_SUBSCRIPTION)

    user: str
    definition: str
    enabled: bool
    paused: bool
    params: Params
    schedule: OwnSchedule | None = Field(description="an own one; null: the definition's")
    since: Instant = Field(validation_alias="since_ms", description="moments after it belong to the subscription as it is now")


class Subscriptions(_Given):
    """All of a user, in order of the definitions."""

    model_config = _example(items=[_SUBSCRIPTION])

    items: list[SubscriptionRecord]


class NewSubscription(_Taken):
    """What a subscription shall be, as a whole."""

    model_config = _example(
        enabled=True, params={"format": "pdf"}, schedule={"timezone": "Europe/Berlin", "at_time": {"hour": 7, "minute": 30}}
    )

    enabled: bool = True
    params: Params = Field(default_factory=dict)
    schedule: ScheduleOverride | None = Field(default=None, description="an own one; null: the definition's")


class SubscriptionChange(_Taken):
    """What shall change of a subscription; what is not given stays."""

    model_config = _example(enabled=False)

    enabled: bool = True
    params: Params = Field(default_factory=dict, description="instead of those that it has")
    schedule: ScheduleOverride | None = Field(default=None, description="an own one; null: the definition's again")


_ASKED = {"user": "u1", "definition": "daily_user_report", "params": {"format": "pdf"}}


class AskedSubscription(_Taken):
    """One subscription of a batch. What it names is looked at one by one, so that a fault in one holds back no other."""

    model_config = _example(**_ASKED)

    user: str = Field(max_length=200)
    definition: str = Field(max_length=200)
    enabled: bool = True
    params: Params | None = None
    schedule: Params | None = Field(default=None, description="an own one, as PUT takes it; null: the definition's")


class SubscriptionBatch(_Taken):
    """Subscriptions to be made, or set to just this, each on its own."""

    model_config = _example(items=[_ASKED], create_users=True)

    items: list[AskedSubscription] = Field(min_length=1, max_length=MAX_BATCH)
    create_users: bool = Field(default=False, description="create users that do not exist")


class SubscriptionResult(_Given):
    """What became of one."""

    model_config = _example(status=201, result="created", problem=None)

    status: int = Field(description="201 created, 200 changed or as it was, 422 not accepted")
    result: Literal["created", "changed", "unchanged"] | None = None
    problem: ProblemRecord | None = None


class SubscriptionResults(_Given):
    """What became of each, in the order of the batch."""

    model_config = _example(items=[{"status": 201, "result": "created", "problem": None}], users_created=1, warnings=[])

    items: list[SubscriptionResult]
    users_created: int
    warnings: list[str] = Field(default=[], description="what the many that came would spoil in the next 24 hours, by a forecast")


class SubscriberCount(_Given):
    """How many users are subscribed to a definition."""

    model_config = _example(subscribers=1200)

    subscribers: int


class SubscriberPage(_Given):
    """Some of the users that are subscribed to a definition."""

    model_config = _example(items=["u1", "u2"], next=None)

    items: list[str]
    next: str | None = Field(description="goes into `cursor` for what follows; null: there is nothing more")


# --- definitions -----------------------------------------------------------------------------------------------------

_DEFINITION = {
    "id": "daily_user_report",
    "name": "Daily user report",
    "description": "",
    "domain": "reports",
    "schedule": {"interval": {"type": "daily"}},
    "priority": "high",
    "timeout": "5m",
    "max_duration": None,
    "retries": 3,
    "backoff": {"strategy": "exponential", "base": "1s", "cap": "10m", "jitter": True},
    "rate_limit": {"rate": "10/s", "burst": 2},
    "concurrency": None,
    "window": "1m",
    "overlap": "allow",
    "param_names": ["format"],
    "target": "POST https://api.example.com/reports/{{user}}",
    "version": "0a1b2c3d",
    "paused": None,
}


class DefinitionRecord(_Given):
    """One static kind of task. Headers and body of its call and the values of its parameters are not shown: they may hold secrets."""

    model_config = _example(**_DEFINITION)

    id: str
    name: str
    description: str
    domain: str
    schedule: OwnSchedule
    priority: Priority
    timeout: Duration
    max_duration: Duration | None
    retries: int
    backoff: Backoff
    rate_limit: RateLimit | None
    concurrency: int | None
    window: Duration
    overlap: str
    param_names: list[str] = Field(description="of the parameters for which it has a default")
    target: str = Field(description="what it calls: method and URL without password and query, or the Python function")
    version: str = Field(description="a digest of its content, as this API has it")
    paused: str | None = Field(description="why; null: it is not")

    @classmethod
    def of(cls, definition: Definition, catalogue: Catalogue, pauses: Mapping[str, str]) -> DefinitionRecord:
        """With whether it is paused."""
        known = {name: getattr(definition, name) for name in cls.model_fields if hasattr(definition, name)}
        return cls(
            **known,
            domain=catalogue.domain(definition.id),
            param_names=sorted(definition.params),
            target=_target(definition),
            paused=pauses.get(definition.id),
        )


class Resumed(DefinitionRecord):
    """A definition whose pause ended."""

    model_config = _example(**_DEFINITION, warnings=[])

    warnings: list[str] = Field(
        default=[], description="what that spoils in the next 24 hours, by a forecast, where it has many subscribers"
    )


def _target(definition: Definition) -> str:
    if definition.config is None:
        return f"python {definition.call}"
    parts = urlsplit(definition.config.endpoint)
    place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return f"{definition.config.method} {place}"


class Definitions(_Given):
    """All definitions, in the order of their files."""

    model_config = _example(items=[_DEFINITION])

    items: list[DefinitionRecord]


class Pause(_Taken):
    """Why nothing of a definition shall run."""

    model_config = _example(why="the report API is down")

    why: str = Field(default="", max_length=500)


class Trigger(_Taken):
    """An extra occurrence."""

    model_config = _example(window="5m")

    window: Duration | None = Field(default=None, description="spread over so long; default: the definition's")
    idempotency_key: str | None = Field(
        default=None, min_length=1, max_length=MAX_KEY_LENGTH, description="the same key for the same definition is the same occurrence"
    )


class Triggered(_Given):
    """The extra occurrence."""

    model_config = _example(at="2027-01-16T12:00:00.000Z", subscribers=1200)

    at: Instant
    subscribers: int


_OCCURRENCE = {
    "id": "daily_user_report|1800057600000",
    "definition": "daily_user_report",
    "group": "daily_user_report",
    "at": "2027-01-16T00:00:00.000Z",
    "last": "2027-01-16T00:00:00.000Z",
    "begins": "2027-01-16T00:00:00.000Z",
    "window_ms": 60_000,
    "asked_ms": 60_000,
    "state": "planned",
    "source": "schedule",
    "reason": "",
    "planned": 1200,
    "paused": 3,
    "disabled": 1,
}


class OccurrenceRecord(_Given):
    """What became of one due time of a schedule."""

    model_config = _example(**_OCCURRENCE)

    id: str
    definition: str
    group: str
    at: Instant = Field(validation_alias="at_ms")
    last: Instant = Field(validation_alias="last_ms", description="later than `at` where a range was skipped as one")
    begins: Instant = Field(validation_alias="base_ms", description="when its window begins")
    window_ms: int = Field(description="over how many milliseconds it is spread")
    asked_ms: int = Field(description="over how many it would be without limits")
    state: str
    source: str
    reason: str
    planned: int = Field(description="jobs made so far")
    paused: int = Field(description="subscribers without a job because they or their subscription were paused")
    disabled: int = Field(description="subscribers without a job because their subscription was disabled")


class Occurrences(_Given):
    """Of a definition, the newest first."""

    model_config = _example(items=[_OCCURRENCE])

    items: list[OccurrenceRecord]


_CHANGE = {
    "at": "2027-01-16T12:00:00.000Z",
    "actor": "api:ops",
    "kind": "pause",
    "subject": "daily_user_report",
    "detail": "the API is down",
}


class ChangeRecord(_Given):
    """Who changed what."""

    model_config = _example(**_CHANGE)

    at: Instant = Field(validation_alias="at_ms")
    actor: str
    kind: str
    subject: str
    detail: str


class Changes(_Given):
    """The change log, the newest first."""

    model_config = _example(items=[_CHANGE])

    items: list[ChangeRecord]


# --- limits ----------------------------------------------------------------------------------------------------------

_RULE = {"rate": "10/s", "burst": 15, "concurrency": 4}
_LIMIT = {
    "name": "host:api.example.com",
    **_RULE,
    "source": "live",
    "configured": {"rate": "5/s", "burst": 2, "concurrency": None},
    "free": 12,
    "tokens": 12.5,
    "reserved": 1,
    "in_flight": 2,
    "held_until": None,
}


class NewLimit(_Taken):
    """A limit for all workers, at once; it replaces what was in force under its name."""

    model_config = _example(**_RULE)

    rate: str | None = Field(default=None, max_length=40, description=LimitRule.model_fields["rate"].description)
    burst: int | None = Field(default=None, ge=1, le=1_000_000, description="starts at once after a quiet time; goes with rate")
    concurrency: int | None = Field(default=None, ge=1, le=1_000_000, description="jobs that may run at a time")
    unlimited: Literal[True] | None = Field(default=None, description="no limit under this name, although one is configured; alone")


class Rule(_Given):
    """What a limit allows; null is no bound."""

    rate: str | None
    burst: int | None
    concurrency: int | None


class LimitRecord(Rule):
    """A limit in force, and how it stands."""

    model_config = _example(**_LIMIT)

    name: str
    source: str = Field(description="live, definition, settings, or breaker: a host that is held back and has no limit")
    configured: Rule | None = Field(description="what is in force again when a live one is removed")
    free: int | None = Field(description="starts that the rate allows at once")
    tokens: float | None = Field(description="the same as it is counted: below 0 where a limit was lowered")
    reserved: int = Field(description="released jobs that have a place in the rate and have not started")
    in_flight: int | None = Field(description="released and not ended; for `user`, of the user who has the most")
    held_until: Instant | None = Field(description="of a host whose jobs are held back: when it is probed, see /v1/breakers; else null")

    @classmethod
    def of(cls, state: LimitState) -> LimitRecord:
        """As the store has it."""
        configured = state.configured
        return cls(
            name=state.name,
            rate=None if state.limit.per_second is None else format_rate(state.limit.per_second),
            burst=state.limit.burst,
            concurrency=state.limit.concurrency,
            source=state.source,
            configured=None
            if configured is None
            else Rule(
                rate=None if configured.per_second is None else format_rate(configured.per_second),
                burst=configured.burst,
                concurrency=configured.concurrency,
            ),
            free=None if state.tokens is None else max(0, int(state.tokens)),
            tokens=state.tokens,
            reserved=state.reserved,
            in_flight=state.in_flight,
            held_until=state.held_until_ms,
        )


class Limits(_Given):
    """All that are in force, by name."""

    model_config = _example(items=[_LIMIT])

    items: list[LimitRecord]


# --- hosts -----------------------------------------------------------------------------------------------------------

_BREAKER = {
    "host": "api.example.com",
    "state": "open",
    "since": "2027-01-16T12:00:00.000Z",
    "until": "2027-01-16T12:00:30.000Z",
    "calls": 20,
    "failures": 12,
    "openings": 1,
    "passed": 0,
    "probe": "",
    "probed": None,
    "reason": "12 of 20 calls failed, the last: HTTP 503",
}


class Hold(_Taken):
    """A host's jobs wait."""

    model_config = _example(span="10m", reason="maintenance")

    span: Duration = Field(gt=timedelta(), le=MAX_DELAY, description=f"for so long, up to {MAX_DELAY.days} days")
    reason: str = Field(default="", max_length=500, description="for histories and change log")


class BreakerRecord(_Given):
    """A host, and whether its jobs are held back."""

    model_config = _example(**_BREAKER)

    host: str
    state: BreakerState = Field(
        description="closed: its jobs go; open: calls failed, or somebody said so; held: it asked for a pause; half_open: it is probed"
    )
    since: Instant | None = Field(validation_alias="since_ms", description="since when it is held back")
    until: Instant | None = Field(validation_alias="until_ms", description="when the first probe may go")
    calls: int = Field(description="counted since a failure of late, or those that opened it")
    failures: int = Field(description="how many of these failed")
    openings: int = Field(description="how often it opened since it was well")
    passed: int = Field(description="probes that went well")
    probe: str = Field(description="the job that probes it now")
    probed: Instant | None = Field(validation_alias="probed_ms", description="since when it does")
    reason: str = Field(description="why it is held back")


class HeldBack(_Given):
    """Why a job that is due waits."""

    model_config = _example(breaker=_BREAKER)

    breaker: BreakerRecord | None = Field(description="the host that is held back; null: no host holds it back")


class Breakers(_Given):
    """Hosts by name."""

    model_config = _example(items=[_BREAKER])

    items: list[BreakerRecord]


# --- log levels ------------------------------------------------------------------------------------------------------

_LOG_LEVEL = {"node": "worker", "level": "DEBUG", "until": "2027-01-16T12:10:00.000Z", "actor": "api:ops"}


class NewLogLevel(_Taken):
    """From which level on processes log, for a time."""

    model_config = _example(level="DEBUG", span="10m")

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]
    span: Duration = Field(
        default=LOG_LEVEL_SPAN,
        ge=timedelta(seconds=1),
        le=LONGEST_LOG_LEVEL,
        description=f"for so long, up to {format_duration(LONGEST_LOG_LEVEL)}",
    )


class LogLevelRecord(_Given):
    """What was set live."""

    model_config = _example(**_LOG_LEVEL)

    node: str = Field(description="a process, a node, a role, or * for all")
    level: str
    until: Instant
    actor: str = Field(description="who set it")


class LogLevels(_Given):
    """By whom they are for."""

    model_config = _example(items=[_LOG_LEVEL])

    items: list[LogLevelRecord]

    @classmethod
    def of(cls, levels: Mapping[str, LogLevel]) -> LogLevels:
        """As the store has them."""
        items = [LogLevelRecord(node=node, level=one.level, until=one.until_ms, actor=one.actor) for node, one in sorted(levels.items())]
        return cls(items=items)


# --- processes -------------------------------------------------------------------------------------------------------

_NODE = {
    "id": "celery@host#1a2b3c4d",
    "heartbeat": "2027-01-16T12:00:00.000Z",
    "silent_ms": 1200,
    "slots": 3,
    "queues": ["high", "medium", "low"],
    "running": ["daily_user_report:u1:1800057600000"],
    "drained": False,
    "info": {"host": "host", "pool": "celery.concurrency.prefork"},
}


class Node(_Given):
    """A worker as its last heartbeat describes it."""

    model_config = _example(**_NODE)

    id: str
    heartbeat: Instant
    silent_ms: int = Field(description="since its last heartbeat")
    slots: int = Field(description="jobs that it offers to run at a time; 0 while it stops or is drained")
    queues: list[str]
    running: list[str] = Field(description="ids of the jobs that it runs")
    drained: bool = Field(description="it takes nothing new until it is resumed")
    info: dict[str, str]

    @classmethod
    def of(cls, worker: Worker, now_ms: int) -> Node:
        """As it is seen at this instant."""
        return cls(
            id=worker.id,
            heartbeat=worker.heartbeat_ms,
            silent_ms=max(0, now_ms - worker.heartbeat_ms),
            slots=worker.slots,
            queues=list(worker.queues),
            running=list(worker.running),
            drained=worker.drained,
            info=dict(worker.info),
        )


class Nodes(_Given):
    """All workers, in order of their ids."""

    model_config = _example(items=[_NODE])

    items: list[Node]


_BEAT = {
    "id": "beat@host#4711",
    "leads": True,
    "catalogue": "0a1b2c3d",
    "number": 7,
    "since": "2027-01-16T09:00:00.000Z",
    "heartbeat": "2027-01-16T12:00:00.000Z",
    "info": {"version": "0.1.0", "celery": "5.7.0", "python": "3.11.7"},
}


class BeatRecord(_Given):
    """A beat as it last said that it lives."""

    model_config = _example(**_BEAT)

    id: str
    leads: bool
    catalogue: str = Field(description="a digest of what it would publish")
    number: int = Field(description="the later deployed, the higher")
    since: Instant = Field(validation_alias="since_ms")
    heartbeat: Instant = Field(validation_alias="heartbeat_ms")
    info: dict[str, str] = Field(description="what else it tells of itself: versions, settings, its clock")


class Beats(_Given):
    """Those that have not signed off."""

    model_config = _example(items=[_BEAT])

    items: list[BeatRecord]


# --- dead letters and garbage ----------------------------------------------------------------------------------------


class DeadFilter(_Taken):
    """Which dead letters: those that all filters fit, or with `all` every one; of them the newest `limit`."""

    model_config = _example(definition="daily_user_report", reason="poison pill", limit=1000)

    user: UserId | None = None
    definition: DefinitionId | None = None
    since: AwareDatetime | None = Field(default=None, description="those that died since")
    reason: str = Field(default="", max_length=500, description="those whose reason contains this")
    all: Literal[True] | None = Field(default=None, description="instead of any filter, so that none is forgotten")
    limit: int = Field(default=MOST_DEAD, ge=1, le=MOST_DEAD)
    cursor: str | None = Field(default=None, min_length=1, max_length=1000, description="`next` of the call before: go on after it")


class Redriven(_Given):
    """What became of dead letters."""

    model_config = _example(redriven=12, left=1, next=None)

    redriven: int
    left: int = Field(description="those whose definition was removed from the catalogue")
    next: str | None = Field(description="goes into `cursor` for the older ones; null: there is nothing more")


class Discarded(_Given):
    """What became of dead letters."""

    model_config = _example(discarded=12, next=None)

    discarded: int
    next: str | None = Field(description="goes into `cursor` for the older ones; null: there is nothing more")


_GARBAGE = {"at": "2027-01-16T12:00:00.000Z", "queue": "high", "reason": "is no JSON", "worker": "celery@host#1a2b3c4d", "text": "…"}


class GarbageRecord(_Given):
    """What came out of a queue and was no message."""

    model_config = _example(**_GARBAGE)

    at: Instant = Field(validation_alias="at_ms")
    queue: str
    reason: str
    worker: str
    text: str = Field(description="its beginning")


class GarbageList(_Given):
    """The newest first."""

    model_config = _example(items=[_GARBAGE])

    items: list[GarbageRecord]


class Forgotten(_Given):
    """How many were forgotten."""

    model_config = _example(forgotten=3)

    forgotten: int


# --- how it is -------------------------------------------------------------------------------------------------------


class ProblemOfPlatform(_Given):
    """One thing that is not as it should be."""

    code: str
    severity: Severity
    subject: str
    since: Instant | None = Field(validation_alias="since_ms")
    text: str


class HealthRecord(_Given):
    """What is wrong with the platform, if anything is."""

    model_config = _example(
        well=False,
        at="2027-01-16T12:00:00.000Z",
        problems=[{"code": "no_worker", "severity": "error", "subject": "", "since": None, "text": "No worker is alive: nothing runs."}],
        counters={"workers_lost": 1},
    )

    well: bool
    at: Instant = Field(validation_alias="at_ms")
    problems: list[ProblemOfPlatform] = Field(description="errors first")
    counters: dict[str, int]

    @classmethod
    def of(cls, health: Health) -> HealthRecord:
        """As `Platform.health` has it."""
        return cls.model_validate(health)


class Counts(_Given):
    """How much there is, and how often happened what should be rare."""

    model_config = _example(
        entered={"completed": 120_000, "failed": 12},
        waiting={"high": 0, "medium": 12, "low": 300},
        queued={"high": 0, "medium": 2, "low": 1},
        running=3,
        users=1200,
        counters={"workers_lost": 1},
    )

    entered: dict[str, int] = Field(description="how many jobs ever entered each state")
    waiting: dict[str, int] = Field(description="by priority; held ones are not counted")
    queued: dict[str, int] = Field(description="released and not started, by priority")
    running: int
    users: int
    counters: dict[str, int] = Field(description="since this Redis is used: lost workers, lost messages and the like")


class Alive(_Given):
    """This process lives."""

    model_config = _example(status="ok")

    status: Literal["ok"] = "ok"


class Readiness(_Given):
    """Whether the API can do its work."""

    model_config = _example(ready=True, redis=True, leader=True, workers=2)

    ready: bool = Field(description="Redis answers and a beat leads")
    redis: bool
    leader: bool | None = Field(description="null: not known")
    workers: int | None = Field(description="how many live; null: not known")
