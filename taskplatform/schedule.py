"""When a schedule comes due. Pure: no clock, no I/O but the reading of time zone data.

This text is the definition of what a schedule means; `tests/unit/test_schedule.py` holds the code to it.

**Instants** are milliseconds since the Unix epoch, in UTC. A span leaves out its start and takes in its end: a due time t lies
in it when after < t <= until. Adjoining spans so share no due time and lose none. Due times ascend strictly, and depend on the
schedule alone: not on where a span begins, nor on how often anybody asks.

**Intervals**, every n of

- *minutely*: minutes that have passed. Due where the minutes since the epoch are divisible by n; the zone has no effect.
- *hourly*, n = 1: due whenever the zone's wall clock comes to the minute `at_time.minute`. A repeated hour has a run in both
  passes, and where an hour is skipped the runs are still one hour apart. Only where the clock changes by half an hour
  (Australia/Lord_Howe) do two runs lie 30 or 90 minutes apart.
- *hourly*, n >= 2: on the wall clock. Due when the hours since 1970-01-01 00:00, less `at_time.hour`, are divisible by n.
- *daily*: due on days whose number since 1970-01-01 is divisible by n, at `at_time`.
- *weekly*: due on `weekday` (default Monday) of weeks whose number since Monday 1970-01-05 is divisible by n, at `at_time`.
- *monthly*: due in months whose number since January 1970 is divisible by n, on `day_of_month` (default 1) or, in a
  shorter month, on its last day: the 31st is 29 February in a leap year. At `at_time`.

So every n-th is counted from a fixed date, never from the first run, a deployment or a subscription.

**Cron** expressions are read by cronsim: names, lists, ranges, steps, `L`, `LW`, `5L`, `1#2`, and 0 or 7 for Sunday. Day of
month and weekday are alternatives when both are restricted; when either begins with `*` (as in `*/2`), both must hold.

**Clock changes.** Whatever is due on the wall clock is due once:

- A time that the clock skips is read with the offset in force before the skip, as RFC 5545 says: 02:30 in a night in which
  02:00 becomes 03:00 is due at 03:30. Should something else be due at that instant, there is one run.
- A time that the clock shows twice is due the first time.
- A day that a zone skips altogether (Pacific/Apia, 2011-12-30) so falls onto the next, and they have one run.

An hourly interval with n = 1, and a cron expression with a minute or hour that begins with `*`, go with the clock instead, as
in Debian's cron: they are due whenever it comes to a time that matches, so in both passes of a repeated hour, and not at all
for a time that is skipped. `*/30 2 * * *` therefore has no run in the night in which there is no 02:00.

cronsim's own rules for clock changes are not used. They agree with the above but for a fixed time that is skipped, which
it moves to the first minute after the skip. But where a zone changes by half an hour or at midnight, cronsim 2.8 loses runs,
and finds different ones depending on where it starts; and inside a repeated hour it may return an instant before its start.

**Zones** are those of `zoneinfo`. It is taken that no clock change is longer than a day and that two in a zone lie more than two
days apart; from 1970 on, the longest is a day and the shortest time between two is a week less an hour.
"""

from __future__ import annotations

from bisect import bisect_left
from calendar import monthrange
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, timedelta
from functools import lru_cache
from heapq import merge
from itertools import count, groupby
from typing import NamedTuple
from zoneinfo import ZoneInfo

from cronsim import CronSim

from taskplatform.model import Cron, Interval, IntervalType, Schedule, Weekday

_MINUTE = 60
_HOUR = 3600
_DAY = 86_400
_EPOCH = datetime(1970, 1, 1)
_EPOCH_DAY = _EPOCH.toordinal()
_FIRST_MONDAY = 4
"""1970-01-05, in days since 1970-01-01."""
_WEEKDAY = {weekday: number for number, weekday in enumerate(Weekday)}
_FURTHEST_MS = 100 * 366 * _DAY * 1000
"""How far `next_occurrence` looks. The longest interval, 1000 months, is 84 years; 29 February falls on a Sunday after at most 40."""


def occurrences(schedule: Schedule, after_ms: int, until_ms: int) -> Iterator[int]:
    """The due times t with after_ms < t <= until_ms, ascending, in milliseconds; made as they are asked for."""
    return (instant * 1000 for instant in _instants(schedule, *_half_open(after_ms, until_ms)))


def next_occurrence(schedule: Schedule, after_ms: int) -> int | None:
    """The first due time later than after_ms, or None if there is none within 50 years (cron) or 100 years."""
    return next(occurrences(schedule, after_ms, after_ms + _FURTHEST_MS), None)


