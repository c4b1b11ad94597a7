"""Windows are as wide as the limits need, and no wider; held against a simulation of the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskplatform.capacity import LONGEST_MS, Demand, Fit, Load, fit

SECOND = 1000
TOTAL = ("total",)
NOW = 1_800_000_000_000


def demand(jobs: int, seconds: float = 60, *, start: float = 0, rank: int = 0, limits: tuple[str, ...] = TOTAL) -> Demand:
    return Demand(NOW + round(start * SECOND), round(seconds * SECOND), jobs, rank, limits)


def load(jobs: float, start: float, end: float, *, rank: int = 0, limits: tuple[str, ...] = TOTAL) -> Load:
    return Load(NOW + start * SECOND, NOW + end * SECOND, jobs, rank, limits)


def windows(found: Sequence[Fit]) -> list[tuple[float, float]]:
    """(start, length) of each, in seconds from now."""
    return [((one.start_ms - NOW) / SECOND, one.window_ms / SECOND) for one in found]


def fit_total(per_second: float, demands: Sequence[Demand], loads: Sequence[Load] = ()) -> list[tuple[float, float]]:
    return windows(fit({"total": per_second}, loads, demands))


# --- examples --------------------------------------------------------------------------------------------------------


def test_a_window_is_as_long_as_the_limit_needs() -> None:
    (found,) = fit({"total": 10.0}, [], [demand(10_000)])
    assert found == Fit(NOW, 1_000_000, "total", 10_000)


@pytest.mark.parametrize("jobs", [0, 1, 599, 600, 601])
def test_a_window_that_fits_is_kept(jobs: int) -> None:
    assert fit({"total": 10.0}, [], [demand(jobs)]) == [Fit(NOW, 60_000)]


def test_the_time_of_day_makes_no_window_longer() -> None:
    """An instant of today, as a number of milliseconds, leaves little room for fractions."""
    for start_ms in range(NOW, NOW + 2000):
        assert fit({"total": 0.01}, [], [Demand(start_ms, 60_000, 3, 0, TOTAL)]) == [Fit(start_ms, 300_000, "total", 3)]


def test_no_limit_no_change() -> None:
    assert fit({}, [], [demand(10**9, 0)]) == [Fit(NOW, 0)]
    assert fit({"host:other": 1.0}, [], [demand(10**9, 0)]) == [Fit(NOW, 0)]


def test_the_tightest_limit_counts() -> None:
    rates = {"total": 100.0, "definition:report": 2.0, "host:api": 5.0}
    (found,) = fit(rates, [], [demand(1000, limits=("definition:report", "host:api", "total"))])
    assert (found.window_ms, found.limit) == (500_000, "definition:report")


def test_those_due_together_share_one_end() -> None:
    assert fit_total(10, [demand(1000), demand(3000), demand(2000, 30)]) == [(0, 600)] * 3


def test_a_longer_window_that_leaves_enough_room_is_kept() -> None:
    """3,600 jobs in an hour leave 9/s of 10/s."""
    assert fit_total(10, [demand(3600, 3600), demand(900)]) == [(0, 3600), (0, 100)]


def test_a_longer_window_that_leaves_no_room_ends_with_the_others() -> None:
    assert fit_total(10, [demand(36_000, 3600), demand(600)]) == [(0, 3660)] * 2


def test_a_higher_priority_goes_first() -> None:
    assert fit_total(10, [demand(1000, rank=2), demand(1000, rank=0)]) == [(100, 100), (0, 100)]


def test_what_a_lower_priority_has_committed_does_not_count() -> None:
    committed = [load(10_000, 0, 1000, rank=4)]
    assert fit_total(10, [demand(1000, rank=2)], committed) == [(0, 100)]
    assert fit_total(10, [demand(1000, rank=4)], committed) == [(1000, 100)]


def test_a_window_begins_when_the_limit_has_room_again() -> None:
    """Else its first jobs would wait for those that are committed."""
    assert fit_total(10, [demand(10_000)], [load(5000, 0, 500)]) == [(500, 1000)]


def test_beside_what_takes_a_part_of_the_limit() -> None:
    assert fit_total(10, [demand(1000)], [load(10_000, 0, 2000)]) == [(0, 200)]


def test_what_waits_already_goes_first() -> None:
    assert fit_total(10, [demand(1000)], [load(3000, 0, 0)]) == [(300, 100)]


def test_a_single_job_needs_no_window() -> None:
    assert fit_total(0.001, [demand(1, 0)]) == [(0, 0)]
    assert fit_total(0.001, [demand(1, 0)], [load(1, 0, 0)]) == [(1000, 1000)]


def test_a_limit_that_has_become_lower() -> None:
    """What was spread for 10/s takes until 200 at 5/s."""
    assert fit_total(5, [demand(500)], [load(1000, 0, 100)]) == [(200, 100)]


def test_the_longest_window() -> None:
    ((_, length),) = fit_total(1e-6, [demand(10**9)])
    assert length * SECOND == LONGEST_MS


# --- properties ------------------------------------------------------------------------------------------------------

RATES = st.floats(2, 200)
SPANS = st.integers(0, 900)
LOADS = st.lists(st.tuples(st.integers(0, 2000), SPANS, SPANS).map(lambda one: load(one[0], one[1], one[1] + one[2])), max_size=6)
DEMANDS = st.lists(st.builds(demand, st.integers(0, 5000), SPANS), min_size=1, max_size=8)


def waiting(per_second: float, flows: Sequence[Load], until: float) -> list[float]:
    """How many jobs wait for a limit at the end of each second, from now to `until` (ms)."""
    queue, found = 0.0, []
    at = float(NOW)
    while at < until:
        step = min(SECOND, until - at)
        for flow in flows:
            if flow.end_ms > flow.start_ms:
                part = max(0.0, min(flow.end_ms, at + step) - max(flow.start_ms, at)) / (flow.end_ms - flow.start_ms)
            else:
                part = float(at <= flow.start_ms < at + step)
            queue += flow.jobs * part
        queue = max(0.0, queue - per_second * step / SECOND)
        found.append(queue)
        at += step
    return found


def flows(demands: Sequence[Demand], found: Sequence[Fit]) -> list[Load]:
    return [
        Load(one.start_ms, one.start_ms + one.window_ms, asked.jobs, asked.rank, asked.limits)
        for asked, one in zip(demands, found, strict=True)
    ]


@settings(deadline=None)
@given(RATES, DEMANDS)
def test_nothing_ever_waits_beside_an_idle_limit(per_second: float, demands: list[Demand]) -> None:
    found = fit({"total": per_second}, [], demands)
    end = max(one.start_ms + one.window_ms for one in found) + SECOND
    # one job may go at once; each demand is rounded by a ms
    assert max(waiting(per_second, flows(demands, found), end)) <= 1 + len(demands) * per_second / SECOND


@settings(deadline=None)
@given(RATES, st.lists(st.tuples(st.integers(0, 5000), SPANS), max_size=6), DEMANDS)
def test_the_committed_and_the_new_are_done_when_the_windows_end(
    per_second: float, running: list[tuple[int, int]], demands: list[Demand]
) -> None:
    committed = [load(jobs, 0, span) for jobs, span in running]
    found = fit({"total": per_second}, committed, demands)
    short = [one.limit for one in found]
    if any(short):
        end = max(one.start_ms + one.window_ms for one in found if one.limit)
        others = [one for one in flows(demands, found) if one.end_ms <= end]
        left = waiting(per_second, [*committed, *others], end)[-1]
        assert left <= 2 + len(demands) * per_second / SECOND


@settings(deadline=None)
@given(RATES, LOADS, st.integers(0, 5000), SPANS)
def test_never_wider_than_needed(per_second: float, committed: list[Load], jobs: int, seconds: int) -> None:
    asked = demand(jobs, seconds)
    (found,) = fit({"total": per_second}, committed, [asked])
    if found.limit:
        # in a tenth less there is not enough room: the limit was busy or took others for all but this many jobs
        shorter = found.start_ms + found.window_ms * 0.9
        passed = per_second * (shorter - found.start_ms) / SECOND - _served(per_second, committed, found.start_ms, shorter)
        assert found.window_ms <= asked.window_ms or passed <= jobs + 1
    else:
        assert (found.start_ms, found.window_ms) == (asked.start_ms, asked.window_ms)


def _served(per_second: float, committed: Sequence[Load], since: float, until: float) -> float:
    """How many of the committed jobs pass the limit between two instants."""

    def passed(at: float) -> float:
        before = [Load(one.start_ms, one.end_ms, one.jobs, one.rank, one.limits) for one in committed]
        arrived = sum(
            one.jobs * max(0.0, min(1.0, (at - one.start_ms) / (one.end_ms - one.start_ms)))
            if one.end_ms > one.start_ms
            else one.jobs * (at > one.start_ms)
            for one in before
        )
        left = waiting(per_second, before, at)
        return arrived - (left[-1] if left else 0.0)

    return passed(until) - passed(since)


@settings(deadline=None)
@given(RATES, LOADS, st.integers(2, 4000), st.integers(1, 1000), SPANS)
def test_more_jobs_never_end_earlier(per_second: float, committed: list[Load], jobs: int, more: int, seconds: int) -> None:
    fewer, many = (fit({"total": per_second}, committed, [demand(count, seconds)])[0] for count in (jobs, jobs + more))
    slack = 0.2 * max(many.window_ms, seconds * SECOND) + 2  # a window may begin later, when that costs it a tenth of its room at most
    assert fewer.start_ms + fewer.window_ms <= many.start_ms + many.window_ms + slack


@settings(deadline=None)
@given(RATES, LOADS, DEMANDS, st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_alike_ones_are_one(per_second: float, committed: list[Load], demands: list[Demand], parts: list[int]) -> None:
    """Groups of a definition that are due together get the window that one group of all their members would get."""
    whole, split = demand(sum(parts), 90, start=3), [demand(part, 90, start=3) for part in parts]
    together = fit_total(per_second, [*demands, whole], committed)
    apart = fit_total(per_second, [*demands, *split], committed)
    assert apart == [*together[:-1], *[together[-1]] * len(parts)]


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["definition:a", "definition:b", "host:x", "total"]), RATES),
    st.lists(st.tuples(st.integers(0, 3000), SPANS, st.sampled_from("ab"), st.integers(0, 2)), min_size=1, max_size=6),
)
def test_every_limit_carries_what_it_got(rates: Mapping[str, float], asked: list[tuple[int, int, str, int]]) -> None:
    demands = [demand(jobs, seconds, rank=rank, limits=(f"definition:{name}", "host:x", "total")) for jobs, seconds, name, rank in asked]
    found = fit(rates, [], demands)
    for one, before in zip(found, demands, strict=True):
        assert one.start_ms >= before.start_ms
        assert one.window_ms >= before.window_ms
        assert bool(one.limit) == ((one.start_ms, one.window_ms) != (before.start_ms, before.window_ms))
        assert one.limit in ("", *rates)
    for name, per_second in rates.items():
        mine = [flow for flow in flows(demands, found) if name in flow.limits]
        if mine:
            end = max(flow.end_ms for flow in mine)
            left = waiting(per_second, mine, end + SECOND)[-1]
            assert left <= 2 + math.ceil(len(mine) * per_second / SECOND), name
