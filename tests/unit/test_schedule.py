"""The module docstring of `taskplatform.schedule`, case by case; then the same against other implementations.

Recurrence is checked against dateutil's rrule, the resolving of wall times against dateutil's `resolve_imaginary` and
against a plain look at the clock for every quarter of an hour, and cron against croniter. Offsets come from zoneinfo
throughout: dateutil's own zones end in 2037.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import islice, pairwise
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

import pytest
from croniter import croniter
from dateutil.relativedelta import relativedelta
from dateutil.rrule import DAILY, HOURLY, MO, MONTHLY, WEEKLY, rrule, weekdays
from dateutil.tz import resolve_imaginary
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from taskplatform import schedule as schedule_module
from taskplatform.model import Cron, Interval, IntervalType, Schedule, Weekday
from taskplatform.schedule import latest_occurrence, next_occurrence, occurrences

QUARTER = 900
HOUR = 3600
DAY = 86_400


def interval(type_: str, zone: str = "UTC", at: str | None = None, **fields: Any) -> Interval:
    if at is not None:
        hour, minute = at.split(":")
        fields["at_time"] = {"hour": int(hour), "minute": int(minute)}
    return Interval.model_validate({"type": type_, "timezone": zone, **fields})


def cron(expression: str, zone: str = "UTC") -> Cron:
    return Cron(expression=expression, timezone=zone)


def ms(text: str) -> int:
    """ISO 8601 with an offset, or in UTC."""
    moment = datetime.fromisoformat(text)
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def shown(instant_ms: int, zone: str) -> str:
    """What the zone's clock shows, with the offset that tells a repeated hour's passes apart."""
    text = datetime.fromtimestamp(instant_ms / 1000, ZoneInfo(zone)).isoformat(timespec="minutes")
    return re.sub(r"\+00:00$", "Z", text)


def due(schedule: Schedule, after: str, until: str) -> list[str]:
    return [shown(instant, schedule.timezone) for instant in occurrences(schedule, ms(after), ms(until))]


# --- the documented cases --------------------------------------------------------------------------------------------

NEW_YORK = "America/New_York"  # 2026: 02:00 becomes 03:00 on 8 March, 02:00 becomes 01:00 on 1 November
BERLIN = "Europe/Berlin"  # 2026: 02:00 becomes 03:00 on 29 March, 03:00 becomes 02:00 on 25 October
LORD_HOWE = "Australia/Lord_Howe"  # 2026: 02:00 becomes 01:30 on 5 April, 02:00 becomes 02:30 on 4 October
KOLKATA = "Asia/Kolkata"  # +05:30
KATHMANDU = "Asia/Kathmandu"  # +05:45
BEIRUT = "Asia/Beirut"  # 2026: 00:00 becomes 01:00 on 29 March
TROLL = "Antarctica/Troll"  # 2026: 01:00 becomes 03:00 on 29 March
CASEY = "Antarctica/Casey"  # 2020: 00:01 becomes 03:01 on 4 October
APIA = "Pacific/Apia"  # 2011: 30 December left out
KWAJALEIN = "Pacific/Kwajalein"  # 1993: 21 August left out

CASES = {
    "minutely: after is left out, until is taken in": (
        interval("minutely"),
        ("2026-01-01T00:00", "2026-01-01T00:02"),
        ["2026-01-01T00:01Z", "2026-01-01T00:02Z"],
    ),
    "minutely: every 7 is counted from the epoch, over the hour": (
        interval("minutely", value=7),
        ("1970-01-01T00:50", "1970-01-01T01:10"),
        ["1970-01-01T00:56Z", "1970-01-01T01:03Z", "1970-01-01T01:10Z"],
    ),
    "minutely: the zone has no effect, not even :45": (
        interval("minutely", KATHMANDU, value=60),
        ("2026-01-01T00:00", "2026-01-01T02:00"),
        ["2026-01-01T06:45+05:45", "2026-01-01T07:45+05:45"],
    ),
    "minutely: the epoch itself": (interval("minutely", value=1000), ("1969-12-31T23:59:59", "1970-01-01T00:00"), ["1970-01-01T00:00Z"]),
    "hourly: at the zone's minute": (
        interval("hourly", KOLKATA, "00:15"),
        ("2026-01-01T00:00", "2026-01-01T02:00"),
        ["2026-01-01T06:15+05:30", "2026-01-01T07:15+05:30"],
    ),
    "hourly: the hour of at_time has no effect": (
        interval("hourly", at="17:30"),
        ("2026-01-01T00:00", "2026-01-01T02:00"),
        ["2026-01-01T00:30Z", "2026-01-01T01:30Z"],
    ),
    "hourly: both passes of a repeated hour": (
        interval("hourly", NEW_YORK, "00:30"),
        ("2026-11-01T00:45-04:00", "2026-11-01T02:45-05:00"),
        ["2026-11-01T01:30-04:00", "2026-11-01T01:30-05:00", "2026-11-01T02:30-05:00"],
    ),
    "hourly: no gap in real time at a skipped hour": (
        interval("hourly", BERLIN, "00:30"),
        ("2026-03-29T00:45+01:00", "2026-03-29T04:00+02:00"),
        ["2026-03-29T01:30+01:00", "2026-03-29T03:30+02:00"],
    ),
    "hourly: a repeated half hour": (
        interval("hourly", LORD_HOWE, "00:45"),
        ("2026-04-05T00:50+11:00", "2026-04-05T03:00+10:30"),
        ["2026-04-05T01:45+11:00", "2026-04-05T01:45+10:30", "2026-04-05T02:45+10:30"],
    ),
    "hourly: beside a repeated half hour": (
        interval("hourly", LORD_HOWE),
        ("2026-04-05T00:50+11:00", "2026-04-05T03:00+10:30"),
        ["2026-04-05T01:00+11:00", "2026-04-05T02:00+10:30", "2026-04-05T03:00+10:30"],
    ),
    "hourly: a skipped half hour": (
        interval("hourly", LORD_HOWE, "00:15"),
        ("2026-10-04T01:00+10:30", "2026-10-04T04:00+11:00"),
        ["2026-10-04T01:15+10:30", "2026-10-04T03:15+11:00"],
    ),
    "every 2 hours: on the wall clock": (
        interval("hourly", KOLKATA, "00:10", value=2),
        ("2026-01-01T00:00+05:30", "2026-01-01T05:00+05:30"),
        ["2026-01-01T00:10+05:30", "2026-01-01T02:10+05:30", "2026-01-01T04:10+05:30"],
    ),
    "every 6 hours: from at_time's hour": (
        interval("hourly", at="02:00", value=6),
        ("2026-01-01T00:00", "2026-01-02T00:00"),
        ["2026-01-01T02:00Z", "2026-01-01T08:00Z", "2026-01-01T14:00Z", "2026-01-01T20:00Z"],
    ),
    "every 5 hours: from 1970, over midnight": (
        interval("hourly", value=5),
        ("1970-01-01T18:00", "1970-01-02T07:00"),
        ["1970-01-01T20:00Z", "1970-01-02T01:00Z", "1970-01-02T06:00Z"],
    ),
    "every 2 hours: a skipped one moves forward": (
        interval("hourly", BERLIN, "00:15", value=2),
        ("2026-03-29T00:00+01:00", "2026-03-29T06:00+02:00"),
        ["2026-03-29T00:15+01:00", "2026-03-29T03:15+02:00", "2026-03-29T04:15+02:00"],
    ),
    "every 2 hours: a repeated one runs once": (
        interval("hourly", BERLIN, "00:15", value=2),
        ("2026-10-25T00:00+02:00", "2026-10-25T05:00+01:00"),
        ["2026-10-25T00:15+02:00", "2026-10-25T02:15+02:00", "2026-10-25T04:15+01:00"],
    ),
    "every 2 hours: two at the same instant are one": (
        interval("hourly", TROLL, "01:30", value=2),
        ("2026-03-28T23:00Z", "2026-03-29T06:00+02:00"),
        ["2026-03-28T23:30Z", "2026-03-29T03:30+02:00", "2026-03-29T05:30+02:00"],
    ),
    "every 2 hours: one that moves forward past the next": (
        interval("hourly", CASEY, value=2),
        ("2020-10-03T22:30+08:00", "2020-10-04T06:30+11:00"),
        ["2020-10-04T00:00+08:00", "2020-10-04T04:00+11:00", "2020-10-04T05:00+11:00", "2020-10-04T06:00+11:00"],
    ),
    "daily: default at 00:00, local": (
        interval("daily", KOLKATA),
        ("2026-01-01T00:00", "2026-01-02T23:00"),
        ["2026-01-02T00:00+05:30", "2026-01-03T00:00+05:30"],
    ),
    "daily: the same time of day before and after a change": (
        interval("daily", NEW_YORK, "09:00"),
        ("2026-03-07T00:00", "2026-03-09T00:00"),
        ["2026-03-07T09:00-05:00", "2026-03-08T09:00-04:00"],
    ),
    "daily: New York, skipped": (
        interval("daily", NEW_YORK, "02:30"),
        ("2026-03-07T00:00", "2026-03-10T00:00"),
        ["2026-03-07T02:30-05:00", "2026-03-08T03:30-04:00", "2026-03-09T02:30-04:00"],
    ),
    "daily: New York, repeated": (
        interval("daily", NEW_YORK, "01:30"),
        ("2026-10-31T00:00", "2026-11-03T00:00"),
        ["2026-10-31T01:30-04:00", "2026-11-01T01:30-04:00", "2026-11-02T01:30-05:00"],
    ),
    "daily: Berlin, skipped, its first minute": (
        interval("daily", BERLIN, "02:00"),
        ("2026-03-29T00:00", "2026-03-30T12:00"),
        ["2026-03-29T03:00+02:00", "2026-03-30T02:00+02:00"],
    ),
    "daily: Berlin, the first minute after the skip": (
        interval("daily", BERLIN, "03:00"),
        ("2026-03-29T00:00", "2026-03-29T12:00"),
        ["2026-03-29T03:00+02:00"],
    ),
    "daily: Berlin, repeated, its first minute": (
        interval("daily", BERLIN, "02:00"),
        ("2026-10-24T12:00", "2026-10-25T12:00"),
        ["2026-10-25T02:00+02:00"],
    ),
    "daily: Berlin, the first minute after the repeat": (
        interval("daily", BERLIN, "03:00"),
        ("2026-10-24T12:00", "2026-10-25T12:00"),
        ["2026-10-25T03:00+01:00"],
    ),
    "daily: half an hour skipped moves by half an hour": (
        interval("daily", LORD_HOWE, "02:15"),
        ("2026-10-03T00:00", "2026-10-04T12:00"),
        ["2026-10-04T02:45+11:00"],
    ),
    "daily: midnight skipped": (
        interval("daily", BEIRUT),
        ("2026-03-28T00:00", "2026-03-30T00:00"),
        ["2026-03-29T01:00+03:00", "2026-03-30T00:00+03:00"],
    ),
    "daily: a whole day skipped is one run with the next": (
        interval("daily", APIA, "09:00"),
        ("2011-12-29T00:00-10:00", "2012-01-01T12:00+14:00"),
        ["2011-12-29T09:00-10:00", "2011-12-31T09:00+14:00", "2012-01-01T09:00+14:00"],
    ),
    "every 2 days: on a day that was skipped": (
        interval("daily", APIA, "09:00", value=2),
        ("2011-12-27T12:00-10:00", "2012-01-02T00:00+14:00"),
        ["2011-12-28T09:00-10:00", "2011-12-31T09:00+14:00", "2012-01-01T09:00+14:00"],
    ),
    "every 12 hours: a day skipped": (
        interval("hourly", KWAJALEIN, "00:00", value=12),
        ("1993-08-20T00:00-12:00", "1993-08-22T12:00+12:00"),
        ["1993-08-20T12:00-12:00", "1993-08-22T00:00+12:00", "1993-08-22T12:00+12:00"],
    ),
    "every 3 days: counted from 1970-01-01": (
        interval("daily", value=3),
        ("1969-12-31T12:00", "1970-01-07T12:00"),
        ["1970-01-01T00:00Z", "1970-01-04T00:00Z", "1970-01-07T00:00Z"],
    ),
    "weekly: default on Monday": (
        interval("weekly", BERLIN, "08:00"),
        ("2026-06-01T12:00", "2026-06-08T12:00"),
        ["2026-06-08T08:00+02:00"],
    ),
    "weekly: on Sunday, skipped": (
        interval("weekly", BERLIN, "02:30", weekday="sunday"),
        ("2026-03-23T00:00", "2026-04-06T00:00"),
        ["2026-03-29T03:30+02:00", "2026-04-05T02:30+02:00"],
    ),
    "bi-weekly: counted from 1970-01-05": (
        interval("weekly", value=2),
        ("1970-01-01T00:00", "1970-02-01T00:00"),
        ["1970-01-05T00:00Z", "1970-01-19T00:00Z"],
    ),
    "bi-weekly: every weekday of the same week": (
        interval("weekly", value=2, weekday="sunday"),
        ("1970-01-05T00:00", "1970-02-01T00:00"),
        ["1970-01-11T00:00Z", "1970-01-25T00:00Z"],
    ),
    "bi-weekly: over the turn of a year with 53 weeks": (
        interval("weekly", value=2, weekday="friday"),
        ("2026-12-14T00:00", "2027-01-16T00:00"),
        ["2026-12-25T00:00Z", "2027-01-08T00:00Z"],
    ),
    "monthly: default on the 1st": (
        interval("monthly"),
        ("2026-01-01T00:00", "2026-03-01T00:00"),
        ["2026-02-01T00:00Z", "2026-03-01T00:00Z"],
    ),
    "monthly: the 31st": (
        interval("monthly", BERLIN, "06:00", day_of_month=31),
        ("2026-01-01T00:00", "2026-05-01T00:00"),
        ["2026-01-31T06:00+01:00", "2026-02-28T06:00+01:00", "2026-03-31T06:00+02:00", "2026-04-30T06:00+02:00"],
    ),
    "monthly: the 30th in a leap year": (
        interval("monthly", day_of_month=30),
        ("2028-02-01T00:00", "2028-04-01T00:00"),
        ["2028-02-29T00:00Z", "2028-03-30T00:00Z"],
    ),
    "monthly: the 29th in a common year": (
        interval("monthly", day_of_month=29),
        ("2027-02-01T00:00", "2027-03-01T00:00"),
        ["2027-02-28T00:00Z"],
    ),
    "every 3 months: counted from January 1970": (
        interval("monthly", value=3),
        ("2026-01-01T00:00", "2026-12-31T00:00"),
        ["2026-04-01T00:00Z", "2026-07-01T00:00Z", "2026-10-01T00:00Z"],
    ),
    "every 5 months: over the turn of a year": (
        interval("monthly", value=5),
        ("1970-01-01T12:00", "1971-06-01T00:00"),
        ["1970-06-01T00:00Z", "1970-11-01T00:00Z", "1971-04-01T00:00Z"],
    ),
    "every 12 months: 29 February": (
        interval("monthly", value=12, day_of_month=31),
        ("2026-02-01T00:00", "2028-02-01T00:00"),
        ["2027-01-31T00:00Z", "2028-01-31T00:00Z"],
    ),
    "cron: weekdays": (
        cron("30 9 * * mon-fri", NEW_YORK),
        ("2026-06-05T00:00-04:00", "2026-06-09T00:00-04:00"),
        ["2026-06-05T09:30-04:00", "2026-06-08T09:30-04:00"],
    ),
    "cron: Sunday is 0 and 7": (cron("0 0 * * 7"), ("2026-06-01T00:00", "2026-06-08T00:00"), ["2026-06-07T00:00Z"]),
    "cron: day of month or weekday": (
        cron("0 0 3 * fri"),
        ("2026-06-01T00:00", "2026-06-07T00:00"),
        ["2026-06-03T00:00Z", "2026-06-05T00:00Z"],
    ),
    "cron: day of month and weekday with a star": (cron("0 0 */2 * fri"), ("2026-06-01T00:00", "2026-06-13T00:00"), ["2026-06-05T00:00Z"]),
    "cron: last day of the month": (
        cron("0 12 L * *"),
        ("2028-02-01T00:00", "2028-04-01T00:00"),
        ["2028-02-29T12:00Z", "2028-03-31T12:00Z"],
    ),
    "cron: first Monday and last Friday": (
        cron("0 0 * * 1#1,5L"),
        ("2026-06-01T12:00", "2026-07-31T12:00"),
        ["2026-06-26T00:00Z", "2026-07-06T00:00Z", "2026-07-31T00:00Z"],
    ),
    "cron: 29 February": (cron("0 0 29 2 *"), ("2026-01-01T00:00", "2033-01-01T00:00"), ["2028-02-29T00:00Z", "2032-02-29T00:00Z"]),
    "cron: fixed, skipped": (
        cron("30 2 * * *", BERLIN),
        ("2026-03-28T12:00", "2026-03-30T12:00"),
        ["2026-03-29T03:30+02:00", "2026-03-30T02:30+02:00"],
    ),
    "cron: fixed, skipped, one with another": (
        cron("0,30 2,3 * * *", BERLIN),
        ("2026-03-29T00:00", "2026-03-29T12:00"),
        ["2026-03-29T03:00+02:00", "2026-03-29T03:30+02:00"],
    ),
    "cron: fixed, skipped, past another": (
        cron("15,45 2,3 * * *", LORD_HOWE),
        ("2026-10-03T12:00", "2026-10-04T12:00"),
        ["2026-10-04T02:45+11:00", "2026-10-04T03:15+11:00", "2026-10-04T03:45+11:00"],
    ),
    "cron: fixed, repeated": (
        cron("30 2 * * *", BERLIN),
        ("2026-10-24T12:00", "2026-10-26T12:00"),
        ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"],
    ),
    "cron: fixed, asked between the passes": (
        cron("10,50 2 * * *", BERLIN),
        ("2026-10-25T02:30+01:00", "2026-10-26T12:00"),
        ["2026-10-26T02:10+01:00", "2026-10-26T02:50+01:00"],
    ),
    "cron: star, repeated": (
        cron("*/30 2 * * *", BERLIN),
        ("2026-10-24T12:00", "2026-10-25T12:00"),
        ["2026-10-25T02:00+02:00", "2026-10-25T02:30+02:00", "2026-10-25T02:00+01:00", "2026-10-25T02:30+01:00"],
    ),
    "cron: star, asked inside the second pass": (
        cron("*/20 2 * * *", BERLIN),
        ("2026-10-25T02:20+01:00", "2026-10-26T02:10+01:00"),
        ["2026-10-25T02:40+01:00", "2026-10-26T02:00+01:00"],
    ),
    "cron: star, skipped": (cron("*/30 2 * * *", BERLIN), ("2026-03-28T12:00", "2026-03-30T00:10"), ["2026-03-30T02:00+02:00"]),
    "cron: star in the hour": (
        cron("0 */2 * * *", BERLIN),
        ("2026-10-25T00:30+02:00", "2026-10-25T04:30+01:00"),
        ["2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00", "2026-10-25T04:00+01:00"],
    ),
    "cron: star, in a skipped half hour, where cronsim loses runs": (
        cron("*/10 3 * * *", LORD_HOWE),
        ("2026-10-03T12:00", "2026-10-03T16:20"),
        ["2026-10-04T03:00+11:00", "2026-10-04T03:10+11:00", "2026-10-04T03:20+11:00"],
    ),
    "cron: star, after a skipped midnight, where cronsim loses runs": (
        cron("*/30 1 * * sun", BEIRUT),
        ("2026-03-28T12:00", "2026-03-29T12:00"),
        ["2026-03-29T01:00+03:00", "2026-03-29T01:30+03:00"],
    ),
}


@pytest.mark.parametrize(("schedule", "span", "expected"), CASES.values(), ids=CASES.keys())
def test_documented_case(schedule: Schedule, span: tuple[str, str], expected: list[str]) -> None:
    assert due(schedule, *span) == expected


@pytest.mark.parametrize(("after", "until"), [("2026-01-01T00:00", "2026-01-01T00:00"), ("2026-01-02T00:00", "2026-01-01T00:00")])
@pytest.mark.parametrize("schedule", [interval("minutely"), interval("daily"), cron("* * * * *")])
def test_an_empty_span_has_no_due_time(schedule: Schedule, after: str, until: str) -> None:
    assert due(schedule, after, until) == []
    assert latest_occurrence(schedule, ms(after), ms(until)) is None


@pytest.mark.parametrize(
    "schedule",
    [
        interval("minutely"),
        interval("hourly"),
        interval("hourly", value=2),
        interval("daily"),
        interval("weekly", weekday="friday"),
        interval("monthly", day_of_month=2),
        cron("0 0 * * *"),
        cron("*/30 * * * *"),
    ],
)
def test_spans_are_exact_to_the_millisecond(schedule: Schedule) -> None:
    midnight = ms("2026-01-02T00:00")
    assert list(occurrences(schedule, midnight - 1, midnight)) == [midnight]
    assert list(occurrences(schedule, midnight - 59_000, midnight - 1)) == []
    assert list(occurrences(schedule, midnight, midnight + 999)) == []
    assert next_occurrence(schedule, midnight - 1) == midnight
    assert next_occurrence(schedule, midnight) != midnight


@pytest.mark.parametrize("schedule", [interval("minutely"), interval("hourly", BERLIN), cron("* * * * *", BERLIN)])
def test_occurrences_are_made_as_they_are_asked_for(schedule: Schedule) -> None:
    far = occurrences(schedule, 0, ms("9000-01-01T00:00"))
    assert len(list(islice(far, 100))) == 100


def test_the_longest_interval_and_the_rarest_cron_are_found() -> None:
    assert next_occurrence(interval("monthly", value=1000), ms("1970-01-01T00:00")) == ms("2053-05-01T00:00")
    assert next_occurrence(cron("0 0 29 2 */7"), ms("2088-03-01T00:00")) == ms("2128-02-29T00:00")


def test_a_cron_that_has_no_more_days_has_no_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_module, "_cron_day", lambda *_: None)
    assert next_occurrence(cron("0 0 * * *"), 0) is None


def test_latest_over_a_year() -> None:
    year = ms("2026-01-01T00:00"), ms("2027-01-01T00:00")
    assert latest_occurrence(interval("minutely", value=7), *year) == (ms("2026-12-31T23:55"), 75_085)
    assert latest_occurrence(interval("hourly", BERLIN, "00:30"), *year) == (ms("2026-12-31T23:30"), 8760)
    assert latest_occurrence(interval("daily", BERLIN, "02:30"), *year) == (ms("2026-12-31T02:30+01:00"), 365)


# --- other implementations -------------------------------------------------------------------------------------------

ZONES = sorted(available_timezones() - {"localtime", "Factory"})
FROM, TO = datetime(2020, 1, 1, tzinfo=UTC), datetime(2041, 1, 1, tzinfo=UTC)


class Change(NamedTuple):
    """A zone's offset goes from `before` to `offset` at `instant`; all in seconds."""

    instant: int
    before: int
    offset: int

    @property
    def wall(self) -> datetime:
        """The first time of day that is skipped, or the first that is not shown the first time."""
        return datetime(1970, 1, 1) + timedelta(seconds=self.instant + self.before)


