"""What the store's verbs take and give, and how it is read from what Redis holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum, IntEnum, StrEnum, auto
from typing import Any, Generic, TypeVar

from taskplatform.model import BreakerRule, Job, JobState, Limit, Priority, Schedule, Transition

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PublishedDefinition:
    """What the scripts must know of a definition."""

    id: str
    schedule: Schedule
    priority: Priority
    overlap: str
    message: str
    """The Celery message with @@ID@@, @@USER@@, @@DELIVERY@@, @@RETRIES@@ and @@QUEUE@@ to be filled in."""
    window: timedelta
    limit: Limit = field(default_factory=Limit)
    version: str = ""
    """Of the definition, see `Definition.version`."""
    host: str | None = None
    """The host that its jobs call; "" where they call none, None where it is not known here."""
    timeout: timedelta | None = None
    """Hard limit of one attempt."""


class SubscribeResult(IntEnum):
    UNCHANGED = 0
    CREATED = 1
    CHANGED = 2
    UNKNOWN_USER = -1
    UNKNOWN_DEFINITION = -2


@dataclass(frozen=True, slots=True)
class Subscribe:
    """One subscription to be made or changed. None keeps what is; for a new one it means the default."""

    user: str
    definition: str
    schedule: Schedule | None = None
    own_schedule: bool | None = False
    """True: `schedule`; False: the definition's; None: keep."""
    params: Mapping[str, Any] | None = None
    enabled: bool | None = None


@dataclass(frozen=True, slots=True)
class Enqueue:
    """One job to be made by hand."""

    id: str
    priority: Priority | None = None
    execute_after_ms: int | None = None
    delay_ms: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    source: str = "api"


@dataclass(frozen=True, slots=True)
class DueItem:
    """What the planner must look at: a group (`gid`) or an open occurrence (`oid`)."""

    kind: str
    id: str
    due_ms: int


@dataclass(frozen=True, slots=True)
class Group:
    """The subscribers of a definition with one effective schedule."""

    id: str
    definition: str
    schedule: Schedule
    cursor_ms: int
    """All occurrences up to here are opened or skipped."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What becomes of an occurrence that came due; `last_ms` ends a range that is skipped as one."""

    at_ms: int
    source: str
    reason: str
    last_ms: int | None = None
    window_ms: int | None = None
    """Its window, where limits need another than the definition's."""
    delay_ms: int = 0
    """How much later its window begins than it would without limits."""


@dataclass(frozen=True, slots=True)
class Commitment:
    """Jobs that come evenly from `start_ms` to `end_ms`, or wait already where these are equal."""

    definition: str
    priority: Priority | None
    """None: the definition's."""
    start_ms: int
    end_ms: int
    jobs: float


@dataclass(frozen=True, slots=True)
class Occurrence:
    """An occurrence that was opened or skipped."""

    id: str
    definition: str
    group: str
    at_ms: int
    last_ms: int
    base_ms: int
    """Where its window begins: its time, or later when it was caught up or limits were taken until then."""
    window_ms: int
    asked_ms: int
    """The window that it would have had without limits."""
    state: str
    source: str
    reason: str
    planned: int
    """Jobs made so far."""
    paused: int
    """Subscribers without a job because they or their subscription were paused."""
    disabled: int
    """Subscribers without a job because their subscription was disabled."""


@dataclass(frozen=True, slots=True)
class Start:
    """The answer to `start`: `go` with what the run needs, or the reason why not."""

    go: bool
    refusal: str = ""
    attempt: int = 0
    losses: int = 0
    execute_after_ms: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    failures: int = 0
    """Attempts of this budget that ended in a failure before this one."""
    now_ms: int = 0
    """The server's time."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A run that a worker shall stop, if it can."""

    job_id: str
    delivery: int
    why: str
    """Why its result does not count any more; "" where the job was canceled."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker shall do, as its heartbeat is told."""

    stops: tuple[Stop, ...] = ()
    drained: bool = False
    """Take nothing new; go on with what it has."""


class Renewal(Enum):
    """Whether a run that was held up may still make its call."""

    IN_TIME = auto()
    """If it does within the slack from when it asked."""
    ANY_TIME = auto()
    """No rate binds it."""
    NEVER = auto()
    """It has ended, or was given back."""


