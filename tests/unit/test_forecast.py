"""Arithmetic of a forecast, by cases that were counted by hand, and by what must hold of any."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskplatform.capacity import Demand, fit
from taskplatform.drawing import png, svg
from taskplatform.errors import InvalidInput
from taskplatform.fluid import Bucket, Pool, Stream
from taskplatform.forecast import Added, Forecast, asked_limit, read_forecast, warnings_of
from taskplatform.forecast.ahead import _Ahead
from taskplatform.forecast.evaluation import backlogs, limit_uses, spans, tracks
from taskplatform.forecast.measures import ASSUMED_SECONDS, Source, measure
from taskplatform.forecast.plot import _draw, plot_png, plot_svg, plot_text
from taskplatform.forecast.simulation import Simulation
from taskplatform.model import Definition, JobState, Limit, Priority
from taskplatform.settings import Settings
from taskplatform.store import (
    BackfillState,
    DefinitionCounts,
    Group,
    Histogram,
    KnownDefinition,
    KnownGroup,
    LimitState,
    OpenBackfill,
    OpenOccurrence,
    Outlook,
    Waiting,
    Worker,
)

SECOND, MINUTE, HOUR = 1000, 60_000, 3_600_000
HIGH, MEDIUM, LOW = Priority
#: 2027-01-15 00:00 UTC.
DAY = 1_799_971_200_000
HORIZON = timedelta(seconds=5)
ALL = frozenset(Priority)


def stream(hours: float = 1, *, start_ms: int = 0, **more: Any) -> Stream:
    return Stream(start_ms, start_ms + round(hours * HOUR), MINUTE, **more)


def flowed(found: Stream) -> Stream:
    found.advance(found.end_ms)
    return found


# --- release ---------------------------------------------------------------------------------------------------------


def test_what_no_limit_holds_goes_at_once() -> None:
    found = stream()
    lane = found.lane("report", HIGH)
    found.add(lane, 90 * SECOND, 150 * SECOND, 600)
    flowed(found)
    assert [round(one, 6) for one in lane.gone[:4]] == [0, 300, 300, 0]
    assert lane.gone.tolist() == pytest.approx(lane.planned.tolist())
    assert (max(lane.backlog), max(lane.delay)) == (0, 0)


def test_a_rate_lets_its_burst_and_then_the_rate_go() -> None:
    """600 at once under 1/s with a bucket of 60: 60 at once, and one a second after that: the last after 540 s."""
    limit = Limit(1.0, 60)
    found = stream(limits={"total": limit})
    lane = found.lane("report", HIGH)
    found.add(lane, 0, 0, 600)
    flowed(found)
    burst = limit.capacity
    assert lane.gone[0] == pytest.approx(60 + burst)
    assert lane.gone[1] == pytest.approx(60)
    assert sum(lane.gone) == pytest.approx(600)
    assert max(lane.delay) == pytest.approx((600 - burst) * SECOND, abs=1)
    (of_all,) = [one for one in backlogs(found) if one.of == "total"]
    assert (of_all.begin_ms, of_all.end_ms, of_all.open, of_all.because) == (0, 9 * MINUTE, False, ("total",))
    assert of_all.jobs == pytest.approx(600 - 60 - burst)


def test_the_higher_priority_goes_first() -> None:
    found = stream(limits={"total": Limit(1.0, 1)}, tokens={"total": 0.0})
    high, low = found.lane("first", HIGH), found.lane("second", LOW)
    found.add(low, 0, 0, 300)
    found.add(high, 2 * MINUTE, 2 * MINUTE, 120)
    flowed(found)
    rate = Limit(1.0, 1).sustained or 0
    assert low.gone[:5].tolist() == pytest.approx([60 * rate, 60 * rate, 0, 0, 0 + max(0.0, 60 * rate - (120 - 120 * rate))], abs=0.01)
    assert high.gone[2:4].tolist() == pytest.approx([60 * rate, 60 * rate], abs=0.01)


def test_inside_a_priority_the_longest_due_goes_first_and_equals_share() -> None:
    found = stream(limits={"total": Limit(1.0, 10)}, tokens={"total": 0.0})
    early, late, other = (found.lane(name, HIGH) for name in ("z", "a", "b"))
    found.add(early, 0, 0, 120)
    found.add(late, MINUTE, MINUTE, 60)
    found.add(other, MINUTE, MINUTE, 120)
    flowed(found)
    assert early.gone[:2].tolist() == pytest.approx([60, 60])
    assert late.gone[2:5].tolist() == pytest.approx([20, 20, 20], abs=0.01)
    assert other.gone[2:5].tolist() == pytest.approx([40, 40, 40], abs=0.01)


def test_who_is_at_another_limit_holds_back_nobody() -> None:
    found = stream(limits={"host:slow": Limit(0.5, 10), "total": Limit(2.0, 10)}, tokens={"host:slow": 0.0, "total": 0.0})
    slow, fast = found.lane("slow", HIGH, host="slow"), found.lane("fast", LOW, host="fast")
    found.add(slow, 0, 0, 60)
    found.add(fast, 0, 0, 180)
    flowed(found)
    assert slow.gone[:2].tolist() == pytest.approx([30, 30], abs=0.01)
    assert fast.gone[:2].tolist() == pytest.approx([90, 90], abs=0.01)


@pytest.mark.parametrize("seconds", [0.5, 5.0, 90.0])
def test_slots_carry_what_the_time_of_a_run_lets_them(seconds: float) -> None:
    """Four slots that are never idle run 4 / seconds a second, be a run shorter or longer than a step; each run holds its slot so long."""
    found = stream(hours=2, pools=[Pool(ALL, 4)])
    lane = found.lane("report", HIGH, seconds=seconds)
    found.add(lane, 0, 0, 100_000)
    flowed(found)
    assert sum(lane.gone) == pytest.approx(2 * HOUR / SECOND * 4 / seconds, rel=0.02)
    (of_all,) = [one for one in backlogs(found) if one.of == "total"]
    assert (of_all.open, of_all.because) == (True, ("workers",))


def test_retries_take_tokens_too() -> None:
    found = stream(limits={"total": Limit(1.0, 10)}, tokens={"total": 0.0})
    lane = found.lane("report", HIGH, attempts=1.5)
    found.add(lane, 0, 0, 80)
    flowed(found)
    assert lane.gone[:2].tolist() == pytest.approx([40, 40], abs=0.01)
    (total,) = tracks(found, lambda _: "total")
    assert (total.jobs, total.requests, total.peak) == pytest.approx((80, 120, 60), abs=0.02)


def test_slots_that_serve_one_queue_are_taken_first() -> None:
    found = stream(pools=[Pool(ALL, 1), Pool(frozenset({HIGH}), 1)])
    high, low = found.lane("first", HIGH, seconds=1), found.lane("second", LOW, seconds=1)
    found.add(high, 0, 10 * MINUTE, 600)
    found.add(low, 0, 10 * MINUTE, 600)
    flowed(found)
    assert max(high.backlog) == pytest.approx(0, abs=0.01)
    assert max(low.backlog) == pytest.approx(0, abs=0.01)


def test_a_host_that_is_held_gets_nothing_until_then() -> None:
    found = stream(holds={"api": 5 * MINUTE})
    lane = found.lane("report", HIGH, host="api")
    found.add(lane, 0, 0, 100)
    flowed(found)
    assert sum(lane.gone[:5]) == 0
    assert lane.gone[5] == pytest.approx(100)


def test_a_share_goes_to_each_lower_priority_that_waits() -> None:
    """A tenth of all runs for each that waits; nothing for one that waits for nothing, nor for what nobody has to share."""
    found = stream(limits={"total": Limit(10.0, 1)}, tokens={"total": 0.0}, share=0.1)
    high, medium, low = (found.lane(name, priority) for name, priority in zip("abc", Priority, strict=True))
    rate = (Limit(10.0, 1).sustained or 0) * 60
    found.add(high, 0, 0, 20 * rate)
    found.add(low, 0, 0, 5 * rate)
    found.add(medium, 10 * MINUTE, 10 * MINUTE, 3 * rate)
    flowed(found)
    for bin_, parts in ((5, (0.9, 0, 0.1)), (15, (0.8, 0.1, 0.1))):
        assert [lane.gone[bin_] / rate for lane in (high, medium, low)] == pytest.approx(parts, abs=0.002)
    assert sum(map(sum, (high.gone, medium.gone, low.gone))) == pytest.approx(28 * rate)
    # medium has all but the share of the lower one when the high one is done
    done = next(bin_ for bin_ in range(20, 60) if high.gone[bin_] < 1)
    assert (medium.gone[done], low.gone[done]) == pytest.approx((0.9 * rate, 0.1 * rate), rel=0.1)


def test_a_share_takes_places_of_workers_that_serve_higher_queues_alone() -> None:
    pools = [Pool(frozenset({HIGH}), 10)]
    for share, part in ((0.0, 0.0), (0.2, 0.2)):
        found = stream(pools=pools, share=share)
        high, low = found.lane("a", HIGH, seconds=1), found.lane("b", LOW, seconds=1)
        found.add(high, 0, 0, 30_000)
        found.add(low, 0, 0, 30_000)
        flowed(found)
        assert low.gone[20] / 600 == pytest.approx(part, abs=0.002)


def test_a_share_is_one_of_runs_however_long_they_take() -> None:
    """Five slots do 100 runs in five minutes, of which 60 take 20 s, 20 take 5 s, and 20 take 10 s."""
    found = stream(pools=[Pool(ALL, 5)], share=0.2)
    lanes = [found.lane("a", HIGH, seconds=20), found.lane("b", MEDIUM, seconds=5), found.lane("c", LOW, seconds=10)]
    for lane in lanes:
        found.add(lane, 0, 0, 1000)
    flowed(found)
    assert [sum(lane.gone[10:40]) / 6 for lane in lanes] == pytest.approx([60, 20, 20], rel=0.03)


def test_a_supply_makes_its_jobs_evenly_and_waits_while_it_may_not() -> None:
    """Sixty a minute; while the high lane has everything, ten wait, and afterwards it goes on as before."""
    found = stream(limits={"total": Limit(2.0, 1)}, tokens={"total": 0.0})
    high, low = found.lane("first", HIGH), found.lane("second", LOW, backfill="b1")
    rate = (Limit(2.0, 1).sustained or 0) * 60
    found.supply(low, 1.0, 600, 10)
    found.add(high, 5 * MINUTE, 5 * MINUTE, 10 * rate)
    flowed(found)
    assert low.gone[:5].tolist() == pytest.approx([60] * 5)
    assert [low.backlog[bin_] for bin_ in range(5, 14)] == pytest.approx([10] * 9)
    assert sum(low.gone[5:15]) == pytest.approx(0, abs=1.5)
    assert low.gone[15] == pytest.approx(70, abs=1)
    assert low.gone[16:19].tolist() == pytest.approx([60] * 3)
    assert (sum(low.gone), sum(low.planned)) == pytest.approx((600, 600))
    assert max(low.backlog) <= 10 + 1e-6


def test_a_supply_with_long_runs_is_slower_than_its_rate() -> None:
    found = stream()
    lane = found.lane("report", LOW, backfill="b1", seconds=99.5)
    found.supply(lane, 5.0, 10_000, 50)
    flowed(found)
    assert lane.gone[30] == pytest.approx(30)


LANES = st.tuples(st.sampled_from(list(Priority)), st.sampled_from(["a", "b"]), st.floats(1, 3), st.floats(0.01, 200))
FLOWS = st.tuples(st.integers(0, 3), st.integers(0, 50 * MINUTE), st.integers(0, 40 * MINUTE), st.floats(0.1, 5000))


@settings(deadline=None, max_examples=25)
@given(
    lanes=st.lists(LANES, min_size=4, max_size=4),
    flows=st.lists(FLOWS, min_size=1, max_size=8),
    total=st.none() | st.floats(0.05, 50),
    host=st.none() | st.floats(0.05, 50),
    slots=st.none() | st.integers(0, 20),
    places=st.none() | st.integers(1, 5),
    share=st.sampled_from([0.0, 0.05, 0.3]),
    supply=st.none() | st.tuples(st.floats(0.001, 50), st.floats(1, 20_000), st.integers(10, 500)),
)
def test_nothing_is_lost_and_no_limit_broken(
    lanes: list[tuple[Priority, str, float, float]],
    flows: list[tuple[int, int, int, float]],
    total: float | None,
    host: float | None,
    slots: int | None,
    places: int | None,
    share: float,
    supply: tuple[float, float, int] | None,
) -> None:
    limits = {"total": Limit(total, 5) if total else None, "host:a": Limit(host, 20, places) if host else None}
    there = {name: one for name, one in limits.items() if one}
    found = stream(hours=2, limits=there, pools=None if slots is None else [Pool(ALL, slots)], share=share)
    made = [
        found.lane(f"d{number}", priority, host=of, attempts=attempts, seconds=seconds)
        for number, (priority, of, attempts, seconds) in enumerate(lanes)
    ]
    for number, start_ms, window_ms, jobs in flows:
        found.add(made[number], start_ms, start_ms + window_ms, jobs)
    if supply is not None:
        made.append(found.lane("d0", LOW, backfill="b1", host="a"))
        found.supply(made[-1], *supply)
    flowed(found)
    if supply is not None:
        assert sum(made[-1].planned) <= min(supply[1], supply[0] * 2 * HOUR / SECOND) + 1e-3
        assert max(made[-1].backlog) <= supply[2] + 1e-3
    for lane in made:
        assert sum(lane.planned) == pytest.approx(sum(lane.gone) + lane.waits, rel=1e-6, abs=1e-3)
        came = went = 0.0
        for bin_ in range(found.bins):
            came, went = came + lane.planned[bin_], went + lane.gone[bin_]
            assert lane.backlog[bin_] == pytest.approx(came - went, rel=1e-6, abs=1e-2)
    for name, limit in limits.items():
        if limit is not None and limit.per_second is not None:
            used = found.buckets[name].used
            for first in range(found.bins):
                runs = 0.0
                for last in range(first, min(found.bins, first + 5)):
                    runs += used[last]
                    assert runs <= limit.per_second * 60 * (last - first + 1) + limit.capacity + 1e-3
    if slots is not None:
        (pool,) = found.slots
        assert all(used <= slots * MINUTE * (1 + 1e-6) + 1 for used in pool.used)


# --- with windows ----------------------------------------------------------------------------------------------------


def define(name: str = "report", **fields: Any) -> Definition:
    schedule = {} if "cron" in fields else {"interval": {"type": "daily", "at_time": {"hour": 9}}}
    return Definition.model_validate({"id": name, "name": name, "call": "tasks.inputs:anything", **schedule, **fields})


NOTHING = DefinitionCounts({}, {}, 0, 0, Histogram((), 0, 0))


def counts(jobs: int, *, retried: int = 0, ms: int = 100) -> DefinitionCounts:
    runs = jobs + retried
    return DefinitionCounts({(HIGH, JobState.COMPLETED): jobs}, {HIGH: retried}, 0, 0, Histogram((), runs, runs * ms))


def outlook(*known: tuple[Definition, int], now_ms: int = DAY, limits: Mapping[str, Limit] | None = None, **more: Any) -> Outlook:
    """A look at default groups with so many members, at midnight."""
    measured = more.pop("measured", {})
    return Outlook(
        **{
            "now_ms": now_ms,
            "definitions": {
                one.id: KnownDefinition(one.priority, "", more.pop(f"paused_{one.id}", ""), measured.get(one.id, NOTHING), 1.0)
                for one, _ in known
            },
            "groups": tuple(
                KnownGroup(Group(one.id, one.id, one.schedule, now_ms), members, float(now_ms)) for one, members in known if members
            ),
            "open": (),
            "waiting": {},
            "queued": {},
            "running": {},
            "limits": tuple(LimitState(name, one, None, True, None, 0, None) for name, one in (limits or {}).items()),
            "workers": (Worker("w1", now_ms, 100_000, ("high", "medium", "low"), (), {}),),
            "users": 0,
            **more,
        }
    )


def ahead(look: Outlook, *definitions: Definition, hours: float = 24) -> _Ahead:
    end_ms = look.now_ms + round(hours * HOUR)
    return _Ahead(look, {one.id: one for one in definitions}, Settings(), horizon=HORIZON, end_ms=end_ms, bin_ms=MINUTE)


def test_enabling_two_hundred_thousand_at_nine_saturates_the_limit() -> None:
    """200,000 at 20/s take 10,000 s: the window that was a minute ends at 11:46:40, and the rate is used up for as long."""
    report = define()
    limit = Limit(20.0, 30)
    look = ahead(outlook((report, 0), limits={"total": limit}), report)
    found = look.forecast([Added("report", 200_000)], {}, None)
    (use,) = found.saturated
    (span,) = use.saturated
    nine = DAY + 9 * HOUR
    assert (span.begin_ms, span.end_ms) == (nine, nine + 166 * MINUTE)
    (widening,) = found.windows
    alone = fit({"total": limit.sustained or 0}, [], [Demand(nine, MINUTE, 200_000, 2, ("total",))])
    assert (widening.at_ms, widening.asked_ms, widening.window_ms) == (nine, MINUTE, alone[0].window_ms)
    assert widening.window_ms == pytest.approx(10_000 * SECOND, abs=SECOND)
    assert found.total.jobs == 200_000
    assert found.total.peak == pytest.approx(1200, rel=1e-3)
    assert (found.slots.needed, found.slots.needed_at_ms) == (20, nine)
    assert found.backlogs == ()


def test_with_retries_the_same_builds_a_backlog() -> None:
    """Windows do not foresee retries. With a quarter more runs than jobs, a fifth of what comes until 11:46:40 waits then."""
    report = define()
    look = ahead(outlook((report, 200_000), limits={"total": Limit(20.0, 30)}, measured={"report": counts(1000, retried=250)}), report)
    found = look.forecast((), {}, None)
    of_all = found.backlogs[0]
    assert (of_all.of, of_all.because) == ("total", ("total",))
    assert of_all.jobs == pytest.approx(40_000, rel=0.01)
    assert of_all.end_ms == pytest.approx(DAY + 9 * HOUR + 12_500 * SECOND, abs=2 * MINUTE)
    assert found.total.requests == pytest.approx(250_000, rel=1e-3)


def test_too_few_slots_make_a_backlog_and_it_says_how_many_are_needed() -> None:
    report = define(window="10m")
    look = ahead(outlook((report, 6000), measured={"report": counts(100, ms=2000)}), report)
    assert look.forecast((), {}, None).slots.needed == 20
    found = look.forecast((), {}, 5)
    assert (found.slots.there, found.slots.needed) == (5, 20)
    assert {one.because for one in found.backlogs} == {("workers",)}
    # 6000 runs of 2 s in 5 slots are done 40 minutes after nine
    assert found.backlogs[0].end_ms == pytest.approx(DAY + 9 * HOUR + 40 * MINUTE, abs=2 * MINUTE)
    assert found.backlogs[0].delay_ms == pytest.approx(30 * MINUTE, abs=2 * MINUTE)


def test_thousands_of_own_schedules_are_planned_as_their_groups() -> None:
    report = define()
    zones = ("Asia/Tokyo", "Europe/Berlin", "America/New_York", "Asia/Kolkata")
    groups = []
    for zone in zones:
        for hour in range(24):
            own = define(interval={"type": "daily", "timezone": zone, "at_time": {"hour": hour}}).schedule
            groups.append(KnownGroup(Group(f"report~{zone}{hour}", "report", own, DAY), 100, float(DAY)))
    look = ahead(outlook((report, 0), groups=tuple(groups)), report)
    simulation = look._simulate((), {}, None)
    assert sum(one.members for one in simulation.opened) == 96 * 100
    # three zones share the hours, and India is half an hour beside them
    assert sorted({one.members for one in simulation.opened}) == [100, 300]


def test_what_is_paused_is_left_out_and_said() -> None:
    report = define()
    found = ahead(outlook((report, 500), paused_report="a test"), report).forecast((), {}, None)
    assert found.total.jobs == 0
    assert found.left_out == ("Paused, and left out with what waits of it: report.",)


def test_what_is_not_published_yet_is_forecast_as_it_is_here() -> None:
    """A release moves the report from nine to ten, makes it high, and lets 2/s of it go."""
    old = define(window="10m")
    new = define(interval={"type": "daily", "at_time": {"hour": 10}}, window="5m", priority="high", rate_limit="2/s")
    look = outlook((old, 1200))
    known = {"report": replace(look.definitions["report"], version=old.version)}
    found = ahead(replace(look, definitions=known), new).forecast((), {}, None)
    (widening,) = found.windows
    assert (widening.at_ms, widening.asked_ms, widening.window_ms) == (DAY + 10 * HOUR, 5 * MINUTE, 10 * MINUTE)
    assert widening.limit == "definition:report"
    assert found.priorities[0].jobs == pytest.approx(1200)
    assert any("as they are here" in line and "report" in line for line in found.assumptions)
    same = ahead(replace(look, definitions=known), old).forecast((), {}, None)
    assert same.total.peak_at_ms == DAY + 9 * HOUR
    assert not any("as they are here" in line for line in same.assumptions)


def test_open_occurrences_and_what_waits_come_first() -> None:
    report = define(window="1h")
    look = outlook(
        (report, 0),
        open=(OpenOccurrence(f"report|{DAY - HOUR // 2}", "report", DAY - HOUR // 2, HOUR, 1000, 480),),
        waiting={("report", MEDIUM): Waiting(7, 20, (0, 60))},
    )
    found = ahead(look, report, hours=3).forecast((), {}, None)
    assert found.total.jobs == pytest.approx(480 + 7 + 20 + 60, abs=0.1)
    points = {point.bin: point.jobs for point in found.total.points}
    assert sum(points.get(bin_, 0) for bin_ in range(30)) == pytest.approx(480 + 27, abs=0.2)
    assert points[90] == pytest.approx(1)


def hourly(found: Forecast) -> list[int]:
    """How many jobs become due in each hour of the day, up to the last."""
    jobs: defaultdict[int, float] = defaultdict(float)
    for point in found.total.points:
        jobs[(found.start_ms + point.bin * MINUTE - DAY) // HOUR] += point.jobs
    return [round(jobs[hour]) for hour in range(max(jobs) + 1)]


@pytest.mark.parametrize("window", ["10m", "0s"])
def test_who_has_an_unfinished_job_is_skipped(window: str) -> None:
    """Runs of 90 minutes, each hour: every second one. What each user had before all began is not known, and counts for all alike."""
    report = define(interval={"type": "hourly"}, window=window, overlap="skip")
    look = outlook((report, 1000), measured={"report": counts(100, ms=90 * MINUTE)}, now_ms=DAY + MINUTE)
    found = ahead(look, report, hours=5.9).forecast((), {}, None)
    assert hourly(found) == [0, 1000, 0, 1000, 0, 1000]
    assert "Skipped, because the user's last job would not be finished (overlap: skip): 2,000 of report." in found.left_out
    runs = replace(look, running={"report": 400}, running_since_ms={"report": look.now_ms})
    assert hourly(ahead(runs, report, hours=5.9).forecast((), {}, None)) == [0, 600, 400, 600, 400, 600]
    assert hourly(ahead(replace(runs, running_since_ms={}), report, hours=5.9).forecast((), {}, None))[1] == 1000
    own = Group("report~own", "report", define(interval={"type": "hourly", "at_time": {"minute": 30}}).schedule, look.now_ms)
    both = replace(look, groups=(*look.groups, KnownGroup(own, 500, float(look.now_ms))))
    # users of one group have nothing to do with those of the other
    assert hourly(ahead(both, report, hours=5.9).forecast((), {}, None)) == [500, 1000, 500, 1000, 500, 1000]


def test_who_waits_for_a_worker_is_skipped_and_nobody_else() -> None:
    """400 an hour can run, of 1000: so many are made, and never more wait than there are users."""
    allow = define(interval={"type": "hourly"}, window="10m")
    skip = define(interval={"type": "hourly"}, window="10m", overlap="skip")
    look = outlook((skip, 1000), measured={"report": counts(100, ms=9 * SECOND)})
    found = ahead(look, skip).forecast((), {}, 1)
    assert found.total.jobs == pytest.approx(23 * 400 + 600, rel=0.05)
    assert found.total.backlog <= 1000
    assert ahead(look, allow).forecast((), {}, 1).total.jobs == 23_000
    # with workers enough it is all one
    assert ahead(look, skip).forecast((), {}, 4).to_dict() == ahead(look, allow).forecast((), {}, 4).to_dict()


def test_a_paused_backfill_makes_nothing_and_one_that_runs_is_low() -> None:
    report = define(priority="high")
    backfills = (
        OpenBackfill("b1", "report", BackfillState.RUNNING, 2.0, 20, 15, 600.0),
        OpenBackfill("b2", "report", BackfillState.PAUSED, 2.0, 20, 0, 600.0),
    )
    # five of those that wait are others
    look = outlook((report, 0), backfills=backfills, waiting={("report", LOW): Waiting(15, 5, ())})
    found = ahead(look, report, hours=1).forecast((), {}, None)
    assert found.priorities[2].jobs == found.total.jobs == pytest.approx(620, abs=0.1)
    assert [round(point.jobs) for point in found.total.points] == [140, 120, 120, 120, 120]
    assert any("b1 of report" in line for line in found.assumptions)
    assert "Backfills that are paused: b2 of report." in found.left_out


def test_share_and_fairness_are_those_of_the_leader() -> None:
    high, low = define("first", priority="high"), define("second", priority="low")
    waiting = {("first", HIGH): Waiting(6000, 0, ()), ("second", LOW): Waiting(6000, 0, ())}
    look = outlook((high, 0), (low, 0), waiting=waiting, limits={"total": Limit(10.0, 1)})
    asked = partial(_Ahead, catalogue={"first": high, "second": low}, horizon=HORIZON, end_ms=look.now_ms + HOUR // 3, bin_ms=MINUTE)
    for share, own, part in ((None, 0.0, 0.0), (None, 0.25, 0.25), (0.1, 0.25, 0.1)):
        known = replace(look, share=share, fairness=None if share is None else True)
        found = asked(known, settings=Settings(lower_share=own)).forecast((), {}, None)
        assert found.priorities[2].points[5].requests / found.total.points[5].requests == pytest.approx(part, abs=0.01)
        assert any("fairness" in line for line in found.assumptions) == (share is not None)


def test_measures_fall_back_and_say_so() -> None:
    own, alike, other, none = define("own"), define("alike"), define("other", priority="low"), define("none", priority="high")
    known = outlook((own, 1), (alike, 1), (other, 1), (none, 1), measured={"own": counts(100, retried=50, ms=200), "alike": counts(3)})
    found = measure(known.definitions)
    assert (found["own"].seconds, found["own"].attempts, found["own"].source) == (0.2, 1.5, Source.MEASURED)
    assert found["alike"].source is Source.PRIORITY
    assert (found["other"].source, found["none"].source) == (Source.ALL, Source.ALL)
    alone = measure(outlook((own, 1)).definitions)["own"]
    assert (alone.seconds, alone.attempts, alone.source) == (ASSUMED_SECONDS, 1.0, Source.ASSUMED)
    assert any("own" in line and "1 s" in line for line in ahead(outlook((own, 1)), own).forecast((), {}, None).assumptions)


def test_one_definition_with_long_runs_does_not_speak_for_all() -> None:
    names = ("short", "usual", "long", "new")
    times = {"short": counts(50, ms=100), "usual": counts(20, ms=400), "long": counts(900, ms=1_200_000)}
    known = outlook(*((define(name), 1) for name in names), measured=times)
    assert measure(known.definitions)["new"].seconds == pytest.approx(0.4)


def test_a_burst_of_a_low_rate_is_not_used_up() -> None:
    """Five runs of a bucket of 100 that gets one in an hour are more than the rate, and leave nearly all of it."""
    report = define()
    look = ahead(outlook((report, 5), limits={"total": Limit(1 / 3600, 100)}), report)
    simulation: Simulation = look._simulate((), {}, None)
    bucket = simulation.stream.buckets["total"]
    assert isinstance(bucket, Bucket)
    # the windows are wider all the same: they go by the rate
    assert all(one.limit == "total" for one in simulation.opened)
    assert min(bucket.left) > 0.9


def test_spans_join_what_one_bin_parts() -> None:
    found = spans(stream(hours=10 / 60), [True, False, True, False, False, False, True, True, False, True])
    assert [(one.begin_ms // MINUTE, one.end_ms // MINUTE, one.open) for one in found] == [(0, 3, False), (6, 10, True)]


# --- what is asked, told and drawn ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "limit"),
    [
        ("total=20/s:30", "total", Limit(20.0, 30)),
        ("host:localhost:8000=5/s,concurrency=4", "host:localhost:8000", Limit(5.0, 2, 4)),
        ("definition:report=concurrency=3", "definition:report", Limit(concurrency=3)),
        ("total=none", "total", Limit()),
    ],
)
def test_limits_are_read(text: str, name: str, limit: Limit) -> None:
    assert asked_limit(text) == (name, limit)


@pytest.mark.parametrize("text", ["total", "=1/s", "total=", "total=fast", "total=1/s:x", "total=1/s:0", "total=1/s,concurrency=-1"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"total|=1/s"):
        asked_limit(text)


@cache
def full_forecast() -> Forecast:
    report, sync = define(), define("sync", interval={"type": "hourly"}, window="20m", priority="low")
    look = ahead(
        outlook((report, 100), (sync, 3000), limits={"total": Limit(20.0, 30), "definition:sync": Limit(concurrency=9)}), report, sync
    )
    found = look.forecast([Added("report", 200_000)], {"total": Limit(10.0, 15)}, 30)
    before = look.forecast((), {}, None, points=False)
    return Forecast(**{**{name: getattr(found, name) for name in Forecast.__slots__}, "before": before})


def test_json_gives_the_same_forecast_back() -> None:
    found = full_forecast()
    text = json.dumps(found.to_dict())
    assert read_forecast(json.loads(text)) == found
    few = read_forecast(found.to_dict(points=False))
    assert few.total == found.total
    assert all(not one.points for one in few.definitions)


def test_warnings_name_what_gets_worse_and_nothing_else() -> None:
    report = define()
    look = ahead(outlook((report, 100), limits={"total": Limit(20.0, 30)}), report)
    before = look.forecast((), {}, None)

    def warned(users: int, slots: int | None = None) -> list[str]:
        found = look.forecast([Added("report", users)], {}, slots)
        return warnings_of(Forecast(**{**{name: getattr(found, name) for name in Forecast.__slots__}, "before": before}))

    assert warned(10) == []
    assert warned(200_000) == [
        "limit total (20/s burst 30) would be used up from 2027-01-15 09:00Z until 2027-01-15 11:46Z; report ask most"
    ]
    assert any("20 worker slots would be needed" in line and "there are 2" in line for line in warned(200_000, 2))
    assert any(line.startswith("jobs would wait up to") for line in warned(200_000, 2))


def test_the_svg_stands_for_itself() -> None:
    text = plot_svg(full_forecast())
    root = ElementTree.fromstring(text)
    tags = {one.tag.rpartition("}")[2] for one in root.iter()}
    assert tags == {"svg", "style", "rect", "polygon", "polyline", "text"}
    assert "href" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "used up" in text
    assert "total" in text
    # on a phone of 360 pixels its smallest text is 9 pixels high
    width = float(root.attrib["viewBox"].split()[2])
    assert min(float(one.attrib["font-size"]) for one in root.iter() if "font-size" in one.attrib) * 360 / width >= 9


def test_both_renderers_draw_one_drawing() -> None:
    pytest.importorskip("PIL", reason="pillow is not installed")
    import io

    from PIL import Image

    drawing = _draw(full_forecast())
    image = Image.open(io.BytesIO(plot_png(full_forecast())))
    assert image.size == (round(drawing.width * 2), round(drawing.height * 2))
    colours = {colour for _, colour in image.getcolors(100_000) or []}
    for shape in ("#b4361e", "#4f8fca", "#8f1d4c"):
        assert tuple(bytes.fromhex(shape[1:])) in colours, shape
    assert svg(drawing).count("<polygon") == sum(type(one).__name__ == "Area" for one in drawing.shapes)
    assert png(drawing).startswith(b"\x89PNG")


def test_the_text_shows_a_peak_where_it_is() -> None:
    lines = plot_text(full_forecast(), width=80).splitlines()
    assert lines[0].startswith("requests a minute, at most")
    assert all(len(line) <= 90 for line in lines)
    # it begins at midnight, so the ninth hour is in the columns after nine of 24 parts
    bars = lines[5][9:]
    assert bars[round(9.5 / 24 * len(bars))] == "█"
    assert lines[-1].endswith("UTC")


def test_an_empty_day_is_drawn_too() -> None:
    found = ahead(outlook(), hours=0.2).forecast((), {}, None)
    assert ElementTree.fromstring(plot_svg(found)).tag.endswith("svg")
    assert "at most 0" in plot_text(found)
    assert limit_uses(ahead(outlook(limits={"total": Limit(1.0, 1)}))._simulate((), {}, None)) == []