def clock(zone: str, instant: int) -> datetime:
    return datetime.fromtimestamp(instant, ZoneInfo(zone)).replace(tzinfo=None)


def seconds(wall: datetime) -> int:
    return (wall - datetime(1970, 1, 1)) // timedelta(seconds=1)


def offset_of(zone: str, instant: int) -> int:
    return seconds(clock(zone, instant)) - instant


@cache
def changes(zone: str) -> tuple[Change, ...]:
    """The zone's clock changes in 2020 to 2040. The shortest time between two is a week less an hour."""
    found = []
    step = 5 * DAY
    first, last = round(FROM.timestamp()), round(TO.timestamp())
    before = offset_of(zone, first)
    for start in range(first, last, step):
        if (offset := offset_of(zone, start + step)) != before:
            low, high = start, start + step
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if offset_of(zone, middle) == before else (low, middle)
            found.append(Change(high, before, offset))
            before = offset
    return tuple(found)


def recurrence(schedule: Interval, start: datetime, end: datetime) -> list[datetime]:
    """rrule's wall times of an hourly or longer interval. It starts at the beginning of the last n-th period before `start`."""
    n, at = schedule.value, schedule.at_time
    time = timedelta(hours=at.hour, minutes=at.minute)

    def begin(first: datetime, period: timedelta) -> datetime:
        return first + (start - first) // period * period

    match schedule.type:
        case IntervalType.HOURLY:
            rule = rrule(HOURLY, interval=n, dtstart=begin(datetime(1970, 1, 1) + time, timedelta(hours=n)))
        case IntervalType.DAILY:
            rule = rrule(DAILY, interval=n, dtstart=begin(datetime(1970, 1, 1), timedelta(days=n)) + time)
        case IntervalType.WEEKLY:
            weekday = weekdays[list(Weekday).index(schedule.weekday or Weekday.MONDAY)]
            rule = rrule(WEEKLY, interval=n, dtstart=begin(datetime(1970, 1, 5), timedelta(weeks=n)) + time, wkst=MO, byweekday=weekday)
        case IntervalType.MONTHLY:
            months = (start.year - 1970) * 12 + start.month - 1
            first = datetime(1970, 1, 1) + relativedelta(months=months - months % n) + time
            day = schedule.day_of_month or 1
            rule = rrule(MONTHLY, interval=n, dtstart=first, bymonthday=range(min(day, 28), day + 1), bysetpos=-1)
        case IntervalType.MINUTELY:
            raise AssertionError(schedule)
    return rule.between(start, end, inc=True)