class DeadLetterResult(Enum):
    """What became of a dead letter that was to be redriven or discarded."""

    DONE = auto()
    """Now, or by an earlier call."""
    GONE = auto()
    """There is no such job any more."""
    NOT_DEAD = auto()
    """It is no dead letter, and stays as it is."""
    REMOVED = auto()
    """Its definition was removed from the catalogue: it stays a dead letter."""


@dataclass(frozen=True, slots=True)
class LimitState:
    """A limit and how it stands."""

    name: str
    """total, definition:<id>, host:<host>, user or user:<id>."""
    limit: Limit
    """In force."""
    configured: Limit | None
    """By settings or definition; what is in force again when the live one is reset."""
    live: bool
    """Whether it was set by API or command line."""
    tokens: float | None
    """How many may start now; below 0 when a limit was lowered. None: no rate."""
    reserved: int
    """Released jobs that have a token and have not started."""
    in_flight: int | None
    """Released and not ended. None: no concurrency limit."""
    held_until_ms: int | None = None
    """Until when a host is held back, whatever its limit. A host that is held back and has no limit has a state all the same."""

    @property
    def source(self) -> str:
        """What it comes from: live, definition, settings, or breaker where a host is held back and has no limit."""
        if self.live:
            return "live"
        if self.configured is None:
            return "breaker"
        return "definition" if self.name.startswith("definition:") else "settings"


class BreakerState(StrEnum):
    """Whether the jobs of a host may go."""

    CLOSED = "closed"
    """They may."""
    OPEN = "open"
    """Too many calls failed, or somebody said so: they wait."""
    HELD = "held"
    """The host asked for a pause: they wait."""
    HALF_OPEN = "half_open"
    """The time is over: one at a time probes the host."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """A host, and whether its jobs are held back."""

    host: str
    state: BreakerState
    since_ms: int | None = None
    """Since when it is held back, probes included. None: it is not."""
    until_ms: int | None = None
    """When the first probe may go. It has passed where it is half open."""
    calls: int = 0
    """Where it is closed, those counted in the window, which begins with a failure; else those of the window in which it opened."""
    failures: int = 0
    """How many of these failed."""
    openings: int = 0
    """How often it opened since it was well."""
    passed: int = 0
    """Probes that went well since it is half open."""
    probe: str = ""
    """The job that probes the host now."""
    probed_ms: int | None = None
    """Since when it does: when it was released or started for that. None: no job does."""
    reason: str = ""
    """Why it is held back."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process as its heartbeat describes it."""

    id: str
    heartbeat_ms: int
    slots: int
    queues: tuple[str, ...]
    running: tuple[str, ...]
    info: Mapping[str, str]
    drained: bool = False
    """It was told to take nothing new; then it offers no slots."""


class Newer(IntEnum):
    """Whether another beat would publish something newer than this one."""

    NONE = 0
    WAS = 1
    """There was one not long ago, or one has just started."""
    LIVES = 2
    """And it lives, and has for a while."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A beat as it last said that it lives."""

    id: str
    leads: bool
    catalogue: str
    """A digest of what it would publish: its catalogue, and the settings that the scripts follow."""
    number: int
    """The later deployed, the higher."""
    since_ms: int
    heartbeat_ms: int
    info: Mapping[str, str] = field(default_factory=dict)
    """What else it tells of itself."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """What came out of a broker queue, and no worker could take."""

    at_ms: int
    queue: str
    reason: str
    worker: str
    """Who took it out of the queue."""
    text: str
    """Its beginning. Bytes that are not UTF-8 are escaped."""


@dataclass(frozen=True, slots=True)
class QueueVitals:
    """How the jobs of a priority get to their queue."""

    oldest_ready_ms: int | None
    """When the first job that may be released is due; it may be in the future. None: none waits, or all that do are held back."""
    released: int
    """Jobs that are released and not started."""
    oldest_released_ms: int | None
    messages: int
    """What lies in the broker's queue, whatever it is."""
    has_room: bool
    """Whether another job may be released."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What health is judged by, read at once."""

    now_ms: int
    server: Mapping[str, str]
    """What INFO says."""
    planner: Mapping[str, str]
    oldest_due_ms: int | None
    """When the planner should have looked at the first thing that it has to; it may be in the future."""
    workers: tuple[Worker, ...]
    """Without what they run."""
    running_on: Mapping[str, int]
    """How many jobs each worker runs."""
    queues: Mapping[Priority, QueueVitals]
    total_has_room: bool
    """Whether the limit of all jobs lets one start."""
    running: int
    oldest_runs: tuple[tuple[str, int], ...]
    """(job, when it started), the oldest of those that run."""
    timeouts_ms: Mapping[str, int]
    """Of the published definitions."""
    paused: Mapping[str, str]
    """Definitions that are paused, and why."""
    dead_letters: int
    counters: Mapping[str, int]
    breakers: tuple[Breaker, ...] = ()
    """Of the hosts that are held back."""