def latest_occurrence(schedule: Schedule, after_ms: int, until_ms: int) -> tuple[int, int] | None:
    """The last due time t with after_ms < t <= until_ms, and how many there are; None if there is none.

    For catching up. Over a year, a minutely interval takes microseconds, an hourly one a few milliseconds, and a cron
    expression that is due every minute about 0.1 s.
    """
    if isinstance(schedule, Interval) and schedule.type is IntervalType.MINUTELY:
        minutes = _minutes(schedule, *_half_open(after_ms, until_ms))
        return (minutes[-1] * 1000, len(minutes)) if minutes else None
    last = deque(enumerate(occurrences(schedule, after_ms, until_ms), 1), maxlen=1)
    return (last[0][1], last[0][0]) if last else None


# --- from the wall clock to instants ---------------------------------------------------------------------------------
# From here on times are whole seconds, and spans are half-open: [start, stop).
# A wall time is what the clock shows, in seconds since it showed 1970-01-01 00:00.

_Walls = Callable[[int, int], Iterable[int]]
"""Wall times of a schedule in a span of the wall clock, ascending, as if the clock never changed."""


def in_words(schedule: Schedule) -> str:
    """A schedule for people: `every day at 09:00 Europe/Berlin`."""
    if isinstance(schedule, Cron):
        return f"cron {schedule.expression} {schedule.timezone}"
    unit = {"minutely": "minute", "hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month"}[schedule.type]
    every = f"every {unit}" if schedule.value == 1 else f"every {schedule.value} {unit}s"
    at, zone = schedule.at_time, schedule.timezone
    match schedule.type:
        case IntervalType.MINUTELY:
            return every
        case IntervalType.HOURLY if schedule.value == 1:
            return f"{every} at :{at.minute:02} {zone}"
        case IntervalType.WEEKLY:
            every += f" on {schedule.weekday or 'monday'}"
        case IntervalType.MONTHLY:
            every += f" on day {schedule.day_of_month or 1}"
    return f"{every} at {at.hour:02}:{at.minute:02} {zone}"


def _half_open(after_ms: int, until_ms: int) -> tuple[int, int]:
    return after_ms // 1000 + 1, until_ms // 1000 + 1


def _instants(schedule: Schedule, start: int, stop: int) -> Iterator[int]:
    if isinstance(schedule, Interval) and schedule.type is IntervalType.MINUTELY:
        yield from _minutes(schedule, start, stop)
        return
    walls = _walls(schedule)
    in_stretch = _at_each_match if _goes_with_the_clock(schedule) else _once
    while start < stop:
        stretch = _stretch_at(schedule.timezone, start)
        end = min(stop, stretch.end)
        yield from in_stretch(walls, stretch, start, end)
        start = end


def _goes_with_the_clock(schedule: Schedule) -> bool:
    if isinstance(schedule, Cron):
        minute, hour = schedule.expression.split()[:2]
        return minute.startswith("*") or hour.startswith("*")
    return schedule.type is IntervalType.HOURLY and schedule.value == 1


def _at_each_match(walls: _Walls, stretch: _Stretch, start: int, stop: int) -> Iterator[int]:
    offset = stretch.offset
    return (wall - offset for wall in walls(start + offset, stop + offset))


def _once(walls: _Walls, stretch: _Stretch, start: int, stop: int) -> Iterator[int]:
    before, offset = stretch.before, stretch.offset
    # the wall times before this one, if any, had their first pass before the clock went back
    first = max(start + offset, stretch.start + before) if before > offset else start + offset
    shown = (wall - offset for wall in walls(first, stop + offset))
    skipped_until = stretch.start + offset
    if start + before >= skipped_until:
        return shown
    skipped = (wall - before for wall in walls(start + before, min(skipped_until, stop + before)))
    return (instant for instant, _ in groupby(merge(shown, skipped)))


class _Stretch(NamedTuple):
    """A span [start, end) in which the zone's offset to UTC is the same; `before` is the offset until its start."""

    start: int
    end: int
    before: int
    offset: int


_BLOCK = 400 * _DAY
_STEP = 2 * _DAY