def resolved(walls: Iterable[datetime], zone: str) -> list[int]:
    """dateutil's instants of wall times: once each, skipped ones moved forward, the first pass of repeated ones."""
    return sorted({round(resolve_imaginary(wall.replace(tzinfo=ZoneInfo(zone), fold=0)).timestamp()) * 1000 for wall in walls})


def by_looking_at_the_clock(zone: str, matches: Callable[[datetime], bool], after_ms: int, until_ms: int) -> list[int]:
    """Every quarter of an hour at which the clock shows a matching time. All offsets of 2020 to 2040 are quarters of an hour."""
    quarters = range(after_ms // 1000 // QUARTER * QUARTER, until_ms // 1000 + 1, QUARTER)
    return [quarter * 1000 for quarter in quarters if after_ms < quarter * 1000 and matches(clock(zone, quarter))]


def reference(schedule: Interval, after_ms: int, until_ms: int) -> list[int]:
    minute = schedule.at_time.minute
    if schedule.type is IntervalType.MINUTELY:
        return [t for t in range(after_ms // 60_000 * 60_000, until_ms + 1, 60_000) if t > after_ms and t // 60_000 % schedule.value == 0]
    if schedule.type is IntervalType.HOURLY and schedule.value == 1:
        shift = minute % 15 * 60_000
        quarter = minute - minute % 15
        looked = by_looking_at_the_clock(schedule.timezone, lambda wall: wall.minute == quarter, after_ms - shift, until_ms - shift)
        return [instant + shift for instant in looked]
    # no clock is more than a day ahead or behind, and no skip moves anything by more than a day
    start, end = (datetime(1970, 1, 1) + timedelta(milliseconds=t) for t in (after_ms - 2 * DAY * 1000, until_ms + 2 * DAY * 1000))
    return [t for t in resolved(recurrence(schedule, start, end), schedule.timezone) if after_ms < t <= until_ms]


#: long enough for a few due times of most, short enough for the reference
SPAN_DAYS = {
    IntervalType.MINUTELY: 0.5,
    IntervalType.HOURLY: 4,
    IntervalType.DAILY: 60,
    IntervalType.WEEKLY: 400,
    IntervalType.MONTHLY: 1500,
}
EVERY = st.one_of(st.integers(1, 4), st.integers(1, 1000))


@st.composite
def intervals(draw: st.DrawFn) -> Interval:
    kind = draw(st.sampled_from(IntervalType))
    fields: dict[str, Any] = {"value": draw(EVERY)}
    if kind is IntervalType.WEEKLY:
        fields["weekday"] = draw(st.sampled_from([None, *Weekday]))
    if kind is IntervalType.MONTHLY:
        fields["day_of_month"] = draw(st.one_of(st.none(), st.integers(1, 31)))
    at = None
    if kind is not IntervalType.MINUTELY:
        # clock changes are at night
        hour = draw(st.one_of(st.integers(0, 3), st.integers(0, 23)))
        at = f"{hour}:{draw(st.one_of(st.sampled_from([0, 15, 30, 45]), st.integers(0, 59)))}"
    return interval(kind, draw(st.sampled_from(ZONES)), at, **fields)


def cron_field(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    # croniter takes 5-5 for the whole range
    span = st.tuples(number, number).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: f"{pair[0]}-{pair[1]}")
    step = st.tuples(st.one_of(st.just("*"), span), st.integers(1, 12)).map(lambda pair: f"{pair[0]}/{pair[1]}")
    several = st.lists(number, min_size=1, max_size=4, unique=True).map(lambda numbers: ",".join(map(str, numbers)))
    return st.one_of(st.just("*"), several, span, step)


@st.composite
def crons(draw: st.DrawFn) -> Cron:
    day, weekday = draw(cron_field(1, 31)), draw(cron_field(0, 6))
    # where one of the two begins with a star, croniter takes either and cronsim both: a table case
    assume("*" in (day, weekday) or not (day + weekday).count("*"))
    month = draw(st.one_of(st.just("*"), cron_field(1, 12)))
    try:
        return cron(f"{draw(cron_field(0, 59))} {draw(cron_field(0, 23))} {day} {month} {weekday}", draw(st.sampled_from(ZONES)))
    except ValidationError:  # such as 31 February
        assume(False)
        raise


@st.composite
def instants(draw: st.DrawFn, zone: str) -> int:
    """An instant in 2020 to 2040, in ms: often within a day of a clock change, and often at a full minute."""
    near_a_change = draw(st.booleans())
    if near_a_change and changes(zone):
        middle = changes(zone)[draw(st.integers(0, 1000)) % len(changes(zone))].instant * 1000
        return middle + draw(st.one_of(st.integers(-180, 180).map(lambda minutes: minutes * 60_000), st.integers(-DAY * 1000, DAY * 1000)))
    return draw(st.integers(int(FROM.timestamp()) * 1000, int(TO.timestamp()) * 1000))


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, database=None)


@examples(400)
@given(st.data())
def test_an_interval_is_due_when_dateutil_says(data: st.DataObject) -> None:
    schedule = data.draw(intervals())
    after = data.draw(instants(schedule.timezone))
    until = after + data.draw(st.integers(0, int(SPAN_DAYS[schedule.type] * DAY * 1000)))
    assert list(occurrences(schedule, after, until)) == reference(schedule, after, until)


@examples(200)
@given(st.data())
def test_a_cron_is_due_when_croniter_says_between_clock_changes(data: st.DataObject) -> None:
    schedule = data.draw(crons())
    zone = schedule.timezone
    start = data.draw(instants(zone)) // 1000
    # a skip moves things by up to a day, and croniter does not know
    after = max([start, *(change.instant + DAY for change in changes(zone) if change.instant <= start)])
    until = min([round(TO.timestamp()), *(change.instant for change in changes(zone) if change.instant > start)])
    walls = croniter(schedule.expression, clock(zone, after))
    expected: list[int] = []
    while len(expected) < 20 and (instant := seconds(walls.get_next(datetime)) - offset_of(zone, after)) < until:
        expected.append(instant * 1000)
    assert list(islice(occurrences(schedule, after * 1000, until * 1000 - 1), 20)) == expected


@examples(200)
@given(st.data())
def test_adjoining_spans_share_and_lose_nothing(data: st.DataObject) -> None:
    schedule = data.draw(st.one_of(intervals(), crons()))
    days = SPAN_DAYS[schedule.type] if isinstance(schedule, Interval) else 2
    after = data.draw(instants(schedule.timezone))
    until = after + int(days * DAY * 1000)
    whole = list(occurrences(schedule, after, until))
    between = data.draw(st.one_of(st.integers(after, until), st.sampled_from(whole or [after])))

    assert all(after < instant <= until for instant in whole)
    assert all(earlier < later for earlier, later in pairwise(whole))
    assert [*occurrences(schedule, after, between), *occurrences(schedule, between, until)] == whole
    assert latest_occurrence(schedule, after, until) == ((whole[-1], len(whole)) if whole else None)
    assert list(islice(one_by_one(schedule, after), min(len(whole), 50))) == whole[:50]


def one_by_one(schedule: Schedule, after_ms: int) -> Iterator[int]:
    while (instant := next_occurrence(schedule, after_ms)) is not None:
        yield instant
        after_ms = instant


def test_every_zone_from_2020_to_2040_on_sundays() -> None:
    # most clocks change on a Sunday; many zones are one under several names
    after, until = (round(end.timestamp()) for end in (FROM, TO))
    expected: dict[tuple[int, tuple[Change, ...]], list[int]] = {}
    for zone in ZONES:
        clock_changes = changes(zone)
        last = clock_changes[-1] if clock_changes else Change(0, 0, 0)
        at = last.wall + timedelta(seconds=(last.offset - last.before) / 2)
        schedule = interval("weekly", zone, f"{at.hour}:{at.minute}", weekday="sunday")
        same_clock = offset_of(zone, after), clock_changes
        if same_clock not in expected:
            expected[same_clock] = reference(schedule, after * 1000, until * 1000)
        assert list(occurrences(schedule, after * 1000, until * 1000)) == expected[same_clock], schedule


def test_every_clock_change_of_every_zone() -> None:
    distinct = {change: zone for zone in ZONES for change in changes(zone)}
    assert len(distinct) > 1000
    for change, zone in distinct.items():
        after, until = (change.instant - DAY) * 1000, (change.instant + DAY) * 1000
        midst = change.wall + timedelta(seconds=(change.offset - change.before) / 2)
        at = f"{midst.hour}:{midst.minute}"
        for schedule in (
            interval("hourly", zone, at),
            interval("hourly", zone, at, value=2),
            interval("daily", zone, at),
            interval("monthly", zone, at, day_of_month=midst.day),
        ):
            assert list(occurrences(schedule, after, until)) == reference(schedule, after, until), schedule
        star = cron(f"*/15 {midst.hour} * * *", zone)
        looked = by_looking_at_the_clock(zone, lambda wall, hour=midst.hour: wall.hour == hour, after, until)  # type: ignore[misc]
        assert list(occurrences(star, after, until)) == looked, star


@pytest.mark.parametrize("zone", [BERLIN, LORD_HOWE, CASEY, APIA])
def test_the_blocks_in_which_clock_changes_are_looked_up_leave_no_trace(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    after, until = ("2011-12-01T00:00", "2012-01-31T00:00") if zone == APIA else ("2020-01-01T00:00", "2020-12-31T00:00")
    every_quarter = cron("0,15,30,45 0-23 * * *", zone)
    whole = list(occurrences(every_quarter, ms(after), ms(until)))
    for hours in (1, 7, 24):
        monkeypatch.setattr(schedule_module, "_BLOCK", hours * HOUR)
        schedule_module._stretches.cache_clear()
        assert list(occurrences(every_quarter, ms(after), ms(until))) == whole
    schedule_module._stretches.cache_clear()