@dataclass(frozen=True, slots=True)
class Change:
    """An entry of the change log."""

    at_ms: int
    actor: str
    kind: str
    subject: str
    detail: str


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a listing, and the cursor for the next (None: there is none)."""

    items: tuple[T, ...]
    cursor: str | None


# --- from Redis ------------------------------------------------------------------------------------------------------


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many at a time; the last of them may be fewer."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def read_due_item(member: str, score: float) -> DueItem:
    kind, _, name = member.partition("|")
    return DueItem("group" if kind == "g" else "occurrence", name, int(score))


_CREATED_BY = {"schedule": "planned", "catch_up": "planned to catch up", "trigger": "planned by a trigger", "api": "submitted"}


def read_creation(made_ms: int, source: str) -> Transition:
    """The first line of a history, which the record stands for."""
    return Transition(made_ms, None, JobState.PENDING, 0, "", _CREATED_BY[source])


def read_transition(row: str) -> Transition:
    at_ms, origin, target, attempt, worker, reason, *detail = json.loads(row)
    return Transition(
        at_ms=at_ms,
        from_state=JobState(origin) if origin else None,
        to_state=JobState(target),
        attempt=attempt,
        worker=worker,
        reason=reason,
        detail=detail[0] if detail else {},
    )


def read_packed(record: str) -> dict[str, str]:
    """The fields of a planned job that waits, as its own record will have them."""
    priority, after, _, made, source = record.split(" ")
    return {"state": JobState.PENDING.value, "priority": priority, "after": after, "made": made, "source": source}


def read_job(job_id: str, fields: Mapping[str, str], last: str | None) -> Job:
    definition, user, suffix = job_id.split(":", 2)
    planned = fields["source"] != "api"
    return Job(
        id=job_id,
        definition=definition,
        user=user,
        state=JobState(fields["state"]),
        priority=Priority(fields["priority"]),
        execute_after_ms=int(fields["after"]),
        created_ms=int(fields["made"]),
        occurrence_ms=int(suffix.removeprefix("t")) if planned else None,
        attempt=int(fields.get("attempt", 0)),
        failures=max(0, int(fields.get("attempt", 0)) - 1 - int(fields.get("budget", 0))),
        delivery=int(fields.get("delivery", 0)),
        params=json.loads(fields.get("params", "{}")),
        worker=fields.get("worker", ""),
        started_ms=int(fields["started"]) if "started" in fields else None,
        finished_ms=int(fields["finished"]) if "finished" in fields else None,
        reason=fields.get("died") or (read_transition(last).reason if last else _CREATED_BY[fields["source"]]),
        source=fields["source"],
        version=fields.get("version", ""),
    )


def read_occurrence(oid: str, fields: Mapping[str, str]) -> Occurrence:
    return Occurrence(
        id=oid,
        definition=fields["definition"],
        group=fields["group"],
        at_ms=int(fields["at"]),
        last_ms=int(fields["last"]),
        base_ms=int(fields["base"]),
        window_ms=int(fields["window"]),
        asked_ms=int(fields.get("asked", fields["window"])),
        state=fields["state"],
        source=fields["source"],
        reason=fields["reason"],
        planned=int(fields.get("planned", 0)),
        paused=int(fields.get("paused", 0)),
        disabled=int(fields.get("disabled", 0)),
    )


def write_limit(limit: Limit) -> str:
    """As the scripts read it."""
    rate = "-" if limit.per_second is None else repr(float(limit.per_second))
    burst = "-" if limit.per_second is None else str(limit.burst or 1)
    return f"{rate} {burst} {'-' if limit.concurrency is None else limit.concurrency}"


def write_rule(rule: BreakerRule) -> str:
    """As the scripts read it."""
    window, pause = (max(1, round(span / timedelta(milliseconds=1))) for span in (rule.window, rule.pause))
    return f"{rule.share!r} {rule.calls} {window} {pause}"


def read_breaker(host: str, record: str, now_ms: int) -> Breaker:
    """Of a host that is held back."""
    fields = json.loads(record)
    # by a clock that was set back, it is held back for the span that it was to be, from now on
    until_ms = int(fields["ends"]) - max(0, int(fields["set"]) - now_ms)
    return Breaker(
        host=host,
        state=BreakerState.HALF_OPEN if until_ms <= now_ms else BreakerState(fields["kind"]),
        since_ms=int(fields["since"]),
        until_ms=until_ms,
        calls=int(fields["calls"]),
        failures=int(fields["failures"]),
        openings=int(fields["openings"]),
        passed=int(fields["passed"]),
        probe=fields["probe"].rpartition("#")[0],
        probed_ms=int(fields["probed"]) if fields["probe"] else None,
        reason=fields["why"],
    )


def read_calls(host: str, counted: str | None) -> Breaker:
    """Of a host that is not."""
    _, _, calls, failures, calls_before, failures_before = map(int, (counted or "0 0 0 0 0 0").split(" "))
    return Breaker(host, BreakerState.CLOSED, calls=calls + calls_before, failures=failures + failures_before)


def read_counts(raw: Mapping[str, str]) -> dict[JobState, int]:
    """How many jobs ever entered each state. The script that starts a job takes it through assigned, and counts that once."""
    return {state: int(raw.get(JobState.RUNNING if state is JobState.ASSIGNED else state, 0)) for state in JobState}


def read_limit(text: str) -> Limit:
    """The reverse of `write_limit`."""
    rate, burst, concurrency = (None if part == "-" else float(part) for part in text.split())
    return Limit(rate, None if burst is None else int(burst), None if concurrency is None else int(concurrency))


def read_commitment(oid: str, committed: str, *, now_ms: int, next_ms: float | None, patience_ms: int) -> Commitment:
    """What is still to come of an open occurrence.

    `next_ms`: the moment of the next subscriber without a job, if one is left. Where that passed longer ago than `patience_ms`, because
    no planner was there, what is left will be spread from now on.
    """
    start, window, jobs = map(int, committed.split())
    late = 0.0 if next_ms is None or next_ms >= now_ms - patience_ms else now_ms - next_ms
    definition = oid.partition("|")[0].partition("~")[0]
    return commitment_of(definition, start, window, jobs, now_ms=now_ms, late_ms=late)


def commitment_of(definition: str, start_ms: int, window_ms: int, jobs: int, *, now_ms: int, late_ms: float = 0.0) -> Commitment:
    """What is still to come of `jobs` that come evenly over a window, of which what is left begins `late_ms` later than it should."""
    end = start_ms + window_ms
    left_from = max(start_ms, now_ms - late_ms)
    left = jobs * max(0.0, end - left_from) / window_ms if window_ms else jobs * (start_ms >= left_from)
    begin = round(left_from + late_ms)
    return Commitment(definition, None, begin, max(begin, round(end + late_ms)), left)


def read_beat(name: str, line: str, told: str | None = None) -> Beat:
    catalogue, number, seen, leads, since = line.split(" ")
    return Beat(name, leads == "1", catalogue, int(number), int(since), int(seen), json.loads(told) if told else {})


def read_worker(name: str, beat: int, fields: Mapping[str, str], jobs: Iterable[str]) -> Worker:
    known = ("slots", "queues", "buffer", "drained")
    return Worker(
        id=name,
        heartbeat_ms=beat,
        slots=int(fields.get("slots", 0)),
        queues=tuple(fields.get("queues", "").split(",")) if fields.get("queues") else (),
        running=tuple(sorted(jobs)),
        info={name: value for name, value in fields.items() if name not in known},
        drained=fields.get("drained") == "1",
    )


def read_queues(capacity: Mapping[str, str], rows: Mapping[Priority, Sequence[Any]]) -> dict[Priority, QueueVitals]:
    """By priority from its lanes' first, how many are released, the first of those, and how many messages lie in its queue.

    Whether there is room is decided as by the release in lib.lua.
    """
    found: dict[Priority, QueueVitals] = {}
    for priority, (ready, released, oldest, messages) in rows.items():
        before = sum(one.released * float(capacity.get(f"{higher}>{priority}", 0)) for higher, one in found.items())
        found[priority] = QueueVitals(
            oldest_ready_ms=int(ready[0][1]) if ready else None,
            released=released,
            oldest_released_ms=int(oldest[0][1]) if oldest else None,
            messages=messages,
            has_room=before + released < float(capacity.get(priority, 0)),
        )
    return found
