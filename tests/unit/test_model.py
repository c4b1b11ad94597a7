"""The values: what they accept, what they refuse and in which words, and the arithmetic that planning rests on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from taskplatform.errors import InvalidInput
from taskplatform.faults import did_you_mean, explain
from taskplatform.model import (
    MAX_PARAMS_BYTES,
    TERMINAL_STATES,
    TRANSITIONS,
    AtTime,
    Backoff,
    CatchUp,
    Cron,
    Definition,
    Host,
    HttpConfig,
    Interval,
    IntervalType,
    JobState,
    Limit,
    LimitRule,
    RateLimit,
    Schedule,
    ScheduleOverride,
    Weekday,
    check_definition_id,
    check_host,
    check_user_id,
    format_duration,
    format_ms,
    format_rate,
    moment,
    parse_duration,
    planned_job_id,
    schedule_from_json,
    schedule_to_json,
    slot,
    span_text,
)

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
LONGEST_MS = 366 * 86_400_000


def faults(model: type[BaseModel], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `explain` says about `values`, with places as dotted text."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    return [(".".join(map(str, place)), message) for place, message in explain(caught.value, model)]


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["u", "4711", "a.b_c@d+e-f", "x" * 128])
def test_user_id_is_accepted(user: str) -> None:
    assert check_user_id(user) == user


@pytest.mark.parametrize("user", ["", "-a", "a b", "a:b", "ü", "a\n", "x" * 129, 7, None])
def test_user_id_is_refused(user: object) -> None:
    with pytest.raises(InvalidInput, match="1 to 128 characters"):
        check_user_id(user)


@pytest.mark.parametrize("definition", ["a", "a_1", "x" * 64])
def test_definition_id_is_accepted(definition: str) -> None:
    assert check_definition_id(definition) == definition


@pytest.mark.parametrize("definition", ["", "A", "1a", "_a", "a-b", "a:b", "a\n", "x" * 65, None])
def test_definition_id_is_refused(definition: object) -> None:
    with pytest.raises(InvalidInput, match="1 to 64 characters"):
        check_definition_id(definition)


# --- durations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("500ms", SECOND / 2),
        ("90s", 90 * SECOND),
        ("1.5s", 1.5 * SECOND),
        ("10m", 10 * MINUTE),
        ("2h", 2 * HOUR),
        ("1d", DAY),
        ("1h30m", 90 * MINUTE),
        ("1d2h3m4s5ms", DAY + 2 * HOUR + 3 * MINUTE + 4 * SECOND + SECOND / 200),
        (" 5s ", 5 * SECOND),
        ("366d", 366 * DAY),
        (90, 90 * SECOND),
        (0.25, SECOND / 4),
        (0, timedelta()),
        (MINUTE, MINUTE),
        # whole milliseconds, since instants are
        ("0.0004s", timedelta()),
        (0.0006, SECOND / 1000),
    ],
)
def test_duration_is_read(written: object, meant: timedelta) -> None:
    assert parse_duration(written) == meant


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("", "is not a duration such as"),
        ("  ", "is not a duration such as"),
        ("10", "is not a duration such as"),
        ("10 m", "is not a duration such as"),
        ("1m1h", "is not a duration such as"),
        ("1.5m", "is not a duration such as"),
        ("-1s", "is not a duration such as"),
        ("12:30", "is not a duration such as"),
        ("٣s", "is not a duration such as"),
        (None, "is not a duration such as"),
        (True, "is not a duration such as"),
        ([], "is not a duration such as"),
        ("367d", "from 0 to 366 days"),
        ("9" * 400 + "s", "from 0 to 366 days"),
        (-1, "from 0 to 366 days"),
        (math.inf, "from 0 to 366 days"),
        (math.nan, "from 0 to 366 days"),
        (10**400, "from 0 to 366 days"),
        (-SECOND, "from 0 to 366 days"),
        (367 * DAY, "from 0 to 366 days"),
    ],
)
def test_duration_is_refused(written: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_duration(written)


@given(st.integers(0, LONGEST_MS))
def test_duration_survives_being_written(milliseconds: int) -> None:
    duration = timedelta(milliseconds=milliseconds)
    assert parse_duration(format_duration(duration)) == duration


@given(st.floats(0, LONGEST_MS / 1000))
def test_a_number_of_seconds_is_read_to_the_millisecond(seconds: float) -> None:
    duration = parse_duration(seconds)
    assert abs(duration.total_seconds() - seconds) <= 0.000_501
    assert parse_duration(format_duration(duration)) == duration


@pytest.mark.parametrize("text", ["15563384932d2604821h64090694m694ms", "1000000000d", "9" * 400 + "d", "367d", "366d1ms"])
def test_a_duration_of_any_length_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="is out of range, from 0 to 366 days are accepted"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("duration", "text"), [(timedelta(), "0s"), (90 * SECOND, "1m30s"), (DAY + SECOND / 1000, "1d1ms"), (36 * HOUR, "1d12h")]
)
def test_duration_is_written(duration: timedelta, text: str) -> None:
    assert format_duration(duration) == text
    assert format_ms(duration / timedelta(milliseconds=1)) == text


@pytest.mark.parametrize(
    ("span_ms", "text"),
    [
        (0, "0 ms"),
        (0.4, "0 ms"),
        (450, "450 ms"),
        (999.4, "999 ms"),
        (999.6, "1.0 s"),
        (1000, "1.0 s"),
        (3249, "3.2 s"),
        (9949, "9.9 s"),
        (9950, "10 s"),
        (10_400, "10 s"),
        (59_499, "59 s"),
        (59_500, "1 min"),
        (90_000, "1 min 30 s"),
        (3_599_999, "1 h"),
        (3_600_000 + 1000, "1 h 1 s"),
        (2 * 3_600_000 + 5 * 60_000 + 59_000, "2 h 5 min"),
        (86_400_000, "1 day"),
        (3 * 86_400_000 + 4 * 3_600_000, "3 days 4 h"),
        (1234 * 86_400_000, "1,234 days"),
    ],
)
def test_a_span_is_written_for_people_as_exact_as_its_size_needs(span_ms: float, text: str) -> None:
    assert span_text(span_ms) == text


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "per_second"), [("10/s", 10), ("90/m", 1.5), ("5400/h", 1.5), ("86400/d", 1), ("0.5/s", 0.5), ("1000000/s", 1e6)]
)
def test_rate_per_second(rate: str, per_second: float) -> None:
    assert RateLimit.model_validate(rate).per_second == pytest.approx(per_second)
    assert RateLimit.model_validate(format_rate(per_second)).per_second == pytest.approx(per_second)


@pytest.mark.parametrize(
    ("rate", "burst"),
    [("10/s", 2), (" 10/s ", 2), ("11/s", 3), ("1/s", 2), ("0.5/s", 1), ("100/m", 2), ("600/m", 2), ("20/d", 1), ("1000000/s", 100_001)],
)
def test_the_burst_of_a_rate_without_one_lets_the_whole_rate_be_used(rate: str, burst: int) -> None:
    assert RateLimit.model_validate(rate).burst == RateLimit.model_validate({"rate": rate}).burst == burst
    limit = LimitRule.model_validate(rate).limit
    assert limit.burst == burst
    # a rate below 1/s with a burst of 2 would let two go at once that shall be minutes apart
    assert limit.sustained == pytest.approx(limit.per_second, rel=1e-9 if (limit.per_second or 0) >= 1 else 0.1)


@pytest.mark.parametrize(
    ("limit", "tokens_per_start", "capacity", "sustained"),
    [
        (Limit(10, 15), 1, 14, 10),
        (Limit(10, 2), 1, 1, 10),
        (Limit(10, 1), 2, 2, 5),
        (Limit(100, 1), 11, 11, 100 / 11),
        (Limit(1 / 3600, 1), 1.0000278, 1.0000278, 1 / 3600.1),
        (Limit(concurrency=3), 1, 1, None),
    ],
)
def test_what_a_burst_keeps_back_for_late_calls(limit: Limit, tokens_per_start: float, capacity: float, sustained: float | None) -> None:
    assert limit.tokens_per_start == pytest.approx(tokens_per_start)
    assert limit.capacity == pytest.approx(capacity)
    assert limit.sustained == pytest.approx(sustained)


def test_a_burst_that_is_given_stays() -> None:
    assert RateLimit.model_validate({"rate": "10/s", "burst": 1}).burst == 1
    assert RateLimit.model_validate_json(RateLimit(rate="10/s", burst=15).model_dump_json()).burst == 15


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(10, "10/s"), (1, "1/s"), (0.5, "30/m"), (100 / 60, "100/m"), (1 / 3600, "1/h"), (20 / 86_400, "20/d"), (2.5, "150/m")],
)
def test_a_rate_is_written_by_the_shortest_unit_that_fits(per_second: float, text: str) -> None:
    assert format_rate(per_second) == text


@pytest.mark.parametrize(
    "rate", ["", "10", "10/w", "10 / s", "-1/s", "1e3/s", "٣/s", "10/s/s", "0/s", "0.0/d", "1000001/s", "0.001/d", "9" * 400 + "/s"]
)
@pytest.mark.parametrize("model", [RateLimit, LimitRule])
def test_rate_is_refused(model: type[BaseModel], rate: str) -> None:
    [(place, message)] = faults(model, {"rate": rate})
    assert place == "rate"
    assert repr(rate) in message


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        ("10/s", Limit(10, 2)),
        ({"rate": "90/m"}, Limit(1.5, 2)),
        ({"rate": "10/s", "burst": 15}, Limit(10, 15)),
        ({"rate": "10/s", "burst": "15", "concurrency": "4"}, Limit(10, 15, 4)),
        ({"concurrency": 4}, Limit(concurrency=4)),
    ],
)
def test_a_limit_as_people_write_it(rule: object, limit: Limit) -> None:
    assert LimitRule.model_validate(rule).limit == limit


@pytest.mark.parametrize(
    ("rule", "place", "problem"),
    [
        ({}, "", "takes rate, concurrency, or both"),
        ({"burst": 3}, "", "takes rate, concurrency, or both"),
        ({"burst": 3, "concurrency": 2}, "burst", "goes with rate"),
        ({"rate": "10/s", "burst": 0}, "burst", "got 0; it takes a whole number from 1 to 1000000"),
        ({"concurrency": 0}, "concurrency", "got 0; it takes a whole number from 1 to 1000000"),
        ({"concurrency": 1.5}, "concurrency", "got 1.5; it takes a whole number"),
        ({"rate": 10}, "rate", "got 10; it takes text (count per second, minute, hour or day"),
        ({"rate": "10/s", "concurency": 4}, "concurency", 'is not a known field (did you mean "concurrency"?)'),
    ],
)
def test_a_limit_is_refused(rule: dict[str, Any], place: str, problem: str) -> None:
    [(found, message)] = faults(LimitRule, rule)
    assert found == place
    assert problem in message


def test_a_fault_inside_a_mapping_of_limits_is_told_where_it_is() -> None:
    class Limits(BaseModel):
        by_host: dict[Host, LimitRule] = Field(default_factory=dict, description="a limit for each host")

    values = {"Api": "5/s", "b": {"rate": "5/s", "burst": 0}, "c": [], "d": {"rate": "fast"}}
    found = dict(faults(Limits, {"by_host": values}))
    assert list(found) == ["by_host.Api", "by_host.b.burst", "by_host.c", "by_host.d.rate"]
    assert """host 'Api' is not accepted (did you mean "api"?); a host is given without scheme""" in found["by_host.Api"]
    assert found["by_host.c"].endswith("or a mapping with rate, burst, concurrency")
    assert faults(Limits, {"by_host": "5/s"}) == [("by_host", 'got "5/s"; it takes a mapping (a limit for each host)')]


@pytest.mark.parametrize("host", ["api.example.com", "localhost:8000", "my_api", "127.0.0.1", "[::1]", "[::1]:8080"])
def test_host_is_accepted(host: str) -> None:
    assert check_host(host) == host


@pytest.mark.parametrize(
    ("host", "meant"),
    [
        ("Api.Example.com", "api.example.com"),
        (" api.example.com", "api.example.com"),
        ("https://api.example.com", "api.example.com"),
        ("https://api.example.com:443/v1", "api.example.com"),
        ("http://user@api.example.com:8080/", "api.example.com:8080"),
        ("api.example.com/v1", "api.example.com"),
        ("a b", None),
        ("*.example.com", None),
        ("api:port", None),
        ("ü", None),
        ("", None),
        (None, None),
        (7, None),
    ],
)
def test_host_is_refused(host: object, meant: str | None) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_host(host)
    hint = f' (did you mean "{meant}"?)' if meant else ""
    assert str(caught.value).startswith(f"host {host!r} is not accepted{hint}; a host is given without scheme and path, in lower case")


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ({"type": "daily", "weekday": "monday"}, [("weekday", "goes with type weekly, not daily")]),
        ({"type": "weekly", "day_of_month": 3}, [("day_of_month", "goes with type monthly, not weekly")]),
        ({"type": "minutely", "at_time": {"minute": 0}}, [("at_time", "does not go with type minutely")]),
        (
            {"type": "minutely", "at_time": {}, "weekday": "friday", "day_of_month": 1},
            [("weekday", "weekly"), ("day_of_month", "monthly"), ("at_time", "minutely")],
        ),
        ({"type": "yearly"}, [("type", "one of minutely, hourly, daily, weekly, monthly")]),
        ({}, [("type", "is missing; it takes one of minutely")]),
        ({"type": "weekly", "weekday": "mondy"}, [("weekday", 'did you mean "monday"?')]),
        ({"type": "daily", "value": 0}, [("value", "got 0; it takes a whole number from 1 to 1000")]),
        ({"type": "daily", "at_time": {"hour": 24, "minute": 60}}, [("at_time.hour", "from 0 to 23"), ("at_time.minute", "from 0 to 59")]),
        ({"type": "daily", "timezone": "Europe/Berln"}, [("timezone", 'did you mean "Europe/Berlin"?')]),
        ({"type": "daily", "timezone": "europe/berlin"}, [("timezone", 'did you mean "Europe/Berlin"?')]),
        ({"type": "daily", "day": 1}, [("day", "is not a known field")]),
    ],
)
def test_interval_is_refused(interval: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = faults(Interval, interval)
    assert [place for place, _ in found] == [place for place, _ in expected]
    for (_, message), (_, part) in zip(found, expected, strict=True):
        assert part in message


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("* * * *", "does not have the five fields"),
        ("0 * * * * *", "does not have the five fields"),
        ("@daily", "does not have the five fields"),
        ("60 * * * *", "is not a cron expression"),
        ("x * * * *", "is not a cron expression"),
        ("0 0 30 2 *", "is not a cron expression"),
    ],
)
def test_cron_is_refused(expression: str, problem: str) -> None:
    [(place, message)] = faults(Cron, {"expression": expression})
    assert place == "expression"
    assert problem in message


def test_short_forms_stand_for_the_first_field() -> None:
    assert Cron.model_validate("0 9 * * mon") == Cron(expression="0 9 * * mon")
    assert CatchUp.model_validate("skip") == CatchUp(policy="skip")


intervals = st.builds(
    Interval,
    type=st.sampled_from([IntervalType.HOURLY, IntervalType.DAILY]),
    value=st.integers(1, 1000),
    timezone=st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kathmandu"]),
    at_time=st.builds(AtTime, hour=st.integers(0, 23), minute=st.integers(0, 59)),
) | st.one_of(
    st.builds(Interval, type=st.just(IntervalType.MINUTELY), value=st.integers(1, 1000)),
    st.builds(Interval, type=st.just(IntervalType.WEEKLY), weekday=st.none() | st.sampled_from(Weekday)),
    st.builds(Interval, type=st.just(IntervalType.MONTHLY), day_of_month=st.none() | st.integers(1, 31)),
)
crons = st.builds(Cron, expression=st.sampled_from(["* * * * *", "*/15 9-17 * * mon-fri"]), timezone=st.sampled_from(["UTC", "Asia/Tokyo"]))


@given(intervals | crons)
def test_schedule_survives_json(schedule: Schedule) -> None:
    assert schedule_from_json(schedule_to_json(schedule)) == schedule


@given(intervals | crons)
def test_equal_schedules_give_equal_json(schedule: Schedule) -> None:
    """However they were written: here, with every default given."""
    spelled_out = schedule.model_dump()
    if isinstance(schedule, Interval) and schedule.type is IntervalType.MINUTELY:
        del spelled_out["at_time"]
    assert schedule_to_json(type(schedule).model_validate(spelled_out)) == schedule_to_json(schedule)


@given(intervals | crons, intervals | crons)
def test_different_schedules_give_different_json(one: Schedule, other: Schedule) -> None:
    assert (schedule_to_json(one) == schedule_to_json(other)) == (one == other)


DAILY = Interval(type="daily", value=2, timezone="Europe/Berlin", at_time={"hour": 9})


@pytest.mark.parametrize(
    ("override", "schedule", "expected"),
    [
        ({"timezone": "UTC"}, DAILY, Interval(type="daily", value=2, timezone="UTC", at_time={"hour": 9})),
        ({"at_time": {"minute": 5}}, DAILY, Interval(type="daily", value=2, timezone="Europe/Berlin", at_time={"minute": 5})),
        (
            {"timezone": "UTC", "at_time": {"hour": 1}},
            Interval(type="weekly", weekday="friday"),
            Interval(type="weekly", weekday="friday", timezone="UTC", at_time={"hour": 1}),
        ),
        ({"interval": {"type": "hourly"}}, DAILY, Interval(type="hourly")),
        ({"cron": "0 9 * * *"}, DAILY, Cron(expression="0 9 * * *")),
        ({"timezone": "Asia/Tokyo"}, Cron(expression="0 9 * * *"), Cron(expression="0 9 * * *", timezone="Asia/Tokyo")),
        ({"timezone": "Asia/Tokyo"}, Interval(type="minutely", value=5), Interval(type="minutely", value=5, timezone="Asia/Tokyo")),
    ],
)
def test_override_gives_the_schedule_in_effect(override: dict[str, Any], schedule: Schedule, expected: Schedule) -> None:
    assert ScheduleOverride.model_validate(override).apply(schedule) == expected


@given(intervals | crons)
def test_override_of_the_zone_can_be_undone(schedule: Schedule) -> None:
    moved = ScheduleOverride(timezone="America/New_York").apply(schedule)
    assert moved.timezone == "America/New_York"
    assert ScheduleOverride(timezone=schedule.timezone).apply(moved) == schedule


@pytest.mark.parametrize("schedule", [Cron(expression="0 9 * * *"), Interval(type="minutely", value=5)])
def test_override_of_the_time_of_day_does_not_fit_everything(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="at_time does not go with"):
        ScheduleOverride(at_time=AtTime(hour=0)).apply(schedule)


@pytest.mark.parametrize(
    "override",
    [
        {"interval": {"type": "daily"}, "cron": "0 9 * * *"},
        {"interval": {"type": "daily"}, "timezone": "UTC"},
        {"cron": "0 9 * * *", "at_time": {"hour": 1}},
    ],
)
def test_override_is_refused(override: dict[str, Any]) -> None:
    assert faults(ScheduleOverride, override)


# --- backoff ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backoff", "attempt", "delay"),
    [
        ({"base": "10s", "cap": "1m"}, 1, 10 * SECOND),
        ({"base": "10s", "cap": "1m"}, 2, 20 * SECOND),
        ({"base": "10s", "cap": "1m"}, 3, 40 * SECOND),
        ({"base": "10s", "cap": "1m"}, 4, MINUTE),
        ({"base": "10s", "cap": "1m"}, 1000, MINUTE),
        ({"base": "10s", "cap": "10s"}, 1, 10 * SECOND),
        # a worker was lost before its first run began
        ({"base": "10s", "cap": "1m"}, 0, 10 * SECOND),
        # more than a timedelta can hold, if it were multiplied out
        ({"base": "1h", "cap": "366d"}, 101, 366 * DAY),
        ({"base": "100d", "cap": "366d"}, 2, 200 * DAY),
        ({"base": "1ms", "cap": "366d"}, 101, 366 * DAY),
        ({"strategy": "fixed", "base": "10s"}, 1, 10 * SECOND),
        ({"strategy": "fixed", "base": "10s"}, 50, 10 * SECOND),
        # the default cap of 10 minutes does not shorten a base that was given
        ({"strategy": "fixed", "base": "1h"}, 2, HOUR),
        ({"base": "1h"}, 1, HOUR),
        ({"base": "1h"}, 5, HOUR),
        ({}, 1, 10 * SECOND),
        ({}, 20, 10 * MINUTE),
    ],
)
def test_backoff_without_jitter(backoff: dict[str, Any], attempt: int, delay: timedelta) -> None:
    assert Backoff(**backoff, jitter=False).delay(attempt) == delay


@pytest.mark.parametrize(("share", "part"), [(0.0, 0.5), (0.5, 0.75), (0.999_999, 1.0)])
def test_half_jitter_takes_from_half_to_the_whole(share: float, part: float) -> None:
    delay = Backoff(base="100s", jitter="half").delay(2, random_share=share)
    assert delay.total_seconds() == pytest.approx(200 * part, rel=1e-5)


@pytest.mark.parametrize(("share", "seconds"), [(0.0, 0), (0.25, 50), (0.999_999, 200)])
def test_full_jitter_takes_from_nothing_to_the_whole(share: float, seconds: float) -> None:
    assert Backoff(base="100s").delay(2, random_share=share).total_seconds() == pytest.approx(seconds, rel=1e-5)
    assert Backoff(strategy="fixed", base="200s", jitter="full").delay(9, random_share=share).total_seconds() == pytest.approx(
        seconds, rel=1e-5
    )


@pytest.mark.parametrize(("written", "meant"), [(True, "full"), (False, "none"), ("half", "half"), ("none", "none")])
def test_jitter_can_be_written_as_true_or_false(written: Any, meant: str) -> None:
    assert Backoff(jitter=written).jitter == meant


def test_jitter_is_random_and_within_its_bounds() -> None:
    delays = [Backoff(base="100s").delay(1) for _ in range(200)]
    assert len(set(delays)) > 100
    assert all(timedelta() <= delay <= 100 * SECOND for delay in delays)
    assert min(delays) < 50 * SECOND < max(delays)


@given(st.integers(1, 200), st.integers(1, 86_400), st.integers(0, 86_400), st.floats(0, 1, exclude_max=True))
def test_delays_never_shrink_from_one_attempt_to_the_next_and_stay_under_the_cap(attempt: int, base: int, more: int, share: float) -> None:
    backoff = Backoff(base=base, cap=base + more)
    this, following = (backoff.delay(number, random_share=share) for number in (attempt, attempt + 1))
    assert backoff.base * share * 0.999 <= this <= following <= backoff.cap


def test_cap_below_base_is_refused() -> None:
    assert faults(Backoff, {"base": "1h", "cap": "1m"}) == [("cap", "cap is 1m, shorter than base, 1h")]


# --- slots and moments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "definition", "expected"),
    [("user1", "hourly_data_sync", 0x8B38799ADB00E / 2**52), ("4711", "weekly_analytics", 0x33A3B3DC39F88 / 2**52)],
)
def test_slot_never_changes(user: str, definition: str, expected: float) -> None:
    """The store holds slots: another value here would move every user within every window."""
    assert slot(user, definition) == expected


@given(st.text(), st.text())
def test_slot_is_a_share_of_the_window(user: str, definition: str) -> None:
    assert 0 <= slot(user, definition) < 1


def test_slot_separates_user_from_definition() -> None:
    assert slot("ab", "c") != slot("a", "bc")


def test_slots_are_spread_evenly() -> None:
    users, buckets = 20_000, 20
    for definition in ("hourly_data_sync", "weekly_analytics"):
        counts = [0] * buckets
        for number in range(users):
            counts[int(slot(f"user{number}", definition) * buckets)] += 1
        expected = users / buckets
        # 19 degrees of freedom: 43.8 is passed once in a thousand
        assert sum((count - expected) ** 2 / expected for count in counts) < 43.8


def test_slots_of_a_user_in_two_definitions_are_not_related() -> None:
    users = range(20_000)
    nearby = sum(abs(slot(f"u{number}", "one") - slot(f"u{number}", "two")) < 0.1 for number in users)
    # of two independent shares, 19 % are less than a tenth apart
    assert nearby / len(users) == pytest.approx(0.19, abs=0.015)


@pytest.mark.parametrize(
    ("occurrence", "slot_", "window", "expected"),
    [(1000, 0.0, 60_000, 1000), (1000, 0.5, 60_000, 31_000), (1000, 1 - 2**-52, 60_000, 60_999), (1000, 0.99, 0, 1000), (0, 0.25, 10, 2)],
)
def test_moment(occurrence: int, slot_: float, window: int, expected: int) -> None:
    assert moment(occurrence, slot_, window) == expected


@given(st.integers(0, 4_102_444_800_000), st.integers(0, 2**52 - 1), st.integers(1, LONGEST_MS))
def test_moment_lies_in_the_window(occurrence: int, slot_: int, window: int) -> None:
    assert occurrence <= moment(occurrence, slot_ / 2**52, window) < occurrence + window


def test_planned_job_id_tells_definition_user_and_occurrence() -> None:
    assert planned_job_id("weekly_analytics", "4711", 1_700_000_000_000) == "weekly_analytics:4711:1700000000000"


# --- states ----------------------------------------------------------------------------------------------------------


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == {None, *JobState}


def test_terminal_states_are_left_by_hand_alone_and_only_for_pending() -> None:
    for state in TERMINAL_STATES:
        assert TRANSITIONS[state] <= {JobState.PENDING}, state
        assert state.terminal
    assert TRANSITIONS[JobState.COMPLETED] == frozenset()


def test_every_other_state_can_end() -> None:
    for state in set(JobState) - TERMINAL_STATES:
        assert not state.terminal
        assert TRANSITIONS[state] & {JobState.CANCELED, JobState.FAILED}, state


def test_every_state_can_be_reached_and_none_follows_itself() -> None:
    reached: set[JobState] = set()
    front: set[JobState | None] = {None}
    while front:
        following = set().union(*(TRANSITIONS[state] for state in front))
        front = set(following - reached)
        reached |= following
    assert reached == set(JobState)
    assert not any(state in following for state, following in TRANSITIONS.items())


def test_nothing_runs_but_what_was_assigned_and_nothing_is_assigned_but_what_was_queued() -> None:
    def before(target: JobState) -> set[JobState | None]:
        return {state for state, following in TRANSITIONS.items() if target in following}

    assert before(JobState.RUNNING) == {JobState.ASSIGNED}
    assert before(JobState.ASSIGNED) == {JobState.QUEUED}
    assert before(JobState.QUEUED) == {JobState.PENDING, JobState.RETRYING}
    assert before(JobState.COMPLETED) == {JobState.RUNNING}


# --- HTTP calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://api.example.com/analytics/weekly",
        "http://[::1]:8080/x",
        "http://${HOST}:${PORT}/x",
        "${API_BASE_URL}",
        "${API_BASE_URL}/u/{{user}}?q={{params.q}}",
        "${API_BASE_URL}?u={{user}}",
        "https://api.example.com/{{ user }}",
    ],
)
def test_endpoint_is_accepted(endpoint: str) -> None:
    assert HttpConfig(endpoint=endpoint).endpoint == endpoint


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        ("", "http or https URL"),
        ("api.example.com/x", "is not an http or https URL"),
        ("ftp://api.example.com/x", "is not an http or https URL"),
        ("https://", "is not an http or https URL"),
        ("http://[::1/x", "is not an http or https URL"),
        ("http://host:port/x", "is not an http or https URL"),
        ("http://host:99999/x", "is not an http or https URL"),
        ("https://{{params.host}}/x", "the host cannot come from the job"),
        ("https://api.example.com{{params.path}}", "the host cannot come from the job"),
        # what follows the variable would go on with its host: https://api.example.com + .evil.org/
        ("${API_BASE_URL}{{params.path}}", "the host cannot come from the job"),
        ("${API_BASE_URL}:{{params.port}}/x", "the host cannot come from the job"),
        ("${API_BASE_URL}@{{params.host}}/x", "the host cannot come from the job"),
        ("https://h/{{usr}}", "{{usr}} is not known"),
        ("https://h/{{params}}", "{{params}} is not known"),
        ("https://h/${A-B}", "${A-B} is not the name of an environment variable"),
    ],
)
def test_endpoint_is_refused(endpoint: str, problem: str) -> None:
    [(place, message)] = faults(HttpConfig, {"endpoint": endpoint})
    assert place == "endpoint"
    assert problem in message


def test_all_faults_of_a_call_are_told_where_they_are() -> None:
    body = {"a": ["{{x}}", {"b": "${1}"}], "{{k}}": 1}
    found = faults(HttpConfig, {"endpoint": "ftp://h", "headers": {"A B": "x", "C": "1\n2", "D": "{{y}}"}, "body": body})
    assert [place for place, _ in found] == ["endpoint", "headers.A B", "headers.C", "headers.D", "body.a.0", "body.a.1.b", "body.{{k}}"]


def test_names_that_a_call_takes_from_outside() -> None:
    config = HttpConfig(
        endpoint="${BASE}/{{user}}/{{params.a}}", headers={"X": "${TOKEN}{{job_id}}"}, body=["{{params.b}}", {"{{params.c}}": "${BASE}"}]
    )
    assert config.environment_names == {"BASE", "TOKEN"}
    assert config.param_names == {"a", "b", "c"}


def test_method_in_any_case() -> None:
    assert HttpConfig(endpoint="http://h/", method="get").method == "GET"


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [
        ("https://api.example.com/v1", "api.example.com"),
        ("https://API.Example.com:443/v1", "api.example.com"),
        ("http://api.example.com:80", "api.example.com"),
        ("http://api.example.com:443/", "api.example.com:443"),
        ("https://api.example.com:8443?u={{user}}", "api.example.com:8443"),
        ("https://user:secret@api.example.com/", "api.example.com"),
        ("http://[::1]/x", "[::1]"),
        ("http://[2001:DB8::1]:8080/x", "[2001:db8::1]:8080"),
        ("https://h/{{ params.a }}/{{user}}", "h"),
        ("${BASE}/{{user}}", "api.example.com:8080"),
        ("${BASE}", "api.example.com:8080"),
        ("http://${HOST}:${PORT}/x", "h:81"),
        ("http://${HOST}.${HOST}/x", "h.h"),
        # not known here, or no URL
        ("${UNKNOWN}/x", None),
        ("http://${HOST}:${UNKNOWN}/x", None),
        ("http://${HOST}:${HOST}/x", None),
        ("${HOST}/x", None),
        ("${EMPTY}/x", None),
    ],
)
def test_the_host_that_is_called(endpoint: str, host: str | None) -> None:
    environment = {"BASE": "http://Api.example.com:8080/v1", "HOST": "h", "PORT": "81", "EMPTY": ""}
    found = HttpConfig(endpoint=endpoint).host(environment)
    assert found == host
    assert found is None or check_host(found) == found


# --- definitions -----------------------------------------------------------------------------------------------------

HTTP = {"id": "x", "name": "X", "interval": {"type": "daily"}, "config": {"endpoint": "http://h/"}}
CALL = {"id": "x", "name": "X", "cron": "0 9 * * *", "call": "tasks.module:function"}


@pytest.mark.parametrize(
    ("base", "change", "place", "problem"),
    [
        (HTTP, {"id": "X"}, "id", "1 to 64 characters"),
        (HTTP, {"id": "x" * 65}, "id", "1 to 64 characters"),
        (HTTP, {"id": None}, "id", "got nothing; it takes text"),
        (HTTP, {"name": "  "}, "name", "it takes text"),
        (HTTP, {"name": "x" * 201}, "name", "at most 200 characters"),
        (HTTP, {"cron": "0 9 * * *"}, "", "exactly one of interval and cron"),
        (HTTP, {"interval": None}, "", "exactly one of interval and cron"),
        (HTTP, {"call": "a:b"}, "", "exactly one of config (an HTTP call) and call"),
        (HTTP, {"config": None}, "", "exactly one of config (an HTTP call) and call"),
        (CALL, {"call": "tasks.module"}, "call", 'is not of the form "package.module:function"'),
        (CALL, {"call": "tasks/module:function"}, "call", 'is not of the form "package.module:function"'),
        (HTTP, {"priority": "urgent"}, "priority", "one of high, medium, low"),
        (HTTP, {"timeout": 0}, "timeout", "must be longer than 0"),
        (HTTP, {"timeout": "0.0004s"}, "timeout", "must be longer than 0"),
        (HTTP, {"timeout": "soon"}, "timeout", "is not a duration such as"),
        (HTTP, {"max_duration": "6m"}, "max_duration", "longer than timeout"),
        (HTTP, {"config": {"endpoint": "http://h/", "max_duration": "6m"}}, "config.max_duration", "longer than timeout"),
        (HTTP, {"retries": 101}, "retries", "a whole number from 0 to 100"),
        (HTTP, {"retries": -1}, "retries", "a whole number from 0 to 100"),
        (HTTP, {"overlap": "queue"}, "overlap", "one of allow, skip"),
        (HTTP, {"catch_up": "some"}, "catch_up.policy", "one of skip, latest, all"),
        (HTTP, {"catch_up": 5}, "catch_up", "it takes one of skip, latest, all or a mapping with policy, window"),
        (HTTP, {"rate_limit": 5}, "rate_limit", "or a mapping with rate (needed), burst"),
        (HTTP, {"rate_limit": {"burst": 5}}, "rate_limit.rate", "is missing"),
        (HTTP, {"concurrency": 0}, "concurrency", "got 0; it takes a whole number from 1 to 1000000"),
        (HTTP, {"concurrency": "some"}, "concurrency", 'got "some"; it takes a whole number from 1 to 1000000'),
        (HTTP, {"params": {"a": "x" * MAX_PARAMS_BYTES}}, "params", f"larger than {MAX_PARAMS_BYTES} bytes"),
        (HTTP, {"params": []}, "params", "got a list; it takes a mapping"),
        (HTTP, {"timout": "5m"}, "timout", 'did you mean "timeout"?'),
    ],
)
def test_definition_is_refused(base: dict[str, Any], change: dict[str, Any], place: str, problem: str) -> None:
    [(found_place, message)] = faults(Definition, {**base, **change})
    assert found_place == place
    assert problem in message


def test_defaults_of_a_definition() -> None:
    definition = Definition.model_validate(HTTP)
    assert definition.priority == "medium"
    assert definition.timeout == 5 * MINUTE
    assert definition.retries == 3
    assert definition.window == MINUTE
    assert definition.catch_up == CatchUp(policy="latest", window="1d")
    assert definition.overlap == "allow"
    assert definition.rate_limit is None
    assert definition.concurrency is None
    assert definition.config is not None
    assert definition.config.method == "POST"


def test_schedule_is_the_one_that_is_given() -> None:
    assert Definition.model_validate(HTTP).schedule == Interval(type="daily")
    assert Definition.model_validate(CALL).schedule == Cron(expression="0 9 * * *")


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({}, 5 * MINUTE),
        ({"max_duration": "4m"}, 4 * MINUTE),
        ({"max_duration": "4m", "config": {"endpoint": "http://h/", "max_duration": "3m"}}, 3 * MINUTE),
        ({"config": {"endpoint": "http://h/", "max_duration": "3m"}}, 3 * MINUTE),
    ],
)
def test_work_limit(change: dict[str, Any], limit: timedelta) -> None:
    assert Definition.model_validate({**HTTP, **change}).work_limit == limit


def test_missing_params() -> None:
    config = {"endpoint": "http://h/{{params.b}}/{{params.a}}/{{params.c}}"}
    definition = Definition.model_validate({**HTTP, "config": config, "params": {"c": 1}})
    assert definition.missing_params({}) == ["a", "b"]
    assert definition.missing_params({"a": 1}) == ["b"]
    assert Definition.model_validate(CALL).missing_params({}) == []


@pytest.mark.parametrize("definition", [HTTP, CALL, {**CALL, "rate_limit": "10/s", "concurrency": 4, "timeout": "90s", "catch_up": "all"}])
def test_definition_survives_json(definition: dict[str, Any]) -> None:
    whole = Definition.model_validate(definition)
    text = whole.model_dump_json()
    assert Definition.model_validate_json(text) == whole
    assert json.loads(text)["timeout"] == format_duration(whole.timeout)


def test_values_cannot_be_changed() -> None:
    definition = Definition.model_validate(HTTP)
    with pytest.raises(ValidationError, match="frozen"):
        definition.retries = 5  # type: ignore[misc]


# --- explanations ----------------------------------------------------------------------------------------------------


def test_hidden_values_are_not_quoted() -> None:
    values = {"endpoint": "http://h/", "headers": {"A": 4711}, "method": "secret"}
    with pytest.raises(ValidationError) as caught:
        HttpConfig.model_validate(values)
    open_, hidden = explain(caught.value, HttpConfig), explain(caught.value, HttpConfig, hidden=[("headers",), ("method",)])
    assert "4711" in str(open_)
    assert "SECRET" in str(open_)
    assert "4711" not in str(hidden)
    assert "SECRET" not in str(hidden)
    assert (("headers", "A"), "got a number; it takes text") in hidden


@pytest.mark.parametrize(("name", "expected"), [("priorty", "priority"), ("TIMEOUT", "timeout"), ("zzz", "")])
def test_did_you_mean(name: str, expected: str) -> None:
    assert did_you_mean(name, ["priority", "timeout"]) == (f' (did you mean "{expected}"?)' if expected else "")


def test_an_override_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="it takes interval, cron, timezone or at_time"):
        ScheduleOverride.model_validate({})