def _stretch_at(zone: str, instant: int) -> _Stretch:
    return next(stretch for stretch in _stretches(zone, instant // _BLOCK) if instant < stretch.end)


@lru_cache(maxsize=4096)
def _stretches(zone: str, block: int) -> tuple[_Stretch, ...]:
    """The stretches that a block of time consists of; the last one ends with the block, whether the offset changes there or not.

    The step before the block finds a clock change that came shortly before and moves something into it.
    """
    info = ZoneInfo(zone)
    start, last = block * _BLOCK - _STEP, (block + 1) * _BLOCK
    before = offset = _offset(info, start)
    stretches = []
    for step in range(start, last, _STEP):
        while _offset(info, step + _STEP) != offset:
            changed = _first_change(info, max(step, start), step + _STEP)
            stretches.append(_Stretch(start, changed, before, offset))
            start, before, offset = changed, offset, _offset(info, changed)
    stretches.append(_Stretch(start, last, before, offset))
    return tuple(stretch for stretch in stretches if stretch.end > block * _BLOCK)


def _first_change(zone: ZoneInfo, same: int, changed: int) -> int:
    """The instant after `same` and up to `changed`, whose offset is another one, at which the offset changes."""
    offset = _offset(zone, same)
    while changed - same > 1:
        middle = (same + changed) // 2
        if _offset(zone, middle) == offset:
            same = middle
        else:
            changed = middle
    return changed


def _offset(zone: ZoneInfo, instant: int) -> int:
    offset = datetime.fromtimestamp(instant, zone).utcoffset()
    assert offset is not None
    return int(offset.total_seconds())


# --- the wall times of a schedule ------------------------------------------------------------------------------------


def _walls(schedule: Schedule) -> _Walls:
    if isinstance(schedule, Cron):
        return lambda start, stop: _cron(schedule.expression, start, stop)
    n, hour, minute = schedule.value, schedule.at_time.hour, schedule.at_time.minute
    time_of_day = hour * _HOUR + minute * _MINUTE
    match schedule.type:
        case IntervalType.HOURLY:
            return lambda start, stop: _every(n * _HOUR, time_of_day, start, stop)
        case IntervalType.DAILY:
            return lambda start, stop: _every(n * _DAY, time_of_day, start, stop)
        case IntervalType.WEEKLY:
            day = _FIRST_MONDAY + _WEEKDAY[schedule.weekday or Weekday.MONDAY]
            return lambda start, stop: _every(n * 7 * _DAY, day * _DAY + time_of_day, start, stop)
        case IntervalType.MONTHLY:
            return lambda start, stop: _months(n, schedule.day_of_month or 1, time_of_day, start, stop)
        case IntervalType.MINUTELY:
            raise AssertionError("a minutely interval has no wall times")


def _minutes(schedule: Interval, start: int, stop: int) -> range:
    return _every(schedule.value * _MINUTE, 0, start, stop)


def _every(step: int, phase: int, start: int, stop: int) -> range:
    return range(start + (phase - start) % step, stop, step)


def _months(n: int, day_of_month: int, time_of_day: int, start: int, stop: int) -> Iterator[int]:
    first = date.fromordinal(_EPOCH_DAY + start // _DAY)
    number = (first.year - 1970) * 12 + first.month - 1
    for candidate in count(number + -number % n, n):
        year, month = 1970 + candidate // 12, 1 + candidate % 12
        day = date(year, month, min(day_of_month, monthrange(year, month)[1]))
        wall = (day.toordinal() - _EPOCH_DAY) * _DAY + time_of_day
        if wall >= stop:
            return
        if wall >= start:
            yield wall


def _cron(expression: str, start: int, stop: int) -> Iterator[int]:
    minute, hour, days = expression.split(maxsplit=2)
    times = _cron_times(minute, hour)
    day = _cron_day(days, start // _DAY)
    while day is not None and (midnight := day * _DAY) < stop:
        for time in times[bisect_left(times, start - midnight) : bisect_left(times, stop - midnight)]:
            yield midnight + time
        day = _cron_day(days, day + 1)


@lru_cache(maxsize=1024)
def _cron_times(minute: str, hour: str) -> tuple[int, ...]:
    """The times of a matching day, in seconds since midnight."""
    times = []
    for due in CronSim(f"{minute} {hour} * * *", _EPOCH - timedelta(seconds=1)):
        if due.date() > _EPOCH.date():
            break
        times.append(due.hour * _HOUR + due.minute * _MINUTE)
    return tuple(times)


@lru_cache(maxsize=16_384)
def _cron_day(days: str, day: int) -> int | None:
    """The first matching day from `day` on, both in days since 1970-01-01; None if 50 years have none."""
    before = _EPOCH + timedelta(days=day, seconds=-1)
    due = next(CronSim(f"0 0 {days}", before), None)
    return None if due is None else due.toordinal() - _EPOCH_DAY
