"""What an answer is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from zoneinfo import ZoneInfo

from taskplatform.model import Transition


class Outcome(StrEnum):
    """What became of an occurrence, for one user."""

    COMPLETED = "completed"
    RUNNING = "running"
    WAITING = "waiting"
    """Its job waits, or is still to be made though its moment has come."""
    SKIPPED = "skipped"
    """On purpose: somebody paused, disabled or changed something."""
    MISSED = "missed"
    """Nobody planned it in time."""
    REJECTED = "rejected"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    DEAD = "dead"
    """It took its workers down, and is not run any more."""
    CANCELED = "canceled"
    COMING = "coming"
    """Its moment has not come."""
    NOT_SUBSCRIBED = "not_subscribed"
    DISCARDED = "discarded"
    """It ended badly, and its record was forgotten before its time."""
    FORGOTTEN = "forgotten"
    """It is older than the retention."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one occurrence for one user, and why."""

    user: str
    definition: str
    occurrence_ms: int
    moment_ms: int | None
    """When its job was to run; None where nobody knows its window any more."""
    outcome: Outcome
    reason: str
    """One sentence, with who and since when."""
    job_id: str | None = None
    """Of its job, where there is a record."""
    history: tuple[Transition, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """More, by name: for which limit it waits, behind how many."""
    mend: str = ""
    """A command that helps; empty where nothing needs to be mended."""


@dataclass(frozen=True, slots=True)
class Waits:
    """For what a job waits: of its `Answer` what is not the job's own record."""

    reason: str
    """One sentence, with who and since when."""
    mend: str = ""
    """A command that helps; empty where nothing needs to be mended."""
    facts: tuple[tuple[str, str], ...] = ()
    """More, by name: its limits, behind how many."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When a job will be made for a user."""

    user: str
    definition: str
    occurrence_ms: int
    moment_ms: int
    timezone: str
    """Of the schedule."""
    local: str
    """The moment in that zone, ISO 8601."""
    slot: float
    """The user's fixed place in the window, in [0, 1)."""
    window_ms: int
    certain: bool
    """Whether nothing but a change by somebody can move it."""
    note: str = ""
    """What may move it, or what is unusual about it."""


@dataclass(frozen=True, slots=True)
class Coming:
    """The next moments of a user, and of which definitions there are none, and why."""

    moments: tuple[Moment, ...] = ()
    none: Mapping[str, str] = field(default_factory=dict)
    """By definition, why nothing comes of it."""


_LAST_MS = datetime.max.replace(tzinfo=UTC).timestamp() * 1000


def instant(at_ms: float) -> str:
    """An instant as sentences have it: UTC, to the second, or to the millisecond where that says more.

    A rate may be so low that its next token comes when dates have ended.
    """
    if at_ms > _LAST_MS:
        return "after the year 9999"
    seconds, milliseconds = divmod(round(at_ms), 1000)
    shown = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    return f"{shown}.{milliseconds:03} UTC" if milliseconds else f"{shown} UTC"


def local(at_ms: int, zone: str) -> str:
    """An instant on the wall clock of a zone, ISO 8601 with milliseconds and the offset."""
    seconds, milliseconds = divmod(at_ms, 1000)
    found = datetime.fromtimestamp(seconds, ZoneInfo(zone)).replace(microsecond=milliseconds * 1000)
    return found.isoformat(timespec="milliseconds")
