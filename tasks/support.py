"""The clock of a support promise, which runs only in business hours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from tasks.inputs import Inputs, due_at

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_LONGEST_SEARCH = timedelta(days=3660)


def sla_clock(job: RunningJob) -> dict[str, object]:
    """Business time that a ticket has used at the job's instant, and when its target is reached.

    Parameters: `opened_at` (instant with offset), `target_minutes`, `timezone`, `opens` and `closes` (times of day),
    `workdays` (names of weekdays). Time is real time: a day on which the clock changes inside the hours is longer or shorter.
    """
    given = Inputs(job.params)
    hours = _read_hours(given)
    opened = given.instant("opened_at").astimezone(UTC)
    target = timedelta(minutes=given.integer("target_minutes", minimum=1, maximum=100_000))
    due = _moment_reached(hours.spans(opened, opened + _LONGEST_SEARCH), target)
    if due is None:
        raise given.error("target_minutes", f"what fits into {_LONGEST_SEARCH.days} days of these business hours")
    now = due_at(job)
    used = sum((end - begin for begin, end in hours.spans(opened, now)), timedelta())
    return {
        "due_at": due.astimezone(hours.zone).isoformat(),
        "used_minutes": used // timedelta(minutes=1),
        "left_minutes": max(target - used, timedelta()) // timedelta(minutes=1),
        "breached": used > target,
    }


@dataclass(frozen=True, slots=True)
class _BusinessHours:
    opens: time
    closes: time
    workdays: frozenset[str]
    zone: ZoneInfo

    def spans(self, since: datetime, until: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Begin and end, in UTC, of the business hours between two instants."""
        day, last = since.astimezone(self.zone).date(), until.astimezone(self.zone).date()
        while day <= last:
            if _WEEKDAYS[day.weekday()] in self.workdays:
                begin = max(datetime.combine(day, self.opens, self.zone).astimezone(UTC), since)
                end = min(datetime.combine(day, self.closes, self.zone).astimezone(UTC), until)
                if begin < end:
                    yield begin, end
            day += timedelta(days=1)


def _read_hours(given: Inputs) -> _BusinessHours:
    workdays = frozenset(given.texts("workdays"))
    if not workdays or not workdays <= set(_WEEKDAYS):
        raise given.error("workdays", "a list of weekdays such as monday")
    hours = _BusinessHours(given.time_of_day("opens"), given.time_of_day("closes"), workdays, given.zone("timezone"))
    if hours.opens >= hours.closes:
        raise given.error("closes", "a time of day after opens")
    return hours


def _moment_reached(spans: Iterator[tuple[datetime, datetime]], target: timedelta) -> datetime | None:
    left = target
    for begin, end in spans:
        if end - begin >= left:
            return begin + left
        left -= end - begin
    return None
