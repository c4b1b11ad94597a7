"""Why a user's jobs ran or did not, and when the next ones come."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from fastapi import Query
from fastapi.responses import Response
from pydantic import AwareDatetime, Field, field_validator

from taskplatform.answers import MOST_ANSWERS, Outcome
from taskplatform.api.call import Reads
from taskplatform.api.people import DefinitionName, User
from taskplatform.api.records import _TRANSITION, Instant, TransitionRecord, _example, _Given
from taskplatform.api.routing import Routes

answers = Routes("answers")

At = Annotated[
    AwareDatetime | date | None,
    Query(description="the occurrence that this time belongs to; or a date: all of that day in the zone of the schedule"),
]
Number = Annotated[int, Query(ge=1, le=MOST_ANSWERS)]

_ANSWER = {
    "user": "u1",
    "definition": "daily_user_report",
    "occurrence": "2027-01-16T00:00:00.000Z",
    "moment": "2027-01-16T00:00:03.250Z",
    "outcome": "skipped",
    "reason": "definition daily_user_report was paused by anna at 2027-01-15 23:50:00 UTC (the API is down) when it came due",
    "job_id": None,
    "history": [_TRANSITION],
    "facts": {"occurrence": "2027-01-16 00:00:00 UTC"},
    "mend": "taskplatform resume daily_user_report",
}
_MOMENT = {
    "user": "u1",
    "definition": "daily_user_report",
    "occurrence": "2027-01-17T08:00:00.000Z",
    "moment": "2027-01-17T08:00:31.406Z",
    "timezone": "Europe/Berlin",
    "local": "2027-01-17T09:00:31.406+01:00",
    "slot": 0.5234,
    "window_ms": 60_000,
    "certain": True,
    "note": "",
}


class AnswerRecord(_Given):
    """What became of one occurrence for one user, and why."""

    model_config = _example(**_ANSWER)

    user: str
    definition: str
    occurrence: Instant = Field(validation_alias="occurrence_ms")
    moment: Instant | None = Field(validation_alias="moment_ms", description="when its job was to run; null: nobody knows any more")
    outcome: Outcome
    reason: str = Field(description="one sentence, with who and since when")
    job_id: str | None = Field(description="null: there is no record of a job")
    history: list[TransitionRecord]
    facts: dict[str, str] = Field(description="more, by name: for which limit it waits, behind how many")
    mend: str = Field(description="a command that helps; empty where nothing needs to be mended")

    @field_validator("facts", mode="before")
    @classmethod
    def _by_name(cls, pairs: object) -> object:
        return dict(pairs) if isinstance(pairs, tuple) else pairs


class Answers(_Given):
    """What became of occurrences, the newest first."""

    model_config = _example(items=[_ANSWER])

    items: list[AnswerRecord]


class MomentRecord(_Given):
    """When a job will be made for a user."""

    model_config = _example(**_MOMENT)

    user: str
    definition: str
    occurrence: Instant = Field(validation_alias="occurrence_ms")
    moment: Instant = Field(validation_alias="moment_ms")
    timezone: str = Field(description="of the schedule")
    local: str = Field(description="the moment in that zone")
    slot: float = Field(description="the user's fixed place in the window, from 0 to 1")
    window_ms: int
    certain: bool = Field(description="nothing but a change by somebody can move it")
    note: str = Field(description="what may move it, or what is unusual about it")


class Moments(_Given):
    """The next moments of a user, in their order."""

    model_config = _example(items=[_MOMENT], none={"weekly_analytics": "user u1 was paused by anna at 2027-01-15 23:50:00 UTC"})

    items: list[MomentRecord]
    none: dict[str, str] = Field(description="by definition, why nothing comes of it")


@answers("GET", "/users/{user}/subscriptions/{definition}/why", Answers, faults=(404,))
def tell_why(call: Reads, user: User, definition: DefinitionName, at: At = None, last: Number = 1) -> Response:
    """Tell what became of a user's last occurrences of a definition, or of one, and why.

    Completed, waiting and for what, skipped and by whom, missed and since when no planner ran: each with a sentence that says so. With
    `at`, `last` does not count.
    """
    found = call.platform.why(user, definition, at=at, last=last)
    return call.answer(Answers(items=[AnswerRecord.model_validate(one) for one in found]))


@answers("GET", "/users/{user}/next", Moments, faults=(404,))
def tell_next(
    call: Reads,
    user: User,
    definition: Annotated[str | None, Query(max_length=100, description="only of this definition")] = None,
    count: Number = 1,
) -> Response:
    """Tell when a user's next jobs will be made: so many of each definition."""
    found = call.platform.coming(user, definition, count=count)
    return call.answer(Moments(items=[MomentRecord.model_validate(one) for one in found.moments], none=dict(found.none)))
