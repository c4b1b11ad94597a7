"""When schedules are due, found by looking at the clock of the zone at every minute. Slow, and for a few days only.

It is written from the meaning of schedules in `docs/concepts.md` and `docs/definitions.md`, and shares nothing with
`taskplatform.schedule`, which it is there to check.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

_MINUTE_MS = 60_000
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass(frozen=True)
class Rule:
    """A schedule. `kind` is minutely, hourly, daily, weekly, monthly, or clock: whenever a clock shows these minutes of these hours."""

    kind: str
    every: int = 1
    hour: int = 0
    minute: int = 0
    zone: str = "UTC"
    weekday: int = 0
    day: int = 1
    hours: tuple[int, ...] = ()
    minutes: tuple[int, ...] = ()

    def fields(self) -> dict[str, Any]:
        """The same as a definition or an own schedule is written."""
        if self.kind == "clock":
            step = self.minutes[1] - self.minutes[0]
            return {"cron": {"expression": f"*/{step} {self.hours[0]}-{self.hours[-1]} * * *", "timezone": self.zone}}
        interval: dict[str, Any] = {"type": self.kind, "value": self.every, "timezone": self.zone}
        if self.kind != "minutely":
            interval["at_time"] = {"hour": self.hour, "minute": self.minute}
        if self.kind == "weekly":
            interval["weekday"] = _DAYS[self.weekday]
        if self.kind == "monthly":
            interval["day_of_month"] = self.day
        return {"interval": interval}


def due_times(rule: Rule, after_ms: int, until_ms: int) -> list[int]:
    """The due times t with after_ms < t <= until_ms."""
    first, last = after_ms // 86_400_000 - 1, until_ms // 86_400_000 + 1
    found = {at for day in range(first, last + 1) for at in _due_on(rule, day)}
    return sorted(at for at in found if after_ms < at <= until_ms)


@lru_cache(maxsize=4096)
def _due_on(rule: Rule, day: int) -> tuple[int, ...]:
    """Those of a day of UTC, or of the date of that number where the wall clock counts."""
    start_ms = day * 86_400_000
    if rule.kind == "minutely":
        return tuple(at for at in range(start_ms, start_ms + 86_400_000, _MINUTE_MS) if at // _MINUTE_MS % rule.every == 0)
    if rule.kind == "clock" or (rule.kind == "hourly" and rule.every == 1):
        minutes, hours = (rule.minutes, rule.hours) if rule.kind == "clock" else ((rule.minute,), range(24))
        shown = ((at, _shown(rule.zone, at)) for at in range(start_ms, start_ms + 86_400_000, _MINUTE_MS))
        return tuple(at for at, (_, hour, minute) in shown if minute in minutes and hour in hours)
    today = date(1970, 1, 1) + timedelta(days=day)
    if rule.kind == "hourly":
        hours = tuple(hour for hour in range(24) if (24 * day + hour - rule.hour) % rule.every == 0)
    else:
        hours = (rule.hour,) if _is_its_day(rule, today, day) else ()
    return tuple(_first_shown(rule.zone, day, hour, rule.minute) for hour in hours)


def _is_its_day(rule: Rule, today: date, day: int) -> bool:
    if rule.kind == "daily":
        return day % rule.every == 0
    if rule.kind == "weekly":
        return today.weekday() == rule.weekday and (day - 4) // 7 % rule.every == 0
    assert rule.kind == "monthly"
    assert rule.day <= 28
    return today.day == rule.day and ((today.year - 1970) * 12 + today.month - 1) % rule.every == 0


@lru_cache(maxsize=200_000)
def _shown(zone: str, at_ms: int) -> tuple[int, int, int]:
    """The number of the date, the hour and the minute that the zone's clock shows."""
    local = datetime.fromtimestamp(at_ms // 1000, UTC).astimezone(ZoneInfo(zone))
    return local.date().toordinal() - 719_163, local.hour, local.minute


def _first_shown(zone: str, day: int, hour: int, minute: int) -> int:
    """The first instant at which the zone's clock shows this; where it skips it, the instant by the offset before the skip."""
    wall = (day, hour, minute)
    middle_ms = (day * 1440 + hour * 60 + minute) * _MINUTE_MS
    # no zone is more than 14 hours away
    before = None
    for at in range(middle_ms - 15 * 60 * _MINUTE_MS, middle_ms + 15 * 60 * _MINUTE_MS, _MINUTE_MS):
        shown = _shown(zone, at)
        if shown == wall:
            return at
        if shown > wall:
            assert before is not None
            ago = (day - before[0]) * 1440 + (hour - before[1]) * 60 + minute - before[2]
            return at - _MINUTE_MS + ago * _MINUTE_MS
        before = shown
    raise AssertionError(f"{zone} never shows {wall}")
