"""Backfills: what a definition was due for, run afterwards."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Path
from fastapi.responses import Response
from pydantic import AwareDatetime, Field

from taskplatform.api.call import Administers, Call, Reads, in_body
from taskplatform.api.records import DefinitionId, Instant, UserId, _example, _Given, _Taken
from taskplatform.api.routing import PageSize, Routes
from taskplatform.backfill import DEFAULT_RATE
from taskplatform.errors import UnknownDefinition, UnknownUser
from taskplatform.model import format_rate
from taskplatform.store import Backfill, BackfillState

backfills = Routes("backfills")

#: Users that one call may name.
MOST_USERS = 10_000
#: So long one call counts for a dry run.
_BUDGET = timedelta(seconds=2)

BackfillId = Annotated[str, Path(max_length=100, description="the backfill's id", examples=["3f9c0a51e2"])]

_ASKED = {"definition": "daily_user_report", "since": "2027-01-08T00:00:00Z", "until": "2027-01-15T00:00:00Z", "rate": "5/s"}
_BACKFILL = {
    "id": "3f9c0a51e2",
    "definition": "daily_user_report",
    "state": "running",
    "reason": "",
    "actor": "api:ci",
    "since": "2027-01-08T00:00:00.000Z",
    "until": "2027-01-15T00:00:00.000Z",
    "rate": "5/s",
    "begun": "2027-01-16T09:00:00.000Z",
    "ended": None,
    "at": "2027-01-10T00:00:00.000Z",
    "users": None,
    "unsubscribed": 0,
    "occurrences": 7,
    "passed": 2,
    "left": 0,
    "forgotten": 0,
    "total": 8400,
    "made": 1900,
    "existing": 600,
    "paused": 21,
    "disabled": 3,
    "overlapping": 0,
    "unfinished": 24,
    "completed": 1870,
    "failed": 5,
    "timed_out": 1,
    "rejected": 0,
    "canceled": 0,
}


class NewBackfill(_Taken):
    """What is to be run afterwards."""

    model_config = _example(**_ASKED)

    definition: DefinitionId
    since: AwareDatetime = Field(description="occurrences from then on")
    until: AwareDatetime | None = Field(default=None, description="and before that; default: now")
    users: list[UserId] | None = Field(
        default=None, min_length=1, max_length=MOST_USERS, description="only these, as far as they are subscribed; default: all subscribers"
    )
    rate: str = Field(default=DEFAULT_RATE, max_length=50, description="jobs that are made at the most, such as 5/s or 100/m")
    beyond_retention: bool = Field(default=False, description="also what is so long ago that nobody knows any more whether it ran")


class BackfillQuestion(NewBackfill):
    """The same, to be counted only."""

    model_config = _example(**_ASKED)

    cursor: str | None = Field(default=None, min_length=1, max_length=1000, description="`next` of the call before: go on after it")


class BackfillRecord(_Given):
    """A backfill, and how far it is. An occurrence is a due time of one schedule, for all users who have that."""

    model_config = _example(**_BACKFILL)

    id: str = Field(description="empty for a dry run")
    definition: str
    state: BackfillState
    reason: str = Field(description="why it is so, or what it waits for")
    actor: str
    since: Instant = Field(validation_alias="since_ms")
    until: Instant = Field(validation_alias="until_ms")
    rate: str
    begun: Instant = Field(validation_alias="begun_ms")
    ended: Instant | None = Field(validation_alias="ended_ms")
    at: Instant | None = Field(validation_alias="at_ms", description="the occurrence that it is at")
    users: int | None = Field(description="how many were given; null: all subscribers")
    unsubscribed: int = Field(description="how many of those are not subscribed")
    occurrences: int = Field(description="how many there were when it began")
    passed: int = Field(description="how many of them it has passed")
    left: int = Field(description="left to the planner, which still plans them")
    forgotten: int = Field(description="left out: they became older than the retention")
    total: int = Field(description="how many jobs could be made at the most, when it began")
    made: int = Field(description="jobs")
    existing: int = Field(description="not made, because they exist")
    paused: int = Field(description="left out, because user or subscription are paused")
    disabled: int = Field(description="left out, because the subscription is disabled")
    overlapping: int = Field(description="left out, because the user's earlier job did not end in time")
    unfinished: int = Field(description="jobs that it made and that wait or run")
    completed: int
    failed: int
    timed_out: int
    rejected: int
    canceled: int


class BackfillCount(_Given):
    """What a backfill would make, or a part of that."""

    model_config = _example(counted={**_BACKFILL, "id": "", "state": "dry run"}, next=None)

    counted: BackfillRecord
    next: str | None = Field(description="goes into `cursor` for the rest, whose numbers add to these; null: that was all")


class Backfills(_Given):
    """The newest first."""

    model_config = _example(items=[_BACKFILL])

    items: list[BackfillRecord]


def _record(one: Backfill) -> BackfillRecord:
    fields: dict[str, Any] = {name: getattr(one, name) for name in one.__dataclass_fields__}
    return BackfillRecord.model_validate({**fields, "rate": format_rate(one.per_second)})


@backfills("GET", "/backfills", Backfills)
def list_backfills(call: Reads, limit: PageSize = 100) -> Response:
    """List backfills and how far they are, the newest first."""
    return call.answer(Backfills(items=[_record(one) for one in call.platform.backfills(limit=limit)]))


@backfills("POST", "/backfills", BackfillRecord, takes=NewBackfill, status=201)
def begin_backfill(call: Administers) -> Response:
    """Run what a definition was due for between two instants, once for each subscriber, at low priority and under a rate."""
    body = call.read(NewBackfill)
    _note(call, body)

    def act() -> Response:
        with in_body(definition=UnknownDefinition, users=UnknownUser):
            made = call.platform.backfill(
                body.definition,
                since=body.since,
                until=body.until,
                users=body.users,
                rate=body.rate,
                beyond_retention=body.beyond_retention,
                idempotency_key=call.key_for_platform,
            )
        call.note(backfill=made.id)
        return call.answer(_record(made), 201, headers={"Location": f"/v1/backfills/{made.id}"})

    return call.once(act)


@backfills("POST", "/backfills/count", BackfillCount, takes=BackfillQuestion)
def count_backfill(call: Reads) -> Response:
    """Count what a backfill would make, for a few seconds; the next call goes on. Nothing is written."""
    body = call.read(BackfillQuestion)
    _note(call, body)
    with in_body(definition=UnknownDefinition, users=UnknownUser):
        counted, rest = call.platform.count_backfill(
            body.definition,
            since=body.since,
            until=body.until,
            users=body.users,
            rate=body.rate,
            beyond_retention=body.beyond_retention,
            cursor=body.cursor,
            budget=_BUDGET,
        )
    return call.answer(BackfillCount(counted=_record(counted), next=rest))


@backfills("GET", "/backfills/{backfill}", BackfillRecord, faults=(404,))
def get_backfill(call: Reads, backfill: BackfillId) -> Response:
    """Get a backfill, and how far it is."""
    return _one(call, backfill)


@backfills("POST", "/backfills/{backfill}/cancel", BackfillRecord, faults=(404,))
def cancel_backfill(call: Administers, backfill: BackfillId) -> Response:
    """Make nothing more of it, and cancel what waits. What runs goes on."""

    def act() -> Response:
        return call.answer(_record(call.platform.cancel_backfill(backfill)))

    return call.once(act)


@backfills("POST", "/backfills/{backfill}/pause", BackfillRecord, faults=(404,))
def pause_backfill(call: Administers, backfill: BackfillId) -> Response:
    """Make nothing more of it until it is resumed. What was made goes on."""
    return _change(call, backfill, call.platform.pause_backfill)


@backfills("POST", "/backfills/{backfill}/resume", BackfillRecord, faults=(404,))
def resume_backfill(call: Administers, backfill: BackfillId) -> Response:
    """Let a paused one go on."""
    return _change(call, backfill, call.platform.resume_backfill)


def _change(call: Call, backfill: str, change: Callable[[str], bool]) -> Response:
    def act() -> Response:
        changed = change(backfill)
        return call.changed(_one(call, backfill), changed)

    return call.once(act)


def _one(call: Call, backfill: str) -> Response:
    return call.answer(_record(call.platform.backfill_status(backfill)))


def _note(call: Call, body: NewBackfill) -> None:
    users = None if body.users is None else len(body.users)
    call.note(definition=body.definition, since=body.since.isoformat(), until=body.until and body.until.isoformat(), users=users)
